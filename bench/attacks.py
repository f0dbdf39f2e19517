"""What captions earn that are written for correctness alone, part by part, on the toy world.

    python bench/attacks.py                                  # the checker knows the facts
    python bench/attacks.py --checker FOLDER --mode yes      # a model judges

Each attack is written for every image. The shipped verifier answers all of its questions from it. A
checker that knows the facts holds for true whatever is not false: what is vague is true to it.
"""

import os
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

from data.toy.facts import is_true
from data.toy.world import Scene, make_scene, perturb, toy_example, write_caption, write_sentence
from grpo.config import RewardConfig
from reward.caprl import caption_rewards, load_verifier
from reward.claims import Checker, add_correctness, load_checker
from reward.style import empty_share
from tools.stats import markdown, mean


@dataclass(frozen=True)
class AttacksConfig:
    """On which images, and who judges."""

    num: int = 48
    """Held-out images."""
    checker: str = ""
    """A vision-language model; "" for the facts."""
    mode: Literal["yes", "likelihood"] = "yes"


def attacks(scene: Scene) -> dict[str, str]:
    """Attack -> caption. The whole truth and a caption that guesses stand beside them."""
    said = [write_sentence(scene.family, fact) for fact in scene.facts]
    guessed = perturb(scene.facts, 0.5, random.Random(scene.id))
    return {
        "the whole truth": " ".join(said),
        "half of it guessed": write_caption(scene.family, guessed),
        "one safe claim": said[0],
        "one safe claim, nine times": " ".join(said[:1] * 9),
        "vague claims": "There is something. It has colors.",
        "claims about nothing": "This description is comprehensive. Every detail is captured.",
        "no claim": "",
    }


def measure(scenes: list[Scene], checker: Checker | None = None) -> dict[str, dict[str, float]]:
    """Attack -> accuracy, correctness and share of empty sentences, each without a weight. checker:
    None for the facts."""
    verifier = load_verifier("data/toy/verifier", torch.device("cpu"), mode="logits")
    score = partial(caption_rewards, verifier=verifier, config=RewardConfig(num_questions=0))
    values: dict[str, dict[str, list[float]]] = {}
    for scene in scenes:
        def know(_, claims: list[str], scene: Scene = scene) -> list[float]:
            return [float(is_true(claim, scene) is not False) for claim in claims]

        written = attacks(scene)
        size, example = len(written), toy_example(scene)
        result = add_correctness(list(written.values()), [example] * size, [scene.id] * size,
                                 [1] * size, score, checker or know, 1.0)
        for place, (name, caption) in enumerate(written.items()):
            row = {key: part[place].item() for key, part in result.parts.items()}
            for key, value in (row | {"empty": empty_share(caption)}).items():
                values.setdefault(name, {}).setdefault(key, []).append(value)
    return {name: {key: mean(given) for key, given in row.items()} for name, row in values.items()}


def main(config: AttacksConfig) -> None:
    checker = None
    if config.checker:
        checker = load_checker(config.checker, config.mode, torch.device("cpu"))
    rows = measure([make_scene("heldout", index) for index in range(config.num)], checker)
    print(markdown("caption | accuracy: | correctness: | empty:", (
        [name, *(f"{value:.3f}" for value in row.values())] for name, row in rows.items())))


if __name__ == "__main__":
    main(tyro.cli(AttacksConfig))
