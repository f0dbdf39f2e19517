"""What the correctness of captions costs beside their accuracy: seconds of each for the captions
of a step.

    python bench/claims.py                   # sizes of bench/step.py, 4 claims per caption
    python bench/claims.py --claims 16 --sizes 448
    python bench/claims.py --shared          # siblings claim the same: each claim is judged once

Weights are random. Both models have the same size, and read the same captions: 128 tokens in so
many sentences. They take turns; the least time of each is printed, of the process's own CPU clock.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

from bench.step import StepConfig, make_examples, save_models
from grpo.config import RewardConfig
from reward.caprl import caption_rewards, load_verifier
from reward.claims import judge_claims, load_checker
from tools.stats import markdown


@dataclass(frozen=True)
class ClaimsCost(StepConfig):
    """Sizes of the measurement."""

    claims: int = 4
    """Claims of a caption."""
    shared: bool = False
    """All captions of an image make the same claims."""


COLORS = ("red", "blue", "green", "pink", "black", "orange", "purple", "yellow")


def make_captions(config: ClaimsCost) -> list[str]:
    """One token for each that was sampled, cut into `claims` sentences, of each sibling others."""
    captions = []
    for place in range(config.group_size):
        number = 0 if config.shared else place
        words = [COLORS[(number + n * (number + 1)) % len(COLORS)] for n in range(config.tokens)]
        size = max(1, config.tokens // config.claims - 5)
        captions.append(" ".join(
            f"The {COLORS[n % 8]} bar {n} is {' '.join(words[n * size : (n + 1) * size])}."
            for n in range(config.claims)
        ))
    return captions * config.prompts


def main(config: ClaimsCost) -> None:
    torch.set_num_threads(1)
    device, examples = torch.device("cpu"), make_examples(config)
    by_caption = [example for example in examples for _ in range(config.group_size)]
    captions, keys = make_captions(config), [example.id for example in by_caption]
    images, asking = [e.image for e in by_caption], RewardConfig(num_questions=config.questions)
    with tempfile.TemporaryDirectory() as folder:
        save_models(replace(config, verifier_hidden=config.hidden, verifier_layers=config.layers),
                    Path(folder))
        verifiers = {f"accuracy, {mode}": load_verifier(f"{folder}/verifier", device, mode=mode)
                     for mode in ("sample", "logits")}
        checkers = {f"correctness, {mode}": load_checker(f"{folder}/policy", mode, device)
                    for mode in ("yes", "likelihood")}
    seconds: dict[str, list[float]] = {}
    for _ in range(config.repeats):
        for name, model in (verifiers | checkers).items():
            started = time.process_time()
            if name in verifiers:
                caption_rewards(captions, by_caption, keys, [0] * len(captions), model, asking)
            else:
                judge_claims(captions, images, keys, model)
            seconds.setdefault(name, []).append(time.process_time() - started)
    print(f"{len(captions)} captions of {config.tokens} tokens, {config.claims} claims and "
          f"{config.questions} questions each; images of {config.sizes} pixels\n")
    print(markdown("part | seconds:", [[name, f"{min(spent):.3f}"]
                                       for name, spent in seconds.items()]))


if __name__ == "__main__":
    main(tyro.cli(ClaimsCost))
