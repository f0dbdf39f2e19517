"""Captions within a budget of words, so that captioners of different lengths can be compared.

The cut is after a sentence. So a longer budget never loses what a shorter one has, and no half
sentence is held against a captioner.
"""

import re
from collections.abc import Sequence

from reward.caprl import Answer, Asked, AskVerifier
from reward.style import SENTENCE_END, sentences

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff][\u3000-\u303f\uff00-\uff65]*|"
                  r"[^\s\u3040-\u30ff\u3400-\u9fff]+")
"""What stands between spaces. A Chinese or Japanese character is a word."""


def count_words(text: str) -> int:
    return sum(1 for _ in WORD.finditer(text))


def cut_caption(caption: str, max_words: int) -> str:
    """The longest beginning of whole sentences (reward/style.py) with at most `max_words` words. If
    the first sentence is longer, its first `max_words` words: a captioner of one long sentence says
    something too."""
    words = [match.end() for match in WORD.finditer(caption)]
    if len(words) <= max_words:
        return caption
    limit, whole = words[max_words - 1], sentences(caption)
    ends = [match.end() for match in SENTENCE_END.finditer(caption) if match.end() <= limit]
    ends += [match.start() for match in re.finditer(r"[\r\n]+", caption[: limit + 1])]
    for end in sorted(ends, reverse=True):
        told = sentences(caption[:end])
        if told and told == whole[: len(told)]:  # else "Dr." has ended what is one sentence
            return caption[:end]
    return caption[:limit]


def with_budgets(captions: dict[str, list[list[dict]]],
                 budgets: Sequence[int]) -> dict[str, list[list[dict]]]:
    """Name of the row in the tables -> captions of each picture: each captioner's as they are, then
    cut to each of the budgets."""
    told = {}
    for name, groups in captions.items():
        told[name] = groups
        for budget in budgets:
            told[budget_name(name, budget)] = [
                [_cut_row(row, budget) for row in group] for group in groups
            ]
    return told


def asked_once(verifier: AskVerifier) -> AskVerifier:
    """The same verifier. It is not asked again about a caption, with the same questions and random
    stream, that it has answered on: most captions are within the larger budgets."""
    known: dict[tuple, list[Answer]] = {}

    def ask(captions: Sequence[str], asked: Sequence[Sequence[Asked]],
            names: Sequence[str]) -> list[list[Answer]]:
        keys = [(caption, tuple(group), name)
                for caption, group, name in zip(captions, asked, names, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in known))
        if new:
            known.update(zip(new, verifier(*zip(*new)), strict=True))
        return [known[key] for key in keys]

    return ask


def budget_name(captioner: str, budget: int) -> str:
    return f"{captioner}, {budget} words"


def _cut_row(row: dict, budget: int) -> dict:
    """A row without `tokens` and `finish_reason`, which are those of the whole caption, if it is
    cut."""
    if "error" in row or count_words(row["caption"]) <= budget:
        return row
    return {"caption": cut_caption(row["caption"], budget)}
