"""Folders are tried before anything is written, and what was not measured is written as null."""

import math

import pytest

from data.io import check_room, to_json


def test_room_is_looked_for_and_nothing_is_left(tmp_path):
    check_room(tmp_path / "not/yet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"not/yet: expected room for 1073741824.00 GiB, found .* free at .*"):
        check_room(tmp_path / "not/yet", 2**60)


def test_what_was_not_measured_is_null_in_the_records():
    assert (
        to_json({"a": math.nan, "b": [1.5, {"c": math.inf}], "d": "é"})
        == '{"a": null, "b": [1.5, {"c": null}], "d": "é"}'
    )
