"""The report page: what the policy wrote, what was asked, what was answered and what it earned, in
one file.

    python -m tools.report runs/toy                  # a run: runs/toy/report.html
    python -m tools.report runs/toy runs/other       # two runs side by side
    python -m tools.report runs/demo/before.jsonl runs/demo/after.jsonl   # of evaluate.py --out

It reads the files of a run folder, or of an evaluation. It writes HTML that opens from disk without
a network. Numbers, curves and tables are there without scripts. The captions are in the page too,
packed by step and unpacked when a step is looked at. If all of them would make the page too large,
evenly spaced steps are shown. The page says which.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import jinja2
import tyro

from data.io import naming, write_whole
from data.program import check_range
from grpo.config import nearest_preset
from tools.report import curves
from tools.report.sources import Source, evenly, known, load_sources
from tools.stats import paired_difference, summarize
from tools.thumbnails import SHOWN_GROUPS, thumbnail_file

SHOWN_QUESTIONS = 100
HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageConfig:
    """One page to look at a run or an evaluation, or at two of them side by side."""

    first: tyro.conf.Positional[Path]
    """A run folder, or a file that `evaluate.py --out` wrote."""
    other: tyro.conf.Positional[Path | None] = None
    """Another one of the same kind, to compare with the first."""
    captioners: tuple[str, ...] = ()
    """The one or two captioners to show of an evaluation with more than two. Without it, the first
    two."""
    out: Path | None = None
    """The page; without it, report.html in the run folder, and NAME.html beside an evaluation's
    NAME.jsonl."""
    max_mb: float = 16.0
    """Captions and thumbnails of the page take at most so many megabytes."""

    def __post_init__(self):
        check_range(self, "max_mb", above=0)


# ------------------------------------------------------------------------------------ captions


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


def pack_side(rows: list[dict] | None, step: int | None) -> dict | None:
    """What the browser needs of an image's captions. A question with its options is there once for
    all captions that it was asked on."""
    if rows is None:
        return None
    asked: dict[str, int] = {}
    captions = []
    for row in rows:
        answers = []
        for question in row["questions"]:
            shown = [question["question"], question.get("options", []),
                     *map(question.get, ("gold", "abstain", "source"))]
            place = asked.setdefault(json.dumps(shown), len(asked))
            probs = [round(prob, 2) for prob in question.get("probs") or []]
            answers.append([place, question.get("chosen"), question.get("score"),
                            question.get("reply") or "", question.get("failure") or "", probs])
        captions.append({
            "text": row["caption"], "reward": earned(row), "advantage": row.get("advantage"),
            "parts": row.get("parts", {}), "length": row.get("length"),
            "truncated": bool(row.get("truncated")), "answers": answers,
        })
    return {"step": step, "asked": list(map(json.loads, asked)), "captions": captions}


def pack(value) -> str:
    """Base64 of deflated JSON: a quarter of the size, and nothing in it can be taken for markup."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return base64.b64encode(zlib.compress(text)).decode()


def browser_data(sources: Sequence[Source], max_bytes: float) -> dict:
    """`index`: what filters look at, for all groups; `chunks`: a packed text for each page;
    `pictures`: data URLs. Pages that do not fit are left out, evenly, and counted in
    `num_pages`."""
    pages = list(pages_of(sources).items())
    chunks = [pack([list(map(pack_side, group.sides, group.steps)) for group in groups])
              for _, groups in pages]
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
    for title, groups in (pages[place] for place in kept):
        entries = []
        for group in groups:
            if files[group.id]:
                places.setdefault(group.id, len(places))
            rewards = [known(map(earned, rows or [])) for rows in group.sides]
            asked = dict.fromkeys(
                question["question"] for rows in group.sides for row in rows or []
                for question in row["questions"]
            )
            spreads = [max(values) - min(values) for values in rewards if values]
            entries.append({
                "id": group.id, "family": group.family, "picture": places.get(group.id),
                "spread": round(max(spreads, default=0.0), 4),
                "means": [round(fmean(values), 4) if values else None for values in rewards],
                "questions": [texts.setdefault(text, len(texts)) for text in asked],
            })
        index.append({"title": title, "groups": entries})
    pictures = [base64.b64encode(files[id].read_bytes()).decode() for id in places]
    return {
        "index": {
            "pages": index, "questions": list(texts), "names": [source.name for source in sources],
            "earned": "accuracy" if sources[0].config is None else "reward",
        },
        "chunks": [chunks[place] for place in kept], "num_pages": len(pages),
        "pictures": [f"data:image/webp;base64,{picture}" for picture in pictures],
    }


# --------------------------------------------------------------------------- cards and tables


TILES = {"reward": "reward", "accuracy": "accuracy", "probe_accuracy": "probe accuracy", "kl": "KL"}


def run_card(source: Source) -> dict:
    preset, changes = nearest_preset(source.config)
    last = source.starts[-1] if source.starts else {}
    tiles = [("steps", f"{source.num_steps} of {source.config.get('num_steps', '?')}")]
    for key, title in TILES.items():
        series = source.series.get(key, {})
        values = known(value for _, value in sorted(series.items()))
        if values and not (key == "accuracy" and series == source.series["reward"]):
            tiles.append((title, f"{values[0]:.3f} → {values[-1]:.3f}"))
    seconds = known(source.series.get("seconds", {}).values())
    if seconds:
        tiles.append(("seconds per step", f"{median(seconds):.3g}"))
    machine, versions = last.get("machine", {}), last.get("versions", {})
    commits = [start["commit"] or "unknown" for start in source.starts]
    facts = {
        "recipe": f"{preset}, {len(changes)} settings changed" if changes else preset,
        "command": last.get("command", ""),
        "commit": last.get("commit", ""),
        "started": ", ".join(f"{start['time']} at step {start['step']}" for start in source.starts),
        "ranks": last.get("ranks", ""),
        "GPUs": ", ".join(machine.get("gpus", [])),
        "machine": "{cpu}, {cores} cores, {memory_gib} GiB, {system}".format(**machine)
                   if machine else "",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "note": "resumed with other code: " + ", ".join(commits) if len(set(commits)) > 1 else "",
    }
    return {"name": source.name, "tiles": tiles, "preset": preset, "changes": changes,
            "facts": [(name, fact) for name, fact in facts.items() if fact != ""],
            "settings": source.config}


def settings_apart(sources: Sequence[Source]) -> dict[str, list]:
    """setting -> its value in each run, where they differ."""
    names = dict.fromkeys(name for source in sources for name in source.config)
    settings = {name: [source.config.get(name) for source in sources] for name in names}
    return {name: values for name, values in settings.items() if values != values[:1] * len(values)}


def evaluation_table(sources: Sequence[Source]) -> list[dict]:
    """evaluate.py's own numbers for each benchmark, per family and over all. They are `summarize`
    of each source and, of two, the `paired_difference` of the second to the first."""
    given = [[row for _, rows in source.groups for row in rows] for source in sources]
    benchmarks = list(dict.fromkeys(row.get("benchmark") for rows in given for row in rows))
    table = []
    for benchmark in benchmarks:
        parts = [[row for row in rows if row.get("benchmark") == benchmark] for rows in given]
        summaries = [summarize(part) for part in parts]
        families = sorted({family for summary in summaries for family in summary} - {"all"})
        for family in [*families, "all"]:
            table.append({
                "family": f"{benchmark} {family}" if len(benchmarks) > 1 else family,
                "cells": [summary.get(family) for summary in summaries],
                "difference": paired_difference(*parts, family) if len(parts) > 1 else None,
            })
    return table


def question_table(sources: Sequence[Source]) -> list[dict]:
    """What was right of each question: shares, the largest differences first. Of one source the
    lowest shares come first."""
    shares: dict[str, list[dict[tuple[str, int | None], list[bool]]]] = {}
    for place, source in enumerate(sources):
        rows = [row for _, rows in source.groups for row in rows]
        asked = [(row["id"], question) for row in rows for question in row["questions"]]
        for id, question in asked:
            if question.get("correct") is not None:
                sides = shares.setdefault(question["question"], [{} for _ in sources])
                answers = sides[place].setdefault((id, question.get("source")), [])
                answers.append(question["correct"])
    table = []
    for text, sides in shares.items():
        both = set(sides[0]).intersection(*sides[1:])
        if both:
            share = [fmean(fmean(side[key]) for key in both) for side in sides]
            table.append({"question": text, "images": len(both), "shares": share,
                          "difference": share[-1] - share[0]})
    if len(sources) > 1:
        return sorted(table, key=lambda row: (-abs(row["difference"]), -row["images"]))
    return sorted(table, key=lambda row: (row["shares"][0], -row["images"]))


# ---------------------------------------------------------------------------------------- page


def script_json(value) -> str:
    """JSON that may stand inside a script element, whatever is in it."""
    text = json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e")
    return text.replace("&", "\\u0026")


def shown_sources(first: Path, other: Path | None, captioners: Sequence[str]) -> list[Source]:
    """One or two: a page has two sides."""
    loaded = [load_sources(path) for path in (first, other) if path is not None]
    sources = [source for parts in loaded
               for source in (parts[:1] if other and not captioners else parts)]
    if captioners:
        by_name = {source.name: source for source in sources}
        missing = [name for name in captioners if name not in by_name]
        if missing:
            raise ValueError(f"captioners: expected among {list(by_name)}, got {missing[0]!r}")
        sources = [by_name[name] for name in captioners]
    sources = sources[:2]
    if len({source.config is None for source in sources}) > 1:
        raise ValueError(f"expected two runs or two evaluations, got {first} and {other}")
    if len(sources) > len({source.name for source in sources}):  # runs/a/final, runs/b/final
        sources = [replace(source, name=str(path)) for source, path in zip(sources, (first, other))]
    return sources


def write_page(first: Path, other: Path | None = None, captioners: Sequence[str] = (),
               out: Path | None = None, max_mb: float = 16.0) -> Path:
    """Writes the page and returns where it lies. Raises ValueError for what is neither a run nor an
    evaluation."""
    sources = shown_sources(first, other, captioners)
    names, is_run = [source.name for source in sources], sources[0].config is not None
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )
    environment.filters["script_json"] = script_json
    drawn = curves.panels(sources) if is_run and sources[0].num_steps else []
    text = environment.get_template("page.html.j2").render(
        title=" and ".join(names), is_run=is_run, names=names, style=style, script=script,
        # Only this very script runs, whatever a caption or an id might smuggle in, and nothing is
        # loaded from anywhere.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        cards=[run_card(source) for source in sources] if is_run else [],
        apart=settings_apart(sources) if is_run and len(sources) > 1 else {},
        panels=drawn, curves=[panel["values"] for panel in drawn],
        table=evaluation_table(sources) if not is_run else [],
        questions=question_table(sources)[:SHOWN_QUESTIONS] if not is_run else [],
        width=curves.WIDTH, height=curves.HEIGHT, left=curves.LEFT, right=curves.RIGHT,
        top=curves.TOP, bottom=curves.BOTTOM, browser=browser_data(sources, max_mb * 1e6),
    )
    if out is None:
        beside = f"_with_{other.resolve().stem}" if other is not None else ""
        name = f"report{beside}" if is_run else f"{first.stem}{beside}"
        out = (first if is_run else first.parent) / f"{name}.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out):
        # replace: half a surrogate pair, which some tokenizers decode to
        write_whole(out, text.encode(errors="replace"))
    return out


def main(arguments: list[str]) -> None:
    print(f"report: {write_page(**vars(tyro.cli(PageConfig, args=arguments)))}")
