"""The line that a step prints."""

import math
import re

import pytest

from grpo.log import alarms, count_skipped, finite_numbers, log_step
from grpo.recipes import toy_config


def test_the_console_line_shows_the_few_that_matter(tmp_path):
    (tmp_path / "rollouts").mkdir()
    rows = [{"id": "a", "caption": "two\nlines", "reward": math.nan}, {"id": "a", "caption": "other", "reward": 0.5}]
    metrics = {"reward": 0.5, "kl": 0.25, "flat_groups": math.nan, "loss": 3.0}
    assert log_step(tmp_path, 7, metrics, {}, {"seconds": 2.0, "seconds_update": 1.0}, rows) == (
        "step    7  reward 0.500  flat_groups nan  kl 0.250  seconds 2.000"
    )
    said = log_step(
        tmp_path, 8, metrics, {"probe_accuracy": 0.5, "split_half": 0.1, "repetition": 0.0}, {}, rows
    ).splitlines()
    assert said[1:] == ["    audit  probe_accuracy 0.500  split_half 0.100", "    reward nan  a: 'two\\nlines'"]


def test_trackers_get_finite_numbers_and_captions_now_and_then(tmp_path):
    (tmp_path / "rollouts").mkdir()
    told, rows = [], [{"id": "a", "caption": "two", "reward": 0.5}]
    for step, audit in ((0, {}), (1, {"split_half": math.nan}), (2, {"probe_accuracy": 0.25})):
        metrics = {"reward": 0.5, "kl": math.nan, "letters": [1], "skipped": 0}
        log_step(tmp_path, step, metrics, audit, {"seconds": math.inf}, rows, [lambda *given: told.append(given)])
    numbers = {"metrics/reward": 0.5, "metrics/skipped": 0}
    assert told == [(0, numbers, rows), (1, numbers, []), (2, numbers | {"audit/probe_accuracy": 0.25}, rows)]
    assert finite_numbers(eval={"accuracy": None, "images": 3}) == {"eval/images": 3}


@pytest.mark.parametrize("changes, metrics, lack", [
    ({}, {"teaching_captions": 0}, None),  # the KL still moves the policy
    ({}, {"skipped": 1, "teaching_captions": 4}, "a finite gradient"),
    ({"resample_flat": 1}, {"teaching_captions": 0, "flat_groups": 0.5}, "a group whose captions differ in reward"),
    # rewards may be equal where their parts, compared apart, are not
    ({"resample_flat": 1, "normalize_parts": True}, {"teaching_captions": 2, "flat_groups": 1.0}, None),
    ({"mask_truncated": True}, {"teaching_captions": 0, "flat_groups": 0.0},
     "a group whose captions differ in reward, one of them not cut off"),
])
def test_steps_that_teach_nothing_end_the_run(tmp_path, changes, metrics, lack):
    config = toy_config(max_skipped=3, **changes)
    metrics = {"skipped": 0, "flat_groups": 0.0} | metrics
    assert count_skipped(metrics, 1, 5, [], tmp_path, config) == (2 if lack else 0)
    if lack:
        with pytest.raises(ValueError, match=f"3 steps in a row without {lack}; the last images"):
            count_skipped(metrics, 2, 5, [], tmp_path, config)


def test_alarms_name_the_number_and_the_way_out():
    calm = dict(ratio=1.0, sampler_gap=0.01, kl=0.1, truncated_share=0.1, flat_groups=0.3)
    assert alarms(calm) == []
    for change, advice in (({"ratio": 0.9}, "ratio 0.900: .*--sampler-logprobs"), ({"kl": 0.6}, "kl 0.600: .*--kl-coef"),
                           ({"sampler_gap": 0.2}, "sampler_gap 0.200: .*precision"),
                           ({"truncated_share": 0.8}, "truncated_share 0.800: .*--max-new-tokens"),
                           ({"flat_groups": 1.0}, "flat_groups 1.000: hardly any group teaches")):
        [said] = alarms(calm | change)
        assert re.match(advice, said)
