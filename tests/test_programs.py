"""The demo at its smallest setting, and how all programs end where they cannot write. evaluate.py
and caption.py have tests of their own."""

import io
import json
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest

import caption
import data.export
import data.toy.export
import data.toy.writer
import evaluate
import grpo.pretrained
import grpo.run_dir
import train
from data.curate import filter as curate_filter
from data.curate import generate as curate_generate
from data.curate.__main__ import main as curate
from data.program import _leave, run_program
from data.toy.demo import DemoConfig, demo
from grpo.recipes import toy_config


@pytest.fixture
def small(monkeypatch):
    """The demo with steps of two captions of two images."""
    tiny = dict(prompts_per_step=2, group_size=2, max_new_tokens=32, probe_images=2, audit_every=0)
    monkeypatch.setattr("data.toy.demo.toy_config", partial(toy_config, **tiny))


def test_the_demos_last_line(small, tmp_path, capsys):
    demo(DemoConfig(num_images=3, num_steps=1, run_dir=tmp_path / "demo"))
    lines = capsys.readouterr().out.strip().splitlines()
    match = re.fullmatch(r"demo: before (\d\.\d{3}) after (\d\.\d{3}) rise (-?\d\.\d{3})", lines[-1])
    assert float(match[2]) - float(match[1]) == pytest.approx(float(match[3]), abs=0.0011)
    page = tmp_path / "demo/before_after.html"
    [said] = [line for line in lines if line.startswith(f"before and after, caption by caption: {page}")]
    assert "after" in page.read_text(encoding="utf-8")
    assert ("before_after.png" in said) == (tmp_path / "demo/before_after.png").exists()
    assert sum("before: " in line for line in lines) == 3 and any("| all |" in line for line in lines)
    demo(DemoConfig(num_images=3, num_steps=1, run_dir=tmp_path / "demo"))  # a second demo makes room for itself


def test_a_demo_that_was_stopped_goes_on_and_deletes_nothing(small, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "demo"

    def stopped(config):
        train.train(replace(config, num_steps=1))
        raise SystemExit(130)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("data.toy.demo.train", stopped)
        demo(DemoConfig(num_images=3, num_steps=2, run_dir=folder))
    first = (folder / "metrics.jsonl").read_text()
    # another demo: nor is it deleted
    with pytest.raises(ValueError, match="seed 1: expected 0 as the run to resume has it"):
        demo(DemoConfig(num_images=3, num_steps=2, run_dir=folder, seed=1))
    demo(DemoConfig(num_images=3, num_steps=2, run_dir=folder))
    assert "resumed from" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text().startswith(first) and first.count("\n") == 1
    assert [len((folder / name).read_text().splitlines()) for name in ("metrics.jsonl", "starts.jsonl")] == [2, 2]


@pytest.mark.parametrize("main, arguments", [
    (train.main, ["toy", "--run-dir", "{}"]),
    (train.main, ["toy", "--check", "--run-dir", "{}"]),
    (train.main, ["toy", "--resume", "--run-dir", "{}"]),
    (caption.main, ["--policy", "data/toy/policy", "--images", "{}.jsonl", "--out", "{}"]),
    (evaluate.main, ["direct", "--policy", "data/toy/policy", "--data", "toy:heldout:2", "--out", "{}/out.jsonl"]),
    (evaluate.main, ["prism", "--policy", "data/toy/policy", "--data", "toy:heldout:2", "--cache", "{}"]),
    (curate, ["images", "--images", "{}.jsonl", "--out", "{}"]),
    (curate, ["generate", "--images", "{}.jsonl", "--model", "data/toy/policy", "--out", "{}"]),
    (curate, ["filter", "--data", "{}.jsonl", "--model", "data/toy/policy", "--out", "{}"]),
])
def test_a_folder_that_cannot_be_made_is_named_before_anything_is_loaded(tmp_path, main, arguments, capsys, monkeypatch):
    """It lies under a file."""
    for module in (grpo.pretrained, caption, evaluate, curate_filter, curate_generate):
        monkeypatch.setattr(module, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file/of/run"
    with pytest.raises(SystemExit) as stop:
        run_program(main, [text.format(folder) for text in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: {folder}: Not a directory \(.* free at {tmp_path / 'file'}\)\n", said)


@pytest.mark.parametrize("write", [
    lambda folder: data.toy.export.export(data.toy.export.ExportConfig(folder, num=1)),
    lambda folder: data.toy.writer.main(data.toy.writer.WriterConfig(folder)),
    lambda folder: data.export.write_examples(folder, []),
])
def test_exports_under_a_file_end_in_a_sentence(tmp_path, write, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        run_program(lambda _: write(tmp_path / "file/set"), [])
    assert re.fullmatch(rf"error: {tmp_path}/file/\S+: Not a directory \(.* free at .*\)\n", capsys.readouterr().err)


def test_a_disk_that_fills_during_a_run_ends_it_with_the_folder_and_what_is_free(tmp_path, capsys, monkeypatch):
    # it would put a file in the place of the link
    monkeypatch.setattr(grpo.run_dir, "rewind", lambda run_dir, num_steps: None)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    sizes = ["--num-steps", "1", "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "8", "--audit-every", "0"]
    with pytest.raises(SystemExit):
        run_program(train.main, ["toy", "--data", "toy:train:4", "--run-dir", str(run_dir), "--resume", *sizes])
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {run_dir}: No space left on device \(.* free at {run_dir}\)", said)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_that_the_console_does_not_have_are_printed_as_numbers(encoding, monkeypatch):
    for name in ("stdout", "stderr"):
        console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, console)
        run_program(lambda _, console=console: print("a 图", file=console, flush=True), [])
        assert console.buffer.getvalue() == b"a \\u56fe\n"


def test_a_program_runs_where_its_output_is_closed(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as Python starts with >&- and 2>&-
    written = []
    run_program(lambda _: written.extend(print("图", file=stream, flush=True) for stream in (sys.stdout, sys.stderr)), [])
    assert written == [None, None]  # both were printed, nobody reads them


def test_a_rank_that_leaves_is_not_disturbed_by_late_signals(monkeypatch):
    """torchrun passes its own on: the exit code would be the signal's."""
    numbers, ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), []
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    monkeypatch.setattr("os._exit", ends.append)
    try:
        _leave(SystemExit(3))
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3 and ends == [3]
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_a_reader_that_leaves_ends_a_program_in_a_sentence():
    code = "from data.program import run_program; run_program(lambda _: [print('x' * 999, flush=True) for _ in range(999)], [])"
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.read(1)
    program.stdout.close()
    assert program.stderr.read() == b"error: [Errno 32] Broken pipe\n" and program.wait() == 2


@pytest.mark.parametrize("ending, text", [
    (ValueError("x: expected y"), "error: x: expected y"),
    (SystemExit(2), "error: expected other arguments, see above torchrun's own lines"),
    (SystemExit(143), None), (SystemExit(0), None),  # a stop by a signal, and a good end
])
def test_torchrun_is_told_why_a_rank_ends(ending, text, tmp_path, monkeypatch):
    """It quotes this file at the end of its report."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def main(arguments):
        raise ending

    with pytest.raises(SystemExit):
        run_program(main, [])
    said = json.loads((tmp_path / "error.json").read_text()) if (tmp_path / "error.json").exists() else None
    assert (said and said["message"]["extraInfo"]["py_callstack"]) == text


def test_what_transformers_will_rename_is_not_told_and_other_warnings_are():
    def warn(name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run_program(lambda _: warnings.warn(f"`{name}` is deprecated and will be removed", FutureWarning, stacklevel=1), [])

    warn("past_key_values")
    warn("gradient_checkpointing_enable")
    with pytest.raises(FutureWarning):
        warn("another")
