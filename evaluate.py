"""How much a text-only model learns from captions: Prism evaluation (paper, section 4.3).

    python evaluate.py prism --policy data/toy/policy --verifier data/toy/verifier --data toy:heldout:96
    python evaluate.py prism --captions captions.jsonl --verifier Qwen/Qwen2.5-3B-Instruct --data qa.jsonl
    torchrun --nproc-per-node 8 evaluate.py prism --policy runs/caprl-3b/final --data qa.jsonl

A policy captions each image (or captions are read from a file), the verifier answers the image's questions from the
caption, and the share of right answers is printed per family with a bootstrap 95% interval over images.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from data.examples import Example, load_examples, read_jsonl
from data.images import open_image
from grpo.config import run_program
from grpo.distributed import gather_rows, init_distributed, print0, rank, world_size
from grpo.policy import Policy, load_policy
from grpo.report import to_json
from grpo.rollout import sample_rollouts
from reward.caprl import AskVerifier, RewardConfig, caption_rewards, load_verifier


@dataclass(frozen=True)
class PrismConfig:
    """Settings of `evaluate.py prism`."""

    data: str = "caprl-qa.jsonl"
    """JSONL of images with questions (format: data/examples.py), or toy:SPLIT:NUM."""
    policy: str = ""
    """The captioner, a local folder or a hub name; or else `captions`."""
    captions: str = ""
    """JSONL with `id` and `caption`, one or more captions per image, as caption.py writes it."""
    verifier: str = "Qwen/Qwen2.5-3B-Instruct"
    """The text-only model that answers from captions."""
    verifier_mode: Literal["sample", "logits"] = "logits"
    """Answer by the likeliest offered letter, or by a sampled and parsed reply (the release)."""
    verifier_temperature: float = 1.0
    """Of the replies in mode "sample", as in the release's evaluation."""
    num_captions: int = 4
    """Captions per image; the accuracy is the mean over them (the paper's Table 3 takes 4)."""
    temperature: float = 1.0
    """Of captioning; 0 takes the most likely token."""
    max_new_tokens: int = 4096
    """Longest caption in tokens."""
    num_questions: int = 0
    """Questions per caption, drawn as in training; 0 asks every question of the image once."""
    prompts_per_rollout: int = 16
    """Images captioned at a time."""
    seed: int = 0
    out: str = ""
    """A file for one JSON line per caption, with every question and answer."""

    def __post_init__(self):
        if bool(self.policy) == bool(self.captions):
            raise ValueError("expected either policy or captions, got " + ("both" if self.policy else "neither"))
        if self.num_captions < 1 or self.max_new_tokens < 1 or self.prompts_per_rollout < 1:
            raise ValueError("num_captions, max_new_tokens and prompts_per_rollout: expected at least 1 each")
        for name in ("temperature", "num_questions"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")
        if not self.verifier_temperature > 0:
            raise ValueError(f"verifier_temperature {self.verifier_temperature}: expected more than 0")


def write_captions(policy: Policy, examples: Sequence[Example], config: PrismConfig) -> list[list[dict]]:
    """`num_captions` captions of each image, each with its length in tokens and whether it was cut off."""
    captions: list[list[dict]] = []
    size = config.prompts_per_rollout
    for start in tqdm(range(0, len(examples), size), desc="captions", unit="batch", disable=rank() != 0):
        part = examples[start : start + size]
        prompts = [policy.prompt(open_image(example.image)) for example in part]
        keys = [f"{config.seed}:{example.id}:caption:{k}" for example in part for k in range(config.num_captions)]
        rollouts = sample_rollouts(policy, prompts, keys, config.max_new_tokens, config.temperature)
        rows = [
            {"caption": caption, "length": length, "truncated": truncated}
            for caption, length, truncated in zip(rollouts.captions, rollouts.lengths.tolist(), rollouts.truncated.tolist())
        ]
        captions += [rows[i : i + config.num_captions] for i in range(0, len(rows), config.num_captions)]
    return captions


def read_captions(path: str, examples: Sequence[Example]) -> list[list[dict]]:
    """Captions of each example from a JSONL file. Raises ValueError for a broken line or an image without a caption."""
    by_id: dict[str, list[dict]] = {}
    for number, row in read_jsonl(Path(path)):
        if not isinstance(row.get("caption"), str) or "id" not in row:
            raise ValueError(f"{path} line {number}: expected an object with id and caption, got {sorted(row)}")
        by_id.setdefault(str(row["id"]), []).append({"caption": row["caption"]})
    if missing := [example.id for example in examples if example.id not in by_id]:
        raise ValueError(f"{path}: expected a caption of every image, found none of {len(missing)}, first {missing[0]!r}")
    return [by_id[example.id] for example in examples]


def prism(examples: Sequence[Example], captions: list[list[dict]], verifier: AskVerifier, config: PrismConfig) -> list[dict]:
    """One row per caption: id, family, caption, accuracy (NaN if it could not be measured) and the questions as asked."""
    rows, settings = [], RewardConfig(num_questions=config.num_questions)
    for example, written in zip(tqdm(examples, desc="answers", unit="image", disable=rank() != 0), captions, strict=True):
        texts = [row["caption"] for row in written]
        lengths = [row.get("length", 0) for row in written]  # they enter no reward here
        result = caption_rewards(
            texts, [example] * len(texts), [f"{config.seed}:{example.id}"] * len(texts), lengths, verifier, settings
        )
        rows += [
            {"id": example.id, "family": example.family} | row | {"accuracy": accuracy, "questions": record}
            for row, accuracy, record in zip(written, result.rewards.tolist(), result.records)
        ]
    return rows


def summarize(rows: Sequence[dict], seed: int = 0, num_resamples: int = 2000) -> dict[str, dict[str, float]]:
    """Per family and over "all": accuracy with a bootstrap 95% interval, caption length in words, number of images.

    An image counts once, with the mean over its captions; images are resampled, questions and captions are not.
    """
    by_image: dict[str, list[dict]] = {}
    for row in rows:
        by_image.setdefault(row["id"], []).append(row)
    families = sorted({row["family"] for row in rows})
    table = {}
    for family in [*families, "all"] if families != ["all"] else ["all"]:
        images = [group for group in by_image.values() if family in ("all", group[0]["family"])]
        scores = [[row["accuracy"] for row in group if not math.isnan(row["accuracy"])] for group in images]
        means = np.array([np.mean(score) for score in scores if score] or [math.nan])
        rng = np.random.default_rng(seed)
        resampled = means[rng.integers(len(means), size=(num_resamples, len(means)))].mean(1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        words = np.mean([len(row["caption"].split()) for group in images for row in group])
        table[family] = {"accuracy": float(means.mean()), "low": float(low), "high": float(high), "words": float(words),
                         "images": len(means)}
    return table


def format_table(table: dict[str, dict[str, float]]) -> str:
    lines = ["| family | images | accuracy | 95% interval | words |", "| --- | ---: | ---: | --- | ---: |"]
    for family, row in table.items():
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(f"| {family} | {row['images']} | {row['accuracy']:.3f} | {interval} | {row['words']:.1f} |")
    return "\n".join(lines)


def run_prism(config: PrismConfig) -> list[dict]:
    """The whole evaluation; every rank returns all rows."""
    device = init_distributed()
    if config.out and Path(config.out).exists():
        raise ValueError(f"{config.out}: expected a new file, found one")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    examples = load_examples(config.data)[rank() :: world_size()]
    if config.policy:
        captions = write_captions(load_policy(config.policy, device, dtype), examples, config)
    else:
        captions = read_captions(config.captions, examples)
    verifier = load_verifier(config.verifier, device, dtype, mode=config.verifier_mode, temperature=config.verifier_temperature)
    rows = gather_rows(prism(examples, captions, verifier, config))
    if unscored := sum(math.isnan(row["accuracy"]) for row in rows):
        print0(f"{unscored} of {len(rows)} captions could not be scored and are left out")
    if rank() == 0 and config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def main(arguments: list[str]) -> None:
    config = tyro.extras.subcommand_cli_from_dict({"prism": PrismConfig}, args=arguments)
    print0(format_table(summarize(run_prism(config), config.seed)))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
