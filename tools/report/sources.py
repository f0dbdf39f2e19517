"""What a page shows: a run's folder, or an evaluation's file, read."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from data.io import short
from data.jsonl import check_form, filled, read_log
from grpo.log import EVAL_LOG, LOGS, ROLLOUTS
from grpo.run_dir import saved_config
from tools.stats import bootstrap_interval, by_image
from tools.thumbnails import SHOWN_GROUPS

MAX_STEPS = 200
"""Steps whose captions are read: more would take minutes and fit no page."""

HELD_OUT = "held_out_accuracy"
"""Our key for the accuracy of EVAL_LOG: metrics.jsonl has one of the step's own images."""

Series = dict[int, float | None]
"""step -> value"""


@dataclass(frozen=True)
class Source:
    """A run or an evaluation."""

    name: str
    path: Path
    """The run's folder or the evaluation's file."""
    groups: list[tuple[int | None, list[dict]]]
    """(step, rows of one image), in the order of the files; an evaluation has no steps."""
    num_steps: int = 0
    """How many the run has done."""
    config: dict | None = None
    """None for an evaluation."""
    starts: tuple[dict, ...] = ()
    series: dict[str, Series] | None = None
    """By key."""
    bands: dict[str, dict[int, tuple[float, float]]] | None = None
    """By key of a series: step -> its 95% interval, over images"""


def load_sources(path: Path) -> list[Source]:
    """The run, or each captioner of the evaluation. Raises ValueError if there is neither, or for a
    row that is no caption."""
    if path.is_dir():
        return [read_run(path)]
    if not path.is_file():
        raise ValueError(f"{path}: expected a run folder or a file of evaluate.py --out, "
                         "found nothing")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: expected at least one row, found none")
    num_benchmarks = len({row.get("benchmark") for row in rows})
    by_captioner: dict[str, list[dict]] = {}
    for number, row in enumerate(rows, start=1):
        # evaluate.py writes all of these; captions of a run's step can be looked at all the same.
        defaults = {"family": str(row.get("family", "all")),
                    **dict.fromkeys(("score", "correct", "abstain", "chosen"))}
        row["questions"] = [
            {**defaults, "id": f"{row['id']}:{n}", "unparsed": "chosen" not in question, **question}
            for n, question in enumerate(row["questions"])
        ]
        if num_benchmarks > 1:  # ids are unique in a benchmark, and so are families
            if "benchmark" not in row:
                raise ValueError(f"{path} row {number}: expected a benchmark, as other rows have "
                                 f"one, got {sorted(row)}")
            family = f"{row['benchmark']} {row.get('family', 'all')}"
            row |= {"id": f"{row['benchmark']}:{row['id']}", "family": family}
        by_captioner.setdefault(row.get("captioner", path.stem), []).append(row)
    return [
        Source(name if len(by_captioner) > 1 else path.stem, path,
               [(None, group) for group in by_image(part).values()])
        for name, part in by_captioner.items()
    ]


def read_run(run_dir: Path) -> Source:
    config = saved_config(run_dir)
    if "run_dir" not in config:  # a model's has no such setting
        raise ValueError(f"{run_dir}: expected a run folder with config.json of train.py, "
                         "found none")
    series: dict[str, Series] = {}
    for name in LOGS:
        for number, row in enumerate(read_log(run_dir / name)):
            if row.get("step") != number:  # a line is lost, or two processes have written
                raise ValueError(f"{run_dir / name} row {number + 1}: expected step {number}, "
                                 f"got {short(row.get('step'))}")
            for key, value in row.items():
                if key != "step" and (value is None or isinstance(value, int | float)):
                    is_number = value is not None and math.isfinite(value)
                    series.setdefault(key, {})[number] = value if is_number else None
    num_steps = len(series.get("reward", {}))
    evaluations = list(map(filled, read_log(run_dir / EVAL_LOG)))
    for number, row in enumerate(evaluations, start=1):
        numbers = dict.fromkeys(("accuracy", "low", "high"), NUMBER)
        check_form(f"{run_dir / EVAL_LOG} row {number}", row, {"step": (int, NoneType)} | numbers)
    held_out = [row for row in evaluations if {"step", "accuracy"} <= set(row)]
    if held_out:
        series[HELD_OUT] = {row["step"]: row["accuracy"] for row in held_out}
    files = [(int(path.stem.removeprefix("step_")), path)
             for path in sorted(run_dir.glob(f"rollouts/{ROLLOUTS}"))]
    files = [(step, path) for step, path in files if step < num_steps]
    groups, bands = [], {"accuracy": {}}
    bands[HELD_OUT] = {row["step"]: (row["low"], row["high"]) for row in held_out
                       if len(known(map(row.get, ("low", "high")))) == 2}
    for step, path in (files[place] for place in evenly(len(files), MAX_STEPS)):
        images = list(by_image(read_rows(path)).values())
        correct = [known(question.get("correct") for row in group for question in row["questions"])
                   for group in images]
        if any(correct):
            bands["accuracy"][step] = bootstrap_interval(correct)
        groups += [(step, group) for group in images[:SHOWN_GROUPS]]
    starts = tuple(map(filled, read_log(run_dir / "starts.jsonl")))
    for number, start in enumerate(starts, start=1):
        where = f"{run_dir / 'starts.jsonl'} row {number}"
        if not {"time", "step"} <= set(start):
            raise ValueError(f"{where}: expected a time and a step, got {short(start)}")
        machine = ({"gpus": ([str], NoneType)}, NoneType)
        check_form(where, start, {"commit": TEXT, "machine": machine, "versions": (dict, NoneType)})
    return Source(run_dir.resolve().name, run_dir, groups, num_steps, config, starts, series, bands)


TEXT, NUMBER, LIST = (str, NoneType), (int, float, NoneType), (list, NoneType)
ROW = {
    **dict.fromkeys(("benchmark", "captioner", "finish_reason"), TEXT),
    **dict.fromkeys(("reward", "accuracy", "advantage", "length", "tokens"), NUMBER),
    "parts": (dict, NoneType), "questions": LIST, "claims": LIST,
}
QUESTION = {
    **dict.fromkeys(("id", "family", "reply", "failure"), TEXT),
    **dict.fromkeys(("gold", "chosen", "source"), (int, NoneType)),
    **dict.fromkeys(("score", "released_score"), NUMBER),
    "options": LIST, "probs": ([(int, float)], NoneType), "correct": (bool, *NUMBER),
}
"""The forms of what is shown of a caption and of a question."""


def read_rows(path: Path) -> list[dict]:
    """Captions of a file, without nulls. Raises ValueError for a row that is none, naming file and
    row."""
    rows = list(map(filled, read_log(path)))
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        if not isinstance(row.get("id"), str) or not isinstance(row.get("caption"), str):
            raise ValueError(f"{where}: expected an id and a caption, got {sorted(row)}")
        check_form(where, row, ROW)
        for question in row.setdefault("questions", []):
            if not isinstance(question, dict) or not isinstance(question.get("question"), str):
                raise ValueError(f"{where}: expected questions as asked, got {short(question)}")
        row["questions"] = list(map(filled, row["questions"]))
        for question in row["questions"]:
            check_form(where, question, QUESTION)
    return rows


def evenly(count: int, at_most: int) -> list[int]:
    """`at_most` of the places 0 to count - 1, the first and the last among them: evenly(9, 3) is
    [0, 4, 8]."""
    if count <= at_most:
        return list(range(count))
    if at_most == 1:
        return [count - 1]
    return [round(place * (count - 1) / (at_most - 1)) for place in range(at_most)]


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
