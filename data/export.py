"""A set of images with questions, written as this project's JSONL."""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from data.examples import Example, ImageSource, Question
from data.images import image_bytes
from data.io import json_lines, naming, text_hash, without_links, write_whole


def example_row(example: Example, image: str) -> dict:
    """The JSONL row of an example whose picture lies at `image`; `load_examples` reads it back."""
    questions = list(map(question_row, example.questions))
    return {"id": example.id, "image": image, "family": example.family, "questions": questions}


def question_row(question: Question) -> dict:
    """What `read_question` reads back."""
    return asdict(question) | {"choices": list(question.choices)}


def write_examples(folder: Path, examples: Iterable[Example]) -> int:
    """Writes `folder`/examples.jsonl, and the pictures into `folder`/images.

    Pictures that are files become links where there are links, all others files, as they are
    stored. Those that are there already are left as they are. The rows are written as a whole or
    not at all. Returns their number.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    with naming(folder):
        for example in examples:
            name = f"images/{_file_name(example)}"
            _write_image(example.image, folder / name)
            rows.append(example_row(example, name))
        write_whole(folder / "examples.jsonl", json_lines(rows))
    return len(rows)


def check_not_source(folder: Path, source: str) -> None:
    """Raises ValueError where the set in `folder` is a part of `source`, or is it: writing it anew
    would take away what it is made from."""
    written, origin = (folder / "examples.jsonl").resolve(), Path(source).resolve()
    if written.exists() and origin in (written, *written.parents):
        raise ValueError(f"{folder}: expected a folder that is no part of {source}, which is read; "
                         "take another --out")


def _file_name(example: Example) -> str:
    """The id made fit for a file's name, with its hash: two ids may become alike."""
    plain = re.sub(r"[^\w.-]", "_", example.id).encode()[:60].decode(errors="ignore")
    suffix = example.image.suffix if isinstance(example.image, Path) else ""
    return f"{plain.removesuffix(suffix)}-{text_hash(example.id)}{suffix}"


def _write_image(image: ImageSource, path: Path) -> None:
    """Of an earlier run it may be there already, or another picture that had its id."""
    if isinstance(image, Path):
        target = os.path.relpath(image.absolute(), path.parent.resolve())
        if path.is_symlink() and os.readlink(path) == target:
            return
        link = path.with_name(f"{path.name}.unfinished")
        link.unlink(missing_ok=True)
        with without_links():
            link.symlink_to(target)
            link.replace(path)
            return
    content = image_bytes(image)
    if not (path.is_file() and path.read_bytes() == content):
        write_whole(path, content)
