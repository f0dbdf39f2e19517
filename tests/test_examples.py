# ruff: noqa: RUF001 - Chinese text has its own punctuation
"""Rows of images with questions: read, refused one by one, written down, merged by picture."""

import base64
import json
import math
import os
import random
import re
import struct
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import parquet
from data.benchmarks.benchmark import load_benchmark
from data.captions.exports import caption_rows
from data.captions.shards import plan_shards
from data.curate.__main__ import main as curate
from data.examples import Example, Question, StoredImage, load_examples
from data.export import example_row, write_examples
from data.folders import load_images
from data.images import open_image, picture_hash
from data.jsonl import read_log
from data.pictures import merge_pictures, picture_keys
from data.rows import scan_examples
from tools.inspect import InspectConfig, inspect

ROW = {"id": "a", "image": "a.png", "questions": [{"question": "What?", "choices": ["x", "y"], "answer_index": 1}]}


def write(path: Path, *rows) -> str:
    for name in ("a.png", "2.png", "x/1.png", "pictures/1.png"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).touch()
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_row_becomes_an_example(tmp_path):
    [example] = load_examples(write(tmp_path / "q.jsonl", ROW | {"family": "charts"}, ""))
    assert example.id == "a" and example.image == tmp_path / "a.png" and example.family == "charts"
    assert example.questions == (Question("What?", ("x", "y"), 1),)


def test_rows_written_are_read_back(tmp_path):
    [example] = load_examples("toy:train:1")
    [again] = load_examples(write(tmp_path / "q.jsonl", example_row(example, "pictures/1.png")))
    assert again.questions == example.questions and again.family == example.family
    assert again.image == tmp_path / "pictures/1.png"


def question(**changes) -> dict:
    return ROW | {"questions": [ROW["questions"][0], ROW["questions"][0] | changes]}


@pytest.mark.parametrize(
    "choices, want",
    [
        (["A) Beijing", "B) New York"], ("Beijing", "New York")),
        (["A. Black", "B. White", "C. 3.5"], ("Black", "White", "3.5")),
        (["(A) 北京", " (B)上海"], ("北京", "上海")),
        (["A: x", "B. y"], ("x", "y")),
        (["A man", "B) x"], ("A man", "B) x")),  # not every one is labelled
        (["Black", "White"], ("Black", "White")),
        (["A", "B"], ("A", "B")), (["(A)", "(B)"], ("(A)", "(B)")), (["(B)", "(A)"], ("(B)", "(A)")),
        (["B. Obama", "A. Lincoln"], ("B. Obama", "A. Lincoln")),  # names, not labels
        (["A.M.", "B.C."], ("A.M.", "B.C.")),
        (["A) B) x", "B) y"], ("B) x", "y")),  # once
        (["(a) red", "(b) blue"], ("red", "blue")), (["a) red", "b) blue"], ("red", "blue")),
        (["a. red", "b. blue"], ("red", "blue")), (["A.red", "B.blue"], ("red", "blue")),
        (["（A）红", "（B）蓝"], ("红", "蓝")), (["Ａ．红", "Ｂ．蓝"], ("红", "蓝")), (["A.红", "B.蓝"], ("红", "蓝")),
        (["选项A：红", "選項B、藍"], ("红", "藍")), (["A.5个", "B.16个"], ("5个", "16个")), (["A.5", "B.6"], ("A.5", "B.6")),
        (["\u200fA) red", "\ufeffB) \u200fblue"], ("red", "blue")),
        (["[A] red", "[B] blue"], ("red", "blue")),
        (["**A)** red", "**B)** blue"], ("red", "blue")),
        (["A - red", "B - blue"], ("red", "blue")), (["Option A: red", "**Option B:** blue"], ("red", "blue")),
        (["A-frame", "B-side"], ("A-frame", "B-side")), (["Option A", "Option B"], ("Option A", "Option B")),
        (["A - 1", "C - 2"], ("A - 1", "C - 2")), (["A - B", "B - C"], ("A - B", "B - C")),
        (["A、B", "B、C"], ("A、B", "B、C")), (["A、B座", "B、C座"], ("B座", "C座")),
        (["a. red", "c. blue"], ("a. red", "c. blue")), (["a man", "a dog"], ("a man", "a dog")),
    ],
)
def test_labels_are_taken_off_once(tmp_path, choices, want):
    [_, example] = load_examples(
        write(tmp_path / "q.jsonl", ROW, question(choices=choices, answer_index=0) | {"id": "b"})
    )
    assert example.questions[1].choices == want


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", r"line 2: expected a JSON object \("),
        ("[1]", "line 2: expected a JSON object, got list"),
        ({"id": "b", "questions": []}, "line 2: expected the key 'image', got"),
        (ROW | {"id": "b", "image": 3}, "line 2: expected a path in 'image', got 3"),
        (ROW | {"id": "b", "image": "no.png"}, "line 2: image .*no.png: expected a file, found nothing"),
        (ROW | {"id": "b", "questions": []}, "line 2: expected a list with at least one question"),
        (ROW | {"id": "b", "questions": "What?"}, "line 2: expected a list with at least one question"),
        (ROW | {"id": "b", "questions": ["What?"]}, "line 2: id 'b', question 0: expected question, choices and answer_index"),
        (ROW, "line 2: id 'a' was used before, on line 1"),
        (question(answer_index=2), "line 2: id 'a', question 1: answer_index 2 outside 2 choices"),
        (question(answer_index=-1), "line 2: id 'a', question 1: answer_index -1 outside 2 choices"),
        (question(answer_index="B"), "line 2: id 'a', question 1: answer_index 'B' outside 2 choices"),
        (question(answer_index=True), "line 2: id 'a', question 1: answer_index True outside 2 choices"),
        (question(choices=["x y", " x  y"]), "line 2: id 'a', question 1: expected distinct choices"),
        (question(choices=["x", ""]), "line 2: id 'a', question 1: expected non-empty text in every choice"),
        (question(choices=["x", 3]), "line 2: id 'a', question 1: expected non-empty text in every choice"),
        (question(choices=["x"]), "line 2: id 'a', question 1: expected 2 to 10 choices, got 1"),
        (question(choices=["B) x", "A) y"]), "line 2: id 'a', question 1: expected choices labelled A, B, C, ... in order"),
        (question(choices=["A) x", "B) "]), "line 2: id 'a', question 1: expected non-empty text in every choice"),
        (question(choices=["A) x", "B) x"]), "line 2: id 'a', question 1: expected distinct choices"),
        (question(choices="xy"), "line 2: id 'a', question 1: expected a list of choices, got 'xy'"),
        (question(question=" "), "line 2: id 'a', question 1: the question text is empty"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path, row, message):
    path = write(tmp_path / "q.jsonl", ROW, row)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_a_whole_place_may_be_a_float(tmp_path):
    """pandas makes 1 to 1.0 in a column with gaps, and a benchmark's table holds text."""
    rows = [question(answer_index=place) | {"id": str(place)} for place in (1, 1.0)]
    assert [one.questions[1].answer_index for one in load_examples(write(tmp_path / "q.jsonl", *rows))] == [1, 1]
    for place in (0.5, math.nan, math.inf):  # NaN is none
        with pytest.raises(ValueError, match="line 1: .*(answer_index .* outside 2 choices|letter or text, got None)"):
            load_examples(write(tmp_path / "q.jsonl", question(answer_index=place)))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl: expected a file or a folder of files with questions"):
        load_examples(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match=r"expected \*.parquet or \*.jsonl in the folder, found none"):
        load_examples(str(tmp_path))
    with pytest.raises(ValueError, match="expected at least one row, found none"):
        load_examples(write(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match="expected toy:train:NUM or toy:heldout:NUM"):
        load_examples("toy:test:5")


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl line 1: expected a JSON object \\('utf-8' codec"):
        load_examples(str(tmp_path / "latin.jsonl"))


def test_lists_beside_pictures_are_counted_aloud(tmp_path, capsys):
    """A folder's pictures go before its lists, which were left out in silence."""
    for name in ("IMG_1.JPG", "a.jfif", "list.jsonl"):
        (tmp_path / name).touch()
    assert load_images(tmp_path) == [(name, tmp_path / name) for name in ("IMG_1.JPG", "a.jfif")]
    assert capsys.readouterr().err == f"{tmp_path}: left out: 1 .jsonl\n"


def test_load_images(tmp_path):
    path = write(tmp_path / "i.jsonl", {"image": "x/1.png"}, {"id": 7, "image": "2.png"}, {"image_path": "a.png"},
                 {"images": ["2.png"]})
    assert load_images(Path(path)) == [
        ("x/1.png", tmp_path / "x/1.png"), ("7", tmp_path / "2.png"), ("a.png", tmp_path / "a.png"),
        ("line 4", tmp_path / "2.png")]
    with Path(path).open("a") as file:
        file.write("{")
    with pytest.raises(ValueError, match="i.jsonl line 5: expected a JSON object"):
        load_images(Path(path))
    with pytest.raises(ValueError, match="line 1: image .*3.png: expected a file, found nothing"):
        load_images(Path(write(tmp_path / "j.jsonl", {"image": "3.png"})))
    with pytest.raises(ValueError, match="line 1: expected a path in 'image', got None"):
        load_images(Path(write(tmp_path / "j.jsonl", {"id": "a"})))


# ---------------------------------------------------------------------------------- published files

ENTRY = pa.struct({"question": pa.string(), "choices": pa.list_(pa.string()), "answer": pa.string()})
CAPRL = pa.schema({
    "id": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), "data_source": pa.string(),
    "reward_model": pa.struct({"ground_truth": pa.list_(ENTRY)}),
})
CAPTIONQA = pa.schema({
    "id": pa.string(), "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    "questions": pa.list_(pa.struct({**{field.name: field.type for field in ENTRY}, "category": pa.list_(pa.string())})),
    "domain": pa.string(), "image_paths": pa.list_(pa.string()),
})


def png(width: int = 8, height: int = 6, color: str = "red") -> bytes:
    Image.new("RGB", (width, height), color).save(into := BytesIO(), "PNG")
    return into.getvalue()


def caprl(id: str, **changes) -> dict:
    """A row of CapRL-QA-75K. A change to a key of the question is made to its first and only question."""
    entry = {"question": "Color?", "choices": ["A) red", "B) blue"], "answer": "B"}
    entry |= {key: changes.pop(key) for key in list(changes) if key in entry}
    prompt = [{"role": "user", "content": "<image> Please describe this image in detail."}]
    return {"id": id, "image": {"bytes": png(), "path": f"{id}.png"}, "prompt": prompt, "data_source": "x",
            "reward_model": {"ground_truth": [entry]}} | changes


def captionqa(id: str, **changes) -> dict:
    entry = {"question": "Color?", "choices": ["red", "blue"], "answer": "blue", "category": ["look", "color"]}
    entry |= {key: changes.pop(key) for key in list(changes) if key in entry}
    return {"id": id, "images": [{"bytes": png(), "path": None}], "questions": [entry], "domain": "natural"} | changes


def own(id: str, **changes) -> dict:
    return ROW | {"id": id} | changes


BLOCKS = """Here are the questions:

#### 1. **What color is the car?**
   - A) red
   - B) blue
**Answer:** B) blue
------
"""


def raw(id: str, **changes) -> dict:
    return {"id": id, "image_path": "a.png", "qa_response": BLOCKS} | changes


def write_parquet(path: Path, rows: list[dict], schema: pa.Schema = CAPRL, row_group_size: int = 2) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)
    return str(path)


def write_set(folder: Path, rows: list, name: str = "set") -> str:
    """Rows of any one format, in a file whose name tells nothing."""
    Image.new("RGB", (8, 6)).save(folder / "a.png")
    first = rows[0]
    if "reward_model" in first or "images" in first:
        return write_parquet(folder / name, rows, CAPRL if "reward_model" in first else CAPTIONQA)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / name)


def test_a_table_of_something_else_is_refused_by_its_columns(tmp_path):
    pq.write_table(pa.table({"price": [1], "weight": [2]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: expected columns like id, image, .* got \['price', 'weight'\]"):
        load_examples(str(tmp_path / "x.parquet"))


def test_the_published_parquet_is_read_with_nulls_labels_and_chinese(tmp_path):
    entries = [
        {"question": "图中有几只猫？", "choices": ["A) 一只", "B) 两只", "C) 三只"], "answer": "B"},
        {"question": "Color?", "choices": ["A. Black", "B. White"], "answer": "A"},
        {"question": "Which?", "choices": ["left", "right"], "answer": "B"},
        {"question": "谁？", "choices": ["A、甲", "B、乙"], "answer": "A、甲"},
    ]
    rows = [
        caprl("cat", reward_model={"ground_truth": entries}, data_source=None, prompt=None),
        caprl("none", reward_model=None),
        caprl("dog", image={"bytes": png(color="blue"), "path": None}),
    ]
    examples, refused = scan_examples(write_parquet(tmp_path / "x.bin", rows))
    assert [example.id for example in examples] == ["cat", "dog"]
    assert [(q.question, q.choices[q.answer_index]) for q in examples[0].questions] == [
        ("图中有几只猫？", "两只"), ("Color?", "Black"), ("Which?", "right"), ("谁？", "甲")
    ]
    assert examples[0].questions[0].choices == ("一只", "两只", "三只")
    assert open_image(examples[1].image).getpixel((0, 0)) == (0, 0, 255)
    assert len(refused) == 1 and "x.bin row 1: expected a list with at least one question" in refused[0]


def test_captionqa_is_read_as_training_data(tmp_path):
    [example] = load_examples(write_set(tmp_path, [captionqa("n1")]))
    assert example.family == "natural" and example.questions == (Question("Color?", ("red", "blue"), 1, "look/color"),)
    assert open_image(example.image).size == (8, 6)


def test_a_parquet_file_keeps_the_families_and_forms_that_jsonl_has(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    asked = [{"question": "Color?", "choices": ["red", "blue"], "answer_index": 1}]
    rows = [{"id": "a", "image": png(), "questions": asked, "family": "bars"}, raw("b")]
    for row in rows:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{row['id']}.parquet")
    first, second = load_examples(str(tmp_path))
    assert first.family == "bars" and second.image == tmp_path / "a.png" and len(second.questions) == 1


def test_generator_output_is_read_and_its_bad_blocks_are_refused_one_by_one(tmp_path):
    bad = "#### 2. **Which?**\n - A) x\n - B) y\n**Answer:** B) x\n"
    examples, refused = scan_examples(write_set(tmp_path, [raw("a", qa_response=BLOCKS + bad)]))
    assert examples[0].questions == (Question("What color is the car?", ("red", "blue"), 1),)
    assert len(refused) == 1
    assert "line 1: id 'a', question 1: answer is none of the options, or its letter" in refused[0]


def test_a_folder_is_read_file_by_file_and_ids_are_unique_in_all_of_it(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    write_parquet(tmp_path / "set/data/train-0.parquet", [caprl("a"), caprl("b")])
    write_set(tmp_path / "set", [own("c"), own("a")], "more.jsonl")
    examples, refused = scan_examples(str(tmp_path / "set"))
    assert [example.id for example in examples] == ["a", "b", "c"]
    [sentence] = refused
    assert sentence.endswith("more.jsonl line 2: id 'a' was used before, on row 0 of data/train-0.parquet")


def test_pictures_are_listed_from_a_folder_of_parquet_files_too(tmp_path):
    (tmp_path / "set").mkdir()
    for number, id in enumerate("ab"):
        write_parquet(tmp_path / f"set/train-{number}.parquet", [caprl(id, reward_model=None)])
    found = load_images(tmp_path / "set")
    assert [id for id, _ in found] == ["a", "b"] and open_image(found[1][1]).size == (8, 6)
    write_parquet(tmp_path / "set/train-2.parquet", [caprl("c", image=None)])
    with pytest.raises(ValueError, match="train-2.parquet row 0: expected a picture in 'image', got None"):
        load_images(tmp_path / "set")


def test_whole_numbers_that_pandas_made_floats_are_ids(tmp_path):
    """It does where one is missing. Refused in a row, the whole row group had no captions."""
    table = pa.table({"id": pa.array([None, 1.0, 2.0, 3.0], pa.float64()), "image": [png()] * 4})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    images = [image for shard in plan_shards(tmp_path / "x.parquet", 8) for image in shard.images()]
    assert [id for id, _, _ in images] == ["x:0", "1.0", "2.0", "3.0"]
    assert all(open_image(image) for _, _, image in images)


@pytest.mark.parametrize("id", [b"x", True, [1]])
def test_an_id_that_is_no_text_or_number_is_refused_wherever_rows_are_read(tmp_path, id):
    """It became Python's text for it; bytes became an address in memory, another one in each run."""
    rows = [own(id, image=png(), question="Color?", answer="red")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = "StoredImage(name='{}/x.parquet row 0')" if isinstance(id, bytes) else str(id)
    refusal = re.escape(f"x.parquet row 0: expected a text or a number in 'id', got {found.format(tmp_path)}")
    for read in (load_images, lambda path: load_examples(str(path)), lambda path: load_benchmark(f"exact:{path}")):
        with pytest.raises(ValueError, match=refusal):
            read(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet: expected text or numbers in the column 'id', found [blb]"):
        plan_shards(tmp_path / "x.parquet", 8)
    if isinstance(id, bytes):
        return
    path = Path(write(tmp_path / "x.jsonl", rows[0] | {"image": "a.png", "caption": "Red."}))
    (tmp_path / "a.png").write_bytes(png())
    for read in (load_images, lambda path: load_examples(str(path)), lambda path: load_benchmark(f"exact:{path}"),
                 lambda path: plan_shards(path, 8)):
        with pytest.raises(ValueError, match=re.escape(f"x.jsonl line 1: expected a text or a number in 'id', got {id}")):
            read(path)
    with pytest.raises(ValueError, match="x.jsonl line 1: expected an object with id and caption, got"):
        list(caption_rows(path))


def test_row_groups_read_last_are_kept_as_far_as_there_is_room(tmp_path, monkeypatch):
    pictures = [letter * 100 for letter in (b"a", b"b", b"c")]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "x.parquet", row_group_size=1)
    groups = parquet._Groups()
    monkeypatch.setattr(parquet, "_groups", groups)
    stored = [row["image"] for _, row in parquet.parquet_rows(tmp_path / "x.parquet")]
    for room, order, kept in ((250, [0, 1, 0, 2], [0, 2]), (1, [1], [1])):  # the one in use is kept however large
        monkeypatch.setattr(parquet, "CACHE_BYTES", room)
        assert [stored[n].read() for n in order] == [pictures[n] for n in order]
        assert [group for _, group, _ in groups.kept] == kept


def test_bytes_that_lie_deeper_than_a_picture_does_are_told_in_a_sentence(tmp_path):
    """Two shapes ended in a KeyError or a TypeError."""
    shapes = [{"data": {"bytes": png(), "path": None}}, {"bytes": [png()]}, {"picture": png(), "path": ""}]
    for shape in shapes:
        pq.write_table(pa.Table.from_pylist([caprl("a") | {"image": shape}]), tmp_path / "x.parquet")
        parquet._open.cache_clear()
        parquet._groups.kept.clear()
        [example] = load_examples(str(tmp_path / "x.parquet"))
        with pytest.raises(ValueError, match=r"x.parquet row 0: expected the bytes .* in 'image' itself, found .* image\.\w+"):
            open_image(example.image)


def test_a_picture_may_be_written_in_base64(tmp_path):
    text = base64.b64encode(png(color="blue")).decode()
    rows = [own("a"), own("b", image=text), own("c", image=f"data:image/png;base64,{text}")]
    examples = load_examples(write_set(tmp_path, rows))
    assert [open_image(example.image).getpixel((0, 0)) for example in examples] == [(0, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert load_images(tmp_path / "set")[1][0] == "b" and open_image(load_images(tmp_path / "set")[1][1]).size == (8, 6)


def test_a_path_that_looks_like_base64_is_a_path_and_half_a_surrogate_is_no_text(tmp_path):
    (tmp_path / "images").mkdir()
    name = "images/" + "0123456789abcdef" * 4
    (tmp_path / name).write_bytes(png())
    (example,) = load_examples(write(tmp_path / "set.jsonl", own("a", image=name)))
    assert example.image == tmp_path / name
    with pytest.raises(ValueError, match="expected text in question and choices, got half a surrogate pair"):
        Question("\ud83d?", ("a", "b"), 0)


def bomb() -> bytes:
    """A PNG's head that promises 12,000 x 12,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\4IDATmore"


def picture(data: bytes | None) -> dict:
    return {"image": {"bytes": data, "path": "x.png"}}


BROKEN = [  # (a good row's maker, what is wrong with it, what is said)
    (caprl, dict(id=None), "expected a text or a number in 'id', got None"),
    (caprl, dict(id=""), "expected a text or a number in 'id', got ''"),
    (own, dict(id=math.nan), "expected a text or a number in 'id', got None"),
    (own, dict(family=["charts"]), "expected a text or a number in 'family', got ['charts']"),
    (own, dict(family=math.nan, domain=["charts"]), "expected a text or a number in 'domain', got ['charts']"),
    (caprl, dict(id="first"), "id 'first' was used before, on row 0"),
    (caprl, dict(image=None), "expected a picture in 'image', got None"),
    (caprl, picture(None), "expected a picture in 'image', got None"),
    (caprl, picture(b""), "an image that Pillow can read"),
    (caprl, picture(b"no picture"), "an image that Pillow can read"),
    (caprl, picture(png()[:20]), "an image that Pillow can read"),
    (caprl, picture(png(99, 99)[:-30]), "an image that Pillow can read"),
    (caprl, picture(bomb()), "expected at most 100000000 pixels, got 12000 x 12000"),
    (caprl, picture(png(402, 2)), "expected sides of at most 200 to 1, got 402 x 2"),
    (caprl, dict(reward_model=None), "at least one question in 'reward_model.ground_truth', got None"),
    (caprl, dict(reward_model={"ground_truth": None}), "at least one question in 'reward_model.ground_truth', got None"),
    (caprl, dict(reward_model={"ground_truth": []}), "at least one question in 'reward_model.ground_truth', got []"),
    (caprl, dict(reward_model={"ground_truth": [None]}), "expected question, choices and answer_index or answer, got None"),
    (caprl, dict(question=None), "expected text in 'question', got None"),
    (caprl, dict(question=" "), "the question text is empty"),
    (caprl, dict(choices=None), "expected a list of choices, got None"),
    (caprl, dict(choices=[]), "expected 2 to 10 choices, got 0"),
    (caprl, dict(choices=["A) red"]), "expected 2 to 10 choices, got 1"),
    (caprl, dict(choices=[f"choice {i}" for i in range(11)]), "expected 2 to 10 choices, got 11"),
    (caprl, dict(choices=["red", None]), "expected non-empty text in every choice"),
    (caprl, dict(choices=["A) red", "B) "]), "expected non-empty text in every choice"),
    (caprl, dict(choices=["A) caf\u00e9", "B) cafe\u0301"]), "expected distinct choices"),
    (caprl, dict(choices=["B) red", "A) blue"]), "expected choices labelled A, B, C, ... in order"),
    (caprl, dict(answer=None), "expected the answer's letter or text, got None"),
    (caprl, dict(answer=""), "expected the answer's letter or text, got ''"),
    (caprl, dict(answer="E"), "expected a letter of the 2 choices as the answer, got 'E'"),
    (caprl, dict(answer="green"), "expected an answer among the choices ['red', 'blue'], got 'green'"),
    (caprl, dict(answer="B) red"), "letter and text of the answer disagree: 'B) red', where B is 'blue'"),
    (captionqa, dict(images=[]), "expected one image in 'images', got 0"),
    (captionqa, dict(images=2 * [{"bytes": png(), "path": None}]), "expected one image in 'images', got 2"),
    (captionqa, dict(answer="green"), "expected an answer among the choices"),
    (captionqa, dict(choices=["B", "A"], answer="A"), "letter and text of the answer disagree"),
    (captionqa, dict(questions=None), "at least one question in 'questions', got None"),
    (own, b"{", "expected a JSON object ("),
    (own, b"[1]", "expected a JSON object, got list"),
    (own, b'{"id": "\xe9"}', "expected a JSON object ('utf-8' codec"),
    (own, b"[" * 100_000, "expected a JSON object (maximum recursion depth"),
    (own, dict(image="../a.png"), "image '../a.png': expected a path below"),
    (own, dict(image="x/../../a.png"), "image 'x/../../a.png': expected a path below"),
    (own, dict(image="/etc/hostname"), "image '/etc/hostname': expected a path below"),
    (own, dict(image="none.png"), "none.png: expected a file, found nothing"),
    (own, dict(image="a\0.png"), "expected a path below"),
    (own, dict(image="x" * 5000 + ".png"), "expected a file, found nothing"),
    (own, dict(image="ab" * 200 + "/a.png"), "expected a file, found nothing"),
    (own, dict(image="ab" * 200), "an image that Pillow can read"),
    (own, dict(image="ab" * 50), "an image that Pillow can read"),
    (own, dict(image="data:image/png;base64,%%%"), "expected a picture in base64"),
    (own, dict(id=None), "expected a text or a number in 'id', got None"),
    (own, dict(questions={"question": "What?"}), "expected a list with at least one question"),
    (own, dict(questions=[ROW["questions"][0] | {"answer_index": 2}]), "answer_index 2 outside 2 choices"),
    (own, dict(questions=[ROW["questions"][0] | {"answer": "x"}]), "one choice in answer_index and answer, got 1 and 'x'"),
    (own, dict(questions=[ROW["questions"][0] | {"answer": "A"}]), "one choice in answer_index and answer, got 1 and 'A'"),
    (own, dict(questions=[ROW["questions"][0] | {"answer": "Z nonsense"}]), "expected an answer among the choices ['x', 'y']"),
    (raw, dict(qa_response=None), "expected text in 'qa_response', got None"),
    (raw, dict(qa_response="I cannot see it."), "expected a sound question, found none"),
    (raw, dict(qa_response=BLOCKS.replace("B) blue\n**", "C) blue\n**")), "options not lettered A, B, C, ... in order"),
    (raw, dict(image_path=None), "expected a path in 'image', got None"),
    (raw, dict(image_path="../a.png"), "expected a path below"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make, broken, message", BROKEN)
def test_what_is_broken_is_refused_with_file_row_and_reason_while_the_rest_goes_on(tmp_path, make, broken, message):
    row = broken if isinstance(broken, bytes) else make(**{"id": "broken"} | broken)
    source = write_set(tmp_path, [make("first"), row, make("last")])
    counts = inspect(InspectConfig(source, decode=True))
    head, *listed = read_log(Path(source + ".manifest.jsonl"))
    assert counts["images"] == 2 and counts["rows"] == 3 and counts["refused rows"] == 1
    assert head["images"] == 2 and listed
    assert all(
        one["file"] == "set" and one["row"] == ("row 1" if make in (caprl, captionqa) else "line 2")
        for one in listed
    )
    assert message in listed[0]["reason"] and "row 1" not in listed[0]["reason"] and "\n" not in listed[0]["reason"]
    assert [example.id for example in load_examples(source)] == ["first", "last"]


HUB = "; data sets are not downloaded here: `hf download internlm/CapRL-QA-75K --repo-type dataset --local-dir CapRL-QA-75K`"


@pytest.mark.parametrize("source, message", [
    ("internlm/CapRL-QA-75K", HUB), ("hf://datasets/internlm/CapRL-QA-75K", HUB), ("CapRL-QA-75K", HUB),
    ("https://huggingface.co/datasets/internlm/CapRL-QA-75K/tree/main", HUB),
    ("set/quesitons.jsonl", "/set has 'questions.jsonl'"), ("Set/photo.jsonl", "has 'set'"),
    ("~/set", "the shell did not replace ~"), ("other/set/qa.jsonl", " has no 'other'"),
    ("set/qa", "expected a file or a folder of files with questions, found nothing"),  # a folder's, not the hub's
])
def test_a_path_that_is_not_there_is_answered_with_the_next_step(source, message, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/questions.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_examples(source)
    assert str(error.value).startswith(f"{source}: expected a file") and message in str(error.value)
    assert ("hf download" in str(error.value)) == (message == HUB)


def test_a_set_of_the_hub_that_is_there_already_is_pointed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("CapRL-QA-75K").mkdir()
    with pytest.raises(ValueError, match="found nothing; the folder CapRL-QA-75K is there: give that$"):
        load_examples("internlm/CapRL-QA-75K")


def test_what_is_neither_file_nor_folder_is_said():
    """A pipe of the shell, `<(zcat q.jsonl.gz)`, is such a path."""
    with pytest.raises(ValueError, match="^/dev/null: expected a file or a folder .*, found neither file nor folder$"):
        load_examples("/dev/null")


CHAT = {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Red."}]}
OPENAI = {"messages": [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "Red."}]}
CAPTION = {"id": "a", "image": "a.png", "caption": "Red."}
OWN = {"id": "a", "image": "a.png", "questions": [{"question": "What?", "choices": ["x", "y"], "answer_index": 0}]}
LIST = "in a list or over several lines"
WRITE = "training needs multiple-choice questions on each image, docs/data.md says how they are written"


@pytest.mark.parametrize("name, text, message", [
    ("q.jsonl", json.dumps(CHAT), f"got a chat (LLaVA, ShareGPT) without questions, ['conversations', 'id', 'image']; {WRITE}"),
    ("q.jsonl", json.dumps(OPENAI), f"got a chat (OpenAI) without questions, ['messages']; {WRITE}"),
    ("q.jsonl", json.dumps(CAPTION), f"got a caption without questions, ['caption', 'id', 'image']; {WRITE}"),
    ("q.jsonl", json.dumps(CAPTION | {"image": "x" * 70_000}) + "\n", "line 1: expected the key 'questions', got a caption"),
    ("q.json", json.dumps([CHAT]), f"found JSON of a chat (LLaVA, ShareGPT) {LIST}; {WRITE}"),
    ("q.json", json.dumps([CHAT], indent=1), f"found JSON of a chat (LLaVA, ShareGPT) {LIST}; {WRITE}"),
    ("set/q.json", json.dumps([CAPTION]), f"q.json: expected parquet or JSONL with questions, found JSON of a caption {LIST}"),
    ("q.json", json.dumps(OWN, indent=1), f"found JSON {LIST}; one object a line: `jq -c '.[]'"),
    ("set/a.JPG", "x", f"found 1 pictures and no questions; {WRITE}"),
    ("set/a.mp4", "x", f"found 1 .mp4; {WRITE}"),
    ("a.jpg", "x", f"found a picture; {WRITE}"),
    ("q.tsv", "index\timage\n0\tx", "found a .tsv file; docs/formats.md says what is read"),
])
def test_a_set_without_questions_is_called_what_it_is(name, text, message, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        load_examples(str(tmp_path / name.split("/")[0]))
    assert message in str(error.value) and "data.examples" not in str(error.value)


def test_captions_in_parquet_are_named_though_only_some_columns_are_read(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "image": [b"x"], "caption": ["Red."]}), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"row 0: .*got a caption without questions, \['caption', 'id', 'image'\]"):
        load_examples(str(tmp_path / "q.parquet"))


def test_a_manifest_is_advised_only_where_a_row_is_sound(tmp_path):
    """Listing all rows leaves nothing to train on."""
    source = write_set(tmp_path, [caprl("b", answer="E")])
    with pytest.raises(ValueError, match=r"expected a letter .* \(1 of 2, and no row can be used\)$"):
        load_examples(source)


def test_a_run_leaves_out_only_what_is_written_down(tmp_path):
    source = write_set(tmp_path, [caprl("a"), caprl("b", answer="E"), caprl("c", answer="F")])
    with pytest.raises(ValueError, match=r"set row 1: id 'b', question 0: expected a letter .*1 of 4; `python -m data"):
        load_examples(source)
    inspect(InspectConfig(source))
    assert [example.id for example in load_examples(source)] == ["a"]
    assert scan_examples(source)[1] == []
    write_set(tmp_path, [caprl("a"), caprl("b"), caprl("longer", answer="F")])
    with pytest.raises(ValueError, match="expected a manifest of the files as they are, found another size of set"):
        load_examples(source)


def test_a_manifest_that_was_edited_lists_what_it_still_says(tmp_path):
    source = write_set(tmp_path, [raw("x"), raw("y", image_path="none.png")])
    inspect(InspectConfig(source))
    manifest = Path(f"{source}.manifest.jsonl")
    head, row = map(json.loads, manifest.read_text().splitlines())
    manifest.write_text(json.dumps(head) + "\n" + json.dumps({"reason": row["reason"]}) + "\n")
    with pytest.raises(ValueError, match="none.png"):  # not listed any more
        load_examples(source)
    manifest.write_text(json.dumps(head | {"files": ["set"]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="expected a manifest of the files as they are"):
        load_examples(source)


def test_one_bad_question_does_not_cost_the_others(tmp_path):
    entries = [{"question": "Color?", "choices": ["red", "blue"], "answer": letter} for letter in "AXB"]
    source = write_set(tmp_path, [caprl("a", reward_model={"ground_truth": entries})])
    counts = inspect(InspectConfig(source))
    assert counts == {"rows": 1, "images": 1, "questions": 2, "refused rows": 0, "refused questions": 1}
    assert [q.answer_index for q in load_examples(source)[0].questions] == [0, 1]


def test_any_set_becomes_one_of_ours(tmp_path):
    source = write_set(tmp_path, [caprl("a/1"), caprl("a_1", image={"bytes": png(color="blue"), "path": None})])
    inspect(InspectConfig(source, out=str(tmp_path / "out")))
    ours, published = load_examples(str(tmp_path / "out/examples.jsonl")), load_examples(source)
    assert [(e.id, e.questions) for e in ours] == [(e.id, e.questions) for e in published]
    assert [open_image(e.image).getpixel((0, 0)) for e in ours] == [(255, 0, 0), (0, 0, 255)]
    (tmp_path / "qa").mkdir()
    write_set(tmp_path / "qa", [raw("x"), raw("y", image_path=str(tmp_path / "a.png"))])
    with pytest.raises(ValueError, match="expected a path below"):
        load_examples(str(tmp_path / "qa/set"))
    inspect(InspectConfig(str(tmp_path / "qa/set"), image_root=str(tmp_path), out=str(tmp_path / "qa/out")))
    assert [e.id for e in load_examples(str(tmp_path / "qa/out/examples.jsonl"))] == ["x", "y"]


def test_a_set_is_not_written_over_the_one_it_is_made_from(tmp_path):
    write_set(tmp_path, [caprl("a")])
    inspect(InspectConfig(str(tmp_path / "set"), out=str(tmp_path / "out")))
    before = (tmp_path / "out/examples.jsonl").read_bytes()
    for source in (tmp_path / "out/examples.jsonl", tmp_path / "out", tmp_path):
        with pytest.raises(ValueError, match=r"out: expected a folder that is no part of .*, which is read; take another"):
            inspect(InspectConfig(str(source), out=str(tmp_path / "out")))
        with pytest.raises(ValueError, match="out: expected a folder that is no part of"):
            curate(["filter", "--data", str(source), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/examples.jsonl").read_bytes() == before
    inspect(InspectConfig(str(tmp_path / "set"), out=str(tmp_path / "out")))  # again, that is no harm


def test_where_no_picture_can_be_read_the_set_and_the_manifest_of_before_stay(tmp_path):
    source, out = write_set(tmp_path, [raw("x"), raw("y", image_path="none.png")]), tmp_path / "out"
    inspect(InspectConfig(source, out=str(out)))
    written = [out / "examples.jsonl", Path(f"{source}.manifest.jsonl")]
    before = [path.read_bytes() for path in written]
    (tmp_path / "a.png").rename(tmp_path / "away.png")
    for folder in ("", str(out)):
        with pytest.raises(ValueError, match=r"line 1: .*a.png: expected a file, found nothing \(1 of 2, and no row can be"):
            inspect(InspectConfig(source, out=folder))
    assert [path.read_bytes() for path in written] == before
    with pytest.raises(ValueError, match="empty.parquet: expected at least one image with questions, found none"):
        inspect(InspectConfig(write_parquet(tmp_path / "empty.parquet", [])))


def test_a_picture_that_has_changed_is_written_again(tmp_path):
    for color in ("red", "blue"):
        Image.new("RGB", (28, 28), color).save(tmp_path / f"{color}.png")
    names = set()
    for color in ("red", "blue"):
        source = write_set(tmp_path, [raw("linked", image_path=str(tmp_path / f"{color}.png"))])
        inspect(InspectConfig(source, image_root=str(tmp_path), out=str(tmp_path / "out")))
        [example] = load_examples(str(tmp_path / "out/examples.jsonl"))
        assert open_image(example.image).getpixel((0, 0)) == ((255, 0, 0) if color == "red" else (0, 0, 255))
        inside = write_set(tmp_path, [caprl("a", image={"bytes": png(color=color), "path": None})], f"inside {color}")
        inspect(InspectConfig(inside, out=str(tmp_path / "copied")))
        [example] = load_examples(str(tmp_path / "copied/examples.jsonl"))
        assert open_image(example.image).getpixel((0, 0)) == ((255, 0, 0) if color == "red" else (0, 0, 255))
        names.add(example.image.name)
    assert len(names) == 1


def test_names_of_pictures_differ_where_ids_do(tmp_path, monkeypatch):
    """Two long paths, the first 60 characters and 8 digits of the hash alike: by a stand-in for the hash."""
    monkeypatch.setattr("data.export.text_hash", lambda id: f"01234567{id[-7:-4]}")
    ids = ["/a/long/path" * 8 + end for end in ("/one.jpg", "/two.jpg")]
    pictures = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    questions = (Question("What color?", ("red", "blue"), 0),)
    write_examples(tmp_path, [Example(id, picture, questions) for id, picture in zip(ids, pictures)])
    shown = [open_image(example.image).getpixel((0, 0)) for example in load_examples(str(tmp_path / "examples.jsonl"))]
    assert shown == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("id", ["漢" * 99, "\U00020bb7" * 99, "ก" * 99, "../" * 99, "../../x", "a/b", "-rf", "x\0y", "."])
def test_any_id_makes_a_name_that_a_disk_takes(tmp_path, monkeypatch, id):
    """60 Chinese characters are 180 bytes, and a file being written is also named after its host."""
    monkeypatch.setattr("platform.node", lambda: "worker-0." * 7)
    write_examples(tmp_path, [Example(id, Image.new("RGB", (9, 9)), (Question("What color?", ("red", "blue"), 0),))])
    [example] = load_examples(str(tmp_path / "examples.jsonl"))
    assert example.id == id and open_image(example.image).size == (9, 9)


def test_pictures_are_copied_where_there_are_no_links(tmp_path, no_links):
    (tmp_path / "a.png").write_bytes(png(color="red"))
    example = Example("a", tmp_path / "a.png", (Question("What color?", ("red", "blue"), 0),))
    times = set()
    for _ in range(2):
        write_examples(tmp_path / "set", [example])
        [copy] = load_examples(str(tmp_path / "set/examples.jsonl"))
        assert not copy.image.is_symlink() and copy.image.read_bytes() == example.image.read_bytes()
        times.add(copy.image.stat().st_mtime_ns)
    assert len(times) == 1  # it is not written again


def test_pictures_of_a_parquet_file_are_read_in_any_order_from_a_bounded_cache(tmp_path, monkeypatch):
    colors = [(i, 255 - i, 7) for i in range(60)]
    rows = [caprl(str(i), image={"bytes": png(color=color), "path": None}) for i, color in enumerate(colors)]
    examples = load_examples(write_parquet(tmp_path / "x.parquet", rows, row_group_size=10))
    group = sum(len(row["image"]["bytes"]) for row in rows[:10])
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * group)
    order = random.Random(0).sample(range(60), 60)
    for i in order:
        assert open_image(examples[i].image).getpixel((0, 0)) == colors[i]
        assert sum(column.nbytes for column in parquet._groups.kept.values()) <= 3 * group
    assert 1 <= len(parquet._groups.kept) <= 3


ASKED = ROW["questions"][0]


@pytest.mark.parametrize(
    "row",
    [
        own("x", image_path=None, images=None), own("x", image=None, image_path="a.png"),
        own("x", qa_response=None, reward_model=None), own("x", family=None, domain=None),
        own("x", family=math.nan, domain=math.nan), own("x", image=math.nan, image_path="a.png"),
        own("x", questions=[ASKED | {"answer": math.nan, "kind": math.nan}]),
        own("x", questions=[ASKED | {"answer": None, "kind": None, "needs_image": None}]),
        own("x", questions=[ASKED | {"answer_index": None, "answer": "y"}]),
        raw("x", qa_response=BLOCKS, questions=None, family=None, image=None),
        raw(None), raw(None, image=None),
        own("x", questions=None, reward_model={"ground_truth": [ASKED]}),
    ],
)  # fmt: skip
def test_null_is_absent(tmp_path, row):
    [_, example] = load_examples(write_set(tmp_path, [own("first"), json.dumps(row).encode()]))
    assert example.id == (row["id"] or "a.png") and example.family == "all"
    assert example.image == tmp_path / "a.png"
    assert example.questions[0].answer_index == 1 and example.questions[0].needs_image is True
    assert example.questions[0].kind != "nan"


@pytest.mark.parametrize("answer", ["y", "B", "B) y", ""])
def test_answer_index_and_answer_may_both_be_there(tmp_path, answer):
    [example] = load_examples(write_set(tmp_path, [own("x", questions=[ASKED | {"answer": answer}])]))
    assert example.questions[0].answer_index == 1


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    """Two files with one, put together, have it in the middle too."""
    path = Path(write(tmp_path / "q.jsonl", *("\ufeff" + json.dumps(own(id)) for id in "ab")))
    assert path.read_bytes().startswith(b"\xef\xbb\xbf{")
    assert [example.id for example in load_examples(str(path))] == ["a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        own("s\ud83d"), own("s", family="f\ud83d"), own("s", image="\udc00.png"), own("s", **{"more\ud83d": 1}),
        own("s", questions=[ASKED | {"kind": "\ud83d"}]), own("s", questions=[ASKED | {"question": "\uDFFF?"}]),
        own("s", questions=[ASKED | {"choices": ["x", "y\ud83d"]}]), raw("s", qa_response=BLOCKS + "\ud83d"),
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_anywhere_refuses_its_row_alone(tmp_path, row):
    """In id, family or kind it ended a run at the step where the row's turn came."""
    whole = own("b", family="\U0001f600")  # both halves, as JSON escapes it
    examples, refused = scan_examples(write_set(tmp_path, [own("a"), row, whole]))
    assert [example.id for example in examples] == ["a", "b"] and examples[1].family == "\U0001f600"
    assert len(refused) == 1
    assert refused[0].endswith("set line 2: expected text in the row, got half a surrogate pair")


# -------------------------------------------------------------------------------- what a picture is


def test_a_picture_is_its_bytes_and_only_what_may_be_equal_is_read(tmp_path, monkeypatch):
    """Paths, links and copies; in parquet; unequal files of one size are two pictures; no file of
    its own size is opened."""
    for name, content in (("a", b"one"), ("copy", b"one"), ("other", b"two"), ("long", b"three"), ("gone", b"gone!!")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("a")
    os.link(tmp_path / "long", tmp_path / "again")
    read = []
    monkeypatch.setattr("data.pictures.picture_hash", lambda image: read.append(image) or picture_hash(image))

    def groups(images) -> list[int]:
        keys = picture_keys(images)
        return [keys.index(key) for key in keys]

    files = [tmp_path / name for name in ("a", "long", "copy", "other", "link", "again", "a", "long", "none")]
    files[-1].write_bytes(b"unread")
    assert groups(files) == [0, 1, 0, 3, 0, 1, 0, 1, 8]
    assert len(read) == 3
    assert {path.name for path in read} <= {"a", "link", "copy", "other"}  # each file once, by any name
    assert groups(files[:2] + files[5:8]) == [0, 1, 1, 0, 1] and len(read) == 3  # nothing more was opened
    parquet = write_parquet(
        tmp_path / "set", [caprl("x"), caprl("y", image={"bytes": png(9), "path": "y"}), caprl("z")]
    )
    stored = [example.image for example in load_examples(parquet)]
    (tmp_path / "file.png").write_bytes(png())
    broken = StoredImage("broken", lambda: (_ for _ in ()).throw(ValueError("no picture")))
    assert groups([*stored, tmp_path / "file.png", broken, broken]) == [0, 1, 0, 0, 4, 5]
    drawn = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "red")]
    assert groups(drawn) == [0, 1, 0]


def test_rows_of_one_picture_become_one_example():
    image, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    one, two = Question("Color?", ("red", "blue"), 0), Question("Form?", ("disc", "star"), 0)
    rows = [Example("1", image, (one,), "f"), Example("2", other, (one, one)),
            Example("3", image, (two, replace(one, kind="color")), "g"), Example("4", image, (replace(one, answer_index=1),))]
    first, second = merge_pictures(rows)
    assert (first.id, first.family, first.other_ids) == ("1", "f", ("3", "4")) and first.image is image
    # equal ones once; another answer is another question
    assert first.questions == (one, two, replace(one, answer_index=1))
    assert second is rows[1]  # what is one row stays as it is


def test_a_question_with_two_answers_on_one_picture_is_named_with_its_rows(capsys):
    """Whatever the order of its options, in rows of one picture or in one row. Another question,
    other options or another picture may have another answer."""
    image, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    one = Question("Color?", ("red", "blue"), 0)
    rows = [Example("1", image, (one,)), Example("2", other, (replace(one, answer_index=1),)),
            Example("3", image, (replace(one, question="Form?", answer_index=1), replace(one, choices=("blue", "pink")),
                                 replace(one, choices=("blue", "red"), answer_index=1)))]
    merge_pictures(rows)
    assert "two answers" not in capsys.readouterr().err
    merged = merge_pictures([*rows, Example("4", image, (replace(one, choices=("blue", "red")),))])
    assert len(merged[0].questions) == 5  # nothing is lost
    assert capsys.readouterr().err.splitlines()[1] == (
        "questions with two answers on one picture: 1; 'Color?' is 'red' in row '1' and 'blue' in row '4'"
    )
    assert merge_pictures([Example("5", other, (one, replace(one, answer_index=1)))])[0].questions[1].answer_index == 1
    assert "'Color?' is 'red' in row '5' and 'blue' in row '5'" in capsys.readouterr().err


def test_a_set_in_a_linked_folder_is_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_parquet(tmp_path / "elsewhere/a.parquet", [caprl("x")])
    (tmp_path / "set").mkdir()
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/round").symlink_to(tmp_path / "set")
    assert [example.id for example in load_examples(str(tmp_path / "set"))] == ["x"]
