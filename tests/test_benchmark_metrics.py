"""Metrics: the published values, hand arithmetic, and answers that ask for a free point."""

import json
from pathlib import Path

import pytest

from data.benchmarks.metrics import (
    anls,
    captionqa_abstain_credit,
    captionqa_offers_abstain,
    chartqapro,
    exact_match,
    relaxed_accuracy,
)
from data.benchmarks.released import released_score
from reward.style import length_reward

RELEASED = json.loads((Path(__file__).parent / "data" / "released_scores.json").read_text())["scores"]
KNOWN = json.loads((Path(__file__).parent / "data" / "known_answers.json").read_text())


@pytest.mark.parametrize(("target", "prediction", "expected"), KNOWN["relaxed_accuracy"])
def test_relaxed_accuracy_known(target, prediction, expected):
    assert relaxed_accuracy(prediction, target) is expected


@pytest.mark.parametrize(("golds", "prediction", "expected"), KNOWN["anls"])
def test_anls_known(golds, prediction, expected):
    assert anls(prediction, golds) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("answers", "prediction", "question_type", "flags", "expected"), KNOWN["chartqapro"])
def test_chartqapro_known(answers, prediction, question_type, flags, expected):
    assert chartqapro(prediction, answers, question_type, flags) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("num_choices", "expected"), KNOWN["captionqa_abstain_credit"])
def test_captionqa_credit_known(num_choices, expected):
    assert captionqa_abstain_credit(num_choices) == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "expected"), KNOWN["length_reward"])
def test_length_reward_known(tokens, expected):
    assert length_reward(tokens, 0, 2048, 3072) == expected


def test_tolerance_is_relative_to_the_target():
    assert relaxed_accuracy("95", "100")  # 5 / 100 = 0.05
    assert not relaxed_accuracy("100", "95")  # 5 / 95 = 0.0526, though it is 0.05 of the prediction
    assert not relaxed_accuracy("1000", "10") and not relaxed_accuracy("0.1", "10")  # no free factor of 100


@pytest.mark.parametrize(
    "prediction", ["", " ", "nan", "inf", "1e999", "[", "[[[[", "10,10", "None", "10 20", "%", "\x00", "1_0",
                   pytest.param("[0x" + "f" * 4000 + "]", id="long")]
)
def test_a_malformed_prediction_earns_nothing(prediction):
    assert not relaxed_accuracy(prediction, "10") and not exact_match(prediction, "10")
    assert chartqapro(prediction, ["10"], "Factoid", ["NO"]) < 1
    assert chartqapro(prediction, ["10"], "Factoid", ["YES"]) == 0


def test_an_equal_answer_may_have_other_case_and_space_around_it():
    assert exact_match(" Town hall\n", "town Hall ") and not exact_match("Townhall", "Town hall")
    assert exact_match("Caf\u00e9", "cafe\u0301") and not exact_match("cafe", "caf\u00e9")


def test_not_a_number_is_a_word():
    assert relaxed_accuracy("NaN", "nan") and not relaxed_accuracy("5", "inf") and not relaxed_accuracy("nan", "5")


@pytest.mark.parametrize("gold", ["", "  ", None])
def test_a_malformed_gold_raises(gold):
    for score in (lambda: relaxed_accuracy("x", gold), lambda: exact_match("x", gold), lambda: anls("x", ["y", gold]),
                  lambda: chartqapro("x", [gold], "Factoid", [])):
        with pytest.raises(ValueError, match="expected a gold answer in words, got"):
            score()
    for score in (lambda: anls("x", []), lambda: chartqapro("x", [], "Factoid", [])):
        with pytest.raises(ValueError, match="expected at least one gold answer, found none"):
            score()


def test_an_empty_item_of_a_list_is_an_answer_that_nobody_gives():
    """The row had passed when it was read, and ended the evaluation at the first reply with two items."""
    for kind, flag in (("Fact Checking", "NO"), ("Factoid", "YES")):
        assert chartqapro("[red, blue]", ["[red, ]"], kind, [flag]) == chartqapro("red", ["[red, ]"], kind, [flag]) == 0.5
    assert chartqapro("red", ["['']"], "Fact Checking", []) == 0
    assert released_score("blue", ("['red', '']",), "info") == 0 and released_score("red", ("['red', '']",), "info") == 1


def test_chartqapro_lists_by_hand():
    # 2010 is right, 2013 is not 2014 (a year); as plain numbers both are within 5%
    assert chartqapro("[2010, 2013]", ["[2010, 2014]"], "Factoid", ["YES"]) == 0.5
    assert chartqapro("[2010, 2013]", ["[2010, 2014]"], "Factoid", ["NO"]) == 1
    assert chartqapro("[2010, 2013]", ["[2010, 2014]"], "Factoid", ["NO", "YES"]) == 0.5
    assert chartqapro("['Apple', 'Pear']", ["[Apple, Pear]"], "Factoid", ["NO"]) == 1  # quotes or not
    assert chartqapro("Apple", ["[Apple, Pear]"], "Factoid", ["NO"]) == 0.5  # one of two
    # a conversation: its last answer and last flag count
    assert chartqapro("2015", ["Yes", "2016"], "Conversational", ["NO", "YES"]) == 0
    assert chartqapro("2015", ["Yes", "2016"], "Conversational", ["YES", "NO"]) == 1
    assert chartqapro("abd", ["abc"], "Factoid", []) == pytest.approx(2 / 3)
    assert chartqapro("abd", ["abc"], "Multi Choice", []) == 0
    assert chartqapro("ab", ["ac"], "Factoid", []) == 0 and anls("ab", ["ac"]) == 0.5  # at the threshold itself
    assert chartqapro("a", ["%"], "Factoid", []) == 0


def brute_edits(a: str, b: str) -> int:
    """By the definition, without a table."""
    if not a or not b:
        return len(a) + len(b)
    return min(brute_edits(a[1:], b) + 1, brute_edits(a, b[1:]) + 1, brute_edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_anls_against_the_definition():
    words = ["", "a", "ab", "ba", "abc", "axc", "cab", "abcd", "bcda"]
    for prediction in words:
        for gold in words[1:]:
            similarity = 1 - brute_edits(prediction, gold) / max(len(prediction), len(gold))
            assert anls(prediction, [gold]) == (similarity if similarity >= 0.5 else 0), (prediction, gold)
    assert anls("abcd", ["xxxx", "abcx", "abc"]) == 0.75  # the best gold: 1 edit in 4


def test_captionqa_yes_no_rule_and_its_quirk():
    assert captionqa_offers_abstain("What color is it?", ["red", "blue"])
    assert not captionqa_offers_abstain("Is there a dog?", ["Yes", "No"])
    assert not captionqa_offers_abstain("Which holds?", ["No, it is not", "Yes, it is"])
    assert captionqa_offers_abstain("Isolated objects: which?", ["red", "blue"])  # begins with "is", not with "is "
    # as published: what only looks like a yes/no question cannot be abstained on
    assert not captionqa_offers_abstain("Is it red or blue?", ["red", "blue"])
    assert not captionqa_offers_abstain("Who is it?", ["the one with blue eyes", "the one with no hat"])


@pytest.mark.parametrize(("prediction", "golds", "rule", "expected"), RELEASED)
def test_the_releases_own_scores_known(prediction, golds, rule, expected):
    """Golds that are another prediction's hundredth, the same letters in another order, 5% of the answer: all as there."""
    assert released_score(prediction, tuple(golds), rule) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("prediction", "gold", "rule", "expected"), [
    ("0.12", "12", "char", 1), ("0.12", "12", "", 0), ("0.333", "1/3", "", 0), ("1, 2", "1, 2, 3", "", 0),
    ("x^2 + 2x + 1", "(x + 1)^2", "", 1), ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", "", 1), ("x^2", "x^3", "", 0),
    ("2001", "[2001, 2005]", "char", 1), ("beta", "['alpha', 'beta']", "char", 1), ("2002", "[2001]", "char", 1),
    ("gamma", "['alpha', 'beta']", "char", 0), ("beta", "['alpha', 'beta']", "", 0), ("x", "[]", "info", 0), ("x", "$", "", 1)])
def test_the_releases_own_scores_by_their_definition(prediction, gold, rule, expected):
    """A hundred times too small; not equal to six digits; a list that lacks one; formulas that are equal; lists that are
    written as text; a gold that is no expression."""
    assert released_score(prediction, (gold,), rule) == expected


@pytest.mark.parametrize("prediction", ["", " ", "\\frac{1}{0}", "1/0", "$", "\\text{}", ",", "and", "nan", "1e999", "(" * 50])
@pytest.mark.parametrize("rule", ["", "char", "info"])
def test_no_answer_breaks_the_releases_score(prediction, rule):
    assert released_score(prediction, ("12",), rule) == 0
