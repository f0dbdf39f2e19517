"""Rows of one picture are one example: which pictures are the same, and what their rows make."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data.examples import Example, ImageSource, Question
from data.images import picture_hash


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
