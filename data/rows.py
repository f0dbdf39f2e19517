"""Rows of files as examples: each is taken or refused by itself, and each question in it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.examples import Example, Question
from data.formats import MANIFEST_SUFFIX, contents, data_files, read_row
from data.io import short
from data.jsonl import read_jsonl
from data.labels import find_answer, strip_labels


@dataclass(frozen=True)
class Dropped:
    """A block of a model's text that is no sound question. It stands in the question's place."""

    reason: str
    """One of a few phrases, to be counted by."""
    text: str


@dataclass(frozen=True)
class Refused:
    """A row of a file, or a question of a row, that cannot be used."""

    file: Path
    where: str
    """"line 3", counted from 1, in text; "row 2", counted from 0, in parquet."""
    reason: str
    id: str = ""
    question: int | None = None
    """Its place in the row; None for the whole row."""

    def __str__(self) -> str:
        who = "" if self.question is None else f"id {self.id!r}, question {self.question}: "
        return f"{self.file} {self.where}: {who}{self.reason}"


@dataclass(frozen=True)
class ScannedRow:
    """A row of a file: its example, if it makes one, and what of it is refused."""

    file: Path
    where: str
    example: Example | None
    refused: tuple[Refused, ...]


def scan_examples(source: str) -> tuple[list[Example], list[str]]:
    """The examples whose rows fit, and a sentence on each row or question that does not. What the
    set's manifest lists is in neither. Raises ValueError where no rows can be read."""
    if source.startswith("toy:"):
        from data.toy.world import toy_examples  # here: the toy world builds on the types above

        return toy_examples(source), []
    examples, refused, listed = [], [], read_manifest(source)
    for row in scan_rows(source):
        key = (name_in_set(source, row.file), row.where)
        refused += [str(fault) for fault in row.refused if (*key, fault.question) not in listed]
        if row.example and (*key, None) not in listed:
            examples.append(row.example)
    return examples, refused


def scan_rows(source: str, image_root: str = "") -> Iterator[ScannedRow]:
    """Every row of a file or of a folder's files, in order. Paths of images are below `image_root`
    or, without one, below the folder of the file that names them."""
    first: dict[str, str] = {}  # where each id was used first
    for file in data_files(source):
        root = Path(image_root) if image_root else file.parent
        for where, content in contents(file):
            try:
                if isinstance(content, str):  # why there is no row
                    raise ValueError(content)
                id, image, family, entries = read_row(content, file, where, root)
            except ValueError as error:
                yield ScannedRow(file, where, None, (Refused(file, where, str(error)),))
                continue
            questions, refused, example = [], [], None
            for place, entry in enumerate(entries):
                try:
                    questions.append(read_question(entry))
                except ValueError as error:
                    refused.append(Refused(file, where, str(error), id, place))
            if id in first:
                reason = f"id {id!r} was used before, on {first[id]}"
                refused.append(Refused(file, where, reason, id))
            elif not questions:
                reason = f"id {id!r}: expected a sound question, found none"
                refused.append(Refused(file, where, reason, id))
            else:
                example = Example(id, image, tuple(questions), family)
            place = "" if file == Path(source) else f" of {name_in_set(source, file)}"
            first.setdefault(id, where + place)
            yield ScannedRow(file, where, example, tuple(refused))


def read_question(entry: Any) -> Question:
    """The question of an object with `question`, `choices` and `answer_index` or `answer`. `answer`
    is a letter, a choice's text, or both. Raises ValueError if it makes no sound question, or if
    `answer_index` and `answer` disagree."""
    if isinstance(entry, Question):
        return entry
    if isinstance(entry, Dropped):
        raise ValueError(f"{entry.reason}: {short(entry.text)}")
    try:
        text, choices = entry.get("question"), entry.get("choices")
        place, answer = entry.get("answer_index"), entry.get("answer")
    except AttributeError:
        raise ValueError("expected question, choices and answer_index or answer, "
                         f"got {short(entry)}") from None
    if not isinstance(text, str):
        raise ValueError(f"expected text in 'question', got {short(text)}")
    if not isinstance(choices, list):
        raise ValueError(f"expected a list of choices, got {short(choices)}")
    choices = strip_labels(choices)
    if isinstance(place, float) and place.is_integer():  # pandas, of a column with gaps
        place = int(place)
    if place is None or answer not in (None, ""):
        # Unsound choices are named before an answer that is none.
        Question(text, choices, 0 if place is None else place)
        meant = find_answer(answer, choices)
        if place not in (None, meant):
            raise ValueError(f"expected one choice in answer_index and answer, got {place} and "
                             f"{short(answer)}")
        place = meant
    kind = entry.get("kind") or entry.get("category") or ""
    kind = "/".join(map(str, kind)) if isinstance(kind, list) else str(kind)
    return Question(text, choices, place, kind, entry.get("needs_image") is not False)


# ------------------------------------------------------------------------------- the manifest


def read_manifest(source: str) -> set[tuple[str, str, int | None]]:
    """(file, row, question or None) of all that `python -m data.examples` refused. Empty where it
    was not run. Raises ValueError if a file has changed since."""
    path = manifest_path(source)
    if not path.exists():
        return set()
    (_, head), *rows = read_jsonl(path)
    files = head.get("files") if isinstance(head.get("files"), dict) else {}
    for file in data_files(source):
        name, size = name_in_set(source, file), file.stat().st_size
        if files.get(name) != size:
            raise ValueError(f"{path}: expected a manifest of the files as they are, found another "
                             f"size of {name}; write it anew with "
                             f"`python -m data.examples {source}`")
    return {(row.get("file"), row.get("row"), row.get("question")) for _, row in rows}


def manifest_path(source: str) -> Path:
    """The manifest's path, beside the file or the folder."""
    return Path(os.path.normpath(source) + MANIFEST_SUFFIX)


def name_in_set(source: str, file: Path) -> str:
    """How the manifest calls the file."""
    return file.name if Path(source).is_file() else file.relative_to(source).as_posix()
