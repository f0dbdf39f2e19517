"""The report page: what the policy wrote, what was asked, what was answered and what it earned, in one file.

    python -m tools.report runs/toy                                  # a run: runs/toy/report.html
    python -m tools.report runs/toy runs/other                       # two runs side by side
    python -m tools.report runs/demo/before.jsonl runs/demo/after.jsonl   # what evaluate.py --out wrote

It reads the files of a run folder, or of an evaluation. It writes HTML that opens from disk without
a network. Numbers, curves and tables are there without scripts. The captions are in the page too,
packed by step and unpacked when a step is looked at. If all of them would make the page too large,
evenly spaced steps are shown. The page says which.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import jinja2
import tyro

from data.io import naming
from data.jsonl import read_log
from grpo.config import PRESETS
from grpo.log import LOGS
from grpo.run_dir import saved_config
from tools.report.metrics import METRICS
from tools.stats import interval, paired_difference, summarize
from tools.thumbnails import SHOWN_GROUPS, thumbnail_file

MAX_STEPS = 200
"""Steps whose captions are read: more would take minutes and fit no page."""
SHOWN_QUESTIONS = 100


@dataclass(frozen=True)
class PageConfig:
    """One page to look at a run or an evaluation, or at two of them side by side."""

    first: tyro.conf.Positional[Path]
    """A run folder, or a file that `evaluate.py --out` wrote."""
    other: tyro.conf.Positional[Path | None] = None
    """Another one of the same kind, to compare with the first."""
    captioners: tuple[str, ...] = ()
    """Of evaluations with more than two captioners, the one or two to show; without it, the first two."""
    out: Path | None = None
    """The page; without it, report.html in the run folder, and NAME.html beside an evaluation's NAME.jsonl."""
    max_mb: float = 16.0
    """Captions and thumbnails of the page take at most so many megabytes."""

    def __post_init__(self):
        if not self.max_mb > 0:
            raise ValueError(f"max_mb {self.max_mb}: expected more than 0")


# ----------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Source:
    """A run or an evaluation."""

    name: str
    path: Path
    """The run's folder or the evaluation's file."""
    groups: list[tuple[int | None, list[dict]]]
    """(step, rows of one image), in the order of the files; an evaluation has no steps."""
    num_steps: int = 0
    """How many the run has done."""
    config: dict | None = None
    """None for an evaluation."""
    starts: tuple[dict, ...] = ()
    series: dict[str, dict[int, float | None]] | None = None
    """key -> step -> value"""
    bands: dict[int, tuple[float, float]] | None = None
    """step -> 95% interval of the accuracy, over images"""


def load_sources(path: Path) -> list[Source]:
    """The run, or each captioner of the evaluation. Raises ValueError if there is neither, or for a row that is not one."""
    if path.is_dir():
        return [load_run(path)]
    if not path.is_file():
        raise ValueError(f"{path}: expected a run folder or a file of evaluate.py --out, found nothing")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: expected at least one row, found none")
    several = len({row.get("benchmark") for row in rows}) > 1
    by_captioner: dict[str, list[dict]] = {}
    for row in rows:
        row["questions"] = [  # evaluate.py writes all of these; captions of a step of a run can be looked at all the same
            {"id": f"{row['id']}:{place}", "family": str(row.get("family", "all")), "score": None, "correct": None,
             "abstain": None, "chosen": None, "unparsed": one.get("chosen") is None} | one
            for place, one in enumerate(row["questions"])
        ]
        if several:  # ids are unique in a benchmark, and so are families
            family = f"{row['benchmark']} {row.get('family', 'all')}"
            row |= {"id": f"{row['benchmark']}:{row['id']}", "family": family}
        by_captioner.setdefault(row.get("captioner", path.stem), []).append(row)
    if len(by_captioner) == 1:
        return [Source(path.stem, path, [(None, group) for group in by_image(rows)])]
    return [Source(name, path, [(None, group) for group in by_image(part)]) for name, part in by_captioner.items()]


def load_run(run_dir: Path) -> Source:
    config = saved_config(run_dir)
    if not config:
        raise ValueError(f"{run_dir}: expected a run folder with config.json, found none")
    series: dict[str, dict[int, float | None]] = {}
    for name in LOGS:
        for row in read_log(run_dir / name):
            if type(row.get("step")) is not int:
                raise ValueError(f"{run_dir / name}: expected a step in each row, got {row!r:.80}")
            for key, value in row.items():
                if key != "step" and (value is None or isinstance(value, int | float)):
                    series.setdefault(key, {})[row["step"]] = value
    num_steps = len(series.get("reward", {}))
    files = [path for path in sorted(run_dir.glob("rollouts/step_*.jsonl")) if step_of(path) < num_steps]
    groups, bands = [], {}
    for path in (files[place] for place in evenly(len(files), MAX_STEPS)):
        images = by_image(read_rows(path))
        correct = [known(one.get("correct") for row in group for one in row["questions"]) for group in images]
        if correct := [group for group in correct if group]:
            bands[step_of(path)] = interval(list(map(sum, correct)), list(map(len, correct)))
        groups += [(step_of(path), group) for group in images[:SHOWN_GROUPS]]
    starts = tuple(read_log(run_dir / "starts.jsonl"))
    return Source(run_dir.resolve().name, run_dir, groups, num_steps, config, starts, series, bands)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def read_rows(path: Path) -> list[dict]:
    """Captions of a file. Raises ValueError for a row that is none, naming file and row."""
    rows = [_known(row) for row in read_log(path)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("caption"), str):
            raise ValueError(f"{path} row {number}: expected an id and a caption, got {sorted(row)}")
        for one in row.setdefault("questions", []):
            if not isinstance(one, dict) or not isinstance(one.get("question"), str):
                raise ValueError(f"{path} row {number}: expected questions as asked, got {one!r}")
        row["questions"] = [_known(one) for one in row["questions"]]
    return rows


def _known(row: dict) -> dict:
    """null is absent."""
    return {key: value for key, value in row.items() if value is not None}


def by_image(rows: Iterable[dict]) -> list[list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return list(groups.values())


def evenly(count: int, at_most: int) -> list[int]:
    """`at_most` of the places 0 to count - 1, the first and the last among them: evenly(9, 3) is [0, 4, 8]."""
    if count <= at_most:
        return list(range(count))
    return [round(place * (count - 1) / (at_most - 1)) for place in range(at_most)] if at_most > 1 else [count - 1]


# ----------------------------------------------------------------------------------------------------------------- numbers


def earned(row: dict) -> float | None:
    """The reward of a run's row, the accuracy of an evaluation's."""
    return row.get("reward", row.get("accuracy"))


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# ---------------------------------------------------------------------------------------------------------------- captions


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
    found: list[dict[str, list[tuple[int | None, list[dict]]]]] = []
    for source in sources:
        of_id: dict[str, list[tuple[int | None, list[dict]]]] = {}
        for step, rows in source.groups:
            of_id.setdefault(rows[0]["id"], []).append((step, rows))
        found.append(of_id)

    def group(id: str, step: int | None) -> Group:
        nearest = [
            min(of_id[id], key=lambda one: abs((one[0] or 0) - (step or 0))) if id in of_id else (None, None) for of_id in found
        ]
        some = next(rows for _, rows in nearest if rows)
        return Group(id, str(some[0].get("family", "all")), [rows for _, rows in nearest], [at for at, _ in nearest])

    pages: dict[str, list[Group]] = {}
    if sources[0].config is not None:
        for step, rows in sources[0].groups:
            pages.setdefault(f"step {step}", []).append(group(rows[0]["id"], step))
        return pages
    ids = list(dict.fromkeys(id for of_id in found for id in of_id))
    for start in range(0, len(ids), SHOWN_GROUPS):
        part = ids[start : start + SHOWN_GROUPS]
        pages[f"images {start + 1} to {start + len(part)}"] = [group(id, None) for id in part]
    return pages


def pack_side(rows: list[dict] | None, step: int | None) -> dict | None:
    """What the browser needs of an image's captions. A question with its options is there once for
    all captions that it was asked on."""
    if rows is None:
        return None
    asked: dict[str, int] = {}
    captions = []
    for row in rows:
        answers = []
        for one in row["questions"]:
            question = [one["question"], one.get("options", []), one.get("gold"), one.get("abstain"), one.get("source")]
            place = asked.setdefault(json.dumps(question), len(asked))
            answers.append([
                place, one.get("chosen"), one.get("score"), one.get("reply") or "", one.get("failure") or "",
                [round(p, 2) for p in one.get("probs") or []],
            ])
        captions.append({
            "text": row["caption"], "reward": earned(row), "advantage": row.get("advantage"), "parts": row.get("parts", {}),
            "length": row.get("length"), "truncated": bool(row.get("truncated")), "answers": answers,
        })
    return {"step": step, "asked": [json.loads(one) for one in asked], "captions": captions}


def pack(value) -> str:
    """Base64 of deflated JSON: a quarter of the size, and nothing in it can be taken for markup."""
    return base64.b64encode(zlib.compress(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))).decode()


def browser_data(sources: Sequence[Source], max_bytes: float) -> dict:
    """`index`: what filters look at, for all groups; `chunks`: a packed text for each page; `pictures`: data URLs. Pages that
    do not fit are left out, evenly, and counted in `num_pages`."""
    pages = pages_of(sources)
    chunks = [
        pack([[pack_side(rows, step) for rows, step in zip(group.sides, group.steps)] for group in groups])
        for groups in pages.values()
    ]
    files = {
        group.id: next((path for one in sources if (path := thumbnail_file(one.path, group.id)).is_file()), None)
        for groups in pages.values() for group in groups
    }
    sizes = {id: path.stat().st_size * 4 / 3 for id, path in files.items() if path}

    def size(places: Sequence[int], titles: Sequence[str]) -> float:
        shown = {group.id for place in places for group in pages[titles[place]]}
        return sum(len(chunks[place]) for place in places) + sum(sizes.get(id, 0) for id in shown)

    titles, count = list(pages), len(pages)
    while count > 1 and size(evenly(len(titles), count), titles) > max_bytes:
        count -= 1
    kept = evenly(len(titles), count)

    texts: dict[str, int] = {}
    pictures: dict[str, str] = {}
    index = []
    for place in kept:
        entries = []
        for group in pages[titles[place]]:
            if group.id not in pictures and (path := files[group.id]):
                pictures[group.id] = "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()
            rewards = [known(map(earned, rows or [])) for rows in group.sides]
            asked = dict.fromkeys(one["question"] for rows in group.sides for row in rows or [] for one in row["questions"])
            entries.append({
                "id": group.id, "family": group.family,
                "picture": list(pictures).index(group.id) if group.id in pictures else None,
                "spread": round(max((max(found) - min(found) for found in rewards if found), default=0.0), 4),
                "means": [round(fmean(found), 4) if found else None for found in rewards],
                "questions": [texts.setdefault(text, len(texts)) for text in asked],
            })
        index.append({"title": titles[place], "groups": entries})
    return {
        "index": {"pages": index, "questions": list(texts), "names": [one.name for one in sources],
                  "earned": "accuracy" if sources[0].config is None else "reward"},
        "chunks": [chunks[place] for place in kept], "pictures": list(pictures.values()), "num_pages": len(pages),
    }


# ------------------------------------------------------------------------------------------------------------------ curves

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 52, 352, 10, 156
"""The drawing area of a curve, in the units of its viewBox. The rest is for the numbers on the
axes."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them."""
    if high == low:
        low, high = (low - 0.1 * abs(low), high + 0.1 * abs(high)) if low else (0.0, 1.0)
    unit = 10 ** math.floor(math.log10((high - low) / count))
    step = next(unit * factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= count)
    places = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    return [place * step for place in places]


def axis_number(value: float) -> str:
    """Short enough for the axis: 0.95, 37.15, 1.9e-6, 1.156e5."""
    text = f"{value:.4g}" if abs(value) < 1000 or abs(value) >= 1e5 else f"{value:.0f}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def panels(sources: Sequence[Source]) -> list[dict]:
    """The curves, drawn. One run: metrics that belong together share one; two runs: each metric has its own."""
    listed = {one.key: one for metrics in METRICS.values() for one in metrics}
    seen = {key for source in sources for key, values in source.series.items() if known(values.values())}
    parts = sorted(key for key in seen if key.startswith("reward_") and key not in listed)  # of a reward that is not ours
    keys = [key for key, one in listed.items() if key in seen and one.panel] + parts
    if len([key for key in keys if key.startswith("reward_")]) == 1:  # the whole reward, then
        keys = [key for key in keys if not key.startswith("reward_")]
    keys += sorted(seen - set(listed) - set(parts))
    by_panel: dict[str, list[str]] = {}
    for key in keys:
        panel = listed[key].panel if key in listed else "reward and its parts" if key in parts else key
        by_panel.setdefault(key if len(sources) > 1 else panel, []).append(key)
    found = []
    for title, members in by_panel.items():
        lines = [
            {"label": source.name if len(sources) > 1 else key, "values": source.series.get(key, {})}
            for key in members for source in sources
        ]
        bands = [source.bands for source in sources] if "accuracy" in members else []
        unit = listed[members[0]].unit if members[0] in listed else ""
        what = [f"{key}: {listed[key].what}".replace("`", "") for key in members if key in listed]
        found.append(draw(title.replace("_", " "), unit, what, lines, bands))
    return found


def draw(title: str, unit: str, what: list[str], lines: list[dict], bands: list[dict[int, tuple[float, float]]]) -> dict:
    """Numbers to coordinates: what the template writes as SVG, and the values for the pointer to show."""
    steps = sorted({step for line in lines for step in line["values"]})
    values = known(value for line in lines for value in line["values"].values())
    values += [end for band in bands for pair in band.values() for end in pair]
    low, high = min(values), max(values)
    y_ticks = ticks(0.0 if 0 <= low < high / 2 else low, high)
    width, height = max(steps[-1] - steps[0], 1), y_ticks[-1] - y_ticks[0]

    def x(step: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - steps[0]) / width, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - y_ticks[0]) / height, 1)

    drawn = []
    for line in lines:
        runs: list[list[str]] = [[]]  # a value that was not measured is a gap
        for step, value in sorted(line["values"].items()):
            if value is None:
                runs.append([])
            else:
                runs[-1].append(f"{x(step)},{y(value)}")
        is_sparse = len(known(line["values"].values())) <= 12
        drawn.append({
            "label": line["label"], "runs": [" ".join(run) for run in runs if len(run) > 1],
            "dots": [point.split(",") for run in runs for point in run if is_sparse or len(run) == 1],
        })
    outlines = []
    for band in bands:
        ends = [(x(step), y(pair[0]), y(pair[1])) for step, pair in sorted(band.items())]
        if ends:
            outlines.append(" ".join([f"{a},{top}" for a, _, top in ends] + [f"{a},{bottom}" for a, bottom, _ in ends[::-1]]))
    first_last = [known(value for _, value in sorted(line["values"].items())) for line in lines]
    summary = "; ".join(f"{line['label']} from {v[0]:.3g} to {v[-1]:.3g}" for line, v in zip(lines, first_last) if v)
    return {
        "title": title, "unit": unit, "what": what, "lines": drawn, "bands": outlines, "summary": summary,
        "x_ticks": [(x(int(tick)), f"{tick:.0f}") for tick in ticks(steps[0], steps[-1])
                    if tick == int(tick) and steps[0] <= tick <= steps[-1]] or [(x(steps[0]), str(steps[0]))],
        "y_ticks": [(y(tick), axis_number(tick) if abs(tick) > 1e-9 * height else "0") for tick in y_ticks],
        "values": {
            "steps": steps, "x": [x(step) for step in steps],
            "lines": [
                {"label": line["label"],
                 "values": [None if (v := line["values"].get(step)) is None else float(f"{v:.4g}") for step in steps]}
                for line in lines
            ],
        },
    }


# ------------------------------------------------------------------------------------------------------- cards and tables


def nearest_preset(config: dict) -> tuple[str, dict[str, tuple]]:
    """The recipe that the settings differ least from, and setting -> (here, there) where they do."""
    found = {}
    for name, (_, preset) in PRESETS.items():
        there = preset.flat()
        found[name] = {key: (value, there[key]) for key, value in config.items() if key in there and there[key] != value}
    name = min(found, key=lambda name: len(found[name]))
    return name, found[name]


def run_card(source: Source) -> dict:
    preset, changes = nearest_preset(source.config)
    last = source.starts[-1] if source.starts else {}
    tiles = [("steps", f"{source.num_steps} of {source.config.get('num_steps', '?')}")]
    for key, title in (("reward", "reward"), ("accuracy", "accuracy"), ("probe_accuracy", "probe accuracy"), ("kl", "KL")):
        values = known(value for _, value in sorted(source.series.get(key, {}).items()))
        if values and not (key == "accuracy" and source.series[key] == source.series["reward"]):
            tiles.append((title, f"{values[0]:.3f} → {values[-1]:.3f}"))
    if seconds := known(source.series.get("seconds", {}).values()):
        tiles.append(("seconds per step", f"{median(seconds):.3g}"))
    machine = last.get("machine", {})
    facts = [
        ("recipe", f"{preset}, {len(changes)} settings changed" if changes else preset),
        ("command", last.get("command", "")),
        ("commit", last.get("commit", "")),
        ("started", ", ".join(f"{start['time']} at step {start['step']}" for start in source.starts)),
        ("ranks", last.get("ranks", "")),
        ("GPUs", ", ".join(machine.get("gpus", []))),
        ("machine", "{cpu}, {cores} cores, {memory_gib} GiB, {system}".format(**machine) if machine else ""),
        ("versions", ", ".join(f"{name} {number}" for name, number in last.get("versions", {}).items())),
    ]
    if len({start["commit"] for start in source.starts}) > 1:
        facts.append(("note", "resumed with other code: " + ", ".join(start["commit"] or "unknown" for start in source.starts)))
    return {"name": source.name, "tiles": tiles, "facts": [(name, value) for name, value in facts if value != ""],
            "preset": preset, "changes": changes, "settings": source.config}


def settings_apart(sources: Sequence[Source]) -> dict[str, list]:
    """setting -> its value in each run, where they differ."""
    names = dict.fromkeys(name for source in sources for name in source.config)
    values = {name: [source.config.get(name) for source in sources] for name in names}
    return {name: found for name, found in values.items() if any(one != found[0] for one in found)}


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
        for _, rows in source.groups:
            for row in rows:
                for one in row["questions"]:
                    if one.get("correct") is not None:
                        sides = shares.setdefault(one["question"], [{} for _ in sources])
                        sides[place].setdefault((row["id"], one.get("source")), []).append(one["correct"])
    table = []
    for text, sides in shares.items():
        means = [{key: fmean(correct) for key, correct in side.items()} for side in sides]
        shared = set(means[0]).intersection(*means[1:])
        if shared:
            share = [fmean(mean[key] for key in shared) for mean in means]
            table.append({"question": text, "images": len(shared), "shares": share, "difference": share[-1] - share[0]})
    if len(sources) > 1:
        return sorted(table, key=lambda row: (-abs(row["difference"]), -row["images"]))
    return sorted(table, key=lambda row: (row["shares"][0], -row["images"]))


# -------------------------------------------------------------------------------------------------------------------- page


def script_json(value) -> str:
    """JSON that may stand inside a script element, whatever is in it."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(first: Path, other: Path | None = None, captioners: Sequence[str] = (), out: Path | None = None,
               max_mb: float = 16.0) -> Path:
    """Writes the page and returns where it lies. Raises ValueError for what is neither a run nor an evaluation."""
    loaded = [load_sources(path) for path in (first, other) if path is not None]
    sources = [source for parts in loaded for source in (parts[:1] if len(loaded) > 1 and not captioners else parts)]
    if captioners:
        by_name = {source.name: source for source in sources}
        if missing := [name for name in captioners if name not in by_name]:
            raise ValueError(f"captioners: expected among {list(by_name)}, got {missing[0]!r}")
        sources = [by_name[name] for name in captioners]
    sources = sources[:2]  # a page has two sides
    is_run = sources[0].config is not None
    if any((source.config is not None) != is_run for source in sources):
        raise ValueError(f"expected two runs or two evaluations, got {first} and {other}")
    if len(sources) > 1 and sources[0].name == sources[1].name:  # runs/a/final.jsonl and runs/b/final.jsonl
        paths = [str(first), str(other)]
        sources = [replace(source, name=path) for source, path in zip(sources, paths)]
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["script_json"] = script_json
    drawn = panels(sources) if is_run and sources[0].num_steps else []
    text = environment.get_template("page.html.j2").render(
        title=" and ".join(source.name for source in sources), is_run=is_run, names=[source.name for source in sources],
        style=(Path(__file__).parent / "page.css").read_text(encoding="utf-8"), script=script,
        # Only this very script runs, whatever a caption or an id might smuggle in, and nothing is loaded from anywhere.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        cards=[run_card(source) for source in sources] if is_run else [],
        apart=settings_apart(sources) if is_run and len(sources) > 1 else {},
        panels=drawn, curves=[panel["values"] for panel in drawn],
        table=evaluation_table(sources) if not is_run else [],
        questions=question_table(sources)[:SHOWN_QUESTIONS] if not is_run else [],
        width=WIDTH, height=HEIGHT, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM,
        browser=browser_data(sources, max_mb * 1e6),
    )
    if out is None:
        beside = f"_with_{other.resolve().stem}" if other is not None else ""
        out = first / f"report{beside}.html" if is_run else first.with_name(f"{first.stem}{beside}.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out):
        out.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair, which some tokenizers decode to
    return out


def main(arguments: list[str]) -> None:
    print(f"report: {write_page(**vars(tyro.cli(PageConfig, args=arguments)))}")
