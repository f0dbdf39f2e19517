"""Evaluation files as they are published, read into images with questions: VLMEvalKit's TSV, parquet, JSONL.

    load_benchmark("chartqa:ChartQA/data/test-*.parquet")              KIND:PATH, a file, a pattern or a folder of parquet files
    load_benchmark("heldout.jsonl"), load_benchmark("toy:heldout:96")  the project's own questions

The kind says what is asked and how it is scored; the path and the file's columns never do. docs/formats.md tells where each
file comes from. A row that cannot be asked or scored is refused with its reason and counted: it is no zero, and no free point.
"""

import ast
import base64
import binascii
import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.examples import (
    Example,
    Question,
    check_text,
    filled,
    find_answer,
    find_choice,
    json_rows,
    load_examples,
    merge_pictures,
    strip_labels,
)
from data.images import ImageSource, StoredImage, picture_hash
from data.metrics import (
    EXACT_TYPES,
    anls,
    captionqa_offers_abstain,
    chartqapro,
    exact_match,
    relaxed_accuracy,
)
from data.parquet import parquet_rows
from grpo.distributed import all_or_none

csv.field_size_limit(sys.maxsize)  # a cell may hold a picture

Metric = Literal["choice", "captionqa", "exact", "relaxed", "anls", "chartqapro"]

KINDS: dict[str, Metric] = {
    "chartqa": "relaxed", "chartqapro": "chartqapro", "chartqapro-script": "chartqapro",
    "docvqa": "anls", "infovqa": "anls", "seed": "choice", "ai2d": "choice",
    "mmstar": "choice", "captionqa": "captionqa", "choice": "choice", "exact": "exact",
}
"""Kind -> metric. `choice` and `exact` are for any other file with options, or with an answer that has to be equal."""

REFERENCE_LENGTH = 64
"""A cell in TSV's image column no longer than this is the index of the row that has the picture (VLMEvalKit's rule)."""


@dataclass(frozen=True)
class FreeQuestion:
    """A question that is answered in words."""

    question: str
    answers: tuple[str, ...]
    """Any of them is right (anls, exact, relaxed); for chartqapro one per turn, the last one counts."""
    question_type: str = ""
    """ChartQAPro's, as far as it counts in the score."""
    year_flags: tuple[str, ...] = ()

    def __post_init__(self):
        check_text("question and answers", self.question, self.question_type, *self.answers)

    def score(self, metric: Metric, prediction: str) -> float:
        if metric == "relaxed":
            return float(any([relaxed_accuracy(prediction, answer) for answer in self.answers]))
        if metric == "exact":
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


@dataclass(frozen=True)
class Picture:
    """An image and all that is asked about it; its id is that of its first question, or of the file's row of images."""

    id: str
    image: ImageSource
    items: tuple[Item, ...]
    other_ids: tuple[str, ...] = ()
    """Of later rows with the same picture, whose questions are among these."""


@dataclass(frozen=True)
class Benchmark:
    name: str
    kind: str
    metric: Metric
    pictures: list[Picture]
    refused: list[str]
    """A sentence on each row, or question of a row, that was left out."""


def load_benchmark(source: str) -> Benchmark:
    """Raises ValueError naming file, row, expected and found if there is nothing to ask, or if the file cannot be read."""
    kind, colon, rest = source.partition(":")
    if not (colon and kind in KINDS):
        if colon and kind != "toy" and not Path(source).exists():
            raise ValueError(f"{source}: expected a JSONL file, toy:SPLIT:NUM or KIND:PATH with KIND one of {', '.join(KINDS)}")
        with all_or_none("data"):
            examples = load_examples(source)
        return example_benchmark(source if kind == "toy" else Path(source).stem, merge_pictures(examples))
    metric = KINDS[kind]
    refused: list[str] = []
    found: dict[str, tuple[ImageSource, list[str], list[Item]]] = {}  # by the picture's bytes: its rows share its captions
    seen: set[str] = set()
    for row in _rows(Path(rest)):
        if isinstance(row, str):
            refused.append(row)
            continue
        try:
            if row.id in seen:
                raise ValueError(f"id {row.id!r} was used before")
            items = _items(row, kind)
            key, image = row.picture()
        except ValueError as error:
            refused.append(f"{row.where}: {error}")
            continue
        seen.add(row.id)
        refused += [f"{row.where}, {item}" for item in items if isinstance(item, str)]
        if asked := [item for item in items if isinstance(item, Item)]:
            _, ids, together = found.setdefault(key, (image, [], []))
            ids.append(row.id)
            together.extend(asked)
    if not found:
        raise ValueError(f"{rest}: expected questions of kind {kind}, found none ({refused[0] if refused else 'no rows'})")
    pictures = [Picture(ids[0], image, tuple(items), tuple(ids[1:])) for image, ids, items in found.values()]
    return Benchmark(kind, kind, metric, pictures, refused)


def example_benchmark(name: str, examples: Sequence[Example]) -> Benchmark:
    """The project's own examples, all their questions asked."""
    pictures = [
        Picture(e.id, e.image, tuple(Item(f"{e.id}:{n}", q, e.family) for n, q in enumerate(e.questions)), e.other_ids)
        for e in examples
    ]
    return Benchmark(name, "choice", "choice", pictures, [])


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """A row of any of the formats: cells by the name of their column, and its picture, which may be asked for later."""

    where: str
    id: str
    cells: dict
    picture: Callable[[], tuple[str, ImageSource]]
    """The hash of the picture's bytes, and the picture. Raises ValueError if the row has none, or several."""

    def cell(self, *names: str):
        """The first of the columns that is there and filled. Raises ValueError if none is."""
        for name in names:
            if (value := self.cells.get(name)) not in (None, "", []):
                return value
        raise ValueError(f"expected {' or '.join(names)}, found columns {sorted(map(str, self.cells))}, or empty cells")

    def text(self, *names: str) -> str:
        """"" if none of the columns is filled; of a list, its first entry."""
        value = next((self.cells[name] for name in names if self.cells.get(name) not in (None, "", [])), "")
        return str(value[0] if isinstance(value, list) else value).strip()


def _rows(path: Path) -> Iterator[Row | str]:
    """The rows; in place of one that is none, a sentence."""
    if path.is_dir() or "*" in path.name:
        files = sorted(path.glob("*.parquet") if path.is_dir() else path.parent.glob(path.name))
        splits = sorted({re.split(r"-\d", file.name)[0] for file in files})  # "test" of "test-00000-of-00002.parquet"
        if len(splits) != 1 or not all(file.suffix == ".parquet" for file in files):
            raise ValueError(f"{path}: expected parquet files of one split (choose as in 'test-*.parquet'), found {splits}")
        yield from _parquet_rows(files)
    elif not path.is_file():
        raise ValueError(f"{path}: expected a benchmark's file, found nothing")
    elif path.suffix == ".parquet":
        yield from _parquet_rows([path])
    elif path.suffix == ".tsv":
        yield from _tsv_rows(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    else:
        raise ValueError(f"{path}: expected a .tsv, .parquet or .jsonl file")


def _jsonl_rows(path: Path) -> Iterator[Row | str]:
    for where, content in json_rows(path):
        if isinstance(content, str):
            yield f"{path} {where}: {content}"
            continue
        cells = filled(content)

        def picture(cells=cells):
            file = path.parent / str(cells.get("image", cells.get("image_path", "")))
            if not file.is_file():
                raise ValueError(f"image {file}: expected a file, found nothing")
            return picture_hash(file), file

        id = cells.get("id", where.removeprefix("line "))
        yield Row(f"{path} {where}", str(id), cells, picture)


def _tsv_rows(path: Path) -> Iterator[Row]:
    """Pictures stay in the file: a row's place in it is kept, and the row is read again when its picture is wanted."""
    spans: dict[str, tuple[int, int]] = {}  # index -> bytes of the row
    with path.open("rb") as file:
        place = 0

        def lines():
            nonlocal place
            for line in file:
                place += len(line)
                yield line.decode("utf-8-sig" if place == len(line) else "utf-8")

        reader = csv.reader(lines(), delimiter="\t")
        try:
            header = next(reader, [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected tab-separated UTF-8 text ({error})") from None
        start, number = place, 0
        while True:
            try:
                values = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path} row {number}: expected tab-separated UTF-8 text ({error})") from None
            if values is None:
                return
            if values:
                cells = _told(dict(zip(header, values)))
                index = cells.setdefault("index", str(number))
                spans.setdefault(index, (start, place))
                yield Row(f"{path} row {number}", index, cells, lambda cells=cells: _tsv_picture(path, header, cells, spans))
            start, number = place, number + 1


def _tsv_picture(path: Path, header: list[str], cells: dict, spans: dict[str, tuple[int, int]]) -> tuple[str, ImageSource]:
    """The index of another row, a list of one, or base64 text."""
    if "image" not in cells and cells.get("image_path"):
        file = path.parent / _only(cells["image_path"])
        if not file.is_file():
            raise ValueError(f"image_path {file}: expected a file, found nothing")
        return picture_hash(file), file
    index, text = cells["index"], _only(cells.get("image", ""))
    for _ in range(2):  # a reference to a row that refers further is one too many
        if text and len(text) <= REFERENCE_LENGTH:
            index = text
            if index not in spans:
                raise ValueError(f"image {index!r}: expected base64 text or the index of a row above, found neither")
            text = _only(_tsv_cells(path, header, spans[index]).get("image", ""))
    name, span = f"{path} index {index}", spans[index]
    return picture_hash(StoredImage(name, lambda: _decode(text))), StoredImage(
        name, lambda: _decode(_only(_tsv_cells(path, header, span)["image"]))
    )


def _tsv_cells(path: Path, header: list[str], span: tuple[int, int]) -> dict:
    with path.open("rb") as file:
        file.seek(span[0])
        text = file.read(span[1] - span[0]).decode()
    return dict(zip(header, next(csv.reader(io.StringIO(text, newline="\n"), delimiter="\t"))))


def _only(cell: str) -> str:
    """The one entry of a cell that may be a list: "x", "['x']". Raises ValueError for more or none."""
    entries = _text_list(cell) if cell.lstrip().startswith("[") else [cell]
    if len(entries) != 1:
        raise ValueError(f"expected one image, found {len(entries)}")
    return entries[0]


def _decode(text: str) -> bytes:
    if not text:
        raise ValueError("expected an image, found an empty cell")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"image: expected base64 text ({error})") from None


def _parquet_rows(files: list[Path]) -> Iterator[Row]:
    for path in files:
        yield from picture_rows(path)


ID_COLUMNS = ("id", "index", "questionId", "question_id", "data_id")
IMAGE_COLUMNS = ("image", "images")


def picture_rows(path: Path, group: int | None = None) -> Iterator[Row]:
    """The rows of a parquet file, or of one row group. Raises ValueError if they cannot be read. A row without an id has its
    place for one."""
    for place, cells in parquet_rows(path, group=group):
        cells = _told(cells)
        id = str(next((cells[key] for key in ID_COLUMNS if key in cells), f"{path.stem}:{place}"))
        yield Row(f"{path} row {place}", id, cells, lambda cells=cells: _stored_picture(cells))


def _told(cells: dict) -> dict:
    """Without what a table has in place of nothing: null, and pandas' nan, also written as text."""
    return {key: cell for key, cell in filled(cells).items() if cell != "nan" and cell == cell}


def _stored_picture(cells: dict) -> tuple[str, ImageSource]:
    value = next((cells[name] for name in IMAGE_COLUMNS if cells.get(name)), None)
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"expected one image, found {len(value)}")
        value = value[0]
    if not isinstance(value, StoredImage):
        raise ValueError(f"expected the bytes of an image, found {type(value).__name__}")
    return picture_hash(value), value


# -------------------------------------------------------------------------------------------------------- questions


def _items(row: Row, kind: str) -> list[Item | str]:
    """The row's questions, a sentence in place of each that is refused. Raises ValueError if the whole row is."""
    if isinstance(row.cells.get("questions"), list):  # CaptionQA, and our JSONL: an image with its questions
        family = str(row.cells.get("domain") or row.cells.get("family") or "all")
        items: list[Item | str] = []
        for number, cells in enumerate(row.cells["questions"]):
            cells = filled(cells) if isinstance(cells, dict) else {}
            inner = Row(row.where, f"{row.id}:{number}", cells, row.picture)
            try:
                items.append(Item(inner.id, _question(inner, kind), family))
            except ValueError as error:
                items.append(f"question {number}: {error}")
        if not items:
            raise ValueError("expected at least one question, found none")
        return items
    family = row.text("split", "category", "type", "Question Type", "question_type", "question_type_id") or "all"
    return [Item(row.id, _question(row, kind), family)]


def _question(row: Row, kind: str) -> Question | FreeQuestion:
    metric = KINDS[kind]
    if metric == "chartqapro":
        return _chartqapro_question(row, kind)
    if metric in ("choice", "captionqa"):
        return _choice_question(row, kind)
    answers = row.cell("answers", "answer")
    if isinstance(answers, str) and answers.lstrip().startswith("[") and metric == "anls":
        answers = _text_list(answers)  # VLMEvalKit's DocVQA; a chart's "[1, 2]" is one answer
    answers = tuple(str(answer).strip() for answer in (answers if isinstance(answers, list) else [answers]))
    if not answers or not all(answers):
        raise ValueError(f"expected answers in words, got {list(answers)}")
    return FreeQuestion(_with_hint(row, str(row.cell("question", "query"))), answers)


def _chartqapro_question(row: Row, kind: str) -> FreeQuestion:
    """Several turns are a conversation: those before the last come with their answers. In
    `chartqapro-script` no type asks for an equal answer, as in the published script."""
    questions, answers = (_as_list(row.cell(name, name.lower())) for name in ("Question", "Answer"))
    if len(questions) != len(answers) or not all(map(str.strip, answers)):
        raise ValueError(f"expected an answer for each of {len(questions)} questions, got {answers}")
    flags = _as_list(row.cells.get("Year", row.cells.get("year")) or [])
    earlier = "".join(f"{question}\n{answer}\n" for question, answer in zip(questions[:-1], answers[:-1]))
    context = row.text("Paragraph", "paragraph")
    text = (f"{context}\n" if context else "") + earlier + questions[-1]
    asked_for = row.text("Question Type", "question_type")
    if kind == "chartqapro-script" and asked_for in EXACT_TYPES:
        asked_for = ""
    return FreeQuestion(text, tuple(answers), asked_for, tuple(flags))


def _choice_question(row: Row, kind: str) -> Question:
    """Options in lettered columns (VLMEvalKit, SEED), in a list (AI2D, CaptionQA, ours), or in the question's text (MMStar)."""
    text, category = str(row.cell("question")), row.text("category", "kind")
    for names in ([*"ABCDEFGHIJ"], [f"choice_{letter}" for letter in "abcdefghij"]):
        if options := _without_missing([row.text(name) for name in names]):
            place = _letter(row.cell("answer"), options)
            return Question(_with_hint(row, text), tuple(options), place, category)
    listed = row.cells.get("choices") or row.cells.get("options")
    if listed:
        options = list(strip_labels([str(option) for option in _as_list(listed)]))
        answer = row.cells["answer_index"] if "answer_index" in row.cells else row.cell("answer")
        if kind == "captionqa":
            place = _by_text(str(answer), options)
            if len(options) == 10 and captionqa_offers_abstain(text, options):
                raise ValueError("expected at most 9 choices beside the abstain option, got 10")
        elif kind == "ai2d" or isinstance(answer, int):  # AI2D: the place in the list, as text
            place = int(answer)
        else:  # a letter, or a choice's text
            place = find_answer(str(answer), tuple(options))
        return Question(_with_hint(row, text), tuple(options), place, category)
    text, options = _inline_options(text)
    return Question(_with_hint(row, text), tuple(options), _letter(row.cell("answer"), options), category)


def _inline_options(text: str) -> tuple[str, list[str]]:
    """("Which one?", ["red", "blue"]) of "Which one?\\nOptions: A: red, B: blue" and of "Which one?\\n(A) red\\n(B) blue"."""
    for first, mark in ((r"\bOptions:\s*A:", r"(?:,|\n)\s*{}:"), (r"\(A\)", r"\s*\({}\)")):
        if start := list(re.finditer(first, text)):
            rest, options = text[start[-1].end() :], []
            for letter in "BCDEFGHIJ":
                if not (next_one := re.search(mark.format(letter), rest)):
                    break
                options.append(rest[: next_one.start()].strip())
                rest = rest[next_one.end() :]
            stem = re.sub(r"\b(?:Options|Choices):\s*$", "", text[: start[-1].start()].rstrip()).rstrip()
            return stem, _without_missing([*options, rest.strip()])
    raise ValueError("expected options in columns A, B, ..., in a list, or in the question's text, found none")


def _without_missing(options: list[str]) -> list[str]:
    """Without empty ones at the end, or "nan" in their place; one with others after it is empty."""
    given = ["" if option == "nan" else option for option in options]
    return given[: max((place for place, option in enumerate(given, 1) if option), default=0)]


def _letter(answer, options: list[str]) -> int:
    place = "ABCDEFGHIJ".find(str(answer).strip().strip("().").upper() or "-")
    if len(str(answer).strip().strip("().")) != 1 or not 0 <= place < len(options):
        raise ValueError(f"answer {answer!r}: expected the letter of one of {len(options)} options")
    return place


def _by_text(answer: str, options: list[str]) -> int:
    if (place := find_choice(answer, options)) is None:
        raise ValueError(f"answer {answer!r}: expected the text of exactly one of {options}")
    return place


def _with_hint(row: Row, text: str) -> str:
    hint = row.text("hint")
    return f"{hint}\n{text}" if hint else text


def _as_list(value) -> list[str]:
    """A list, or the text of one; any other value is the only entry."""
    if isinstance(value, str):
        return _text_list(value) if value.lstrip().startswith("[") else [value]
    return [str(entry) for entry in value] if isinstance(value, list) else [str(value)]


def _text_list(text: str) -> list[str]:
    """["a", "b"] of "['a', 'b']". Never evaluated; ValueError for what is no list."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"expected a list in {text[:60]!r} ({type(error).__name__})") from None
    if not isinstance(value, list):
        raise ValueError(f"expected a list in {text[:60]!r}, found {type(value).__name__}")
    return [str(entry) for entry in value]
