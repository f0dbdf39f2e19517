"""The commands of README at their smallest setting, and what evaluate.py and caption.py write."""

import json
import math
import re

import pytest

from caption import CaptionConfig, caption
from data.toy.demo import DemoConfig, demo
from data.toy.export import ExportConfig, export
from evaluate import PrismConfig, format_table, run_prism, summarize

TOY = dict(verifier="data/toy/verifier", max_new_tokens=96)


def row(id: str, accuracy: float, family: str = "a", words: int = 3) -> dict:
    return {"id": id, "family": family, "accuracy": accuracy, "caption": "w " * words}


def test_summary_hand_computed():
    rows = [row("1", 1.0), row("1", 0.5), row("2", 0.0), row("2", math.nan), row("3", 0.5, "b", 9)]
    table = summarize(rows)
    # image 1: 0.75, image 2: 0.0 (an unmeasured caption is no zero), image 3: 0.5
    assert table["a"]["accuracy"] == pytest.approx(0.375) and table["b"]["accuracy"] == 0.5
    assert table["all"]["accuracy"] == pytest.approx(1.25 / 3) and table["all"]["images"] == 3
    assert table["a"]["words"] == 3 and table["all"]["words"] == pytest.approx(21 / 5)
    assert (table["b"]["low"], table["b"]["high"]) == (0.5, 0.5)
    assert "| a | 2 | 0.375 |" in format_table(table)


def test_bootstrap_interval_is_that_of_the_mean():
    rows = [row(str(i), float(i % 2)) for i in range(400)]
    table = summarize(rows)["all"]  # standard error 0.5 / 20 = 0.025
    assert table["low"] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert table["high"] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_prism_of_a_policy_and_of_its_written_captions_agree(tmp_path):
    config = PrismConfig(data="toy:heldout:6", policy="data/toy/policy", num_captions=2, out=str(tmp_path / "p.jsonl"), **TOY)
    rows = run_prism(config)
    assert len(rows) == 12 and {r["family"] for r in rows} == {"shapes", "bars", "cards"}
    for r in rows:
        assert r["accuracy"] == pytest.approx(sum(q["chosen"] == q["gold"] for q in r["questions"]) / len(r["questions"]))
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    again = run_prism(PrismConfig(data="toy:heldout:6", captions=str(tmp_path / "p.jsonl"), **TOY))
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in rows] == [r["accuracy"] for r in written]
    with pytest.raises(ValueError, match="expected a new file, found one"):
        run_prism(config)


def test_captions_from_a_file_must_cover_the_data(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "heldout-000000", "caption": "x"}\n')
    with pytest.raises(ValueError, match="found none of 1, first 'heldout-000001'"):
        run_prism(PrismConfig(data="toy:heldout:2", captions=str(path), **TOY))
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match="c.jsonl line 1: expected an object with id and caption, got"):
        run_prism(PrismConfig(data="toy:heldout:2", captions=str(path), **TOY))


def test_caption_a_folder_and_a_jsonl(tmp_path):
    export(ExportConfig(tmp_path, num=5))
    common = dict(policy="data/toy/policy", max_new_tokens=96)
    caption(CaptionConfig(str(tmp_path / "images"), str(tmp_path / "a.jsonl"), batch_size=2, **common))
    caption(CaptionConfig(str(tmp_path / "examples.jsonl"), str(tmp_path / "b.jsonl"), temperature=0, **common))
    caption(CaptionConfig(str(tmp_path / "examples.jsonl"), str(tmp_path / "c.jsonl"), temperature=0, batch_size=1, **common))
    folder, greedy, alone = ([json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in "abc")
    assert [r["id"] for r in folder] == [f"train-{i:06d}.png" for i in range(5)]
    assert [r["id"] for r in greedy] == [f"train-{i:06d}" for i in range(5)] and greedy == alone
    assert all(r["caption"] and not r["truncated"] and r["length"] > 3 for r in folder + greedy)
    with pytest.raises(ValueError, match="expected a new file, found one"):
        caption(CaptionConfig(str(tmp_path / "images"), str(tmp_path / "a.jsonl"), **common))
    (tmp_path / "images/train-000003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="train-000003.png: expected an image that Pillow can read"):
        caption(CaptionConfig(str(tmp_path / "images"), str(tmp_path / "d.jsonl"), batch_size=2, **common))
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 2  # what was done before is kept


def test_the_demos_last_line(tmp_path, capsys):
    demo(DemoConfig(num_images=3, num_steps=1, run_dir=tmp_path / "demo"))
    lines = capsys.readouterr().out.strip().splitlines()
    match = re.fullmatch(r"demo: before (\d\.\d{3}) after (\d\.\d{3}) rise (-?\d\.\d{3})", lines[-1])
    assert float(match[2]) - float(match[1]) == pytest.approx(float(match[3]), abs=0.0011)
    assert sum("before: " in line for line in lines) == 3 and any("| all |" in line for line in lines)
    demo(DemoConfig(num_images=3, num_steps=1, run_dir=tmp_path / "demo"))  # a second demo makes room for itself
