"""The demo: evaluate the shipped captioner, train it by CapRL, evaluate it again on the same
held-out images.

    python -m data.toy.demo --seed 0
"""

import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from data.program import run_program
from evaluate import PrismConfig, run
from grpo.recipes import toy_config
from tools.report.page import write_page
from tools.stats import markdown, summarize
from train import train

WINDOW, SHOWN = "--window-size=1280,1000", "#image=heldout-000002"
"""Of the picture: its size in pixels, and the place of the page."""


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; everything else is `train.py toy`."""

    seed: int = 0
    num_images: int = 120
    """Held-out images, 4 captions each."""
    num_steps: int = toy_config().num_steps
    run_dir: Path = Path("runs/demo")
    """Emptied first if a whole demo is in it. One that was stopped goes on where its training
    stopped."""


def demo(config: DemoConfig) -> None:
    before, after = config.run_dir / "before.jsonl", config.run_dir / "after.jsonl"
    if before.exists() and after.exists():
        shutil.rmtree(config.run_dir)
    before.unlink(missing_ok=True)
    training = toy_config(seed=config.seed, num_steps=config.num_steps, run_dir=str(config.run_dir),
                          resume=(config.run_dir / "config.json").exists())
    evaluation = PrismConfig(
        data=(f"toy:heldout:{config.num_images}",), policy=(training.policy,),
        verifier=training.verifier, seed=config.seed,
        max_new_tokens=training.max_new_tokens, out=str(before), cache="",
    )
    print("1. The shipped captioner on held-out images")
    (before_rows,) = run(evaluation)[1].values()
    print(f"2. Training: {training.num_steps} steps of {training.prompts_per_step} images x "
          f"{training.group_size} captions")
    final = train(training)
    print("3. The trained captioner on the same images")
    (after_rows,) = run(replace(evaluation, policy=(str(final),), out=str(after)))[1].values()

    tables = summarize(before_rows), summarize(after_rows)
    print("\nWhat a verifier that never sees the image answers rightly from the captions (held-out "
          "images):\n")
    lines = []
    for family in tables[0]:
        rows = [table[family] for table in tables]
        lines.append([family, *(f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                                for row in rows), *(f"{row['words']:.1f}" for row in rows)])
    print(markdown("family | before | after | words before: | words after:", lines))
    print("\nThe first caption of three of the images:")
    for old, new in zip(before_rows[:12:4], after_rows[:12:4]):
        print(f"\n{old['id']}\n  before: {old['caption']}\n  after:  {new['caption']}")
    old, new = (table["all"]["accuracy"] for table in tables)
    page = write_page(before, after, out=config.run_dir / "before_after.html")
    print(f"\nrun folder: {config.run_dir} (metrics.jsonl, rollouts/, final/, before.jsonl, "
          "after.jsonl)")
    print(f"the training, step by step: {config.run_dir / 'report.html'}")
    print(f"before and after, caption by caption: {page}{take_picture(page)}")
    print(f"demo: before {old:.3f} after {new:.3f} rise {new - old:.3f}")


def take_picture(page: Path) -> str:
    """A picture of the page beside it, for README, and its name; nothing where no Chromium is."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    picture = page.with_suffix(".png")
    if not browser:
        return ""
    # In a frame: Chromium's pictures of a page that has scrolled are blank above.
    frame = page.with_suffix(".frame.html")
    frame.write_text(f'<body style="margin:0"><iframe src="{page.name}{SHOWN}" '
                     'style="border:0; width:100vw; height:100vh"></iframe>', encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars",
               "--virtual-time-budget=4000", WINDOW, f"--screenshot={picture}",
               frame.resolve().as_uri()]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=60)
    frame.unlink()
    return f" ({picture.name} shows it)" if picture.exists() else ""


if __name__ == "__main__":
    run_program(lambda arguments: demo(tyro.cli(DemoConfig, args=arguments)))
