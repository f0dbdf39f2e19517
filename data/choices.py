"""Options and their letters: how texts are compared, and which options mean others."""

import re
import unicodedata
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
"""Options are shown under these."""
MAX_CHOICES = len(LETTERS)

_WIDE = {0xFF01 + place: 0x21 + place for place in range(94)}  # ASCII, as wide as Chinese signs
_CURLY = "\u201c\u201d\u300c\u300d\u2018\u2019\u3002\u3010\u3011"

_TRADITIONAL = "選項擇為與確對錯沒別無誤還擾過實應該兩後個萬億於"
_SIMPLIFIED = "选项择为与确对错没别无误还扰过实应该两后个万亿于"

SIGNS = _WIDE | str.maketrans(_CURLY + _TRADITIONAL, "\"\"\"\"''.[]" + _SIMPLIFIED)
"""For `text.translate`, one for one: curly quotes and Chinese signs to their ASCII kin, and the
traditional Chinese signs by which choices are named or denied to the simplified ones."""

UNSEEN = re.compile(  # no width: control signs, soft hyphen, joiners, directions, fillers, styles
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0]"
)


def plain_text(text: str) -> str:
    """The text as a reader sees it: composed (NFC), single spaces, none around, nothing without
    width. Choices are distinct if these are."""
    return " ".join(unicodedata.normalize("NFC", UNSEEN.sub("", text)).split())


def fold_text(text: str) -> str:
    """For comparing only: without case, width and style of letters and signs; spaces are kept."""
    folded = unicodedata.normalize("NFKC", text.translate(SIGNS)).casefold()
    return unicodedata.normalize("NFKC", folded)  # casefold takes some letters apart


def fold_choice(text: str) -> str:
    """What counts of a choice's text when it is compared: folded, without quotes, brackets or stars
    around it or punctuation after it. `6'` is no `6"`, and `-5` no `5`."""
    folded, before = " ".join(fold_text(plain_text(text)).split()), None
    while folded != before:
        before, folded = folded, folded.rstrip(" .,:;!")
        if len(folded) > 2 and folded[0] + folded[-1] in ('""', "''", "``", "**", "__", "()", "[]"):
            folded = folded[1:-1].strip()
    return folded


def find_choice(text: str, choices: Sequence[str]) -> int | None:
    """Place of the choice that reads as `text` does, or else of the only one that is equal when
    folded. Where folding makes two choices alike ("Ff", "FF"), only the first way counts."""
    for spell in (plain_text, fold_choice):
        wanted, spelled = spell(text), list(map(spell, choices))
        if wanted and spelled.count(wanted) == 1:
            return spelled.index(wanted)
    return None


_OTHERS = re.compile(
    # "all of the above", "none above"; "the above" itself only where no other noun follows
    r"\b(?:all|none|any|both|either|neither|each|some|everything|anything|nothing|same as)"
    r" (?:of )?(?:(?:the|these|those) )?(?:above|below|following|preceding|previous)(?! the\b)\b|"
    r"\bthe (?:above|below|following|preceding|previous)(?: (?:option|choice|answer)s?\b|\W*$)|"
    # "the first two options", "the options above", "the first", "the last two"
    r"\b(?:first|second|third|last|previous) (?:\w+ )?(?:option|choice|answer)s?\b|"
    r"\b(?:option|choice|answer)s? (?:above|below)\b|"
    r"^the (?:first|second|third|last|former|latter)(?: (?:one|two|three|four))?\W*$|"
    # the same in Chinese; "60岁以上" is an amount
    r"(?:^|[是非有无部除了于为含括和与同])以[上下]|以[上下](?:所有|任何|选项|答案)|[上下]述|"
    r"^[上下前]面的?(?:[都均皆全没无]|所有|任何|选项|答案)|"
    r"[前后第][一二两三四五\d](?:项|个?选项|个?答案)"
)


def means_places(text: str) -> bool:
    """"All of the above", "the first two", "以上都是"; not "above a table", "the following day"."""
    return bool(_OTHERS.search(fold_text(plain_text(text))))


def means_letters(text: str, num_choices: int) -> bool:
    """"Both A and B", "A to C", "ABC", "AB都对", "Options 1 and 2": letters of choices, or numbers
    after "option", with words or signs that join them. Not so a letter alone, "AB" or "Plan A"."""
    last = LETTERS[num_choices - 1]
    seen = unicodedata.normalize("NFKC", plain_text(text).translate(SIGNS)).strip(" .,:;!*_\"'")
    letters = rf"(?<![A-Za-z])(?:[A-{last}]+|[a-{last.lower()}])(?![A-Za-z])"
    option = r"(?:option|answer|choice)s?|选项"
    words = (r"\b(?:and|or|nor|both|neither|either|only|all|not|but|except|of|the|same|as|well|to|"
             r"through|plus|with|is|are|correct|true|right|wrong)\b|"
             r"[和与或及跟到至都均皆全也不非对错是正确只有]")
    number = rf"(?<!\d)[1-{num_choices}](?!\d)"
    joined = rf"(?:{letters}|{number}|(?i:{words}|{option})|[\s,&/+()~\u2013\u3001-])+"
    if re.fullmatch(r"[A-J]+\W*|[a-j]\W*", seen):
        return bool(re.fullmatch("A?B?C?D?E?F?G?H?I?J?", seen)) and 2 < len(seen) <= num_choices
    points = re.search(letters, seen) or re.search(rf"(?i:{option}).*\d", seen)
    return bool(points and re.fullmatch(joined, seen))
