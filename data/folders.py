"""The pictures of a folder: taken, refused by name, or counted by their ending."""

import os
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from data.examples import ImageSource
from data.formats import contents, data_files, id_text, row_image
from data.images import IMAGE_SUFFIXES, printable


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files below `folder` with one of these endings, in capitals or not, sorted by path.

    Hidden folders are searched too, and linked ones. Each folder is searched once, under its own
    path where it is below `folder`. What is left out is counted by its ending on stderr. Raises
    ValueError for a folder that cannot be read.
    """
    paths: list[Path] = []
    left_out, odd_name = Counter(), ""
    waiting, links, seen = [folder], [], set()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        try:
            stat = here.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            said = f"expected a folder that can be read ({error.strerror})"
            raise ValueError(f"{printable(str(here))}: {said}") from None
        for entry in entries:
            path, is_link = here / entry.name, entry.is_symlink()
            name = path.relative_to(folder).as_posix()
            # Path's methods and the entry's raise for a link to itself, or to a place off limits.
            is_dir, is_file = (
                (os.path.isdir(path), os.path.isfile(path) or not os.path.exists(path)) if is_link
                else (entry.is_dir(), entry.is_file())
            )
            if is_dir:
                (links if is_link else waiting).append(path)
            elif entry.name.startswith("._"):
                left_out["._* of macOS"] += 1
            elif not is_file:
                left_out["neither file nor folder"] += 1
            elif path.suffix.lower() not in suffixes:
                left_out[printable(path.suffix.lower()) or "without ending"] += 1
            elif printable(name) != name:
                odd_name = odd_name or f"not named in UTF-8 like {printable(name)}"
                left_out[odd_name] += 1
            else:  # links that lead nowhere too: they are named when they are opened
                paths.append(path)
    if os.environ.get("RANK", "0") == "0":  # each of torchrun's workers lists the same
        print_left_out(folder, left_out)
    return sorted(paths)


def print_left_out(source: Path, left_out: Counter) -> None:
    """One line on stderr, unless nothing was left out."""
    if left_out:
        counts = [f"{number} {kind}" for kind, number in left_out.most_common(12)]
        counts += ["..."] if len(left_out) > len(counts) else []
        print(f"{printable(str(source))}: left out: {', '.join(counts)}", file=sys.stderr)


def load_images(path: Path) -> list[tuple[str, ImageSource]]:
    """(id, image) of each image file of a folder, or of each row of a parquet or JSONL file. A
    folder without images may have such files in it. Questions are not looked at.

    In JSONL the id is the row's `id`, or else its `image` as written. In parquet it is the row's
    `id` or number, after the file's name where several are read. Raises ValueError at the first row
    without an image.
    """
    files = list_files(path, IMAGE_SUFFIXES | {".parquet", ".jsonl"}) if path.is_dir() else []
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if pictures:
        endings = (file.suffix.lower() for file in files)
        print_left_out(path, Counter(ending for ending in endings if ending not in IMAGE_SUFFIXES))
        return [(image.relative_to(path).as_posix(), image) for image in pictures]
    images, files = [], data_files(str(path)) if path.is_dir() else [path]
    for file in files:
        name = f"{file.relative_to(path).as_posix()} " if files[1:] else ""
        for where, content in contents(file):
            try:
                if isinstance(content, str):
                    raise ValueError(content)
                image = row_image(content, file, where, file.parent)
                written = content.get("image") or content.get("image_path")
                is_path = isinstance(written, str) and isinstance(image, Path)
                fallback = written if is_path else name + where
                id = fallback if content.get("id") is None else id_text(content["id"])
            except ValueError as error:
                raise ValueError(f"{file} {where}: {error}") from None
            images.append((id, image))
    if not images:
        raise ValueError(f"{path}: expected at least one row with an image, found none")
    return images
