"""What a run writes while it goes: config.json, metrics.jsonl, audit.jsonl, rollouts/step_000012.jsonl."""

import json
import math
from collections.abc import Sequence
from pathlib import Path


def check_run_dir(run_dir: Path) -> None:
    """Raises ValueError where a run is already: nothing is overwritten."""
    if (run_dir / "config.json").exists():
        raise ValueError(f"{run_dir}: expected a new or empty run folder, found a run in it")
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: expected a run folder, found a file")


def start_run(run_dir: Path, config: dict) -> None:
    """Makes the folder and writes config.json."""
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def log_step(run_dir: Path, step: int, metrics: dict[str, float], audit: dict, rollouts: list[dict]) -> str:
    """Appends the step's metrics and audit, writes its rollouts, and returns the console lines of the step."""
    for name, row in (("metrics", metrics), ("audit", audit)):
        with (run_dir / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step} | row) + "\n")
    with (run_dir / "rollouts" / f"step_{step:06d}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rollouts)
    shown = ("reward", "kl", "ratio", "clip_share", "entropy", "length", "seconds")
    lines = [f"step {step:4d}  " + _numbers(metrics, shown)]
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
