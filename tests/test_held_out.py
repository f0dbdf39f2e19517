"""Held-out accuracy while a run trains: what evaluate.py says, the best policy, the end."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
from data.benchmarks.benchmark import held_out, load_benchmark
from data.examples import Example, Question, load_examples
from data.export import example_row
from data.images import picture_hash
from data.jsonl import read_log
from grpo.config import TrainConfig
from grpo.log import log_step
from grpo.recipes import change, toy_config
from grpo.run_dir import check_resumes, rewind, start_run
from tools.held_out import KEYS, HeldOut, export, read_evaluations, set_aside, standing
from tools.stats import summarize
from train import train

TINY = dict(data="toy:train:8", num_steps=5, prompts_per_step=2, group_size=3, max_new_tokens=48, probe_images=2, audit_every=0,
            seed=3)
EVAL = dict(eval_data="toy:heldout:9", eval_images=3, eval_every=2, eval_samples=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """The same run, without evaluations and with them."""
    folder = tmp_path_factory.mktemp("runs")
    train(toy_config(run_dir=str(folder / "plain"), **TINY))
    train(toy_config(run_dir=str(folder / "held"), export_every=1, tensorboard=True, **TINY, **EVAL))
    return folder / "plain", folder / "held"


def test_the_last_evaluation_is_what_evaluate_says_of_the_exported_policy(runs):
    rows = read_log(runs[1] / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row, policy in ((rows[0], Path("data/toy/policy")), (rows[-1], runs[1] / "final")):
        _, said = evaluate.run(evaluate.PrismConfig(
            policy=(str(policy),), verifier="data/toy/verifier", data=("toy:heldout:9",), limit=3, num_captions=2,
            max_new_tokens=48, seed=3, cache="",
        ))
        [answered] = said.values()
        table = summarize(answered)["all"]
        assert {key: table[key] for key in row if key != "step"} == {key: row[key] for key in row if key != "step"}
    assert rows[0]["images"] == 3 and rows[0]["questions"] > 3 and rows[0]["low"] <= rows[0]["accuracy"] <= rows[0]["high"]


def test_evaluations_change_nothing_of_the_training(runs):
    for name in ("metrics.jsonl", "audit.jsonl", *(f"rollouts/step_{step:06d}.jsonl" for step in range(5)),
                 "final/model.safetensors"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    timing = read_log(runs[1] / "timing.jsonl")
    assert [row.get("seconds_held_out", 0) > 0 for row in timing] == [True, False, True, False, True]
    assert not (runs[0] / "eval.jsonl").exists() and not (runs[0] / "best").exists()


def test_the_best_policy_is_exported_with_its_evaluation(runs):
    rows = read_log(runs[1] / "eval.jsonl")
    step = json.loads((runs[1] / "best/step.json").read_text())
    assert step == max(rows, key=lambda row: row["accuracy"])  # the first of equals
    source = {0: Path("data/toy/policy"), 5: runs[1] / "final"}.get(
        step["step"], runs[1] / f"export/step_{step['step']:06d}"
    )
    best, same = (load_file(folder / "model.safetensors") for folder in (runs[1] / "best", source))
    assert all(torch.equal(best[name], same[name].float()) for name in same)
    assert {path.name for path in (runs[1] / "best").iterdir()} == {
        "step.json", *(path.name for path in (runs[1] / "final").iterdir())
    }


def test_tensorboard_gets_the_evaluations(runs):
    from tests.test_tensorboard import read_events

    got = read_events(runs[1] / "tensorboard").Scalars("eval/accuracy")
    assert [(event.step, event.value) for event in got] == [
        (row["step"], pytest.approx(row["accuracy"])) for row in read_log(runs[1] / "eval.jsonl")
    ]


def lines(*accuracies: float | None) -> list[dict]:
    return [{"step": 10 * place, "accuracy": accuracy} for place, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    "accuracies, patience, stop_at, best, reason",
    [
        ([], 1, 0.1, None, ""),
        ([0.5], 1, 0.0, 0, ""),
        ([0.5, 0.6, 0.7], 1, 0.0, 2, ""),
        ([0.5, 0.6, 0.6], 2, 0.0, 1, ""),  # equal is not better: one without a better one
        ([0.5, 0.6, 0.6, 0.4], 2, 0.0, 1, "0.600 after 10 steps has not been surpassed in 2 evaluations"),
        ([0.5, 0.6, 0.6, 0.4, 0.61], 3, 0.0, 4, ""),
        ([0.5, 0.4, 0.3], 0, 0.0, 0, ""),
        ([0.5, None, None], 2, 0.0, 0, ""),  # could not be measured: neither better nor not
        ([None], 1, 0.5, None, ""),
        ([0.5, 0.75], 9, 0.75, 1, "0.750 has reached stop_at 0.75"),
        ([0.8, 0.7], 9, 0.75, 0, ""),  # the run went on with a stop_at of its own
    ],
)
def test_the_best_and_the_end_by_hand(accuracies, patience, stop_at, best, reason):
    rows = lines(*accuracies)
    row, said = standing(rows, patience, stop_at)
    assert row == (None if best is None else rows[best])
    assert (reason in said) and bool(said) == bool(reason)


def test_patience_counts_as_a_loop_does():
    rng = random.Random(0)
    for _ in range(300):
        accuracies = [rng.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(rng.randint(1, 8))]
        patience, best, since = rng.randint(1, 4), -math.inf, 0
        for accuracy in accuracies:
            best, since = (accuracy, 0) if accuracy > best else (best, since + 1)
        row, reason = standing(lines(*accuracies), patience, 0.0)
        assert row["accuracy"] == best and bool(reason) == (since >= patience)


def test_a_run_ends_when_patience_does_and_goes_on_only_if_told(tmp_path, capsys):
    """Nothing is learned, so no evaluation is better than the first."""
    config = toy_config(run_dir=str(tmp_path / "run"), patience=2, learning_rate=0.0, **TINY | {"num_steps": 9},
                        **EVAL | {"eval_every": 1, "eval_images": 1, "eval_samples": 0})
    train(config)
    said = "the run ends after 2 steps: held-out accuracy "
    assert capsys.readouterr().out.count(said) == 1
    assert (tmp_path / "run/checkpoints").joinpath("latest").readlink() == Path("step_000002")
    assert len(read_log(tmp_path / "run/metrics.jsonl")) == 2 and (tmp_path / "run/report.html").exists()
    assert json.loads((tmp_path / "run/best/step.json").read_text())["step"] == 0
    names = ("eval.jsonl", "metrics.jsonl", "final/model.safetensors", "best/model.safetensors")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    train(replace(config, resume=True))
    assert capsys.readouterr().out.count(said) == 1
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before
    with pytest.raises(ValueError, match="eval_every 3: expected 1 as the run to resume has it"):
        train(change(config, resume=True, eval_every=3))
    saved = json.loads((tmp_path / "run/config.json").read_text())
    with pytest.raises(ValueError, match="eval_data toy:heldout:9: expected the rows that the run to resume"):
        check_resumes(config, saved, {"eval_data": "1 images, 0"})
    train(change(config, resume=True, patience=3))
    assert "the run ends after 3 steps" in capsys.readouterr().out
    train(change(config, resume=True, patience=0, stop_at=0.01))  # reached already
    assert "has reached stop_at 0.01" in capsys.readouterr().out
    assert [row["step"] for row in read_log(tmp_path / "run/eval.jsonl")] == [0, 1, 2, 3]


def test_a_run_that_ends_before_its_first_step_goes_on_if_told(tmp_path, capsys):
    """The initial policy was good enough: such a run too is a finished one."""
    config = toy_config(run_dir=str(tmp_path / "run"), stop_at=0.01, **TINY | {"num_steps": 2},
                        **EVAL | {"eval_every": 1, "eval_images": 1, "eval_samples": 0})
    train(config)
    train(replace(config, resume=True))
    assert capsys.readouterr().out.count("the run ends after 0 steps: held-out accuracy ") == 2
    train(change(config, resume=True, stop_at=1.0))
    assert [row["step"] for row in read_log(tmp_path / "run/metrics.jsonl")] == [0, 1]
    assert [row["step"] for row in read_log(tmp_path / "run/eval.jsonl")] == [0, 1, 2]


def test_an_error_of_the_first_evaluation_has_a_line_of_its_own(tmp_path, monkeypatch, capfd):
    """It stood right behind the progress bar, which had not begun."""
    def watch(*_):
        raise ValueError("no room")
        yield

    monkeypatch.setattr(HeldOut, "watch", watch)
    with pytest.raises(ValueError, match="no room") as raised:
        train(toy_config(run_dir=str(tmp_path / "run"), **TINY, **EVAL))
    assert raised.tb and re.search(r"train: .*step/s\]\n$", capfd.readouterr().err)  # the bar is alive, and was ended


def test_the_best_policy_has_a_checkpoint_before_it_is_exported(tmp_path, monkeypatch):
    """A kill in between: the resumed run exports it then, adapters too, and measures nothing twice."""
    config = toy_config(run_dir=str(tmp_path / "run"), save_every=0, lora_rank=2, **TINY | {"num_steps": 4},
                        **EVAL | {"eval_images": 1})
    accuracies = iter([0.2, 0.4, 0.3])

    def measured(rows):
        return {"all": dict.fromkeys(KEYS, 0.0) | {"accuracy": next(accuracies)}}

    class Killed(BaseException):
        pass

    def killed(run, folder, config, about=None):
        if about and about["step"] == 2:
            raise Killed
        real(run, folder, config, about)

    real = export
    monkeypatch.setattr("tools.held_out.summarize", measured)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("tools.held_out.export", killed)
        train(config)
    assert json.loads((tmp_path / "run/best/step.json").read_text())["step"] == 0
    assert (tmp_path / "run/checkpoints/latest").readlink() == Path("step_000002")
    train(replace(config, resume=True))
    assert json.loads((tmp_path / "run/best/step.json").read_text())["step"] == 2
    assert [row["accuracy"] for row in read_log(tmp_path / "run/eval.jsonl")] == [0.2, 0.4, 0.3]
    best, final = (load_file(tmp_path / f"run/{name}/adapter/adapter_model.safetensors") for name in ("best", "final"))
    assert set(best) == set(final) and any(not torch.equal(best[name], final[name]) for name in best)


def test_a_judge_as_reward_is_measured_by_the_verifier(tmp_path):
    train(toy_config(run_dir=str(tmp_path / "run"), reward="judge", **TINY | {"num_steps": 1}, **EVAL | {"eval_images": 1}))
    assert [row["step"] for row in read_log(tmp_path / "run/eval.jsonl")] == [0, 1]
    assert set(json.loads((tmp_path / "run/config.json").read_text())["contents"]) == {
        "data", "eval_data", "policy", "judge", "verifier"
    }


@pytest.mark.parametrize("samples, drawn", [(0, (0.0, 1)), (3, (0.7, 3))])
def test_an_evaluation_draws_at_the_runs_temperature_or_takes_the_likeliest(samples, drawn):
    held = HeldOut(load_benchmark("toy:heldout:1"), toy_config(temperature=0.7, **EVAL | {"eval_samples": samples}))
    assert (held.captioning.temperature, held.captioning.num_captions) == drawn


def test_evaluations_are_taken_back_to_the_checkpoint(tmp_path):
    """One is of the policy after its step, so that of the checkpoint itself stays."""
    start_run(tmp_path, {})
    for step in range(6):
        log_step(tmp_path, step, {}, {}, {}, [])
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 2, 4, 6)) + '{"step": 8, "ac')
    rewind(tmp_path, 4)
    assert [row["step"] for row in read_log(path)] == [0, 2, 4]
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"eval.jsonl: .*two processes have written steps 2: keep the first line"):
        rewind(tmp_path, 4)
    path.write_text(damaged := '{"step": 0}\nstep": 2}\n{"step": 4}\n')
    with pytest.raises(ValueError, match=r"eval.jsonl line 2: expected the numbers of a step, found b'step"):
        rewind(tmp_path, 4)
    assert path.read_text() == damaged
    rewind(tmp_path, 1)  # behind the checkpoint all is written again, whatever it was
    assert path.read_text() == '{"step": 0}\n'


def test_a_lost_evaluation_of_the_best_policy_is_named(tmp_path):
    """A worse policy would take its place."""
    path, best = tmp_path / "eval.jsonl", {"step": 2, "accuracy": 0.5}
    (tmp_path / "best").mkdir()
    (tmp_path / "best/step.json").write_text(json.dumps(best))
    for text in ('{"step": 0, "accuracy": 0.1}\n', ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="eval.jsonl: expected the line of best/step.json, found none"):
            read_evaluations(tmp_path)
    path.write_text(json.dumps(best) + '\n{"step": 4, "accuracy": null}\n')
    assert [row["step"] for row in read_evaluations(tmp_path)] == [2, 4]
    for row in ({"step": 4}, {"step": 4, "accuracy": "x"}, {"accuracy": 0.5}):
        path.write_text(f"{json.dumps(best)}\n{json.dumps(row)}\n")
        with pytest.raises(ValueError, match="eval.jsonl row 2: expected a step and an accuracy, found {"):
            read_evaluations(tmp_path)


def test_a_run_without_its_checkpoints_is_not_begun_anew(tmp_path):
    start_run(tmp_path, {})
    log_step(tmp_path, 0, {}, {}, {}, [])
    (tmp_path / "best").mkdir()
    for step in (0, 2):  # the initial policy has no checkpoint
        (tmp_path / "best/step.json").write_text(json.dumps({"step": step, "accuracy": 0.5}))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        if step:
            with pytest.raises(ValueError, match="expected a checkpoint to go on from, found the policy of a run"):
                rewind(tmp_path, 0)
            assert (tmp_path / "metrics.jsonl").read_bytes() == before
        else:
            rewind(tmp_path, 0)
            log_step(tmp_path, 0, {}, {}, {}, [])


# ----------------------------------------------------------------------------- what is held out


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (28, 28), (level, level, level))


def examples(count: int) -> list[Example]:
    return [Example(str(n), gray(n), (Question("What?", ("x", "y"), 1),)) for n in range(count)]


def test_a_share_is_of_the_pictures_hashes_whatever_the_order_of_rows():
    rows = examples(60)
    for share in ("0.1", "0.25", "1e-1", "0.9"):
        hashes = {row.id: picture_hash(row.image) for row in rows}
        want = sorted((digest, id) for id, digest in hashes.items() if int(digest, 16) / 16**64 < float(share))
        for seed in range(3):
            shuffled = random.Random(seed).sample(rows, len(rows))
            assert [row.id for row in held_out(shuffled, share)] == [id for _, id in want]
    assert {row.id for row in held_out(rows, "0.1")} < {row.id for row in held_out(rows, "0.25")}
    for share in ("0", "1", "1.5", "-0.2", "nan"):
        with pytest.raises(ValueError, match=f"{share}: expected a share of the images between 0 and 1"):
            held_out(rows, share)
    with pytest.raises(ValueError, match="1e-9: expected a share with at least one of the 60 images"):
        held_out(rows, "1e-9")


def test_no_held_out_picture_is_trained_on(tmp_path, capsys):
    rows = [replace(row, image=tmp_path / f"{row.id}.png") for row in examples(20)]
    for row, level in zip(rows, range(20)):
        gray(level).save(row.image)
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(example_row(row, row.image.name)) + "\n" for row in rows))
    config = toy_config(data=str(file), eval_data="0.3", eval_images=2)
    rows = load_examples(str(file))
    kept, held = set_aside(rows, config)
    aside = held_out(rows, "0.3")
    assert [row.id for row in kept] == [row.id for row in rows if row not in aside] and 0 < len(kept) < 20
    assert [picture.id for picture in held.benchmark.pictures] == [row.id for row in aside[:2]]
    assert f"{len(aside)} images of 0.3:{file} are held out; {len(aside)} of them are in" in capsys.readouterr().out
    same = load_benchmark(f"0.3:{file}")  # what evaluate.py is given
    assert [picture.id for picture in same.pictures] == [row.id for row in aside]
    assert same.name == held.benchmark.name

    # a file of its own, in which a picture of the training set stands under another name
    (tmp_path / "copy.png").write_bytes((tmp_path / "7.png").read_bytes())
    gray(99).save(tmp_path / "new.png")
    other = tmp_path / "eval.jsonl"
    other.write_text("".join(
        json.dumps(example_row(replace(rows[0], id=name), f"{name}.png")) + "\n" for name in ("new", "copy")
    ))
    kept, held = set_aside(rows, change(config, eval_data=str(other), eval_images=1))
    assert [row.id for row in kept] == [row.id for row in rows if row.id != "7"]
    assert [picture.id for picture in held.benchmark.pictures] == ["new"]
    _, changed = set_aside(rows, change(config, eval_data=str(other), eval_images=0))
    assert changed.contents() != held.contents()
    with pytest.raises(ValueError, match="eval_data .*eval.jsonl: expected the rows that the run to resume began with"):
        check_resumes(held.config, held.config.flat() | {"contents": held.contents()}, changed.contents())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_every": 0}, "eval_every 0: expected at least 1"),
        ({"eval_images": -1}, "eval_images -1: expected 0 or more"),
        ({"eval_samples": -1}, "eval_samples -1: expected 0 or more"),
        ({"stop_at": 1.5, "eval_data": "0.1"}, "stop_at 1.5: expected 0 to 1"),
        ({"patience": 2}, "patience and stop_at: expected eval_data too"),
        ({"stop_at": 0.5}, "patience and stop_at: expected eval_data too"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        change(TrainConfig(), **changes)
