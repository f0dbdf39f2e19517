"""Rewards to advantages, relative to the group: the part of GRPO that replaces a value function."""

from collections.abc import Mapping

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, leave_one_out: bool = False,
                     scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """Each reward relative to its own group: (r - mean) / (std + eps), DeepSeekMath (arXiv
    2402.03300) section 4.1.2.

    rewards: (B,) float32, the G rollouts of a prompt adjacent. NaN marks a caption whose reward
    could not be measured: it is left out of the statistics and gets 0. Returns (B,) float32,
    unitless. A group gets exact zeros if its rewards are equal up to float noise, or if only one
    was measured. `std` divides by n - 1, n being the group's measured rewards. So it does in TRL
    and verl: published learning rates and KL weights mean the same here.

    leave_one_out: the baseline is the mean of the *other* rewards. Then r - mean becomes
    n / (n - 1) times the above (RLOO, arXiv 2402.14740). scale_by_std: False leaves out the
    division (Dr. GRPO, arXiv 2503.20783). Raises ValueError if B is not a multiple of `group_size`
    or `group_size` is below 2.
    """
    if group_size < 2:
        raise ValueError(f"group_size {group_size}: a group needs at least 2 rollouts to compare")
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size}")
    grouped = rewards.float().view(-1, group_size)  # (P, G)
    valid = ~grouped.isnan()
    count = valid.sum(1, keepdim=True)  # (P, 1)
    centered = torch.where(valid, grouped - grouped.nanmean(1, keepdim=True), 0.0)
    std = (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    if leave_one_out:
        centered = centered * count / (count - 1).clamp(min=1)
    advantages = centered / (std + eps) if scale_by_std else centered
    # Float noise divided by eps would look like a signal.
    largest = grouped.nan_to_num(0.0).abs().amax(1, keepdim=True).clamp(min=1)
    return torch.where(std < 1e-6 * largest, 0.0, advantages).flatten()


def part_advantages(parts: Mapping[str, Tensor], weights: Mapping[str, float], rewards: Tensor,
                    *settings) -> Tensor:
    """The sum over parts of weight * `group_advantages` of the part without its weight: GDPO (arXiv
    2601.05242), without its division by the deviation of the whole batch, one factor for all.

    parts: (B,) each, weights applied; their sum is the reward. A part without a name in `weights`
    has 1. rewards: (B,); where they are NaN, no part counts. settings: of `group_advantages`.
    """
    total = torch.zeros_like(rewards, dtype=torch.float32)
    for key, part in parts.items():
        weight = weights.get(key, 1.0)
        measured = torch.where(rewards.isnan(), torch.nan, part / weight)
        total += weight * group_advantages(measured, *settings)
    return total
