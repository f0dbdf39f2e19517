"""What a run writes while it goes, and what each number in it means.

    python -m grpo.report runs/toy                                   # one page to look at a run: runs/toy/report.html
    python -m grpo.report runs/toy runs/other                        # two runs side by side
    python -m grpo.report runs/demo/before.jsonl runs/demo/after.jsonl   # what evaluate.py --out wrote, one captioner or two

A run folder holds config.json, starts.jsonl, metrics.jsonl, audit.jsonl, timing.jsonl, rollouts/step_000012.jsonl,
thumbnails/ and, with --tensorboard, tensorboard/. Metrics, audit and rollouts are functions of the settings: a run that
was killed and resumed writes the same bytes as one that was not. What a clock or the machine says stands apart, in
timing.jsonl and starts.jsonl.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# ------------------------------------------------------------------------------------------------------------ the key list


@dataclass(frozen=True)
class Metric:
    """A number that a run writes once per step."""

    key: str
    unit: str
    """"share" is 0 to 1, "count" a whole number; a list has one number per letter or one text per question."""
    what: str
    panel: str = ""
    """The curve on which the report page draws it; empty for what is no curve."""
    on_console: bool = False


METRICS = {
    "metrics.jsonl": (
        Metric("reward", "", "mean reward of the captions that have one", "reward and its parts", True),
        Metric("reward_accuracy", "", "the part of `reward` that the verifier's answers earn", "reward and its parts"),
        Metric("reward_length", "", "the part for length, its weight applied", "reward and its parts"),
        Metric("reward_repetition", "", "the part for repeated 4-grams, its weight applied; 0 or less", "reward and its parts"),
        Metric("reward_judge", "", "the judge's rating, 0 to 1, with `--reward judge`", "reward and its parts"),
        Metric("accuracy", "share", "of the scored questions, answered rightly; ranks weighted by their captions", "accuracy"),
        Metric("flat_groups", "share", "of groups whose rewards are all equal: they teach nothing", "flat groups", True),
        Metric("unscored_captions", "count", "captions without any scored question; they count nowhere"),
        Metric("failed_share", "share", "of the questions, could not be scored", "replies"),
        Metric("unparsed_share", "share", "of the scored questions, reply not readable", "replies"),
        Metric("abstain_share", "share", "of the scored questions, abstain option chosen", "replies"),
        Metric("length", "tokens", "mean per caption, the end token included", "length", True),
        Metric("truncated_share", "share", "of captions, cut off at `max_new_tokens`", "truncated"),
        Metric("loss", "", "the clipped surrogate with the KL, at the first inner epoch", "loss"),
        Metric("ratio", "", "mean of rho, the policy's probability of a token over the old one, at the last inner epoch",
               "ratio"),
        Metric("clip_share", "share", "of tokens, on the clipped branch, at the last inner epoch", "clip share", True),
        Metric("kl", "nats per token", "mean k3 estimate of the KL to the reference, at the first inner epoch", "KL", True),
        Metric("entropy", "nats", "mean over tokens of the policy's next-token distribution, at the first inner epoch",
               "entropy", True),
        Metric("sampler_gap", "nats", "mean absolute difference between the sampler's and the trainer's log-probabilities",
               "sampler gap"),
        Metric("grad_norm", "", "before clipping, of the last inner epoch", "gradient norm"),
        Metric("skipped", "count", "optimizer steps left out because the gradient was not finite"),
    ),
    "audit.jsonl": (
        Metric("gold_letters", "list of shares", "A, B, C, ... of the right options: as even as the numbers of options allow"),
        Metric("chosen_letters", "list of shares", "A, B, C, ... of the chosen options: without a favourite"),
        Metric("split_half", "at most 1", "reliability of the reward within groups: 1 if two halves of its questions agree on "
               "the captions, 0 or less if by chance", "audit of the reward"),
        Metric("shuffle_agreement", "share", "of pairs of shuffles of a question that lead to the same option, with "
               "`--num-shuffles` over 1", "audit of the reward"),
        Metric("length_correlation", "-1 to 1", "of reward and length within groups", "audit of the reward"),
        Metric("repetition", "share", "of a caption's 4-grams that are repeats, mean", "audit of the reward"),
        Metric("always_right", "list of questions", "on which a whole group is right, as id:place"),
        Metric("always_wrong", "list of questions", "on which a whole group is wrong, as id:place"),
        Metric("probe_accuracy", "share", "of the questions on `--probe-images` fixed images, answered rightly from the "
               "image's caption; every `--audit-every` steps", "probe and its floors"),
        Metric("probe_other_image", "share", "the same from another image's caption: a floor", "probe and its floors"),
        Metric("probe_no_caption", "share", "the same from no caption: the other floor", "probe and its floors"),
        Metric("probe_shuffle_agreement", "share", "of pairs of shuffles of a probe question that lead to the same option",
               "audit of the reward"),
    ),
    "timing.jsonl": (
        Metric("seconds", "s", "of the step", "seconds by phase", True),
        Metric("seconds_rollout", "s", "writing captions; this and the next four are means over ranks", "seconds by phase"),
        Metric("seconds_reward", "s", "asking the verifier", "seconds by phase"),
        Metric("seconds_update", "s", "loss, gradient and optimizer", "seconds by phase"),
        Metric("seconds_weights", "s", "giving the sampler the new weights", "seconds by phase"),
        Metric("seconds_records", "s", "audit and records", "seconds by phase"),
        Metric("idle_share", "share", "of all ranks' time, waiting for the slowest rank", "idle share"),
        Metric("tokens_per_second", "tokens/s", "tokens of captions per second of the step and rank", "tokens per second",
               True),
    ),
}
"""Every key that a run writes beside `step`, by file, each once. A key of the audit that stands in metrics.jsonl too (of the
same captions) is defined there. docs/metrics.md is this list."""

LOGS = tuple(METRICS)
PROBE_LINE = ("probe_accuracy", "probe_other_image", "probe_no_caption", "probe_shuffle_agreement", "split_half",
              "length_correlation")


def metrics_page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics", "",
        "Written from the list in `grpo/report.py` by",
        "`python -c \"from grpo.report import metrics_page; print(metrics_page(), end='')\" > docs/metrics.md`.", "",
        "Each file of a run folder has one line per step, with `step` (0-based) and these keys. Numbers are over all ranks;",
        "token means are weighted as in the loss. What could not be measured is `null`. At the first inner epoch the policy is",
        "still the one that sampled, so that `ratio` is 1 and `clip_share` 0 unless `--inner-epochs` is over 1.",
    ]
    for name, metrics in METRICS.items():
        lines += ["", f"## {name}", "", "| key | unit | what |", "| --- | --- | --- |"]
        lines += [f"| `{one.key}` | {one.unit} | {one.what} |" for one in metrics]
    return "\n".join(lines + [
        "", "`audit.jsonl` repeats `flat_groups`, `unparsed_share` and `abstain_share` of the same captions; "
        "`python -m reward.caprl audit RUN_DIR`", "prints the whole run's. A reward of another file brings keys of its own, "
        "`reward_` and the name of each part.", "",
    ])


# ---------------------------------------------------------------------------------------------------------- the run folder


def check_run_dir(run_dir: Path) -> None:
    """Raises ValueError where a run is already: nothing is overwritten."""
    if any((run_dir / name).exists() for name in ("config.json", *LOGS, "rollouts", "checkpoints", "final")):
        raise ValueError(f"{run_dir}: expected a new or empty run folder, found a run in it (--resume goes on with it)")
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: expected a run folder, found a file")


WRITER = "writer.json"
WRITER_DEAD_S = 180.0
"""A writer on another machine without a heartbeat for so long is taken for dead. More than the
clocks of machines differ."""


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Inside, no other process writes to the run folder. Raises ValueError, with host and process
    of the other, where one does already.

    Its file is locked and touched. On the same machine the lock falls with its process, and the
    next one takes over at once. Another machine may not see the lock: there the next one waits
    until it sees a heartbeat, or none for `WRITER_DEAD_S`.
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
    """Raises ValueError if a process of another machine took this one for dead and goes on with its
    run."""
    writer = _writer(run_dir / WRITER)
    if not _is_ours(writer):
        raise ValueError(f"{run_dir}: expected to be its only writer, found {_name(writer)}")


def heartbeat(path: Path, every_s: float) -> threading.Event:
    """Touches the file from a thread, until the event is set or the file is gone."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(every_s):
            try:
                os.utime(path)
            except FileNotFoundError:
                return

    threading.Thread(target=touch, daemon=True).start()
    return ended


def _lock_writer(path: Path) -> TextIO:
    """The file, open and locked. Raises ValueError if its writer lives."""
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            writer, can_lock = _writer(path), True
            refusal = ValueError(f"{path.parent}: expected no other writer, found {_name(writer)}")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise refusal from None
            except OSError:  # a file system without locks: heartbeats only
                can_lock = False
            if writer and not (can_lock and writer["host"] == platform.node()):
                beat, started = path.stat().st_mtime, time.monotonic()
                while max(time.time() - beat, time.monotonic() - started) < WRITER_DEAD_S:
                    time.sleep(WRITER_DEAD_S / 180)
                    if path.stat().st_mtime != beat:
                        raise refusal
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                stack.pop_all()
                return file
        # Its last writer has just removed it.


def _writer(path: Path) -> dict:
    """host, process and since when; empty if there is none, or it has only begun."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _name(writer: dict) -> str:
    said = "process {process} on {host}, since {since}"
    return said.format(**writer) if writer else "another process"


def _is_ours(writer: dict) -> bool:
    return (writer.get("host"), writer.get("process")) == (platform.node(), os.getpid())


def start_run(run_dir: Path, config: dict) -> None:
    """Makes the folder and writes config.json."""
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    _replace(run_dir / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def log_start(run_dir: Path, step: int, num_ranks: int) -> None:
    """Appends to starts.jsonl what runs where: a line for the first start, one for each time the run was resumed."""
    path = run_dir / "starts.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[:2] if path.exists() else ()  # not what was cut off
    line = to_json({"step": step} | describe_start(num_ranks)) + "\n"
    _replace(path, b"".join((*whole, line.encode())))


def describe_start(num_ranks: int) -> dict:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": _commit(),
        "ranks": num_ranks,
        "machine": {
            "system": platform.platform(terse=True), "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), "gpus": gpus,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
    }


def _commit() -> str:
    """Of this code, with "-dirty" where it was changed since; empty where it is not under git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def saved_config(run_dir: Path) -> dict:
    """The settings of the run in the folder, empty if there is none. Raises ValueError if they cannot be read."""
    path = run_dir / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: expected the settings of a run ({error})") from None


def rewind(run_dir: Path, num_steps: int) -> None:
    """Takes the logs back to what they were after `num_steps` steps. Raises ValueError if a step
    before that is not there, or twice."""
    for name in LOGS:
        path = run_dir / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []  # of bytes: an id may hold U+2028
        steps = [_step_of(line) for line in lines]
        kept = [step for step in steps if step < num_steps]
        if kept != list(range(num_steps)):
            doubled = sorted({step for step in kept if kept.count(step) > 1})
            said = f"{path}: expected a line for each of {num_steps} steps, found {len(kept)}"
            if doubled:
                said += (f"; two processes have written steps {', '.join(map(str, doubled))}: keep "
                         f"the first line of each step in {', '.join(LOGS)}, then --resume")
            raise ValueError(said)
        _replace(path, b"".join(line for line, step in zip(lines, steps) if step < num_steps))
    for path in (run_dir / "rollouts").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) >= num_steps:
            path.unlink()


def _step_of(line: bytes) -> float:
    """Infinity for a line that was cut off: it is of a step to be redone."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def read_log(path: Path) -> list[dict]:
    """Rows of a JSONL file that may still be written to, or whose writer was stopped: a last line
    that was cut off is left out, as are zeros that a power cut left; a missing file is empty.
    Raises ValueError for any other line that is no JSON object, naming file and line."""
    rows = []
    content = path.read_bytes() if path.exists() else b""
    lines = content.rstrip(b"\0\r\n ").split(b"\n")
    for number, line in enumerate(lines, start=1):
        line = line.strip(b"\0\r ")
        try:
            row = json.loads(line.decode()) if line else None
        except ValueError as error:
            if number == len(lines) and (rows or not content.endswith(b"\n")):
                break  # a file of nothing else is no log
            raise ValueError(f"{path} line {number}: expected a JSON object ({error})") from None
        if row is not None and not isinstance(row, dict):
            got = type(row).__name__
            raise ValueError(f"{path} line {number}: expected a JSON object, got {got}")
        rows += [row] if row is not None else []
    return rows


def _replace(path: Path, content: bytes) -> None:
    """Writes the whole content or, if stopped on the way, nothing."""
    new = path.with_name(f"{path.name}.unfinished")
    new.write_bytes(content)
    new.replace(path)


# ---------------------------------------------------------------------------------------------------------------- pictures

SHOWN_GROUPS = 16
"""Groups of a step, the first ones, of which thumbnails are kept and the report page shows the captions."""
THUMBNAIL_SIZE = 256
"""Longest side in pixels; some 8 kB as WebP."""


def thumbnail_file(source: Path, id: str) -> Path:
    """Where the thumbnail of the image `id` lies: in a run folder's thumbnails/, or beside an evaluation's NAME.jsonl, in
    NAME.thumbnails/. Ids are any text: what is no plain name is told apart by its hash."""
    folder = source.with_suffix(".thumbnails") if source.suffix == ".jsonl" else source / "thumbnails"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", id)[:60]
    return folder / f"{plain}-{hashlib.sha256(id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}.webp"


def keep_thumbnail(source: Path, id: str, open_image: Callable[[], Image.Image]) -> None:
    """Writes the thumbnail of the image `id`, unless it is there: `source` is a run's folder or an evaluation's file."""
    path = thumbnail_file(source, id)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".unfinished")
        picture = open_image()
        picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        picture.save(new, format="WEBP", quality=80)
        new.replace(path)


# -------------------------------------------------------------------------------------------------------------- every step


def log_step(run_dir: Path, step: int, metrics: dict[str, float], audit: dict, timing: dict[str, float],
             rollouts: list[dict]) -> str:
    """Appends the step's metrics, audit and timing, writes its rollouts, and returns the console lines of the step."""
    with (run_dir / "rollouts" / f"step_{step:06d}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rollouts)
    for name, row in zip(LOGS, (metrics, audit, timing), strict=True):
        with (run_dir / name).open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step} | row) + "\n")
    shown = [one.key for name in LOGS for one in METRICS[name] if one.on_console]
    lines = [f"step {step:4d}  " + _numbers(metrics | timing, shown)]
    if "probe_accuracy" in audit:
        lines.append("    audit  " + _numbers(audit, PROBE_LINE))
        lines += [f"    reward {row['reward']:.2f}  {row['id']}: {row['caption'][:300]!r}" for row in rollouts[:1]]
    return "\n".join(lines)


def _numbers(row: dict, keys: Sequence[str]) -> str:
    return "  ".join(f"{key} {row[key]:.3f}" for key in keys if key in row)


def to_json(row: dict) -> str:
    """One line of JSON that every reader accepts: a number that was not measured is null, never NaN."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False)


# ------------------------------------------------------------------------------------------------------------- TensorBoard

TENSORBOARD_ROLLOUTS = 2
"""Groups that TensorBoard gets, image and captions, whenever the audit looks at the probe set and at the first step."""


def open_tensorboard(run_dir: Path, first_step: int) -> "SummaryWriter":
    """Steps from `first_step` on, which a killed run may have written, are hidden by what is written now."""
    from torch.utils.tensorboard import SummaryWriter  # here: most runs do not need it

    return SummaryWriter(run_dir / "tensorboard", purge_step=first_step)


def log_tensorboard(writer: "SummaryWriter", run_dir: Path, step: int, metrics: dict[str, float], audit: dict,
                    timing: dict[str, float], rollouts: list[dict]) -> None:
    """The step's numbers, and now and then a few groups: image, captions and rewards. What was not measured is left out."""
    for group, row in (("metrics", metrics), ("audit", audit), ("timing", timing)):
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                writer.add_scalar(f"{group}/{key}", value, step)
    if step == 0 or "probe_accuracy" in audit:
        for place, id in enumerate(list(dict.fromkeys(row["id"] for row in rollouts))[:TENSORBOARD_ROLLOUTS]):
            picture = thumbnail_file(run_dir, id)
            if picture.exists():
                writer.add_image(f"image/{place}", np.array(Image.open(picture).convert("RGB")), step, dataformats="HWC")
            # Indented by four: Markdown shows the words as they are, whatever the policy wrote.
            group = [row for row in rollouts if row["id"] == id]
            captions = [f"    reward {row['reward']:.2f}  {' '.join(row['caption'].split())}" for row in group]
            writer.add_text(f"captions/{place}", "\n".join([f"    {id}", *captions]), step)
    writer.flush()


if __name__ == "__main__":
    from grpo.config import run_program
    from grpo.page import main

    run_program(main, sys.argv[1:])
