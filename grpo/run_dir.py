"""The folder of a run: begun or gone on with, by one process at a time."""

import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from data.io import heartbeat, read_json, short, to_json, write_whole
from grpo.config import TrainConfig
from grpo.distributed import all_or_none, check_alike, gather_rows, rank, world_size
from grpo.log import EVAL_LOG, LOGS, ROLLOUTS


def check_run_dir(run_dir: Path) -> None:
    """Raises ValueError if a run is in the folder already: nothing is overwritten."""
    names = ("config.json", *LOGS, EVAL_LOG, "rollouts", "checkpoints", "best", "final")
    if any((run_dir / name).exists() for name in names):
        raise ValueError(f"{run_dir}: expected a new or empty run folder, found a run in it "
                         "(--resume goes on with it)")
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: expected a run folder, found a file")


def start_run(run_dir: Path, config: dict) -> None:
    """Makes the folder and writes config.json."""
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def log_start(run_dir: Path, step: int, num_ranks: int) -> None:
    """Appends a line to starts.jsonl: what is started on which machine, at first or to resume."""
    from grpo.machine import describe_start  # here: a reader of training need not meet it

    path = run_dir / "starts.jsonl"
    written = path.read_bytes() if path.exists() else b""
    whole, end, _ = written.rpartition(b"\n")  # without a last line that was cut off
    line = to_json({"step": step} | describe_start(num_ranks)) + "\n"
    write_whole(path, whole + end + line.encode())


def saved_config(run_dir: Path) -> dict:
    """The settings of the run in the folder, empty if there is none. Raises ValueError if they
    cannot be read."""
    path = run_dir / "config.json"
    saved = read_json(path, "the settings of a run", dict) if path.exists() else {}
    contents = saved.get("contents", {})
    if not isinstance(contents, dict) or not all(isinstance(one, str) for one in contents.values()):
        raise ValueError(f"{path}: expected texts by name in contents, found {short(contents)}")
    return saved


_FILES = "configuration, tokenizer, chat template and image processor"
AROUND = {"policy": _FILES, "judge": _FILES, "checker": _FILES,
          "verifier": "tokenizer and chat template"}
"""What the second hash of a model's contents is of; the first is of its weights."""

FREE_ON_RESUME = {
    "run_dir", "num_steps", "check", "resume", "save_every", "save_minutes", "keep_checkpoints",
    "export_every", "max_skipped", "max_failed_share", "replicas", "offload_reference",
    "timeout_minutes", "micro_batch_tokens", "rollout_tokens", "gradient_checkpointing",
    "save_dtype", "tensorboard", "tracker", "patience", "stop_at",
}
"""Settings that a resumed run may change: they do not change what is computed, up to rounding."""

IN_STEP = {"num_steps", "save_every", "export_every", "max_skipped", "max_failed_share", "replicas",
           "patience", "stop_at"}
"""Of these, what must not differ between the ranks of a run: one would wait for another."""
AT_PATHS = {"data", "eval_data", "policy", "verifier", "verifier_name", "judge", "checker"}
"""Of data and models only the path may differ: `begin` compares what was loaded from there."""


def check_ranks(config: TrainConfig) -> None:
    """Raises ValueError, on all ranks, if the images of a step do not divide by them, or if one has
    another setting than rank 0 that changes the numbers, or when ranks meet."""
    config.prompts_per_rank(world_size())
    check_alike({
        name: bool(value) if name in AT_PATHS else value for name, value in config.flat().items()
        if name not in FREE_ON_RESUME - IN_STEP
    })


def check_resumes(config: TrainConfig, saved: dict, contents: dict[str, str]) -> None:
    """Raises ValueError if a setting that changes the numbers differs from when the run began.
    Data and models may lie at another path. Their contents are compared, of data ids and questions,
    not the pictures.

    saved: the run's config.json, empty for a new run. Older ones have no contents, and for a
    setting that came later its default: a new feature is off.
    """
    settings = config.flat()
    begun_with = TrainConfig().flat() | saved if saved else settings
    begun_contents = saved.get("contents", {})
    for name, value in settings.items():
        may_move = name in begun_contents and value  # its contents are compared below
        if not may_move and name not in FREE_ON_RESUME and begun_with[name] != value:
            raise ValueError(f"{name} {value!r}: expected {begun_with[name]!r} as the run to "
                             "resume has it")
    for name, value in contents.items():
        begun = begun_contents.get(name, value)
        differs = [then != now for then, now in zip(begun.split(" "), value.split(" "))]
        if any(differs):
            what = "rows" if "data" in name else "weights" if differs[0] else AROUND[name]
            raise ValueError(f"{name} {settings[name]}: expected the {what} that the run to "
                             f"resume began with ({begun}), found others ({value})")


def best_line(run_dir: Path) -> dict:
    """The line of eval.jsonl whose policy is in best/; empty without one."""
    path = run_dir / "best/step.json"
    return read_json(path, "the line of an evaluation", dict) if path.exists() else {}


def rewind(run_dir: Path, num_steps: int) -> None:
    """Takes the logs back to what they were after `num_steps` steps, and deletes what a killed run
    left unfinished. Raises ValueError if a step before that is missing or there twice, and for no
    steps where a run has exported its policy."""
    has_checkpoint = any(run_dir.glob("checkpoints/step_??????"))  # of no steps: it ended at once
    has_policy = best_line(run_dir).get("step") or (run_dir / "final").exists()
    if not num_steps and has_policy and not has_checkpoint:
        raise ValueError(f"{run_dir}: expected a checkpoint to go on from, found the policy of a "
                         "run without any")
    for name in ("config.json", "starts.jsonl", *LOGS, EVAL_LOG, f"rollouts/{ROLLOUTS}"):
        for stale in run_dir.glob(f"{name}.*.unfinished"):  # the run was killed as it wrote it
            stale.unlink()
    for name in (*LOGS, EVAL_LOG):
        path = run_dir / name
        if name == EVAL_LOG and not path.exists():
            continue
        content = path.read_bytes() if path.exists() else b""
        lines = content.splitlines(keepends=True)  # of bytes: an id may contain U+2028
        steps = [_step_of(line) for line in lines]
        # An evaluation is of the policy after that many steps, and not all of them have one.
        end = num_steps + (name == EVAL_LOG)
        kept = [step for step in steps if step < end]
        last = max((place for place, step in enumerate(steps) if step < end), default=0)
        if math.inf in steps[:last]:  # behind the checkpoint all is written again
            place = steps.index(math.inf)
            raise ValueError(f"{path} line {place + 1}: expected the numbers of a step, found "
                             f"{short(lines[place])}")
        if kept != (list(range(num_steps)) if name in LOGS else sorted(set(kept))):
            doubled = sorted({step for step in kept if kept.count(step) > 1})
            message = f"{path}: expected a line for each of {num_steps} steps, found {len(kept)}"
            if doubled:
                message += (f"; two processes have written steps {', '.join(map(str, doubled))}: "
                            f"keep the first line of each step in {', '.join(LOGS)}, then --resume")
            raise ValueError(message)
        write_whole(path, b"".join(line for line, step in zip(lines, steps) if step < end))
    for path in (run_dir / "rollouts").glob(ROLLOUTS):
        if int(path.stem.removeprefix("step_")) >= num_steps:
            path.unlink()


def _step_of(line: bytes) -> float:
    """The line's step. Infinity for a line that was cut off, or has none."""
    with suppress(ValueError, TypeError, KeyError):
        if line.endswith(b"\n") and type(step := json.loads(line)["step"]) is int:
            return step
    return math.inf


# ------------------------------------------------------------------------- one writer per folder

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
        os.fsync(file.fileno())  # other machines see it now, not when it is closed
        ended = heartbeat(path, WRITER_DEAD_S / 12)
        try:
            yield
        finally:
            ended.set()
            if _is_ours(_writer(path)):
                path.unlink()
            if is_new and not any(run_dir.iterdir()):
                run_dir.rmdir()


SEEN_S = 90.0
"""So long a node may not see what another has just written: NFS looks again after 60 seconds."""


def check_shared(run_dir: Path) -> None:
    """Raises ValueError, on all ranks, if one does not see the `WRITER` of rank 0: it would write
    its parts of checkpoints into a folder of its own. Every rank must call this."""
    path, until = run_dir / WRITER, time.monotonic() + SEEN_S
    [writer] = gather_rows([_writer(path)] if rank() == 0 else [])
    with all_or_none("run folder"):
        while _writer(path) != writer:
            if time.monotonic() > until:
                raise ValueError(f"{run_dir}: expected a folder that all ranks share, rank {rank()}"
                                 f" on {platform.node()} does not see {WRITER} of rank 0 there")
            time.sleep(1)


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
        writer = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(writer, dict) and writer.keys() >= {"host", "process", "since"}:
            return writer
    return {}


def _name(writer: dict) -> str:
    text = "process {process} on {host}, since {since}"
    return text.format(**writer) if writer else "another process"


def _is_ours(writer: dict) -> bool:
    return (writer.get("host"), writer.get("process")) == (platform.node(), os.getpid())
