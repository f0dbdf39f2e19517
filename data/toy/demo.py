"""The demo: evaluate the shipped captioner, train it by CapRL, evaluate it again on the same held-out images.

    python -m data.toy.demo --seed 0
"""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from evaluate import PrismConfig, run
from grpo.config import run_program, toy_config
from grpo.scores import summarize
from train import train


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; everything else is `train.py toy`."""

    seed: int = 0
    num_images: int = 120
    """Held-out images, 4 captions each."""
    num_steps: int = toy_config().num_steps
    run_dir: Path = Path("runs/demo")
    """Emptied first if a demo is in it."""


def demo(config: DemoConfig) -> None:
    if (config.run_dir / "before.jsonl").exists():
        shutil.rmtree(config.run_dir)
    training = toy_config(seed=config.seed, num_steps=config.num_steps, run_dir=str(config.run_dir))
    evaluation = PrismConfig(
        data=(f"toy:heldout:{config.num_images}",), policy=(training.policy,), verifier=training.verifier, seed=config.seed,
        max_new_tokens=training.max_new_tokens, out=str(config.run_dir / "before.jsonl"), cache="",
    )
    print("1. The shipped captioner on held-out images")
    (before_rows,) = run(evaluation)[1].values()
    print(f"2. Training: {training.num_steps} steps of {training.prompts_per_step} images x {training.group_size} captions")
    final = train(training)
    print("3. The trained captioner on the same images")
    (after_rows,) = run(replace(evaluation, policy=(str(final),), out=str(config.run_dir / "after.jsonl")))[1].values()

    before, after = summarize(before_rows), summarize(after_rows)
    print("\nWhat a verifier that never sees the image answers rightly from the captions (held-out images):\n")
    print("| family | before | after | words before | words after |\n| --- | --- | --- | ---: | ---: |")
    for family, old in before.items():
        new = after[family]
        spans = [f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in (old, new)]
        print(f"| {family} | {spans[0]} | {spans[1]} | {old['words']:.1f} | {new['words']:.1f} |")
    print("\nThe first caption of three of the images:")
    for old, new in zip(before_rows[:12:4], after_rows[:12:4]):
        print(f"\n{old['id']}\n  before: {old['caption']}\n  after:  {new['caption']}")
    old, new = before["all"]["accuracy"], after["all"]["accuracy"]
    print(f"\nrun folder: {config.run_dir} (report.html, metrics.jsonl, rollouts/, final/, before.jsonl, after.jsonl)")
    print(f"demo: before {old:.3f} after {new:.3f} rise {new - old:.3f}")


if __name__ == "__main__":
    run_program(lambda arguments: demo(tyro.cli(DemoConfig, args=arguments)), sys.argv[1:])
