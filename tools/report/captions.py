"""What a browser needs of the captions: an index that filters and orders look at, texts packed by
step, and pictures."""

import base64
import json
import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

from data.benchmarks.benchmark import load_benchmarks
from data.images import open_image
from tools.report.sources import Source, evenly
from tools.tables import shown_id
from tools.thumbnails import SHOWN_GROUPS, thumbnail_file

MAX_SIDE = 16383
"""Pixels of a WebP's side, at most."""


@dataclass(frozen=True)
class Group:
    """One image with the captions of each source, where it has any."""

    id: str
    family: str
    sides: list[list[dict] | None]
    steps: list[int | None]


def pages_of(sources: Sequence[Source]) -> dict[str, list[Group]]:
    """Title -> groups: a step of the first run, or SHOWN_GROUPS images of an evaluation. A second
    run's captions of an image are those of the nearest step that has it. Runs with one seed and one
    data set see the same images at the same steps."""
    by_id: list[dict[str, list[tuple[int | None, list[dict]]]]] = []  # of each source
    for source in sources:
        by_id.append({})
        for step, rows in source.groups:
            by_id[-1].setdefault(rows[0]["id"], []).append((step, rows))

    def group(id: str, step: int | None) -> Group:
        def distance(entry: tuple[int | None, list[dict]]) -> int:
            return abs((entry[0] or 0) - (step or 0))

        nearest = [min(entries.get(id, [(None, None)]), key=distance) for entries in by_id]
        rows = next(rows for _, rows in nearest if rows)
        family = str(rows[0].get("family", "all"))
        return Group(id, family, [rows for _, rows in nearest], [at for at, _ in nearest])

    pages: dict[str, list[Group]] = {}
    if sources[0].config is not None:
        for step, rows in sources[0].groups:
            pages.setdefault(f"step {step}", []).append(group(rows[0]["id"], step))
        return pages
    ids = list(dict.fromkeys(id for entries in by_id for id in entries))
    for start in range(0, len(ids), SHOWN_GROUPS):
        part = ids[start : start + SHOWN_GROUPS]
        pages[f"images {start + 1} to {start + len(part)}"] = [group(id, None) for id in part]
    return pages


def earned(row: dict) -> float | None:
    """The reward of a run's row, the accuracy of an evaluation's."""
    return row.get("reward", row.get("accuracy"))


def outcome(question: dict) -> str:
    """A letter: the verifier's option is right, is wrong, or abstains; its reply is unreadable; the
    asking failed; or a judge gave a score. An answer in words (gold -1) is right with the full
    score only."""
    chosen, gold = question.get("chosen"), question.get("gold")
    if question.get("failure"):
        return "f"
    if gold is None:
        return "s"
    if gold == -1:
        return "u" if question.get("unparsed") else "r" if question.get("correct") else "w"
    if chosen is None:
        return "u"
    if chosen == gold:
        return "r"
    return "a" if chosen == question.get("abstain") else "w"


def number_questions(sides: Sequence[list[dict] | None]) -> dict[tuple, int]:
    """(source, text) -> number. Askings of one question, under several shuffles or of several
    captions, share it."""
    numbers: dict[tuple, int] = {}
    for question in (question for rows in sides for row in rows or []
                     for question in row["questions"]):
        numbers.setdefault((question.get("source"), question["question"]), len(numbers))
    return numbers


def side_index(rows: list[dict] | None, step: int | None, numbers: dict[tuple, int]) -> dict | None:
    """What filters and orders look at. Of each caption: reward, advantage, length, whether it was
    cut off, and the outcomes of each question, by number: "r ww  a"."""
    if rows is None:
        return None
    captions = []
    for row in rows:
        outcomes = [""] * len(numbers)
        for question in row["questions"]:
            outcomes[numbers[question.get("source"), question["question"]]] += outcome(question)
        is_cut = row.get("truncated") or row.get("finish_reason") == "length"
        captions.append([short(earned(row)), short(row.get("advantage")),
                         row.get("length", row.get("tokens")), int(bool(is_cut)),
                         " ".join(outcomes)])
    return {"step": step, "captions": captions}


def short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def pack_side(rows: list[dict] | None, numbers: dict[tuple, int]) -> dict | None:
    """What is shown of an image's captions besides. A question with its options is there once for
    all captions that it was asked on."""
    if rows is None:
        return None
    asked: dict[str, int] = {}
    captions = []
    for row in rows:
        answers = []
        for question in row["questions"]:
            source, text = question.get("source"), question["question"]
            shown = {"number": numbers[source, text], "question": text,
                     "options": question.get("options", []), "gold": question.get("gold"),
                     "abstain": question.get("abstain")}
            answers.append({
                "place": asked.setdefault(json.dumps(shown), len(asked)),
                "chosen": question.get("chosen"), "score": question.get("score"),
                "reply": question.get("reply") or "", "failure": question.get("failure") or "",
                "probs": [round(prob, 2) for prob in question.get("probs") or []],
                "outcome": outcome(question),
            })
        captions.append({"text": row["caption"], "parts": row.get("parts", {}), "answers": answers,
                         "claims": row.get("claims")})
    return {"asked": list(map(json.loads, asked)), "captions": captions}


def pack(value) -> str:
    """Base64 of deflated JSON: a quarter of the size, and nothing in it can be taken for markup."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return base64.b64encode(zlib.compress(text)).decode()


def browser_data(sources: Sequence[Source], max_bytes: float, full_bytes: float = 0,
                 data: Sequence[str] = ()) -> dict:
    """`index`: what filters look at, for all groups; `chunks`: a packed text for each page;
    `pictures` and `full`: data URLs. Pages that do not fit are left out, evenly, and counted in
    `num_pages`."""
    pages = list(pages_of(sources).items())
    numbers = [[number_questions(group.sides) for group in groups] for _, groups in pages]
    chunks = [
        pack([[pack_side(rows, asked) for rows in group.sides] for group, asked in zip(groups, of)])
        for (_, groups), of in zip(pages, numbers)
    ]
    files = {}
    for id in {group.id for _, groups in pages for group in groups}:
        paths = [thumbnail_file(source.path, id) for source in sources]
        files[id] = next((path for path in paths if path.is_file()), None)
    sizes = {id: path.stat().st_size * 4 / 3 if path else 0 for id, path in files.items()}

    def size(places: Sequence[int]) -> float:
        shown = {group.id for place in places for group in pages[place][1]}
        return sum(len(chunks[place]) for place in places) + sum(sizes[id] for id in shown)

    count = len(pages)
    while count > 1 and size(evenly(len(pages), count)) > max_bytes:
        count -= 1
    kept = evenly(len(pages), count)

    texts: dict[str, int] = {}
    places: dict[str, int] = {}  # of each id's picture
    index = []
    for place in kept:
        title, groups = pages[place]
        entries = []
        for group, asked in zip(groups, numbers[place]):
            if files[group.id]:
                places.setdefault(group.id, len(places))
            entries.append({
                "id": group.id, "family": group.family, "picture": places.get(group.id),
                "questions": [texts.setdefault(text, len(texts)) for _, text in asked],
                "sides": [side_index(rows, step, asked)
                          for rows, step in zip(group.sides, group.steps)],
            })
        step = groups[0].steps[0] if sources[0].config is not None else None
        index.append({"title": title, "step": step, "groups": entries})
    # of a run the last steps' first: what the policy writes now
    shown = [entry["id"] for page in index for entry in page["groups"]]
    wanted = dict.fromkeys(shown if sources[0].config is None else reversed(shown))
    full = full_pictures(sources[0], wanted, full_bytes, data) if full_bytes else {}
    return {
        "index": {
            "pages": index, "questions": list(texts), "names": [source.name for source in sources],
            "earned": "accuracy" if sources[0].config is None else "reward", "full": list(full),
        },
        "chunks": [chunks[place] for place in kept], "num_pages": len(pages),
        "pictures": [data_url(files[id].read_bytes()) for id in places],
        "full": list(map(data_url, full.values())),
    }


def data_url(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def full_pictures(source: Source, ids: Sequence[str], max_bytes: float,
                  data: Sequence[str]) -> dict[str, bytes]:
    """id -> the whole picture as WebP, as many as fit, in the order of the ids. One that cannot be
    read any more is left out; a data set that cannot be is named."""
    try:
        benchmarks = load_benchmarks(data or [source.config["data"]])
    except ValueError as error:
        print(f"no pictures at full size: {error}")
        return {}
    images = {shown_id(benchmarks, benchmark, picture): picture.image
              for benchmark in benchmarks for picture in benchmark.pictures}
    pictures: dict[str, bytes] = {}
    for id in (id for id in ids if id in images):
        with suppress(ValueError, OSError):
            picture, file = open_image(images[id]), BytesIO()
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
            picture.save(file, format="WEBP", quality=90)
            max_bytes -= len(file.getvalue()) * 4 / 3
            if max_bytes < 0:
                break
            pictures[id] = file.getvalue()
    print(f"pictures at full size: {len(pictures)} of {len(ids)}")
    return pictures
