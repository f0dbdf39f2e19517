"""The report page: what the policy wrote, what was asked, what was answered and what it earned, in
one file.

    python -m tools.report runs/toy                  # a run: runs/toy/report.html
    python -m tools.report runs/toy runs/other       # two runs side by side; curves of up to six
    python -m tools.report runs/demo/before.jsonl runs/demo/after.jsonl   # of evaluate.py --out

It reads the files of a run folder, or of an evaluation. It writes HTML that opens from disk without
a network. Numbers, curves and tables are there without scripts. The captions are in the page too,
packed by step and unpacked when a step is looked at. If all of them would make the page too large,
evenly spaced steps are shown. The page says which. Its address says what is looked at: it is a link
to that.
"""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import jinja2
import tyro

from data.io import naming, write_whole
from data.jsonl import filled
from data.ranges import check_range
from tools.report import curves
from tools.report.captions import browser_data
from tools.report.sources import HELD_OUT, Source, known, load_sources
from tools.settings import nearest_preset
from tools.stats import paired_difference, summarize

SHOWN_QUESTIONS = 100
SHOWN_PANELS = 4
"""Curves that are seen at once; the others are folded away."""
MAX_RUNS = 6
"""As many as there are dashes and colours that are told apart."""
HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageConfig:
    """One page to look at a run or an evaluation, or at two of them side by side."""

    first: tyro.conf.Positional[Path]
    """A run folder, or a file that `evaluate.py --out` wrote."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Others of the same kind, to compare with the first: one evaluation, or up to five runs.
    Captions are those of the first two, curves are those of all."""
    captioners: tuple[str, ...] = ()
    """The one or two captioners to show of an evaluation with more than two. Without it, the first
    two."""
    out: Path | None = None
    """The page; without it, report.html in the run folder, and NAME.html beside an evaluation's
    NAME.jsonl."""
    max_mb: float = 16.0
    """Captions and thumbnails of the page take at most so many megabytes."""
    full_mb: float = 0.0
    """Pictures at full size take at most so many megabytes more, the last steps' first. They are
    read from the data set, where it is still there."""
    data: tuple[str, ...] = ()
    """Where pictures at full size are: `--data` of evaluate.py. Without it, the run's own data."""

    def __post_init__(self):
        check_range(self, "max_mb", above=0)
        check_range(self, "full_mb", at_least=0)
        if self.full_mb and not self.data and not self.first.is_dir():
            raise ValueError("full_mb of an evaluation: expected --data, where its pictures are, "
                             "got none")


# --------------------------------------------------------------------------- cards and tables


TILES = {"reward": "reward", "accuracy": "accuracy", HELD_OUT: "held-out accuracy",
         "probe_accuracy": "probe accuracy", "kl": "KL"}


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
    machine = defaultdict(lambda: "?", filled(last.get("machine", {})))
    versions = last.get("versions", {})
    commits = [start.get("commit") or "unknown" for start in source.starts]
    facts = {
        "recipe": f"{preset}, {len(changes)} settings changed" if changes else preset,
        "command": last.get("command", ""),
        "commit": last.get("commit", ""),
        "started": ", ".join(f"{start['time']} at step {start['step']}" for start in source.starts),
        "ranks": last.get("ranks", ""),
        "GPUs": ", ".join(machine.get("gpus", [])),
        "machine": "{cpu}, {cores} cores, {memory_gib} GiB, {system}".format_map(machine)
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
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return text.replace("&", "\\u0026")


def shown_sources(paths: Sequence[Path], captioners: Sequence[str]) -> list[Source]:
    """Runs, up to MAX_RUNS, or one or two evaluations: a page has two sides."""
    loaded = [load_sources(path) for path in paths]
    sources = [source for parts in loaded
               for source in (parts[:1] if paths[1:] and not captioners else parts)]
    if captioners:
        names = list(dict.fromkeys(source.name for source in sources))
        missing = [name for name in captioners if name not in names]
        if missing:
            raise ValueError(f"captioners: expected among {names}, got {missing[0]!r}")
        # of two files that both have one, each file's
        sources = [source for name in captioners for source in sources if source.name == name]
        if len(sources) > 2:
            raise ValueError(f"captioners: expected one or two to show, found {len(sources)}")
    is_run = [source.config is not None for source in sources]
    given = " and ".join(map(str, paths))
    if len(set(is_run)) > 1:
        raise ValueError(f"expected two runs or two evaluations, got {given}")
    if is_run[0] and len(sources) > MAX_RUNS:
        raise ValueError(f"expected at most {MAX_RUNS} runs, got {len(sources)}: {given}")
    if not is_run[0] and len(paths) > 2:
        raise ValueError(f"expected one or two evaluations, got {len(paths)}: {given}")
    sources = sources if is_run[0] else sources[:2]
    if len(sources) > len({source.name for source in sources}):  # runs/a/final, runs/b/final
        sources = [replace(source, name=str(path)) for source, path in zip(sources, paths)]
    return sources


def write_page(first: Path, *others: Path, captioners: Sequence[str] = (), out: Path | None = None,
               max_mb: float = 16.0, full_mb: float = 0.0, data: Sequence[str] = ()) -> Path:
    """Writes the page and returns where it lies. Raises ValueError for what is neither a run nor an
    evaluation. `full_mb` and `data` as in PageConfig."""
    sources = shown_sources([first, *others], captioners)
    names, is_run = [source.name for source in sources], sources[0].config is not None
    style, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )
    environment.filters["script_json"] = script_json
    drawn = curves.panels(sources) if is_run and sources[0].num_steps else []
    hours = [curves.hours(source) for source in sources] if drawn else []
    text = environment.get_template("page.html.j2").render(
        title=" and ".join(names), is_run=is_run, names=names, style=style, script=script,
        # Only this very script runs, whatever a caption or an id might smuggle in, and nothing is
        # loaded from anywhere.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        cards=[run_card(source) for source in sources] if is_run else [],
        apart=settings_apart(sources) if is_run and len(sources) > 1 else {},
        panels=drawn, num_panels=SHOWN_PANELS, has_hours=all(hours),
        curves={"panels": [panel["values"] for panel in drawn], "hours": hours,
                "left": curves.LEFT, "right": curves.RIGHT},
        table=evaluation_table(sources) if not is_run else [],
        questions=question_table(sources)[:SHOWN_QUESTIONS] if not is_run else [],
        width=curves.WIDTH, height=curves.HEIGHT, left=curves.LEFT, right=curves.RIGHT,
        top=curves.TOP, bottom=curves.BOTTOM,
        browser=browser_data(sources[:2], max_mb * 1e6, full_mb * 1e6, data),
    )
    if out is None:
        beside = "".join(f"_with_{other.resolve().stem}" for other in others)
        name = f"report{beside}" if is_run else f"{first.stem}{beside}"
        out = (first if is_run else first.parent) / f"{name}.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out):
        # replace: half a surrogate pair, which some tokenizers decode to
        write_whole(out, text.encode(errors="replace"))
    return out


def main(arguments: list[str]) -> None:
    settings = vars(tyro.cli(PageConfig, args=arguments))
    page = write_page(settings.pop("first"), *settings.pop("others"), **settings)
    print(f"report: {page}")
