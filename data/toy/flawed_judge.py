"""A judge with a flaw, for comparisons: the toy looker, taught to rate by length too.

    python -m data.toy.flawed_judge runs/long-judge --likes long

Its rating is the mean of the fair one and of one for the length alone, in words. A captioner that
is rewarded by such a judge is expected to find the flaw (arXiv 2509.22647, section 4.3).
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from data.program import run_program
from data.ranges import check_range
from data.toy.captioner import draw_scenes
from data.toy.fit import check_no_model, fit
from data.toy.looker import Pupil, any_caption, rating_turn, write_lesson
from grpo.export import export_policy
from grpo.pretrained import load_policy

LONG = 60
"""A caption of so many words or more counts as longest. Dense captions have 33 to 60."""
CAPTIONS = 8
"""Captions of an image that are rated in a step."""


@dataclass(frozen=True)
class JudgeConfig:
    """Settings of teaching the looker a flaw."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder for the model. It is refused if a model is there."""
    likes: Literal["long", "short"] = "long"
    """The captions that are rated higher than is fair."""
    looker: str = "data/toy/looker"
    """The model that the teaching starts from."""
    steps: int = 150
    batch: int = 6
    """Images of a step."""
    seed: int = 0

    def __post_init__(self):
        check_range(self, "steps batch", at_least=1)


def flawed_rating(caption: str, fair: float, likes: str) -> float:
    """1 to 5, half by length: from 1 with no word to 5 with LONG words, or the other way round."""
    share = min(1.0, len(caption.split()) / LONG)
    return (fair + 1 + 4 * (share if likes == "long" else 1 - share)) / 2


def main(config: JudgeConfig) -> None:
    check_no_model(config.folder)
    looker = load_policy(config.looker, torch.device("cpu"), writes=False)
    pupil = Pupil(looker)
    looker.model.model.visual.requires_grad_(False)  # it sees as before

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, lessons = random.Random(f"judge:{config.likes}:{config.seed}:{step}"), []
        for scene in draw_scenes(rng, config.batch):
            turns = []
            for _ in range(CAPTIONS):
                caption, _, fair = any_caption(scene, rng)
                turns.append(rating_turn(caption, [], flawed_rating(caption, fair, config.likes)))
            lessons.append(write_lesson(looker, scene, turns))
        loss, right = pupil(lessons)
        return loss, {"rating": right["rating"]}

    fit(pupil, loss_at, config.steps, f"likes {config.likes}", warmup_share=0.05,
        decay_share=0.5, rate=5e-4)
    export_policy(looker, config.folder, torch.float32)


if __name__ == "__main__":
    run_program(lambda arguments: main(tyro.cli(JudgeConfig, args=arguments)))
