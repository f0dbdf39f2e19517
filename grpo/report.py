"""What a run writes while it goes: config.json, metrics.jsonl, audit.jsonl, timing.jsonl, rollouts/step_000012.jsonl.

Metrics, audit and rollouts are functions of the settings: a run that was killed and resumed writes the same bytes as one
that was not. What a clock says stands apart, in timing.jsonl.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

LOGS = ("metrics.jsonl", "audit.jsonl", "timing.jsonl")


def check_run_dir(run_dir: Path) -> None:
    """Raises ValueError where a run is already: nothing is overwritten."""
    if (run_dir / "config.json").exists():
        raise ValueError(f"{run_dir}: expected a new or empty run folder, found a run in it (--resume goes on with it)")
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: expected a run folder, found a file")


def start_run(run_dir: Path, config: dict) -> None:
    """Makes the folder and writes config.json."""
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    _replace(run_dir / "config.json", json.dumps(config, indent=2) + "\n")


def saved_config(run_dir: Path) -> dict:
    """The settings of the run in the folder, empty if there is none. Raises ValueError if they cannot be read."""
    path = run_dir / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: expected the settings of a run ({error})") from None


def rewind(run_dir: Path, num_steps: int) -> None:
    """Takes the logs back to what they were after `num_steps` steps. Raises ValueError if a step before that is not there."""
    for name in LOGS:
        path = run_dir / name
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = lines[:num_steps]
        steps = [json.loads(line)["step"] for line in kept if line.endswith("\n")]  # a line cut off is of a step to be redone
        if steps != list(range(num_steps)):
            raise ValueError(f"{path}: expected a line for each of {num_steps} steps, found {len(steps)}")
        _replace(path, "".join(kept))
    for path in (run_dir / "rollouts").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) >= num_steps:
            path.unlink()


def _replace(path: Path, text: str) -> None:
    """Writes the whole text or, if stopped on the way, nothing."""
    new = path.with_name(f"{path.name}.unfinished")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def log_step(run_dir: Path, step: int, metrics: dict[str, float], audit: dict, timing: dict[str, float],
             rollouts: list[dict]) -> str:
    """Appends the step's metrics, audit and timing, writes its rollouts, and returns the console lines of the step."""
    with (run_dir / "rollouts" / f"step_{step:06d}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rollouts)
    for name, row in zip(LOGS, (metrics, audit, timing), strict=True):
        with (run_dir / name).open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step} | row) + "\n")
    shown = ("reward", "kl", "ratio", "clip_share", "entropy", "length", "seconds", "tokens_per_second", "idle_share")
    lines = [f"step {step:4d}  " + _numbers(metrics | timing, shown)]
    if "probe_accuracy" in audit:
        shown = ("probe_accuracy", "probe_other_image", "probe_no_caption", "probe_shuffle_agreement", "split_half",
                 "length_correlation")
        lines.append("    audit  " + _numbers(audit, shown))
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
