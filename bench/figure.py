"""Points with intervals as an SVG picture: a line for each row, a panel for each column."""

from collections.abc import Mapping
from html import escape

LINE, LABELS, PANEL, TOP = 22, 250, 250, 34
"""Pixels: height of a line, width of the labels and of a panel, height above the first line."""
INK, POINT = "#808080", "#2f7ed8"
"""They show on a light page and on a dark one."""

Interval = tuple[float, float, float]
"""Mean, and both ends of its interval."""


def points_svg(rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """rows: label -> column -> its interval; a column that a row lacks is left empty there. The
    scale of a panel goes from the lowest end to the highest."""
    columns = list(dict.fromkeys(column for given in rows.values() for column in given))
    width, height = LABELS + PANEL * len(columns), TOP + LINE * len(rows) + 22
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'font-family="sans-serif" font-size="13" fill="{INK}">']
    for number, label in enumerate(rows):
        parts.append(_text(LABELS - 12, TOP + LINE * number + 15, label, "end"))
    for number, column in enumerate(columns):
        parts += _panel(LABELS + PANEL * number, column, [row.get(column) for row in rows.values()])
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, column: str, intervals: list[Interval | None]) -> list[str]:
    ends = [end for interval in intervals if interval for end in interval]
    low, high = min(ends), max(ends)
    scale = (PANEL - 40) / ((high - low) or 1.0)
    bottom = TOP + LINE * len(intervals)
    parts = [_text(left, TOP - 14, column, "start"),
             _text(left, bottom + 15, f"{low:.2f}", "start"),
             _text(left + PANEL - 40, bottom + 15, f"{high:.2f}", "end"),
             f'<path d="M{left} {bottom}h{PANEL - 40}" stroke="{INK}"/>']
    for number, interval in enumerate(intervals):
        if interval:
            y = TOP + LINE * number + 10
            x, start, end = (round(left + (value - low) * scale, 1) for value in interval)
            parts += [f'<path d="M{start} {y}H{end}" stroke="{POINT}" stroke-width="2"/>',
                      f'<circle cx="{x}" cy="{y}" r="4" fill="{POINT}"/>']
    return parts


def _text(x: int, y: int, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
