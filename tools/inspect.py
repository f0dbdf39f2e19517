"""`python -m data.examples`: what of a set can be used, and the manifest of the rest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from data.export import check_not_source, write_examples
from data.formats import data_files
from data.images import image_size, open_image
from data.io import json_lines, write_whole
from data.rows import Refused, manifest_path, name_in_set, scan_rows


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `python -m data.examples`."""

    source: Annotated[str, tyro.conf.Positional]
    """A file or a folder."""
    image_root: str = ""
    """The folder that paths of images must lie in; without it, that of the file that names them.
    Needs `out`."""
    out: str = ""
    """A folder for the set as this project's JSONL, with its images."""
    decode: bool = False
    """Decode every image, not only its head."""


def inspect(config: InspectConfig) -> dict[str, int]:
    """Reads all rows and the heads of all images, prints counts and writes the manifest; returns
    the counts. Raises ValueError, and writes nothing, where no row can be used."""
    if config.image_root and not config.out:
        raise ValueError("image_root: expected `out` with it, since a run looks for images beside "
                         "the file")
    if config.out:
        check_not_source(Path(config.out), config.source)
    kept, refused, num_rows = [], [], 0
    for row in tqdm(scan_rows(config.source, config.image_root), desc="rows", unit="row"):
        num_rows += 1
        refused += row.refused
        if row.example:
            try:
                (open_image if config.decode else image_size)(row.example.image)
                kept.append(row.example)
            except ValueError as error:
                # As a picture in a row is called
                reason = str(error).removeprefix(f"{row.file} {row.where}: ")
                refused.append(Refused(row.file, row.where, reason, row.example.id))
    if not kept:  # a drive may be away, and a good set be there from an earlier run
        from data.advice import no_sound_row

        raise ValueError(no_sound_row(config.source, list(map(str, refused))))
    num_refused = sum(fault.question is None for fault in refused)
    counts = {
        "rows": num_rows, "images": len(kept),
        "questions": sum(len(example.questions) for example in kept),
        "refused rows": num_refused, "refused questions": len(refused) - num_refused,
    }
    write_manifest(config.source, counts, refused)
    if config.out:
        num_images = write_examples(Path(config.out), kept)
        print(f"{num_images} images: {Path(config.out) / 'examples.jsonl'}")
    return counts


def write_manifest(source: str, counts: dict[str, int], refused: list[Refused]) -> None:
    files = {name_in_set(source, file): file.stat().st_size for file in data_files(source)}
    rows = [
        {"file": name_in_set(source, fault.file), "row": fault.where, "question": fault.question,
         "id": fault.id, "reason": fault.reason}
        for fault in refused
    ]
    path = manifest_path(source)
    try:
        write_whole(path, json_lines([{"files": files} | counts, *rows]))
    except OSError as error:
        raise ValueError(f"{path}: expected to write the manifest beside the set "
                         f"({error.strerror}); link the set into a folder of your own") from None
    for name, value in counts.items():
        print(f"{value:8d} {name}")
    for fault in refused[:5]:
        print(f"refused  {fault}")
    print(f"manifest: {path}")


def main(arguments: list[str]) -> None:
    inspect(tyro.cli(InspectConfig, args=arguments))
