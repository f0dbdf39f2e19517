"""Curves of a run's numbers: which are drawn together, and where each point lies."""

import math
from collections.abc import Sequence
from statistics import median

from tools.report.metrics import LOG_KEYS, LogKey
from tools.report.sources import HELD_OUT, Source, known

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 52, 352, 10, 156
"""The drawing area of a curve, in the units of its viewBox. The rest is for the numbers on the
axes."""
MOST_CHARACTERS = 6
"""Of a number beside a curve, where no power of ten is taken out of it: 52 units have room for 6
digits, or a sign, a point and 5."""

FIRST = ("reward", HELD_OUT, "accuracy", "probe_accuracy", "length", "kl")
"""What is looked at first, in this order: the reward, and what keeps it honest."""

HELD_OUT_KEY = LogKey(HELD_OUT, "", "mean score of the questions on images that are never trained "
                      "on, before the step; its band is over images", "held-out accuracy")

Band = dict[int, tuple[float, float]]
"""step -> the ends of an interval"""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them. Values
    that differ by less than a thousandth of their size are drawn as a nearly flat line: closer
    ticks would need more digits than the axis has room for."""
    if high == low:
        low, high = (low - 0.1 * abs(low), high + 0.1 * abs(high)) if low else (0.0, 1.0)
    elif (least := 1e-3 * max(abs(low), abs(high))) > high - low:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    unit = 10 ** math.floor(math.log10((high - low) / count))
    steps = (unit * factor for factor in (1, 2, 5, 10))
    step = next(step for step in steps if (high - low) / step <= count)
    places = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    return [place * step for place in places]


def axis_numbers(places: Sequence[float]) -> tuple[list[str], int]:
    """Labels of evenly spaced ticks, each told from the next, and the power of ten that they are
    to be multiplied by. The power is 0 where that leaves room for them: [0.95, 1] -> "0.95", "1";
    [1.065e-5, 1.07e-5] -> "1.065", "1.07" and -5."""
    step = places[1] - places[0]
    for power in (0, math.floor(math.log10(max(map(abs, places))) + 1e-9)):
        decimals = max(power - math.floor(math.log10(step) + 1e-9), 0)
        # Adding 0.0 makes -0.0 a 0.
        labels = [f"{round(place / 10.0**power, decimals) + 0.0:.{decimals}f}" for place in places]
        if decimals:
            labels = [label.rstrip("0").rstrip(".") for label in labels]
        if max(map(len, labels)) <= MOST_CHARACTERS:
            break
    return labels, power


def panels(sources: Sequence[Source]) -> list[dict]:
    """The curves, drawn. One run: numbers that belong together share one; two runs: each number has
    its own."""
    listed = {entry.key: entry for entries in LOG_KEYS.values() for entry in entries}
    listed[HELD_OUT] = HELD_OUT_KEY
    measured = {key for source in sources for key, values in source.series.items()
                if known(values.values())}
    others = sorted(measured - set(listed))
    parts = [key for key in others if key.startswith("reward_")]  # of a reward that is not ours
    keys = [key for key, entry in listed.items() if key in measured and entry.curve] + parts
    if sum(key.startswith("reward_") for key in keys) == 1:  # the whole reward, then
        keys = [key for key in keys if not key.startswith("reward_")]
    titles = {key: listed[key].curve if key in listed else "reward and its parts" for key in keys}
    titles |= {key: key for key in others if key not in parts}
    by_title: dict[str, list[str]] = {}
    for key in [key for key in FIRST if key in titles] + list(titles):
        members = by_title.setdefault(key if len(sources) > 1 else titles[key], [])
        if key not in members:
            members.append(key)
    drawn = []
    for title, members in by_title.items():
        lines = [
            {"label": source.name if len(sources) > 1 else key, "source": place,
             "values": source.series.get(key, {})}
            for key in members for place, source in enumerate(sources)
        ]
        bands = [source.bands.get(members[0], {}) for source in sources]
        known_members = [listed[key] for key in members if key in listed]
        unit = listed[members[0]].unit if members[0] in listed else ""
        what = [f"{entry.key}: {entry.what}".replace("`", "") for entry in known_members]
        drawn.append(draw_panel(title.replace("_", " "), unit, what, lines, bands,
                                [hours(source) for source in sources]))
    return drawn


def hours(source: Source) -> list[float]:
    """Before each step, and after the last: hours of the steps before it. A step whose seconds are
    not known counts as their median. Empty if none are."""
    series = source.series.get("seconds", {})
    if not known(series.values()):
        return []
    middle, total, sums = median(known(series.values())), 0.0, []
    for step in range(source.num_steps + 1):
        sums.append(float(f"{total / 3600:.6g}"))
        seconds = series.get(step)
        total += middle if seconds is None else seconds
    return sums


def draw_panel(title: str, unit: str, what: list[str], lines: list[dict], bands: list[Band],
               elapsed: list[list[float]]) -> dict:
    """Numbers to coordinates: what the template writes as SVG, and the values for the pointer to
    show. elapsed: `hours` of each source."""
    steps = sorted({step for line in lines for step in line["values"]})
    values = known(value for line in lines for value in line["values"].values())
    values += [end for band in bands for pair in band.values() for end in pair]
    low, high = min(values), max(values)
    y_ticks = ticks(0.0 if 0 <= low < high / 2 else low, high)
    width, height = max(steps[-1] - steps[0], 1), y_ticks[-1] - y_ticks[0]

    def x(step: int) -> float:
        return along(step, steps[0], width)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - y_ticks[0]) / height, 1)

    def outline(band: Band) -> str:
        upper = [f"{x(step)},{y(high)}" for step, (_, high) in sorted(band.items())]
        lower = [f"{x(step)},{y(low)}" for step, (low, _) in sorted(band.items())]
        return " ".join([*upper, *lower[::-1]])

    drawn, summary = [], []
    for line in lines:
        runs: list[list[str]] = [[]]  # a value that was not measured is a gap
        for step, value in sorted(line["values"].items()):
            if value is None:
                runs.append([])
            else:
                runs[-1].append(f"{x(step)},{y(value)}")
        numbers = known(value for _, value in sorted(line["values"].items()))
        is_sparse = len(numbers) <= 12
        drawn.append({
            "label": line["label"], "source": line["source"],
            "runs": [" ".join(run) for run in runs if len(run) > 1],
            "dots": [point.split(",") for run in runs for point in run
                     if is_sparse or len(run) == 1],
        })
        if numbers:
            summary.append(f"{line['label']} from {numbers[0]:.3g} to {numbers[-1]:.3g}")
    x_ticks = [(x(int(tick)), f"{tick:.0f}") for tick in ticks(steps[0], steps[-1])
               if tick == int(tick) and steps[0] <= tick <= steps[-1]]
    ends = [elapsed[line["source"]][min(step, len(elapsed[line["source"]]) - 1)]
            for line in lines for step in line["values"] if all(elapsed)]
    first, last = min(ends, default=0), max(ends, default=0)
    hour_ticks = [(along(tick, first, last - first), f"{tick:g}")
                  for tick in ticks(first, last) if first <= tick <= last] if last > first else []
    labels, power = axis_numbers(y_ticks)
    if power:
        unit = f"\N{MULTIPLICATION SIGN} 1e{power} {unit}".rstrip()
    return {
        "title": title, "unit": unit, "what": what, "lines": drawn, "summary": "; ".join(summary),
        "bands": [(place, outline(band)) for place, band in enumerate(bands) if band],
        "x_ticks": x_ticks or [(x(steps[0]), str(steps[0]))], "hour_ticks": hour_ticks,
        "y_ticks": list(zip(map(y, y_ticks), labels)),
        "values": {
            "steps": steps, "hours": [first, last],
            "lines": [{"source": line["source"],
                       "values": [_four_digits(line["values"].get(step)) for step in steps]}
                      for line in lines],
        },
    }


def along(value: float, low: float, width: float) -> float:
    """Where a step or an hour lies on the axis."""
    return round(LEFT + (RIGHT - LEFT) * (value - low) / width, 1)


def _four_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
