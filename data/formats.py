"""Rows of files as they are published, told apart by what is in them, not by the files' names:

- CapRL-QA-75K, parquet: `id`, `image`, `reward_model.ground_truth` with `question`, `choices`,
  `answer` (a letter);
- CaptionQA, parquet: `id`, `images`, `questions` with `question`, `choices`, `answer` (a text),
  and `domain`;
- what the released question generator writes, JSONL or parquet: `image_path`, `qa_response` (see
  `parse_questions` in data/written.py);
- this project's JSONL, one object per line, with `image` below the file's folder or in base64, or
  parquet with the same columns:
    {"id": "chart-7", "image": "images/chart-7.png", "family": "bars", "questions": [
     {"question": "How many bars?", "choices": ["two", "three"], "answer_index": 1}]}
- a folder of these.
"""

import base64
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.examples import ImageSource, StoredImage
from data.images import IMAGE_SUFFIXES, image_path
from data.io import short
from data.jsonl import Line, json_rows, row_at

MANIFEST_SUFFIX = ".manifest.jsonl"


def data_files(source: str) -> list[Path]:
    """The file, or every *.parquet and *.jsonl below the folder, linked and hidden folders too; of
    what `python -m data.curate` wrote, examples.jsonl. Files of other endings, but pictures, are
    counted on stderr. Raises ValueError where there is none."""
    if not source:  # pathlib takes it for the working directory
        raise ValueError("expected a file or a folder of files with questions, got an empty text")
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        from data.advice import nothing_there

        raise ValueError(nothing_there(source, "a file or a folder of files with questions"))
    curated = path / "examples.jsonl"
    is_curated = (path / "rows").is_dir() and (path / "settings.json").is_file()
    if is_curated and curated.is_file():  # the other files say how it was made
        return [curated]
    from data.folders import list_files  # here: a single file needs no search

    listed = list_files(path, IMAGE_SUFFIXES | {".parquet", ".jsonl"})
    listed = [file for file in listed if not file.name.endswith(MANIFEST_SUFFIX)]
    files = [file for file in listed if file.suffix.lower() not in IMAGE_SUFFIXES]
    if not files:
        from data.advice import no_files

        raise ValueError(no_files(path, num_pictures=len(listed)))
    return files


def contents(file: Path) -> Iterator[tuple[str, dict | str]]:
    """(where, row) of each row of a parquet or JSONL file. A text in place of a row says why it
    cannot be read."""
    if file.is_file() and file.open("rb").read(4) == b"PAR1":
        from data.parquet import parquet_columns, parquet_rows  # here: a page of its own

        columns = parquet_columns(file)
        names = "id image images image_path reward_model questions qa_response domain family"
        known = [name for name in names.split() if name in columns]
        if not known:
            raise ValueError(f"{file}: expected columns like id, image, reward_model or questions, "
                             f"got {columns}")
        for number, row in parquet_rows(file, known):
            yield f"row {number}", row
    else:
        yield from json_rows(file)


def read_row(row: dict, file: Path, where: str, root: Path) -> tuple[str, ImageSource, str, list]:
    """id, image, family and the questions as written. Raises ValueError for a row without any of
    these."""
    forms = [key for key in ("qa_response", "reward_model", "questions") if key in row]
    form = next((key for key in forms if row[key] is not None), forms[0] if forms else "questions")
    id, entries = row.get("id"), row.get(form)
    if form == "qa_response":
        if not isinstance(entries, str):
            raise ValueError(f"expected text in 'qa_response', got {short(entries)}")
        from data.written import parse_questions  # here: a page of its own, built on this one

        paths = (row.get(key) for key in ("image_path", "image"))
        ids = [id, *(path for path in paths if isinstance(path, str)), where]
        id = id_text(next(id for id in ids if id is not None))
        entries = parse_questions(entries)
    else:
        keys = [form, "id", *([] if {"images", "image_path"} & set(row) else ["image"])]
        missing = [key for key in keys if key not in row]
        if missing:
            from data.advice import row_kind

            keys = sorted(row) if form in row else row_kind(row, file)
            raise ValueError(f"expected the key {missing[0]!r}, got {keys}")
        id = id_text(id)
        if form == "reward_model":
            entries = entries.get("ground_truth") if isinstance(entries, dict) else None
    image = row_image(row, file, where, root)
    if form != "qa_response" and (not isinstance(entries, list) or not entries):
        name = "'reward_model.ground_truth'" if form == "reward_model" else "'questions'"
        raise ValueError(f"expected a list with at least one question in {name}, "
                         f"got {short(entries)}")
    named = (key for key in ("family", "domain") if row.get(key) and row[key] == row[key])  # no NaN
    key = next(named, None)
    return id, image, id_text(row[key], key) if key else "all", entries


def id_text(id: Any, key: str = "id") -> str:
    """The id as text. Raises ValueError if it is empty, or neither text nor a number. Where one is
    missing, pandas makes it to NaN, which is none, and whole numbers to 1.0."""
    if type(id) not in (str, int, float) or id == "" or id != id:
        raise ValueError(f"expected a text or a number in {key!r}, got {short(id)}")
    return str(id)


def row_image(row: dict, file: Path, where: str, root: Path) -> ImageSource:
    """The picture of the row: stored in it, written into it in base64, or at a path. Raises
    ValueError where there is none or more than one."""
    keys = ("image", "images", "image_path")
    key = next((key for key in keys if row.get(key) is not None), "image")
    image = row.get(key)
    if isinstance(image, list):
        if len(image) != 1:
            raise ValueError(f"expected one image in {key!r}, got {len(image)}")
        image = image[0]
    if isinstance(image, StoredImage):
        return image
    if not isinstance(image, str):
        wanted = "a path" if isinstance(row, Line) else "a picture"
        raise ValueError(f"expected {wanted} in {key!r}, got {short(image)}")
    is_base64 = image.startswith("data:") or re.fullmatch(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*", image)
    # "images/" and a hash of 64 digits looks like base64.
    is_file = len(image) < 1024 and os.path.isfile(root / image)
    if is_base64 and isinstance(row, Line) and not is_file:
        return StoredImage(f"{file} {where}", partial(_read_inline, file, where, row.offset, key))
    return image_path(root, image)


def _read_inline(file: Path, where: str, offset: int, key: str) -> bytes:
    image = row_at(file, offset)[key]
    image = image[0] if isinstance(image, list) else image
    try:
        return base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", image), validate=True)
    except ValueError as error:
        raise ValueError(f"{file} {where}: expected a picture in base64 ({error})") from None
