"""Who imports whom, how much of ours `import train` loads, and that docs/tour.md names what is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("data", "grpo", "reward", "tools")
    for path in (ROOT / folder).rglob("*.py")
)
MAY_IMPORT = {
    "data": r"data",
    "grpo": r"grpo|data\.io|data\.ranges",
    "reward": r"reward|grpo|data",
    "tools": r"tools|reward|grpo|data",
}
"""By the folder of a file: modules of ours that it may import. Files are read and written, and
settings held in their ranges, by data.io and data.ranges alone."""
PROGRAMS = re.compile(r"data/(curate|toy/(build|captioner|demo|fit|flawed_judge|looker|pretrain|tokenizer|verifier|writer))")
"""Builders and programs, in data/ because of their subject. They import anything, and nobody but
programs and tests imports them."""
MOST_LINES = 3350
"""Of our files that `import train` loads, together."""


def imported(file: str, only_loaded: bool = False) -> set[str]:
    """Our modules that the file imports: anywhere in it, or only when it is loaded itself."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if only_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name for name in names if re.match(r"(data|grpo|reward|tools|train|caption|evaluate)\b", name)}


@pytest.mark.parametrize("file", [file for file in FILES if not PROGRAMS.match(file)])
def test_imports_point_one_way(file):
    allowed = re.compile(rf"(?:{MAY_IMPORT[file.split('/')[0]]})\b")
    assert [name for name in imported(file, only_loaded=True) if not allowed.match(name)] == []
    assert not [name for name in imported(file) if PROGRAMS.match(name.replace(".", "/"))]


def test_a_reader_of_train_meets_no_reports_checks_and_evaluations():
    code = "import sys, train; print('\\n'.join(str(getattr(m, '__file__', '')) for m in sys.modules.values()))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(line) for line in said.splitlines() if line.startswith(str(ROOT)) and ".venv" not in line]
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    assert "grpo/loss.py" in names and not [name for name in names if name.startswith(("tools", "evaluate"))]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= MOST_LINES


@pytest.mark.parametrize("program, most", [("train.py", 240), ("caption.py", 150), ("evaluate.py", 220)])
def test_programs_stay_short(program, most):
    assert len((ROOT / program).read_text(encoding="utf-8").splitlines()) <= most


def test_every_place_of_the_tour_is_there():
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py): (\w+)`", text)
    assert len(places) > 30 and len(text.splitlines()) < 120
    for file, name in places:
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.* = ", (ROOT / file).read_text(), re.MULTILINE), (
            file,
            name,
        )
