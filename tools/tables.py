"""What evaluate.py writes: rows of captions as they come, tables as Markdown and as JSON."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.benchmarks.benchmark import Benchmark, Picture
from data.io import check_room, json_lines, write_whole
from tools.budgets import budget_name
from tools.published import judge_name, published_table
from tools.stats import completeness, markdown, paired_difference, precision
from tools.thumbnails import keep_thumbnail, thumbnail_file

Rows = dict[tuple[str, str], list[dict]]
"""(benchmark, captioner) -> a row per caption"""
Tables = dict[tuple[str, str], dict[str, dict[str, float]]]
"""(benchmark, captioner) -> `summarize`"""

THUMBNAILS = 400
"""Pictures of a benchmark, the first ones, that are kept small for the report page."""

CAPTIONQA_SHARES = ("accuracy", "right", "abstained")
"""Of `summarize`: the score, which credits abstaining, and what it is made of."""


def report(benchmarks: Sequence[Benchmark], rows: Rows, tables: Tables,
           config: Any = None) -> str:
    """All tables as Markdown: scores, differences to the first captioner, scores by budget of
    words, CaptionQA's and CAPEval's shares, published scores. config: evaluate.py's settings."""
    parts, budgets = [format_table(tables)], getattr(config, "max_words", ())
    differences = _difference_rows(rows)
    if differences:
        header = "benchmark | captioner | less | questions: | difference: | 95% interval"
        parts.append("Paired, on the same questions:\n\n" + markdown(header, differences))
    if budgets and (lines := _budget_rows(tables, budgets)):  # floors alone have none
        header = " | ".join(["benchmark | captioner", *(f"{n} words:" for n in budgets), "all:"])
        parts.append("Score by budget of words, in brackets the words per caption:\n\n"
                     + markdown(header, lines))
    captionqa = {benchmark.name for benchmark in benchmarks if benchmark.kind == "captionqa"}
    if captionqa:
        shares = [[captioner, *(_number(table["all"][key]) for key in CAPTIONQA_SHARES)]
                  for (benchmark, captioner), table in tables.items() if benchmark in captionqa]
        header = "captioner | score: | accuracy: | abstained:"
        parts.append("CaptionQA:\n\n" + markdown(header, shares))
    capeval = {benchmark.name for benchmark in benchmarks if benchmark.kind == "capeval"}
    if capeval:
        scores = [[captioner, family, _number(100 * completeness(row), 1),
                   _number(100 * precision(row), 1)]
                  for (benchmark, captioner), table in tables.items() if benchmark in capeval
                  for family, row in table.items()]
        header = "captioner | family | completeness: | precision:"
        parts.append("CAPEval, in percent:\n\n" + markdown(header, scores))
    limit = getattr(config, "limit", 0)
    published = published_table(benchmarks, rows, tables, judge_name(config), bool(limit))
    if published:
        parts.append("Published, and whether benchmark, judge and metric are those of this run "
                     "(prompts are ours, but for --words-prompt; the paper's Table 3 is a mean "
                     f"over 4 captions at temperature 1):\n\n{published}")
    if asked := getattr(config, "words_prompt", ""):
        parts.append(f"Prompt for answers in words: {asked}")
    return "\n\n".join(parts)


def check_out(name: str) -> Path:
    """The path of a new file. Raises ValueError for a name that is taken or does not end in .jsonl,
    and for a folder that cannot be written."""
    out = Path(name)
    if out.suffix != ".jsonl":
        raise ValueError(f"{out}: expected a name that ends in .jsonl")
    for path in (out, out.with_suffix(".md"), out.with_suffix(".json"),
                 thumbnail_file(out, "").parent):
        if path.exists():
            raise ValueError(f"{path}: expected nothing there yet, found an earlier evaluation's")
    check_room(out.parent)
    return out


def append_rows(out: Path, benchmark: str, captioner: str, rows: Sequence[dict],
                is_first: bool) -> None:
    """The first rows make the file. Raises ValueError if another evaluation has made it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    names = {"benchmark": benchmark, "captioner": captioner}
    try:
        file = out.open("xb" if is_first else "ab")
    except FileExistsError:
        raise ValueError(f"{out}: expected a new file, found another evaluation's") from None
    with file:
        file.writelines(json_lines(names | row for row in rows))


def shown_id(benchmarks: Sequence[Benchmark], benchmark: Benchmark, picture: Picture) -> str:
    """How the report page names a picture: its ids are unique in a benchmark."""
    return picture.id if len(benchmarks) == 1 else f"{benchmark.name}:{picture.id}"


def keep_thumbnails(out: Path, benchmarks: Sequence[Benchmark]) -> None:
    """Keeps thumbnails of each benchmark's first pictures, beside the file of rows."""
    for benchmark in benchmarks:
        for picture in benchmark.pictures[:THUMBNAILS]:
            id = shown_id(benchmarks, benchmark, picture)
            with suppress(ValueError):  # one that cannot be opened has its sentence in the rows
                keep_thumbnail(out, id, picture.image)


def write_tables(out: Path, text: str, benchmarks: Sequence[Benchmark], tables: Tables) -> None:
    """The text of `report`, as .md, the numbers of the first table with the refused rows, as .json,
    and thumbnails."""
    write_whole(out.with_suffix(".md"), f"{text}\n".encode())
    plain = {
        "tables": [
            {"benchmark": benchmark, "captioner": captioner, "families": table}
            for (benchmark, captioner), table in tables.items()
        ],
        "refused": {benchmark.name: benchmark.refused for benchmark in benchmarks},
    }
    write_whole(out.with_suffix(".json"), json_lines([plain]))
    keep_thumbnails(out, benchmarks)


def check_measured(rows: Rows) -> None:
    """Raises ValueError if none of a captioner's questions on a benchmark could be scored: an empty
    line of a table is no result."""
    for (benchmark, captioner), group in rows.items():
        questions = [question for row in group for question in row["questions"]]
        if all(question["score"] is None for question in questions):
            reason = next((question["failure"] for question in questions), "none was asked")
            raise ValueError(f"{benchmark}, {captioner}: expected at least one question that can "
                             f"be scored, found none of {len(questions)} ({reason})")


def format_table(tables: Tables) -> str:
    """A line for each benchmark, captioner and family."""
    header = ("benchmark | captioner | family | images: | questions: | score: | 95% interval | "
              "release's: | best caption: | words: | empty: | tokens: | cut: | unparsed: | failed:")
    return markdown(header, (
        [benchmark, captioner, family, row["images"], row["questions"], _number(row["accuracy"]),
         _interval(row), _number(row["released"]), _number(row["best"]), _number(row["words"], 1),
         _number(row["empty"]), _number(row["tokens"], 1), _number(row["cut"]),
         _number(row["unparsed"]), row["failed"]]
        for (benchmark, captioner), table in tables.items() for family, row in table.items()
    ))


def _number(value: float, digits: int = 3, sign: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def _interval(row: dict[str, float], sign: str = "") -> str:
    low, high = (_number(row[end], sign=sign) for end in ("low", "high"))
    return f"{low} to {high}" if low else ""


def _difference_rows(rows: Rows) -> list[list]:
    """A line for the difference of each captioner to the first of its benchmark."""
    first: dict[str, str] = {}
    lines = []
    for (benchmark, captioner), group in rows.items():
        base = first.setdefault(benchmark, captioner)
        if captioner != base:
            row = paired_difference(rows[benchmark, base], group)
            lines.append([benchmark, captioner, base, row["questions"],
                          _number(row["difference"], sign="+"), _interval(row, "+")])
    return lines


def _budget_rows(tables: Tables, budgets: Sequence[int]) -> list[list]:
    lines = []
    for benchmark, captioner in tables:
        names = [budget_name(captioner, budget) for budget in budgets]
        if (benchmark, names[0]) in tables:
            scored = [tables[benchmark, name]["all"] for name in (*names, captioner)]
            cells = [f"{_number(row['accuracy'])} ({_number(row['words'], 1)})" for row in scored]
            lines.append([benchmark, captioner, *cells])
    return lines
