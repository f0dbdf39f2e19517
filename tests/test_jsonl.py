"""Logs are read to their last whole line."""

import pytest

from data.jsonl import read_log


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert read_log(path) == [{"step": 0}, {"step": 1}]
    cut = '{"step": 2, "rew'
    for torn in (f"{cut}\n", f"{cut}\n\n", f"{cut}\0\0", "\0" * 100, "\0\n", "\x80"):
        path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + torn.encode("latin-1"))
        assert read_log(path) == [{"step": 0}, {"step": 1}], torn
    path.write_text('{"step": 0}\n\0\0\0{"step": 1}')  # after a power cut; whole without its end
    assert read_log(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\n{"step": 1, \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2: expected a JSON object \("):
        read_log(path)
    path.write_text('{"step": 0}\n{"step": 1, "step": 2}\n')  # no line that was cut off
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2: .*expected each key once, got 'step' twice"):
        read_log(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="metrics.jsonl line 1: expected a JSON object, got list"):
        read_log(path)
