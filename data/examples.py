"""An image and its multiple-choice questions: the two types that everything passes around, and the project's JSONL.

One JSON object per line:
    {"id": "chart-7", "image": "images/chart-7.png", "family": "bars",
     "questions": [{"question": "How many bars are there?", "choices": ["two", "three"], "answer_index": 1}]}
`image` is a path relative to the file. `family` (default "all") groups results; a question may also carry `kind`
and `needs_image`. Choices may carry their letters ("A) two", "B) three"): these are taken off, once, here.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.images import ImageSource

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
        folded = [fold_choice(choice) or choice for choice in self.choices]
        if len(set(folded)) < len(folded):
            raise ValueError(f"expected distinct choices, got {list(self.choices)}")
        if type(self.answer_index) is not int or not 0 <= self.answer_index < len(self.choices):
            raise ValueError(f"answer_index {self.answer_index!r} outside {len(self.choices)} choices")


def fold_choice(text: str) -> str:
    """What of a choice's text counts when it is compared: neither case nor spaces nor the punctuation around it."""
    return re.sub(r"\s+", " ", text).strip(" ,:;!()*\"'`").rstrip(". ").casefold()


@dataclass(frozen=True)
class Example:
    """`image` is opened when it is needed."""

    id: str
    image: ImageSource
    questions: tuple[Question, ...]
    family: str = "all"


def load_examples(source: str) -> list[Example]:
    """Examples of a JSONL file, or of "toy:SPLIT:NUM", NUM images of the toy world drawn on the spot.

    Raises ValueError naming file, line, expected and found at the first row that does not fit; also for an empty set.
    """
    examples, refused = scan_examples(source)
    if refused:
        raise ValueError(refused[0])
    return examples


def scan_examples(source: str) -> tuple[list[Example], list[str]]:
    """The examples whose rows fit, and a sentence on each row that does not. Raises ValueError where no rows can be read."""
    if source.startswith("toy:"):
        from data.toy.world import toy_examples  # here, because the toy world builds on the types above

        return toy_examples(source), []
    path, examples, first_line, refused = Path(source), [], {}, []
    for number, row in read_jsonl(path):
        try:
            example = _parse_row(row, path.parent)
            if example.id in first_line:
                raise ValueError(f"id {example.id!r} was used before, on line {first_line[example.id]}")
        except ValueError as error:
            refused.append(f"{path} line {number}: {error}")
            continue
        first_line[example.id] = number
        examples.append(example)
    return examples, refused


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
        where = f"id {row['id']!r}, question {place}"
        try:
            choices = entry["choices"]
            if not isinstance(choices, list):
                raise ValueError(f"expected a list of choices, got {choices!r}")
            fields = {key: entry[key] for key in ("kind", "needs_image") if key in entry}
            questions.append(Question(str(entry["question"]), strip_labels(choices), entry["answer_index"], **fields))
        except (KeyError, TypeError):
            raise ValueError(f"{where}: expected question, choices and answer_index, got {entry!r}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Example(str(row["id"]), _image_file(folder / row["image"]), tuple(questions), str(row.get("family", "all")))


def strip_labels(choices: list[str]) -> tuple[str, ...]:
    """["A) Beijing", "B) Rome"] to ("Beijing", "Rome"); likewise "A. ", "A: " and "(A) ". Options are given letters when they
    are shuffled.

    Choices are taken as they are unless every one carries a label. Raises ValueError where labels with a bracket are not
    A, B, C, ... in order: which choice the answer means would be a guess.
    """
    found = [re.fullmatch(r"\s*(?:\(?([A-J])\)|([A-J])[.:](?=\s))\s*(.*)", str(choice), re.DOTALL) for choice in choices]
    if not choices or not all(found):
        return tuple(choices)
    labels = [match[1] or match[2] for match in found]
    if labels == list("ABCDEFGHIJ"[: len(labels)]):
        return tuple(match[3].strip() for match in found)
    if any(match[1] for match in found):
        raise ValueError(f"expected choices labelled A, B, C, ... in order, got {choices}")
    return tuple(choices)  # "B. Obama", "A. Lincoln": names


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
