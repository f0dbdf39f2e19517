"""The logs of a run, a line per step, and the step's line on the console."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data.io import json_lines, write_whole
from grpo.config import TrainConfig
from grpo.distributed import print0, world_size

LOGS = ("metrics.jsonl", "audit.jsonl", "timing.jsonl")
"""Files with a line per step; tools/report/metrics.py defines every key."""

EVAL_LOG = "eval.jsonl"
"""The file with a line per evaluation on held-out images, by tools/held_out.py."""

ROLLOUTS = f"step_{'[0-9]' * 6}.jsonl"
"""Names of the files with a step's captions."""

CONSOLE = ("reward", "flat_groups", "length", "clip_share", "kl", "entropy", "seconds",
           "tokens_per_second")
"""Numbers of each step's line on the console."""

AUDIT_CONSOLE = ("probe_accuracy", "probe_other_image", "probe_no_caption",
                 "probe_shuffle_agreement", "split_half", "length_correlation")
"""Numbers of the line that follows after an audit."""


def log_step(run_dir: Path, step: int, metrics: dict[str, float], audit: dict,
             timing: dict[str, float], rollouts: list[dict],
             trackers: Sequence[Callable] = ()) -> str:
    """Appends the step's metrics, audit and timing, writes its rollouts, and returns its lines for
    the console. Trackers get these numbers, and rollouts at the first step and with each probe."""
    write_whole(run_dir / "rollouts" / f"step_{step:06d}.jsonl", json_lines(rollouts))
    for name, row in zip(LOGS, (metrics, audit, timing), strict=True):
        with (run_dir / name).open("ab") as file:
            file.writelines(json_lines([{"step": step} | row]))
    shown = rollouts if step == 0 or "probe_accuracy" in audit else []
    for tracker in trackers:
        tracker(step, finite_numbers(metrics=metrics, audit=audit, timing=timing), shown)
    lines = [f"step {step:4d}  " + _numbers(metrics | timing, CONSOLE)]
    if "probe_accuracy" in audit:
        lines.append("    audit  " + _numbers(audit, AUDIT_CONSOLE))
        for row in rollouts[:1]:
            start = row["caption"][:300]
            lines.append(f"    reward {row['reward']:.2f}  {row['id']}: {start!r}")
    return "\n".join(lines)


def finite_numbers(**logs: dict) -> dict[str, float]:
    """For trackers: metrics={"reward": 0.5} as {"metrics/reward": 0.5}, without lists and what was
    not measured."""
    return {f"{log}/{key}": value for log, row in logs.items() for key, value in row.items()
            if isinstance(value, int | float) and math.isfinite(value)}


def _numbers(row: dict, keys: Sequence[str]) -> str:
    return "  ".join(f"{key} {row[key]:.3f}" for key in keys if key in row)


def step_timing(phases: dict[str, float], started: float, num_tokens: float) -> dict[str, float]:
    """Seconds since the step's start (`time.perf_counter()`), and tokens per second and rank,
    beside the seconds of its phases."""
    seconds = time.perf_counter() - started
    rate = num_tokens / seconds / world_size()
    return phases | {"seconds": seconds, "tokens_per_second": rate}


def count_skipped(metrics: dict[str, float], num_skipped: int, step: int, batch: Sequence,
                  run_dir: Path, config: TrainConfig) -> int:
    """Consecutive steps that taught nothing, up to this one. Raises ValueError for
    `config.max_skipped` of them."""
    lack = ""
    if metrics["skipped"]:
        lack = "a finite gradient"
    elif (config.resample_flat or config.mask_truncated) and not metrics["teaching_captions"]:
        lack = "a group whose captions differ in reward"
        lack += ", one of them not cut off" if config.mask_truncated else ""
    if not lack:
        return 0
    ids = [example.id for example in batch]
    print0(f"    step {step} teaches nothing, it is without {lack}; images: {ids}")
    if num_skipped + 1 >= config.max_skipped:
        raise ValueError(
            f"{num_skipped + 1} steps in a row without {lack}; the last images: {ids}; "
            f"the checkpoints in {run_dir / 'checkpoints'} are from before"
        )
    return num_skipped + 1


def alarms(metrics: dict[str, float]) -> list[str]:
    """Advice for each number that has left the range in which runs go well; the limits are ours."""
    rules = [
        ("ratio", abs(metrics["ratio"] - 1) > 0.05,
         "sampler and trainer disagree, or steps are long: leave out --sampler-logprobs, or lower "
         "--learning-rate or --inner-epochs"),
        ("sampler_gap", metrics["sampler_gap"] > 0.1,
         "nats between the sampler and the policy that is trained: look at its precision"),
        ("kl", metrics.get("kl", 0.0) > 0.5,
         "far from the initial policy: raise --kl-coef or lower --learning-rate"),
        ("truncated_share", metrics["truncated_share"] > 0.5,
         "most captions are cut off: raise --max-new-tokens or give a --length-weight"),
        ("flat_groups", metrics["flat_groups"] > 0.9,
         "hardly any group teaches: raise --num-questions or change the data"),
    ]
    return [f"{key} {metrics[key]:.3f}: {advice}" for key, is_out, advice in rules if is_out]
