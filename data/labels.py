"""Labels of choices and answer keys, as files have them."""

import re
from collections.abc import Sequence
from typing import Any

from data.choices import LETTERS, SIGNS, UNSEEN, find_choice
from data.io import short

# Read after `translate(SIGNS)`; \u3001 is the comma of Chinese lists. "A.M.", the line "A - B" and
# the list "A、B" have no label.
_AFTER_STOP = r"(?=\**(?:\s|[^\W\d_]{2}|\d*[^\x00-\x7f]))"

_LABEL = (
    rf"\**(?:(?:option|choice) |选项 ?)?(?:[(\[]?([A-J])[)\]]|"
    rf"([A-J])(?:[.:]{_AFTER_STOP}|(?:\u3001| [-\u2013\u2014] )(?![A-J]\W*$)))\**"
)

_SPACE = rf"(?:\s|{UNSEEN.pattern})*"
_LABELLED = re.compile(f"{_SPACE}{_LABEL}{_SPACE}", re.IGNORECASE)


def strip_labels(choices: list[str]) -> tuple[str, ...]:
    """["A) Beijing", "B) Rome"] to ("Beijing", "Rome"); likewise "A. ", "A: ", "A - ", "(A) ",
    "[A] ", "Option A: ", small letters, bold ones and their Chinese forms. Options are given
    letters when they are shuffled.

    Choices are taken as they are unless every one carries a label. Raises ValueError where labels
    with a bracket are not A, B, C, ... in order. Then it would be a guess which choice the answer
    means.
    """
    matches = [_LABELLED.match(str(choice).translate(SIGNS)) for choice in choices]
    if not choices or not all(matches):
        return tuple(choices)
    labels = "".join(match[1] or match[2] for match in matches).upper()
    texts = [str(choice)[match.end() :].strip() for choice, match in zip(choices, matches)]
    if not any(texts):  # "(B)", "(A)": marks in the picture
        return tuple(choices)
    if labels == LETTERS[: len(labels)]:
        return tuple(texts)
    if any(match[1] for match in matches):
        raise ValueError(f"expected choices labelled A, B, C, ... in order, got {choices}")
    return tuple(choices)  # "B. Obama", "A. Lincoln": names


def find_answer(answer: Any, choices: tuple[str, ...]) -> int:
    """Place of the choice that an answer key means: "C", "C)", "C) green" or "green". Choices come
    without their labels.

    Raises ValueError where that is none or not the only one, and where letter and text disagree.
    """
    if not isinstance(answer, str) or not answer.strip(" *_"):
        raise ValueError(f"expected the answer's letter or text, got {short(answer)}")
    said = answer.strip(" \t\n*_")
    by_text = find_choice(said, choices)
    if by_text is not None and len(said) > 1:
        return by_text
    match = re.match(rf"(?:{_LABEL}|([A-J])[.*]*$)\s*", said.translate(SIGNS), re.IGNORECASE)
    if not match:
        if by_text is None:
            raise ValueError(f"expected an answer among the choices {list(choices)}, "
                             f"got {answer!r}")
        return by_text
    letter, rest = (match[1] or match[2] or match[3]).upper(), said[match.end() :]
    by_letter = LETTERS.index(letter)
    if by_letter >= len(choices):
        raise ValueError(f"expected a letter of the {len(choices)} choices as the answer, "
                         f"got {answer!r}")
    if (rest and find_choice(rest, choices) != by_letter) or by_text not in (None, by_letter):
        raise ValueError(f"letter and text of the answer disagree: {answer!r}, "
                         f"where {letter} is {choices[by_letter]!r}")
    return by_letter


def letter_place(answer: Any, options: Sequence[str]) -> int:
    """Place of the option whose letter the answer key is. Raises ValueError if it is none."""
    letter = str(answer).strip().strip("().")
    place = LETTERS.find(letter.upper() or "-")
    if len(letter) != 1 or not 0 <= place < len(options):
        raise ValueError(f"answer {answer!r}: expected the letter of one of {len(options)} options")
    return place
