"""Groups that teach nothing are replaced: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2),
for who asks for it with --resample-flat."""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.examples import Example
from data.images import open_image
from grpo.config import TrainConfig
from grpo.distributed import all_or_none, gather_rows
from grpo.rollout import Rollouts
from grpo.run import Run, sample_step
from reward.caprl import Rewards
from reward.step import Reward, compare_siblings, reward_step


def resample_flat(run: Run, reward: Reward, examples: Sequence[Example],
                  batch: Sequence[Example], mine: Sequence[Example], rollouts: Rollouts,
                  result: Rewards, step: int, config: TrainConfig) -> tuple[
                      list[Example], list[Example], Rollouts, Rewards, dict[str, int]]:
    """Images whose captions all have the advantage 0 are replaced by others, at most
    `config.resample_flat` times. What is still flat then stays, and so does an image for which the
    data has no other. Returns what it was given, changed, and for the log how many were replaced.
    Every rank must call this.

    batch: (P,) images of all ranks. mine: this rank's, of which `rollouts` and `result` are. A new
    image takes the place and the rank of the old. No image comes twice in a step. Which ones come
    is a function of the seed and the step, so a resumed run draws them again.
    """
    tried = {example.id for example in batch}
    others = [example for example in examples if example.id not in tried]
    random.Random(f"{config.seed}:{step}:resample").shuffle(others)
    num_replaced = 0
    for _ in range(config.resample_flat):
        flat = gather_rows(flat_ids(mine, result, config))
        replaced = [example.id for example in batch if example.id in flat]
        new = dict(zip(replaced, others))
        if not new:
            break
        others, num_replaced = others[len(new) :], num_replaced + len(new)
        places = [place for place, example in enumerate(mine) if example.id in new]
        batch = [new.get(example.id, example) for example in batch]
        mine = [new.get(example.id, example) for example in mine]
        with all_or_none("resample"):
            if places:
                fresh = [mine[place] for place in places]
                drawn = draw_groups(run, reward, fresh, step, config)
                rollouts, result = put_groups(rollouts, result, *drawn, places)
    return batch, mine, rollouts, result, {"resampled": num_replaced}


def draw_groups(run: Run, reward: Reward, examples: Sequence[Example], step: int,
                config: TrainConfig) -> tuple[Rollouts, Rewards]:
    """G captions of each image, and what they earn. No rank waits for another in it."""
    prompts = [run.sampler.prompt(open_image(example.image)) for example in examples]
    rollouts = sample_step(run, examples, prompts, step, config)
    return rollouts, reward_step(reward, examples, rollouts, step, config)


def flat_ids(mine: Sequence[Example], result: Rewards, config: TrainConfig) -> list[str]:
    """The images whose captions all have the advantage 0. Where none has a reward, the verifier has
    failed: such an image stays, and counts for `max_failed_share`."""
    shape = -1, config.group_size
    is_kept = compare_siblings(result, config).view(shape).any(1)  # (P,)
    is_kept |= result.rewards.isnan().view(shape).all(1)
    return [example.id for example, kept in zip(mine, is_kept.tolist(), strict=True) if not kept]


def put_groups(rollouts: Rollouts, result: Rewards, new_rollouts: Rollouts, new_result: Rewards,
               places: Sequence[int]) -> tuple[Rollouts, Rewards]:
    """The step's rollouts and rewards with new groups at `places`."""
    size = rollouts.group_size
    rows = [place * size + g for place in places for g in range(size)]
    width = max(rollouts.tokens.shape[1], new_rollouts.tokens.shape[1])

    def put(old: Tensor, new: Tensor) -> Tensor:
        """Rows of (B,), or of (B, L): what is beyond a caption's length is never read."""
        if old.dim() == 2:
            old, new = (F.pad(tensor, (0, width - tensor.shape[1])) for tensor in (old, new))
        return old.index_copy(0, torch.tensor(rows, device=old.device), new)

    def put_items(old: Sequence, new: Sequence, at: Sequence[int]) -> list:
        items = list(old)
        for place, item in zip(at, new, strict=True):
            items[place] = item
        return items

    merged = Rollouts(
        put_items(rollouts.prompts, new_rollouts.prompts, places),
        put(rollouts.tokens, new_rollouts.tokens), put(rollouts.lengths, new_rollouts.lengths),
        put(rollouts.logprobs, new_rollouts.logprobs),
        put(rollouts.truncated, new_rollouts.truncated),
        put_items(rollouts.captions, new_rollouts.captions, rows),
    )
    parts = {key: put(part, new_result.parts[key]) for key, part in result.parts.items()}
    rewards = put(result.rewards, new_result.rewards)
    records = put_items(result.records, new_result.records, rows)
    claims = result.claims and put_items(result.claims, new_result.claims, rows)
    return merged, Rewards(rewards, parts, records, result.weights, claims)
