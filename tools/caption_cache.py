"""Captions of a benchmark's pictures: written by a captioner and kept in a cache, or read.

The cache has a folder for each captioner with its settings. In it is a file for each batch of
captions. A caption is known there by the hash of its picture and by its place k among K.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.benchmarks.benchmark import Benchmark, Picture
from data.captions.exports import caption_rows, checked_row
from data.examples import ImageSource
from data.images import image_name, open_image, picture_hash
from data.io import check_text, json_lines, naming, short, text_hash, write_whole
from data.jsonl import read_log
from data.ranges import check_range
from grpo.captioning import Captioning, caption_batches
from grpo.distributed import (
    all_or_none,
    check_alike,
    compute_dtype,
    gather_rows,
    rank,
    world_size,
)
from grpo.policy import Policy
from grpo.pretrained import check_models, load_policy, model_hash

CaptionRow = dict
"""`caption`, `tokens` and `finish_reason`, or the `error` that kept the image from being opened."""


@dataclass(frozen=True)
class CaptionsConfig(Captioning):
    """Whose captions an evaluation takes, and how they are written."""

    policy: tuple[str, ...] = ()
    """Captioners, local folders or hub names; NAME=PATH gives one a name in the tables. An
    adapter on another base than its adapter_config.json names is ADAPTER+BASE."""
    captions: tuple[str, ...] = ()
    """Captions that are written already: a folder of caption.py, or JSONL with `id` and `caption`,
    one or more per image."""
    num_captions: int = 4
    """K, captions per image; at temperature 0 there is one."""
    batch_size: int = 64
    """Images captioned at a time; any value gives the same captions."""
    max_words: tuple[int, ...] = ()
    """Budgets: also score each caption cut, after a sentence, to at most so many words."""
    cache: str = "runs/cache"
    """Captions are kept here by model, image, instruction and settings, and never written twice;
    empty for nowhere."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "num_captions", at_least=1)
        if len(set(self.max_words)) < len(self.max_words) or min(self.max_words, default=1) < 1:
            expected = "expected different numbers of words, each at least 1"
            raise ValueError(f"max_words {self.max_words}: {expected}")
        names = [name for name, _ in self.captioners]
        if len(names) > len(set(names)):
            raise ValueError(f"expected captioners of different names (NAME=PATH), got {names}")

    @property
    def captioners(self) -> list[tuple[str, str]]:
        """(name, path), policies first."""
        captioners = []
        for text in (*self.policy, *self.captions):
            name, _, path = text.partition("=")
            has_name = "=" in text and not Path(text).exists()
            captioners.append((name, path) if has_name else (text, text))
        return captioners


def all_captions(config: CaptionsConfig, benchmarks: Sequence[Benchmark], seed: int,
                 device: torch.device) -> dict[tuple[str, str], list[list[CaptionRow]]]:
    """(benchmark, captioner) -> captions of each picture; one captioner is loaded at a time.
    Raises ValueError, on all ranks, if one of them has other questions, models or captions."""
    captions = {}
    asked = [benchmark.contents for benchmark in benchmarks]
    check_alike({"captioners": len(config.captioners), "benchmarks": asked})
    for number, (name, path) in enumerate(config.captioners):
        is_policy = number < len(config.policy)
        with all_or_none("captions"):
            policy = load_policy(path, device, compute_dtype(device)) if is_policy else None
        if policy:
            check_models(f"captioner {number + 1}", policy)
        for benchmark in benchmarks:
            captions[benchmark.name, name] = (
                write_captions(policy, benchmark.pictures, config, seed) if policy
                else read_captions(path, benchmark.pictures)
            )
            read = text_hash(repr(captions[benchmark.name, name]))
            check_alike({f"captions of captioner {number + 1}": read})
        del policy  # before the next captioner is loaded
    return captions


def write_captions(policy: Policy, pictures: Sequence[Picture], config: CaptionsConfig,
                   seed: int) -> list[list[CaptionRow]]:
    """K captions of each picture, or a single row with an `error`. What the cache has is not
    written again.

    Each rank writes the captions of its share of the pictures, and returns those of all.
    """
    share = pictures[rank() :: world_size()]
    num = config.num_captions if config.temperature else 1
    settings = f"{config.instruction}\n{config.temperature} {config.max_new_tokens} {seed}"
    with all_or_none("captions"):
        keys = [_cache_key(picture.image) for picture in share]
        folder = None
        if config.cache:
            folder = Path(config.cache) / f"{model_hash(policy)}-{text_hash(settings)}"
        known = _read_cache(folder) if folder else {}
        missing = {
            key: picture.image for key, picture in zip(keys, share)
            if any((key, k) not in known for k in range(num))
        }
        if missing and folder:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "about.txt", settings.encode())
        images = ((key, partial(open_image, image)) for key, image in missing.items())
        batches = caption_batches(policy, images, config, seed, num)
        waiting, is_quiet = iter(missing), rank() != 0 or not missing
        with tqdm(total=len(missing), desc="captions", unit="image", leave=None,
                  disable=is_quiet) as bar:
            for batch in batches if missing else ():
                new = {
                    (key, k): row for rows, key in zip(batch, waiting) for k, row in enumerate(rows)
                }
                known |= new
                if folder:
                    _write_cache(folder, new)
                bar.update(len(batch))
    written = []
    for picture, key in zip(share, keys):
        rows = [known[key, k] for k in range(num) if (key, k) in known]
        written.append((picture.id, rows))
    by_id = dict(gather_rows(written))
    return [by_id[picture.id] for picture in pictures]


def _cache_key(image: ImageSource) -> str:
    """16 digits of the picture's hash; of its name, if it cannot be read."""
    try:
        return picture_hash(image)[:16]
    except (OSError, ValueError):
        return text_hash(image_name(image))


def _read_cache(folder: Path) -> dict[tuple[str, int], CaptionRow]:
    """(key of the picture, k) -> caption. Raises ValueError for a row that is none."""
    known = {}
    for path in folder.glob("*.jsonl"):
        for number, row in enumerate(read_log(path), start=1):
            where = f"{path} row {number}"
            check_text(where, json.dumps(row, ensure_ascii=False))
            row = checked_row(where, row, "image")
            if type(row.get("k")) is not int:
                raise ValueError(f"{where}: expected a number k, got {short(row)}")
            known[row.pop("image"), row.pop("k")] = row
    return known


def _write_cache(folder: Path, captions: dict[tuple[str, int], CaptionRow]) -> None:
    """Each batch is a file of its own. Nobody else writes to it, and it is whole or not there.
    Errors are left out."""
    rows = [
        {"image": key, "k": k} | row for (key, k), row in captions.items() if "error" not in row
    ]
    with naming(folder):
        write_whole(folder / f"{uuid.uuid4().hex}.jsonl", json_lines(rows))


def read_captions(path: str, pictures: Sequence[Picture]) -> list[list[CaptionRow]]:
    """Captions of each picture by the ids of all its rows, from a folder of caption.py or a JSONL
    file. Every rank reads all. Raises ValueError for a broken line, an id that two images share, or
    a picture without any."""
    with all_or_none("captions"):
        by_id = _captions_by_id(path)
        captions = []
        for picture in pictures:
            ids = (picture.id, *picture.other_ids)
            captions.append([row for id in ids for row in by_id.get(id, [])])
        missing = [picture.id for picture, group in zip(pictures, captions) if not group]
        if missing:
            known = ", ".join(map(repr, list(by_id)[:3])) or "no image"
            raise ValueError(
                f"{path}: expected a caption of every image, found none of {len(missing)}, first "
                f"{missing[0]!r}; its captions are of {known}"
            )
    return captions


def _captions_by_id(path: str) -> dict[str, list[CaptionRow]]:
    by_id: dict[str, list[CaptionRow]] = {}
    images: dict[str, Any] = {}
    for where, row in caption_rows(Path(path)):
        image = images.setdefault(row["id"], row["image"]) if "image" in row else None
        if image != row.get("image"):
            raise ValueError(f"{where}: expected one image of id {row['id']!r}, found "
                             f"{short(image)} and {short(row['image'])}")
        kept = ("caption", "tokens", "finish_reason", "error")
        by_id.setdefault(row["id"], []).append({key: row[key] for key in kept if key in row})
    return by_id
