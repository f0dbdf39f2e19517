"""What a disk refuses, in one sentence with path, reason and free bytes: before the work where it can be, or when it comes."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMELESS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Errors of writing to a file that is open: Python does not say to which."""


def disk_sentence(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    path = Path(os.fsdecode(error.filename))
    if isinstance(error, FileNotFoundError):
        return f"{path}: {error.strerror}"
    return f"{path}: {error.strerror} ({free_at(path)})"


def free_at(path: Path) -> str:
    there = nearest(path)
    return f"{format_bytes(shutil.disk_usage(there).free)} free at {there}"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An error of writing inside that names no file names `path`, where all that is written goes."""
    try:
        yield
    except OSError as error:
        if error.errno in NAMELESS and error.filename is None:
            error.filename = str(path)
        raise


def check_room(folder: Path, size: int = 0) -> None:
    """Raises ValueError if `folder`, which need not be there yet, cannot be made or gets no file of `size` bytes. Leaves
    nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(bytes(4096))
    except OSError as error:
        error.filename = str(folder)
        raise ValueError(disk_sentence(error)) from None
    if shutil.disk_usage(nearest(folder)).free < size:
        raise ValueError(f"{folder}: expected room for {format_bytes(size)}, found {free_at(folder)}")


def nearest(path: Path) -> Path:
    """The path itself or the nearest one above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def format_bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB" if size >= 2**17 else f"{size} bytes"
