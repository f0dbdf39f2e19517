"""Resume, bit for bit: a run that is killed again and again writes what a run that is left alone writes."""

import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
from conftest import Forked, full_disk, shallow
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from transformers import AutoModelForImageTextToText, GenerationConfig

from data import io
from data.jsonl import read_log
from data.toy.export import ExportConfig, export
from grpo import signals
from grpo.checkpoint import (
    METADATA_CRC,
    last_line,
    latest_checkpoint,
    load_checkpoint_,
    make_room,
    save_checkpoint,
    training_state,
)
from grpo.config import TrainConfig
from grpo.pretrained import weights_hash
from grpo.recipes import toy_config
from grpo.run import save_step
from grpo.run_dir import check_run_dir
from grpo.signals import catch_stop_signals
from grpo.update import init_moments_
from train import train

KILLS = {"plain": 10, "held out": 10}
"""Kills of a run without evaluations, and of one with them. There hardly a checkpoint is due: most
are those of a best evaluation."""
CHANGES = {"plain": {}, "held out": dict(eval_data="toy:heldout:3", eval_every=2, eval_samples=2, patience=3, save_every=4)}


MODELS = {}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory) -> None:
    """What is saved and resumed does not depend on how many layers there are."""
    folder = tmp_path_factory.mktemp("models")
    MODELS.update({name: shallow(f"data/toy/{name}", folder / name) for name in ("policy", "verifier")})


def settings(run_dir: Path, **changes) -> TrainConfig:
    tiny = dict(data="toy:train:12", num_steps=6, prompts_per_step=2, group_size=3, max_new_tokens=48, probe_images=2,
                audit_every=4, save_every=1, inner_epochs=2, resample_flat=1, resume=True)
    return toy_config(run_dir=str(run_dir), **MODELS | tiny | changes)


def run_and_kill(folder: Path, name: str) -> tuple[int, int, int]:
    """Runs in child processes, one after the other in the same run folder, each killed at a random moment or, every
    third, while it saves. A run that got through is followed by one in a new folder. Returns the number of kills, of
    those in a save, and of runs that got through."""
    rng = random.Random("kills")
    kills, in_save, runs = 0, 0, 0
    while kills < KILLS[name] or runs == 0:
        run_dir = folder / f"killed-{runs}"
        child = Forked(folder / "said.txt", train, settings(run_dir, **CHANGES[name]))
        child.start()
        waits_for_save = kills % 3 == 0
        limit = time.monotonic() + (60 if waits_for_save or kills >= KILLS[name] else rng.uniform(0.2, 3))
        is_saving = False
        while time.monotonic() < limit and not is_saving and child.exitcode is None:
            time.sleep(0.0002)
            is_saving = waits_for_save and kills < KILLS[name] and any(
                path for place in ("checkpoints/*", "best") for path in run_dir.glob(f"{place}.unfinished")
            )
        child.kill()
        text = child.said()
        if child.exitcode == -signal.SIGKILL:
            kills, in_save = kills + 1, in_save + is_saving
        else:
            assert child.exitcode == 0, text
            runs += 1
    train(settings(folder / f"killed-{runs}", **CHANGES[name]))
    return kills, in_save, runs + 1


def everything(run_dir: Path) -> dict[str, bytes]:
    """What a run computed, the final weights included; what a clock told is left out."""
    paths = [run_dir / "metrics.jsonl", run_dir / "audit.jsonl", *sorted(run_dir.glob("rollouts/*")), *run_dir.glob("final/*"),
             *run_dir.glob("best/*"), *run_dir.glob("eval.jsonl")]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    torch.set_num_threads(1)
    train(settings(run_dir))
    return run_dir


@pytest.mark.parametrize("name", KILLS)
def test_killed_runs_write_what_a_run_left_alone_writes(left_alone, tmp_path, name):
    if name != "plain":
        left_alone = tmp_path / "alone"
        train(settings(left_alone, **CHANGES[name]))
        steps = [row["step"] for row in read_log(left_alone / "eval.jsonl")]
        assert steps == [0, 2, 4, 6] and not any((left_alone / "best").glob("*.unfinished"))
    kills, in_save, runs = run_and_kill(tmp_path, name)
    assert kills >= KILLS[name] and in_save >= 3  # one more where the last run was slow
    want = everything(left_alone)
    assert "audit.jsonl" in want and len(want["metrics.jsonl"].splitlines()) == 6
    for number in range(runs):
        assert everything(tmp_path / f"killed-{number}") == want
        steps = [row["step"] for row in read_log(tmp_path / f"killed-{number}/timing.jsonl")]
        assert steps == list(range(6))


def test_steps_that_are_due_are_saved_and_exported(tmp_path, monkeypatch):
    """Every third is saved, and the last; every second is exported, but not the last, which `final` has."""
    saved, exported = [], []
    monkeypatch.setattr("grpo.checkpoint.training_state", lambda *_: {})
    monkeypatch.setattr("grpo.checkpoint.save_checkpoint", lambda run_dir, num_steps, state, keep: saved.append(num_steps))
    monkeypatch.setattr("grpo.run.export", lambda run, folder, config: exported.append(folder.name))
    config = settings(tmp_path, num_steps=8, save_every=3, export_every=2)
    for step in range(8):
        save_step(tmp_path, SimpleNamespace(scorer=None, optimizer=None), step, time.monotonic(), [], config)
    assert saved == [3, 6, 8] and exported == ["step_000002", "step_000004", "step_000006"]


def test_a_stop_signal_saves_and_ends_the_run(left_alone, tmp_path):
    child = Forked(tmp_path / "said.txt", train, settings(tmp_path / "run", save_every=0))
    child.start()
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert child.exitcode is None
        time.sleep(0.01)
    child.terminate()
    said = child.said()
    num_steps = latest_checkpoint(tmp_path / "run")[1]
    [step] = re.findall(r"\nfinishing step (\d+), then saving; again after 5 s", said)
    assert int(step) in (num_steps - 1, num_steps - 2)  # the step before, if the signal came between two
    assert child.exitcode == 128 + signal.SIGTERM and f"stopped after step {num_steps - 1}; --resume goes on" in said
    assert 1 <= num_steps < 6 and not (tmp_path / "run/final").exists()
    train(settings(tmp_path / "run", save_every=0))
    assert everything(tmp_path / "run") == everything(left_alone)


def test_a_run_has_one_writer_and_a_dead_one_is_followed_at_once(left_alone, tmp_path):
    child = Forked(tmp_path / "said.txt", train, settings(tmp_path / "run", num_steps=999))
    child.start()
    while not (tmp_path / "run/checkpoints/latest").exists():
        assert child.exitcode is None
        time.sleep(0.01)
    config = (tmp_path / "run/config.json").read_text()
    with pytest.raises(ValueError, match=f"process {child.pid} on {platform.node()}, since 20"):
        train(settings(tmp_path / "run"))
    assert (tmp_path / "run/config.json").read_text() == config
    child.kill()
    child.join()
    assert (tmp_path / "run/writer.json").exists()
    train(settings(tmp_path / "run", num_steps=latest_checkpoint(tmp_path / "run")[1] + 1))
    assert not (tmp_path / "run/writer.json").exists()
    steps = [row["step"] for row in read_log(tmp_path / "run/metrics.jsonl")]
    assert steps and steps == list(range(len(steps)))


def test_a_run_goes_on_with_its_own_rows_and_models_only(tmp_path):
    """Under the same paths: rows added, rows in another order, one weight of a model changed, another chat template,
    two tokens of the tokenizer exchanged. The sentence says which of these it is. At another path they are the same."""
    data = tmp_path / "set/examples.jsonl"
    export(ExportConfig(data.parent, num=3))
    rows = data.read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:2]))
    for name in ("policy", "verifier"):
        shutil.copytree(f"data/toy/{name}", tmp_path / name)
    config = settings(
        tmp_path / "run", data=str(data), policy=str(tmp_path / "policy"), num_steps=1,
        verifier=str(tmp_path / "verifier"), group_size=2, max_new_tokens=8, audit_every=0,
    )
    train(config)
    saved = (tmp_path / "run/config.json").read_text()
    for change in (rows, rows[1::-1]):
        data.write_text("".join(change))
        with pytest.raises(ValueError, match="^data .*: expected the rows that the run to resume"):
            train(replace(config, num_steps=2))
    data.write_text("".join(rows[:2]))
    for name in ("policy", "verifier"):
        path = tmp_path / name / "model.safetensors"
        weights = load_file(path)
        weights[min(weights)].view(-1)[3] += 1
        whole = path.read_bytes()
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"^{name} .*{name}: expected the weights that the"):
            train(replace(config, num_steps=2))
        path.write_bytes(whole)
    exchanged = {"Ġred": "Ġblue", "Ġblue": "Ġred"}
    around = {"policy": "configuration, tokenizer, chat template and image processor",
              "verifier": "tokenizer and chat template"}
    changes = {
        "chat_template.jinja": lambda text: text.replace("assistant", "helper"),
        "tokenizer.json": lambda text: re.sub('"(Ġred|Ġblue)":', lambda match: f'"{exchanged[match[1]]}":', text),
    }
    for name in around:
        for file, change in changes.items():
            path = tmp_path / name / file
            whole = path.read_text()
            path.write_text(change(whole))
            assert path.read_text() != whole
            with pytest.raises(ValueError, match=f"^{name} .*{name}: expected the {around[name]} that the run to resume"):
                train(replace(config, num_steps=2))
            path.write_text(whole)
    assert (tmp_path / "run/config.json").read_text() == saved
    old = json.loads(saved)
    assert set(old.pop("contents")) == {"data", "policy", "verifier"}
    (tmp_path / "run/config.json").write_text(json.dumps(old))  # of a run that began without them
    train(replace(config, num_steps=2))
    want = saved.replace('"num_steps": 1', '"num_steps": 2')
    assert (tmp_path / "run/config.json").read_text() == want
    moved = {"data": tmp_path / "moved/examples.jsonl"} | {name: tmp_path / f"moved_{name}" for name in around}
    (tmp_path / "set").rename(tmp_path / "moved")
    for name in around:
        (tmp_path / name).rename(moved[name])
    train(replace(config, num_steps=3, **{name: str(path) for name, path in moved.items()}))
    steps = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    now = json.loads((tmp_path / "run/config.json").read_text())
    assert len(steps) == 3 and now["data"] == str(moved["data"]) and now["contents"] == json.loads(saved)["contents"]


def test_the_hash_of_weights_is_of_their_values(policy):
    """The same in bfloat16 and float32, where both hold the same; another after any change."""
    model = policy.model.to(torch.bfloat16)
    before = weights_hash(model)
    assert weights_hash(model.float()) == before
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[5], weight[6] = weight[6].clone(), weight[5].clone()
    assert weights_hash(model) != before


def test_signals_close_together_are_one(monkeypatch, capfd):
    """The answer needs no stream of Python's, which the signal may have come in the middle of."""
    monkeypatch.setattr(signals, "SAME_SIGNAL_S", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    with catch_stop_signals(lambda: 3) as caught:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "stderr", None)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGTERM]
        assert capfd.readouterr().err == (
            "\nfinishing step 3, then saving; again after 0 s stops without saving\n"
        )
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        assert capfd.readouterr().err.count("stopping without saving; --resume goes on") == 2
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(signals, "rank", lambda: 1)
    with catch_stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_a_lost_terminal_asks_for_a_checkpoint_and_no_later_line_fails(capfd):
    """When a connection drops, SIGHUP ended the run without one. torchrun passes it on, even where it was begun with nohup."""
    before = signal.getsignal(signal.SIGHUP)
    screen, terminal = os.openpty()
    stdout = os.dup(1)
    try:
        os.dup2(terminal, 1)
        with catch_stop_signals(lambda: 3) as caught:
            os.close(terminal), os.close(screen)
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(1, b"step 3 is done")  # was: OSError, before the checkpoint
        assert caught == [signal.SIGHUP]
        assert "finishing step 3" in capfd.readouterr().err  # a file is written to as before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with catch_stop_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
    finally:
        signal.signal(signal.SIGHUP, before)
        os.dup2(stdout, 1)


def test_a_signal_or_a_late_hour_of_another_rank_saves_here_too(tmp_path, monkeypatch):
    """Else this rank would go on to the next step, and the other wait for it in the checkpoint."""
    saved = []
    monkeypatch.setattr("grpo.checkpoint.save_checkpoint", lambda run_dir, num_steps, *_: saved.append(num_steps))
    monkeypatch.setattr("grpo.checkpoint.training_state", lambda *_: {})
    step = partial(save_step, tmp_path, SimpleNamespace(scorer=None, optimizer=None), config=toy_config(save_every=0))
    monkeypatch.setattr("grpo.run.gather_rows", lambda own: [*own, True] if own else [])  # its clock
    assert step(step=3, saved_at=time.monotonic(), signals=[]) and saved == [4]
    monkeypatch.setattr("grpo.run.gather_rows", lambda own: own or [signal.SIGTERM])  # told to it alone
    with pytest.raises(SystemExit, match="143"):
        step(step=4, saved_at=time.monotonic(), signals=[])
    assert saved == [4, 5]


def test_a_stopped_torchrun_saves_and_ends_all_ranks(tmp_path):
    """torchrun passes the signal on to its ranks, and kills those that are not done in time."""
    small = {"data": "toy:train:12", "prompts-per-step": 2, "group-size": 2, "max-new-tokens": 32, "save-every": 0} | MODELS
    arguments = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    torchrun = ["--standalone", "--nproc-per-node", "2", "train.py", "toy", *arguments, "--run-dir", str(tmp_path / "run")]
    child = Forked(tmp_path / "said.txt", torch.distributed.run.main, torchrun)
    child.start()
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert child.exitcode is None
        time.sleep(0.05)
    child.terminate()
    said = child.said()
    _, num_steps = latest_checkpoint(tmp_path / "run")
    assert num_steps >= 1 and f"stopped after step {num_steps - 1}; --resume goes on" in said


def test_a_longer_run_goes_on_from_a_finished_one(left_alone, tmp_path):
    """From another shape of work, too: what says only how is free to change."""
    train(settings(tmp_path / "run", num_steps=2, micro_batch_tokens=1, keep_checkpoints=1))
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["latest", "step_000002"]
    train(settings(tmp_path / "run", export_every=4))
    first, second = ((run / "rollouts/step_000005.jsonl").read_text() for run in (left_alone, tmp_path / "run"))
    assert [json.loads(line)["id"] for line in first.splitlines()] == [
        json.loads(line)["id"] for line in second.splitlines()
    ]
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", "step_000005", "step_000006"]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run/export/step_000004")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 1e-5}, "learning_rate 1e-05: expected 0.0003 as the run to resume has it"),
        ({"seed": 1}, "seed 1: expected 0 as the run to resume has it"),
        ({"resume": False}, r"expected a new or empty run folder, found a run in it \(--resume goes on with it\)"),
    ],
)
def test_only_the_same_run_is_resumed(left_alone, change, message):
    with pytest.raises(ValueError, match=message):
        train(settings(left_alone, **change))


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2), requires_grad=False)


def toy_state() -> tuple[Toy, torch.optim.AdamW, dict]:
    model = Toy()
    optimizer = torch.optim.AdamW([model.a], lr=0.1)
    init_moments_(optimizer)
    return model, optimizer, training_state(model, optimizer)


def test_a_checkpoint_holds_all_that_a_step_changes(tmp_path):
    model, optimizer, state = toy_state()
    assert set(state) == {"weight.a", "step.a", "exp_avg.a", "exp_avg_sq.a"}  # b is frozen
    (model.a * torch.tensor([1.0, 2, 3])).sum().backward()
    optimizer.step()
    plain = Toy()
    alone = torch.optim.AdamW([plain.a], lr=0.1)
    (plain.a * torch.tensor([1.0, 2, 3])).sum().backward()
    alone.step()
    assert torch.equal(plain.a, model.a)  # moments made beforehand are those that AdamW makes
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, training_state(model, optimizer), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_000002",
        "step_000003",
    ]
    other, other_optimizer, other_state = toy_state()
    folder, num_steps = latest_checkpoint(tmp_path)
    load_checkpoint_(folder, other_state)
    assert num_steps == 3 and torch.equal(other.a, model.a)
    for key, value in optimizer.state[model.a].items():
        assert torch.equal(other_optimizer.state[other.a][key], value) and value.abs().max() > 0


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_copy_without_links_goes_on_from_its_last_checkpoint(tmp_path, is_followed):
    """`latest` is missing, or it is a second copy of the checkpoint."""
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, toy_state()[2], keep=3)
    latest = tmp_path / "checkpoints/latest"
    latest.unlink()
    if is_followed:
        shutil.copytree(tmp_path / "checkpoints/step_000003", latest)
    folder, num_steps = latest_checkpoint(tmp_path)
    assert folder.name == "step_000003" and num_steps == 3
    (tmp_path / "checkpoints/latest.unfinished").symlink_to("step_000003")  # the run was killed before it got its name
    save_checkpoint(tmp_path, 4, toy_state()[2], keep=2)
    assert latest.is_symlink() and latest_checkpoint(tmp_path)[1] == 4
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "step_000003", "step_000004"]


def test_of_an_errors_lines_the_last_with_words_is_told():
    assert last_line(RuntimeError("Traceback\n disk full \n \n")) == "disk full" and last_line(OSError()) == "OSError"


def test_where_there_are_no_links_the_last_checkpoint_is_the_one_of_most_steps(tmp_path, no_links):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, toy_state()[2], keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    assert latest_checkpoint(tmp_path)[1] == 3


def test_a_checkpoint_under_another_name_is_not_taken(tmp_path):
    save_checkpoint(tmp_path, 1, toy_state()[2], keep=2)
    latest = tmp_path / "checkpoints/latest"
    (tmp_path / "checkpoints/step_000001").rename(tmp_path / "checkpoints/good")
    latest.unlink()
    latest.symlink_to("good")
    with pytest.raises(ValueError, match="latest: expected a checkpoint called step_ and its number of steps, found good"):
        latest_checkpoint(tmp_path)


def test_a_run_that_was_set_back_by_hand_keeps_what_it_saves(tmp_path):
    for number in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, number, toy_state()[2], keep=5)
    latest = tmp_path / "checkpoints/latest"
    latest.unlink()
    latest.symlink_to("step_000002")
    assert latest_checkpoint(tmp_path)[1] == 2
    save_checkpoint(tmp_path, 3, toy_state()[2], keep=2)
    assert latest_checkpoint(tmp_path)[1] == 3
    assert [path.name for path in sorted(latest.parent.glob("step*"))] == [f"step_00000{number}" for number in (2, 3, 4, 5)]


def test_checkpoints_without_the_runs_settings_are_not_gone_on_with(left_alone, tmp_path):
    run_dir = shutil.copytree(left_alone, tmp_path / "run", symlinks=True)
    (run_dir / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: expected the settings of the run to resume, found none beside "):
        train(settings(run_dir, seed=3))
    (run_dir / "config.json").write_text("null")
    with pytest.raises(ValueError, match=r"config.json: expected the settings of a run, found None"):
        train(settings(run_dir))


def test_checkpoints_that_cannot_be_read_are_named(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 1, toy_state()[2], keep=1)
    folder, _ = latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="step_000001: expected a checkpoint of this policy that can be read"):
        load_checkpoint_(folder, {"weight.c": torch.zeros(3)})
    with pytest.raises(ValueError, match="step_000001: expected a checkpoint of this policy that can be read"):
        load_checkpoint_(folder, toy_state()[2] | {"weight.a": torch.zeros(4)})
    fewer = {key: value for key, value in toy_state()[2].items() if "exp_avg" not in key}
    with pytest.raises(ValueError, match=r"step_000001: .* found also exp_avg.a \(1 of 2; `init_moments_`"):
        load_checkpoint_(folder, fewer)  # as after a change of the optimizer
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="latest: expected a whole checkpoint, found none at"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_signal_while_a_checkpoint_is_written_or_read_is_no_fault_of_it(tmp_path, monkeypatch, stop):
    save_checkpoint(tmp_path, 1, toy_state()[2], keep=1)

    def stopped(*_) -> None:
        raise stop

    monkeypatch.setattr(FileSystemWriter, "write_data", stopped)
    monkeypatch.setattr(FileSystemReader, "read_data", stopped)
    with pytest.raises(type(stop)) as caught:
        save_checkpoint(tmp_path, 2, toy_state()[2], keep=1)
    assert getattr(caught.value, "code", None) == getattr(stop, "code", None)
    folder, num_steps = latest_checkpoint(tmp_path)
    assert num_steps == 1
    with pytest.raises(type(stop)):
        load_checkpoint_(folder, toy_state()[2])


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_changed_bit_in_a_tensor_or_in_their_list_is_refused(tmp_path, place):
    """One bit of the numbers, or of the list of tensors; files that end too early, or are gone."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    init_moments_(optimizer)
    state = training_state(model, optimizer)
    for tensor in state.values():
        tensor.uniform_()
    save_checkpoint(tmp_path, 1, state, keep=1)
    folder, _ = latest_checkpoint(tmp_path)
    [path], names = folder.glob("*.distcp"), folder / ".metadata"
    whole, listed = path.read_bytes(), names.read_bytes()
    place_in_list = int(place * len(listed))
    load_checkpoint_(folder, state)

    def expect(file, changed, message):
        before = file.read_bytes()
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            load_checkpoint_(folder, state)
        file.write_bytes(before)

    for name, tensor in list(state.items()):
        numbers = tensor.numpy().tobytes()
        at = whole.index(numbers) + int(place * len(numbers))
        expect(path, flipped(whole, at), rf"\.distcp: expected {name} as it was saved, found other bytes \(another che")
    expect(path, whole[:at], r"\.distcp: expected [\w.]+ as it was saved, found other bytes")
    for changed in (flipped(listed, place_in_list), listed[:place_in_list]):
        expect(names, changed, r"\.metadata: expected the list of tensors as it was saved, found other bytes \(its checksum")
    (folder / METADATA_CRC).unlink()  # as in checkpoints of earlier versions
    load_checkpoint_(folder, state)
    expect(names, listed[:place_in_list], r"\.metadata: expected the list of tensors as it was saved, found other bytes")
    path.rename(folder / "elsewhere")
    with pytest.raises(OSError, match=r"\.distcp"):
        load_checkpoint_(folder, state)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def test_a_full_disk_ends_the_run_in_a_sentence_and_the_run_goes_on_when_there_is_room(left_alone, tmp_path):
    """The second checkpoint cannot be written."""
    run_dir = tmp_path / "run"
    train(settings(run_dir, num_steps=1))
    message = r"step_000002: could not be written \(.*; .* free at .*/checkpoints\); --res"
    with full_disk(), pytest.raises(ValueError, match=message):
        train(settings(run_dir, save_every=1))
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["latest", "step_000001"]
    train(settings(run_dir))
    assert everything(run_dir) == everything(left_alone)


def test_an_export_that_a_full_disk_refused_is_written_when_the_run_goes_on(tmp_path, monkeypatch):
    """The checkpoint of its step was saved before it, so the run went on behind it."""
    def refuse(*_):
        raise ValueError("no room")

    config = settings(tmp_path / "run", num_steps=2, export_every=1)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no room"):
        patch.setattr("grpo.export.export_policy", refuse)
        train(config)
    train(config)
    exported = tmp_path / "run/export/step_000001"
    AutoModelForImageTextToText.from_pretrained(exported)
    assert list(exported.parent.iterdir()) == [exported]  # none of no steps, and none of the last: final/ is that
    exported.joinpath("kept").touch()
    latest = tmp_path / "run/checkpoints/latest"
    latest.unlink(), latest.symlink_to("step_000001")
    train(config)
    assert exported.joinpath("kept").exists()  # what is there is not written again


def test_a_run_that_could_not_save_one_checkpoint_is_not_begun(tmp_path, monkeypatch):
    stale = tmp_path / "checkpoints/step_000001.unfinished"
    stale.mkdir(parents=True)
    state = toy_state()[2]
    size = sum(tensor.nbytes for tensor in state.values())
    monkeypatch.setattr(
        io.shutil, "disk_usage", lambda path: type("Usage", (), {"free": size - (not stale.exists())})()
    )
    with pytest.raises(ValueError, match=f"expected room for {size} bytes, found {size - 1} bytes free at"):
        make_room(tmp_path, state)


def test_a_folder_with_anything_of_a_run_is_no_new_one(left_alone, tmp_path):
    check_run_dir(tmp_path)
    for name in ("metrics.jsonl", "final"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="expected a new or empty run folder, found a run in it"):
            check_run_dir(tmp_path)
        (tmp_path / name).rmdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/final").mkdir()
    with pytest.raises(ValueError, match="expected a checkpoint to go on from, found the policy of a run without any"):
        train(settings(tmp_path / "run"))


def test_the_exported_folder_samples_as_training_did(left_alone):
    sampling = GenerationConfig.from_pretrained(left_alone / "final")
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 1.0, 1.0, 0)
    assert (sampling.repetition_penalty, sampling.max_new_tokens, len(sampling.eos_token_id)) == (1.0, 48, 2)
