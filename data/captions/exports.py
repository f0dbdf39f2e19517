"""What caption.py has written: read back, exported for trainers, and exported files checked."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import NoneType

from data.captions.shards import contents_hash, files_key
from data.images import image_name
from data.io import check_text, read_json, short, text_hash, write_whole
from data.jsonl import decode_json, filled, fits, read_jsonl
from data.tones import seen_otherwise

PLACEHOLDERS = ("<image>", "<video>", "<audio>")
"""What trainers replace by a picture or the like, wherever it stands."""


def read_about(out: Path, **kinds: type) -> dict:
    """What is captioned in the folder and how. Raises ValueError if that cannot be read, or a
    setting of `kinds` is not of that type."""
    what = "the settings in a folder that caption.py has written"
    about = read_json(out / "about.json", what, dict)
    form = kinds | {"shards": int, "rows": ([(int, NoneType)], NoneType)}
    rows = about.get("rows")  # earlier versions wrote none
    if not fits(about, form) or (rows is not None and len(rows) != about["shards"]):
        found = short({name: about.get(name) for name in form})
        raise ValueError(f"{out / 'about.json'}: expected {what}, found {found}")
    return about


def own_files(out: Path, ending: str, shard: str = "shard-[0-9]{6,}") -> list[Path]:
    """The files called SHARD.ENDING, both regular expressions, by name. A copy or a note beside
    them, however it begins, is somebody else's."""
    name = re.compile(rf"{shard}\.(?:{ending})")
    return sorted(out / found for found in os.listdir(out) if name.fullmatch(found))


def finished_rows(out: Path, *texts: str) -> Iterator[tuple[str, dict]]:
    """("shard-000000.jsonl line 1", row) of all shards, in the order of the input.

    Raises ValueError if some are missing or too short, or have an image again or, of images that
    are files, others than were asked for. For a row it does as `checked_row` and `check_hashes` do:
    beside `texts` it needs `id`.
    """
    about, num_finished = read_about(out), len(own_files(out, "jsonl"))
    num_shards, firsts, keys = about["shards"], {}, []  # where each shard's first image is
    if num_finished != num_shards:
        raise ValueError(f"{out}: expected {num_shards} finished shards, found {num_finished}")
    sizes = about.get("rows") or [None] * num_shards
    for number, wanted in enumerate(sizes):
        path, own = out / f"shard-{number:06d}.jsonl", {}  # where each of its images is
        if path.stat().st_size:  # a tar file without images leaves an empty one
            for line, row in read_jsonl(path):
                where = f"{path} line {line}"
                row = checked_row(where, row, "id", *texts)
                check_hashes(where, row, about)
                image = row["id"], str(row.get("image"))  # ids of parquet files may be equal
                if before := own.get(image, firsts.get(image)):
                    raise ValueError(f"{where}: expected another image than in {before}, found id "
                                     f"{row['id']!r} again")
                own[image] = where
                yield where, row
        firsts |= islice(own.items(), 1)
        keys.append(files_key(own))
        if wanted not in (None, len(own)):
            raise ValueError(f"{path}: expected {wanted} rows, found {len(own)}; without this file "
                             "the same run captions its images again")
    found = contents_hash(keys)
    if None not in sizes and about.get("contents", found) != found:
        raise ValueError(f"{out}: expected rows of the images that about.json stands for, in their "
                         "order, found others: a shard is another folder's, or was changed")


def check_hashes(where: str, row: dict, about: dict) -> None:
    """Raises ValueError for a row of another model or instruction than about.json names."""
    instruction = about.get("instruction")
    hashes = {"model": about.get("model"),
              "prompt": text_hash(instruction) if isinstance(instruction, str) else None}
    for name, expected in hashes.items():
        if expected and row.get(name, expected) != expected:
            raise ValueError(f"{where}: expected {name} {expected}, as about.json has it, found "
                             f"{row[name]}")


def checked_row(where: str, row: dict, *texts: str) -> dict:
    """The row, without what is null and an empty `error`. Raises ValueError if `texts`, or else
    `caption` or the `error` in its place, are no texts, or `tokens` is no number."""
    row = {key: value for key, value in filled(row).items() if (key, value) != ("error", "")}
    texts = (*texts, "error" if "error" in row else "caption")
    caption = row.get("caption", "")  # one beside an error
    if not all(isinstance(text, str) for text in (*map(row.get, texts), caption)):
        raise ValueError(f"{where}: expected an object with {', '.join(texts[:-1])} and "
                         f"{texts[-1]}, got {short(row)}")
    if type(row.get("tokens", 0)) not in (int, float):
        raise ValueError(f"{where}: expected a number of tokens, got {short(row['tokens'])}")
    return row


def caption_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row with id and caption or error, as `checked_row` has it) of a folder that
    caption.py has written, or of a JSONL file. Also of a file that is one JSON object from ids to
    captions, or to lists of them."""
    if path.is_dir():
        yield from finished_rows(path)
        return
    whole = None
    with suppress(ValueError):  # no such file, or not one object: read by lines
        whole = read_json(path, "an object")
    if not isinstance(whole, dict) or {"id", "caption", "error"} & set(whole):
        for number, row in read_jsonl(path):
            where = f"{path} line {number}"
            named = {"id": str(row["id"])} if type(row.get("id")) is int else {}
            yield where, checked_row(where, row | named, "id")
        return
    whole = read_json(path, "an object", decode=decode_json)  # no image twice
    for id, captions in whole.items():
        for caption in captions if isinstance(captions, list) else [captions]:
            where = f"{path}, the object's {id!r}"
            check_text(where, id, str(caption))
            row = caption if isinstance(caption, dict) else {"caption": caption}
            yield where, checked_row(where, row | {"id": id}, "id")


def check_captions(out: Path) -> None:
    """Reads all rows of what is finished, and says how many images could not be opened, by whatever
    worker. Raises ValueError where no row has a caption, or as `finished_rows` does."""
    num_captions, errors = 0, []  # (where, why)
    for where, row in finished_rows(out):
        num_captions += "error" not in row
        errors += [(where, row["error"])] if "error" in row else []
    first = f"the first: {errors[0][1]}" if errors else "no rows"
    if not num_captions:
        raise ValueError(f"{out}: expected a caption, found none; no image could be opened "
                         f"({first})")
    if errors and os.environ.get("RANK", "0") == "0":
        print(f"{errors[0][0]}: no caption, as of {len(errors)} images in all ({first}); without "
              "the shards' files the same run captions their images again", file=sys.stderr)


def export_captions(out: Path, layout: str) -> None:
    """Writes `out`/llava.json or `out`/sharegpt.json. Rows without a usable caption are left out
    and counted.

    Images stay the files that they are. Trainers call Pillow's `convert("RGB")` on them, which
    turns nothing and drops what is transparent. Those that they will see otherwise than the
    captioner did are counted, from their heads.
    """
    about = read_about(out, images=str, instruction=str, max_new_tokens=int)
    target, images = out / f"{layout}.json", Path(about["images"])
    images = images if images.is_dir() else images.parent
    left_out: Counter[str] = Counter()
    otherwise: dict[str, list[str]] = {}
    exported: Counter[bool] = Counter()  # by whether it is cut off

    def lines() -> Iterator[bytes]:
        for where, row in finished_rows(out, "image"):
            if ".tar/" in row["image"] or ".parquet row " in row["image"]:
                expected = "expected images that are files, for a trainer to open"
                raise ValueError(f"{where}: {expected}, got {row['image']!r}")
            if reason := _not_exported(row):
                left_out[reason] += 1
                continue
            try:
                why = seen_otherwise(images / row["image"])
            except ValueError:
                why = "not found or not readable here"
            if why:
                otherwise.setdefault(why, []).append(row["image"])
            turns = [{"from": "human", "value": f"<image>\n{about['instruction']}"},
                     {"from": "gpt", "value": row["caption"]}]
            new = {"id": row["id"], "image": row["image"], "conversations": turns}
            if layout == "sharegpt":
                new = {"conversations": turns, "images": [row["image"]]}
            start = ",\n" if exported else "[\n"
            yield f"{start}{json.dumps(new, ensure_ascii=False)}".encode()
            exported[row.get("finish_reason") == "length"] += 1
        yield b"\n]\n" if exported else b"[]\n"

    write_whole(target, lines())
    if layout == "sharegpt":
        columns = {"messages": "conversations", "images": "images"}
        entry = {"file_name": target.name, "formatting": "sharegpt", "columns": columns}
        info = json.dumps({"captions": entry}, indent=2) + "\n"
        write_whole(out / "dataset_info.json", info.encode())
    print(f"{target}: {exported.total()} rows, {exported[True]} of them cut off at "
          f"{about['max_new_tokens']} tokens; images below {about['images']}; left out: "
          f"{dict(left_out) or 'none'}")
    for why, names in otherwise.items():
        print(f"warning: images that a trainer may see otherwise than the captioner did: "
              f"{len(names)} {why}, the first is {names[0]}")


def _not_exported(row: dict) -> str:
    """Why not, or empty."""
    if "error" in row:
        return "image unreadable"
    if not row["caption"].strip():
        return "caption empty"
    has_placeholder = any(mark in row["caption"] for mark in PLACEHOLDERS)
    return "caption with a placeholder" if has_placeholder else ""


def check_export(path: Path, images: Path | None = None) -> int:
    """The number of rows of a file in LLaVA's or LLaMA-Factory's format.

    Raises ValueError at the first row that a trainer cannot use. With `images` it raises also for a
    picture that is not there.
    """
    rows = read_json(path, "a JSON file")
    if not isinstance(rows, list) or not rows:
        kind = type(rows).__name__ if rows else "none"
        raise ValueError(f"{path}: expected a list of rows, found {kind}")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        try:
            row = filled(row) if isinstance(row, dict) else row
            check_text("the row", json.dumps(row, ensure_ascii=False))
            _check_row(row, images)
            first = seen.setdefault(row["id"], number) if "id" in row else number
            if first != number:
                raise ValueError(f"id {row['id']!r} was used before, in row {first}")
        except ValueError as error:
            raise ValueError(f"{path} row {number}: {error}") from None
    return len(rows)


def _check_row(row: dict, images: Path | None) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError(f"expected an object with conversations, got {row!r:.80}")
    # LLaMA-Factory reads no id.
    if not isinstance(row.get("id"), str | int | None if "images" in row else str):
        raise ValueError(f"expected a text in id, got {row.get('id')!r:.80}")
    pictures = row["images"] if "images" in row else [row["image"]] if "image" in row else []
    names = pictures if isinstance(pictures, list) else [None]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expected paths of images, got {pictures!r}")
    turns = row["conversations"]
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError(f"expected turns of human and gpt, got {len(turns)} turns")
    for place, turn in enumerate(turns):
        speaker = ("human", "gpt")[place % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            raise ValueError(f"turn {place}: expected one from {speaker}, got {turn!r:.80}")
        if not isinstance(turn.get("value"), str) or not turn["value"].strip():
            raise ValueError(f"turn {place}: expected words in value, got {turn.get('value')!r}")
        marks = turn["value"].count("<image>")
        wanted = len(pictures) if place == 0 else 0
        if marks != wanted or any(mark in turn["value"] for mark in PLACEHOLDERS[1:]):
            expected = f"expected {wanted} <image> and no other placeholder"
            raise ValueError(f"turn {place}: {expected}, got {turn['value']!r:.80}")
    for name in pictures if images is not None else ():
        if not os.path.isfile(images / name):  # False also for a name too long for the system
            raise ValueError(f"image {image_name(images / name)}: expected a file, found nothing")
