"""From scored questions to the numbers of a table: means over questions, intervals over images,
differences.

evaluate.py, the report page and the demo all print these. So they say the same of the same rows. A
row is a caption as evaluate.py writes it: `id` of its image, `caption`, `questions`, each with
`id`, `family` and `score`.
"""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from reward.caprl import mean
from reward.style import empty_share
from tools.budgets import count_words

NUM_RESAMPLES = 2000
"""Draws of a bootstrap. With so many the ends of the interval vary by a fiftieth of its width."""

ANSWER_KINDS = ("right", "wrong", "abstained", "unparsed")

Means = dict[str, dict[str, float]]
"""image id -> question id -> mean score over the captions"""


def by_image(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """The rows of each image id."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def question_means(rows: Sequence[dict], family: str = "all", key: str = "score") -> Means:
    """Of the family's questions that could be asked; of all families, of "all". key: which score,
    where a question has two."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for question in _asked(row, family):
            if question.get(key) is not None:
                of_image = scores.setdefault(row["id"], {})
                of_image.setdefault(question["id"], []).append(question[key])
    return {
        image: {id: sum(given) / len(given) for id, given in group.items()}
        for image, group in scores.items()
    }


def _asked(row: dict, family: str) -> list[dict]:
    return [question for question in row["questions"] if family in ("all", question["family"])]


def bootstrap_interval(groups: Iterable[Iterable[float]]) -> tuple[float, float]:
    """Bootstrap 95% interval of the mean over the values of all groups. A group that is drawn
    brings all its values along. The draws are always the same, so the same rows give the same
    numbers. NaN where there is no value."""
    groups = [values for values in map(list, groups) if values]
    if not groups:
        return math.nan, math.nan
    sums, counts = np.array([(sum(values), len(values)) for values in groups], dtype=float).T
    rng, means = np.random.default_rng(0), []
    at_a_time = max(1, 1_000_000 // len(sums))
    for start in range(0, NUM_RESAMPLES, at_a_time):
        size = (min(at_a_time, NUM_RESAMPLES - start), len(sums))
        drawn = rng.integers(len(sums), size=size)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def summarize(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Per family and over "all"; NaN where nothing was measured.

    accuracy, low, high          mean score over questions, with its interval
    best                         the same with each image's best caption
    released                     of CapRL's own files, the mean score by its release's script
    images, questions            their numbers
    right, wrong, abstained, unparsed
                                 shares of the answers
    cut                          share of the captions that were cut off; NaN if a row does not say
    failed                       questions that could not be scored; they count nowhere else
    words, tokens                per caption
    empty                        mean share of a caption's sentences that say nothing of the
                                 picture: praise of itself, hedges, repeats (reward/style.py)
    """
    families = sorted({question["family"] for row in rows for question in row["questions"]})
    return {family: _summary(rows, family) for family in dict.fromkeys([*families, "all"])}


def _summary(rows: Sequence[dict], family: str) -> dict[str, float]:
    asked = [question for row in rows for question in _asked(row, family)]
    answered = [question for question in asked if question["score"] is not None]
    images = [list(group.values()) for group in question_means(rows, family).values()]
    best = []  # (mean, number of questions) of each image's best caption
    for group in by_image(rows).values():
        captions = [[question["score"] for question in _asked(row, family)
                     if question["score"] is not None] for row in group]
        best += sorted((mean(scores), len(scores)) for scores in captions if scores)[-1:]
    told = [row for row in rows if _asked(row, family) and "error" not in row]
    scores = [score for group in images for score in group]
    released = [score for group in question_means(rows, family, "released_score").values()
                for score in group.values()]
    low, high = bootstrap_interval(images)
    kinds = [_kind(question) for question in answered]
    return {
        "accuracy": mean(scores), "low": low, "high": high, "released": mean(released),
        "best": mean([score for score, count in best for _ in range(count)]),
        "images": len(images), "questions": len(scores),
        **{kind: mean([kind == other for other in kinds]) for kind in ANSWER_KINDS},
        "failed": len({question["id"] for question in asked}
                      - {question["id"] for question in answered}),
        "words": mean([count_words(row["caption"]) for row in told]),
        "tokens": mean([row.get("tokens", math.nan) for row in told]),
        "empty": mean([empty_share(row["caption"]) for row in told]),
        "cut": mean([row["finish_reason"] == "length" if "finish_reason" in row else math.nan
                     for row in told]),
    }


def _kind(question: dict) -> str:
    """Of an answer that could be scored."""
    if question["unparsed"]:
        return "unparsed"
    if question["abstain"] is not None and question["chosen"] == question["abstain"]:
        return "abstained"
    return "right" if question["correct"] else "wrong"


def completeness(summary: dict[str, float]) -> float:
    """CAPEval: share of the items on which the caption says something, right or wrong."""
    return summary["right"] + summary["wrong"]


def precision(summary: dict[str, float]) -> float:
    """CAPEval: share of these items that the caption has right; NaN where there are none."""
    said = completeness(summary)
    return summary["right"] / said if said else math.nan


def paired_difference(rows: Sequence[dict], others: Sequence[dict],
                      family: str = "all") -> dict[str, float]:
    """Mean score of `others` less that of `rows` on the family's questions that both answered, with
    its interval."""
    first, second = question_means(rows, family), question_means(others)
    groups = [
        [second[image][id] - score for id, score in group.items() if id in second[image]]
        for image, group in first.items() if image in second
    ]
    low, high = bootstrap_interval(groups)
    differences = [difference for group in groups for difference in group]
    return {"difference": mean(differences), "low": low, "high": high,
            "questions": len(differences)}


def markdown(header: str, rows: Iterable[Sequence]) -> str:
    """A table. header: the columns' names between bars; those of numbers end in a colon. A bar or a
    line's end in a cell, as a family's name may have them, would move its row's numbers."""
    names = header.split(" | ")
    lines = [[name.rstrip(":") for name in names],
             ["---:" if name.endswith(":") else "---" for name in names], *rows]
    cells = [[re.sub(r"\s*\n\s*", " ", str(cell)).replace("|", r"\|") for cell in line]
             for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
