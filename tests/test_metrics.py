"""The list of all numbers that a run writes is what docs say and what a run writes."""

from pathlib import Path

from data.jsonl import read_log
from grpo.log import LOGS
from tools.report.metrics import METRICS, metrics_page


def test_each_key_is_defined_once_and_the_docs_are_the_list():
    keys = [one.key for metrics in METRICS.values() for one in metrics]
    assert len(keys) == len(set(keys)) and LOGS == ("metrics.jsonl", "audit.jsonl", "timing.jsonl")
    assert Path("docs/metrics.md").read_text(encoding="utf-8") == metrics_page(), (
        "its first lines say how to write it anew"
    )
    table = [line.split("|")[1].strip(" `") for line in metrics_page().splitlines() if line.startswith("| `")]
    assert table == keys


def test_a_real_run_writes_the_keys_of_the_list_and_no_others(tiny_run):
    listed = {name: {one.key: one for one in metrics} for name, metrics in METRICS.items()}
    seen = set()
    for name in LOGS:
        rows = read_log(tiny_run / name)
        allowed = {"step"} | set(listed[name]) | (set(listed["metrics.jsonl"]) if name == "audit.jsonl" else set())
        assert [row["step"] for row in rows] == [0, 1]
        for row in rows:
            assert set(row) <= allowed, name
            seen |= set(row)
            for key, value in row.items():
                unit = next((metrics[key].unit for metrics in listed.values() if key in metrics), "")
                if unit == "share":
                    assert value is None or 0 <= value <= 1 + 1e-9, key
                if unit == "count":
                    assert value == int(value) >= 0, key
                assert isinstance(value, list) == unit.startswith("list"), key
    # test_train.py has a run with it
    assert {key for metrics in listed.values() for key in metrics} - seen == {"reward_judge"}
