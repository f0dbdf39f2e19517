"""Captions of a folder or a JSONL file of images, one JSON line per image.

    python caption.py --policy data/toy/policy --images some/folder --out captions.jsonl
    torchrun --nproc-per-node 8 caption.py --policy runs/caprl-3b/final --images images.jsonl --out captions.jsonl
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from data.examples import load_images
from data.images import list_images, open_image
from grpo.config import run_program
from grpo.distributed import gather_rows, init_distributed, print0, rank, world_size
from grpo.policy import INSTRUCTION, Policy, load_policy
from grpo.report import to_json
from grpo.rollout import sample_rollouts


@dataclass(frozen=True)
class CaptionConfig:
    """Settings of caption.py."""

    images: str
    """A folder, searched with its subfolders, or a JSONL file whose rows have `image` and may have `id`."""
    out: str
    """The JSONL file to write: id, image, caption, length in tokens, whether it was cut off."""
    policy: str = "runs/caprl/final"
    """The captioner, a local folder or a hub name."""
    instruction: str = INSTRUCTION
    """What the captioner is told."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    max_new_tokens: int = 4096
    """Longest caption in tokens."""
    batch_size: int = 16
    """Images captioned at a time; any value gives the same captions."""
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens and batch_size: expected at least 1 each")
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: expected 0 or more")


def caption(config: CaptionConfig) -> None:
    """Captions every image, batch by batch. Raises ValueError for one that cannot be read."""
    device = init_distributed()
    out, source = Path(config.out), Path(config.images)
    if out.exists():
        raise ValueError(f"{out}: expected a new file, found one")
    if source.is_dir():
        images = [(path.relative_to(source).as_posix(), path) for path in list_images(source)]
    else:
        images = load_images(source)
    policy = load_policy(config.policy, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    out.parent.mkdir(parents=True, exist_ok=True)
    stride = config.batch_size * world_size()
    for start in tqdm(range(0, len(images), stride), desc="captions", unit="batch", disable=rank() != 0):
        mine = images[start : start + stride][rank() * config.batch_size : (rank() + 1) * config.batch_size]
        rows = gather_rows(caption_batch(policy, mine, config) if mine else [])
        if rank() == 0:  # written as it goes: a run that is stopped keeps what it has
            with out.open("a", encoding="utf-8") as file:
                file.writelines(to_json(row) + "\n" for row in rows)
    print0(f"{len(images)} captions: {out}")


def caption_batch(policy: Policy, images: Sequence[tuple[str, Path]], config: CaptionConfig) -> list[dict]:
    prompts = [policy.prompt(open_image(path), config.instruction) for _, path in images]
    keys = [f"{config.seed}:{id}:caption:0" for id, _ in images]
    rollouts = sample_rollouts(policy, prompts, keys, config.max_new_tokens, config.temperature)
    return [
        {"id": id, "image": str(path), "caption": text, "length": length, "truncated": truncated}
        for (id, path), text, length, truncated in zip(
            images, rollouts.captions, rollouts.lengths.tolist(), rollouts.truncated.tolist()
        )
    ]


def main(arguments: list[str]) -> None:
    caption(tyro.cli(CaptionConfig, args=arguments))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
