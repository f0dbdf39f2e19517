"""Captions of a folder, a JSONL list, parquet files or tar shards of images: JSONL shards, one line per image.

    python caption.py --policy data/toy/policy --images some/folder --out captions
    torchrun --nproc-per-node 8 --max-restarts 100 caption.py --policy runs/caprl-3b/final --images tars --out captions
    python caption.py --out captions --export llava      # when all is captioned: captions/llava.json
    python caption.py --check captions/llava.json --images some/folder

Any number of workers, on any number of machines that share the folder of `--out`, may run the same command, whenever they like.
They do not talk to each other: each takes the next free shard and holds it by a lease file that it touches while it is alive.
A shard whose worker has died is taken over after `--lease-seconds`, and goes on where the last whole line was written.
So a run can be killed at any time and started again. (torchrun ends its other workers when one dies and, with
--max-restarts, starts all again; workers that are started one by one go on.)

The folder of `--out`:
    about.json                what is captioned and how; a worker with other settings is refused
    shard-000000.jsonl        finished: a line for each image, in the order of the input
    shard-000001.part-0000    what its worker has written so far; 0000 counts the workers that it has had
    shard-000001.lease-0000   touched by that worker while it lives
"""

import hashlib
import json
import os
import sys
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from data.benchmarks import IMAGE_COLUMNS, picture_rows
from data.captions import check_export, count_finished, export_captions, finished_rows, read_about
from data.examples import read_jsonl
from data.images import IMAGE_SUFFIXES, ImageSource, StoredImage, list_files, open_image, print_left_out, printable
from data.parquet import parquet_columns, parquet_groups
from grpo.config import run_program
from grpo.disk import check_room, naming
from grpo.policy import INSTRUCTION, Policy, Prompt, load_policy, weights_hash
from grpo.report import heartbeat, to_json
from grpo.rollout import sample_rollouts

PIXEL_BYTES = 1 << 31
"""Pixel values in memory at a time; a batch ends when it has more."""


@dataclass(frozen=True)
class CaptionConfig:
    """Settings of caption.py."""

    images: str = ""
    """An image, or a folder searched with its subfolders; a JSONL file whose rows have `image` (or `image_path`) and may have
    `id`; a parquet file or a tar file (WebDataset's layout), or a folder of these."""
    out: str = ""
    """The folder of captions. Run again, a program that was stopped goes on."""
    policy: str = "runs/caprl/final"
    """The captioner, a local folder or a hub name."""
    instruction: str = INSTRUCTION
    """What the captioner is told."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    max_new_tokens: int = 4096
    """Longest caption in tokens."""
    seed: int = 0
    """A caption is a function of the seed and the image's id."""
    shard_size: int = 1024
    """Images of a shard, from a folder or a JSONL file. Otherwise a tar file or a row group of a parquet file is one."""
    batch_size: int = 256
    """Images in memory at a time, at most; captions are written when all of these have one."""
    rollout_tokens: int = 524_288
    """Tokens that the sampler's cache has room for; finished captions make room for waiting ones."""
    loaders: int = 4
    """Threads that open and resize images while others are captioned."""
    lease_seconds: float = 120.0
    """A worker that has not touched its lease for so long is taken for dead. More than the machines' clocks differ."""
    export: Literal["", "llava", "sharegpt"] = ""
    """Write the finished captions of `out` as one JSON file: LLaVA's format, or LLaMA-Factory's with its dataset_info.json."""
    check: str = ""
    """An exported file to check, row by row; with `images`, a folder, that the pictures are there too."""

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size", "shard_size", "rollout_tokens", "loaders"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: expected 0 or more")
        if not self.lease_seconds > 0:
            raise ValueError(f"lease_seconds {self.lease_seconds}: expected more than 0")
        if not self.check and not self.out:
            raise ValueError("expected a folder in out, or a file to check")
        if not self.check and not self.images and not self.export:
            raise ValueError("expected images to caption, or an export of captions")


# --------------------------------------------------------------------------------------------------- from images to rows


def caption_batches(policy: Policy, images: Iterable[tuple[str, ImageSource]], *, num_captions: int = 1,
                    instruction: str = INSTRUCTION, temperature: float, max_new_tokens: int, seed: int, batch_size: int = 256,
                    rollout_tokens: int = 524_288, loaders: int = 4) -> Iterator[list[list[dict]]]:
    """For each batch of images, in their order: the image's captions, each with its tokens and why it ended ("stop", or
    "length" where it was cut off), or one row with the `error` that kept the image from being opened.

    `images` has (name, image): the name, with the seed, is of the image's random streams. No batch, no thread and no
    budget changes a caption.
    """

    def load(image: ImageSource) -> Prompt | str:
        try:
            return policy.prompt(open_image(image), instruction)
        except ValueError as error:
            return str(error)

    def captions(batch: list[tuple[str, Prompt | str]]) -> list[list[dict]]:
        opened = [(name, prompt) for name, prompt in batch if isinstance(prompt, Prompt)]
        rows = iter(())
        if opened:
            keys = [f"{seed}:{name}:caption:{k}" for name, _ in opened for k in range(num_captions)]
            prompts = [prompt for _, prompt in opened]
            found = sample_rollouts(policy, prompts, keys, max_new_tokens, temperature, rollout_tokens)
            rows = zip(found.captions, found.lengths.tolist(), found.truncated.tolist())
        return [
            [{"error": prompt}] if isinstance(prompt, str) else [
                {"caption": text, "tokens": tokens, "finish_reason": "length" if truncated else "stop"}
                for text, tokens, truncated in (next(rows) for _ in range(num_captions))
            ]
            for _, prompt in batch
        ]

    policy.prompt(Image.new("RGB", (56, 56)), instruction)  # an instruction that cannot be used is no fault of the images
    batch, size = [], 0
    for name, prompt in _load_ahead(load, images, loaders):
        batch.append((name, prompt))
        size += prompt.pixel_values.nbytes if isinstance(prompt, Prompt) else 0
        if len(batch) == batch_size or size > PIXEL_BYTES:
            yield captions(batch)
            batch, size = [], 0
    if batch:
        yield captions(batch)


def _load_ahead(load: Callable, images: Iterable[tuple[str, ImageSource]], threads: int) -> Iterator[tuple[str, Prompt | str]]:
    """(name, load(image)) in order; a few images are loaded before they are asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[str, Future]] = deque()
        for name, image in images:
            waiting.append((name, pool.submit(load, image)))
            if len(waiting) > 2 * threads:
                name, future = waiting.popleft()
                yield name, future.result()
        for name, future in waiting:
            yield name, future.result()


def model_hash(policy: Policy) -> str:
    """16 hexadecimal digits of all that makes the captioner: weights, shapes, tokenizer, chat template, image processor."""
    config = {key: value for key, value in policy.model.config.to_dict().items() if key not in ("transformers_version",)}
    parts = [config, policy.image_processor.to_dict(), policy.tokenizer.chat_template, policy.eos_ids]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(policy.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(f"{policy.model.dtype} {weights_hash(policy.model)}".encode())
    return digest.hexdigest()[:16]


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- the shards


@dataclass(frozen=True)
class Shard:
    """A part of the images that one worker captions. `images` yields (id, how the row calls the image, image), in order."""

    images: Callable[[], Iterator[tuple[str, str, ImageSource]]]
    key: str
    """Of its contents, for about.json."""


def plan_shards(source: Path, shard_size: int) -> list[Shard]:
    """The same list for every worker. Raises ValueError where there are no images."""
    if (name := printable(str(source))) != str(source):  # rows, about.json and messages are UTF-8
        raise ValueError(f"{name}: expected a path in UTF-8")
    if not source.exists():
        raise ValueError(f"{source}: expected a folder or a file of images, found nothing")
    folder, files = source.parent, [source]
    if source.is_dir():
        folder, files = source, list_files(source, IMAGE_SUFFIXES | {".parquet", ".tar"})
    named = [(path.relative_to(folder).as_posix(), path) for path in files]
    kinds = {path.suffix.lower() for path in files}
    if not files:
        raise ValueError(f"{source}: expected images, .parquet or .tar files, found none")
    if kinds <= IMAGE_SUFFIXES:
        return _chunks([(name, name) for name, _ in named], folder, shard_size)
    if kinds == {".tar"}:
        return [
            Shard(lambda name=name, path=path: _tar_images(path, name), f"{name} {_size(path)}")
            for name, path in named
        ]
    if kinds == {".parquet"}:
        return [shard for name, path in named for shard in _parquet_shards(path, name)]
    if kinds == {".jsonl"}:
        return _chunks(list(_jsonl_images(source)), folder, shard_size)
    raise ValueError(f"{source}: expected a folder, .jsonl, .parquet or .tar files of one kind, found {sorted(kinds)}")


def _size(path: Path) -> int:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, found nothing")
    return path.stat().st_size


def _chunks(images: list[tuple[str, str]], folder: Path, size: int) -> list[Shard]:
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return [
        Shard(lambda part=part: ((id, name, folder / name) for id, name in part), text_hash("\n".join(id for id, _ in part)))
        for part in parts
    ]


def _jsonl_images(path: Path) -> Iterator[tuple[str, str]]:
    """(id, path as written). Whether an image is there is seen when its turn comes: looking for millions first takes hours."""
    first_line: dict[str, int] = {}
    for number, row in read_jsonl(path):
        written = (row.get(key) for key in ("image", "images", "image_path"))
        image = next((value for value in written if value is not None), None)
        image = image[0] if isinstance(image, list) and len(image) == 1 else image
        if not isinstance(image, str) or image.startswith("data:"):
            raise ValueError(f"{path} line {number}: expected a path in 'image', got {image!r:.80}")
        id = image if row.get("id") is None else str(row["id"])
        if id in first_line:
            raise ValueError(f"{path} line {number}: id {id!r} was used before, on line {first_line[id]}")
        first_line[id] = number
        yield id, image


def _parquet_shards(path: Path, name: str) -> list[Shard]:
    columns, groups = parquet_columns(path), parquet_groups(path)
    if not sum(groups) or not set(columns) & set(IMAGE_COLUMNS):
        wanted = " or ".join(IMAGE_COLUMNS)
        raise ValueError(f"{path}: expected rows with {wanted}, found {sum(groups)} rows of {columns}")
    return [
        Shard(lambda group=group: _parquet_images(path, name, group), f"{name} {group} {rows}")
        for group, rows in enumerate(groups)
    ]


def _parquet_images(path: Path, file: str, group: int) -> Iterator[tuple[str, str, ImageSource]]:
    stem = file.removesuffix(path.suffix)
    try:
        for row in picture_rows(path, group):
            name = row.where.replace(str(path), file)
            # An `index` begins again in each file, and two images of one id would be one.
            id = row.id if row.cells.get("id") is not None else f"{stem}:{row.where.rsplit(' ', 1)[1]}"
            try:
                yield id, name, row.picture()[1]
            except ValueError as error:
                yield id, name, _unreadable(name, error)
    except ValueError as error:
        yield f"{stem}:group {group}", file, _unreadable(file, error)


def _tar_images(path: Path, file: str) -> Iterator[tuple[str, str, ImageSource]]:
    """The images of a tar file by the place of their bytes, so that threads may read them. Ids are the tar's name and the
    member's without its last ending. Other members, unless they go with an image as in WebDataset's layout, are counted."""
    stem, ids = file.removesuffix(path.suffix), set()
    spans: dict[str, tuple[int, int]] = {}
    others: list[tuple[str, str]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                written = printable(member.name)
                key, ending = os.path.splitext(written)
                if member.isfile():
                    spans[member.name] = (member.offset_data, member.size)
                elif member.isdir():
                    continue
                if os.path.basename(written).startswith("._"):
                    others.append((written, "._* of macOS"))
                elif ending.lower() not in IMAGE_SUFFIXES:
                    others.append((key, ending.lower() or "without ending"))
                else:
                    more = (f"{written}:{number}" for number in count(2))
                    id = next(id for id in chain((key, written), more) if id not in ids)
                    ids.add(id)
                    yield f"{stem}/{id}", f"{file}/{written}", _member(path, f"{file}/{written}", member, spans)
            left_out = Counter(ending for key, ending in others if key not in ids)
            print_left_out(path, left_out)
            if _read_span(path, archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("cut off: expected its end, a block of zeros")  # of which tarfile says nothing
            if not ids:
                raise tarfile.ReadError("no image among its members")
    except (OSError, tarfile.TarError) as error:
        yield stem, file, _unreadable(file, error)


def _member(path: Path, name: str, member: tarfile.TarInfo, spans: dict[str, tuple[int, int]]) -> StoredImage:
    """A link stands for the member before it that it leads to."""
    target = member.linkname if member.islnk() else member.name
    if member.issym():
        target = os.path.normpath(os.path.join(os.path.dirname(member.name), member.linkname))
    if target not in spans:
        return _unreadable(name, f"a link to {printable(target)}, no member before it")
    span = spans[target]
    return StoredImage(name, lambda: _read_span(path, *span))


def _read_span(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _unreadable(name: str, reason: Exception | str) -> StoredImage:
    """So that a file that breaks off leaves a row with the reason, and neither stops its worker nor the next one."""
    def read() -> bytes:
        raise OSError(str(reason))

    return StoredImage(name, read)


# ---------------------------------------------------------------------------------------------------------- the leases


class Lease:
    """The right to write a shard. Each worker that a shard has had is a generation of its own, with its own lease and its own
    part, and only the newest may finish: whoever comes back from a long sleep can spoil nothing.
    """

    def __init__(self, out: Path, name: str, generation: int, seconds: float):
        self.out, self.name, self.generation = out, name, generation
        self.path = out / f"{name}.lease-{generation:04d}"
        self.part = out / f"{name}.part-{generation:04d}"
        self.finished = out / f"{name}.jsonl"
        self._released = heartbeat(self.path, seconds / 4)

    def release(self) -> None:
        self._released.set()

    @property
    def is_lost(self) -> bool:
        return self.finished.exists() or (self.out / f"{self.name}.lease-{self.generation + 1:04d}").exists()

    def finish(self) -> None:
        """The part becomes the finished shard, unless another worker has finished it, and what else was left of it goes."""
        try:
            os.link(self.part, self.finished)  # unlike a rename, it never replaces
        except (FileExistsError, FileNotFoundError):
            return
        for path in self.out.glob(f"{self.name}.*-*"):
            path.unlink(missing_ok=True)


def take_lease(out: Path, name: str, seconds: float) -> Lease | None:
    """None if the shard is finished, or in the hands of a worker that was alive within the last `seconds`."""
    if (out / f"{name}.jsonl").exists():
        return None
    held = sorted(out.glob(f"{name}.lease-*"))
    generation = int(held[-1].name[-4:]) + 1 if held else 0
    try:
        if held and time.time() - held[-1].stat().st_mtime < seconds:
            return None
        (out / f"{name}.lease-{generation:04d}").touch(exist_ok=False)  # one of many workers makes it
    except (FileExistsError, FileNotFoundError):  # another was quicker, or has just finished
        return None
    lease = Lease(out, name, generation, seconds)
    if lease.finished.exists():  # finished, and its leases gone, between the first look and the touch
        lease.release()
        lease.path.unlink(missing_ok=True)
        return None
    return lease


@contextmanager
def _new_part(lease: Lease) -> Iterator[tuple[int, Callable[[list[dict]], None]]]:
    """How many rows earlier workers have left, now in this one's part, and a function that appends more.

    What was cut off in the middle of a line is dropped. The file is opened once: if the shard is taken over, finished and
    cleared away, later rows go nowhere.
    """
    parts = sorted(lease.out.glob(f"{lease.name}.part-*"))
    whole = [b"".join(path.read_bytes().rpartition(b"\n")[:2]) for path in parts]
    kept = max(whole, key=len, default=b"")
    with lease.part.open("wb") as file:
        def append(rows: list[dict]) -> None:
            file.write("".join(to_json(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

        file.write(kept)
        file.flush()
        yield kept.count(b"\n"), append


# ---------------------------------------------------------------------------------------------------------- the program


def caption(config: CaptionConfig) -> None:
    """One worker's run: it takes shard after shard until all are finished, by whomever."""
    worker, num_workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device()
    out = Path(config.out)
    check_room(out)
    shards = plan_shards(Path(config.images), config.shard_size)
    policy = load_policy(config.policy, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    about = {
        "images": config.images, "model": model_hash(policy), "instruction": config.instruction,
        "temperature": config.temperature, "max_new_tokens": config.max_new_tokens, "seed": config.seed,
        "shards": len(shards), "contents": text_hash("\n".join(shard.key for shard in shards)),
    }
    _agree(out, about)
    names = [f"shard-{number:06d}" for number in range(len(shards))]
    order = deque(range(len(shards)))
    order.rotate(-(worker * len(shards) // num_workers))  # workers begin far from each other
    totals = {"images": 0, "unreadable": 0, "tokens": 0}
    started = time.perf_counter()
    with tqdm(total=len(shards), initial=count_finished(out), desc="captions", unit="shard", disable=worker != 0) as bar:

        def show(rows: list[dict]) -> None:
            totals["images"] += len(rows)
            totals["unreadable"] += sum("error" in row for row in rows)
            totals["tokens"] += sum(row.get("tokens", 0) for row in rows)
            bar.set_postfix_str(_speed(totals, time.perf_counter() - started))

        while (finished := count_finished(out)) < len(shards):
            bar.update(finished - bar.n)
            is_idle = True
            for number in order:
                if lease := take_lease(out, names[number], config.lease_seconds):
                    is_idle = False
                    _caption_shard(policy, shards[number], lease, about["model"], config, show)
                    bar.update(count_finished(out) - bar.n)
            if is_idle:
                time.sleep(min(config.lease_seconds / 4, 5))
        bar.update(len(shards) - bar.n)
    for path in out.glob("shard-*.*-*"):  # of workers that were killed while they cleared up
        path.unlink(missing_ok=True)
    speed = _speed(totals, time.perf_counter() - started)
    print(f"{out}: {len(shards)} shards finished; this worker captioned {totals['images']} images, "
          f"{totals['unreadable']} of them unreadable; {speed}", flush=True)
    first = next(finished_rows(out), None)
    if all("error" in row for _, row in finished_rows(out)):
        said = f"the first: {first[1]['error']}" if first else "no rows"
        raise ValueError(f"{out}: expected a caption, found none; no image could be opened ({said})")


def _caption_shard(policy: Policy, shard: Shard, lease: Lease, model: str, config: CaptionConfig,
                   show: Callable[[list[dict]], None]) -> None:
    prompt = text_hash(config.instruction)
    try:
        with _new_part(lease) as (num_done, append):
            images = list(shard.images())[num_done:]
            batches = caption_batches(
                policy, ((id, image) for id, _, image in images), instruction=config.instruction,
                temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=config.seed,
                batch_size=config.batch_size, rollout_tokens=config.rollout_tokens, loaders=config.loaders,
            )
            done = 0
            for batch in batches:
                if lease.is_lost:
                    return
                rows = [
                    {"id": id, "image": name} | row | {"model": model, "prompt": prompt}
                    for (id, name, _), (row,) in zip(images[done : done + len(batch)], batch, strict=True)
                ]
                append(rows)
                show(rows)
                done += len(batch)
        if not lease.is_lost:
            lease.finish()
    finally:
        lease.release()


def _agree(out: Path, about: dict) -> None:
    """The first worker writes about.json; the others hold their own settings against it."""
    out.mkdir(parents=True, exist_ok=True)
    path, own = out / "about.json", out / f"about.json.{os.uname().nodename}-{os.getpid()}"
    own.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    try:
        with suppress(FileExistsError):
            os.link(own, path)  # whole or not at all, and never over another's
    finally:
        own.unlink()
    for name, value in read_about(out).items():
        if name != "images" and about.get(name) != value:  # machines may see the images under different paths
            raise ValueError(f"{path}: expected captions with {name} {about.get(name)!r}, found a run with {value!r}")


def _speed(totals: dict[str, int], seconds: float) -> str:
    return f"{totals['images'] / seconds:.1f} images/s, {totals['tokens'] / seconds:.0f} tokens/s"


def _device() -> torch.device:
    """Of this worker alone: no process group, in which a lost worker would hold up the others."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def main(arguments: list[str]) -> None:
    config = tyro.cli(CaptionConfig, args=arguments)
    if config.check:
        num_rows = check_export(Path(config.check), Path(config.images) if config.images else None)
        print(f"{config.check}: {num_rows} rows, all as expected")
        return
    with naming(Path(config.out)):
        if config.images:
            caption(config)
        if config.export:
            export_captions(Path(config.out), config.export)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
