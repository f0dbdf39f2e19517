"""What drafts looked up in the siblings' captions would save: steps of the decoder, and what a step
would cost.

    python bench/drafts.py                                   # the toy policy
    python bench/drafts.py --policy runs/caprl-3b/final --images some/folder --max-new-tokens 1024

Captions of one image share phrases. A caption's last tokens may have occurred before, in itself or
in a sibling. What came after them there may come here too: it is a draft of K tokens that one
forward checks. Exact speculative sampling (arXiv 2211.17192, section 2.3) keeps a drafted token if
the policy draws it too. So the captions do not change. The steps that drafts would have saved are
counted on captions drawn without them.

Cost: a decoder's step with K + 1 times the rows, beside one with as many as there are. They take
turns; CPU clock, one thread. A decoder made for drafts would read each caption's cache once for its
K + 1 tokens. So the cost that is measured is a little too high.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from data.folders import load_images
from data.images import open_image
from data.toy.world import draw, make_scene
from grpo.decode import Decoder
from grpo.policy import Policy, Prompt
from grpo.pretrained import load_policy
from grpo.rollout import read_prompts, sample_rollouts


@dataclass(frozen=True)
class DraftConfig:
    """Sizes of the measurement."""

    policy: str = "data/toy/policy"
    images: str = ""
    """A folder; toy images if empty."""
    num_images: int = 24
    group_size: int = 8
    max_new_tokens: int = 96
    draft_tokens: tuple[int, ...] = (1, 2, 4, 8)
    """K, one row of the table each."""
    match: int = 2
    """Tokens that have to agree before a draft is made."""
    repeats: int = 5


def count_steps(captions: list[list[int]], num_draft_tokens: int, match: int) -> int:
    """Steps until all captions of a group are written. In each step a caption gets one token and
    what is accepted of its draft."""
    done, steps = [0] * len(captions), 0
    while any(at < len(caption) for at, caption in zip(done, captions)):
        # what came after `match` tokens: the longest, the latest of these
        after: dict[tuple[int, ...], list[int]] = {}
        for at, caption in zip(done, captions):
            for end in range(match, at):
                key = tuple(caption[end - match : end])
                draft = caption[end : min(end + num_draft_tokens, at)]
                if len(draft) >= len(after.get(key, ())):
                    after[key] = draft
        steps += 1
        for row, (at, caption) in enumerate(zip(done, captions)):
            if at < len(caption):
                accepted = 0
                for token in after.get(tuple(caption[max(0, at - match) : at]), []):
                    if at + accepted >= len(caption) or caption[at + accepted] != token:
                        break
                    accepted += 1
                done[row] = min(at + accepted + 1, len(caption))
    return steps


@torch.no_grad()
def step_seconds(policy: Policy, prompt: Prompt, rows: list[int], age: int,
                 repeats: int) -> list[float]:
    """Median CPU seconds of a decoder's step, for each number in `rows`. The decoder has one group
    of so many rows, `age` tokens after the prompt."""
    decoders = []
    for size in rows:
        decoder = Decoder(policy.model, size, max_new_tokens=age + 16 * repeats + 1)
        _, cache, mask = read_prompts(policy, [prompt])
        decoder.add(cache, mask)
        tokens = torch.full((size,), policy.pad_id)
        inputs = tokens, torch.full_like(tokens, prompt.next_position), torch.arange(size)
        for _ in range(age):
            decoder.step(*inputs)
        decoders.append((decoder, inputs))
    seconds: list[list[float]] = [[] for _ in rows]
    for _ in range(repeats):
        for of_decoder, (decoder, inputs) in zip(seconds, decoders):
            started = time.process_time()
            for _ in range(16):
                decoder.step(*inputs)
            of_decoder.append((time.process_time() - started) / 16)
    return list(map(statistics.median, seconds))


def main(config: DraftConfig) -> None:
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    policy = load_policy(config.policy, torch.device("cpu"))
    images = (draw(make_scene("heldout", index)) for index in range(config.num_images))
    if config.images:
        images = (open_image(image) for _, image in load_images(Path(config.images)))
    prompts = [policy.prompt(image) for image in islice(images, config.num_images)]
    groups = []
    for number, prompt in enumerate(tqdm(prompts, desc="captions", leave=False)):
        keys = [f"{number}:{row}" for row in range(config.group_size)]
        rollouts = sample_rollouts(policy, [prompt], keys, config.max_new_tokens)
        rows = zip(rollouts.tokens.tolist(), rollouts.lengths.tolist())
        groups.append([row[:length] for row, length in rows])
    lengths = [len(caption) for group in groups for caption in group]
    print(f"{len(groups)} groups of {config.group_size} captions of "
          f"{statistics.mean(lengths):.1f} tokens, match {config.match}\n")
    plain = sum(max(map(len, group)) for group in groups)
    rows = [config.group_size * (1 + drafts) for drafts in (0, *config.draft_tokens)]
    base, *costs = step_seconds(policy, prompts[0], rows, round(statistics.mean(lengths)) // 2,
                                config.repeats)
    print("| draft tokens | steps | fewer | a step's cost | gain |\n"
          "| ---: | ---: | ---: | ---: | ---: |")
    print(f"| 0 | {plain} | 1.00 | 1.00 | 1.00 |")
    for drafts, cost in zip(config.draft_tokens, costs):
        steps = sum(count_steps(group, drafts, config.match) for group in groups)
        print(f"| {drafts} | {steps} | {plain / steps:.2f} | {cost / base:.2f} | "
              f"{plain / steps / (cost / base):.2f} |")


if __name__ == "__main__":
    main(tyro.cli(DraftConfig))
