"""Published scores beside this run's, and what keeps the two from being compared.

A score depends on the benchmark's rows, on the model that answers (the judge) and on the metric.
Only where all three are the same does the last column of the table say so. Prompts are ours and so
always another, unless `--words-prompt` has theirs: see docs/formats.md for each benchmark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.benchmarks.benchmark import Benchmark
from data.benchmarks.released import ReleasedQuestion
from tools.stats import by_image, completeness, markdown, precision

OWN_FILES, PUBLIC_FILES = "CapRL's own file", "the public file"


@dataclass(frozen=True)
class PublishedTable:
    source: str
    columns: tuple[tuple[str, str], ...]
    """Kind of benchmark and metric."""
    scores: dict[str, tuple[float, ...]]
    """In percent, by captioner."""
    files: str
    """OWN_FILES, PUBLIC_FILES, or in words what was measured that we cannot have."""
    judge: str = ""
    """Empty where it could not be learnt."""
    num_captions: int = 0
    """Captions of an image that a score is the mean over; 0 where that is no part of its
    definition."""


PUBLISHED = (
    PublishedTable(
        "arXiv 2509.22647, Table 3",
        tuple((kind, "release's") for kind in ("chartqa", "chartqapro", "infovqa", "mmstar",
                                               "seed")),
        {
            "Qwen2.5-VL-3B": (65.6, 27.1, 40.2, 46.4, 64.1),
            "Qwen2.5-VL-72B": (80.2, 38.0, 60.8, 55.0, 69.3),
            "UnifiedReward as judge, 3B": (54.9, 25.1, 33.6, 45.4, 61.2),
            "Qwen2.5-VL as judge, 3B": (71.4, 34.2, 49.3, 47.7, 64.5),
            "CapRL-3B": (80.5, 39.9, 64.8, 55.0, 70.6),
        },
        OWN_FILES, "internlm/CapRL-Eval-3B", num_captions=4,  # README and script of its release
    ),
    PublishedTable(
        "github InternLM/CapRL, eval_results",
        (("charxiv", "release's"), ("chartqapro", "release's")),
        {"CapRL-3B, step 1800": (32.55, 39.96)}, OWN_FILES, "internlm/CapRL-Eval-3B",
        num_captions=4,
    ),
    PublishedTable(
        "captionqa.github.io, 19 November 2025", (("captionqa", "score"),),
        {"GPT-5": (90.28,), "Qwen3-VL-4B": (86.01,), "Qwen2.5-VL-72B": (79.12,),
         "Qwen2.5-VL-7B": (75.31,), "LLaVA-1.5-7B": (46.96,)},
        "all 33,027 questions, of which a part is public", "Qwen/Qwen2.5-72B-Instruct",
    ),
    PublishedTable(
        "arXiv 2605.07394", (("captionqa", "score"),),
        {"CapRL-3B": (82.6,), "BalCapRL-3B": (75.0,), "BalCapRL-7B": (79.1,),
         "RubiCap-7B": (76.0,), "LLaVA-1.5-7B": (46.4,)},
        "not known which questions",
    ),
    PublishedTable(
        "github liuzhipenggg/CAPEval, leaderboard of 30 July 2026",
        (("capeval", "completeness"), ("capeval", "precision")),
        {"Gemini-3.1-Pro": (80.2, 82.5), "GPT-5.5": (72.8, 79.0), "Qwen3-VL-8B": (63.2, 83.5),
         "Qwen3-VL-4B": (60.2, 81.1), "InternVL3.5-8B": (46.5, 72.6)},
        PUBLIC_FILES, "Qwen/Qwen2.5-72B-Instruct",
    ),
)


def judge_name(config: Any) -> str:
    """Of an evaluation's settings: the verifier, by its name where a server has it."""
    name = getattr(config, "verifier_name", "").partition("=")[0]
    return name or getattr(config, "verifier", "none, it looks")


def published_table(benchmarks: Sequence[Benchmark], rows: dict[tuple[str, str], list[dict]],
                    tables: dict[tuple[str, str], dict[str, dict[str, float]]], judge: str,
                    is_limited: bool) -> str:
    """As Markdown, this run's scores and the published ones of its benchmarks; empty if there are
    none. rows, tables: see tools/tables.py; judge: the model that answered; is_limited: it was
    asked about the first pictures only."""
    lines: list[list] = []
    for benchmark in benchmarks:
        own = [(key, table["all"]) for key, table in tables.items() if key[0] == benchmark.name]
        groups = [by_image(rows[key]).values() for key, _ in own]
        num_captions = max(len(group) for of_captioner in groups for group in of_captioner)
        is_part = is_limited or bool(benchmark.refused) or any(row["failed"] for _, row in own)
        columns = [(metric, table, place) for table in PUBLISHED
                   for place, (kind, metric) in enumerate(table.columns)
                   if kind == benchmark.kind.removesuffix("-script")]
        for metric in dict.fromkeys(metric for metric, _, _ in columns):
            is_measured = any(not math.isnan(_percent(row, metric)) for _, row in own)
            shown = metric if is_measured else "score"
            lines += [[*key, f"{_percent(row, shown):.1f}".removeprefix("nan"), shown, judge,
                       "this run", ""] for key, row in own]
            for table, place in (rest for of_metric, *rest in columns if of_metric == metric):
                differing = [] if is_measured else ["metric"]
                if is_measured and table.num_captions not in (0, num_captions):
                    differing = [f"metric (mean over {table.num_captions} captions)"]
                differing = differences(table, benchmark, judge, is_part) + differing
                lines += [[benchmark.name, captioner, scores[place], metric, table.judge,
                           table.source, ", ".join(differing) or "same"]
                          for captioner, scores in table.scores.items()]
    header = "benchmark | captioner | percent: | metric | judge | source | beside this run"
    return markdown(header, lines) if lines else ""


def differences(table: PublishedTable, benchmark: Benchmark, judge: str,
                is_part: bool) -> list[str]:
    """Which of benchmark and judge differ or are not known, and how. is_part: not all of the
    benchmark's rows have a score here."""
    items = [item for picture in benchmark.pictures for item in picture.items]
    is_own = all(isinstance(item.question, ReleasedQuestion) for item in items)
    differing = []
    if table.files not in (OWN_FILES if is_own else "", PUBLIC_FILES):
        differing.append(f"benchmark ({table.files})")
    elif is_part:
        differing.append("benchmark (a part of it here)")
    if not table.judge:
        differing.append("judge (not known)")
    elif judge.rpartition("/")[2] != table.judge.rpartition("/")[2]:
        differing.append("judge")
    return differing


def _percent(row: dict[str, float], metric: str) -> float:
    values = {"score": row["accuracy"], "release's": row["released"],
              "completeness": completeness(row), "precision": precision(row)}
    return 100 * values[metric]
