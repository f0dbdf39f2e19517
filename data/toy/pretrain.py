"""What captions are worth as training data: a tiny vision-language model is pretrained on them from
random weights, then tuned on questions (arXiv 2509.22647, Tables 1 and 2).

    python caption.py --images IMAGES --out runs/captions
    python -m data.toy.pretrain runs/pretrained --captions runs/captions
    python evaluate.py direct --policy runs/pretrained --data chartqa:QUESTIONS.jsonl

All sets of captions get the same weights to begin with, the same numbers of steps, and the same
questions in the same order. The sentences of a caption stand in a new order each time. Otherwise
the model counts sentences: it learns which value comes next, but not of what it is the value, and
questions find nothing. It answers in words, without options to choose from: so small a model does
not learn to compare options in these steps. docs/paper.md has both measured. QUESTIONS.jsonl has a
line with id, image, question and answer for each question; bench/paper.py writes one.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from data.captions.exports import finished_rows
from data.program import run_program
from data.ranges import check_range
from data.toy.captioner import Demonstration, build_policy, imitate_
from data.toy.facts import scene_of
from data.toy.fit import check_no_model
from data.toy.tokenizer import build_tokenizer
from data.toy.world import Scene, draw, make_scene, scene_questions, write_caption
from grpo.export import export_policy
from grpo.policy import CAPTION_INSTRUCTION, Policy
from reward.caprl import Asked
from reward.style import sentences
from tools.prism import look_text


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of pretraining on captions."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder for the model. It is refused if a model is there."""
    captions: str = ""
    """A folder that caption.py has written, of images of the toy world; "" takes all facts of each
    image."""
    images: int = 1440
    """The first so many images; the steps stay the same."""
    steps: int = 1000
    """On captions."""
    batch: int = 24
    """Images of a step."""
    tune_steps: int = 400
    """On questions."""
    tune_images: int = 240
    """Training images whose questions are asked then."""
    seed: int = 0

    def __post_init__(self):
        check_range(self, "images steps batch tune_steps tune_images", at_least=1)


def captioned(config: PretrainConfig) -> list[tuple[Scene, str]]:
    """Scenes with their captions. Raises ValueError if there are too few, or one is not of an image
    for training."""
    if not config.captions:
        scenes = [make_scene("train", index) for index in range(config.images)]
        return [(scene, write_caption(scene.family, scene.facts)) for scene in scenes]
    pairs = []
    for where, row in finished_rows(Path(config.captions)):
        if not row["id"].startswith("train-"):
            raise ValueError(f"{where}: expected the id of a toy image for training, such as "
                             f"train-000012, got {row['id']!r}")
        if "caption" in row:
            pairs.append((scene_of(row["id"]), row["caption"]))
    if len(pairs) < config.images:
        raise ValueError(f"{config.captions}: expected captions of {config.images} images, found "
                         f"{len(pairs)}")
    return pairs[: config.images]


def reordered(caption: str, rng: random.Random) -> str:
    parts = sentences(caption)
    return " ".join(rng.sample(parts, len(parts)))


def show_answer(policy: Policy, scene: Scene, rng: random.Random) -> Demonstration:
    """One of the questions that need the image, as `evaluate.py direct` asks for an answer in
    words."""
    question = rng.choice([question for question in scene_questions(scene) if question.needs_image])
    asked = Asked(question.question, (), gold=-1, source=0)
    return (policy.prompt(draw(scene), *look_text(asked)),
            f" {question.choices[question.answer_index]}")


def main(config: PretrainConfig) -> None:
    check_no_model(config.folder)
    pairs = captioned(config)
    policy = build_policy(build_tokenizer(), config.seed)

    def captions(step: int, rng: random.Random) -> list[Demonstration]:
        return [(policy.prompt(draw(scene), CAPTION_INSTRUCTION), reordered(text, rng))
                for scene, text in rng.choices(pairs, k=config.batch)]

    def questions(step: int, rng: random.Random) -> list[Demonstration]:
        scenes = [make_scene("train", rng.randrange(config.tune_images))
                  for _ in range(config.batch)]
        return [show_answer(policy, scene, rng) for scene in scenes]

    imitate_(policy, "captions", captions, config.steps, config.seed)
    imitate_(policy, "questions", questions, config.tune_steps, config.seed, rate=1e-3)
    export_policy(policy, config.folder, torch.float32)


if __name__ == "__main__":
    run_program(lambda arguments: main(tyro.cli(PretrainConfig, args=arguments)))
