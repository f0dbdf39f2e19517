"""An image and its multiple-choice questions: the two types that everything passes around, and the files they come from.

Files are read as they are published, and told apart by what is in them, not by their names:

- CapRL-QA-75K, parquet: `id`, `image`, `reward_model.ground_truth` with `question`, `choices`, `answer` (a letter);
- CaptionQA, parquet: `id`, `images`, `questions` with `question`, `choices`, `answer` (a text), and `domain`;
- what the released question generator writes, JSONL: `image_path`, `qa_response` (see `parse_questions`);
- this project's JSONL, one object per line, with `image` below the file's folder or in base64:
    {"id": "chart-7", "image": "images/chart-7.png", "family": "bars",
     "questions": [{"question": "How many bars are there?", "choices": ["two", "three"], "answer_index": 1}]}
- a folder of these.

Each row is taken or refused by itself, and each question in it. A run leaves out only what has been written down before:

    python -m data.examples caprl-qa               # counts what is there; refused rows go to caprl-qa.manifest.jsonl
    python -m data.examples part_0.jsonl --image-root photos --out set    # the same as this project's JSONL with its images
"""

import base64
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from data.images import (
    IMAGE_SUFFIXES,
    ImageSource,
    StoredImage,
    image_bytes,
    image_path,
    image_size,
    list_files,
    open_image,
    picture_hash,
    print_left_out,
)
from data.parquet import is_parquet, parquet_columns, parquet_rows
from grpo.disk import naming
from grpo.distributed import gather_rows, print0, rank, world_size

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
            raise ValueError(f"answer_index {self.answer_index!r} outside {len(self.choices)} choices")


def check_text(name: str, *texts: str) -> None:
    """Raises ValueError for half a surrogate pair: tokenizers would raise TypeError, days later."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected text in {name}, got half a surrogate pair") from None


_WIDE = {0xFF01 + place: 0x21 + place for place in range(94)}  # ASCII, as wide as Chinese signs
_CURLY = "\u201c\u201d\u300c\u300d\u2018\u2019\u3002\u3010\u3011"
SIGNS = _WIDE | str.maketrans(_CURLY, "\"\"\"\"''.[]")
"""For `text.translate`: curly quotes and Chinese signs to their ASCII kin, one for one."""


def plain_text(text: str) -> str:
    """The text as a reader sees it: composed (NFC), single spaces, none around, nothing without
    width. Choices are distinct if these are."""
    seen = re.sub("[\u200b\u2060\ufeff]", "", unicodedata.normalize("NFC", text))
    return " ".join(seen.split())


def fold_text(text: str) -> str:
    """For comparing only: without case, width and style of letters and signs; spaces are kept."""
    folded = unicodedata.normalize("NFKC", text.translate(SIGNS)).casefold()
    return unicodedata.normalize("NFKC", folded)  # casefold takes some letters apart


def fold_choice(text: str) -> str:
    """What of a choice's text counts when it is compared: folded, without the quotes, brackets or
    stars around it and the punctuation after it. `6'` is no `6"`, and `-5` no `5`."""
    folded, before = " ".join(fold_text(plain_text(text)).split()), None
    while folded != before:
        before, folded = folded, folded.rstrip(" .,:;!")
        if len(folded) > 2 and folded[0] + folded[-1] in ('""', "''", "``", "**", "__", "()", "[]"):
            folded = folded[1:-1].strip()
    return folded


def find_choice(text: str, choices: Sequence[str]) -> int | None:
    """Place of the choice that reads as `text` does, or else of the only one that is equal when
    folded: where folding makes two choices one ("Ff", "FF"), only the first will do."""
    for spell in (plain_text, fold_choice):
        spelled = [spell(choice) for choice in choices]
        if spell(text) and spelled.count(spell(text)) == 1:
            return spelled.index(spell(text))
    return None


@dataclass(frozen=True)
class Example:
    """`image` is opened when it is needed."""

    id: str
    image: ImageSource
    questions: tuple[Question, ...]
    family: str = "all"
    other_ids: tuple[str, ...] = ()
    """Of later rows with the same picture, whose questions are among these."""


# ---------------------------------------------------------------------------------------------------- sets of examples

MANIFEST_SUFFIX = ".manifest.jsonl"


@dataclass(frozen=True)
class Refused:
    """What of a file cannot be used: a row, or a question of one."""

    file: Path
    row: str
    """"line 3", counted from 1, in text; "row 2", counted from 0, in parquet."""
    reason: str
    id: str = ""
    question: int | None = None
    """Its place in the row; None for the whole row."""

    def __str__(self) -> str:
        who = "" if self.question is None else f"id {self.id!r}, question {self.question}: "
        return f"{self.file} {self.row}: {who}{self.reason}"


@dataclass(frozen=True)
class Row:
    """A row of a file, read: its example, if it makes one, and what of it is refused."""

    file: Path
    row: str
    example: Example | None
    refused: tuple[Refused, ...]


def examples_hash(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits of the ids and questions, in order: what all draws are functions of."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, *map(astuple, example.questions)]).encode())
    return digest.hexdigest()[:16]


def load_examples(source: str) -> list[Example]:
    """Examples of a file, of a folder of files, or of "toy:SPLIT:NUM", NUM images of the toy world drawn on the spot.

    Each row is an example; `merge_pictures` joins those of one picture. Images are opened later. Raises ValueError naming
    file, row, expected and found at the first row or question that does not fit, unless the set's manifest lists it; also
    for an empty set.
    """
    examples, refused = scan_examples(source)
    if refused:
        advice = f" (1 of {len(refused)}; `python -m data.examples {source}` lists them, and what it lists is left out)"
        raise ValueError(refused[0] + advice)
    if not examples:
        raise ValueError(f"{source}: expected at least one image with questions, found none")
    return examples


def scan_examples(source: str) -> tuple[list[Example], list[str]]:
    """The examples whose rows fit, and a sentence on each row or question that does not. What the set's manifest lists is
    in neither. Raises ValueError where no rows can be read."""
    if source.startswith("toy:"):
        from data.toy.world import toy_examples  # here, because the toy world builds on the types above

        return toy_examples(source), []
    examples, refused, listed = [], [], read_manifest(source)
    for row in scan_rows(source):
        where = (_name_in(source, row.file), row.row)
        refused += [str(one) for one in row.refused if (*where, one.question) not in listed]
        if row.example and (*where, None) not in listed:
            examples.append(row.example)
    return examples, refused


def merge_pictures(examples: Sequence[Example]) -> list[Example]:
    """One example for each picture: id, image and family of its first row, the questions of all its rows, equal ones once.
    Every rank must call this with the same examples."""
    rows_of: dict[tuple, list[Example]] = {}
    for key, example in zip(picture_keys([example.image for example in examples]), examples, strict=True):
        rows_of.setdefault(key, []).append(example)
    if len(rows_of) < len(examples):
        print0(f"{len(examples)} rows show {len(rows_of)} pictures: the questions of all rows of a picture are asked together")
    merged = []
    for first, *others in rows_of.values():
        if others:
            asked: dict[tuple, Question] = {}
            for question in (question for row in (first, *others) for question in row.questions):
                asked.setdefault((question.question, question.choices, question.answer_index), question)
            other_ids = tuple(row.id for row in others)
            first = Example(first.id, first.image, tuple(asked.values()), first.family, other_ids)
        merged.append(first)
    return merged


def picture_keys(images: Sequence[ImageSource]) -> list[tuple]:
    """Equal for two images if and only if their bytes are. Every rank must call this with the same images.

    A file is told by its size and its place on the disk, and read only where another one is as large. A picture inside a file
    has to be read to be told from others: each rank reads a share.
    """
    keys = [_place_key(image, number) for number, image in enumerate(images)]
    sizes = Counter(size for size, _ in set(keys))
    unsure = list({key: image for key, image in zip(keys, images) if None in sizes or sizes[key[0]] > 1}.items())
    start, stop = (len(unsure) * (rank() + end) // world_size() for end in (0, 1))  # neighbours share a row group
    hashes = []
    for place in tqdm(range(start, stop), "comparing", unit="picture", delay=2, disable=rank() != 0):
        with suppress(ValueError, OSError):  # one that cannot be read is named when its turn comes
            hashes.append((place, picture_hash(unsure[place][1])))
    hash_of = {unsure[place][0]: (digits,) for place, digits in gather_rows(hashes)}
    return [hash_of.get(key, key) for key in keys]


def _place_key(image: ImageSource, number: int) -> tuple:
    """(size, where the bytes lie) of a file, (None, number) of what is no file."""
    try:
        stat = os.stat(image) if isinstance(image, Path) else None
    except OSError:
        stat = None
    return (stat.st_size, (stat.st_dev, stat.st_ino)) if stat else (None, number)


def scan_rows(source: str, image_root: str = "") -> Iterator[Row]:
    """Every row of a file or of a folder's files, in order. Paths of images are below `image_root` or, without one, below
    the folder of the file that names them."""
    first: dict[str, str] = {}
    for file in data_files(source):
        root = Path(image_root) if image_root else file.parent
        for where, content in _contents(file):
            if isinstance(content, str):  # why there is none
                yield Row(file, where, None, (Refused(file, where, content),))
                continue
            try:
                id, image, family, entries = _read_row(content, file, where, root)
            except ValueError as error:
                yield Row(file, where, None, (Refused(file, where, str(error)),))
                continue
            questions, refused = [], []
            for place, entry in enumerate(entries):
                try:
                    questions.append(read_question(entry))
                except ValueError as error:
                    refused.append(Refused(file, where, str(error), id, place))
            if id in first:
                refused.append(Refused(file, where, f"id {id!r} was used before, on {first[id]}", id))
            elif not questions:
                refused.append(Refused(file, where, f"id {id!r}: expected a sound question, found none", id))
            is_sound = bool(questions) and id not in first
            first.setdefault(id, where if file == Path(source) else f"{where} of {_name_in(source, file)}")
            yield Row(file, where, Example(id, image, tuple(questions), family) if is_sound else None, tuple(refused))


def data_files(source: str) -> list[Path]:
    """The file, or every *.parquet and *.jsonl below the folder. Raises ValueError where there is none."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{source}: expected a file or a folder of files with questions, found nothing")
    files = (file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl") and file.is_file())
    files = sorted(file for file in files if not file.name.endswith(MANIFEST_SUFFIX))
    if not files:
        raise ValueError(f"{source}: expected *.parquet or *.jsonl in the folder, found none")
    return files


def load_images(path: Path) -> list[tuple[str, ImageSource]]:
    """(id, image) of each image file of a folder; of each row of a parquet or JSONL file, or of a folder with such files and no
    images. Questions are not looked at.

    In JSONL the id is the row's `id`, or else its `image` as written; in parquet, the row's `id` or number. Raises
    ValueError at the first row without an image.
    """
    files = list_files(path, IMAGE_SUFFIXES | {".parquet", ".jsonl"}) if path.is_dir() else []
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if pictures:
        endings = (file.suffix.lower() for file in files)
        print_left_out(path, Counter(ending for ending in endings if ending not in IMAGE_SUFFIXES))
        return [(image.relative_to(path).as_posix(), image) for image in pictures]
    images = []
    for file in data_files(str(path)) if path.is_dir() else [path]:
        for where, content in _contents(file):
            try:
                if isinstance(content, str):
                    raise ValueError(content)
                image = _image(content, file, where, file.parent)
            except ValueError as error:
                raise ValueError(f"{file} {where}: {error}") from None
            written = content.get("image") or content.get("image_path")
            fallback = written if isinstance(written, str) and isinstance(image, Path) else where
            images.append((str(fallback if content.get("id") is None else content["id"]), image))
    return images


# --------------------------------------------------------------------------------------------------------- rows of files


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not empty. Raises ValueError for a missing, empty or broken file."""
    for where, content in json_rows(path):
        if isinstance(content, str):
            raise ValueError(f"{path} {where}: {content}")
        yield int(where.removeprefix("line ")), content


def _contents(file: Path) -> Iterator[tuple[str, dict | str]]:
    """(where, the row or why it cannot be read) of a parquet or JSONL file."""
    if file.is_file() and is_parquet(file):
        columns = parquet_columns(file)
        known = [name for name in ("id", "image", "images", "reward_model", "questions", "domain") if name in columns]
        if not known:
            raise ValueError(f"{file}: expected columns like id, image, reward_model or questions, got {columns}")
        for number, row in parquet_rows(file, known):
            yield f"row {number}", row
    else:
        yield from json_rows(file)


def filled(row: dict) -> dict:
    """The row without its nulls: what is null is absent."""
    return {key: value for key, value in row.items() if value is not None}


def json_rows(path: Path) -> Iterator[tuple[str, dict | str]]:
    """("line 1", the object or why there is none) of each line that is not empty."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a {'JSONL file, found a folder' if path.is_dir() else 'file, found nothing'}")
    found, offset = False, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                found = True
                yield f"line {number}", _json_row(line, offset)
            offset += len(line)
    if not found:
        raise ValueError(f"{path}: expected at least one row, found none")


class _Line(dict):
    """A row that knows where in its file it starts, in bytes: a picture inside it is read from there."""

    offset = 0


def _json_row(line: bytes, offset: int = 0) -> dict | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # a byte order mark is no part of the first key
        if re.search(rb"\\u[dD][89a-fA-F]", line):  # UTF-8 itself has no half surrogate pairs
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "expected text in the row, got half a surrogate pair"
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are such
        return f"expected a JSON object ({error})"
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    row = _Line(row)
    row.offset = offset
    return row


def _read_row(row: dict, file: Path, where: str, root: Path) -> tuple[str, ImageSource, str, list]:
    """id, image, family and the questions as written. Raises ValueError for a row without one of them."""
    forms = [key for key in ("qa_response", "reward_model", "questions") if key in row]
    form = next((key for key in forms if row[key] is not None), forms[0] if forms else "questions")
    id, entries = row.get("id"), row.get(form)
    if form == "qa_response":
        if not isinstance(entries, str):
            raise ValueError(f"expected text in 'qa_response', got {_short(entries)}")
        ids = [row.get(key) for key in ("id", "image_path", "image")]
        id, entries = next((id for id in ids if id is not None), where), parse_questions(entries)
    else:
        keys = ["id", *([] if {"images", "image_path"} & set(row) else ["image"]), form]
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"expected the key {missing[0]!r}, got {sorted(row)}")
        if not isinstance(id, str | int) or id == "":
            raise ValueError(f"expected a text in 'id', got {_short(id)}")
        if form == "reward_model":
            entries = entries.get("ground_truth") if isinstance(entries, dict) else None
    image = _image(row, file, where, root)
    if form != "qa_response" and (not isinstance(entries, list) or not entries):
        name = "'reward_model.ground_truth'" if form == "reward_model" else "'questions'"
        raise ValueError(f"expected a list with at least one question in {name}, got {_short(entries)}")
    return str(id), image, str(row.get("family") or row.get("domain") or "all"), entries


def _image(row: dict, file: Path, where: str, root: Path) -> ImageSource:
    """The row's one picture: stored in the row, written into it in base64, or a path."""
    key = next((key for key in ("image", "images", "image_path") if row.get(key) is not None), "image")
    image = row.get(key)
    if isinstance(image, list):
        if len(image) != 1:
            raise ValueError(f"expected one image in {key!r}, got {len(image)}")
        image = image[0]
    if isinstance(image, StoredImage):
        return image
    if not isinstance(image, str):
        raise ValueError(f"expected {'a picture' if not isinstance(row, _Line) else 'a path'} in {key!r}, got {_short(image)}")
    is_base64 = image.startswith("data:") or re.fullmatch(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*", image)
    is_file = len(image) < 1024 and (root / image).is_file()  # "images/" and a hash of 64 digits looks like base64
    if is_base64 and isinstance(row, _Line) and not is_file:
        return StoredImage(f"{file} {where}", partial(_read_inline, file, where, row.offset, key))
    return image_path(root, image)


def _read_inline(file: Path, where: str, offset: int, key: str) -> bytes:
    with file.open("rb") as opened:
        opened.seek(offset)
        image = json.loads(opened.readline())[key]
    image = image[0] if isinstance(image, list) else image
    try:
        return base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", image), validate=True)
    except ValueError as error:
        raise ValueError(f"{file} {where}: expected a picture in base64 ({error})") from None


def read_question(entry: Any) -> Question:
    """From an object with `question`, `choices` and `answer_index`, or `answer`: a letter, a choice's text, or both."""
    if isinstance(entry, Question):
        return entry
    if isinstance(entry, Dropped):
        raise ValueError(f"{entry.reason}: {_short(entry.text)}")
    try:
        text, choices = entry.get("question"), entry.get("choices")
        answer = entry.get("answer_index")
    except AttributeError:
        raise ValueError(f"expected question, choices and answer_index or answer, got {_short(entry)}") from None
    if not isinstance(text, str):
        raise ValueError(f"expected text in 'question', got {_short(text)}")
    if not isinstance(choices, list):
        raise ValueError(f"expected a list of choices, got {_short(choices)}")
    choices = strip_labels(choices)
    if answer is None:
        Question(text, choices, 0)  # that the choices are sound comes before which one is right
        answer = find_answer(entry.get("answer"), choices)
    kind = entry.get("kind") or entry.get("category") or ""
    kind = "/".join(map(str, kind)) if isinstance(kind, list) else str(kind)
    return Question(text, choices, answer, kind, entry.get("needs_image") is not False)


# Read after `translate(SIGNS)`; \u3001 is the comma of Chinese lists. "A.M." has no label.
_AFTER_STOP = r"(?=\**(?:\s|[^\W\d_]{2}|[^\x00-\x7f]))"
_LABEL = rf"\**(?:[(\[]?([A-J])[)\]]|([A-J])(?:[.:]{_AFTER_STOP}|\u3001))\**"
_LABELLED = re.compile(rf"\s*{_LABEL}\s*", re.IGNORECASE)


def strip_labels(choices: list[str]) -> tuple[str, ...]:
    """["A) Beijing", "B) Rome"] to ("Beijing", "Rome"); likewise "A. ", "A: ", "(A) ", "[A] ",
    small letters, bold ones and their Chinese forms. Options are given letters when they are
    shuffled.

    Choices are taken as they are unless every one carries a label. Raises ValueError where labels with a bracket are not
    A, B, C, ... in order: which choice the answer means would be a guess.
    """
    matches = [_LABELLED.match(str(choice).translate(SIGNS)) for choice in choices]
    if not choices or not all(matches):
        return tuple(choices)
    labels = "".join(match[1] or match[2] for match in matches).upper()
    if labels == "ABCDEFGHIJ"[: len(labels)]:
        return tuple(str(choice)[match.end() :].strip() for choice, match in zip(choices, matches))
    if any(match[1] for match in matches):
        raise ValueError(f"expected choices labelled A, B, C, ... in order, got {choices}")
    return tuple(choices)  # "B. Obama", "A. Lincoln": names


def find_answer(answer: Any, choices: tuple[str, ...]) -> int:
    """Place of the choice that an answer key means: "C", "C)", "C) green" or "green". Choices come without their labels.

    Raises ValueError where that is none or not the only one; where letter and text disagree, both are in doubt.
    """
    if not isinstance(answer, str) or not answer.strip(" *_"):
        raise ValueError(f"expected the answer's letter or text, got {_short(answer)}")
    said = answer.strip(" \t\n*_")
    by_text = find_choice(said, choices)
    if by_text is not None and len(said) > 1:
        return by_text
    match = re.match(rf"(?:{_LABEL}|([A-J])[.*]*$)\s*", said.translate(SIGNS), re.IGNORECASE)
    if not match:
        if by_text is None:
            raise ValueError(f"expected an answer among the choices {list(choices)}, got {answer!r}")
        return by_text
    letter, rest = (match[1] or match[2] or match[3]).upper(), said[match.end() :]
    by_letter = "ABCDEFGHIJ".index(letter)
    if by_letter >= len(choices):
        raise ValueError(f"expected a letter of the {len(choices)} choices as the answer, got {answer!r}")
    if (rest and find_choice(rest, choices) != by_letter) or by_text not in (None, by_letter):
        raise ValueError(f"letter and text of the answer disagree: {answer!r}, where {letter} is {choices[by_letter]!r}")
    return by_letter


# ------------------------------------------------------------------------------------------- questions written by a model


@dataclass(frozen=True)
class Dropped:
    """A block of a model's text that is no sound question. `reason` is one of a few phrases, to be counted by."""

    reason: str
    text: str


_NUMBER = r"(?:Q(?:uestion)?[ \t]*)?\d+[.):\uff1a\u3001]"
_HEADER = re.compile(rf"^[ \t]*(?:#{{1,6}}[ \t]+|\**{_NUMBER}[\s*])", re.IGNORECASE)
_RULE = re.compile(r"^\s*[-_*=—]{3,}\s*$")
_OPTION = re.compile(r"^[\s\-*•]*[(\uff08]?([A-J])\**[)\uff09.:\u3001\uff0e\uff1a]\**\s*(.*?)\s*$")
_ANSWER = re.compile(
    r"^[\s\-*#>]*(?:the\s+)?(?:correct\s+)?(?:answer|答案)\**\s*(?:is)?\s*[:\uff1a]\**\s*(.*?)\s*$", re.IGNORECASE
)


def parse_questions(text: str) -> list[Question | Dropped]:
    """The questions in a model's text, and in their places the blocks that are none. A block, as data.curate asks for it:

        #### 1. **How many bars are there?**
           - A) two
           - B) three
        **Answer:** B) three
        ------

    Letter and text of the answer must agree where both are given. What is neither question, option nor answer is passed over.
    """
    found: list[Question | Dropped] = []
    for block in _blocks(text):
        try:
            found.append(_parse_block(block))
        except ValueError as error:
            found.append(Dropped(str(error), "\n".join(block).strip()))
    return found


def _blocks(text: str) -> list[list[str]]:
    """Lines of each block. What stands before the first header or after a rule counts only if it has options or an answer."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if _RULE.match(line):
            blocks.append([])
        elif _HEADER.match(line):
            blocks.append([line])
        else:
            blocks[-1].append(line)
    return [block for block in blocks if block and any(_HEADER.match(x) or _OPTION.match(x) or _ANSWER.match(x) for x in block)]


def _parse_block(block: list[str]) -> Question:
    """Raises ValueError with one of a few phrases, to be counted by; the block itself tells the rest."""
    words, options, answers = [], [], []
    for line in [_HEADER.sub("", block[0]), *block[1:]]:
        if match := _ANSWER.match(line):
            answers.append(match[1])
        elif answers:
            continue  # an explanation
        elif (match := _OPTION.match(line)) and words:
            options.append((match[1], match[2].strip("*")))
        elif options and line.strip():
            options[-1] = (options[-1][0], f"{options[-1][1]} {line.strip()}")
        elif line.strip():
            words.append(re.sub(rf"^{_NUMBER}\s*", "", line.strip(" \t#*")).strip(" *"))
    if not (question := " ".join(words).strip()):
        raise ValueError("no question")
    if len(options) < 2:
        raise ValueError("fewer than two options")
    if "".join(letter for letter, _ in options) != "ABCDEFGHIJ"[: len(options)]:
        raise ValueError("options not lettered A, B, C, ... in order")
    if len(answers) != 1 or not answers[0].strip(" *_"):
        raise ValueError("no answer" if len(answers) < 2 else "more than one answer")
    choices = tuple(text for _, text in options)
    try:
        Question(question, choices, 0)
    except ValueError:
        raise ValueError("options empty or alike") from None
    try:
        return Question(question, choices, find_answer(answers[0], choices))
    except ValueError:
        raise ValueError("answer is none of the options, or its letter and text disagree") from None


# -------------------------------------------------------------------------------------------------- manifest and export


def read_manifest(source: str) -> set[tuple[str, str, int | None]]:
    """(file, row, question or None) of all that `python -m data.examples` refused; empty where it was not run.

    Raises ValueError if a file has changed since.
    """
    path = manifest_path(source)
    if not path.exists():
        return set()
    (_, head), *rows = read_jsonl(path)
    for file in data_files(source):
        name, size = _name_in(source, file), file.stat().st_size
        if (head.get("files") or {}).get(name) != size:
            raise ValueError(f"{path}: expected a manifest of the files as they are, found another size of {name}; "
                             f"write it anew with `python -m data.examples {source}`")
    return {(row["file"], row["row"], row.get("question")) for _, row in rows}


def manifest_path(source: str) -> Path:
    """Beside the file or the folder."""
    return Path(os.path.normpath(source) + MANIFEST_SUFFIX)


def _name_in(source: str, file: Path) -> str:
    return file.name if Path(source).is_file() else file.relative_to(source).as_posix()


def _short(value: Any) -> str:
    """For messages: a picture in base64 is a long word."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def example_row(example: Example, image: str) -> dict:
    """The JSONL row of an example whose picture lies at `image`; `load_examples` reads it back."""
    return {"id": example.id, "image": image, "family": example.family, "questions": list(map(question_row, example.questions))}


def question_row(question: Question) -> dict:
    """What `read_question` reads back."""
    return asdict(question) | {"choices": list(question.choices)}


def write_examples(folder: Path, examples: Iterable[Example]) -> int:
    """Writes `folder`/examples.jsonl with the pictures beside it, in images/: files as links, all others as they are stored.

    Returns the number of examples. Written as a whole or not at all; pictures that are there are left as they are.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    target, num = folder / "examples.jsonl", 0
    unfinished = target.with_name("examples.jsonl.unfinished")
    with naming(folder), unfinished.open("w", encoding="utf-8") as file:
        for example in examples:
            name = f"images/{_file_name(example)}"
            _write_image(example.image, folder / name)
            file.write(json.dumps(example_row(example, name), ensure_ascii=False) + "\n")
            num += 1
    unfinished.replace(target)
    return num


def _file_name(example: Example) -> str:
    """The id made fit for a file's name, and something of its hash, since two ids may become alike."""
    plain = re.sub(r"[^\w.-]", "_", example.id)[:60]
    suffix = example.image.suffix if isinstance(example.image, Path) else ""
    return plain.removesuffix(suffix) + f"-{hashlib.sha256(example.id.encode()).hexdigest()[:8]}{suffix}"


def _write_image(image: ImageSource, path: Path) -> None:
    if path.exists() or path.is_symlink():
        return
    if isinstance(image, Path):
        path.symlink_to(os.path.relpath(image.absolute(), path.parent.resolve()))
        return
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(image_bytes(image))
    unfinished.replace(path)


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `python -m data.examples`."""

    source: Annotated[str, tyro.conf.Positional]
    """A file or a folder."""
    image_root: str = ""
    """The folder that paths of images must lie in; without it, that of the file that names them. Needs `out`."""
    out: str = ""
    """A folder for the set as this project's JSONL, with its images."""
    decode: bool = False
    """Decode every image, not only its head."""


def inspect(config: InspectConfig) -> dict[str, int]:
    """Reads all rows and the heads of all images, prints counts and writes the manifest; returns the counts."""
    if config.image_root and not config.out:
        raise ValueError("image_root: expected `out` with it, since a run looks for images beside the file")
    kept, refused, num_rows = [], [], 0
    for row in tqdm(scan_rows(config.source, config.image_root), desc="rows", unit="row"):
        num_rows += 1
        refused += row.refused
        if row.example:
            try:
                (open_image if config.decode else image_size)(row.example.image)
                kept.append(row.example)
            except ValueError as error:
                reason = str(error).removeprefix(f"{row.file} {row.row}: ")  # how a picture in a row is called
                refused.append(Refused(row.file, row.row, reason, row.example.id))
    counts = {"rows": num_rows, "images": len(kept), "questions": sum(len(example.questions) for example in kept),
              "refused rows": sum(one.question is None for one in refused),
              "refused questions": sum(one.question is not None for one in refused)}
    files = {_name_in(config.source, file): file.stat().st_size for file in data_files(config.source)}
    rows = [{"file": _name_in(config.source, one.file), "row": one.row, "question": one.question, "id": one.id,
             "reason": one.reason} for one in refused]
    path = manifest_path(config.source)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [{"files": files} | counts, *rows]]
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: expected to write the manifest beside the set ({error.strerror}); "
                         f"link the set into a folder of your own") from None
    print("\n".join([*(f"{value:8d} {name}" for name, value in counts.items()), *(f"refused  {one}" for one in refused[:5])]))
    print(f"manifest: {path}")
    if config.out:
        print(f"{write_examples(Path(config.out), kept)} images: {Path(config.out) / 'examples.jsonl'}")
    return counts


if __name__ == "__main__":
    from grpo.config import run_program

    run_program(lambda arguments: inspect(tyro.cli(InspectConfig, args=arguments)), sys.argv[1:])
