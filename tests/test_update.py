"""One optimizer step: the same whatever the micro-batches, and what is logged of it."""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import Waits, keys

from grpo.log import alarms
from grpo.logprobs import CompletionScorer
from grpo.loss import policy_loss
from grpo.policy import encode_images
from grpo.pretrained import load_policy
from grpo.recipes import toy_config
from grpo.rollout import sample_rollouts
from grpo.update import micro_batches, prepare_training_, update_policy, warm_up_
from reward.caprl import Rewards
from reward.step import reward_metrics


def score(policy, model=None) -> CompletionScorer:
    return CompletionScorer(model or policy.model, policy.forbidden_ids)


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
    assert all(prompt.pixel_values.untyped_storage().nbytes() == 0 for prompt in prompts)  # the features stand for them
    again = sample_rollouts(policy, prompts, keys(4, 2), 10)
    metrics, change = one_update(policy, (again, *rest), **frozen)
    assert num_images == [1] * 4
    assert torch.equal(again.tokens, rollouts.tokens) and metrics == pytest.approx(want_metrics, abs=1e-5)
    for name, one in want.items():
        assert torch.allclose(change[name], one, atol=1e-6), name


def test_micro_batches_hand_computed(batch, monkeypatch):
    rollouts = batch[0]
    sizes = [
        len(prompt.input_ids) + int(pair.sum())
        for prompt, pair in zip(rollouts.prompts, rollouts.lengths.view(4, 2))
    ]
    assert micro_batches(rollouts, sum(sizes)) == [(0, 4)]
    half = max(sum(sizes[:2]), sum(sizes[2:]))
    assert micro_batches(rollouts, sum(sizes) - 1) == micro_batches(rollouts, half) == [(0, 2), (2, 4)]
    assert micro_batches(rollouts, 1) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    others = iter([True, True, False])  # another rank fits with three
    monkeypatch.setattr("grpo.update.gather_rows", lambda rows: [*rows, next(others)])
    assert micro_batches(rollouts, sum(sizes)) == [(0, 1), (1, 2), (2, 4)]


def test_the_host_waits_as_often_for_one_micro_batch_as_for_four(policy, batch, monkeypatch):
    """It hands the next one to a GPU that still computes the last. Reads of the host's own tensors count here, too: of them
    each prompt has some, however the prompts are split. (The tower, which is left out, has some for each pass.)"""
    def mask(queries: int, keys: int):  # torch's own is a kind of tensor that cannot be watched
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    monkeypatch.setattr("grpo.logprobs.causal_lower_right", mask)
    rollouts, *rest = batch
    batch = replace(rollouts, prompts=encode_images(policy, rollouts.prompts)), *rest
    seen = []
    for budget in (10**6, 1):
        with Waits() as waits:
            one_update(policy, batch, micro_batch_tokens=budget, gradient_checkpointing=True, freeze="vision+merger")
        seen.append(Counter(waits.seen))
    assert len(micro_batches(batch[0], 1)) == 4 and seen[0] == seen[1] and set(seen[0]) == {"_local_scalar_dense"}


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
    # copied with its hook by one_update; the reference runs it too
    mlp = policy.model.model.language_model.layers[0].mlp
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
    logprobs, entropies = score(policy, model)(rollouts, with_entropy=True)
    means = logprobs.sum(1) / rollouts.lengths
    assert metrics["entropy"] == pytest.approx((entropies.sum(1) / rollouts.lengths)[valid].mean().item(), rel=1e-4) != 0
    (-(advantages * means)[valid].sum() / valid.sum()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(change[name], -parameter.grad, atol=1e-5 + 1e-3 * parameter.grad.abs().max().item()), name


@pytest.mark.parametrize("warmup_steps, want", [(4, [0.1, 0.2, 0.3, 0.4, 0.4]), (0, [0.4, 0.4])])
def test_the_learning_rate_rises_linearly_by_hand(warmup_steps, want):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=7.0)
    config = toy_config(learning_rate=0.4, warmup_steps=warmup_steps)
    for step, rate in enumerate(want):
        warm_up_(optimizer, step, config)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


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


def test_an_epoch_that_is_not_finite_does_not_take_the_next_one_with_it(policy, batch, monkeypatch):
    """Of three epochs the second's loss alone is NaN."""
    epochs, original = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_",
                        lambda *args, **kwargs: epochs.append(0) or original(*args, **kwargs))
    monkeypatch.setattr("grpo.update.policy_loss", lambda *args, **kwargs: (
        lambda loss, stats: (loss * (math.nan if len(epochs) == 1 else 1.0), stats))(*policy_loss(*args, **kwargs)))
    metrics, change = one_update(policy, batch, inner_epochs=3)
    assert metrics["skipped"] == 1 and len(epochs) == 3
    assert any((value != 0).any() for value in change.values())


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


def test_truncated_captions_are_masked_from_the_loss_alone(policy, batch):
    """DAPO's overlong mask: the step is that of captions without a reward in their place."""
    rollouts, advantages, valid = batch
    truncated = torch.tensor([False, True, False, False, True, False, False, False])
    cut = replace(rollouts, truncated=truncated)
    want, change = one_update(policy, (rollouts, advantages, valid & ~truncated))
    metrics, masked = one_update(policy, (cut, advantages, valid), mask_truncated=True)
    assert metrics == want and all(torch.equal(masked[name], change[name]) for name in change)
    kept, _ = one_update(policy, (cut, advantages, valid))
    assert kept["loss"] != want["loss"]
    all_cut = replace(rollouts, truncated=torch.ones(8, dtype=torch.bool))
    metrics, change = one_update(policy, (all_cut, advantages, valid), mask_truncated=True)
    assert math.isnan(metrics["ratio"]) and all((value == 0).all() for value in change.values())


def test_captions_that_teach_are_counted(policy, batch):
    """By hand, of eight: three have the advantage 0, of the others one has no reward and two are cut off."""
    rollouts, advantages, _ = batch
    advantages = torch.tensor([0.0, 1, 0, -1, 1, 0, 1, -1])
    valid = torch.tensor([True, True, True, True, True, True, True, False])
    cut = replace(rollouts, truncated=torch.tensor([True, True, False, False, True, False, False, False]))
    for mask_truncated, want in ((False, 4), (True, 2)):
        metrics, _ = one_update(policy, (cut, advantages, valid), mask_truncated=mask_truncated)
        assert metrics["teaching_captions"] == want


def test_a_step_without_any_reward_logs_null_and_blames_nobody(policy, batch):
    """0.0 was logged of it, and the ratio of 0 raised the alarm that sampler and trainer disagree."""
    rollouts = batch[0]
    metrics, _ = one_update(policy, (rollouts, torch.zeros(8), torch.zeros(8, dtype=torch.bool)))
    nothing = {"loss", "ratio", "clip_share", "kl", "entropy", "sampler_gap"}
    assert {key for key, value in metrics.items() if math.isnan(value)} == nothing and metrics["skipped"] == 0
    rewards = torch.full((8,), math.nan)
    metrics |= reward_metrics(rollouts, Rewards(rewards, {"accuracy": rewards}, []))
    assert {key for key in metrics if math.isnan(metrics[key])} == nothing | {
        "reward", "reward_accuracy", "accuracy", "flat_groups", "failed_share", "unparsed_share", "abstain_share"}
    assert metrics["unscored_captions"] == 8 and alarms(metrics | {"truncated_share": 0.0}) == []


def test_shipped_policy_is_on_policy(tmp_path):
    policy = load_policy("data/toy/policy", torch.device("cpu"))
    from data.toy.world import draw, make_scene

    prompts = [policy.prompt(draw(make_scene("heldout", index))) for index in range(6)]
    rollouts = sample_rollouts(policy, prompts, keys(6, 4), 96)
    logprobs, _ = score(policy)(rollouts)
    assert torch.allclose(logprobs, rollouts.logprobs, atol=1e-4)
    assert not rollouts.truncated.any() and len(set(rollouts.captions)) > 12
