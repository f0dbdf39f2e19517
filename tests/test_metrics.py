"""The tables of docs/metrics.md are what a run writes."""

from pathlib import Path

from data.jsonl import read_log
from grpo.log import LOGS
from tools.report.metrics import LOG_KEYS, LogKey


def test_each_key_is_defined_once_with_a_meaning():
    keys = [one.key for keys in LOG_KEYS.values() for one in keys]
    assert len(keys) == len(set(keys)) > 30 and tuple(LOG_KEYS) == LOGS
    table = [line for line in Path("docs/metrics.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(table) == len(keys) + 2 * len(LOGS) and all(line.count("|") == 5 for line in table)
    assert all(one.what and (one.curve or one.unit) for keys in LOG_KEYS.values() for one in keys)
    meaning = "mean reward of the captions that have one"
    assert LOG_KEYS["metrics.jsonl"][0] == LogKey("reward", "", meaning, "reward and its parts")


def test_a_real_run_writes_the_keys_of_the_list_and_no_others(tiny_run):
    listed = {name: {one.key: one for one in metrics} for name, metrics in LOG_KEYS.items()}
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
    # test_train.py, test_held_out.py, test_resample.py, test_style.py and test_claims.py have runs or rewards with them
    elsewhere = {"reward_judge", "seconds_held_out", "resampled", "seconds_resample", "reward_praise", "reward_correctness",
                 "failed_claims", "correctness", "claims", "doubted_claims"}
    assert {key for metrics in listed.values() for key in metrics} - seen == elsewhere
