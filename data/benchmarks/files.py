"""Rows of evaluation files as they are published: VLMEvalKit's TSV, parquet, JSONL, JSON.

Pictures stay in their file: a row knows how to read its own when it is asked for.
"""

import ast
import base64
import binascii
import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

from data.examples import ImageSource, StoredImage
from data.formats import id_text, row_image
from data.images import image_name, image_path, picture_hash
from data.io import check_fetched, check_text, read_json, short
from data.jsonl import decode_json, filled, json_rows
from data.parquet import check_columns, parquet_rows

csv.field_size_limit(sys.maxsize)  # a cell may hold a picture

REFERENCE_LENGTH = 64
"""Characters of a cell in a TSV's image column. A cell up to this length is the index of the row
that has the picture (VLMEvalKit's rule)."""
ID_COLUMNS = ("id", "index", "questionId", "question_id", "data_id")
IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Row:
    """A row of any of the formats: cells by the name of their column, and its picture."""

    where: str
    id: str
    cells: dict
    picture: Callable[[], tuple[str, ImageSource]]
    """The hash of the picture's bytes, and the picture. Raises ValueError if the row has none, or
    several."""

    def cell(self, *names: str):
        """The first of the columns that is there and filled. Raises ValueError if none is."""
        values = self._filled(names)
        if not values:
            columns = sorted(map(str, self.cells))
            raise ValueError(
                f"expected {' or '.join(names)}, found columns {columns}, or empty cells"
            )
        return values[0]

    def text(self, *names: str) -> str:
        """"" if none of the columns is filled; of a list, its first entry."""
        values = self._filled(names)
        value = values[0] if values else ""
        return entry_text(value[0] if isinstance(value, list) else value).strip()

    def _filled(self, names: tuple[str, ...]) -> list:
        cells = [self.cells.get(name) for name in names]
        return [cell for cell in cells if cell not in (None, "", [])]


def file_rows(path: Path) -> Iterator[Row | str]:
    """The rows of a file, or of a split's parquet files: a folder of them, or a pattern. In place
    of a line that is no row, a sentence. Raises ValueError for a file that cannot be read."""
    if path.is_dir() or "*" in path.name:
        files = sorted(path.glob("*.parquet") if path.is_dir() else path.parent.glob(path.name))
        # "test" of "test-00000-of-00002.parquet"; "" of "0000.parquet", as the hub converts a split
        splits = sorted({re.split(r"^\d+\.|-\d", file.name)[0] for file in files})
        if len(splits) != 1 or not all(file.suffix == ".parquet" for file in files):
            raise ValueError(f"{path}: expected parquet files of one split (choose as in "
                             f"'test-*.parquet'), found {splits}")
        for file in files:
            yield from picture_rows(file)
    elif not path.is_file():
        from data.advice import nothing_there

        raise ValueError(nothing_there(path, "a benchmark's file"))
    elif path.suffix == ".parquet":
        yield from picture_rows(path)
    elif path.suffix == ".tsv":
        yield from _tsv_rows(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.suffix == ".json":
        yield from _json_rows(path)
    else:
        raise ValueError(f"{path}: expected a .tsv, .parquet, .jsonl or .json file")


# ------------------------------------------------------------------------------------ JSONL, JSON


def _jsonl_rows(path: Path) -> Iterator[Row | str]:
    for where, content in json_rows(path):
        if isinstance(content, str):
            yield f"{path} {where}: {content}"
            continue
        cells = told(content)

        def picture(cells=cells):
            if "img_path" in cells:  # CAPEval
                return _picture_file("img_path", path.parent / "image" / str(cells["img_path"]))
            written = str(cells.get("image", cells.get("image_path", "")))
            return _picture_file("image", path.parent / written.replace("\\", "/"))

        key = "img_path" if "img_path" in cells else "id"
        written = cells.get(key, "")
        try:
            id = where.removeprefix("line ") if written == "" else id_text(written, key)
        except ValueError as error:
            yield f"{path} {where}: {error}"
            continue
        yield Row(f"{path} {where}", id, cells, picture)


def _json_rows(path: Path) -> Iterator[Row | str]:
    """A list of rows, as CapRL's evaluation files are. A row's id is its place in the list: what
    else could be one, may be that of a picture with several questions. Paths are below the folder
    of the file or, if that is called json_file, below the one that holds it."""
    check_fetched(path, "a JSON list of rows")
    rows = read_json(path, "a JSON list of rows", decode=decode_json)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a JSON list of rows, found {short(rows)}")
    folder = path.absolute().parent
    root = folder.parent if folder.name == "json_file" else folder
    for place, content in enumerate(rows):
        where = f"{path} row {place}"
        try:
            check_text("the row", json.dumps(content, ensure_ascii=False))
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        if not isinstance(content, dict):
            yield f"{where}: expected a JSON object, got {short(content)}"
            continue
        cells = told(content)

        def picture(cells=cells):
            names = image_names(cells.get("image", []))
            if len(names) != 1:
                raise ValueError(f"image: expected one file, found {names}")
            file = image_path(root, names[0].removeprefix("file://"))
            return picture_hash(file), file

        yield Row(where, str(place), cells, picture)


def image_names(value: Any) -> list[str]:
    """The files that a cell names: a path, or the `image` parts of a chat's messages."""
    if isinstance(value, dict):
        content = value.get("content")
        value = value.get("image", content if isinstance(content, list) else [])
    if isinstance(value, list):
        return [name for entry in value for name in image_names(entry)]
    return [value] if isinstance(value, str) else []


def _picture_file(column: str, file: Path) -> tuple[str, Path]:
    if not os.path.isfile(file):  # Path's own raises for a name that is too long
        raise ValueError(f"{column} {image_name(file)}: expected a file, found nothing")
    return picture_hash(file), file


# --------------------------------------------------------------------------------------------- TSV


def _tsv_rows(path: Path) -> Iterator[Row | str]:
    """Pictures stay in the file. A row's place in it is kept, and the row is read again when its
    picture is wanted."""
    check_fetched(path, "a file of rows")
    spans: dict[str, tuple[int, int]] = {}  # index -> bytes of the row
    with path.open("rb") as file:
        place, row_lines = 0, []

        def lines():
            nonlocal place
            for line in file:
                place += len(line)
                row_lines.append(line.decode("utf-8-sig" if place == len(line) else "utf-8"))
                yield row_lines[-1]

        reader = csv.reader(lines(), delimiter="\t")
        header = _next_cells(reader, f"{path}") or []
        check_columns(path, header)
        start, number = place, 0
        row_lines.clear()
        while (values := _next_cells(reader, f"{path} row {number}")) is not None:
            if fault := _shifted(header, values, row_lines):
                yield f"{path} row {number}: {fault}"
            elif values:
                cells = told(dict(zip(header, values)))
                index = cells.setdefault("index", str(number))
                spans.setdefault(index, (start, place))
                yield Row(f"{path} row {number}", index, cells,
                          lambda cells=cells: _tsv_picture(path, header, cells, spans))
            start, number = place, number + 1
            row_lines.clear()


def _shifted(header: list[str], values: list[str], lines: list[str]) -> str:
    """How the cells of a row have come below other columns; empty if they have not."""
    is_sound = len(values) <= len(header)
    if len(lines) > 1:  # a cell in quotation marks breaks its line, or its last mark is missing
        try:
            is_sound = len(next(csv.reader(lines, delimiter="\t", strict=True))) == len(header)
        except csv.Error:
            is_sound = False
    found = len(values) if len(values) > len(header) else f"{len(lines)} lines"
    return "" if is_sound else (f"expected {len(header)} cells as in the header, found {found} "
                                "(a tab inside one, or a quotation mark that is not closed?)")


def _next_cells(reader: Iterator[list[str]], where: str) -> list[str] | None:
    """The cells of the next row; None after the last row."""
    try:
        return next(reader, None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: expected tab-separated UTF-8 text ({error})") from None


def _tsv_picture(path: Path, header: list[str], cells: dict,
                 spans: dict[str, tuple[int, int]]) -> tuple[str, ImageSource]:
    """The index of another row, a list of one, or base64 text."""
    if "image" not in cells and cells.get("image_path"):
        return _picture_file("image_path", path.parent / _single(cells["image_path"]))
    index, text = cells["index"], _single(cells.get("image", ""))
    for _ in range(2):  # a row may refer to a picture, not to another reference
        if text and len(text) <= REFERENCE_LENGTH:
            index = text
            if index not in spans:
                raise ValueError(f"image {index!r}: expected base64 text or the index of a row "
                                 "above, found neither")
            text = _single(_tsv_cells(path, header, spans[index]).get("image", ""))
    name, span = f"{path} index {index}", spans[index]
    digest = picture_hash(StoredImage(name, lambda: _decode(text)))
    return digest, StoredImage(
        name, lambda: _decode(_single(_tsv_cells(path, header, span)["image"]))
    )


def _tsv_cells(path: Path, header: list[str], span: tuple[int, int]) -> dict:
    with path.open("rb") as file:
        file.seek(span[0])
        text = file.read(span[1] - span[0]).decode()
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter="\t")
    return dict(zip(header, next(reader)))


def _single(cell: str) -> str:
    """The only entry of a cell that may be a list: "x", "['x']". Raises ValueError for more or
    none."""
    entries = text_list(cell) if cell.lstrip().startswith("[") else [cell]
    if len(entries) != 1:
        raise ValueError(f"expected one image, found {len(entries)}")
    return entries[0]


def _decode(text: str) -> bytes:
    if not text:
        raise ValueError("expected an image, found an empty cell")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"image: expected base64 text ({error})") from None


# ----------------------------------------------------------------------------------------- parquet


def picture_rows(path: Path, group: int | None = None,
                 id_columns: Sequence[str] = ID_COLUMNS) -> Iterator[Row]:
    """The rows of a parquet file, or of one row group. A row without an id has its place for one.
    Raises ValueError if they cannot be read, or where an id is neither text nor a number."""
    for place, cells in parquet_rows(path, group=group):
        cells = told(cells)
        key = next((key for key in id_columns if cells.get(key, "") != ""), "")
        try:
            id = id_text(cells[key], key) if key else f"{path.stem}:{place}"
        except ValueError as error:
            raise ValueError(f"{path} row {place}: {error}") from None

        def picture(cells=cells, where=f"row {place}"):
            image = cells.get("binary")  # DetailCaps: its `image` says where it came from
            if not isinstance(image, StoredImage):
                image = row_image(cells, path, where, path.parent)
            return picture_hash(image), image

        yield Row(f"{path} row {place}", id, cells, picture)


# ----------------------------------------------------------------------------------- cells as text


def told(cells: dict) -> dict:
    """The cells that are filled. Null is empty, and so is pandas' nan, also written as text."""
    return {key: cell for key, cell in filled(cells).items() if cell != "nan" and cell == cell}


def entry_text(entry: Any) -> str:
    """The text of a cell, or of a list's entry, that is text or a number; of null and of nan it is
    empty. Raises ValueError for any other value: its text in Python is no answer."""
    if isinstance(entry, bool) or not isinstance(entry, str | Number | None):
        raise ValueError(f"expected a text or a number, got {short(entry)}")
    return "" if entry is None or entry != entry else str(entry)


def text_list(text: str) -> list[str]:
    """["a", "b"] of "['a', 'b']". Never evaluated; ValueError for what is no list."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        reason = type(error).__name__
        raise ValueError(f"expected a list in {text[:60]!r} ({reason})") from None
    if not isinstance(value, list):
        raise ValueError(f"expected a list in {text[:60]!r}, found {type(value).__name__}")
    return ["" if entry is None else str(entry) for entry in value]
