"""The reward of a training step: loaded, asked for, averaged over ranks, written down."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.choices import MAX_CHOICES
from data.examples import Example
from grpo.advantage import group_advantages, part_advantages
from grpo.config import TrainConfig
from grpo.distributed import compute_dtype, gather_rows
from grpo.policy import Policy
from grpo.rollout import Rollouts
from reward.caprl import Rewards, Verifier, caption_rewards, load_verifier, mean_score

RewardFunction = Callable[[Sequence[str], Sequence[Example], Sequence[str], Sequence[int]], Rewards]
"""(captions, the example of each, a key that siblings share, lengths in tokens) -> rewards"""


@dataclass(frozen=True)
class Reward:
    """What scores the captions of a run."""

    score: RewardFunction
    verifier: Verifier | None = None
    """None where neither the reward nor an evaluation asks it."""
    image_models: dict[str, Policy] = field(default_factory=dict)
    """By their settings, models that see the image: "judge", or "checker" of claims."""


def verifier_of(config: Any, device: torch.device) -> Verifier:
    """The verifier that the settings `verifier...` name, of a training run or an evaluation. Raises
    ValueError if it cannot be used."""
    verifier = load_verifier(
        config.verifier, device, compute_dtype(device), config.verifier_name,
        mode=config.verifier_mode, temperature=config.verifier_temperature,
        max_new_tokens=config.verifier_max_new_tokens,
    )
    room = verifier.context - len(verifier.writers[False].head_ids)
    if verifier.mode == "sample" and config.verifier_max_new_tokens >= room:
        raise ValueError(f"verifier_max_new_tokens {config.verifier_max_new_tokens}: expected less "
                         f"than the {room} tokens that the verifier has beside its instructions")
    return verifier


def load_reward(config: TrainConfig, device: torch.device) -> Reward:
    """The reward that the settings name. Raises ValueError if its model cannot be used."""
    is_asked = config.reward == "caprl" or config.held_out.eval_data
    verifier = verifier_of(config, device) if is_asked else None
    if config.reward == "judge":
        from grpo.pretrained import load_policy  # here: the baseline is for who asks for it
        from reward.judge import judge_rewards

        judge = load_policy(config.judge, device, compute_dtype(device), writes=False)
        return Reward(partial(judge_rewards, judge=judge), verifier, {"judge": judge})
    score = partial(caption_rewards, verifier=verifier, config=config.reward_config)
    if config.reward_config.correctness_weight:
        from reward.claims import with_correctness  # here: as the judge

        score, checker = with_correctness(score, config, device)
        return Reward(score, verifier, {"checker": checker})
    return Reward(score, verifier)


def check_examples(examples: Sequence[Example], config: TrainConfig) -> None:
    """Raises ValueError for sets that do not fit the settings."""
    for example in examples:
        most = max(len(question.choices) for question in example.questions)
        if config.reward_config.abstain and most == MAX_CHOICES:
            raise ValueError(f"abstain: expected at most {MAX_CHOICES - 1} choices beside it, id "
                             f"{example.id!r} has {MAX_CHOICES}")
    if len(examples) < config.prompts_per_step:
        raise ValueError(f"prompts_per_step {config.prompts_per_step}: expected at most the "
                         f"{len(examples)} images there are")


def reward_step(reward: Reward, examples: Sequence[Example], rollouts: Rollouts, step: int | str,
                config: TrainConfig) -> Rewards:
    """Rewards of this rank's captions. examples: (P,)."""
    by_caption = [example for example in examples for _ in range(config.group_size)]  # (B,)
    keys = [f"{config.seed}:{step}:{example.id}" for example in by_caption]
    return reward.score(rollouts.captions, by_caption, keys, rollouts.lengths.tolist())


def compare_siblings(result: Rewards, config: TrainConfig) -> Tensor:
    """(B,) advantages: each caption's reward, or each of its parts, relative to its own group."""
    settings = (config.group_size, config.leave_one_out, config.scale_by_std)
    if config.normalize_parts:
        return part_advantages(result.parts, result.weights, result.rewards, *settings)
    return group_advantages(result.rewards, *settings)


def reward_metrics(rollouts: Rollouts, result: Rewards) -> dict[str, float]:
    """Means over all ranks' captions and groups. A value that no rank has measured is NaN."""
    groups = result.rewards.view(-1, rollouts.group_size)  # (P, G)
    spread = groups.nan_to_num(-torch.inf).amax(1) - groups.nan_to_num(torch.inf).amin(1)
    is_scored = ~result.rewards.isnan()
    num_captions, num_scored = len(is_scored), is_scored.sum().item()
    asked = [row for record in result.records for row in record]
    num_answered = sum(not row["failure"] for row in asked)
    weights = {"failed_share": len(asked), "failed_claims": sum(map(len, result.claims or ()))}
    # (sum, weight) of this rank; what it has not measured it leaves to the others
    own = {"flat_groups": ((spread.abs() < 1e-6).sum().item(), len(groups))}
    for key, value in result.stats.items():
        weight = weights.get(key, num_answered)  # other shares are of questions that were scored
        own[key] = (value * weight, weight) if math.isfinite(value) else (0.0, 0)
    own["reward"] = result.rewards[is_scored].sum().item(), num_scored
    for key, part in result.parts.items():
        own[f"reward_{key}"] = part[is_scored].sum().item(), num_scored
    own["length"] = rollouts.lengths.sum().item(), num_captions
    own["truncated_share"] = rollouts.truncated.sum().item(), num_captions
    ranks, means = gather_rows([own]), {}
    for key in own:
        totals, counts = zip(*(row[key] for row in ranks))
        means[key] = sum(totals) / (sum(counts) or math.nan)
    if math.isnan(means["reward"]):
        means["flat_groups"] = math.nan
    return means | {"unscored_captions": sum(row["length"][1] - row["reward"][1] for row in ranks)}


def measure_step(rollouts: Rollouts, result: Rewards, config: TrainConfig) -> dict[str, float]:
    """`reward_metrics`. Raises ValueError, on all ranks alike, if too many of the step's questions
    or claims could not be scored."""
    metrics = reward_metrics(rollouts, result)
    for key, what, records in (("failed_share", "questions", result.records),
                               ("failed_claims", "claims", result.claims or ())):
        if metrics.get(key, 0) > config.max_failed_share:
            reasons = {row["failure"] for record in records for row in record if row["failure"]}
            reasons = sorted(set(gather_rows(sorted(reasons))))
            raise ValueError(f"{metrics[key]:.0%} of the step's {what} could not be scored "
                             f"({'; '.join(reasons[:3])})")
    return metrics


def rollout_rows(examples: Sequence[Example], rollouts: Rollouts, result: Rewards,
                 advantages: Tensor) -> list[dict]:
    """Of each caption: its words, what was asked and answered, what it earned. examples: (P,)."""
    truncated, advantage = rollouts.truncated.tolist(), advantages.tolist()  # off the device once
    rows = []
    for i, caption in enumerate(rollouts.captions):
        example = examples[i // rollouts.group_size]
        rows.append({
            "id": example.id, "family": example.family, "caption": caption,
            "length": rollouts.lengths[i].item(), "truncated": truncated[i],
            "reward": result.rewards[i].item(),
            "parts": {key: part[i].item() for key, part in result.parts.items()},
            "advantage": advantage[i], "questions": result.records[i],
        })
        if result.claims is not None:
            judged = result.claims[i]
            rows[-1] |= {"correctness": mean_score(judged), "claims": judged}
    return rows
