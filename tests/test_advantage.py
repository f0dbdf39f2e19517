import math

import pytest
import torch

from grpo.advantage import group_advantages


def test_hand_computed():
    # mean 1/2, four squares of 1/4; over n - 1 = 3 the variance is 1/3, the std 0.5774, and 0.5 / 0.5774 = 0.8660
    # (over n it would be 1/4, and every advantage 1)
    got = group_advantages(torch.tensor([1.0, 0, 0, 1]), 4, eps=0.0)
    assert got.tolist() == pytest.approx([0.8660, -0.8660, -0.8660, 0.8660], abs=5e-5)
    # eps is added to the std: 0.5 / (0.5774 + 0.1)
    assert group_advantages(torch.tensor([1.0, 0, 0, 1]), 4, eps=0.1)[0].item() == pytest.approx(
        0.5 / 0.67735, abs=1e-5
    )
    # two rewards: the variance is 2 * 0.25 ** 2 / 1, the std 0.35355, and 0.25 / 0.35355 = 0.7071
    assert group_advantages(torch.tensor([0.5, 1.0]), 2, eps=0.0).tolist() == pytest.approx([-0.7071, 0.7071], abs=5e-5)


def test_the_standard_deviation_counts_the_measured_rewards_alone():
    # of 1, 0, 0 (the fourth was not measured): mean 1/3, squares 4/9 + 1/9 + 1/9 over 2 are 1/3, std 0.5774
    got = group_advantages(torch.tensor([1.0, 0, math.nan, 0]), 4, eps=0.0)
    assert got.tolist() == pytest.approx([1.1547, -0.5774, 0, -0.5774], abs=5e-5)
    # leave-one-out is n / (n - 1) = 3/2 times that
    got = group_advantages(torch.tensor([1.0, 0, math.nan, 0]), 4, leave_one_out=True, eps=0.0)
    assert got.tolist() == pytest.approx([1.7321, -0.8660, 0, -0.8660], abs=5e-5)
    # n - 1 is 0 where one was measured: nothing to compare it with
    assert group_advantages(torch.tensor([math.nan, 0.7, math.nan, math.nan]), 4, eps=0.0).tolist() == [0, 0, 0, 0]


def test_leave_one_out_compares_with_the_others():
    # others' means: (0 + 0 + 1) / 3, (1 + 0 + 1) / 3, ...
    got = group_advantages(torch.tensor([1.0, 0, 0, 1]), 4, leave_one_out=True, scale_by_std=False)
    assert got.tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    # of two that were measured, each is compared with the other one
    got = group_advantages(torch.tensor([1.0, math.nan, 0]), 3, leave_one_out=True, scale_by_std=False)
    assert got.tolist() == [1, 0, -1]


def test_without_std_scaling():
    got = group_advantages(torch.tensor([0.0, 0.5, 1.0, 0.5]), 4, scale_by_std=False)
    assert got.tolist() == pytest.approx([-0.5, 0, 0.5, 0])


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale_by_std", [False, True])
def test_against_plain_loops(leave_one_out, scale_by_std):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, generator=generator)
    rewards[torch.tensor([3, 9, 10])] = math.nan
    want = []
    for start in range(0, 24, 6):
        group = rewards[start : start + 6].tolist()
        known = [r for r in group if not math.isnan(r)]
        mean = sum(known) / len(known)
        std = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1))
        for i, r in enumerate(group):
            if math.isnan(r):
                want.append(0.0)
                continue
            others = [x for j, x in enumerate(group) if j != i and not math.isnan(x)]
            centered = r - sum(others) / len(others) if leave_one_out else r - mean
            want.append(centered / (std + 1e-4) if scale_by_std else centered)
    got = group_advantages(rewards, 6, leave_one_out, scale_by_std)
    assert got.tolist() == pytest.approx(want, abs=1e-5)


def test_equal_rewards_give_exact_zeros_despite_float_noise():
    rewards = torch.tensor([0.3] * 8)
    rewards[3] += 3e-8
    rewards[5] -= 3e-8
    assert group_advantages(rewards, 8).tolist() == [0.0] * 8
    for value in (12.3, 100.1, -1000.1):  # rewards of a fork, whose noise is larger
        rewards = torch.full((7,), value)
        assert group_advantages(rewards, 7).tolist() == [0.0] * 7
        rewards[0] = math.nan
        assert group_advantages(rewards, 7).tolist() == [0.0] * 7


def test_an_unmeasured_reward_is_not_a_zero():
    got = group_advantages(torch.tensor([1.0, math.nan, 1.0, 1.0]), 4)
    assert got.tolist() == [0, 0, 0, 0]  # counted as 0 it would make the others look good
    got = group_advantages(torch.tensor([math.nan] * 4), 4)
    assert got.tolist() == [0, 0, 0, 0]
    got = group_advantages(torch.tensor([0.7, math.nan, math.nan, math.nan]), 4, leave_one_out=True)
    assert got.tolist() == [0, 0, 0, 0]


def test_groups_do_not_mix():
    rewards = torch.tensor([0.0, 1, 5, 6])
    order = torch.tensor([2, 3, 0, 1])  # whole groups change places
    assert group_advantages(rewards[order], 2).tolist() == group_advantages(rewards, 2)[order].tolist()
    assert group_advantages(rewards, 2).tolist() == pytest.approx([-0.7071, 0.7071, -0.7071, 0.7071], abs=1e-3)


def test_inputs_are_unchanged_and_bad_sizes_refused():
    rewards = torch.tensor([0.0, math.nan])
    group_advantages(rewards, 2)
    assert rewards[0] == 0 and rewards[1].isnan()
    with pytest.raises(ValueError, match="7 rewards do not divide into groups of 2"):
        group_advantages(torch.zeros(7), 2)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.zeros(7), 1)
