"""The demo at its smallest setting. evaluate.py and caption.py have tests of their own."""

import re

import pytest

from data.toy.demo import DemoConfig, demo


def test_the_demos_last_line(tmp_path, capsys):
    demo(DemoConfig(num_images=3, num_steps=1, run_dir=tmp_path / "demo"))
    lines = capsys.readouterr().out.strip().splitlines()
    match = re.fullmatch(r"demo: before (\d\.\d{3}) after (\d\.\d{3}) rise (-?\d\.\d{3})", lines[-1])
    assert float(match[2]) - float(match[1]) == pytest.approx(float(match[3]), abs=0.0011)
    assert sum("before: " in line for line in lines) == 3 and any("| all |" in line for line in lines)
    demo(DemoConfig(num_images=3, num_steps=1, run_dir=tmp_path / "demo"))  # a second demo makes room for itself
