"""A tiny question writer: the shipped policy taught to write questions on toy images in the layout
of data/curate/.

    python -m data.toy.writer runs/writer --steps 1500
    python -m data.curate generate --images IMAGES --model runs/writer --num-questions 2 \\
        --max-new-tokens 160 --out runs/written

It is no part of the shipped files: `generate` can be tried on it end to end. What it asks about is
in the world's grammar; how often its answers are right is printed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from data.choices import LETTERS
from data.curate.generate import WRITING_INSTRUCTION
from data.examples import Question
from data.program import run_program
from data.ranges import check_range
from data.toy.captioner import load_taught, teach_
from data.toy.fit import check_no_model
from data.toy.world import Scene, draw, make_scene, scene_questions
from data.written import parse_questions
from grpo.export import export_policy
from grpo.policy import Policy
from grpo.rollout import sample_rollouts


@dataclass(frozen=True)
class WriterConfig:
    """Settings of the writer's training."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder for the model. It is refused if a model is there."""
    policy: str = "data/toy/policy"
    """The model that the training starts from. It has learnt to see."""
    steps: int = 1500
    batch: int = 16
    num_questions: int = 2
    """Questions in each text, and asked for in the instruction."""
    num_images: int = 60
    """Held-out images for the printed numbers."""
    seed: int = 0

    def __post_init__(self):
        check_range(self, "steps batch num_images", at_least=1)
        check_range(self, "num_questions", at_least=1, at_most=6)  # an image has six or more


def write_blocks(questions: Sequence[Question]) -> str:
    """The layout that `parse_questions` reads."""
    blocks = []
    for number, question in enumerate(questions, start=1):
        options = [f"{letter}) {text}" for letter, text in zip(LETTERS, question.choices)]
        lines = [f"#### {number}. **{question.question}**",
                 *(f"   - {option}" for option in options), "",
                 f"**Answer:** {options[question.answer_index]}", "------"]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def lesson(scene: Scene, num: int, rng: random.Random) -> str:
    asked = [question for question in scene_questions(scene) if question.needs_image]
    return write_blocks(rng.sample(asked, num))


def train_writer(config: WriterConfig) -> Policy:
    policy = load_taught(config.policy)

    def write(step: int, scene: Scene, rng: random.Random) -> str:
        return lesson(scene, config.num_questions, rng)

    teach_(policy, "writer", write, config.steps, config.seed, config.batch,
           instruction=WRITING_INSTRUCTION.format(num=config.num_questions))
    return policy


def measure(policy: Policy, config: WriterConfig) -> dict[str, float]:
    """Counts of the texts on held-out images: sound questions per image, and blocks dropped. Also
    the share of the questions on a fact of the scene whose answer is right."""
    scenes = [make_scene("heldout", index) for index in range(config.num_images)]
    prompts = [policy.prompt(draw(scene), WRITING_INSTRUCTION.format(num=config.num_questions))
               for scene in scenes]
    texts = sample_rollouts(policy, prompts, [f"writer:{scene.id}" for scene in scenes],
                            80 * config.num_questions).captions
    right, num_sound, num_dropped = [], 0, 0
    for scene, text in zip(scenes, texts):
        truth = {question.question: question.choices[question.answer_index]
                 for question in scene_questions(scene)}
        blocks = parse_questions(text)
        sound = [block for block in blocks if isinstance(block, Question)]
        num_sound, num_dropped = num_sound + len(sound), num_dropped + len(blocks) - len(sound)
        right += [question.choices[question.answer_index] == truth[question.question]
                  for question in sound if question.question in truth]
    return {"sound questions per image": num_sound / len(scenes), "blocks dropped": num_dropped,
            "questions on a fact of the scene": len(right),
            "of these answered rightly": sum(right) / max(len(right), 1)}


def main(config: WriterConfig) -> None:
    check_no_model(config.folder)
    policy = train_writer(config)
    export_policy(policy, config.folder, torch.float32)
    print("\n".join(f"{value:8.3f} {name}" for name, value in measure(policy, config).items()))


if __name__ == "__main__":
    run_program(lambda arguments: main(tyro.cli(WriterConfig, args=arguments)))
