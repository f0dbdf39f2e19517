"""Rows of parquet files whose pictures stay on disk until they are looked at.

Published sets keep pictures as {"bytes", "path"}, as bare bytes, or as lists of either. Rows are
read without those bytes, so that the index of a 15 GB set takes a few MB. A picture is read with
its whole row group, and the row groups read last are kept.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.examples import StoredImage
from data.io import check_fetched

TIMES = ("DATE", "TIME", "TIMESTAMP")
"""Columns of these, of INT96 and of durations are left out. Nobody asks for them, and Python cannot
hold nanoseconds or far years."""

CACHE_BYTES = 1 << 28
"""Most bytes of row groups kept, over all files. The one in use is kept however large it is."""


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns. Raises ValueError where the file cannot be read."""
    return _open(path).schema_arrow.names


def column_type(path: Path, name: str) -> str:
    """Arrow's word for the type of a column; empty without the column."""
    schema = _open(path).schema_arrow
    return str(schema.field(name).type) if name in schema.names else ""


def parquet_groups(path: Path) -> list[int]:
    """Rows of each row group. Raises ValueError where the file cannot be read."""
    metadata = _open(path).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def parquet_rows(path: Path, columns: Sequence[str] = (),
                 group: int | None = None) -> Iterator[tuple[int, dict]]:
    """(number from 0 in the file, row) of each row. All row groups and columns are read, but for
    times, unless some are named.

    A StoredImage stands in place of each picture; None where there is none. Raises ValueError where
    the file cannot be read.
    """
    file, sizes = _open(path), parquet_groups(path)
    durations = {field.name for field in file.schema_arrow if pa.types.is_duration(field.type)}
    leaves = {}  # path in the schema -> (place, column)
    for place in range(len(file.schema)):
        column = file.schema.column(place)
        is_time = column.logical_type.type in TIMES or column.physical_type == "INT96"
        is_time |= _top(column.path) in durations
        if not is_time and (not columns or _top(column.path) in columns):
            leaves[column.path] = (place, column)
    blobs = [leaf for leaf, (_, column) in leaves.items() if _is_blob(column)]
    light = [leaf for leaf in leaves if leaf not in blobs]
    light_tops = set(map(_top, light))
    for at in range(len(sizes)) if group is None else [group]:
        # Bytes are read here only where the rest of the row cannot tell whether there is a picture.
        metadata = file.metadata.row_group(at)
        heavy = [
            leaf for leaf in blobs if _top(leaf) not in light_tops
            or _may_be_null(metadata.column(leaves[leaf][0]).statistics)
        ]
        first = number = sum(sizes[:at])
        try:
            batches = file.iter_batches(batch_size=1024, row_groups=[at], columns=light + heavy)
            for row in (row for batch in batches for row in batch.to_pylist()):
                name = f"{path} row {number}"
                for leaf in blobs:
                    blob = partial(_read_blob, path, at, leaf, number - first, name=name)
                    row[_top(leaf)] = _stored(row.get(_top(leaf)), leaf in heavy, blob, name)
                yield number, row
                number += 1
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} row group {at}: expected rows ({_line(error)})") from None


def _top(leaf: str) -> str:
    return leaf.split(".")[0]


def _is_blob(column: Any) -> bool:
    """Bytes that are not text."""
    types = (column.physical_type, column.logical_type.type, column.converted_type)
    return types == ("BYTE_ARRAY", "NONE", "NONE")


def _may_be_null(stats: Any) -> bool:
    return stats is None or not stats.has_null_count or stats.null_count > 0


def _stored(value, has_bytes: bool, blob: partial, name: str):
    """StoredImages in the shape of `value`, which is a picture's column. has_bytes: its bytes are
    read, not left out."""
    if isinstance(value, list):
        images = []
        for place, item in enumerate(value):
            item_name = name if len(value) == 1 else f"{name} image {place}"
            item_blob = partial(blob, name=item_name, place=place)
            images.append(_stored(item, has_bytes, item_blob, item_name))
        return images
    content = value.get("bytes") if isinstance(value, dict) else value
    return None if value is None or (has_bytes and not content) else StoredImage(name, blob)


def _read_blob(path: Path, group: int, leaf: str, row: int, name: str,
               place: int | None = None) -> bytes:
    try:
        value = _groups.column(path, group, leaf)[row].as_py()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: expected a picture ({_line(error)})") from None
    value = value if place is None else value[place]
    value = value.get("bytes", value) if isinstance(value, dict) else value
    if not isinstance(value, bytes | None):
        raise ValueError(f"{name}: expected the bytes of a picture in {_top(leaf)!r} itself, "
                         f"found them in {leaf}")
    return value or b""


class _Groups:
    """Columns of pictures of the row groups read last, at most CACHE_BYTES."""

    def __init__(self):
        self.kept: OrderedDict[tuple[Path, int, str], pa.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self.kept.values())

    def column(self, path: Path, group: int, leaf: str) -> pa.ChunkedArray:
        key = (path, group, leaf)
        with self.lock:
            if key not in self.kept:
                self.kept[key] = _open(path).read_row_group(group, columns=[leaf]).column(0)
                while len(self.kept) > 1 and self.num_bytes() > CACHE_BYTES:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return self.kept[key]


_groups = _Groups()


@lru_cache(maxsize=64)
def _open(path: Path) -> pq.ParquetFile:
    try:
        check_fetched(path, "a parquet file")
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file ({_line(error)})") from None
    check_columns(path, file.schema_arrow.names)
    return file


def check_columns(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError where two columns have one name: of their cells the last would be read."""
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise ValueError(f"{path}: expected columns of different names, found {twice!r} twice")


def _line(error: Exception) -> str:
    return str(error).replace("\n", " ")[:200]
