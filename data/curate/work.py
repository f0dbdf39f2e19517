"""Work on many inputs that may be stopped in any way and started again, by any number of ranks.

A line per input goes to OUT/rows/ when it is done, and what is in there is not done again. When
nothing is left, rank 0 writes OUT/examples.jsonl, with the images beside it, and OUT/report.md.
Nothing is deleted.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

from tqdm import tqdm

from data.examples import Example, ImageSource
from data.export import write_examples
from data.images import picture_hash
from data.io import agree_on, json_lines, write_whole
from data.jsonl import check_form, read_log
from grpo.distributed import all_or_none, gather_rows, print0, rank, world_size

Inputs = Sequence[tuple[str, Any]]
"""(id, input) of each."""

Forms = dict[str, dict[str, Any]]
"""Fate -> the keys of rows with it, each with the form of its value, see `data.jsonl.fits`."""


def work_through(inputs: Inputs, folder: Path, settings: dict, retry_failed: bool, batch_size: int,
                 work: Callable[[Inputs], list[dict]], forms: Forms) -> list[dict]:
    """A row for each input, in their order, on every rank; `work` is asked for those that have none
    yet.

    `work` takes a batch and returns a row with `id` and `fate` for each. A row with `picture`, the
    picture's hash, is made again where the picture is another one now. Raises ValueError for ids
    that are not unique, and where the rows in the folder are not as `forms` says, or were made with
    other settings.
    """
    counts = Counter(id for id, _ in inputs)
    repeated = [id for id, count in counts.items() if count > 1]
    if repeated:
        source = settings.get("images", folder)
        raise ValueError(f"{source}: expected ids that are unique, found {repeated[0]!r} more than "
                         "once")
    rows = folder / "rows"
    with all_or_none("images"):
        if rank() == 0:
            rows.mkdir(parents=True, exist_ok=True)
            agree_on(folder / "settings.json", settings, made=rows.glob("*.jsonl"))
            done = read_rows(rows, forms)
            looked = tqdm(inputs, desc="pictures done before", unit="image", disable=not done)
            replaced = {id for id, source in looked if id in done and is_replaced(done[id], source)}
            for path in rows.glob("*.jsonl"):
                take_out_unfinished(path, retry_failed, replaced)
    done = read_rows(rows, forms)
    gather_rows([])  # all have read before anyone writes
    mine = [pair for pair in inputs if pair[0] not in done][rank() :: world_size()]
    print0(f"{len(inputs)} images, {len(done)} done before")
    starts = range(0, len(mine), batch_size)
    with all_or_none("images"), (rows / f"rank-{rank():03d}.jsonl").open("ab") as file:
        for start in tqdm(starts, desc="images", unit="batch", disable=rank() != 0):
            file.writelines(json_lines(work(mine[start : start + batch_size])))
            file.flush()
    done = read_rows(rows, forms)
    return [done[id] for id, _ in inputs]


def take_out_unfinished(path: Path, retry_failed: bool, replaced: Collection[str]) -> None:
    """Takes out what is to be done again. That is a last line that was cut off, rows of pictures
    that have been replaced and, if asked for, rows that failed."""
    rows = [row for row in read_log(path) if not (retry_failed and row["fate"] == "failed")
            and row["id"] not in replaced]
    write_whole(path, json_lines(rows))


def is_replaced(row: dict, source: ImageSource | Example) -> bool:
    """Whether the picture is another one now. One that cannot be read, as of a drive that is away,
    is not: what was done on it stays."""
    image = source.image if isinstance(source, Example) else source
    with suppress(OSError, ValueError):
        return bool(row.get("picture")) and row["picture"] != picture_hash(image)
    return False


def read_rows(folder: Path, forms: Forms) -> dict[str, dict]:
    """By id. Raises ValueError, naming the file, for a row that is not as `forms` says."""
    rows = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_log(path), start=1):
            form = next((forms[fate] for fate in forms if fate == row.get("fate")), {"fate": ()})
            check_form(f"{path} row {number}", row, {"id": str, "picture": (str, NoneType), **form})
            rows[row["id"]] = row
    return rows


def finish(folder: Path, rows: Sequence[dict], examples: Iterable[Example], lines: Sequence[str],
           decisions: Sequence[dict] = ()) -> None:
    """Rank 0 writes the set, the report and, where measurements were decided on, decisions.jsonl;
    the others wait. Raises ValueError, when all is written, if rows failed and none was kept."""
    with all_or_none("finish"):
        if rank() == 0:
            if decisions:
                write_whole(folder / "decisions.jsonl", json_lines(decisions))
            num = write_examples(folder, examples)
            write_whole(folder / "report.md", ("\n".join(lines) + "\n").encode())
            print("\n".join([*lines, f"{num} images: {folder / 'examples.jsonl'}"]))
            failed = [row["reason"] for row in rows if row["fate"] == "failed"]
            if failed and not num:
                raise ValueError(f"{folder}: expected at least one image in the set, found none; "
                                 f"{len(failed)} of {len(rows)} failed ({failed[0]})")


def count_table(name: str, counts: Counter) -> list[str]:
    total = counts.total()
    rows = [f"| {key} | {count} | {count / total:.1%} |" for key, count in counts.most_common()]
    return [f"| {name} | {total} | |", "| --- | ---: | ---: |", *rows, ""]
