"""Terms beside the accuracy, for who gives them a weight: how long a caption is, how much of it
repeats, and which of its sentences say nothing of the picture."""

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from data.choices import plain_text
from grpo.config import RewardConfig


def style_parts(captions: Sequence[str], lengths: Sequence[int],
                config: RewardConfig) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The parts of the reward that have a weight, (B,) float32 each with its weight applied, and
    these weights. Caption i has lengths[i] tokens."""
    terms, weights = {}, {}
    if config.length_weight:
        weights["length"] = config.length_weight
        terms["length"] = [length_reward(n, config.length_low, config.length_full,
                                         config.length_zero) for n in lengths]
    if config.repetition_weight:
        weights["repetition"] = config.repetition_weight
        terms["repetition"] = [-repetition(caption) for caption in captions]
    if config.praise_weight:
        weights["praise"] = config.praise_weight
        terms["praise"] = [-empty_share(caption) for caption in captions]
    return {key: weights[key] * torch.tensor(values) for key, values in terms.items()}, weights


def length_reward(num_tokens: int, low: int, full: int, zero: int) -> float:
    """1 from `low` to `full` tokens. Below it falls in a straight line to 0 at no token, above to 0
    at `zero` (above: CapRL++, arXiv 2606.09393). RewardConfig has them in order."""
    rise = num_tokens / low if low else 1.0
    return min(1.0, rise, max(0.0, (zero - num_tokens) / (zero - full)))


def repetition(caption: str) -> float:
    """Share of the caption's 4-grams of words that are repeats, 0 to 1 (0 below 4 words)."""
    spoken = words(caption)
    grams = list(zip(*(spoken[i:] for i in range(4))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_MARKS = "".join(sign for sign in map(chr, range(0x300, 0x1AC0))
                 if unicodedata.category(sign)[0] == "M")
"""Accents and the vowels of Hindi, Thai and Arabic: to `re` they are no part of a word."""
_WORD = re.compile(rf"[\u3040-\u30ff\u3400-\u9fff]|(?:[^\W\u3040-\u30ff\u3400-\u9fff]|[{_MARKS}])+")


def words(text: str) -> list[str]:
    """In small letters; a Chinese or Japanese character is a word. Thai and Khmer may have U+200B
    for a space."""
    return _WORD.findall(plain_text(text.replace("\u200b", " ")).casefold())


# ---------------------------------------------------------------------------------- sentences

_NO_END = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|mt|sen|gen|capt|lt|col|sgt|rev|e\.g|i\.e|vs|cf|"
                     r"approx|fig)\.$", re.I)
_INITIAL = re.compile(r"(?<!°)\b[A-Z]\.$")
_NO_NAME = re.compile(r"(?:The|This|These|It|Its|He|She|They|There|A|An|In|On|At|Each|Below)\s")
"""Words that begin a sentence after "angle C." or "the U.S.", but no name after an initial."""
_NUMBER = re.compile(r"\b(?:nos?|vol|ch|pp?|est|ca|jan|feb|apr|aug|sept?|oct|nov|dec)\.$", re.I)
_MARKER = re.compile(r"^\s*(?:#{1,6}\s+|>\s*|[-*+•–◦▪‣●○■□·→]\s+|\[[ xX]\]\s+|"  # noqa: RUF001
                     r"\(?\d{1,3}[.)]\s+|\(?[a-zA-Z][.)]\s+)+")
"""Of a heading, a quotation or an item of a list."""
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s)|"  # noqa: RUF001
                          r"[。！？\u0964\u06d4\u061f]+[」』”’]*")  # noqa: RUF001
"""Where one may end; `sentences` says which of these do."""
_STOP = re.compile(r"[.!?…。！？\u0964\u06d4\u061f]")  # noqa: RUF001
_SAID = re.compile(r'(?<!\w)"[^"]*"|“[^“”]*”|「[^「」]*」')  # none begins with the sign of 5"
_LONGEST = 10
"""Signs of the longest abbreviation, its stop and the space before: no more is looked at."""


def sentences(caption: str) -> list[str]:
    """The caption's sentences, without the marks of lists and headings.

    A line's end ends a sentence, and so does a stop of Chinese, Hindi, Urdu or Arabic. So does a
    full stop, question or exclamation mark before a space, unless a small letter follows, or the
    stop is that of an abbreviation or an initial. "No. 7" and "Dec. 25" are abbreviated before
    numbers alone. None ends within what is quoted: what is said there is no claim of its own.
    """
    parts = []
    for line in caption.splitlines():
        line = _MARKER.sub("", line.replace("**", "").replace("__", "")).strip()
        start = 0
        # A stop before the closing mark may end the sentence that quotes.
        outside = _SAID.sub(lambda said: _STOP.sub(",", said[0][:-2]) + said[0][-2:], line)
        for end in SENTENCE_END.finditer(outside):
            rest = line[end.end() :].lstrip()
            before = line[max(start, end.start() - _LONGEST) : end.start() + 1]
            is_number = rest[:1].isdigit() and _NUMBER.search(before)
            is_initial = _INITIAL.search(before) and not _NO_NAME.match(rest)
            if not (rest[:1].islower() or is_number or is_initial or _NO_END.search(before)):
                parts.append(line[start : end.end()].strip())
                start = end.end()
        parts.append(line[start:].strip())
    return [sentence for sentence in parts if words(sentence)]


_OWN = r"(?:description|caption)"
_TEXT = (rf"(?:{_OWN}|summary|account|overview|breakdown|depiction|analysis|rendering|response|"
         r"narrative)")
_OF_PICTURE = r"(?: of the (?:image|picture|photo(?:graph)?|scene|chart|figure|screenshot))?"
_GOOD = (r"(?:comprehensive|detailed|thorough|complete|accurate|precise|exhaustive|faithful|full|"
         r"vivid|clear|rich|in-depth|everything|every)")
_DOES = (r"(?:\w+ly (?:and )?){0,2}(?:provides?|offers?|gives?|presents?|captures?|covers?|"
         r"conveys?|communicates?|encapsulates?|ensures?|includes?|delivers?|encompasses|reflects?|"
         r"highlights?|aims?|serves?|allows?|enables?|helps?|paints?|leaves?|describes?|is|has|"
         r"should|would|will|can)")
EMPTY = {
    "praise": re.compile("|".join((
        rf"\b(?:th(?:is|ese)|my|our)(?: \w+,?){{0,3}} {_OWN}s?{_OF_PICTURE},? {_DOES}\b",
        # these words may also be of what the picture shows
        rf"\bth(?:is|ese)(?: \w+,?){{0,3}} {_TEXT}s?{_OF_PICTURE},? {_DOES}(?: \S+){{0,8}}? "
        rf"(?:{_GOOD}|no (?:\w+ )?(?:aspect|detail|element)s?|image|picture|scene|reader)\b",
        rf"\bthis is (?:an?|my) (?:(?!(?:with|of|for) )\w+,? ){{0,4}}{_OWN}\b",
        rf"\bthe (?:above|following|foregoing|preceding|provided) (?:\w+ )?{_TEXT}\b",
        rf"\b{_TEXT}{_OF_PICTURE}(?: above| provided)? {_DOES} (?:an? |the |all |both )?"
        rf"(?:\w+ and )?{_GOOD}\b",
        rf"^(?:here is|here's|below is|the following is) (?:an? |the |my )?(?:\w+[, ]+)*?{_TEXT}\b",
        r"^(?:\w+, )?i(?: have|'ve) (?:\w+ly )?(?:described|provided|included|captured|covered)\b",
        r"^(?:certainly|sure|of course|absolutely)[,!.]",
        r"^(?:please |if you [^,]+, )?(?:(?:i )?hope (?:this|that|it)(?: \w+)? helps|let me know|"
        r"feel free)\b",
        r"\b(?:(?:every|all|no) (?:\w+ )?(?:detail|element)s?|nothing) (?:\w+ ){0,2}"
        r"(?:captured|described|covered|missed|overlooked|left out|omitted)\b",
    )), re.IGNORECASE),
    "hedge": re.compile("|".join((
        r"\b(?:possibly|perhaps|maybe|presumably|probably|arguably|seemingly|apparently|"
        r"(?<!more |less )(?<!\bas )likely(?! voters?\b))\b",
        r"\b(?:may|might|could) (?:\w+ly )?(?:be(?! (?:\w+ly )?(?:seen|found|read)\b)|have|"
        r"indicate|suggest|represent|imply|depict)\b",
        r"\b(?:seems?|appears?) (?:to(?! (?:the|its|his|her|their)\b)|like)\b",
        r"\b(?:seems?|appears?|looks?) as (?:if|though)\b",
        r"\b(?:suggest|imply|hint)ing (?:that|at|an?)\b",
        r", (?:\w+ )?indicating (?:that|an?)\b",  # "a sign indicating a crossing" is none
        r"\b(?:it is|it's|is|are) (?:\w+ )?(?:unclear|uncertain|not clear|"
        r"(?<!not )possible that|(?:hard|difficult|impossible) to (?:tell|say))\b",
    )), re.IGNORECASE),
}
"""Sentences that earn nothing: "praise" is of the caption itself or to its reader, "hedge" leaves
open whether it holds. Hedges are the modal verbs, verbs and adverbs of Hyland, "Hedging in
Scientific Research Articles", 1998, that captions use. Praise: ours, what is held against
captioners that were trained for reward. "repeat" is said before in the caption."""
_QUOTED = re.compile(rf"{_SAID.pattern}|(?<!\w)'[^']{{2,}}'(?!\w)|‘[^‘’]*’|"  # noqa: RUF001
                     r"\b(?:says|reads|states|asks|warns|reply)(?: that\b|:).*")


def empty_kinds(caption: str) -> list[str]:
    """Of each sentence: a key of `EMPTY`, "repeat", or "" if it says something of the picture.

    What is in quotation marks, or after "reads:" or "says that", is written in the picture. It is
    neither praise nor a hedge. A sentence repeats if all its runs of 4 words, or all its words if
    there are fewer, were said in this order.
    """
    said: set[tuple[str, ...]] = set()
    kinds = []
    for sentence in sentences(caption):
        spoken = words(sentence)
        size = min(4, len(spoken))
        grams = {tuple(spoken[i : i + size]) for i in range(len(spoken) - size + 1)}
        plain = _QUOTED.sub(" ", sentence).strip()
        kind = next((kind for kind, rule in EMPTY.items() if rule.search(plain)), "")
        kinds.append(kind or ("repeat" if grams <= said else ""))
        said |= grams
    return kinds


def empty_share(caption: str) -> float:
    """Share of the caption's sentences that say nothing of the picture; 0 without a sentence."""
    kinds = empty_kinds(caption)
    return sum(map(bool, kinds)) / len(kinds) if kinds else 0.0
