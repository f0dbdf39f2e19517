"""One writer per run folder."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from data.io import heartbeat, to_json

WRITER = "writer.json"

WRITER_DEAD_S = 180.0
"""A writer on another machine counts as dead after this many seconds without a heartbeat. The
clocks of machines differ by less."""


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Inside, no other process writes to the run folder. Raises ValueError, with host and process
    of the other writer, if there is one already.

    The writer locks the file `WRITER` and touches it regularly, which is its heartbeat. On the same
    machine the lock ends with its process, and the next writer begins at once. Another machine may
    not see the lock. There the next writer waits for a heartbeat, or for `WRITER_DEAD_S` without.
    """
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / WRITER
    with _lock_writer(path) as file:
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(to_json({"host": platform.node(), "process": os.getpid(), "since": since}))
        file.flush()
        ended = heartbeat(path, WRITER_DEAD_S / 12)
        try:
            yield
        finally:
            ended.set()
            if _is_ours(_writer(path)):
                path.unlink()
            if is_new and not any(run_dir.iterdir()):
                run_dir.rmdir()


def check_writer(run_dir: Path) -> None:
    """Raises ValueError if a process of another machine took this one for dead and now writes."""
    writer = _writer(run_dir / WRITER)
    if not _is_ours(writer):
        raise ValueError(f"{run_dir}: expected to be its only writer, found {_name(writer)}")


def _lock_writer(path: Path) -> TextIO:
    """The file, open and locked. Raises ValueError if another writer is alive."""
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            writer, can_lock = _writer(path), True
            refusal = ValueError(f"{path.parent}: expected no other writer, found {_name(writer)}")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise refusal from None
            except OSError:  # a file system without locks: only heartbeats tell
                can_lock = False
            if writer and not (can_lock and writer["host"] == platform.node()):
                beat, started = path.stat().st_mtime, time.monotonic()
                while max(time.time() - beat, time.monotonic() - started) < WRITER_DEAD_S:
                    time.sleep(WRITER_DEAD_S / 180)
                    if path.stat().st_mtime != beat:
                        raise refusal
            # Its last writer may have removed the file meanwhile; then the loop opens a new one.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                stack.pop_all()
                return file


def _writer(path: Path) -> dict:
    """host, process and since when; empty if there is no writer, or it has only just begun."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _name(writer: dict) -> str:
    text = "process {process} on {host}, since {since}"
    return text.format(**writer) if writer else "another process"


def _is_ours(writer: dict) -> bool:
    return (writer.get("host"), writer.get("process")) == (platform.node(), os.getpid())
