"""From scored questions to the numbers of a table: means over questions, intervals over images, differences.

evaluate.py, the report page and the demo all print these. So they say the same of the same rows. A
row is a caption as evaluate.py writes it: `id` of its image, `caption`, `questions`, each with
`id`, `family` and `score`.
"""

import math
from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000
"""Draws of a bootstrap. With so many the ends of the interval vary by a fiftieth of its width."""


def question_scores(rows: Sequence[dict]) -> dict[str, dict[str, tuple[str, float]]]:
    """image id -> question id -> (family, mean score over the captions), of what could be asked."""
    found: dict[str, dict[str, tuple[str, list[float]]]] = {}
    for row in rows:
        for question in row["questions"]:
            if question["score"] is not None:
                scores = found.setdefault(row["id"], {}).setdefault(question["id"], (question["family"], []))[1]
                scores.append(question["score"])
    return {image: {id: (family, sum(s) / len(s)) for id, (family, s) in group.items()} for image, group in found.items()}


def interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Bootstrap 95% interval of sum(sums) / sum(counts) over images. An image that is drawn brings
    its sum and its count along. The draws are always the same, so the same rows give the same
    numbers.
    """
    rng = np.random.default_rng(0)
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts)
    at_a_time = max(1, 1_000_000 // len(sums))
    means = []
    for start in range(0, NUM_RESAMPLES, at_a_time):
        drawn = rng.integers(len(sums), size=(min(at_a_time, NUM_RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def summarize(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Per family and over "all"; NaN where nothing was measured.

    accuracy, low, high          mean score over questions, with its interval
    best                         the same with each image's best caption
    images, questions            their numbers
    unparsed, abstained, right   shares of the answers
    cut                          share of the captions that were cut off
    failed                       questions that could not be scored; they count nowhere else
    words, tokens                per caption
    """
    scores = question_scores(rows)
    by_image: dict[str, list[dict]] = {}
    for row in rows:
        by_image.setdefault(row["id"], []).append(row)
    families = sorted({question["family"] for row in rows for question in row["questions"]})
    table = {}
    for family in [*families, "all"] if families != ["all"] else ["all"]:
        def belongs(name: str, family: str = family) -> bool:
            return family in ("all", name)

        asked = [q for row in rows for q in row["questions"] if belongs(q["family"])]
        answered = [q for q in asked if q["score"] is not None]
        images = [[score for name, score in group.values() if belongs(name)] for group in scores.values()]
        images = [group for group in images if group]
        sums, counts = [sum(group) for group in images], [len(group) for group in images]
        best = []
        for group in by_image.values():
            found = [
                [q["score"] for q in row["questions"] if belongs(q["family"]) and q["score"] is not None] for row in group
            ]
            if found := [scored for scored in found if scored]:
                best.append(max((sum(scored) / len(scored), len(scored)) for scored in found))
        told = [row for row in rows if any(belongs(q["family"]) for q in row["questions"]) and "error" not in row]
        low, high = interval(sums, counts) if images else (math.nan, math.nan)
        table[family] = {
            "accuracy": _share(sum(sums), sum(counts)), "low": low, "high": high,
            "best": _share(sum(mean * number for mean, number in best), sum(number for _, number in best)),
            "images": len(images), "questions": sum(counts),
            "unparsed": _share(sum(q["unparsed"] for q in answered), len(answered)),
            "abstained": _share(sum(q["abstain"] is not None and q["chosen"] == q["abstain"] for q in answered), len(answered)),
            "right": _share(sum(bool(q["correct"]) for q in answered), len(answered)),
            "failed": len({q["id"] for q in asked} - {q["id"] for q in answered}),
            "words": _share(sum(len(row["caption"].split()) for row in told), len(told)),
            "tokens": _share(sum(row.get("tokens", math.nan) for row in told), len(told)),
            "cut": _share(sum(row.get("finish_reason") == "length" for row in told), len(told)),
        }
    return table


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def paired_difference(rows: Sequence[dict], others: Sequence[dict], family: str = "all") -> dict[str, float]:
    """Mean score of `others` less that of `rows` on the family's questions that both answered, with its interval."""
    first, second = question_scores(rows), question_scores(others)
    differences = [
        [second[image][id][1] - score for id, (name, score) in group.items() if id in second[image] and family in ("all", name)]
        for image, group in first.items() if image in second
    ]
    differences = [group for group in differences if group]
    if not differences:
        return {"difference": math.nan, "low": math.nan, "high": math.nan, "questions": 0}
    sums, counts = [sum(group) for group in differences], [len(group) for group in differences]
    low, high = interval(sums, counts)
    return {"difference": sum(sums) / sum(counts), "low": low, "high": high, "questions": sum(counts)}
