"""Groups that teach nothing are replaced by others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import all_ranks, keys, shallow
from test_reward_step import record

from data.examples import Example, Question
from data.jsonl import read_log
from grpo.recipes import toy_config
from grpo.rollout import sample_rollouts
from reward import resample
from reward.caprl import Rewards
from train import train

EXAMPLES = [Example(str(i), Path(f"{i}.png"), (Question("What?", ("x", "y"), 1),)) for i in range(8)]


def rewards_of(values: list[float]) -> Rewards:
    rewards = torch.tensor(values)
    return Rewards(rewards, {"accuracy": rewards.clone()}, [record(value == 1) for value in values])


def test_new_groups_take_the_places_of_the_old(policy, prompts, batch):
    """By hand, on four groups of two: groups 2 and 0 are replaced, by longer captions."""
    old, result = batch[0], rewards_of([0.0, 0, 0, 1, 1, 1, 0, 1])
    new = sample_rollouts(policy, [prompts[3], prompts[1]], keys(9, 2)[-4:], 14)
    merged, rewards = resample.put_groups(old, result, new, rewards_of([1.0, 0, 0, 0]), [2, 0])
    assert rewards.rewards.tolist() == [0, 0, 0, 1, 1, 0, 0, 1] == rewards.parts["accuracy"].tolist()
    assert rewards.stats["accuracy"] == 3 / 8
    for place, source, group in ((0, new, 1), (1, old, 1), (2, new, 0), (3, old, 3)):
        got, want = merged.groups(place, place + 1), source.groups(group, group + 1)
        assert got.prompts[0] is want.prompts[0] and got.captions == want.captions
        assert torch.equal(got.lengths, want.lengths) and torch.equal(got.truncated, want.truncated)
        for name in ("tokens", "logprobs"):
            assert torch.equal(getattr(got, name)[got.completion_mask], getattr(want, name)[want.completion_mask])
    claims, new_claims = ([[{"failure": "", "claim": text}] for text in texts] for texts in ("abcdefgh", "ijkl"))
    _, judged = resample.put_groups(old, replace(result, claims=claims), new,
                                    replace(rewards_of([1.0, 0, 0, 0]), claims=new_claims), [2, 0])
    assert "".join(record[0]["claim"] for record in judged.claims) == "klcdijgh" and rewards.claims is None
    assert old.captions[0] != merged.captions[0] and merged.tokens.shape == (8, max(old.tokens.shape[1], new.tokens.shape[1]))


@pytest.mark.parametrize("rounds, teaching, want_asked", [
    (1, set("01234567"), [3]),  # all that come instead teach: nothing is asked again
    (3, set(), [3, 1]),  # nothing teaches: four images are left for three places, then one, then none
    (0, set(), []),
])
def test_images_are_replaced_until_they_teach_or_none_is_left(policy, batch, monkeypatch, rounds, teaching, want_asked):
    asked = []
    config = toy_config(group_size=2, resample_flat=rounds)

    def draw_groups(run, reward, examples, step, config):
        asked.append([example.id for example in examples])
        values = [value for example in examples for value in (0.0, float(example.id in teaching))]
        return batch[0].groups(0, len(examples)), rewards_of(values)

    monkeypatch.setattr(resample, "draw_groups", draw_groups)
    images, result = EXAMPLES[:4], rewards_of([0.0, 0, 0, 1, 1, 1, 0, 0])
    again = []
    for _ in range(2):
        asked.clear()
        got, mine, _, rewards, log = resample.resample_flat(
            None, None, EXAMPLES, images, images, batch[0], result, 5, config)
        assert [len(ids) for ids in asked] == want_asked and log == {"resampled": sum(want_asked)}
        assert mine == got and got[1] == images[1] and len({example.id for example in got}) == 4
        tried = [id for ids in asked for id in ids]
        assert len(set(tried)) == len(tried) and not set(tried) & set("0123")
        again.append([example.id for example in got])
    assert again[0] == again[1]
    if teaching:
        assert resample.flat_ids(got, rewards, config) == []


def test_a_group_that_the_verifier_failed_on_is_not_replaced():
    """It was, and what failed left the step's failed_share. By hand: flat, failed, one reward of two, teaches."""
    result = rewards_of([1.0, 1, torch.nan, torch.nan, torch.nan, 1, 0, 1])
    assert resample.flat_ids(EXAMPLES[:4], result, toy_config(group_size=2)) == ["0", "2"]
    apart = toy_config(group_size=2, normalize_parts=True)
    assert resample.flat_ids(EXAMPLES[:4], result, apart) == ["0", "2"]


SETTINGS = dict(data="toy:train:10", num_steps=3, prompts_per_step=4, group_size=3, num_questions=2, probe_images=2,
                resample_flat=2, max_new_tokens=48)


def test_a_run_records_the_images_it_used_and_two_ranks_use_the_same(tmp_path):
    models = {name: shallow(f"data/toy/{name}", tmp_path / name) for name in ("policy", "verifier")}
    for ranks in (1, 2):
        all_ranks(tmp_path, ranks, train, toy_config(run_dir=str(tmp_path / str(ranks)), **SETTINGS, **models))
    one, two = (read_log(tmp_path / ranks / "metrics.jsonl") for ranks in "12")
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=5e-3)
    assert sum(row["resampled"] for row in one) > 0
    assert all("seconds_resample" in row for row in read_log(tmp_path / "1/timing.jsonl"))
    rows = [read_log(tmp_path / ranks / "rollouts/step_000000.jsonl") for ranks in "12"]
    assert [(row["id"], row["caption"]) for row in rows[0]] == [(row["id"], row["caption"]) for row in rows[1]]
    assert len({row["id"] for row in rows[0]}) == 4


def test_data_that_teaches_nothing_ends_in_a_sentence(tmp_path, monkeypatch):
    original = resample.reward_step

    def flat(*args):
        result = original(*args)
        return Rewards(torch.ones_like(result.rewards), {}, result.records)

    monkeypatch.setattr("train.reward_step", flat)
    monkeypatch.setattr(resample, "reward_step", flat)
    with pytest.raises(ValueError, match="2 steps in a row without a group whose captions differ in reward; the last"):
        train(toy_config(run_dir=str(tmp_path / "run"), max_skipped=2, **SETTINGS))
    assert [row["resampled"] for row in read_log(tmp_path / "run/metrics.jsonl")] == [6, 6]  # of 10 images 4 are asked first
