"""From a row of a benchmark's file to its questions, by the benchmark's kind."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from data.benchmarks.files import Row, entry_text, text_list, told
from data.benchmarks.metrics import (
    EXACT_TYPES,
    anls,
    captionqa_offers_abstain,
    chartqapro,
    exact_match,
    relaxed_accuracy,
)
from data.choices import LETTERS, find_choice
from data.examples import Question
from data.io import check_text, short
from data.labels import find_answer, letter_place, strip_labels

Metric = Literal["choice", "captionqa", "capeval", "exact", "judged", "relaxed", "anls",
                 "chartqapro"]

KINDS: dict[str, Metric] = {
    "chartqa": "relaxed", "chartqapro": "chartqapro", "chartqapro-script": "chartqapro",
    "docvqa": "anls", "infovqa": "anls", "seed": "choice", "ai2d": "choice",
    "mmstar": "choice", "mmmu": "choice", "mmmu-pro": "choice", "wemath": "choice",
    "visulogic": "choice", "charxiv": "judged", "mathverse": "judged", "mathvision": "judged",
    "captionqa": "captionqa", "capeval": "capeval", "choice": "choice", "exact": "exact",
}
"""Kind -> metric. `choice` and `exact` are for any other file with options, or with an answer that
has to be equal. `judged`: what is not equal is judged by a model (tools/reply_judge.py)."""

PUBLISHED_JUDGES = {kind: "Qwen/Qwen2.5-72B-Instruct" for kind in ("captionqa", "capeval")}
"""Kind -> the text-only model that its authors ask."""

CAPEVAL_LISTS = [
    f"{name}_checklist" for name in
    ("instance", "attribute", "relation", "image", "text", "human", "ui", "world_knowledge")
]
CAPEVAL_FAMILIES = {"SO": "Scene & Object", "PA": "People & Activity", "TI": "Text & Interface",
                    "DK": "Design & Knowledge"}
"""By the letters that an image's name begins with."""
CAPEVAL_CHOICES = ("Yes: the caption says so", "No: the caption says otherwise")
"""The third verdict, that the caption does not say, is the abstain option."""


@dataclass(frozen=True)
class FreeQuestion:
    """A question that is answered in words."""

    question: str
    answers: tuple[str, ...]
    """Any of them is right (anls, exact, judged, relaxed). For chartqapro there is an answer for
    each turn, and the last of them counts."""
    question_type: str = ""
    """ChartQAPro's question type, where it counts in the score."""
    year_flags: tuple[str, ...] = ()

    def __post_init__(self):
        check_text("question and answers", self.question, self.question_type, *self.answers)

    def score(self, metric: Metric, prediction: str) -> float:
        if metric == "relaxed":
            return float(any([relaxed_accuracy(prediction, answer) for answer in self.answers]))
        if metric in ("exact", "judged"):
            return float(any([exact_match(prediction, answer) for answer in self.answers]))
        if metric == "anls":
            return anls(prediction, self.answers)
        assert metric == "chartqapro", f"{metric}: no metric of answers in words"
        return chartqapro(prediction, self.answers, self.question_type, self.year_flags)


@dataclass(frozen=True)
class Item:
    """One question. `family` groups results: the file's split, or else its category."""

    id: str
    question: Question | FreeQuestion
    family: str = "all"


def row_items(row: Row, kind: str) -> tuple[list[Item], list[str]]:
    """The row's questions, and a sentence on each that is refused. Raises ValueError if the whole
    row is."""
    if kind == "capeval":
        return _checklist_items(row)
    if not isinstance(row.cells.get("questions"), list):
        family = row.text("split", "category", "type", "Question Type", "question_type",
                          "question_type_id")
        return [Item(row.id, _question(row, kind), family or "all")], []
    # CaptionQA, and our JSONL: an image with its questions
    family = str(row.cells.get("domain") or row.cells.get("family") or "all")
    items, reasons = [], []
    for number, cells in enumerate(row.cells["questions"]):
        cells = told(cells) if isinstance(cells, dict) else {}
        inner = Row(row.where, f"{row.id}:{number}", cells, row.picture)
        try:
            items.append(Item(inner.id, _question(inner, kind), family))
        except ValueError as error:
            reasons.append(f"question {number}: {error}")
    if not items and not reasons:
        raise ValueError("expected at least one question, found none")
    return items, reasons


def _checklist_items(row: Row) -> tuple[list[Item], list[str]]:
    """CAPEval: an image with lists of questions on its caption."""
    lists = {name: row.cells[name] for name in CAPEVAL_LISTS if name in row.cells}
    for name, entries in lists.items():
        if not isinstance(entries, list):
            raise ValueError(f"expected a list in {name}, got {short(entries)}")
    entries = [entry for entries in lists.values() for entry in entries]
    family = CAPEVAL_FAMILIES.get(re.match("[A-Za-z]*", row.id)[0].upper(), "unknown")
    items, reasons = [], []
    for number, entry in enumerate(entries):
        text = entry.get("Question") if isinstance(entry, dict) else None
        try:
            if not isinstance(text, str):
                raise ValueError(f"expected an object with a Question, got {entry!r:.80}")
            question = Question(text.strip(), CAPEVAL_CHOICES, 0, str(entry.get("Tags") or ""))
            items.append(Item(f"{row.id}:{number}", question, family))
        except ValueError as error:
            reasons.append(f"item {number}: {error}")
    if not entries:
        raise ValueError(f"expected items in {CAPEVAL_LISTS[0]} or another list of its kind, "
                         f"found none in {sorted(map(str, row.cells))}")
    return items, reasons


def _question(row: Row, kind: str) -> Question | FreeQuestion:
    metric = KINDS[kind]
    if isinstance(row.cells.get("prompt"), str) and metric != "captionqa":  # it needs options
        from data.benchmarks.released import released_question  # here: for who has these files

        return released_question(row, kind, metric)
    if metric == "chartqapro":
        return _chartqapro_question(row, kind)
    if metric in ("choice", "captionqa"):
        return _choice_question(row, kind)
    answers = row.cell("answers", "answer")
    if isinstance(answers, str) and answers.lstrip().startswith("[") and metric == "anls":
        answers = text_list(answers)  # VLMEvalKit's DocVQA; a chart's "[1, 2]" is one answer
    answers = answers if isinstance(answers, list) else [answers]
    answers = tuple(entry_text(answer).strip() for answer in answers)
    if not answers or not all(answers):
        raise ValueError(f"expected answers in words, got {list(answers)}")
    return FreeQuestion(_with_hint(row, _text(row, "question", "query")), answers)


def _chartqapro_question(row: Row, kind: str) -> FreeQuestion:
    """Several turns are a conversation: those before the last come with their answers. In
    `chartqapro-script` no type asks for an equal answer, as in the published script."""
    questions, answers = (_as_list(row.cell(name, name.lower())) for name in ("Question", "Answer"))
    is_whole = questions and all(map(str.strip, questions + answers))
    if len(questions) != len(answers) or not is_whole:
        raise ValueError(f"expected an answer for each of {len(questions)} questions, got "
                         f"{answers} for {questions}")
    flags = _as_list(row.cells.get("Year", row.cells.get("year")) or [])
    turns = zip(questions[:-1], answers[:-1])
    earlier = "".join(f"{question}\n{answer}\n" for question, answer in turns)
    context = row.text("Paragraph", "paragraph")
    text = (f"{context}\n" if context else "") + earlier + questions[-1]
    question_type = row.text("Question Type", "question_type")
    if kind == "chartqapro-script" and question_type in EXACT_TYPES:
        question_type = ""
    return FreeQuestion(text, tuple(answers), question_type, tuple(flags))


def _choice_question(row: Row, kind: str) -> Question:
    """Options in lettered columns (VLMEvalKit, SEED), in a list (AI2D, CaptionQA, ours), or in the
    question's text (MMStar)."""
    text, category = _text(row, "question"), row.text("category", "kind")
    options = _options_in_columns(row)
    listed = row.cells.get("choices") or row.cells.get("options")
    if not options and listed:
        options = list(strip_labels(_as_list(listed)))
        place = _answer_in_list(row, kind, text, options)
    else:
        if not options:
            text, options = inline_options(text)
        place = letter_place(row.cell("answer"), options)
    return Question(_with_hint(row, text), tuple(options), place, category)


def _options_in_columns(row: Row) -> list[str]:
    """The options of the columns A, B, ..., or choice_a, choice_b, ... Empty if no such cell is
    filled."""
    for names in ([*LETTERS], [f"choice_{letter.lower()}" for letter in LETTERS]):
        options = _without_missing([row.text(name) for name in names])
        if options:
            return list(strip_labels(options))
    return []


def _answer_in_list(row: Row, kind: str, text: str, options: list[str]) -> int:
    """The place of the answer among the options of a list. Raises ValueError where `answer_index`
    and `answer` disagree."""
    names = [name for name in ("answer_index", "answer")
             if row.cells.get(name) not in (None, "", [])]
    given = {name: row.cell(name) for name in names or ["answer"]}
    places = {_place(answer, kind, text, options, name) for name, answer in given.items()}
    if len(places) > 1:
        raise ValueError(f"expected one choice in answer_index and answer, got {given}")
    return places.pop()


def _place(answer: Any, kind: str, text: str, options: list[str], name: str) -> int:
    if kind == "captionqa":
        place = find_choice(entry_text(answer), options)
        if place is None:
            raise ValueError(f"answer {answer!r}: expected the text of exactly one of {options}")
        if len(options) == 10 and captionqa_offers_abstain(text, options):
            raise ValueError("expected at most 9 choices beside the abstain option, got 10")
        return place
    # A table may hold the place as text, as AI2D's does, or with ".0", as pandas writes it.
    if kind == "ai2d" or name == "answer_index" or isinstance(answer, int):
        number = re.fullmatch(r"(\d+)(?:\.0)?", str(answer).strip())
        if not number:
            raise ValueError(f"{name} {short(answer)}: expected the place, from 0, of one of "
                             f"{len(options)} options")
        return int(number[1])
    return find_answer(entry_text(answer), tuple(options))  # a letter, or a choice's text


def inline_options(text: str) -> tuple[str, list[str]]:
    """("Which?", ["red", "blue"]) of "Which?\\nOptions: A: red, B: blue", of
    "Which?\\n(A) red\\n(B) blue", and of "Which?\\nA. red\\nB. blue", where the last one ends with
    its line."""
    for first, mark in ((r"\bOptions:\s*A:", r"(?:,|\n)\s*{}:"), (r"\(A\)", r"\s*\({}\)"),
                        (r"(?m)^A[.):]", r"\n{}[.):]")):
        starts = list(re.finditer(first, text))
        if not starts:
            continue
        options, rest = [], text[starts[-1].end() :]
        for letter in "BCDEFGHIJ":
            match = re.search(mark.format(letter), rest)
            if not match:
                break
            options.append(rest[: match.start()].strip())
            rest = rest[match.end() :]
        before = text[: starts[-1].start()].rstrip()
        rest = rest.lstrip().split("\n")[0] if "(?m)" in first else rest
        stem = re.sub(r"\b(?:Options|Choices):\s*$", "", before).rstrip()
        return stem, _without_missing([*options, rest.strip()])
    raise ValueError("expected options in columns A, B, ..., in a list, or in the question's text, "
                     "found none")


def _without_missing(options: list[str]) -> list[str]:
    """The options without empty ones at the end. "nan" counts as empty, there and before others."""
    given = ["" if option == "nan" else option for option in options]
    return given[: max((place for place, option in enumerate(given, 1) if option), default=0)]


def _text(row: Row, *names: str) -> str:
    text = row.cell(*names)
    if not isinstance(text, str):
        raise ValueError(f"expected text in {names[0]!r}, got {short(text)}")
    return text


def _with_hint(row: Row, text: str) -> str:
    hint = row.text("hint")
    return f"{hint}\n{text}" if hint else text


def _as_list(value) -> list[str]:
    """A list, or the text of one; any other value is the only entry."""
    if isinstance(value, str):
        return text_list(value) if value.lstrip().startswith("[") else [value]
    return [*map(entry_text, value)] if isinstance(value, list) else [entry_text(value)]
