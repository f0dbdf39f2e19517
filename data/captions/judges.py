"""Captions that caption.py has written, as files that benchmarks' own scorers read.

docs/formats.md says where each form comes from. Captions stay as they are, empty ones too: a
captioner that says nothing has earned its score. An image without a caption is left out, counted
and told.
"""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.captions.exports import check_captions, finished_rows, read_about
from data.io import check_text, json_lines, read_json, short, write_whole
from data.parquet import parquet_rows

DETAILCAPS_REFERENCES = ("GT_Caption_GPT4O", "GT_Caption_GPT4V", "GT_Caption_Gemini15Pro")


def export_for_judge(out: Path, benchmark: str, reference: str) -> None:
    """Writes the benchmark's files into `out`. With CapArena's `reference`,
    caparena_auto_600.json, they are pairs, else captions. Raises ValueError for captions that
    are not of the benchmark's images, or where there is none."""
    rows = [row for _, row in finished_rows(out, "image")]
    check_captions(out)
    told = [row for row in rows if "error" not in row]
    if benchmark == "captionqa":
        for row in told:
            if row["id"] == row["image"]:  # its scorer would pass over it in silence
                raise ValueError(f"{out}: expected captions of CaptionQA's rows, by their ids, "
                                 f"found one of the file {row['image']}")
        files = {"captionqa.json": _by_name(out, "id", ((row["id"], row["caption"])
                                                        for row in told))}
    elif benchmark == "capability":
        files = _by_dimension(out, told)
    elif benchmark == "detailcaps":
        references = _detailcaps_references(out, told)
        predictions = _by_name(out, "id", ((row["id"], [row["caption"]]) for row in told))
        files = {"detailcaps.json": {"refs": references, "preds": predictions}}
    elif reference:
        name = out.resolve().name
        files = {f"caparena/{name}.json": _pairs(_by_file_name(out, told), name, Path(reference))}
    else:
        files = {f"{benchmark}.json": _by_file_name(out, told)}
    for name, content in files.items():
        is_lines = name.endswith(".jsonl")
        text = json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"
        (out / name).parent.mkdir(exist_ok=True)
        write_whole(out / name, json_lines(content) if is_lines else text)
    num_empty = sum(not row["caption"].strip() for row in told)
    print(f"{', '.join(str(out / name) for name in files)}: {len(told)} captions, {num_empty} of "
          f"them empty; {len(rows) - len(told)} images could not be opened and have none")


def _by_name(out: Path, what: str, captions: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Name -> its caption. Raises ValueError for two of a name, of which one would be lost."""
    by_name: dict[str, Any] = {}
    for name, caption in captions:
        if name in by_name:
            raise ValueError(f"{out}: expected a caption for each {what}, found two for {name}")
        by_name[name] = caption
    return by_name


def _by_file_name(out: Path, rows: list[dict]) -> dict[str, str]:
    """CAPEval, CapArena-Auto: image's file name -> caption."""
    names = [row["image"].rpartition("/")[2] for row in rows]
    for name in names:
        if ".parquet row " in name:
            raise ValueError(f"{out}: expected captions of files, which keep their names, found "
                             f"one of {name}")
    return _by_name(out, "file name", zip(names, (row["caption"] for row in rows)))


def _by_dimension(out: Path, rows: list[dict]) -> dict[str, list[dict]]:
    """CAPability: a file for each dimension. The names of its images begin with it."""
    files: dict[str, list[dict]] = {}
    captions = ((Path(row["image"]).stem, row) for row in rows)
    for file_id, row in _by_name(out, "file_id", captions).items():
        match = re.fullmatch(r"([A-Za-z_]+)_\d+", file_id)
        if not match:
            raise ValueError(f"{out}: expected CAPability's images, named like OCR_12.jpg, found "
                             f"{row['image']}")
        lines = files.setdefault(f"capability/{match[1]}.jsonl", [])
        lines.append({"file_id": file_id, "caption": row["caption"]})
    return files


def _detailcaps_references(out: Path, rows: list[dict]) -> dict[str, list[str]]:
    """Id of the caption -> the three captions of its row in the parquet file."""
    images = Path(read_about(out, images=str)["images"])
    folder, tables = images if images.is_dir() else images.parent, {}
    references = {}
    for row in rows:
        file, _, number = row["image"].rpartition(" row ")
        if not file.endswith(".parquet"):
            raise ValueError(f"{out}: expected captions of DetailCaps' parquet file, found "
                             f"{row['image']}")
        if file not in tables:
            tables[file] = dict(parquet_rows(folder / file, DETAILCAPS_REFERENCES))
        cells = tables[file].get(int(number), {})
        texts = [cells.get(column) for column in DETAILCAPS_REFERENCES]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{folder / file} row {number}: expected texts in "
                             f"{', '.join(DETAILCAPS_REFERENCES)}, found {short(texts)}")
        references[row["id"]] = texts
    return references


def _pairs(captions: dict[str, str], name: str, reference: Path) -> list[dict]:
    """CapArena-Auto: the caption of each image beside that of a model, on a random side, which is
    always the same for an image. Its score is a sum, so that no pair may be missing."""
    entries, pairs = read_json(reference, "CapArena's reference captions"), []
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{reference}: expected an object from images to captions, found "
                         f"{short(entries)}")
    for image, entry in entries.items():
        model, others = (entry.get(key) if isinstance(entry, dict) else None
                         for key in ("ref_model", "captions"))
        texts = [others.get(str(name)) if isinstance(others, dict) else None
                 for name in (model, "human")]
        if not all(isinstance(text, str) for text in (model, *texts)):
            raise ValueError(f"{reference}, {image!r}: expected ref_model, and texts of it and of "
                             f"human in captions, found {short(entry)}")
        check_text(f"{reference}, {image!r}", image, model, *texts)
        other, human = texts
        if image not in captions:
            raise ValueError(f"expected a caption of each image in {reference}, found none of "
                             f"{image!r}")
        sides = [(model, other), (name, captions[image])]
        random.Random(f"{image}:sides").shuffle(sides)
        (source1, caption1), (source2, caption2) = sides
        pairs.append({"img": image, "source1": source1, "source2": source2, "caption1": caption1,
                      "caption2": caption2, "ref": human, "ref_model": model})
    return pairs
