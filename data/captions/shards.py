"""Images to caption, from a folder, a JSONL list, parquet files or tar files, in shards.

Every worker makes the same shards. A parquet or tar file that breaks off leaves an image that
raises the reason when it is opened. So such a file stops neither its worker nor the next one.
"""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

from data.benchmarks.files import IMAGE_COLUMNS, picture_rows
from data.examples import ImageSource, StoredImage
from data.folders import list_files, print_left_out
from data.formats import id_text
from data.images import IMAGE_SUFFIXES, printable
from data.io import check_fetched, text_hash
from data.jsonl import read_jsonl
from data.parquet import column_type, parquet_columns, parquet_groups

NamedImage = tuple[str, str, ImageSource]
"""(id, how the row calls the image, image)"""


@dataclass(frozen=True)
class Shard:
    """A part of the images that one worker captions."""

    images: Callable[[], Iterator[NamedImage]]
    """Each, in order."""
    key: str
    """A hash of its contents, for about.json."""
    num_rows: int | None = None
    """Known of files alone: a parquet or tar file may break off."""


def plan_shards(source: Path, shard_size: int) -> list[Shard]:
    """The same list for every worker. Raises ValueError where there are no images.

    shard_size: images of a shard, from a folder or a JSONL file.
    """
    name = printable(str(source))
    if name != str(source):  # rows, about.json and messages are UTF-8
        raise ValueError(f"{name}: expected a path in UTF-8")
    if not source.exists():
        from data.advice import nothing_there

        raise ValueError(nothing_there(source, "a folder or a file of images"))
    folder, files = source.parent, [source]
    if source.is_dir():
        folder, files = source, list_files(source, IMAGE_SUFFIXES | {".parquet", ".tar"})
    names = [path.relative_to(folder).as_posix() for path in files]
    kinds = {path.suffix.lower() for path in files}
    if not files:
        raise ValueError(f"{source}: expected images, .parquet or .tar files, found none")
    if kinds <= IMAGE_SUFFIXES:
        return _file_shards(list(zip(names, names)), folder, shard_size)
    if kinds == {".jsonl"}:
        return _file_shards(list(_jsonl_images(source)), folder, shard_size)
    if kinds == {".parquet"}:
        return list(chain.from_iterable(map(_parquet_shards, files, names)))
    if kinds == {".tar"}:
        return list(map(_tar_shard, files, names))
    raise ValueError(f"{source}: expected a folder, .jsonl, .parquet or .tar files of one kind, "
                     f"found {sorted(kinds)}")


def contents_hash(keys: Iterable[str]) -> str:
    """Of all shards' keys."""
    return text_hash("\n".join(keys))


# ---------------------------------------------------------------------------------- files by path


def _file_shards(images: list[tuple[str, str]], folder: Path, size: int) -> list[Shard]:
    """images: (id, path below `folder`)."""
    shards = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        shards.append(Shard(partial(_files, part, folder), files_key(part), len(part)))
    return shards


def files_key(images: Iterable[tuple[str, str]]) -> str:
    """images: (id, path)."""
    return text_hash("\n".join(id if id == name else f"{id}\t{name}" for id, name in images))


def _files(images: list[tuple[str, str]], folder: Path) -> Iterator[NamedImage]:
    for id, name in images:
        yield id, name, folder / name


def _jsonl_images(path: Path) -> Iterator[tuple[str, str]]:
    """(id, path as written). Whether an image is there is seen when its turn comes: to look for
    millions first takes hours."""
    first_line: dict[str, int] = {}
    for number, row in read_jsonl(path):
        written = (row.get(key) for key in ("image", "images", "image_path"))
        image = next((value for value in written if value is not None), None)
        image = image[0] if isinstance(image, list) and len(image) == 1 else image
        # No path is that long: it is a picture in base64.
        if not isinstance(image, str) or image.startswith("data:") or len(image) >= 1024:
            got = f"{image!r:.80}"
            raise ValueError(f"{path} line {number}: expected a path in 'image', got {got}")
        try:
            id = image if row.get("id") is None else id_text(row["id"])
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        if id in first_line:
            before = f"was used before, on line {first_line[id]}"
            raise ValueError(f"{path} line {number}: id {id!r} {before}")
        first_line[id] = number
        yield id, image.replace("\\", "/")  # of a list written on Windows


# ------------------------------------------------------------------------------------ parquet files


def _parquet_shards(path: Path, name: str) -> list[Shard]:
    """A shard for each row group."""
    columns, groups = parquet_columns(path), parquet_groups(path)
    if not sum(groups) or not set(columns) & set(IMAGE_COLUMNS):
        wanted = " or ".join(IMAGE_COLUMNS)
        rows = f"{sum(groups)} rows of {columns}"
        raise ValueError(f"{path}: expected rows with {wanted}, found {rows}")
    kind = column_type(path, "id")
    if re.match("(large_|fixed_size_)?(binary|list)|bool|struct|map", kind):
        raise ValueError(f"{path}: expected text or numbers in the column 'id', found {kind}")
    return [
        Shard(partial(_parquet_images, path, name, group), f"{name} {group} {num_rows}")
        for group, num_rows in enumerate(groups)
    ]


def _parquet_images(path: Path, file: str, group: int) -> Iterator[NamedImage]:
    stem = file.removesuffix(path.suffix)
    try:
        for row in picture_rows(path, group, ("id",)):
            name, id = row.where.replace(str(path), file), row.id
            if row.cells.get("id") in (None, ""):
                # Files of two folders may have one name, and two images would have the same id.
                id = f"{stem}:{row.where.rsplit(' ', 1)[1]}"
            try:
                yield id, name, row.picture()[1]
            except ValueError as error:
                yield id, name, _unreadable(name, error)
    except ValueError as error:
        yield f"{stem}:group {group}", file, _unreadable(file, error)


# ---------------------------------------------------------------------------------------- tar files


def _tar_shard(path: Path, name: str) -> Shard:
    check_fetched(path, "a tar file")
    return Shard(partial(_tar_images, path, name), f"{name} {path.stat().st_size}")


def _tar_images(path: Path, file: str) -> Iterator[NamedImage]:
    """The images of a tar file by the place of their bytes, so that threads may read them.

    Ids are the tar's name and the member's without its last ending. Other members, unless they go
    with an image as in WebDataset's layout, are counted.
    """
    stem, ids = file.removesuffix(path.suffix), set()
    spans: dict[str, tuple[int, int]] = {}
    others: list[tuple[str, str]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                written = printable(member.name)
                key, ending = os.path.splitext(written)
                if member.isfile() and not member.issparse():
                    spans[member.name] = (member.offset_data, member.size)
                elif member.isdir():
                    continue
                if os.path.basename(written).startswith("._"):
                    others.append((written, "._* of macOS"))
                elif ending.lower() not in IMAGE_SUFFIXES:
                    others.append((key, ending.lower() or "without ending"))
                else:
                    more = (f"{written}:{number}" for number in count(2))
                    id = next(id for id in chain((key, written), more) if id not in ids)
                    ids.add(id)
                    name = f"{file}/{written}"
                    yield f"{stem}/{id}", name, _member(path, name, member, spans)
            print_left_out(path, Counter(ending for key, ending in others if key not in ids))
            # Of a file that is cut off tarfile says nothing.
            if _read_span(path, archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("cut off: expected its end, a block of zeros")
            with path.open("rb") as rest:  # of `cat a.tar b.tar` tarfile reads the first alone
                rest.seek(archive.offset)
                if any(part.strip(b"\0") for part in iter(partial(rest.read, 1 << 20), b"")):
                    expected = "expected zeros alone after its end"
                    raise tarfile.ReadError(f"{expected}, found more, as of a second tar file")
            if not ids:
                raise tarfile.ReadError("no image among its members")
    except (OSError, tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        # The last three are of sizes that no file has, and may say nothing.
        yield stem, file, _unreadable(file, str(error) or type(error).__name__)


MAX_MEMBER_BYTES = 1 << 31
"""A member is read as a whole, and a tar file of a few bytes may say that it has one of a terabyte.
100 million pixels (MAX_PIXELS) take less in any usual form."""


def _member(path: Path, name: str, member: tarfile.TarInfo,
            spans: dict[str, tuple[int, int]]) -> StoredImage:
    """A link stands for the member before it that it leads to."""
    if member.issparse():  # its bytes do not lie in a row
        return _unreadable(name, "stored without its zeros: pack it without --sparse")
    target = member.linkname if member.islnk() else member.name
    if member.issym():
        target = os.path.normpath(os.path.join(os.path.dirname(member.name), member.linkname))
    if target not in spans:
        return _unreadable(name, f"a link to {printable(target)}, no member before it")
    if not 0 <= spans[target][1] <= MAX_MEMBER_BYTES:
        return _unreadable(name, f"expected at most {MAX_MEMBER_BYTES} bytes, found a member of "
                                 f"{spans[target][1]}")
    return StoredImage(name, partial(_read_span, path, *spans[target]))


def _read_span(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _unreadable(name: str, reason: Exception | str) -> StoredImage:
    """An image that raises the reason when it is read."""

    def read() -> bytes:
        raise OSError(str(reason))

    return StoredImage(name, read)
