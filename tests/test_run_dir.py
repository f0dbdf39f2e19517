"""The folder of a run: one writer, one start a line, logs that fit the checkpoint."""

import errno
import json
import os
import threading

import pytest
import torch

from data.io import heartbeat
from data.jsonl import read_log
from grpo.log import LOGS, log_step
from grpo.recipes import toy_config
from grpo.run_dir import check_ranks, check_resumes, check_writer, log_start, only_writer, rewind, saved_config, start_run


def test_starts_say_what_ran_where(tiny_run, tmp_path):
    [start] = read_log(tiny_run / "starts.jsonl")
    assert start["step"] == 0 and start["ranks"] == 1 and start["versions"]["torch"] == torch.__version__
    assert start["machine"]["cores"] >= 1 and start["machine"]["memory_gib"] > 0 and start["machine"]["gpus"] == []
    log_start(tmp_path, 0, 1)
    log_start(tmp_path, 5, 2)  # resumed
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')  # killed while it wrote
    log_start(tmp_path, 7, 2)
    starts = [(start["step"], start["ranks"]) for start in read_log(tmp_path / "starts.jsonl")]
    assert starts == [(0, 1), (5, 2), (7, 2)]


def test_a_run_begins_from_a_console_too(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [""])  # what Python has there
    log_start(tmp_path, 0, 1)
    assert [start["command"] for start in read_log(tmp_path / "starts.jsonl")] == ["''"]


def test_a_run_begins_where_git_cannot_be_started(tmp_path, monkeypatch):
    (tmp_path / "git").touch()  # it may not be executed
    monkeypatch.setenv("PATH", str(tmp_path))
    log_start(tmp_path, 0, 1)
    assert [start["commit"] for start in read_log(tmp_path / "starts.jsonl")] == [""]


def test_a_run_begins_with_a_path_that_is_not_in_utf_8(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--run-dir", os.fsdecode(b"runs/caf\xe9")])
    log_start(tmp_path, 0, 1)
    assert [start["command"] for start in read_log(tmp_path / "starts.jsonl")] == [r"train.py --run-dir 'runs/caf\xe9'"]


def test_a_writer_on_another_machine_lives_while_its_heart_beats(tmp_path, monkeypatch):
    """As on a file system that shows no locks of other machines."""
    monkeypatch.setattr("grpo.run_dir.WRITER_DEAD_S", 0.5)
    other = {"host": "elsewhere", "process": 7, "since": "2026-01-01T00:00:00+00:00"}
    path = tmp_path / "writer.json"
    path.write_text(json.dumps(other))
    ended = heartbeat(path, 0.01)
    refusal = "expected no other writer, found process 7 on elsewhere, since 2026-01-01"
    with pytest.raises(ValueError, match=refusal), only_writer(tmp_path):
        pass
    ended.set()
    with only_writer(tmp_path):  # dead
        check_writer(tmp_path)
        path.write_text(json.dumps(other))  # which took this process for dead
        with pytest.raises(ValueError, match="expected to be its only writer, found process 7"):
            check_writer(tmp_path)
    assert json.loads(path.read_text()) == other
    (tmp_path / "made before").mkdir()
    for name in ("made before", "new"):
        with only_writer(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["made before"]  # nothing was written


def test_a_heart_beats_on_after_a_disk_was_away(tmp_path, monkeypatch):
    path, calls, came_back = tmp_path / "writer.json", [], threading.Event()

    def touch(path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        came_back.set()

    monkeypatch.setattr("data.io.os.utime", touch)
    ended = heartbeat(path, 0.01)
    assert came_back.wait(10)
    ended.set()


def test_files_of_others_are_left_where_they_are(tmp_path):
    start_run(tmp_path, {})
    other = tmp_path / "rollouts/step_000000 (copy).jsonl"
    other.write_text("")
    log_step(tmp_path, 0, {}, {}, {}, [])
    rewind(tmp_path, 0)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == [other.name]
    assert not (tmp_path / "eval.jsonl").exists()  # nothing was evaluated
    for odd in ("[1]", '{"host": 1}'):
        (tmp_path / "writer.json").write_text(odd)
        with only_writer(tmp_path):
            check_writer(tmp_path)


def test_steps_that_two_processes_wrote_are_named_with_the_repair(tmp_path):
    start_run(tmp_path, {})
    for step in (0, 1, 1, 2, 2, 3):
        log_step(tmp_path, step, {}, {}, {}, [])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    want = "expected a line for each of 4 steps, found 6; two processes have written steps 1, 2: "
    want += "keep the first line of each step in metrics.jsonl, audit.jsonl, timing.jsonl, then --"
    with pytest.raises(ValueError, match=want):
        rewind(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    rewind(tmp_path, 1)  # to before it happened
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_a_run_from_before_a_setting_goes_on_without_it():
    """It went on with it in the middle, without a word: what older runs did not save was not compared."""
    saved = {name: value for name, value in toy_config().flat().items()
             if name not in ("resample_flat", "ratio", "mask_truncated", "praise_weight", "eval_data", "lora_rank")}
    check_resumes(toy_config(max_skipped=9), saved, {})
    check_resumes(toy_config(ratio="sequence"), {}, {})  # of a new run
    for setting, message in (({"ratio": "sequence"}, "ratio 'sequence': expected 'token' as the run to resume has it"),
                             ({"resample_flat": 2}, "resample_flat 2: expected 0 as"), ({"praise_weight": 0.1}, "expected 0.0"),
                             ({"eval_data": "0.1"}, "eval_data '0.1': expected '' as"), ({"lora_rank": 4}, "expected 0 as")):
        with pytest.raises(ValueError, match=message):
            check_resumes(toy_config(**setting), saved, {})


def test_ranks_that_do_not_divide_the_images_of_a_step_are_refused(monkeypatch):
    monkeypatch.setattr("grpo.run_dir.world_size", lambda: 4)
    check_ranks(toy_config(prompts_per_step=12))
    with pytest.raises(ValueError, match="prompts_per_step 10 does not divide by 4 ranks"):
        check_ranks(toy_config(prompts_per_step=10))


def test_logs_are_taken_back_to_the_checkpoint(tmp_path):
    start_run(tmp_path, {"seed": 0})
    for step in range(3):
        log_step(tmp_path, step, {"a": step}, {}, {}, [{"id": step}])
    before = (tmp_path / "metrics.jsonl").read_text()
    log_step(tmp_path, 3, {"a": 3}, {"always_right": ["a\u2028b:0"]}, {}, [{"id": 3}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "a')  # killed while it wrote
    for name in ("config.json", "starts.jsonl", "eval.jsonl", "timing.jsonl", "rollouts/step_000003.jsonl", "report.html"):
        (tmp_path / f"{name}.host-7.unfinished").touch()
    rewind(tmp_path, 3)
    assert [path.name for path in tmp_path.rglob("*.unfinished")] == ["report.html.host-7.unfinished"]  # another process's
    assert (tmp_path / "metrics.jsonl").read_text() == before and saved_config(tmp_path) == {"seed": 0}
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [f"step_00000{n}.jsonl" for n in range(3)]
    rewind(tmp_path, 1)
    assert all(len((tmp_path / name).read_text().splitlines()) == 1 for name in LOGS)
    with pytest.raises(ValueError, match="metrics.jsonl: expected a line for each of 2 steps, found 1$"):
        rewind(tmp_path, 2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected the settings of a run"):
        saved_config(tmp_path)
    for contents in ("null", '{"data": 5}'):
        (tmp_path / "config.json").write_text(f'{{"contents": {contents}}}')
        with pytest.raises(ValueError, match="config.json: expected texts by name in contents, found"):
            saved_config(tmp_path)
