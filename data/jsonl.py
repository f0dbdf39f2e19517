"""Rows of JSONL files: of our own, which may still be written, and of others, which may be
broken."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.io import check_fetched, check_text, short


def read_log(path: Path) -> list[dict]:
    """Rows of a JSONL file of ours that may still be written to, or whose writer was stopped.

    It differs from `read_jsonl`. A missing file is empty. A last line that was cut off is left out,
    and so are zeros that a power cut left. Raises ValueError, naming file and line, for any other
    line that is no JSON object.
    """
    rows = []
    content = path.read_bytes() if path.exists() else b""
    lines = content.rstrip(b"\0\r\n ").split(b"\n")
    for number, line in enumerate(lines, start=1):
        line = line.strip(b"\0\r ")
        row = _json_row(line) if line else ""
        is_value = not row or ", got" in row  # a line that was cut off is none
        if isinstance(row, dict):
            rows.append(row)
        elif number == len(lines) and not is_value and (rows or not content.endswith(b"\n")):
            break  # but a file of nothing else is no log
        elif row:
            raise ValueError(f"{path} line {number}: {row}")
    return rows


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of each line that is not empty. Raises ValueError at the first line that
    is no row, and for a missing or empty file."""
    for where, row in json_rows(path):
        if isinstance(row, str):
            raise ValueError(f"{path} {where}: {row}")
        yield int(where.removeprefix("line ")), row


def _once(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"expected each key once, got {max(keys, key=keys.count)!r} twice")
    return row


decode_json = json.JSONDecoder(
    object_pairs_hook=_once,
    parse_constant=lambda name: None if name == "NaN" else float(name),
).decode
"""As json.loads, which takes the last of equal keys. Raises ValueError for them. NaN is null: so
Python writes what is missing from a table of pandas."""


def filled(row: dict) -> dict:
    """The row without its nulls: what is null is absent."""
    return {key: value for key, value in row.items() if value is not None}


def check_form(where: str, row: dict, form: dict[str, Any]) -> None:
    """Raises ValueError for a key whose value does not have its form; see `fits`."""
    for key, part in form.items():
        if not fits(row.get(key), part):
            raise ValueError(f"{where}: expected {key!r} in the form in which it is written, "
                             f"found {short(row.get(key))}")


def fits(value: Any, form: Any) -> bool:
    """Whether a value of JSON has this form: a type, a list of one form, a form for each key, a
    tuple of forms of which one will do, or a function that raises for what it cannot read."""
    if isinstance(form, dict):
        return type(value) is dict and all(fits(value.get(key), form[key]) for key in form)
    if isinstance(form, list):
        return type(value) is list and all(fits(each, form[0]) for each in value)
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, type):
        return type(value) is form
    with suppress(TypeError, ValueError):
        form(value)
        return True
    return False


def json_rows(path: Path) -> Iterator[tuple[str, dict | str]]:
    """("line 3", the row or why it is none) of each line that is not empty. Raises ValueError for
    a missing or empty file."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a JSONL file, found a folder")
    if not path.is_file():
        from data.advice import nothing_there

        raise ValueError(nothing_there(path, "a file"))
    check_fetched(path, "a file of rows")
    is_empty, offset = True, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                is_empty = False
                yield f"line {number}", _line(line, offset)
            offset += len(line)
    if is_empty:
        raise ValueError(f"{path}: expected at least one row, found none")


def row_at(path: Path, offset: int) -> dict:
    """The row whose line begins at this byte, which `json_rows` has read before."""
    with path.open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())


class Line(dict):
    """A row with its place in the file: a picture inside it is read from there when needed."""

    offset = 0
    """Bytes before it."""


def _line(line: bytes, offset: int) -> Line | str:
    row = _json_row(line)
    if isinstance(row, str):
        return row
    try:
        if re.search(rb"\\u[dD][89a-fA-F]", line):  # UTF-8 itself has no half surrogate pairs
            check_text("the row", json.dumps(row, ensure_ascii=False))
    except ValueError as error:
        return str(error)
    row = Line(row)
    row.offset = offset
    return row


def _json_row(line: bytes) -> dict | str:
    try:
        row = decode_json(line.decode("utf-8-sig"))  # a byte order mark is no part of the first key
    except (ValueError, RecursionError) as error:  # errors of decoding are ValueErrors
        return f"expected a JSON object ({error})"
    return row if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"
