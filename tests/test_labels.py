# ruff: noqa: RUF001 - Chinese text has its own punctuation
"""Answer keys: which choice an answer in a file means."""

import pytest

from data.examples import Question
from data.labels import find_answer


@pytest.mark.parametrize(
    "answer, choices, want",
    [
        ("C", ("x", "y", "z"), 2), ("C)", ("x", "y", "z"), 2), ("**C) z**", ("x", "y", "z"), 2), ("(B) y", ("x", "y"), 1),
        ("b", ("a", "b"), 1), ("y.", ("x", "Y"), 1), ("A. Lincoln", ("B. Obama", "A. Lincoln"), 1),
        ("A man", ("A dog", "A man"), 1),
        ("b", ("x", "y"), 1), ("(b) y", ("x", "y"), 1), ("（Ｂ）", ("x", "y"), 1),
        ("cafe\u0301", ("x", "caf\u00e9"), 1),
        ("FF", ("Ff", "FF"), 1), ("6\"", ("6'", '6"'), 1), ("B) FF", ("Ff", "FF"), 1),
        ("5!", ("5", "5!"), 1),
        ("B", ("A", "B"), 1), ("yes", ("yes", "no"), 0), ("B、乙", ("甲", "乙"), 1), ("D. 3.5", ("1", "2", "3", "3.5"), 3),
    ],
)
def test_an_answer_is_found_by_letter_or_text(answer, choices, want):
    assert find_answer(answer, choices) == want


@pytest.mark.parametrize(
    "answer, choices",
    [("ff", ("Ff", "FF")), ("b", ("b", "x")), ("6", ("6'", '6"')), ("(b) x", ("x", "y"))],
)
def test_an_answer_that_may_mean_two_choices_is_refused(answer, choices):
    with pytest.raises(ValueError, match="disagree|expected an answer among"):
        find_answer(answer, choices)


@pytest.mark.parametrize(
    "choices",
    [
        ("a", "A", "b", "B"), ("Ff", "FF", "ff"), ("6'", '6"'), ("5", "-5", "+5", "5!"),
        ("f(x)", "f(x", "(1)", "1"), ("m²", "m2"),
    ],
)
def test_choices_are_distinct_if_a_reader_tells_them_apart(choices):
    """Such questions were refused as if their choices were alike."""
    for place, choice in enumerate(choices):
        assert choice.lower() in "ab" or find_answer(choice, choices) == place  # a letter may be another one's label
    for same in (f" {choices[0]}", f"{choices[0]}\u00a0", f"\ufeff{choices[0]}"):
        with pytest.raises(ValueError, match="expected distinct choices"):
            Question("Which?", (*choices, same), 0)
    for unseen in "\u200b\u200c\u200d\u2800\u00ad\u202e\ufe0f\x00\x1b":
        with pytest.raises(ValueError, match="expected non-empty text in every choice"):
            Question("Which?", (*choices, unseen), 0)
        with pytest.raises(ValueError, match="expected distinct choices"):
            Question("Which?", ("red", f"re{unseen}d"), 0)
