"""`python -m data.examples`: what of a set can be used, and the manifest of the rest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from data.export import write_examples
from data.formats import data_files
from data.images import image_size, open_image
from data.rows import Refused, manifest_path, name_in_set, scan_rows


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
                reason = str(error).removeprefix(f"{row.file} {row.where}: ")  # how a picture in a row is called
                refused.append(Refused(row.file, row.where, reason, row.example.id))
    counts = {"rows": num_rows, "images": len(kept), "questions": sum(len(example.questions) for example in kept),
              "refused rows": sum(one.question is None for one in refused),
              "refused questions": sum(one.question is not None for one in refused)}
    files = {name_in_set(config.source, file): file.stat().st_size for file in data_files(config.source)}
    rows = [{"file": name_in_set(config.source, one.file), "row": one.where, "question": one.question, "id": one.id,
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


def main(arguments: list[str]) -> None:
    inspect(tyro.cli(InspectConfig, args=arguments))
