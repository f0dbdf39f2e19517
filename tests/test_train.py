"""Whole runs, and the images of each step."""

import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from data.examples import Example, Question
from data.export import example_row
from data.jsonl import read_log
from grpo.pretrained import load_policy
from grpo.recipes import toy_config
from grpo.run import load_run, sample_step
from grpo.update import prepare_training_
from tools.check import check, token_names
from train import step_examples, train

QUESTION = Question("What?", ("x", "y"), 1)
EXAMPLES = [Example(str(i), Path(f"{i}.png"), (QUESTION,)) for i in range(7)]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_without_a_kl_term_no_reference_is_held(lora_rank):
    for kl_coef in (0.0, 0.01):
        run = load_run(toy_config(kl_coef=kl_coef, lora_rank=lora_rank), torch.device("cpu"))
        assert (run.reference is None) == (kl_coef == 0)


def test_no_image_comes_twice_in_a_pass_and_every_pass_has_its_own_order():
    passes = [
        [e.id for step in (3 * n, 3 * n + 1, 3 * n + 2) for e in step_examples(EXAMPLES, step, 2, 0)]
        for n in range(20)
    ]
    assert all(len(set(one)) == 6 for one in passes)
    assert len({tuple(one) for one in passes}) > 15
    # the remainder is never the same one for ever
    assert {id for one in passes for id in one} == {e.id for e in EXAMPLES}
    assert [e.id for e in step_examples(EXAMPLES, 4, 2, 0)] == passes[1][2:4]
    assert passes[0] != [e.id for step in range(3) for e in step_examples(EXAMPLES, step, 2, 1)]


def test_a_pass_shows_a_picture_once_however_many_rows_it_has(tmp_path, monkeypatch):
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("copy.png", "red")):
        Image.new("RGB", (28, 28), color).save(tmp_path / name)
    lines = [json.dumps(example_row(Example(f"q{n}", Path(), (replace(QUESTION, question=f"What {n % 4}?"),)), name)) + "\n"
             for n, name in enumerate(("a.png", "b.png", "a.png", "copy.png", "a.png"))]
    (tmp_path / "vqa.jsonl").write_text("".join(lines))
    seen = []
    def note(examples, config):
        seen.append(examples)
        raise ZeroDivisionError

    monkeypatch.setattr("train.check_examples", note)
    monkeypatch.setattr("tools.check.check_examples", note)
    config = toy_config(data=str(tmp_path / "vqa.jsonl"), run_dir=str(tmp_path / "run"), prompts_per_step=1)
    for start in (train, check):
        with pytest.raises(ZeroDivisionError):
            start(config)
    for examples in seen:
        assert [(one.id, one.other_ids) for one in examples] == [("q0", ("q2", "q3", "q4")), ("q1", ())]
        # q4 asks what q0 asks
        assert [q.question for q in examples[0].questions] == ["What 0?", "What 2?", "What 3?"]
    assert len(seen) == 2


def test_the_pixels_of_a_step_are_gone_when_the_next_one_is_sampled(tmp_path, monkeypatch):
    held = []

    def watched(*args):
        assert not any(rollouts() for rollouts in held)
        rollouts = sample_step(*args)
        held.append(weakref.ref(rollouts))
        return rollouts

    monkeypatch.setattr("train.sample_step", watched)
    train(toy_config(data="toy:train:6", prompts_per_step=2, group_size=2, num_steps=3, max_new_tokens=8,
                     run_dir=str(tmp_path / "run"), audit_every=2))
    assert len(held) == 3


def test_steps_without_a_finite_gradient_are_named_and_then_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reward.step.group_advantages", lambda rewards, *_: torch.full_like(rewards, math.nan))
    with pytest.raises(ValueError, match=r"2 steps in a row without a finite gradient; the last images: \['train-0"):
        train(toy_config(run_dir=str(tmp_path / "run"), max_skipped=2, **TINY))
    rows = read_log(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 1] and rows[0]["loss"] is None
    assert "step 0 teaches nothing, it is without a finite gradient; images: ['train-0" in capsys.readouterr().out


TINY = dict(data="toy:train:12", num_steps=3, prompts_per_step=4, group_size=4, micro_batch_tokens=600, probe_images=3,
            audit_every=1)


def test_a_run_writes_what_it_promises_and_repeats(tmp_path, capsys):
    """Same seed: the same metrics to the last bit and the same rollouts, whatever the batch sizes of the decoder."""
    finals = [train(toy_config(run_dir=str(tmp_path / name), **TINY)) for name in ("one", "two")]
    said = capsys.readouterr().out
    assert "12 images, 1 rank(s) on cpu, settings of toy, data 'toy:train:12', run_dir" in said and "TrainConfig(" not in said
    policy = load_policy("data/toy/policy", torch.device("cpu"))
    ends, never = (token_names(policy, ids) for ids in (policy.eos_ids, policy.forbidden_ids))
    assert ends == "737 <|im_end|>, 738 <|endoftext|>"
    sampling = f"no top-k or top-p, no penalties, at most 96 tokens; EOS {ends}, pad"
    assert f"sampling: temperature 1.0, {sampling} " in said and f", never {never};" in said
    records = []
    for name in ("one", "two"):
        rows = read_log(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert all(math.isfinite(value) for row in rows for value in row.values())
        records.append(rows)
        assert json.loads((tmp_path / name / "config.json").read_text())["group_size"] == 4
    assert records[0] == records[1]
    timing = read_log(tmp_path / "one/timing.jsonl")
    for row, metrics in zip(timing, records[0], strict=True):
        parts = sum(row[f"seconds_{phase}"] for phase in ("rollout", "reward", "update", "weights", "records"))
        assert 0.5 * row["seconds"] < parts <= row["seconds"] and row["idle_share"] < 0.01
        assert row["tokens_per_second"] == pytest.approx(16 * metrics["length"] / row["seconds"])
    assert records[0][0]["ratio"] == pytest.approx(1, abs=1e-5) and records[0][0]["sampler_gap"] < 1e-4
    rollouts = read_log(tmp_path / "one/rollouts/step_000001.jsonl")
    assert len(rollouts) == 16 and len(rollouts[0]["questions"]) == 4
    for row in rollouts:
        right = [q["chosen"] == q["gold"] for q in row["questions"]]
        assert row["reward"] == pytest.approx(sum(right) / 4)
    audits = read_log(tmp_path / "one/audit.jsonl")
    assert [row["step"] for row in audits] == [0, 1, 2] and audits == read_log(tmp_path / "two/audit.jsonl")
    assert ["probe_no_caption" in row for row in audits] == [True, True, True] and len(audits[0]["gold_letters"]) == 4
    assert said.count("audit  probe_accuracy") == 6
    weights = [AutoModelForImageTextToText.from_pretrained(final).state_dict() for final in finals]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ValueError, match="expected a new or empty run folder"):
        train(toy_config(run_dir=str(tmp_path / "one"), **TINY))


def test_a_judge_can_give_the_reward(tmp_path):
    judge = shutil.copytree("data/toy/policy", tmp_path / "model")
    config = toy_config(run_dir=str(tmp_path / "judge"), reward="judge", judge=str(judge), **TINY | {"num_steps": 1})
    train(config)
    [metrics] = read_log(tmp_path / "judge/metrics.jsonl")
    rows = read_log(tmp_path / "judge/rollouts/step_000000.jsonl")
    assert metrics["reward"] == metrics["reward_judge"] == pytest.approx(sum(row["reward"] for row in rows) / 16)
    assert all(row["parts"] == {"judge": row["reward"]} and len(row["questions"][0]["probs"]) == 5 for row in rows)
    template = judge / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    with pytest.raises(ValueError, match="^judge .*: expected the configuration, tokenizer, chat template and image pro"):
        train(replace(config, num_steps=2, resume=True))
    saved = json.loads((tmp_path / "judge/config.json").read_text())
    saved["contents"]["judge"] = saved["contents"]["judge"].split()[
        0
    ]  # of a run that began with the weights' hash alone
    (tmp_path / "judge/config.json").write_text(json.dumps(saved))
    train(replace(config, num_steps=2, resume=True))


def test_a_run_freezes_and_checkpoints_as_told(tmp_path, monkeypatch):
    seen = []
    spy = lambda model, config: seen.append(config) or prepare_training_(model, config)  # noqa: E731
    monkeypatch.setattr("grpo.run.prepare_training_", spy)
    config = toy_config(
        run_dir=str(tmp_path / "f"), freeze="vision", gradient_checkpointing=True, **TINY | {"num_steps": 1}
    )
    final = AutoModelForImageTextToText.from_pretrained(train(config), dtype=torch.float32)
    start = AutoModelForImageTextToText.from_pretrained(config.policy, dtype=torch.float32)
    assert seen == [config]
    for name, value in start.state_dict().items():
        is_frozen = "visual" in name and "merger" not in name
        assert torch.equal(final.state_dict()[name], value) == is_frozen, name
