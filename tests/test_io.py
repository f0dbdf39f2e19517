"""Folders are tried before anything is written, and what was not measured is written as null."""

import errno
import json
import math
import os
import re
from pathlib import Path

import pytest

from data.benchmarks.files import file_rows
from data.captions.shards import plan_shards
from data.examples import load_examples
from data.io import agree_on, check_room, disk_sentence, link_new, naming, nearest, to_json, write_whole
from data.parquet import parquet_columns


def test_room_is_looked_for_and_nothing_is_left(tmp_path, monkeypatch):
    check_room(tmp_path / "not/yet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"not/yet: expected room for 1073741824.00 GiB, found .* free at .*"):
        check_room(tmp_path / "not/yet", 2**60)

    def refuse(dir):
        raise OSError(errno.EROFS, f"refused in {dir}")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"{tmp_path}/not/yet: refused in {tmp_path} \(.* free at {tmp_path}\)"):
        check_room(tmp_path / "not/yet")


@pytest.mark.parametrize(("number", "name", "said"), [
    (errno.ENOSPC, None, r"out: oops \(.* free at .*"), (errno.ENOSPC, "a", r"a: oops \(.* free at .*"),
    (errno.EINVAL, None, r"\[Errno 22\] oops"), (errno.ENOENT, "a", "a: oops")])
def test_an_error_of_writing_has_a_name_and_room_is_told_where_it_matters(number, name, said):
    with pytest.raises(OSError) as caught, naming("out"):
        raise OSError(number, "oops", name)
    assert re.fullmatch(said, disk_sentence(caught.value))


def test_a_path_that_the_system_will_not_look_at_is_named(tmp_path, monkeypatch):
    """A name of more than 255 characters, and a path in a folder that one may not enter."""
    assert nearest(tmp_path / ("x" * 300) / "run") == tmp_path
    monkeypatch.setattr("os.stat", lambda path, *args, stat=os.stat, **kwargs: (_ for _ in ()).throw(
        PermissionError(13, "Permission denied", str(path))) if "locked/" in str(path) else stat(path, *args, **kwargs))
    assert nearest(tmp_path / "locked/in/it") == tmp_path
    said = disk_sentence(PermissionError(13, "Permission denied", str(tmp_path / "locked/in/it")))
    assert re.fullmatch(rf"{tmp_path}/locked/in/it: Permission denied \(.* free at {tmp_path}\)", said)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_name_replaces_no_file(tmp_path, has_links, request):
    if not has_links:
        request.getfixturevalue("no_links")
    first, second, path = (tmp_path / name for name in ("first", "second", "path"))
    first.write_text("1")
    second.write_text("2")
    link_new(first, path)
    for source in (second, path):
        with pytest.raises(FileExistsError):
            link_new(source, path)
    with pytest.raises(FileNotFoundError):
        link_new(tmp_path / "none", tmp_path / "other")
    assert path.read_text() == "1" and second.read_text() == "2" and first.exists() == has_links
    agree_on(tmp_path / "about.json", {"seed": 0})
    with pytest.raises(ValueError, match="expected seed 1 as now asked for, found 0"):
        agree_on(tmp_path / "about.json", {"seed": 1})
    assert len(list(tmp_path.iterdir())) == 3 + has_links


def test_a_full_disk_is_not_taken_for_one_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="No space left"):
        link_new(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, keep):
    """After a power cut logs that a resumed run had taken back were empty, and it could not go on."""
    synced, path = [], tmp_path / "metrics.jsonl"
    monkeypatch.setattr("os.fsync", lambda fd: synced.append((Path(f"/proc/self/fd/{fd}").read_bytes(), path.exists())))
    write_whole(path, [b"1", b"2"], keep)
    assert synced == [(b"12", False)] and path.read_bytes() == b"12"


def test_what_the_disk_refused_is_named(tmp_path, monkeypatch):
    """Python names no file that is open, and of a link first what it leads to: that is on another disk."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left") as raised:
        write_whole(tmp_path / "about.txt", b"1")
    assert disk_sentence(raised.value).startswith(f"{tmp_path}/about.txt: No space left on device (")
    error = OSError(errno.ENOSPC, "No space left on device", "../../photos/a.png", None, f"{tmp_path}/a.png")
    assert re.fullmatch(rf"{tmp_path}/a.png: No space left on device \(.* free at {tmp_path}\)", disk_sentence(error))
    assert not list(tmp_path.iterdir())


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 7031673\n"


@pytest.mark.parametrize(("name", "read"), [
    ("train-0.parquet", load_examples), ("train-0.parquet", parquet_columns), ("set.jsonl", load_examples),
    *((name, lambda path: list(file_rows(Path(path)))) for name in ("MMStar.tsv", "rows.parquet", "rows.json")),
    ("a.tar", lambda path: plan_shards(Path(path), 1)),
])
def test_a_pointer_of_git_lfs_in_place_of_data_is_named(tmp_path, name, read):
    """A published set cloned without Git LFS: its rows were refused one by one, as no JSON."""
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=f"^{path}: expected .*, found Git LFS's pointer to it: run git lfs pull there$"):
        read(path if read is parquet_columns else str(path))


def test_settings_that_are_no_object_are_named(tmp_path):
    for text in ("[]", "null", "3"):
        (tmp_path / "about.json").write_text(text)
        with pytest.raises(ValueError, match=rf"about.json: expected settings, found {re.escape(repr(json.loads(text)))}"):
            agree_on(tmp_path / "about.json", {"seed": 0})


def test_what_was_not_measured_is_null_in_the_records():
    assert (
        to_json({"a": math.nan, "b": [1.5, {"c": math.inf}], "d": "é"})
        == '{"a": null, "b": [1.5, {"c": null}], "d": "é"}'
    )
