"""Every number that a run writes, with its unit and meaning: the tables of docs/metrics.md."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LogKey:
    """A number that a run writes once per step."""

    key: str
    unit: str
    """"share" is 0 to 1, "count" a whole number. A list has a number for each letter."""
    what: str
    curve: str
    """Title of the curve on which the report page draws it; empty for what is no curve."""


def read_log_keys() -> dict[str, list[LogKey]]:
    """By file, in the order of the page. A key of the audit that stands in metrics.jsonl too (of
    the same captions) is defined there. Without docs there is none, and each has its own curve."""
    path = Path(__file__).parents[2] / "docs/metrics.md"
    keys: dict[str, list[LogKey]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.startswith("## "):
            keys[line[3:]] = []
        elif line.startswith("| `"):
            key, *others = (cell.strip() for cell in line.strip("|").split("|"))
            keys[list(keys)[-1]].append(LogKey(key.strip("`"), *others))
    return keys


LOG_KEYS = read_log_keys()
