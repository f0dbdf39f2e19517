"""Evaluation files as they are published, read into pictures with questions.

    load_benchmark("chartqa:ChartQA/data/test-*.parquet")
    load_benchmark("heldout.jsonl"), load_benchmark("toy:heldout:96")
    load_benchmark("0.02:caprl-qa.jsonl")

The first is KIND:PATH, with a file, a pattern or a folder of parquet files. The others are the
project's own questions; the last is the share of them that `train.py --eval-data 0.02` holds out.
The kind says what is asked and how it is scored. The path and the file's columns never do.
docs/formats.md tells where each file comes from. A row that cannot be asked or scored is refused
with its reason, and counted. It is no zero, and no free point.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.benchmarks.files import file_rows
from data.benchmarks.questions import KINDS, PUBLISHED_JUDGES, Item, Metric, row_items
from data.examples import Example, ImageSource, load_examples
from data.images import picture_hash
from data.io import text_hash
from data.pictures import merge_pictures


@dataclass(frozen=True)
class Picture:
    """An image and all that is asked about it. Its id is that of its first question, or of the
    file's row of images."""

    id: str
    image: ImageSource
    items: tuple[Item, ...]
    other_ids: tuple[str, ...] = ()
    """Ids of later rows with the same picture. Their questions are among these."""


@dataclass(frozen=True)
class Benchmark:
    name: str
    kind: str
    metric: Metric
    pictures: list[Picture]
    refused: list[str]
    """A sentence on each row, or question of a row, that was left out."""

    @property
    def contents(self) -> str:
        """The hash of ids and questions."""
        asked = [(picture.id, picture.items) for picture in self.pictures]
        return f"{len(asked)} images, {text_hash(repr(asked))}"


def load_benchmark(source: str) -> Benchmark:
    """Raises ValueError naming file, row, expected and found if there is nothing to ask, or if the
    file cannot be read."""
    kind, colon, path = source.partition(":")
    if colon and is_share(kind):
        return example_benchmark(source, held_out(merge_pictures(load_examples(path)), kind))
    if not (colon and kind in KINDS):
        if colon and kind != "toy" and not Path(source).exists():
            raise ValueError(f"{source}: expected a JSONL file, toy:SPLIT:NUM, SHARE:PATH or "
                             f"KIND:PATH with KIND one of {', '.join(KINDS)}")
        examples = merge_pictures(load_examples(source))
        return example_benchmark(source if kind == "toy" else Path(source).stem, examples)
    refused: list[str] = []
    # By the picture's bytes, for its rows share its captions: the image, ids of rows, items.
    by_hash: dict[str, tuple[ImageSource, list[str], list[Item]]] = {}
    seen: set[str] = set()
    for row in file_rows(Path(path)):
        if isinstance(row, str):
            refused.append(row)
            continue
        try:
            if row.id in seen:
                raise ValueError(f"id {row.id!r} was used before")
            items, reasons = row_items(row, kind)
            digest, image = row.picture()
        except OSError as error:
            refused.append(f"{row.where}: expected a picture that can be read ({error})")
            continue
        except ValueError as error:
            refused.append(f"{row.where}: {error}")
            continue
        seen.add(row.id)
        refused += [f"{row.where}, {reason}" for reason in reasons]
        if items:
            _, ids, together = by_hash.setdefault(digest, (image, [], []))
            ids.append(row.id)
            together.extend(items)
    if not by_hash:
        reason = refused[0] if refused else "no rows"
        raise ValueError(f"{path}: expected questions of kind {kind}, found none ({reason})")
    pictures = [
        Picture(ids[0], image, tuple(items), tuple(ids[1:]))
        for image, ids, items in by_hash.values()
    ]
    return Benchmark(kind, kind, KINDS[kind], pictures, refused)


def load_benchmarks(sources: Sequence[str], limit: int = 0) -> list[Benchmark]:
    """The benchmarks, each with its first `limit` pictures, 0 for all. If two have the same name,
    all are named by their sources."""
    benchmarks = []
    for source in sources:
        benchmark = load_benchmark(source)
        benchmarks.append(replace(benchmark, pictures=benchmark.pictures[: limit or None]))
    if len({benchmark.name for benchmark in benchmarks}) < len(benchmarks):
        return [replace(benchmark, name=source) for benchmark, source in zip(benchmarks, sources)]
    return benchmarks


def judge_of(sources: Sequence[str]) -> str:
    """The text-only model that answers the sources' questions where none is named: the published
    one, if all are of kinds with the same, else the paper's."""
    judges = {PUBLISHED_JUDGES.get(source.partition(":")[0]) for source in sources}
    return (judges.pop() if len(judges) == 1 else None) or "Qwen/Qwen2.5-3B-Instruct"


def is_share(text: str) -> bool:
    """Whether it is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def held_out(examples: Sequence[Example], share: str) -> list[Example]:
    """About this share of the examples: those whose pictures have the lowest hashes, in that order.

    Whether one is chosen depends on its picture alone, not on rows or seeds, and a larger share has
    all of a smaller one. Raises ValueError for a share that is not between 0 and 1, or has none.
    """
    if not 0 < float(share) < 1:
        raise ValueError(f"{share}: expected a share of the images between 0 and 1")
    hashes = [picture_hash(example.image)
              for example in tqdm(examples, "comparing", unit="picture", delay=2)]
    chosen = [(digest, place) for place, digest in enumerate(hashes)
              if int(digest[:16], 16) < float(share) * 2**64]
    if not chosen:
        raise ValueError(f"{share}: expected a share with at least one of the {len(examples)} "
                         "images, found none")
    return [examples[place] for _, place in sorted(chosen)]


def example_benchmark(name: str, examples: Sequence[Example]) -> Benchmark:
    """The project's own examples, all their questions asked."""
    pictures = []
    for example in examples:
        items = tuple(
            Item(f"{example.id}:{n}", question, example.family)
            for n, question in enumerate(example.questions)
        )
        pictures.append(Picture(example.id, example.image, items, example.other_ids))
    return Benchmark(name, "choice", "choice", pictures, [])
