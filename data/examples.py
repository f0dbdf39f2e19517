"""An image and its multiple-choice questions: the two types that everything passes around, and the project's JSONL.

One JSON object per line:
    {"id": "chart-7", "image": "images/chart-7.png", "family": "bars",
     "questions": [{"question": "How many bars are there?", "choices": ["two", "three"], "answer_index": 1}]}
`image` is a path relative to the file. `family` (default "all") groups results; a question may also carry `kind`
and `needs_image`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MAX_CHOICES = 10
"""Options are shown under the letters A to J."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer_index` is the right option's place in `choices` as given, before shuffling."""

    question: str
    choices: tuple[str, ...]
    answer_index: int
    kind: str = ""
    """What it asks for ("color", "count"); for breakdowns only."""
    needs_image: bool = True
    """False where it can be answered without looking; known in the toy world only."""

    def __post_init__(self):
        if not self.question.strip():
            raise ValueError("the question text is empty")
        if not 2 <= len(self.choices) <= MAX_CHOICES:
            raise ValueError(f"expected 2 to {MAX_CHOICES} choices, got {len(self.choices)}")
        if not all(isinstance(choice, str) and choice.strip() for choice in self.choices):
            raise ValueError(f"expected non-empty text in every choice, got {list(self.choices)}")
        folded = [choice.strip().casefold() for choice in self.choices]
        if len(set(folded)) < len(folded):
            raise ValueError(f"expected distinct choices, got {list(self.choices)}")
        if type(self.answer_index) is not int or not 0 <= self.answer_index < len(self.choices):
            raise ValueError(f"answer_index {self.answer_index!r} outside {len(self.choices)} choices")


@dataclass(frozen=True)
class Example:
    """`image` is a file, opened when it is needed, or an RGB picture already in memory."""

    id: str
    image: Path | Image.Image
    questions: tuple[Question, ...]
    family: str = "all"


def load_examples(source: str) -> list[Example]:
    """Examples of a JSONL file, or of "toy:SPLIT:NUM", NUM images of the toy world drawn on the spot.

    Raises ValueError naming file, line, expected and found at the first row that does not fit; also for an empty set.
    """
    if source.startswith("toy:"):
        from data.toy.world import toy_examples  # here, because the toy world builds on the types above

        return toy_examples(source)
    path, examples, first_line = Path(source), [], {}
    for number, row in read_jsonl(path):
        try:
            example = _parse_row(row, path.parent)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        if example.id in first_line:
            raise ValueError(f"{path} line {number}: id {example.id!r} was used before, on line {first_line[example.id]}")
        first_line[example.id] = number
        examples.append(example)
    return examples


def load_images(path: Path) -> list[tuple[str, Path]]:
    """(id, image file) of each row of a JSONL file; the id is the row's `id`, or else its `image` as written."""
    images = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("image"), str):
            raise ValueError(f"{path} line {number}: expected a path in 'image', got {row.get('image')!r}")
        try:
            images.append((str(row.get("id", row["image"])), _image_file(path.parent / row["image"])))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    return images


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not empty. Raises ValueError for a missing, empty or broken file."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSONL file, found {'a folder' if path.is_dir() else 'nothing'}")
    found = False
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
                raise ValueError(f"{path} line {number}: expected a JSON object ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number}: expected a JSON object, got {type(row).__name__}")
            found = True
            yield number, row
    if not found:
        raise ValueError(f"{path}: expected at least one row, found none")


def _parse_row(row: dict, folder: Path) -> Example:
    if missing := [key for key in ("id", "image", "questions") if key not in row]:
        raise ValueError(f"expected the key {missing[0]!r}, got {sorted(row)}")
    if not isinstance(row["image"], str):
        raise ValueError(f"expected a path in 'image', got {row['image']!r}")
    if not isinstance(row["questions"], list) or not row["questions"]:
        raise ValueError(f"expected a list with at least one question, got {row['questions']!r}")
    questions = []
    for place, entry in enumerate(row["questions"]):
        try:
            choices = entry["choices"]
            if not isinstance(choices, list):
                raise ValueError(f"expected a list of choices, got {choices!r}")
            fields = {key: entry[key] for key in ("kind", "needs_image") if key in entry}
            questions.append(Question(str(entry["question"]), tuple(choices), entry["answer_index"], **fields))
        except (KeyError, TypeError):
            raise ValueError(f"question {place}: expected question, choices and answer_index, got {entry!r}") from None
        except ValueError as error:
            raise ValueError(f"question {place}: {error}") from None
    return Example(str(row["id"]), _image_file(folder / row["image"]), tuple(questions), str(row.get("family", "all")))


def _image_file(path: Path) -> Path:
    """Looked for when the rows are read, not days later when its turn comes."""
    if not path.is_file():
        raise ValueError(f"image {path}: expected a file, found nothing")
    return path


def example_row(example: Example, image: str) -> dict:
    """The JSONL row of an example whose picture lies at `image`; `load_examples` reads it back."""
    questions = [
        {"question": q.question, "choices": list(q.choices), "answer_index": q.answer_index, "kind": q.kind,
         "needs_image": q.needs_image}
        for q in example.questions
    ]
    return {"id": example.id, "image": image, "family": example.family, "questions": questions}
