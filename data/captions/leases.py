"""Which worker writes which shard, among workers that do not talk to each other.

Each takes the next free shard and holds it by a lease, a file that it touches while it lives. A
shard whose worker has died is taken over, and goes on where the last whole line was written.

The folder of captions:
    about.json                what is captioned and how; a worker with other settings is refused
    shard-000000.jsonl        finished: a line for each image, in the order of the input
    shard-000001.part-0000    what its worker has written so far; 0000 counts its workers
    shard-000001.lease-0000   touched by that worker while it lives
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from data.captions.exports import own_files
from data.captions.shards import NamedImage, Shard
from data.io import heartbeat, json_lines, link_new, short

UNFINISHED = "(?:part|lease)-[0-9]{4}"
"""Endings of what goes when the shard is finished."""


class Lease:
    """The right to write a shard.

    Each worker that a shard has had is a new generation, with its own lease and its own part. Only
    the newest may finish. So a worker that comes back from a long sleep can spoil nothing.
    """

    def __init__(self, out: Path, number: int, generation: int, seconds: float):
        name = f"shard-{number:06d}"
        self.out, self.number, self.name, self.generation = out, number, name, generation
        self.path = out / f"{name}.lease-{generation:04d}"
        self.part = out / f"{name}.part-{generation:04d}"
        self.finished = out / f"{name}.jsonl"
        self._released = heartbeat(self.path, seconds / 4)

    def release(self) -> None:
        """Its worker writes no more: the next one need not wait."""
        self._released.set()
        with suppress(OSError):  # it is gone where the shard is finished
            os.utime(self.path, (0, 0))

    @property
    def is_lost(self) -> bool:
        following = self.out / f"{self.name}.lease-{self.generation + 1:04d}"
        return self.finished.exists() or following.exists()

    def finish(self) -> None:
        """The part becomes the finished shard, unless another worker has finished it. What else was
        left of it goes."""
        try:
            link_new(self.part, self.finished)
        except (FileExistsError, FileNotFoundError):
            return
        for path in own_files(self.out, UNFINISHED, self.name):
            path.unlink(missing_ok=True)


def take_lease(out: Path, number: int, seconds: float) -> Lease | None:
    """None if the shard is finished, or held by a worker that was alive in the last `seconds`."""
    name = f"shard-{number:06d}"
    if (out / f"{name}.jsonl").exists():
        return None
    held = own_files(out, "lease-[0-9]{4}", name)
    generation = int(held[-1].name[-4:]) + 1 if held else 0
    try:
        # A time that far ahead is no worker's: clocks agree to within `seconds`.
        if held and abs(time.time() - held[-1].stat().st_mtime) < seconds:
            return None
        # Only the first of many workers makes it.
        (out / f"{name}.lease-{generation:04d}").touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):  # another was quicker, or has just finished
        return None
    lease = Lease(out, number, generation, seconds)
    if lease.finished.exists():  # finished, and its leases gone, between first look and touch
        lease.release()
        lease.path.unlink(missing_ok=True)
        return None
    return lease


def take_leases(out: Path, num_shards: int, worker: int, num_workers: int,
                seconds: float) -> Iterator[Lease | None]:
    """The lease of each shard that is free, until all are finished, by any worker.

    None after each wait for other workers, which hold all that is left.
    """
    # Workers begin far from each other. Where a scheduler has set RANK alone, it may be any number.
    start = worker * num_shards // num_workers % num_shards
    order = [*range(start, num_shards), *range(start)]
    while left := [n for n in order if not (out / f"shard-{n:06d}.jsonl").exists()]:
        is_idle = True
        for number in left:
            if lease := take_lease(out, number, seconds):
                is_idle = False
                yield lease
        if is_idle:
            time.sleep(min(seconds / 4, 5))
            yield None
    for path in own_files(out, UNFINISHED):  # of workers that were killed while they cleared up
        path.unlink(missing_ok=True)


def write_shard(
    lease: Lease, shard: Shard, batches: Callable[[list[NamedImage]], Iterator[list[dict]]]
) -> Iterator[list[dict]]:
    """Writes the shard's rows and finishes it; yields each batch of rows when it is on the disk.

    batches: given the images that earlier workers have left, the batches of their rows. Ends early,
    without a message, when another worker has taken the shard over.
    """
    try:
        images = list(shard.images())
        with _new_part(lease, images) as (num_done, append):
            for rows in batches(images[num_done:]):
                if lease.is_lost:
                    return
                append(rows)
                yield rows
        if not lease.is_lost:
            lease.finish()
    finally:
        lease.release()


@contextmanager
def _new_part(lease: Lease, images: list[NamedImage]
              ) -> Iterator[tuple[int, Callable[[list[dict]], None]]]:
    """How many rows earlier workers have left, now in this part, and a function that appends more.

    The file is opened once: if the shard is taken over, finished and cleared away, later rows go
    nowhere.
    """
    parts = own_files(lease.out, "part-[0-9]{4}", lease.name)
    kept = max((_kept_lines(path, images) for path in parts), key=len, default=[])
    with lease.part.open("wb") as file:

        def append(rows: list[dict]) -> None:
            file.writelines(json_lines(rows))
            file.flush()
            os.fsync(file.fileno())

        file.writelines(kept)
        append([])  # they are on the disk before the parts that had them go
        yield len(kept), append


def _kept_lines(part: Path, images: list[NamedImage]) -> list[bytes]:
    """The lines before the first that is no row: it was cut off, or a power cut left zeros. Raises
    ValueError for a row of another image than the shard has in this place."""
    kept = list(takewhile(_is_row, part.read_bytes().splitlines(keepends=True)))
    for number, line in enumerate(kept):
        row = json.loads(line)
        expected = [image[:2] for image in images[number : number + 1]]  # none behind the last
        found = [(row.get("id"), row.get("image"))]
        if found != expected:
            raise ValueError(f"{part} line {number + 1}: expected id and image {expected}, found "
                             f"{short(found)}; without this file its shard begins anew")
    return kept


def _is_row(line: bytes) -> bool:
    with suppress(ValueError):
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    return False
