"""Writing files: whole or not at all, and what a disk refuses, told before the work if it can be
known then. data/jsonl.py reads rows.
"""

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMELESS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Errors of writing to an open file: Python does not name the file."""
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of making a link where the file system has none: exFAT, a cloud's bucket."""
POINTER = "Git LFS's pointer to it: run git lfs pull there"
"""How messages call what a clone without Git LFS leaves in place of a large file."""


def disk_sentence(error: OSError) -> str:
    """What the system refused, with path, reason and free bytes."""
    if error.filename is None or error.strerror is None:
        return str(error)
    path = Path(os.fsdecode(error.filename2 or error.filename))  # of a link or rename the new one
    if isinstance(error, FileNotFoundError):
        return f"{path}: {error.strerror}"
    return f"{path}: {error.strerror} ({free_at(path)})"


def free_at(path: Path) -> str:
    """Free bytes at `path`, which need not be there yet, as messages say it."""
    existing = nearest(path)
    return f"{format_bytes(shutil.disk_usage(existing).free)} free at {existing}"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an error of writing inside the name `path`, where it has none."""
    try:
        yield
    except OSError as error:
        if error.errno in NAMELESS and error.filename is None:
            error.filename = str(path)
        raise


def check_room(folder: Path, size: int = 0) -> None:
    """Raises ValueError if `folder` cannot be made or has no room for `size` bytes. It need not be
    there yet, and nothing is left behind."""
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(bytes(4096))
    except OSError as error:
        error.filename = str(folder)
        raise ValueError(disk_sentence(error)) from None
    if shutil.disk_usage(nearest(folder)).free < size:
        wanted = format_bytes(size)
        raise ValueError(f"{folder}: expected room for {wanted}, found {free_at(folder)}")


def nearest(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists and that one may see."""
    # Path.exists would raise for a path in a folder that one may not enter, and for too long a name
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def format_bytes(size: int) -> str:
    if size >= 2**27:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.2f} MiB" if size >= 2**17 else f"{size} bytes"


def heartbeat(path: Path, every_s: float) -> threading.Event:
    """Touches the file from a thread every `every_s` seconds, until it is gone or the event set."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(every_s):
            try:
                os.utime(path)
            except FileNotFoundError:
                return
            except OSError:  # a disk behind a network may be away for a moment
                continue

    threading.Thread(target=touch, daemon=True).start()
    return ended


def ahead(function: Callable[[Any], Any], items: Iterable[Any], num_ahead: int,
          threads: int = 1) -> Iterator[Any]:
    """function(item) of each item, in their order. The next `num_ahead` are computed in threads
    meanwhile. An error is raised where its item's turn comes."""
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future] = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > num_ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def write_whole(path: Path, content: bytes | Iterable[bytes], keep: bool = False) -> None:
    """Writes the whole content or, if stopped on the way, nothing. Its parts are written as they
    come. Several processes may write the same file: the last stays or, with `keep`, the first."""
    unfinished = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.unfinished")
    try:
        with naming(path), unfinished.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())  # before its name: after a power cut it would be empty
        if not keep:
            unfinished.replace(path)
        else:
            with suppress(FileExistsError):
                link_new(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def link_new(source: Path, path: Path) -> None:
    """Gives a file the name `path` too, as no rename does: it raises FileExistsError where a file
    has that name. Without links it is a rename after a look, in which moment another may come."""
    with without_links():
        os.link(source, path)
        return
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    source.rename(path)


@contextmanager
def without_links() -> Iterator[None]:
    """A link that the file system cannot make ends the block, not the program: go on behind it."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise


def read_json(path: Path, what: str, kind: type = object, decode: Callable = json.loads) -> Any:
    """The content of a JSON file. Raises ValueError, with `what` was expected, if there is none or
    none of this kind."""
    try:
        content = decode(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what} ({error})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected {what}, found {short(content)}")
    return content


def is_pointer(path: Path) -> bool:
    """Whether Git LFS's pointer stands in the file's place."""
    with path.open("rb") as file:
        return file.read(19) == b"version https://git"


def check_fetched(path: Path, what: str) -> None:
    """Raises ValueError for a pointer of Git LFS."""
    if is_pointer(path):
        raise ValueError(f"{path}: expected {what}, found {POINTER}")


def agree_on(path: Path, settings: dict, free: tuple[str, ...] = (),
             called: dict[str, str] | None = None, made: Iterable[Path] = ()) -> None:
    """The first process writes the settings; later ones hold their own against them. Raises
    ValueError, naming the setting, for one with another value, unless it is `free`.

    called: setting -> the free one that the message names with it, as a path beside a hash.
    made: files of rows that are there already. Raises ValueError for one without settings.
    """
    if any(made) and not path.exists():
        raise ValueError(f"{path}: expected the settings of the rows beside it, found none; "
                         "take another --out")
    write_whole(path, (json.dumps(settings, indent=2) + "\n").encode(), keep=True)
    saved = read_json(path, "settings", dict)
    for name, value in json.loads(json.dumps(settings)).items():
        if name not in free and saved.get(name) != value:
            label = (called or {}).get(name, "")
            now, then = (f"{values.get(label, '')} {values.get(name)!r}".strip()
                         for values in (settings, saved))
            raise ValueError(f"{path}: expected {name} {now} as now asked for, found {then}; "
                             "take another --out")


def json_lines(rows: Iterable[dict]) -> Iterator[bytes]:
    """The lines of a JSONL file."""
    for row in rows:
        yield f"{to_json(row)}\n".encode()


def to_json(row: dict) -> str:
    """One line of JSON that every reader accepts: null stands for a number that is not finite."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False)


def check_text(name: str, *texts: str) -> None:
    """Raises ValueError for half a surrogate pair: a tokenizer would raise TypeError much later."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected text in {name}, got half a surrogate pair") from None


def short(value: Any) -> str:
    """The value as messages show it, cut: a picture in base64 is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def text_hash(text: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
