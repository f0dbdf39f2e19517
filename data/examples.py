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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data.choices import MAX_CHOICES, plain_text
from data.images import ImageSource, picture_hash
from data.io import check_text


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
class Example:
    """An image with its questions."""

    id: str
    image: ImageSource
    """Opened when it is needed."""
    questions: tuple[Question, ...]
    family: str = "all"
    other_ids: tuple[str, ...] = ()
    """Ids of later rows with the same picture, whose questions are among these."""


def examples_hash(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits of the ids and questions, in order. All draws depend on these."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, *map(astuple, example.questions)]).encode())
    return digest.hexdigest()[:16]


def load_examples(source: str) -> list[Example]:
    """Examples of a file or of a folder of files. "toy:SPLIT:NUM" is NUM images of the toy world,
    drawn on the spot.

    Each row is an example; `merge_pictures` joins those of one picture. Images are opened later.
    Raises ValueError for an empty set. Raises ValueError too at the first row or question that does
    not fit, unless the set's manifest lists it. It names file, row, expected and found.
    """
    from data.rows import scan_examples  # here: how files are read is a page of its own

    examples, refused = scan_examples(source)
    if refused:
        raise ValueError(f"{refused[0]} (1 of {len(refused)}; `python -m data.examples {source}` "
                         "lists them, and what it lists is left out)")
    if not examples:
        raise ValueError(f"{source}: expected at least one image with questions, found none")
    return examples


def merge_pictures(examples: Sequence[Example]) -> list[Example]:
    """One example for each picture. It has id, image and family of its first row, and the questions
    of all its rows, equal ones once. A question with two answers stays twice, and the rows are
    named. Which of them is wrong is not known here."""
    rows_of: dict[tuple, list[Example]] = {}
    keys = picture_keys([example.image for example in examples])
    for key, example in zip(keys, examples, strict=True):
        rows_of.setdefault(key, []).append(example)
    notes, disputed, merged = [], [], []
    if len(rows_of) < len(examples):
        notes.append(f"{len(examples)} rows show {len(rows_of)} pictures: the questions of all "
                     "rows of a picture are asked together")
    for rows in rows_of.values():
        distinct: dict[tuple, Question] = {}
        answers: dict[tuple, tuple[str, str]] = {}
        for question, id in [(question, row.id) for row in rows for question in row.questions]:
            answer = question.choices[question.answer_index]
            distinct.setdefault((question.question, question.choices, answer), question)
            asked = (question.question, *sorted(question.choices))
            first_answer, first_id = answers.setdefault(asked, (answer, id))
            if answer != first_answer:
                disputed.append(f"{question.question!r} is {first_answer!r} in row {first_id!r} "
                                f"and {answer!r} in row {id!r}")
        first, *others = rows
        if others:
            other_ids = tuple(row.id for row in others)
            first = replace(first, questions=tuple(distinct.values()), other_ids=other_ids)
        merged.append(first)
    if disputed:
        notes.append(f"questions with two answers on one picture: {len(disputed)}; {disputed[0]}")
    if notes and os.environ.get("RANK", "0") == "0":  # each of torchrun's ranks reads the same
        print(*notes, sep="\n", file=sys.stderr)
    return merged


def picture_keys(images: Sequence[ImageSource]) -> list[tuple]:
    """Equal for two images if and only if their bytes are.

    A file is known by its size and its place on the disk. It is read only if another picture may
    have the same size. A picture inside a file has no size that is known before it is read.
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


if __name__ == "__main__":
    from data.program import run_program
    from tools.inspect import main

    run_program(main, sys.argv[1:])
