"""An image and its multiple-choice questions: the types that everything passes around.

data/formats.py says which files they come from. Each row of a file is taken or refused by itself,
and each question in it. A run leaves out a refused row only if the set's manifest lists it:

    python -m data.examples caprl-qa    # counts; refused rows go to caprl-qa.manifest.jsonl
    python -m data.examples part_0.jsonl --image-root photos --out set    # as this project's JSONL
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data.choices import MAX_CHOICES, plain_text
from data.io import check_text


@dataclass(frozen=True)
class StoredImage:
    """A picture inside a larger file, such as a row of a parquet file or a member of a tar file. It
    is read when it is needed."""

    name: str
    """How messages and records call it: "train-00000.parquet row 17"."""
    read: Callable[[], bytes] = field(repr=False)


ImageSource = Path | StoredImage | Image.Image
"""A file, a picture inside one, or one in memory."""


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


def load_examples(source: str) -> list[Example]:
    """Examples of a file or of a folder of files, one for each row; `merge_pictures` in
    data/pictures.py joins those of one picture. "toy:SPLIT:NUM" is NUM images of the toy world.

    Raises ValueError for an empty set, or at the first row or question that does not fit, unless
    the set's manifest lists it. It names file, row, expected and found, and where no row can be
    used, what the set is.
    """
    from data.rows import scan_examples  # here: how files are read is a page of its own

    examples, refused = scan_examples(source)
    if not examples:
        from data.advice import no_sound_row

        raise ValueError(no_sound_row(source, refused))
    if refused:
        raise ValueError(f"{refused[0]} (1 of {len(refused)}; `python -m data.examples {source}` "
                         "lists them, and what it lists is left out)")
    return examples


if __name__ == "__main__":
    from data.program import run_program
    from tools.inspect import main

    run_program(main)
