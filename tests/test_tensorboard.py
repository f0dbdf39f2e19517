"""TensorBoard gets the numbers of the logs."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.jsonl import read_log
from grpo.log import LOGS
from tools.tensorboard import TensorBoard


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard_gets_the_numbers_of_the_logs_and_a_few_captions(tiny_run):
    events = read_events(tiny_run / "tensorboard")
    for name in LOGS:
        rows = read_log(tiny_run / name)
        for key in rows[0]:
            if key != "step" and all(isinstance(row[key], int | float) for row in rows):
                got = events.Scalars(f"{name.removesuffix('.jsonl')}/{key}")
                assert [(one.step, one.value) for one in got] == [
                    (row["step"], pytest.approx(row[key])) for row in rows
                ], key
    assert [one.step for one in events.Images("image/1")] == [0, 1]
    first = json.loads((tiny_run / "rollouts/step_000000.jsonl").read_text().splitlines()[0])
    text = events.Tensors("captions/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert first["caption"].split(".")[0] in text and first["id"] in text and text.count("reward") == 4


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
    for first, value in ((0, 1.0), (1, 2.0)):  # killed after step 2 with a checkpoint after step 0
        track = TensorBoard()
        track.begin(tmp_path, {}, first)
        for step in range(first, 3):
            track(step, {"metrics/reward": value}, [])
        track.finish()
    events = read_events(tmp_path / "tensorboard")
    assert [(one.step, one.value) for one in events.Scalars("metrics/reward")] == [(0, 1.0), (1, 2.0), (2, 2.0)]
    assert events.Tags()["scalars"] == ["metrics/reward"]
