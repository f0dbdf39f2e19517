import copy
import json
import math
import os
import re
import resource
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import keys
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data.examples import Example, Question
from data.export import example_row
from data.io import to_json
from grpo.config import RewardConfig, toy_config
from grpo.export import export_policy
from grpo.log import alarms
from grpo.logprobs import CompletionScorer
from grpo.policy import encode_images
from grpo.pretrained import load_policy
from grpo.rollout import sample_rollouts
from grpo.update import group_sizes, micro_batches, prepare_training_, split_evenly, update_policy
from reward.caprl import Rewards
from reward.step import check_rewards, reward_metrics
from tools.check import check
from train import step_examples, train

QUESTION = Question("What?", ("x", "y"), 1)
EXAMPLES = [Example(str(i), Path(f"{i}.png"), (QUESTION,)) for i in range(7)]


def test_no_image_comes_twice_in_a_pass_and_every_pass_has_its_own_order():
    passes = [[e.id for step in (3 * n, 3 * n + 1, 3 * n + 2) for e in step_examples(EXAMPLES, step, 2, 0)] for n in range(20)]
    assert all(len(set(one)) == 6 for one in passes)
    assert len({tuple(one) for one in passes}) > 15
    assert {id for one in passes for id in one} == {e.id for e in EXAMPLES}  # the remainder is never the same one for ever
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


@pytest.fixture
def batch(policy, prompts):
    rollouts = sample_rollouts(policy, prompts, keys(4, 2), 10)
    advantages = torch.tensor([1.0, -1, 0.5, -0.5, 2, 0, -1, 1])
    valid = torch.tensor([True] * 7 + [False])
    return rollouts, advantages, valid


def score(policy, model=None) -> CompletionScorer:
    return CompletionScorer(model or policy.model, policy.pad_id, policy.forbidden_ids)


def one_update(policy, batch, **changes) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and the change of every parameter after plain SGD: proportional to the gradient."""
    model = copy.deepcopy(policy.model)
    config = toy_config(group_size=2, max_new_tokens=10, max_grad_norm=1e9, **changes)
    prepare_training_(model, config)
    reference = score(policy) if config.kl_coef else None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    metrics = update_policy(score(policy, model), reference, optimizer, *batch, config)
    assert not model.training
    before = dict(policy.model.named_parameters())
    return metrics, {name: (p - before[name]).detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_the_step(policy, batch, reduction):
    whole_metrics, whole = one_update(policy, batch, reduction=reduction)
    assert whole_metrics["ratio"] == pytest.approx(1, abs=1e-5)  # a mean, also where the weights sum to less than 1
    for budget in (1, 120, 200):
        metrics, change = one_update(policy, batch, micro_batch_tokens=budget, reduction=reduction)
        assert metrics == pytest.approx(whole_metrics, abs=1e-4, rel=1e-5)
        for name, want in whole.items():
            assert torch.allclose(change[name], want, atol=1e-5 + 1e-4 * want.abs().max().item()), name


def test_a_frozen_tower_runs_once_an_image_with_the_same_step(policy, batch, monkeypatch):
    """Features made for the rollout serve sampler, reference and policy: same captions, values and gradients."""
    frozen = dict(freeze="vision+merger", micro_batch_tokens=1)
    want_metrics, want = one_update(policy, batch, **frozen)
    rollouts, *rest = batch
    num_images = []
    tower = type(policy.model.model.visual)
    original = tower.forward

    def spy(self, *args, grid_thw, **kwargs):
        num_images.append(len(grid_thw))
        return original(self, *args, grid_thw=grid_thw, **kwargs)

    monkeypatch.setattr(tower, "forward", spy)
    prompts = encode_images(policy, rollouts.prompts)
    again = sample_rollouts(policy, prompts, keys(4, 2), 10)
    metrics, change = one_update(policy, (again, *rest), **frozen)
    assert num_images == [1] * 4 and "get_image_features" not in vars(policy.model.model)
    assert torch.equal(again.tokens, rollouts.tokens) and metrics == pytest.approx(want_metrics, abs=1e-5)
    for name, one in want.items():
        assert torch.allclose(change[name], one, atol=1e-6), name


def test_micro_batches_hand_computed(batch, monkeypatch):
    rollouts = batch[0]
    sizes = [len(prompt.input_ids) + int(pair.sum()) for prompt, pair in zip(rollouts.prompts, rollouts.lengths.view(4, 2))]
    assert group_sizes(rollouts) == sizes
    assert split_evenly("abcdefg", 3) == ["ab", "cd", "efg"] and split_evenly("ab", 1) == ["ab"]
    assert micro_batches(rollouts, sum(sizes)) == [(0, 4)]
    half = max(sum(sizes[:2]), sum(sizes[2:]))
    assert micro_batches(rollouts, sum(sizes) - 1) == micro_batches(rollouts, half) == [(0, 2), (2, 4)]
    assert micro_batches(rollouts, 1) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    others = iter([True, True, False])  # another rank fits with three
    monkeypatch.setattr("grpo.update.gather_rows", lambda rows: [*rows, next(others)])
    assert micro_batches(rollouts, sum(sizes)) == [(0, 1), (1, 2), (2, 4)]


@pytest.mark.parametrize("freeze", ["none", "vision", "vision+merger"])
def test_freezing_leaves_the_rest_of_the_step_alone(policy, batch, freeze):
    _, whole = one_update(policy, batch)
    _, change = one_update(policy, batch, freeze=freeze)
    for name, want in whole.items():
        is_tower, is_merger = "visual" in name, "visual.merger" in name
        frozen = freeze != "none" and is_tower and (freeze == "vision+merger" or not is_merger)
        if frozen:
            assert (change[name] == 0).all() and want.abs().max() > 0, name
        else:
            assert torch.allclose(change[name], want, atol=1e-6), name


def test_checkpointing_gives_the_same_step(policy, batch):
    metrics, change = one_update(policy, batch)
    calls = []
    mlp = policy.model.model.language_model.layers[0].mlp  # copied with its hook by one_update; the reference runs it too
    hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    one_update(policy, batch, kl_coef=0.0)
    again, same = one_update(policy, batch, gradient_checkpointing=True, kl_coef=0.0)
    assert len(calls) == 3  # once without, and with checkpointing once more in the backward pass
    hook.remove()
    again, same = one_update(policy, batch, gradient_checkpointing=True)
    assert again == pytest.approx(metrics, abs=1e-6)
    assert all(torch.allclose(same[name], want, atol=1e-6) for name, want in change.items())
    policy.model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="expected a policy without dropout, got attention_dropout 0.1"):
        one_update(policy, batch, gradient_checkpointing=True)


def test_the_first_step_is_on_policy(policy, batch):
    metrics, change = one_update(policy, batch)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5) and metrics["clip_share"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["sampler_gap"] < 1e-4
    # and its gradient is REINFORCE's: mean over valid captions of A times the mean log-probability of their tokens
    rollouts, advantages, valid = batch
    model = copy.deepcopy(policy.model)
    logprobs, _ = score(policy, model)(rollouts)
    means = logprobs.sum(1) / rollouts.lengths
    (-(advantages * means)[valid].sum() / valid.sum()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(change[name], -parameter.grad, atol=1e-5 + 1e-3 * parameter.grad.abs().max().item()), name


def test_old_logprobs_stay_those_of_the_first_inner_epoch(policy, batch, monkeypatch):
    seen = []

    def spy(logprobs, old_logprobs, *rest):
        seen.append((logprobs.detach().clone(), old_logprobs.clone()))
        return original(logprobs, old_logprobs, *rest)

    from grpo import update as module

    original = module.policy_loss
    monkeypatch.setattr(module, "policy_loss", spy)
    one_update(policy, batch, inner_epochs=2, learning_rate=0.1)
    (first, first_old), (second, second_old) = seen
    assert torch.equal(first, first_old) and torch.equal(first_old, second_old)
    assert not torch.allclose(second, second_old)


def test_ratio_and_clip_share_are_taken_where_they_can_move(policy, batch, monkeypatch):
    """Of the last of three inner epochs, from plain loops over what the loss was given; the rest is of the first."""
    seen = []

    def spy(logprobs, old_logprobs, advantages, weights, *rest):
        seen.append((logprobs.detach().clone(), old_logprobs, advantages, weights))
        return original(logprobs, old_logprobs, advantages, weights, *rest)

    from grpo import update as module

    original = module.policy_loss
    monkeypatch.setattr(module, "policy_loss", spy)
    metrics, _ = one_update(policy, batch, inner_epochs=3, reduction="constant")
    once, _ = one_update(policy, batch, reduction="constant")
    want = {"ratio": 0.0, "clip_share": 0.0}
    logprobs, old, advantages, weights = seen[2]
    for b in range(8):
        for t in range(logprobs.shape[1]):
            ratio, weight = math.exp(logprobs[b, t] - old[b, t]), weights[b, t].item() / weights.sum().item()
            clipped = min(max(ratio, 0.8), 1.2)
            want["ratio"] += weight * ratio
            want["clip_share"] += weight * (clipped * advantages[b].item() < ratio * advantages[b].item())
    assert {key: metrics[key] for key in want} == pytest.approx(want, rel=1e-4)
    assert abs(metrics["ratio"] - 1) > 0.01 and metrics["clip_share"] > 0.05
    assert once["ratio"] == pytest.approx(1, abs=1e-5) and once["clip_share"] == 0
    for key in ("loss", "kl", "entropy", "sampler_gap"):
        assert metrics[key] == once[key]


def test_the_samplers_logprobs_can_be_the_old_ones(policy, batch):
    rollouts, *rest = batch
    shifted = replace(rollouts, logprobs=rollouts.logprobs - 0.1 * rollouts.completion_mask)
    metrics, _ = one_update(policy, (shifted, *rest), sampler_logprobs=True)
    assert metrics["ratio"] == pytest.approx(math.exp(0.1), abs=1e-3)


def test_masters_and_moments_are_float32_and_take_small_steps(batch):
    """The shipped weights are bfloat16, in which a step of 1e-6 is lost on any weight over 0.001."""
    trained = load_policy("data/toy/policy", torch.device("cpu"))
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=1e-6)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    config = toy_config(group_size=2, max_new_tokens=10)
    update_policy(score(trained), None, optimizer, *batch, config)
    for name, parameter in trained.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert {optimizer.state[parameter][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        moved = (parameter - before[name]).abs()
        assert 0 < moved.max() <= 1.1e-6, name


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(policy, batch):
    rollouts, advantages, valid = batch
    broken = advantages.clone()
    broken[0] = math.nan
    metrics, change = one_update(policy, (rollouts, broken, valid))
    assert metrics["skipped"] == 1 and all((value == 0).all() for value in change.values())
    assert one_update(policy, batch)[0]["skipped"] == 0


def test_equal_rewards_without_kl_change_nothing(policy, batch):
    rollouts, _, valid = batch
    _, change = one_update(policy, (rollouts, torch.zeros(8), valid), kl_coef=0.0)
    assert all((value == 0).all() for value in change.values())


def test_captions_without_a_reward_count_nowhere(policy, batch):
    """Row 7 is invalid: whatever its advantage, and even if its whole group is, nothing changes or breaks."""
    rollouts, advantages, valid = batch
    loud = advantages.clone()
    loud[7] = 100.0
    metrics, change = one_update(policy, batch)
    loud_metrics, loud_change = one_update(policy, (rollouts, loud, valid))
    assert metrics == loud_metrics and all(torch.equal(change[name], loud_change[name]) for name in change)
    metrics, change = one_update(policy, (rollouts, advantages, torch.zeros(8, dtype=torch.bool)))
    assert all(value.isfinite().all() and (value == 0).all() for value in change.values())


def test_a_step_without_any_reward_logs_null_and_blames_nobody(policy, batch):
    """0.0 was logged of it, and the ratio of 0 raised the alarm that sampler and trainer disagree."""
    rollouts = batch[0]
    metrics, _ = one_update(policy, (rollouts, torch.zeros(8), torch.zeros(8, dtype=torch.bool)))
    nothing = {"loss", "ratio", "clip_share", "kl", "entropy", "sampler_gap"}
    assert {key for key, value in metrics.items() if math.isnan(value)} == nothing and metrics["skipped"] == 0
    rewards = torch.full((8,), math.nan)
    metrics |= reward_metrics(rollouts, Rewards(rewards, {"accuracy": rewards}, [], {"accuracy": math.nan}))
    assert {key for key in metrics if math.isnan(metrics[key])} == nothing | {
        "reward", "reward_accuracy", "accuracy", "flat_groups"}
    assert metrics["unscored_captions"] == 8 and alarms(metrics | {"truncated_share": 0.0}) == []


def test_reward_metrics_hand_computed(policy, batch):
    rollouts = batch[0]
    rewards = torch.tensor([0.5, 0.5, 1.0, 0.0, math.nan, math.nan, 0.25, math.nan])
    parts = {"accuracy": rewards - 0.25, "length": torch.full((8,), 0.25)}
    metrics = reward_metrics(rollouts, Rewards(rewards, parts, [], {"accuracy": 0.4}))
    assert metrics["reward_accuracy"] == pytest.approx(1 / 5) and metrics["reward_length"] == pytest.approx(0.25)
    assert metrics["reward"] == pytest.approx(2.25 / 5) and metrics["unscored_captions"] == 3
    assert metrics["flat_groups"] == 0.5  # [0.5, 0.5], and the group with one measured reward
    assert metrics["accuracy"] == pytest.approx(0.4)
    assert metrics["length"] == pytest.approx(rollouts.lengths.float().mean().item())


def test_what_one_rank_could_not_measure_is_left_to_the_others(policy, batch, monkeypatch):
    other = {"accuracy": 0.5 * 8, "captions of accuracy": 8}
    monkeypatch.setattr("reward.step.sum_across_ranks",
                        lambda mine: {key: value + other.get(key, 0) for key, value in mine.items()})
    metrics = reward_metrics(batch[0], Rewards(torch.full((8,), math.nan), {}, [], {"accuracy": math.nan}))
    assert metrics["accuracy"] == 0.5 and math.isnan(metrics["reward"])


def test_alarms_name_the_number_and_the_way_out():
    calm = dict(ratio=1.0, sampler_gap=0.01, kl=0.1, truncated_share=0.1, flat_groups=0.3)
    assert alarms(calm) == []
    for change, advice in (({"ratio": 0.9}, "ratio 0.900: .*--sampler-logprobs"), ({"kl": 0.6}, "kl 0.600: .*--kl-coef"),
                           ({"sampler_gap": 0.2}, "sampler_gap 0.200: .*precision"),
                           ({"truncated_share": 0.8}, "truncated_share 0.800: .*--max-new-tokens"),
                           ({"flat_groups": 1.0}, "flat_groups 1.000: hardly any group teaches")):
        [said] = alarms(calm | change)
        assert re.match(advice, said)


def test_steps_without_a_finite_gradient_are_named_and_then_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.group_advantages", lambda rewards, *_: torch.full_like(rewards, math.nan))
    with pytest.raises(ValueError, match=r"2 steps in a row without a finite gradient; the last images: \['train-0"):
        train(toy_config(run_dir=str(tmp_path / "run"), max_skipped=2, **TINY))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [1, 1] and rows[0]["loss"] is None
    assert "step 0 was left out, its gradient is not finite; images: ['train-0" in capsys.readouterr().out


def test_what_was_not_measured_is_null_in_the_records():
    assert to_json({"a": math.nan, "b": [1.5, {"c": math.inf}], "d": "é"}) == '{"a": null, "b": [1.5, {"c": null}], "d": "é"}'


def test_shipped_policy_is_on_policy(tmp_path):
    policy = load_policy("data/toy/policy", torch.device("cpu"))
    from data.toy.world import draw, make_scene

    prompts = [policy.prompt(draw(make_scene("heldout", index))) for index in range(6)]
    rollouts = sample_rollouts(policy, prompts, keys(6, 4), 96)
    logprobs, _ = score(policy)(rollouts)
    assert torch.allclose(logprobs, rollouts.logprobs, atol=1e-4)
    assert not rollouts.truncated.any() and len(set(rollouts.captions)) > 12


TINY = dict(data="toy:train:12", num_steps=3, prompts_per_step=4, group_size=4, micro_batch_tokens=600, probe_images=3,
            audit_every=1)


def test_a_run_writes_what_it_promises_and_repeats(tmp_path, capsys):
    """Same seed: the same metrics to the last bit and the same rollouts, whatever the batch sizes of the decoder."""
    finals = [train(toy_config(run_dir=str(tmp_path / name), **TINY)) for name in ("one", "two")]
    said = capsys.readouterr().out
    ids = load_policy("data/toy/policy", torch.device("cpu"))
    assert ids.names(ids.eos_ids) == "737 <|im_end|>, 738 <|endoftext|>"
    sampling = f"no top-k or top-p, at most 96 tokens, EOS {ids.names(ids.eos_ids)}, never"
    assert f"sampling: temperature 1.0, {sampling} {ids.names(ids.forbidden_ids)};" in said
    records = []
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert all(math.isfinite(value) for row in rows for value in row.values())
        records.append(rows)
        assert json.loads((tmp_path / name / "config.json").read_text())["group_size"] == 4
    assert records[0] == records[1]
    timing = [json.loads(line) for line in (tmp_path / "one/timing.jsonl").read_text().splitlines()]
    for row, metrics in zip(timing, records[0], strict=True):
        parts = sum(row[f"seconds_{phase}"] for phase in ("rollout", "reward", "update", "weights", "records"))
        assert 0.5 * row["seconds"] < parts <= row["seconds"] and row["idle_share"] < 0.01
        assert row["tokens_per_second"] == pytest.approx(16 * metrics["length"] / row["seconds"])
    assert records[0][0]["ratio"] == pytest.approx(1, abs=1e-5) and records[0][0]["sampler_gap"] < 1e-4
    rollouts = [json.loads(line) for line in (tmp_path / "one/rollouts/step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 16 and len(rollouts[0]["questions"]) == 4
    for row in rollouts:
        right = [q["chosen"] == q["gold"] for q in row["questions"]]
        assert row["reward"] == pytest.approx(sum(right) / 4)
    audits = [json.loads(line) for line in (tmp_path / "one/audit.jsonl").read_text().splitlines()]
    assert [row["step"] for row in audits] == [0, 1, 2] and audits == [
        json.loads(line) for line in (tmp_path / "two/audit.jsonl").read_text().splitlines()
    ]
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
    [metrics] = [json.loads(line) for line in (tmp_path / "judge/metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "judge/rollouts/step_000000.jsonl").read_text().splitlines()]
    assert metrics["reward"] == metrics["reward_judge"] == pytest.approx(sum(row["reward"] for row in rows) / 16)
    assert all(row["parts"] == {"judge": row["reward"]} and len(row["questions"][0]["probs"]) == 5 for row in rows)
    template = judge / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    with pytest.raises(ValueError, match="^judge .*: expected the configuration, tokenizer, chat template and image pro"):
        train(replace(config, num_steps=2, resume=True))
    saved = json.loads((tmp_path / "judge/config.json").read_text())
    saved["contents"]["judge"] = saved["contents"]["judge"].split()[0]  # of a run that began with the weights' hash alone
    (tmp_path / "judge/config.json").write_text(json.dumps(saved))
    train(replace(config, num_steps=2, resume=True))


def test_a_run_freezes_and_checkpoints_as_told(tmp_path, monkeypatch):
    seen = []
    spy = lambda model, config: seen.append(config) or prepare_training_(model, config)  # noqa: E731
    monkeypatch.setattr("grpo.run.prepare_training_", spy)
    config = toy_config(run_dir=str(tmp_path / "f"), freeze="vision", gradient_checkpointing=True, **TINY | {"num_steps": 1})
    final = AutoModelForImageTextToText.from_pretrained(train(config), dtype=torch.float32)
    start = AutoModelForImageTextToText.from_pretrained(config.policy, dtype=torch.float32)
    assert seen == [config]
    for name, value in start.state_dict().items():
        is_frozen = "visual" in name and "merger" not in name
        assert torch.equal(final.state_dict()[name], value) == is_frozen, name


def test_every_setting_of_the_reward_reaches_it():
    config = toy_config(
        num_questions=7, question_draw="independent", num_shuffles=3, abstain=True, soft=True, length_weight=0.5, length_full=9,
        length_zero=11, repetition_weight=0.1,
    )
    assert config.reward_config == RewardConfig(7, "independent", 3, True, True, 0.5, 9, 11, 0.1)
    assert all(getattr(config.reward_config, field.name) != field.default for field in fields(RewardConfig))


def test_too_many_failures_stop_the_run(monkeypatch):
    records = [[{"failure": "too long"}, {"failure": ""}], [{"failure": ""}] * 2]
    result = Rewards(torch.zeros(2), {}, records, {})
    check_rewards(result, 0.25, toy_config(max_failed_share=0.25))
    monkeypatch.setattr("reward.step.gather_rows", lambda rows: [*rows, "not finite"])  # another rank's reason
    with pytest.raises(ValueError, match=r"26% of the step's questions could not be scored \(not finite; too long\)"):
        check_rewards(result, 0.26, toy_config(max_failed_share=0.25))


def test_a_truncated_caption_is_scored_and_counted(policy, batch):
    rollouts = replace(batch[0], truncated=torch.tensor([True, False] * 4))
    metrics = reward_metrics(rollouts, Rewards(torch.ones(8), {}, [], {}))
    assert metrics["truncated_share"] == 0.5 and metrics["reward"] == 1 and metrics["unscored_captions"] == 0


def test_the_saved_policy_opens_in_transformers_with_the_same_logits(policy, prompts, tmp_path):
    export_policy(policy, tmp_path / "final", torch.float32)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    prompt = prompts[0]
    batch = dict(
        input_ids=prompt.input_ids[None], attention_mask=torch.ones_like(prompt.input_ids)[None],
        pixel_values=prompt.pixel_values, image_grid_thw=prompt.grid,
        mm_token_type_ids=(prompt.input_ids == policy.model.config.image_token_id).int()[None],
    )
    assert torch.equal(opened(**batch).logits, policy.model(**batch).logits)
    again = load_policy(str(tmp_path / "final"), torch.device("cpu"))
    assert again.eos_ids == policy.eos_ids and again.forbidden_ids == policy.forbidden_ids
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template


def flat_checkpoint(folder: Path, is_tied: bool) -> None:
    """The toy policy in the layout in which Qwen2.5-VL is published: text settings at the top level,
    names of before transformers 5, the chat template inside tokenizer_config.json."""
    source = Path("data/toy/policy")
    shutil.copytree(source, folder)
    config, tokenizer, processor = (
        json.loads((source / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config", "preprocessor_config")
    )
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope, _ = text.pop("rope_parameters"), vision.pop("rope_parameters")
    vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": 14}
    vision.pop("model_type")
    config |= text | {
        "model_type": "qwen2_5_vl", "torch_dtype": config.pop("dtype"), "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": is_tied, "vision_config": vision, "transformers_version": "4.41.2",
    }
    sizes = processor.pop("size")
    processor |= {"min_pixels": sizes["shortest_edge"], "max_pixels": sizes["longest_edge"]}
    tokenizer |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": (folder / "chat_template.jinja").read_text(),
                  "additional_special_tokens": tokenizer.pop("extra_special_tokens")}
    (folder / "chat_template.jinja").unlink()
    for name, content in (("config", config), ("tokenizer_config", tokenizer), ("preprocessor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    if not is_tied:
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["nested", "flat, tied", "flat, untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_has_its_sources_files_and_opens_to_the_same_model(layout, dtype, tmp_path, prompts):
    """Tried by hand with transformers 4.57.6 and torch 2.13 on these folders: the logits of 4.57.6
    and of 5.24 are equal to the last bit, the head tied or not as it was. Before, 4.57 did not know
    the tokenizer's class, took rope_theta for 1,000,000 and drew a random head."""
    source = tmp_path / "source"
    if layout == "nested":
        shutil.copytree("data/toy/policy", source)
    else:
        flat_checkpoint(source, is_tied=layout == "flat, tied")
    first = load_policy(str(source), torch.device("cpu"), dtype)
    export_policy(first, tmp_path / "once", dtype)
    export_policy(load_policy(str(tmp_path / "once"), torch.device("cpu"), dtype), tmp_path / "twice", dtype)
    name = str(dtype).removeprefix("torch.")
    umask = os.umask(0)
    os.umask(umask)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()}
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
        for file in ("tokenizer.json", "preprocessor_config.json"):
            assert (folder / file).read_bytes() == (source / file).read_bytes()
        config = json.loads((folder / "config.json").read_text())
        before = json.loads((source / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        if layout == "nested":
            assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == name
            text = config["text_config"]
            assert text["rope_theta"] == 10_000 and text["tie_word_embeddings"] and config["tie_word_embeddings"]
            assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [8, 12, 12]}
            assert text["rope_parameters"] == before["text_config"]["rope_parameters"]
            assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
            assert "<|im_start|>" in tokenizer["additional_special_tokens"]
        else:
            assert config["vision_config"].pop("torch_dtype") == name
            assert config == before | {"torch_dtype": name}
            assert (folder / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    prompt = prompts[0]
    batch = dict(
        input_ids=prompt.input_ids[None], attention_mask=torch.ones_like(prompt.input_ids)[None],
        pixel_values=prompt.pixel_values.to(dtype), image_grid_thw=prompt.grid,
        mm_token_type_ids=(prompt.input_ids == first.model.config.image_token_id).int()[None],
    )
    again = load_policy(str(tmp_path / "twice"), torch.device("cpu"), "auto")
    assert again.model.dtype == dtype
    head, embedding = again.model.lm_head.weight, again.model.get_input_embeddings().weight
    assert (head is embedding) == (layout != "flat, untied")
    assert torch.equal(again.model(**batch).logits, first.model(**batch).logits)
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert again.tokenizer.all_special_ids == first.tokenizer.all_special_ids


def test_an_export_of_a_source_without_a_tokenizers_config_or_with_rope_theta_elsewhere(tmp_path):
    """transformers 5 also reads a rope_theta that stands beside rope_parameters. Tried by hand: 4.57.6 opens the export
    with the same angles, 1 and 5000 ** (-2 / 64) first."""
    source = shutil.copytree("data/toy/policy", tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    del rope["rope_theta"]
    config["text_config"]["rope_theta"] = 5000.0
    (source / "config.json").write_text(json.dumps(config))
    first = load_policy(str(source), torch.device("cpu"))
    export_policy(first, tmp_path / "final", torch.float32)
    assert {path.name for path in (tmp_path / "final").iterdir()} == {path.name for path in source.iterdir()}
    text = json.loads((tmp_path / "final/config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_parameters"], text["rope_scaling"]) == (5000.0, rope, rope)
    again = load_policy(str(tmp_path / "final"), torch.device("cpu"))
    for policy in (first, again):
        angles = policy.model.model.language_model.rotary_emb.inv_freq
        assert angles[:2].tolist() == pytest.approx([1, 5000 ** (-2 / 64)])
    assert again.eos_ids == first.eos_ids and again.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_an_export_that_the_disk_does_not_take_leaves_the_one_before(policy, tmp_path):
    export_policy(policy, tmp_path / "final", torch.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"final: could not be written \(.*; .* free at "):
            export_policy(policy, tmp_path / "final", torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    load_policy(str(tmp_path / "final"), torch.device("cpu"))
