"""What an experiment tracker is given, by stand-ins for wandb and trackio."""

import sys
from contextlib import ExitStack
from types import ModuleType

import pytest

from data.io import text_hash
from data.jsonl import read_log
from grpo.recipes import toy_config
from tools.tracker import Tracker
from train import train

TINY = dict(data="toy:train:4", num_steps=2, prompts_per_step=2, group_size=2, max_new_tokens=24, probe_images=2, audit_every=0,
            eval_data="toy:heldout:1", eval_every=1, eval_samples=0)


class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    """As trackio: runs go on by name. `calls` is what it was told."""
    module = ModuleType("standin")
    module.calls = []
    module.Table = Table
    told = module.calls.append
    module.init = lambda project, name=None, config=None, resume="never": told(("init", project, name, config, resume))
    module.log = lambda metrics, step=None: told(("log", metrics, step))
    module.finish = lambda: told(("finish",))
    monkeypatch.setitem(sys.modules, "standin", module)
    return module


def test_a_tracker_is_told_settings_numbers_captions_and_the_end(module, tmp_path, capsys):
    config = toy_config(run_dir=str(tmp_path / "run"), tracker="standin", **TINY | {"num_steps": 1})
    train(config)
    (_, project, name, settings, resume), *logs, end = module.calls
    assert (project, name.startswith("run-"), settings, resume) == ("caprl", True, config.flat(), "allow")
    assert end == ("finish",) and [step for _, _, step in logs] == [0, 0, 1]
    evaluations = read_log(tmp_path / "run/eval.jsonl")
    [metrics] = read_log(tmp_path / "run/metrics.jsonl")
    assert logs[0][1] == {f"eval/{key}": value for key, value in evaluations[0].items()}
    assert logs[1][1]["metrics/reward"] == metrics["reward"] and "timing/seconds" in logs[1][1]
    rows = read_log(tmp_path / "run/rollouts/step_000000.jsonl")
    table = logs[1][1]["captions"]
    assert table.columns == ["id", "reward", "caption"]
    assert table.data == [[row["id"], row["reward"], row["caption"]] for row in rows]

    first, module.calls[:] = name, []  # a resumed run is the same one, and is given its evaluation again
    train(toy_config(run_dir=str(tmp_path / "run"), tracker="standin", resume=True, **TINY))
    assert module.calls[0][2] == first and [call[-1] for call in module.calls[1:-1]] == [1, 1, 2]
    train(toy_config(run_dir=str(tmp_path / "run2/run"), tracker="standin", **TINY | {"num_steps": 1}))
    assert module.calls[-5][0] == "init" and module.calls[-5][2] != first
    assert "tracker standin" not in capsys.readouterr().out


def test_errors_of_a_tracker_end_no_run_and_are_told(module, tmp_path, capsys):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    module.init = module.log = module.finish = module.Table = fail
    train(toy_config(run_dir=str(tmp_path / "run"), tracker="standin", **TINY | {"num_steps": 1}))
    said = capsys.readouterr().out
    sentence = "tracker standin: ConnectionError('no route to host'); the run goes on"
    assert said.count(sentence) == 6  # init, three logs, a table, finish


def test_a_tracker_is_finished_after_an_error_too(module, tmp_path):
    """With what the functions of this module take: wandb has ids and exit codes."""
    module.init = lambda project, name, id, resume, config: module.calls.append(("init", id, resume, config))
    module.finish = lambda exit_code=0: module.calls.append(("finish", exit_code))
    del module.Table
    (tmp_path / "starts.jsonl").write_text('{"step": 0}\n{"step": 2}\n')
    tracker = Tracker("standin")
    with pytest.raises(ZeroDivisionError), ExitStack() as stack:
        tracker.begin(tmp_path, {"seed": 0}, 0)
        stack.push(tracker.finish)
        tracker(0, {"metrics/reward": 0.5}, [{"id": "a", "reward": 0.5, "caption": "x"}])
        raise ZeroDivisionError
    assert module.calls == [("init", text_hash('{"step": 0}'), "allow", {"seed": 0}), ("log", {"metrics/reward": 0.5}, 0),
                            ("finish", 1)]


def test_a_missing_tracker_is_named_before_anything_is_loaded(module, tmp_path, monkeypatch):
    monkeypatch.setattr("train.load_reward", None)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (("no_such_module", r"tracker no_such_module: expected init, log and finish \(No module named"),
                          ("json", r"tracker json: expected init, log and finish \(module 'json' has no attribute 'init'\)"),
                          (".x", "tracker .x: expected init, log and finish"),
                          ("broken", r"tracker broken: expected init, log and finish \(division by zero\)")):
        with pytest.raises(ValueError, match=message):
            train(toy_config(run_dir=str(tmp_path / "run"), tracker=name, **TINY))
    assert not (tmp_path / "run").exists()
