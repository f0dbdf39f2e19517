import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.jsonl import read_log
from grpo.log import LOGS, log_step
from grpo.run_dir import log_start
from tools.report.metrics import METRICS, metrics_page
from tools.tensorboard import TensorBoard
from tools.thumbnails import THUMBNAIL_SIZE, keep_thumbnail, thumbnail_file


def test_each_key_is_defined_once_and_the_docs_are_the_list():
    keys = [one.key for metrics in METRICS.values() for one in metrics]
    assert len(keys) == len(set(keys)) and LOGS == ("metrics.jsonl", "audit.jsonl", "timing.jsonl")
    assert Path("docs/metrics.md").read_text(encoding="utf-8") == metrics_page(), "its first lines say how to write it anew"
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
    assert {key for metrics in listed.values() for key in metrics} - seen == {"reward_judge"}  # test_train.py has a run with it


def test_the_console_line_shows_the_few_that_matter(tmp_path):
    (tmp_path / "rollouts").mkdir()
    rows = [{"id": "a", "caption": "two\nlines", "reward": math.nan}, {"id": "a", "caption": "other", "reward": 0.5}]
    metrics = {"reward": 0.5, "kl": 0.25, "flat_groups": math.nan, "loss": 3.0}
    assert log_step(tmp_path, 7, metrics, {}, {"seconds": 2.0, "seconds_update": 1.0}, rows) == (
        "step    7  reward 0.500  flat_groups nan  kl 0.250  seconds 2.000"
    )
    said = log_step(tmp_path, 8, metrics, {"probe_accuracy": 0.5, "split_half": 0.1, "repetition": 0.0}, {}, rows).splitlines()
    assert said[1:] == ["    audit  probe_accuracy 0.500  split_half 0.100", "    reward nan  a: 'two\\nlines'"]


def test_starts_say_what_ran_where(tiny_run, tmp_path):
    [start] = read_log(tiny_run / "starts.jsonl")
    assert start["step"] == 0 and start["ranks"] == 1 and start["versions"]["torch"] == torch.__version__
    assert start["machine"]["cores"] >= 1 and start["machine"]["memory_gib"] > 0 and start["machine"]["gpus"] == []
    log_start(tmp_path, 0, 1)
    log_start(tmp_path, 5, 2)  # resumed
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')  # killed while it wrote
    log_start(tmp_path, 7, 2)
    starts = [(start["step"], start["ranks"]) for start in read_log(tmp_path / "starts.jsonl")]
    assert starts == [(0, 1), (5, 2), (7, 2)]


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert read_log(path) == [{"step": 0}, {"step": 1}]
    cut = '{"step": 2, "rew'
    for torn in (f"{cut}\n", f"{cut}\n\n", f"{cut}\0\0", "\0" * 100, "\0\n", "\x80"):
        path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + torn.encode("latin-1"))
        assert read_log(path) == [{"step": 0}, {"step": 1}], torn
    path.write_text('{"step": 0}\n\0\0\0{"step": 1}')  # after a power cut; whole without its end
    assert read_log(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\n{"step": 1, \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2: expected a JSON object \("):
        read_log(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="metrics.jsonl line 1: expected a JSON object, got list"):
        read_log(path)


def test_thumbnails_are_small_and_made_once(tmp_path):
    opened = []

    def open_image():
        opened.append(1)
        return Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))

    for _ in range(2):
        keep_thumbnail(tmp_path, "a", open_image)
    [path] = (tmp_path / "thumbnails").iterdir()
    assert path == thumbnail_file(tmp_path, "a") and Image.open(path).size == (THUMBNAIL_SIZE, 192) and len(opened) == 1
    assert path.stat().st_size < 64_000  # noise, the worst there is


@pytest.mark.parametrize("id", ["../../etc/passwd", "/abs/olute", "a/b.png", "", "..", "雪", "x" * 5000, 'q"<&>', "\ud800"])
def test_any_id_has_a_thumbnail_of_its_own_in_the_folder(tmp_path, id):
    keep_thumbnail(tmp_path, id, lambda: Image.new("RGB", (4, 4)))
    [path] = (tmp_path / "thumbnails").iterdir()
    assert path.parent == tmp_path / "thumbnails" and path == thumbnail_file(tmp_path, id) != thumbnail_file(tmp_path, id + "_")


def test_a_run_keeps_thumbnails_of_what_it_captioned(tiny_run):
    ids = {json.loads(line)["id"] for path in tiny_run.glob("rollouts/*.jsonl") for line in path.read_text().splitlines()}
    assert {path.name for path in (tiny_run / "thumbnails").iterdir()} == {thumbnail_file(tiny_run, id).name for id in ids}


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
                assert [(one.step, one.value) for one in got] == [(row["step"], pytest.approx(row[key])) for row in rows], key
    assert [one.step for one in events.Images("image/1")] == [0, 1]
    first = json.loads((tiny_run / "rollouts/step_000000.jsonl").read_text().splitlines()[0])
    text = events.Tensors("captions/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert first["caption"].split(".")[0] in text and first["id"] in text and text.count("reward") == 4


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
    for first, value in ((0, 1.0), (1, 2.0)):  # killed after step 2 with a checkpoint after step 0
        track = TensorBoard(tmp_path, first)
        for step in range(first, 3):
            track(step, {"reward": value, "kl": math.nan, "letters": [1]}, {}, {}, [])
        track.writer.close()
    events = read_events(tmp_path / "tensorboard")
    assert [(one.step, one.value) for one in events.Scalars("metrics/reward")] == [(0, 1.0), (1, 2.0), (2, 2.0)]
    assert events.Tags()["scalars"] == ["metrics/reward"]
