"""Images worth writing questions on: each is measured, then all are decided on together."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.curate import likeness
from data.curate.encoders import Measure, load_classifier, load_encoder
from data.curate.work import Inputs, count_table, finish, work_through
from data.examples import Example
from data.folders import load_images
from data.images import open_image, picture_hash
from data.ranges import check_range
from grpo.distributed import all_or_none, init_distributed, rank


@dataclass(frozen=True)
class ImagesConfig:
    """Settings of `python -m data.curate images`. Without a source a threshold is ours."""

    images: str
    """A folder, a JSONL or a parquet file."""
    out: str
    """A folder for decisions.jsonl and the chosen images."""
    min_side: int = 64
    """Pixels of the shorter side."""
    min_entropy: float = 0.2
    """Bits per pixel of the gray values' histogram. A blank page has 0, one of text under 1, a
    photograph 7."""
    min_edges: float = 0.002
    """Share of pixels with an edge."""
    max_hash_distance: int = 32
    """Two pictures are near duplicates if at most this many of 255 bits differ. Unrelated ones
    differ in about 128."""
    benchmarks: tuple[str, ...] = ()
    """Folders, JSONL or parquet files whose images must not be trained on."""
    encoder: str = ""
    """A vision encoder (CLIP, SigLIP, DINOv2, ViT) for duplicates in meaning, as SemDeDup (arXiv
    2303.09540) finds them."""
    max_similarity: float = 0.95
    """If the cosine of two embeddings is over this, one of the images goes."""
    clusters: int = 0
    """Clusters of embeddings; only embeddings of one cluster are compared. 0 for one per 1,000
    images."""
    classifier: str = ""
    """An image classifier for what is not wanted."""
    unsafe_label: str = "nsfw"
    """The classifier's label for it."""
    max_unsafe: float = 0.5
    """An image goes if the label's probability is over this."""
    batch_size: int = 32
    retry_failed: bool = False
    """Try again what could not be opened or measured in an earlier run."""
    seed: int = 0

    def __post_init__(self):
        check_range(self, "batch_size", at_least=1)
        check_range(self, "min_side clusters", at_least=0)
        check_range(self, "min_entropy", at_least=0, at_most=8)
        check_range(self, "min_edges max_unsafe", at_least=0, at_most=1)
        check_range(self, "max_hash_distance", at_least=0, at_most=255)
        check_range(self, "max_similarity", at_least=-1, at_most=1)


def choose_images(config: ImagesConfig) -> None:
    """Measures every image, then decides on all together; decisions.jsonl has each decision with
    what it rests on."""
    device, folder = init_distributed(), Path(config.out)
    with all_or_none("start"):
        images = load_images(Path(config.images))
        benchmarks = [(f"{source} {id}", image) for source in config.benchmarks
                      for id, image in load_images(Path(source))]
        extra: dict[str, Measure] = {}
        if config.encoder:
            extra["embedding"] = load_encoder(config.encoder, device)
        if config.classifier:
            extra["unsafe"] = load_classifier(config.classifier, config.unsafe_label, device)
    work = partial(measure_batch, extra=extra)
    settings = {key: getattr(config, key)
                for key in ("images", "encoder", "classifier", "unsafe_label")}
    form = FORM | {name: EXTRA_FORM[name] for name in extra}
    rows = work_through(images, folder, settings, config.retry_failed, config.batch_size, work,
                        {"failed": {"reason": str}, "measured": form})
    lines, examples, decisions = [], [], []
    if rank() == 0:
        bar = tqdm(benchmarks, desc="benchmarks", unit="image", disable=not benchmarks)
        known = [(name, likeness.perceptual_hash(open_image(image))) for name, image in bar]
        decisions = decide(rows, known, config)
        sources = dict(images)
        examples = [Example(row["id"], sources[row["id"]], ()) for row in decisions
                    if row["fate"] == "kept"]
        lines = count_table("images", Counter(row["fate"] for row in decisions))
    finish(folder, rows, examples, lines, decisions)


def read_hash(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint64).reshape(4)


def read_embedding(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float16).astype(np.float32)


FORM = {"width": int, "height": int, "digest": str, "hash": read_hash, "entropy": (int, float),
        "edges": (int, float)}
EXTRA_FORM = {"embedding": read_embedding, "unsafe": (int, float)}
"""What is expected in rows/, see `data.jsonl.fits`."""


def measure_batch(batch: Inputs, extra: dict[str, Measure]) -> list[dict]:
    rows, measured, opened = [], [], []
    for id, source in batch:
        try:
            image = open_image(source)
        except ValueError as error:
            rows.append({"id": id, "fate": "failed", "reason": str(error)})
            continue
        entropy, edges = likeness.detail(image)
        rows.append({
            "id": id, "fate": "measured", "width": image.width, "height": image.height,
            "picture": picture_hash(source), "digest": picture_hash(image),
            "hash": likeness.perceptual_hash(image).tobytes().hex(),
            "entropy": round(entropy, 4), "edges": round(edges, 5),
        })
        measured.append(rows[-1])
        opened.append(image)
    for name, measure in extra.items() if opened else ():
        for row, value in zip(measured, measure(opened), strict=True):
            failed = {"fate": "failed", "reason": f"{name}: not finite"}
            row |= failed if value is None else {name: value}
    return rows


def decide(rows: Sequence[dict], benchmark: Sequence[tuple[str, np.ndarray]],
           config: ImagesConfig) -> list[dict]:
    """The rows with their fate: "kept", or the first reason against, with `of`, the picture it is
    too close to. Of pictures alike the largest stays, then the first."""
    decisions = [{key: row[key] for key in row if key != "embedding"} for row in rows]
    measured = [row for row in decisions if row["fate"] != "failed"]
    for row in measured:
        reasons = {
            "low resolution": min(row["width"], row["height"]) < config.min_side,
            "too simple": row["entropy"] < config.min_entropy or row["edges"] < config.min_edges,
            "unsafe": row.get("unsafe", 0.0) > config.max_unsafe,
        }
        row["fate"] = next((reason for reason, holds in reasons.items() if holds), "kept")
    hashes = {row["id"]: read_hash(row["hash"]) for row in measured}
    if benchmark:
        names, known = zip(*benchmark)
        known = np.stack(known, axis=1)
        for row in _kept(decisions):
            distances = likeness.hash_distances(known, hashes[row["id"]])
            row["benchmark_distance"] = int(distances.min())
            if row["benchmark_distance"] <= config.max_hash_distance:
                row |= {"fate": "in a benchmark", "of": names[int(distances.argmin())]}
    by_size = sorted(_kept(decisions), key=lambda row: -row["width"] * row["height"])
    if by_size:
        near = likeness.near_duplicates(np.stack([hashes[row["id"]] for row in by_size]),
                                        config.max_hash_distance)
        for row, (other, distance) in zip(by_size, near, strict=True):
            row["hash_distance"] = distance
            if distance is not None and distance <= config.max_hash_distance:
                is_exact = row["digest"] == by_size[other]["digest"]
                fate = "exact duplicate" if is_exact else "near duplicate"
                row |= {"fate": fate, "of": by_size[other]["id"]}
    chosen = _kept(decisions)
    if config.encoder and chosen:
        stored = {row["id"]: row["embedding"] for row in rows if row["fate"] == "measured"}
        vectors = np.stack([read_embedding(stored[row["id"]]) for row in chosen])
        near = likeness.semantic_duplicates(vectors, config.max_similarity, config.clusters,
                                            config.seed)
        for row, (other, cosine) in zip(chosen, near, strict=True):
            row["similarity"] = cosine
            if cosine is not None and cosine > config.max_similarity:
                row |= {"fate": "similar", "of": chosen[other]["id"]}
    return decisions


def _kept(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row["fate"] == "kept"]
