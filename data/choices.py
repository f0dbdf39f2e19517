"""Options and their letters: how texts are compared, how labels are read, and how answers are read
in files and in a verifier's reply."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from data.io import short

LETTERS = "ABCDEFGHIJ"
"""Options are shown under these."""
MAX_CHOICES = len(LETTERS)


# ----------------------------------------------------------------------------------- texts compared


_WIDE = {0xFF01 + place: 0x21 + place for place in range(94)}  # ASCII, as wide as Chinese signs

_CURLY = "\u201c\u201d\u300c\u300d\u2018\u2019\u3002\u3010\u3011"

SIGNS = _WIDE | str.maketrans(_CURLY, "\"\"\"\"''.[]")
"""For `text.translate`: curly quotes and Chinese signs to their ASCII kin, one for one."""


_UNSEEN = re.compile(  # no width: control signs, soft hyphen, joiners, directions, fillers, styles
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0]"
)


def plain_text(text: str) -> str:
    """The text as a reader sees it: composed (NFC), single spaces, none around, nothing without
    width. Choices are distinct if these are."""
    return " ".join(unicodedata.normalize("NFC", _UNSEEN.sub("", text)).split())


def fold_text(text: str) -> str:
    """For comparing only: without case, width and style of letters and signs; spaces are kept."""
    folded = unicodedata.normalize("NFKC", text.translate(SIGNS)).casefold()
    return unicodedata.normalize("NFKC", folded)  # casefold takes some letters apart


def fold_choice(text: str) -> str:
    """What of a choice's text counts when it is compared: folded, without the quotes, brackets or
    stars around it and the punctuation after it. `6'` is no `6"`, and `-5` no `5`."""
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


# ------------------------------------------------------------------------- options that mean others


_OTHERS = re.compile(
    # "all of the above", "none above"; "the above" itself only where no other noun follows
    r"\b(?:all|none|any|both|either|neither|each|some|everything|anything|nothing|same as)"
    r" (?:of )?(?:(?:the|these|those) )?(?:above|below|following|preceding|previous)(?! the\b)\b|"
    r"\bthe (?:above|below|following|preceding|previous)(?: (?:option|choice|answer)s?\b|\W*$)|"
    # "the first two options", "the options above", "the first", "the last two"
    r"\b(?:first|second|third|last|previous) (?:\w+ )?(?:option|choice|answer)s?\b|"
    r"\b(?:option|choice|answer)s? (?:above|below)\b|"
    r"^the (?:first|second|third|last|former|latter)(?: (?:one|two|three|four))?\W*$|"
    # the same in Chinese
    r"以上|以下|上述|下述|^[上下前]面的?(?:[都均皆全没无]|所有|任何|选项|答案)|"
    r"[前后第][一二两三四五\d](?:项|个?选项|个?答案)"
)


def means_places(text: str) -> bool:
    """"All of the above", "the first two options", "以上都是"; not "above the table" or "the
    following day"."""
    return bool(_OTHERS.search(fold_text(plain_text(text))))


def means_letters(text: str, num_choices: int) -> bool:
    """"Both A and B", "A to C", "ABC", "AB都对", "Options 1 and 2": letters of choices, or numbers
    after "option", with words or signs that join them; not a letter alone, nor "AB" or "Plan A"."""
    last = LETTERS[num_choices - 1]
    seen = unicodedata.normalize("NFKC", plain_text(text).translate(SIGNS)).strip(" .,:;!*_\"'")
    letters = rf"(?<![A-Za-z])(?:[A-{last}]+|[a-{last.lower()}])(?![A-Za-z])"
    option = r"(?:option|answer|choice)s?|选项"
    words = (r"\b(?:and|or|nor|both|neither|either|only|all|not|but|except|of|the|same|as|well|to|"
             r"through|plus|with|is|are|correct|true|right|wrong)\b|[和与或及到至都均皆对错是正确只有]")
    number = rf"(?<!\d)[1-{num_choices}](?!\d)"
    joined = rf"(?:{letters}|{number}|(?i:{words}|{option})|[\s,&/+()~\u2013\u3001-])+"
    if re.fullmatch(r"[A-J]+\W*|[a-j]\W*", seen):
        return bool(re.fullmatch("A?B?C?D?E?F?G?H?I?J?", seen)) and 2 < len(seen) <= num_choices
    points = re.search(letters, seen) or re.search(rf"(?i:{option}).*\d", seen)
    return bool(points and re.fullmatch(joined, seen))


# ---------------------------------------------------------------------- labels and answers in files


# Read after `translate(SIGNS)`; \u3001 is the comma of Chinese lists. "A.M." has no label.
_AFTER_STOP = r"(?=\**(?:\s|[^\W\d_]{2}|[^\x00-\x7f]))"

_LABEL = rf"\**(?:[(\[]?([A-J])[)\]]|([A-J])(?:[.:]{_AFTER_STOP}|\u3001))\**"

_LABELLED = re.compile(rf"\s*{_LABEL}\s*", re.IGNORECASE)


def strip_labels(choices: list[str]) -> tuple[str, ...]:
    """["A) Beijing", "B) Rome"] to ("Beijing", "Rome"); likewise "A. ", "A: ", "(A) ", "[A] ",
    small letters, bold ones and their Chinese forms. Options are given letters when they are
    shuffled.

    Choices are taken as they are unless every one carries a label. Raises ValueError where labels
    with a bracket are not A, B, C, ... in order: which choice the answer means would be a guess.
    """
    matches = [_LABELLED.match(str(choice).translate(SIGNS)) for choice in choices]
    if not choices or not all(matches):
        return tuple(choices)
    labels = "".join(match[1] or match[2] for match in matches).upper()
    if labels == LETTERS[: len(labels)]:
        return tuple(str(choice)[match.end() :].strip() for choice, match in zip(choices, matches))
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


# ------------------------------------------------------------------------------- answers in replies


def parse_choice(reply: str, choices: Sequence[str]) -> int | None:
    """Place of the choice that `reply` names, or None. Case, width and style of letters and signs
    do not matter (`fold_text`).

    Quotes, stars, "The answer is", "Option", "I think" lead to the answer and are passed over. Then
    1. if a choice's text begins the reply, it is that choice: of several the longest, and up to the
       end of a word or number ("20" is no "2"). Letters within that text ("Point B") are no labels.
       A text of one letter has to be the whole reply.
    2. Else a letter counts where it is a label (`_labelled`).
    3. None if what follows does not stay with it (`_is_kept`).
    """
    said = reply.rpartition("</think>")[2]
    said = re.sub(r"(?s)<think>.*|<\|[^<>]*\|>|</?answer>", "", said).translate(SIGNS)
    said = _UNSEEN.sub("", said)
    place, rest = _begun_by(said, choices)
    lead = _LEAD.match(said)
    while place is None and lead:
        said = said[lead.end() :]
        place, rest = _begun_by(said, choices)
        lead = _LEAD.match(said)
    if place is None:
        place, rest = _labelled(rest, choices)
    return place if place is not None and _is_kept(place, rest, choices) else None


def _begun_by(said: str, choices: Sequence[str]) -> tuple[int | None, str]:
    """Place of the choice whose text begins `said`, perhaps after its letter ("B green"), or None;
    and the rest, folded."""
    texts = [fold_choice(choice) for choice in choices]
    folded = re.sub(r"[^\S\n]+", " ", fold_text(said)).strip(" ")
    place = find_choice(said, choices)
    if place is not None:
        return place, folded if re.fullmatch("[a-j]", texts[place]) else ""  # maybe a label
    spelled = [*texts, *(f"{letter} {text}" for letter, text in zip(LETTERS.lower(), texts))]
    begins = [t for t in spelled if folded.startswith(t) and _TEXT_END.match(folded, len(t))]
    longest = max(begins, key=len, default="")
    if spelled.count(longest) != 1 or re.fullmatch("[a-j]? ?", longest):
        return None, folded
    place = spelled.index(longest) % len(choices)
    rest = folded[len(longest) :]
    return place, rest.removeprefix(".") if choices[place].rstrip().endswith(".") else rest


def _labelled(said: str, choices: Sequence[str]) -> tuple[int | None, str]:
    """Place of the choice whose label `said`, folded, has first or after "answer is" or "option",
    or None; and the rest. A choice's text that begins there ("B. Smith") is meant, not the letter.

    A label stands in brackets, at the end of its clause, or before "because" or "is right". None if
    its sentence denies so far, if there are other labels, if only others' texts are said.
    """
    labels = list(_NAMED.finditer(said))
    label = next((match for match in labels if match["first"] is not None), None)
    before = _SENTENCE_SO_FAR.search(said[: label.start("letter")])[0] if label else ""
    if not label or _DENIAL.search(before) or _WITHDRAWN.search(before):
        return None, said
    for start in (label.start(), label.start("letter")):
        place, rest = _begun_by(said[start:], choices)
        if place is not None:
            return place, rest
    letter, rest = label["letter"], said[label.end() :]
    place = LETTERS.lower().index(letter)
    if place >= len(choices) or len({match["letter"] for match in labels}) > 1:
        return None, said
    texts = [fold_choice(choice) for choice in choices]
    if _begun_by(rest.lstrip(" .:*"), choices)[0] == place:
        return place, rest
    texts_said = _texts_in(said, texts)
    # Another choice's text is "B", or it begins with "B." and more follows than the label
    names = (letter, f"{letter}. ") if rest.strip(" .*") else (letter,)
    is_name = any(i != place and text[:3] in names for i, text in enumerate(texts))
    is_other = bool(texts_said) and texts[place] not in texts_said
    return (None if is_name or is_other else place), rest


def _is_kept(place: int, rest: str, choices: Sequence[str]) -> bool:
    """Whether `rest`, what the folded reply says after it named the choice, leaves it at that.

    Not if it names another: a label in whatever clause, a choice's text right after it or after
    "is", or such a text's last words ("B. Obama" for "Barack Obama"). Nor if "and", "or" or "to"
    go on, its sentence denies ("green is unlikely"; but not after "because"), or "but" and the
    like come anywhere.
    """
    texts = [fold_choice(choice) for choice in choices]
    own = texts[place]
    letters = {LETTERS.lower().index(match["letter"]) for match in _NAMED.finditer(rest)}
    if letters.intersection(range(len(choices))) - {place}:
        return False
    is_stance = own in ("yes", "是") or _DENIAL.search(own)  # "No, it is not": said once more
    following = rest[_BETWEEN.match(rest).end() :]
    other, after = _begun_by(following, choices)
    if other == place:
        rest = after
    elif other is not None and not (is_stance and after.strip(" .!")):
        return False
    if other is None:
        clause = fold_choice(_CLAUSE.match(following)[0])
        ends = [text for text in texts if clause and text.endswith(f" {clause}")]
        if ends and own not in ends:
            return False
    contrast = re.match(r", (?:and )?not ", rest)  # "2, not 3"
    other, after = _begun_by(rest[contrast.end() :] if contrast else "", choices)
    rest = rest if other in (None, place) else after
    says = [_begun_by(rest[match.end() :], choices)[0] for match in _SAYS.finditer(rest)]
    if not {None, place}.issuperset(says) or _GOES_ON.match(rest) or _WITHDRAWN.search(rest):
        return False
    denial = _DENIAL.search(_VERDICT.match(rest)[0])
    return not denial or bool(is_stance and re.match(r"[,.:;\n]", rest))


def _texts_in(said: str, texts: Sequence[str]) -> set[str]:
    """The texts of more than one letter that `said` has as whole words; of overlapping ones the
    first, and the longest."""
    longest_first = sorted((t for t in texts if not re.fullmatch("[a-j]?", t)), key=len)[::-1]
    either = "|".join(map(re.escape, longest_first))
    word = r"[^\W\u3000-\u9fff]"  # no Chinese sign: those stand together without spaces
    return set(re.findall(rf"(?<!{word})(?:{either})(?!{word})", said)) if either else set()


# All but the first are of folded text. \u3001: comma of Chinese lists; \u2044: bar of a fraction;
# \u2013 and \u2014: dashes.
_LEAD = re.compile(
    r"""[\s:,]+|[*_"'`(\[#>]+|(?:so|thus|therefore)\b|"""
    r"(?:(?:the|my) )?(?:(?:correct|right|best|final) )?"
    r"(?:answer|option|choice)\b(?: (?:is|would be)\b)?|is\b|i (?:think|choose|pick|say)\b|"
    r"i(?:'d| would) (?:say|choose|pick)\b|答案[是为]?|选[项择]?",
    re.IGNORECASE,
)

# A choice's text ends before a space, sign or bracketed label; a number not before its unit.
_TEXT_END = re.compile(
    r"""(?!\w|(?<=\d)\s?[%‰°'"/\u2044^\d~\u2013-]|"""
    r"""(?<=\d) (?!(?:is|as|in|on|at|it)\b)[a-z]{1,2}\b)"""
    r"""(?=$|[\s;!?\u3001\u2014]|\.(?![a-z0-9])|[,:](?!\d)|["'*`)\]](?!\w)|\([a-j]\))"""
)

# Words before a label that make any letter count.
_ANSWER_IS = r"\b(?:answer|option|choice)(?: is)?:? ?|答案[是为]?:? ?|(?<!不)选[项择]? ?"
# Where another clause begins, perhaps with small words.
_CLAUSE_START = (
    r"[,.;:!?\n\u3001]\s*(?:(?:but|so|and|or|then|no|wait)\s+)*| (?:and|or|but|so) |"
    r" [-\u2013\u2014] |(?<!\w)(?=[(\[])"
)
# Its letter; I is a word unless it stands in brackets or ends the reply.
_LETTER = r"(?P<letter>[a-hj]|i(?=[)\]]|\W*$))(?: (?P=letter)\b)*"
# What may come after a letter without a bracket.
_LABEL_END = (
    r"\s*$|\s*[\n,;!\u3001]|\.(?!\w\b|\s\w\.)|:(?!\d)| [-\u2013\u2014] | (?:because|since|as)\b|"
    r" is (?:the )?(?:right|correct|best|answer)\b"
)
_NAMED = re.compile(
    rf"(?:(?P<first>^|{_ANSWER_IS})|{_CLAUSE_START})"
    rf"""["'*_`$(\[]*{_LETTER}["'*_`$]*(?:[)\]]|(?={_LABEL_END}))"""
)

# From the last stop or "so" to the end.
_SENTENCE_SO_FAR = re.compile(
    r"(?:(?!\b(?:so|thus|therefore|hence)\b|, but\b|[.!?;\n]|所以|因此).)*$"
)
# Signs between an answer and what follows, and the first clause of that.
_BETWEEN = re.compile(r"""(?:[\s,:;"'*`)\]\u3001]|\.(?!\d)|[-\u2013\u2014]\s)*""")
_CLAUSE = re.compile(r"(?:(?! because )[^.,:;!?\n\u3001]|[.,:](?=\d))*")
# The sentence about the answer, up to its reason.
_VERDICT = re.compile(
    r"\W*(?:(?!\b(?:because|since|explanation|reason)|因为|由于)(?:[^.!?\n]|\.(?=\w)))*"
)
# Words that make a sentence about an answer a denial, or a doubt.
_DENIAL = re.compile(
    r"n't\b|\b(?:not|cannot|no|never|neither|nor|none|nothing|without|hardly|rarely|barely|wrong|"
    r"false|unlikely|unlike|untrue|impossible|improb\w*|implausible|doubt\w*|rul(?:e[sd]?|ing) "
    r"(?:it |that |this )?out|ruled|exclud\w*|eliminat\w*|reject\w*|dismiss\w*|discard\w*|ignor\w*|"
    r"avoid\w*|refut\w*|contradict\w*|except|besides|than|instead|apart|far from|lacks?|absent|"
    r"missing|mistake\w*|inc\w*rect|inaccurate|invalid|"
    r"un(?:sure|clear|certain|supported|mentioned)|"
    r"nobody|might|bad|worst|least|distractor|fails?|too)\b|"
    r"[不没别非无未错否除勿误或\u2717\u2718\u274c\u00d7]|还是"
)
# A choice named after one of these is an answer of its own.
_SAYS = re.compile(
    r"(?:\b(?:is|are|be|was|says?|shows?|means?|pick|choose|select|answer)|'s|[是为选])\b[: ]*"
    r"""["'*(\[]*(?:(?:the|an?) )?"""
)
# What was said before one of these may not be the last word.
_WITHDRAWN = re.compile(
    r"\b(?:but|however|yet|though|although|wait|actually|instead(?! of)|sorry|correction|oops|hmm+|"
    r"scratch|on second thought|first (?:thought|guess)|at first|initially|rather(?! than)|"
    r"no(?=[,.!:]))\b|但|不过|不对|其实|等等|而是|应该是"
)
# It goes on with more choices or another amount: "red & blue", "9 a.m. or 10 p.m.", "10 to 12".
_GOES_ON = re.compile(
    r"""[^\w&+/]*(?:[&+/\u00d7=<>]|(?:and|or|nor)\b)|["'*_`)\]]* ?(?:(?:to|through|thru|until|"""
    r"till|vs|versus|x|by|times|of|out of|over|plus|minus|point|per|percent\w*|dozens?|hundreds?|"
    r"thousands?|millions?|billions?|trillions?|hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|"
    r"one|two|three|four|five|six|seven|eight|nine|ten|pairs?|squared|cubed)\b|\d|[万千百亿十])"
)
