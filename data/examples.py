"""An image and its multiple-choice questions: the types that everything passes around, and the
files they come from.

Files are read as they are published, and told apart by what is in them, not by their names:

- CapRL-QA-75K, parquet: `id`, `image`, `reward_model.ground_truth` with `question`, `choices`,
  `answer` (a letter);
- CaptionQA, parquet: `id`, `images`, `questions` with `question`, `choices`, `answer` (a text),
  and `domain`;
- what the released question generator writes, JSONL: `image_path`, `qa_response` (see
  `parse_questions` in data/written.py);
- this project's JSONL, one object per line, with `image` below the file's folder or in base64:
    {"id": "chart-7", "image": "images/chart-7.png", "family": "bars", "questions": [
     {"question": "How many bars?", "choices": ["two", "three"], "answer_index": 1}]}
- a folder of these.

Each row is taken or refused by itself, and each question in it. A run leaves out a refused row
only if the set's manifest lists it:

    python -m data.examples caprl-qa    # counts; refused rows go to caprl-qa.manifest.jsonl
    python -m data.examples part_0.jsonl --image-root photos --out set    # as this project's JSONL
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.choices import MAX_CHOICES, find_answer, plain_text, strip_labels
from data.formats import MANIFEST_SUFFIX, contents, data_files, read_row
from data.images import ImageSource, picture_hash
from data.io import check_text, read_jsonl, short


@dataclass(frozen=True)
class Question:
    """A multiple-choice question. Raises ValueError if it is not sound."""

    question: str
    choices: tuple[str, ...]
    answer_index: int
    """Place of the right option in `choices` as given, before shuffling."""
    kind: str = ""
    """What it asks for ("color", "count"). Kept for the reader of a set; nothing here reads it."""
    needs_image: bool = True
    """False where it can be answered without looking; known in the toy world only."""

    def __post_init__(self):
        if not plain_text(self.question):
            raise ValueError("the question text is empty")
        check_text("question and choices", self.question, self.kind, *map(str, self.choices))
        if not 2 <= len(self.choices) <= MAX_CHOICES:
            raise ValueError(f"expected 2 to {MAX_CHOICES} choices, got {len(self.choices)}")
        if not all(isinstance(choice, str) and plain_text(choice) for choice in self.choices):
            raise ValueError(f"expected non-empty text in every choice, got {list(self.choices)}")
        if len(set(map(plain_text, self.choices))) < len(self.choices):
            raise ValueError(f"expected distinct choices, got {list(self.choices)}")
        if type(self.answer_index) is not int or not 0 <= self.answer_index < len(self.choices):
            raise ValueError(f"answer_index {self.answer_index!r} outside "
                             f"{len(self.choices)} choices")


@dataclass(frozen=True)
class Dropped:
    """In place of a question: a block of a model's text that is no sound one."""

    reason: str
    """One of a few phrases, to be counted by."""
    text: str


@dataclass(frozen=True)
class Example:
    """An image with its questions."""

    id: str
    image: ImageSource
    """Opened when it is needed."""
    questions: tuple[Question, ...]
    family: str = "all"
    other_ids: tuple[str, ...] = ()
    """Ids of later rows with the same picture, whose questions are among these."""


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


def examples_hash(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits of the ids and questions, in order. All draws depend on these."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, *map(astuple, example.questions)]).encode())
    return digest.hexdigest()[:16]


def load_examples(source: str) -> list[Example]:
    """Examples of a file, of a folder of files, or of "toy:SPLIT:NUM": NUM images of the toy world,
    drawn on the spot.

    Each row is an example; `merge_pictures` joins those of one picture. Images are opened later.
    Raises ValueError for an empty set. Raises ValueError too at the first row or question that does
    not fit, naming file, row, expected and found, unless the set's manifest lists it.
    """
    examples, refused = scan_examples(source)
    if refused:
        raise ValueError(f"{refused[0]} (1 of {len(refused)}; `python -m data.examples {source}` "
                         "lists them, and what it lists is left out)")
    if not examples:
        raise ValueError(f"{source}: expected at least one image with questions, found none")
    return examples


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


def merge_pictures(examples: Sequence[Example]) -> list[Example]:
    """One example for each picture: id, image and family of its first row, the questions of all its
    rows, equal questions once."""
    rows_of: dict[tuple, list[Example]] = {}
    keys = picture_keys([example.image for example in examples])
    for key, example in zip(keys, examples, strict=True):
        rows_of.setdefault(key, []).append(example)
    # Only rank 0 says so: each of torchrun's ranks reads the same.
    if len(rows_of) < len(examples) and os.environ.get("RANK", "0") == "0":
        print(f"{len(examples)} rows show {len(rows_of)} pictures: the questions of all rows of a "
              "picture are asked together", file=sys.stderr)
    merged = []
    for first, *others in rows_of.values():
        if others:
            distinct: dict[tuple, Question] = {}
            for question in (question for row in (first, *others) for question in row.questions):
                key = (question.question, question.choices, question.answer_index)
                distinct.setdefault(key, question)
            other_ids = tuple(row.id for row in others)
            first = replace(first, questions=tuple(distinct.values()), other_ids=other_ids)
        merged.append(first)
    return merged


def picture_keys(images: Sequence[ImageSource]) -> list[tuple]:
    """Equal for two images if and only if their bytes are.

    A file is known by its size and its place on the disk, and read only if another picture may have
    the same size. A picture inside a file has no size that is known before it is read.
    """
    keys = [_place_key(image, number) for number, image in enumerate(images)]
    sizes = Counter(size for size, _ in set(keys))
    unsure = {key: image for key, image in zip(keys, images) if None in sizes or sizes[key[0]] > 1}
    hashes = {}
    for key, image in tqdm(unsure.items(), "comparing", unit="picture", delay=2):
        with suppress(ValueError, OSError):  # named later, when the picture is opened
            hashes[key] = (picture_hash(image),)
    return [hashes.get(key, key) for key in keys]


def _place_key(image: ImageSource, number: int) -> tuple:
    """(size, place on the disk) of a file, (None, number) of what is no file."""
    try:
        stat = os.stat(image) if isinstance(image, Path) else None
    except OSError:
        stat = None
    return (stat.st_size, (stat.st_dev, stat.st_ino)) if stat else (None, number)


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
    """From an object with `question`, `choices` and `answer_index` or `answer`. That is a letter, a
    choice's text, or both. Raises ValueError if it makes no sound question."""
    if isinstance(entry, Question):
        return entry
    if isinstance(entry, Dropped):
        raise ValueError(f"{entry.reason}: {short(entry.text)}")
    try:
        text, choices = entry.get("question"), entry.get("choices")
        answer = entry.get("answer_index")
    except AttributeError:
        raise ValueError("expected question, choices and answer_index or answer, "
                         f"got {short(entry)}") from None
    if not isinstance(text, str):
        raise ValueError(f"expected text in 'question', got {short(text)}")
    if not isinstance(choices, list):
        raise ValueError(f"expected a list of choices, got {short(choices)}")
    choices = strip_labels(choices)
    if answer is None:
        Question(text, choices, 0)  # unsound choices are named before an answer that is none
        answer = find_answer(entry.get("answer"), choices)
    kind = entry.get("kind") or entry.get("category") or ""
    kind = "/".join(map(str, kind)) if isinstance(kind, list) else str(kind)
    return Question(text, choices, answer, kind, entry.get("needs_image") is not False)


# ------------------------------------------------------------------------------- the manifest


def read_manifest(source: str) -> set[tuple[str, str, int | None]]:
    """(file, row, question or None) of all that `python -m data.examples` refused. Empty where it
    was not run. Raises ValueError if a file has changed since."""
    path = manifest_path(source)
    if not path.exists():
        return set()
    (_, head), *rows = read_jsonl(path)
    for file in data_files(source):
        name, size = name_in_set(source, file), file.stat().st_size
        if (head.get("files") or {}).get(name) != size:
            raise ValueError(f"{path}: expected a manifest of the files as they are, found another "
                             f"size of {name}; write it anew with "
                             f"`python -m data.examples {source}`")
    return {(row["file"], row["row"], row.get("question")) for _, row in rows}


def manifest_path(source: str) -> Path:
    """The manifest's path, beside the file or the folder."""
    return Path(os.path.normpath(source) + MANIFEST_SUFFIX)


def name_in_set(source: str, file: Path) -> str:
    """How the manifest calls the file."""
    return file.name if Path(source).is_file() else file.relative_to(source).as_posix()


if __name__ == "__main__":
    from data.program import run_program
    from tools.inspect import main

    run_program(main, sys.argv[1:])
