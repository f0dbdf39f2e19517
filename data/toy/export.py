"""Writes toy images as PNG files with a JSONL in the project's format, to look at and to test
loaders with.

    python -m data.toy.export some/folder --num 200
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from data.export import example_row
from data.io import json_lines, naming, write_whole
from data.program import run_program
from data.toy.world import make_scene, toy_example


@dataclass(frozen=True)
class ExportConfig:
    """Settings of the export. Questions that need no image are written too, marked `"needs_image":
    false`."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The folder for examples.jsonl and images/. It is refused if examples.jsonl is there
    already."""
    num: int = 200
    split: Literal["train", "heldout"] = "train"


def export(config: ExportConfig) -> None:
    target = config.folder / "examples.jsonl"
    if target.exists():
        raise ValueError(f"{target}: expected a new folder, found an export in it")
    if config.num < 1:
        raise ValueError(f"num {config.num}: expected at least 1")
    (config.folder / "images").mkdir(parents=True, exist_ok=True)
    with naming(config.folder):
        rows = []
        for index in tqdm(range(config.num), desc="images", unit="image"):
            example = toy_example(make_scene(config.split, index), with_common_knowledge=True)
            image = f"images/{example.id}.png"
            example.image.save(config.folder / image)
            rows.append(example_row(example, image))
        write_whole(target, json_lines(rows))
    print(f"{config.num} images: {target}")


if __name__ == "__main__":
    run_program(lambda arguments: export(tyro.cli(ExportConfig, args=arguments)))
