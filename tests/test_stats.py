"""Means, intervals and differences of scored questions, by hand and by brute force."""

import math
import random

import numpy as np
import pytest

from data.benchmarks.benchmark import Benchmark
from tools.stats import bootstrap_interval, markdown, paired_difference, summarize
from tools.tables import format_table, report


def question(score: float | None, id: str = "0", family: str = "a", **changes) -> dict:
    return {"id": id, "family": family, "score": score, "correct": score == 1, "unparsed": False, "abstain": None,
            "chosen": 0} | changes


def row(id: str, scores: list, family: str = "a", words: int = 3, **changes) -> dict:
    questions = [question(score, f"{id}:{n}", family) for n, score in enumerate(scores)]
    return {"id": id, "caption": "w " * words, "questions": questions, "tokens": words, "finish_reason": "stop"} | changes


def test_summary_hand_computed():
    rows = [row("1", [1.0, 1.0]), row("1", [0.0, 1.0]), row("2", [0.0]), row("2", [None]), row("3", [0.5], "b", 9)]
    rows.append(row("4", [None], "b", 9))
    table = summarize(rows)
    # image 1: questions 0.5 and 1.0; image 2: 0.0 (what could not be asked is no zero); image 3: 0.5
    assert table["a"]["accuracy"] == pytest.approx(1.5 / 3) and table["b"]["accuracy"] == 0.5
    assert table["all"]["accuracy"] == pytest.approx(2 / 4)  # every question counts once
    assert table["all"]["images"] == 3 and table["all"]["questions"] == 4 and table["all"]["failed"] == 1
    assert table["a"]["best"] == pytest.approx(2 / 3)  # image 1's better caption has 2 of 2
    assert table["a"]["words"] == 3 and table["all"]["words"] == pytest.approx((4 * 3 + 2 * 9) / 6)
    assert (table["b"]["low"], table["b"]["high"]) == (0.5, 0.5) and "failed" in format_table({("d", "c"): table})
    assert "| d | c | a | 2 | 3 | 0.500 |" in format_table({("d", "c"): table})
    cut, unread = row("1", [1.0], finish_reason="length", tokens=9), row("2", [0.0], error="no picture", words=0, tokens=0)
    assert table["a"]["cut"] == 0 and summarize([*rows, cut])["a"]["cut"] == pytest.approx(1 / 5)
    assert summarize([cut, unread])["a"]["words"] == 3 and summarize([cut, unread])["a"]["tokens"] == 9  # no caption: no words
    untold = summarize([{key: value for key, value in row("1", [1.0]).items() if key not in ("tokens", "finish_reason")}])["a"]
    assert math.isnan(untold["cut"]) and math.isnan(untold["tokens"])  # captions of others do not say how they ended
    nothing = summarize([row("1", [None])])["a"]
    assert math.isnan(nothing["accuracy"]) and nothing["failed"] == 1 and nothing["questions"] == 0


def test_what_was_not_measured_has_no_interval_in_the_tables():
    rows = {("d", "c"): [row("1", [None]), row("2", [1.0], "b")], ("d", "other"): [row("1", [1.0]), row("2", [None], "b")]}
    text = report([], rows, {key: summarize(group) for key, group in rows.items()})
    assert "| d | c | a | 0 | 0 |  |  |" in text and "| d | other | c | 0 |  |  |" in text and "nan" not in text
    assert "| d | c | c |" not in text  # nobody is compared with himself


def test_a_report_has_the_shares_of_a_benchmark_and_of_no_other():
    rows = {("q", "c"): [row("1", [1.0])], ("d", "c"): [row("1", [0.5])]}
    tables = {key: summarize(group) for key, group in rows.items()}
    kinds = [Benchmark("q", "captionqa", "captionqa", [], []), Benchmark("d", "mmbench", "choice", [], [])]
    text = report(kinds, rows, tables)
    assert "Paired" not in text and "CAPEval, in percent" not in text
    shares = text.partition("CaptionQA:\n\n")[2].split("\n\n")[0].splitlines()
    assert len(shares) == 3 and shares[2].startswith("| c | 1.000 |")


def test_bootstrap_interval_is_that_of_the_mean():
    low, high = bootstrap_interval([[i % 2] for i in range(400)])  # standard error 0.5 / 20 = 0.025
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_bootstrap_resamples_images_not_questions():
    """100 images of 50 questions, all alike within an image: 5,000 questions, but the interval of 100 independent ones."""
    low, high = bootstrap_interval([[i % 2] * 50 for i in range(100)])
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(100), abs=0.025)


def test_paired_difference_by_hand_and_by_brute_force():
    first = [row("1", [1.0, 0.0]), row("2", [0.0]), row("3", [1.0])]
    second = [row("1", [1.0, 1.0]), row("2", [None]), row("3", [1.0]), row("4", [0.0])]
    found = paired_difference(first, second)
    assert found["questions"] == 3 and found["difference"] == pytest.approx(1 / 3)  # only what both answered
    assert math.isnan(paired_difference([row("1", [1.0])], [row("2", [1.0])])["difference"])
    rng = random.Random(0)
    pairs = [(rng.random(), rng.random()) for _ in range(200)]
    a = [row(str(n), [x]) for n, (x, _) in enumerate(pairs)]
    b = [row(str(n), [min(1.0, x + 0.1)]) for n, (x, _) in enumerate(pairs)]  # noisy scores, hardly noisy difference
    found = paired_difference(a, b)
    assert found["difference"] == pytest.approx(np.mean([min(1.0, x + 0.1) - x for x, _ in pairs]))
    assert found["high"] - found["low"] < 0.01 < summarize(a)["all"]["high"] - summarize(a)["all"]["low"]


def test_a_bar_or_a_new_line_in_a_name_moves_no_number():
    rows = [["a|b", "charts | maps\n  new", "0.5"]]
    assert markdown("captioner | family | score:", rows).splitlines()[2:] == [r"| a\|b | charts \| maps new | 0.5 |"]
