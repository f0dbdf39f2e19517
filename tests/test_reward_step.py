"""The reward in a training step: what is logged of it, and when it stops the run."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.examples import Example, Question
from grpo.recipes import toy_config
from reward.caprl import Rewards
from reward.claims import claim_record
from reward.step import check_examples, measure_step, reward_metrics, verifier_of


def record(correct: bool | None) -> list[dict]:
    """A caption with one question; None: it could not be scored."""
    failure = "too long" if correct is None else ""
    return [{"failure": failure, "correct": correct, "chosen": 0, "gold": 0, "abstain": None}]


def test_a_verifier_is_as_the_settings_name_it():
    chosen = dict(verifier_mode="sample", verifier_temperature=0.25, verifier_max_new_tokens=7)
    verifier = verifier_of(toy_config(**chosen), torch.device("cpu"))
    assert (verifier.mode, verifier.temperature, verifier.max_new_tokens) == ("sample", 0.25, 7)
    room = verifier.context - len(verifier.writers[False].head_ids)
    verifier_of(toy_config(**chosen | {"verifier_max_new_tokens": room - 1}), torch.device("cpu"))
    with pytest.raises(ValueError, match=f"verifier_max_new_tokens {room}: expected less than the {room} tokens"):
        verifier_of(toy_config(**chosen | {"verifier_max_new_tokens": room}), torch.device("cpu"))


def test_reward_metrics_hand_computed(policy, batch):
    rollouts = batch[0]
    rewards = torch.tensor([0.5, 0.5, 1.0, 0.0, math.nan, math.nan, 0.25, math.nan])
    parts = {"accuracy": rewards - 0.25, "length": torch.full((8,), 0.25)}
    records = [record(right) for right in (True, True, False, False, False)]
    metrics = reward_metrics(rollouts, Rewards(rewards, parts, records))
    assert metrics["reward_accuracy"] == pytest.approx(1 / 5) and metrics["reward_length"] == pytest.approx(0.25)
    assert metrics["reward"] == pytest.approx(2.25 / 5) and metrics["unscored_captions"] == 3
    assert metrics["flat_groups"] == 0.5  # [0.5, 0.5], and the group with one measured reward
    assert metrics["accuracy"] == pytest.approx(0.4)
    assert metrics["length"] == pytest.approx(rollouts.lengths.float().mean().item())


@pytest.mark.parametrize("pair, flat", [([0.5, 0.5], 1.0), ([1.0, 0.0], 0.0), ([0.25, math.nan], 1.0)])
def test_a_group_is_flat_where_its_measured_rewards_are_equal(policy, batch, pair, flat):
    assert reward_metrics(batch[0], Rewards(torch.tensor(pair * 4), {}, []))["flat_groups"] == flat


def test_what_one_rank_could_not_measure_is_left_to_the_others(policy, batch, monkeypatch):
    other = {"accuracy": (0.5 * 8, 8), "length": (40, 8), "reward": (0.0, 0)}
    monkeypatch.setattr("reward.step.gather_rows", lambda mine: [*mine, dict.fromkeys(mine[0], (0.0, 0)) | other])
    metrics = reward_metrics(batch[0], Rewards(torch.full((8,), math.nan), {}, [record(None)] * 8))
    assert metrics["accuracy"] == 0.5 and math.isnan(metrics["reward"]) and metrics["unscored_captions"] == 16


def test_ranks_count_by_the_questions_that_they_could_score(policy, batch, monkeypatch):
    """1 of 1 right here, 0 of 8 there: 1 of 9, as one rank would have it."""
    other = {"accuracy": (0.0, 8)}
    monkeypatch.setattr("reward.step.gather_rows", lambda mine: [*mine, dict.fromkeys(mine[0], (0.0, 0)) | other])
    metrics = reward_metrics(batch[0], Rewards(torch.ones(8), {}, [record(True)] + [record(None)] * 7))
    assert metrics["accuracy"] == pytest.approx(1 / 9) and metrics["failed_share"] == pytest.approx(7 / 8)


def test_ranks_count_by_the_claims_they_have(policy, batch, monkeypatch):
    """One of 1 claim failed here, none of 99 there: 1 of 100. A rank without claims counts nothing."""
    other = {"failed_claims": (0.0, 99)}
    monkeypatch.setattr("reward.step.gather_rows", lambda mine: [*mine, dict.fromkeys(mine[0], (0.0, 0)) | other])
    result = Rewards(torch.zeros(8), {}, [record(True)] * 8, claims=[[claim_record("a", math.nan)], *[[]] * 7])
    assert reward_metrics(batch[0], result)["failed_claims"] == pytest.approx(0.01)
    assert reward_metrics(batch[0], replace(result, claims=[[]] * 8))["failed_claims"] == 0


def test_too_many_failures_stop_the_run(policy, batch, monkeypatch):
    records = [record(None), record(None), *[record(True)] * 6]
    result = Rewards(torch.zeros(8), {}, records)
    assert measure_step(batch[0], result, toy_config(max_failed_share=0.25))["failed_share"] == 0.25
    monkeypatch.setattr("reward.step.gather_rows",  # another rank's reason
                        lambda rows: [*rows, "not finite"] if rows == ["too long"] else rows)
    with pytest.raises(ValueError, match=r"25% of the step's questions could not be scored \(not finite; too long\)"):
        measure_step(batch[0], result, toy_config(max_failed_share=0.24))


@pytest.mark.parametrize("abstain", [False, True])
def test_only_the_abstain_option_needs_a_letter_beside_ten_choices(abstain):
    example = Example("a", Path("a.png"), (Question("What?", tuple("0123456789"), 1),))
    config = toy_config(abstain=abstain, prompts_per_step=1)
    with pytest.raises(ValueError, match="at most 9 choices") if abstain else nullcontext():
        check_examples([example], config)


def test_a_truncated_caption_is_scored_and_counted(policy, batch):
    rollouts = replace(batch[0], truncated=torch.tensor([True, False] * 4))
    metrics = reward_metrics(rollouts, Rewards(torch.ones(8), {}, []))
    assert metrics["truncated_share"] == 0.5 and metrics["reward"] == 1 and metrics["unscored_captions"] == 0
