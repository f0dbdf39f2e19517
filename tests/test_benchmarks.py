"""Each public format, written here from its documented columns, is read back question for question."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.benchmarks.benchmark import judge_of, load_benchmark
from data.benchmarks.questions import KINDS, FreeQuestion, inline_options
from data.examples import Question
from data.images import open_image


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "png")
    return buffer.getvalue()


def b64(color: str) -> str:
    return base64.b64encode(png(color)).decode()


DATA = Path(__file__).parent / "data"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def write_tsv(path, rows: list[dict]):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows: list[dict], **settings):
    pq.write_table(pa.Table.from_pylist(rows), path, **settings)
    return path


def asked(benchmark) -> list[tuple]:
    """(picture's color, item id, family, question) of every item."""
    return [
        (open_image(picture.image).getpixel((0, 0)), item.id, item.family, item.question)
        for picture in benchmark.pictures for item in picture.items
    ]


def test_vlmevalkit_choice_tsv(tmp_path):
    common = {"category": "color", "l2-category": "x", "hint": "", "C": "", "D": ""}
    rows = [
        common
        | {"index": 0, "image": b64("red"), "question": 'Which\tcolor, "it"?\nSay.', "A": "red", "B": "blue", "answer": "A"},
        common | {"index": 1, "image": b64("blue"), "question": "Which?", "A": "1", "B": "2", "C": "3", "answer": "C",
                  "hint": "Look."},
        common | {"index": 2, "image": "0", "question": "And?", "A": "yes", "B": "no", "answer": "B", "category": "shape"},
        common | {"index": 3, "image": str([b64("blue")]), "question": "Listed?", "A": "a b", "B": "no\u2028w", "answer": "B"},
    ]
    found = load_benchmark(f"choice:{write_tsv(tmp_path / 'Any.tsv', rows)}")
    assert not found.refused and found.metric == "choice" and [p.id for p in found.pictures] == ["0", "1"]
    assert asked(found) == [  # two questions on each of two pictures
        (RED, "0", "color", Question('Which\tcolor, "it"?\nSay.', ("red", "blue"), 0, "color")),
        (RED, "2", "shape", Question("And?", ("yes", "no"), 1, "shape")),
        (BLUE, "1", "color", Question("Look.\nWhich?", ("1", "2", "3"), 2, "color")),
        (BLUE, "3", "color", Question("Listed?", ("a b", "no\u2028w"), 1, "color")),
    ]


def test_a_cell_of_a_table_may_hold_a_large_picture(tmp_path):
    """csv's own limit is 128 kB; a picture of a megapixel has more in base64."""
    noise = Image.effect_noise((500, 500), 90)
    noise.save(buffer := io.BytesIO(), "png")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert len(text) > 1 << 17
    row = {"index": 0, "image": text, "question": "What?", "A": "x", "B": "y", "answer": "A"}
    [picture] = load_benchmark(f"choice:{write_tsv(tmp_path / 'x.tsv', [row])}").pictures
    assert open_image(picture.image).tobytes() == noise.convert("RGB").tobytes()


def test_vlmevalkit_free_tsv(tmp_path):
    rows = [
        {"index": 10, "image": b64("red"), "question": "Sum?", "answer": "45%", "split": "test_human"},
        {"index": 11, "image": b64("blue"), "question": "List?", "answer": "[1, 2]", "split": "test_augmented"},
    ]
    path = write_tsv(tmp_path / "docvqa_in_the_name.tsv", rows)
    found = load_benchmark(f"chartqa:{path}")
    assert found.metric == "relaxed"  # whatever the path says
    assert asked(found) == [
        (RED, "10", "test_human", FreeQuestion("Sum?", ("45%",))),
        (BLUE, "11", "test_augmented", FreeQuestion("List?", ("[1, 2]",))),
    ]
    rows[0]["answer"] = "['ITC Limited', 'itc ltd']"
    found = load_benchmark(f"docvqa:{write_tsv(path, rows)}")
    assert found.metric == "anls" and found.pictures[0].items[0].question.answers == ("ITC Limited", "itc ltd")
    assert load_benchmark(f"infovqa:{path}").metric == "anls" and load_benchmark(f"exact:{path}").metric == "exact"


def test_lmms_lab_parquet_free(tmp_path):
    def image(color):
        return {"bytes": png(color), "path": None}

    chart = [{"type": "human_test", "question": "How many?", "answer": "3", "image": image("red")},
             {"type": "augmented_test", "question": "Which?", "answer": "2016", "image": image("red")}]
    found = load_benchmark(f"chartqa:{write_parquet(tmp_path / 'c.parquet', chart)}")
    assert asked(found) == [(RED, "c:0", "human_test", FreeQuestion("How many?", ("3",))),
                            (RED, "c:1", "augmented_test", FreeQuestion("Which?", ("2016",)))]
    doc = [{"questionId": "65", "question": "What?", "answers": ["Actual", "actual"], "image": image("blue"), "docId": 1}]
    found = load_benchmark(f"docvqa:{write_parquet(tmp_path / 'd.parquet', doc)}")
    assert asked(found) == [(BLUE, "65", "all", FreeQuestion("What?", ("Actual", "actual")))]


def test_lmms_lab_parquet_choice(tmp_path):
    seed = [{"question": "Where?", "choice_a": "in", "choice_b": "out", "choice_c": "up", "choice_d": "off", "answer": "D",
             "question_id": "101", "question_type_id": 5, "data_id": "x", "image": [{"bytes": png("red"), "path": None}]}]
    found = load_benchmark(f"seed:{write_parquet(tmp_path / 's.parquet', seed)}")
    assert asked(found) == [(RED, "101", "5", Question("Where?", ("in", "out", "up", "off"), 3))]
    ai2d = [{"question": "Which stage?", "options": ["egg", "larva", "3"], "answer": "2",
             "image": {"bytes": png("blue"), "path": "a.png"}}]
    found = load_benchmark(f"ai2d:{write_parquet(tmp_path / 'a.parquet', ai2d)}")
    assert asked(found) == [(BLUE, "a:0", "all", Question("Which stage?", ("egg", "larva", "3"), 2))]
    mmstar = [{"index": 7, "question": "Which one?\nOptions: A: red, B: blue, or so, C: 1: 2", "answer": "B",
               "image": png("red"), "category": "coarse perception", "l2_category": "x"}]
    found = load_benchmark(f"mmstar:{write_parquet(tmp_path / 'm.parquet', mmstar)}")
    question = Question("Which one?", ("red", "blue, or so", "1: 2"), 1, "coarse perception")
    assert asked(found) == [(RED, "7", "coarse perception", question)]


def test_options_in_the_text():
    assert inline_options("Q?\nChoices:\n(A) 90\n(B) 45, 46\n(C) (x)") == ("Q?", ["90", "45, 46", "(x)"])
    assert inline_options("Options: none?\nOptions: A: a,B: b") == ("Options: none?", ["a", "b"])
    with pytest.raises(ValueError, match="expected options in columns"):
        inline_options("How many?")


def test_chartqapro(tmp_path):
    rows = [
        {"Question": ["Is it?"], "Answer": ["True"], "Question Type": "Fact Checking", "Year": ["NO"], "Paragraph": "",
         "image": png("red")},
        {"Question": ["When?", "And then?"], "Answer": ["2010", "[2012, 2014]"], "Question Type": "Conversational",
         "Year": ["YES", "YES"], "Paragraph": "A text.", "image": png("blue")},
    ]
    expected = [
        (RED, "p:0", "Fact Checking", FreeQuestion("Is it?", ("True",), "Fact Checking", ("NO",))),
        (BLUE, "p:1", "Conversational", FreeQuestion("A text.\nWhen?\n2010\nAnd then?", ("2010", "[2012, 2014]"),
                                                   "Conversational", ("YES", "YES"))),
    ]
    found = load_benchmark(f"chartqapro:{write_parquet(tmp_path / 'p.parquet', rows)}")
    assert asked(found) == expected
    table = [{"index": n, "image": base64.b64encode(row["image"]).decode(), "question": str(row["Question"]),
              "answer": str(row["Answer"]), "year": str(row["Year"]), "question_type": row["Question Type"],
              "paragraph": row["Paragraph"]} for n, row in enumerate(rows)]
    found = load_benchmark(f"chartqapro:{write_tsv(tmp_path / 'p.tsv', table)}")
    assert asked(found) == [
        (color, id.removeprefix("p:"), family, question) for color, id, family, question in expected
    ]
    assert found.pictures[1].items[0].question.score("chartqapro", "[2012, 2013]") == 0.5


def test_captionqa_parquet(tmp_path):
    rows = [{"id": "nat_001", "images": [{"bytes": png("red"), "path": None}], "domain": "natural", "image_paths": ["x.jpg"],
             "questions": [{"question": "What color?", "choices": ["red", "blue"], "answer": "red",
                            "category": ["Attribute", "Color"]},
                           {"question": "What size?", "choices": ["s", "m"], "answer": "xl", "category": []}]}]
    found = load_benchmark(f"captionqa:{write_parquet(tmp_path / 'q.parquet', rows)}")
    assert asked(found) == [(RED, "nat_001:0", "natural", Question("What color?", ("red", "blue"), 0, "Attribute"))]
    (refusal,) = found.refused
    assert "question 1: answer 'xl': expected the text of exactly one of ['s', 'm']" in refusal
    assert found.pictures[0].id == "nat_001" and found.metric == "captionqa"


def test_own_jsonl_and_the_toy_world(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    question = {"question": "C?", "choices": ["x", "y"], "answer_index": 1}
    row = {"id": "a", "image": "a.png", "family": "f", "questions": [question]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    for source in (f"{tmp_path}/own.jsonl", f"choice:{tmp_path}/own.jsonl"):
        assert asked(load_benchmark(source)) == [(RED, "a:0", "f", Question("C?", ("x", "y"), 1))]
    assert load_benchmark(f"{tmp_path}/own.jsonl").name == "own"
    assert load_benchmark("toy:heldout:3").name == "toy:heldout:3"
    (tmp_path / "free.jsonl").write_text(
        json.dumps({"id": "b", "image": ".\\a.png", "question": "N?", "answer": 12}) + "\n"  # of Windows
    )
    assert asked(load_benchmark(f"chartqa:{tmp_path}/free.jsonl")) == [(RED, "b", "all", FreeQuestion("N?", ("12",)))]


def test_a_key_or_column_that_is_there_twice_is_refused(tmp_path):
    """The last of two answers was asked."""
    (tmp_path / "a.png").write_bytes(png("red"))
    question = '{"question": "C?", "choices": ["x", "y"], "answer_index": 0, "answer_index": 1}'
    (tmp_path / "own.jsonl").write_text(f'{{"id": "a", "image": "a.png", "questions": [{question}]}}\n')
    for source in (f"{tmp_path}/own.jsonl", f"choice:{tmp_path}/own.jsonl"):
        with pytest.raises(ValueError, match=r"own.jsonl line 1: .*expected each key once, got 'answer_index' twice"):
            load_benchmark(source)
    (tmp_path / "list.json").write_text('[{"image": "a.png", "prompt": "C?", "answer": "1", "answer": "2"}]')
    with pytest.raises(ValueError, match=r"list.json: .*expected each key once, got 'answer' twice"):
        load_benchmark(f"chartqa:{tmp_path}/list.json")
    (tmp_path / "x.tsv").write_text(f"index\timage\tquestion\tanswer\tanswer\t\t\n0\t{b64('red')}\tC?\t1\t2\t\t\n")
    table = pa.table([["C?"], ["1"], ["2"], [png("red")]], ["question", "answer", "answer", "image"])
    pq.write_table(table, tmp_path / "x.parquet")
    for name in ("x.tsv", "x.parquet"):
        with pytest.raises(ValueError, match=f"{name}: expected columns of different names, found 'answer' twice"):
            load_benchmark(f"chartqa:{tmp_path}/{name}")


@pytest.mark.parametrize(("kind", "change", "reason"), [
    ("exact", {"question": ["x", "y"]}, "expected text in 'question', got ['x', 'y']"),
    ("exact", {"question": 5}, "expected text in 'question', got 5"),
    ("exact", {"answer": True}, "expected a text or a number, got True"),
    ("docvqa", {"answers": [["a"]]}, "expected a text or a number, got ['a']"),
    ("chartqa", {"answer": {"a": 1}}, "expected a text or a number, got {'a': 1}"),
    ("chartqa", {"prompt": "How many?", "answer": True}, "expected a text or a number, got True"),
    ("chartqapro", {"answer": {"a": 1}}, "expected a text or a number, got {'a': 1}"),
    ("chartqapro", {"answer": [True]}, "expected a text or a number, got True"),
    ("choice", {"question": {"a": 1}}, "expected text in 'question', got {'a': 1}"),
    ("choice", {"choices": [True, False], "answer": "A"}, "expected a text or a number, got True"),
    ("choice", {"choices": ["['x']", "y"], "answer": ["x"]}, "expected a text or a number, got ['x']"),
    ("captionqa", {"choices": ["True", "False"], "answer": True}, "expected a text or a number, got True"),
])
def test_what_is_no_text_is_not_asked_as_python_writes_it(tmp_path, kind, change, reason):
    """A list was asked as "['x', 'y']", and "True" was the gold of a true."""
    (tmp_path / "a.png").write_bytes(png("red"))
    row = {"id": "a", "image": "a.png", "question": "C?", "answer": "12", "choices": ["12", "y"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "b"} | change) + "\n")
    assert reason in load_benchmark(f"{kind}:{tmp_path}/x.jsonl").refused[0]


def test_a_folder_is_one_split(tmp_path):
    for name, color in (("test-00000-of-00002", "red"), ("test-00001-of-00002", "blue")):
        row = {"question": "Q?", "answer": "1", "image": {"bytes": png(color), "path": ""}}
        write_parquet(tmp_path / f"{name}.parquet", [row])
    assert [a[:2] for a in asked(load_benchmark(f"chartqa:{tmp_path}"))] == [
        (RED, "test-00000-of-00002:0"), (BLUE, "test-00001-of-00002:0")
    ]
    write_parquet(tmp_path / "val-00000-of-00001.parquet", [{"question": "Q?"}])
    with pytest.raises(ValueError, match=r"expected parquet files of one split .* found \['test', 'val'\]"):
        load_benchmark(f"chartqa:{tmp_path}")
    assert len(load_benchmark(f"chartqa:{tmp_path}/test-*.parquet").pictures) == 2


def test_files_that_the_hub_has_converted_are_one_split(tmp_path):
    for number, color in enumerate(("red", "blue")):
        row = {"question": "Q?", "answer": "1", "image": {"bytes": png(color), "path": ""}}
        write_parquet(tmp_path / f"{number:04}.parquet", [row])
    for source in (tmp_path, tmp_path / "*.parquet"):
        assert [a[:2] for a in asked(load_benchmark(f"chartqa:{source}"))] == [(RED, "0000:0"), (BLUE, "0001:0")]
    write_parquet(tmp_path / "test-0000.parquet", [{"question": "Q?"}])
    with pytest.raises(ValueError, match=r"one split .* found \['', 'test'\]"):
        load_benchmark(f"chartqa:{tmp_path}")


def test_pictures_come_from_the_right_row_group(tmp_path):
    """A picture is read by its place in its row group, groups of several batches included."""
    rows = [
        {"question": f"Q{n}?", "answer": "1", "image": {"bytes": png(f"rgb({n},0,0)"), "path": ""}}
        for n in range(200)
    ]
    found = load_benchmark(f"chartqa:{write_parquet(tmp_path / 'x.parquet', rows, row_group_size=150)}")
    assert [color[0] for color, *_ in asked(found)] == list(range(200))


TIME_COLUMNS = {
    "ns": pa.array([10**18 + 1], pa.timestamp("ns")), "far": pa.array([10**17], pa.timestamp("ms")),
    "day": pa.array([2**31 - 1], pa.date32()), "hour": pa.array([1], pa.time64("ns")), "took": pa.array([1], pa.duration("ns")),
    "inside": pa.array([[{"x": 1, "at": 10**18 + 1}]], pa.list_(pa.struct({"x": pa.int64(), "at": pa.timestamp("ns")}))),
}


@pytest.mark.parametrize("name", TIME_COLUMNS)
@pytest.mark.parametrize("int96", [False, True])
def test_times_that_python_cannot_hold_stop_no_parquet_file(tmp_path, name, int96):
    """pandas writes nanoseconds. A year out of range ended the program with an OverflowError."""
    table = pa.Table.from_pylist([{"question": "Q?", "answer": "1", "image": {"bytes": png("red"), "path": None}}])
    path = tmp_path / "x.parquet"
    pq.write_table(table.append_column(name, TIME_COLUMNS[name]), path, use_deprecated_int96_timestamps=int96)
    assert asked(load_benchmark(f"chartqa:{path}")) == [(RED, "x:0", "all", FreeQuestion("Q?", ("1",)))]


def test_a_parquet_row_that_python_cannot_hold_is_named(tmp_path):
    times = pa.array([[1]], pa.list_(pa.duration("ns")))
    pq.write_table(pa.table({"question": ["Q?"], "took": times}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet row group 0: expected rows .Nanosecond duration"):
        load_benchmark(f"chartqa:{tmp_path / 'x.parquet'}")


BAD_ROWS = [
    ({"answer": ""}, "expected answer, found columns"),
    ({"answer": "E"}, "answer 'E': expected the letter of one of 2 options"),
    ({"answer": "AB"}, "answer 'AB': expected the letter of one of 2 options"),
    ({"B": ""}, "expected 2 to 10 choices, got 1"),
    ({"A": "", "B": "x"}, "expected non-empty text in every choice"),
    ({"B": "a"}, "expected distinct choices"),
    ({"question": ""}, "expected question, found columns"),
    ({"image": ""}, "expected an image, found an empty cell"),
    ({"image": "99"}, "image '99': expected base64 text or the index of a row above"),
    ({"image": "!" * 65}, "expected base64 text"),
    ({"image": "['x', 'y']"}, "expected one image, found 2"),
    ({"image": "[__import__('os')]"}, "expected a list in"),
    ({"index": "0"}, "id '0' was used before"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_ROWS)
def test_a_bad_row_is_refused_and_counted(tmp_path, change, reason):
    good = {"index": "0", "image": b64("red"), "question": "Q?", "A": "a", "B": "b", "answer": "A"}
    path = write_tsv(tmp_path / "x.tsv", [good, good | {"index": "1"} | change])
    found = load_benchmark(f"choice:{path}")
    assert [a[1] for a in asked(found)] == ["0"]
    assert len(found.refused) == 1 and found.refused[0].startswith(f"{path} row 1: ") and reason in found.refused[0]


SHIFTED = [  # the header, the rows after the first, ids that are asked, what is found in the row that is not
    ("index image question answer", ["1 R What_is the_total? 12", "2 R Who? 5"], ["0", "2"], "found 5 "),
    ("index image question answer", ['1 R "Stop_is_where? door', "2 R How? 4"], ["0"], "found 2 lines"),
    ("index image answer question", ['1 R door "Stop_is_where?', "2 R 4 How?"], ["0"], "found 2 lines"),
    ("index image question answer", ['1 R "Stop_where? door', '2 R Is_"it"? 4', "3 R Who? 5"], ["0", "3"], "found 2 lines"),
    ("index image question answer hint", ['1 R "Why?', 'So?" door'], ["0"], "found 2 lines"),
]


@pytest.mark.parametrize(("header", "rows", "ids", "found"), SHIFTED)
def test_a_row_with_shifted_cells_is_refused(tmp_path, header, rows, ids, found):
    """A tab in a question made its second half the gold, an open quotation mark the next rows a part of its cell."""
    text = "\n".join([header, "0 R 7 7", *rows, ""]).replace(" ", "\t").replace("_", " ").replace("R", b64("red"))
    (tmp_path / "x.tsv").write_text(text)
    benchmark = load_benchmark(f"docvqa:{tmp_path / 'x.tsv'}")
    assert [item.id for item in benchmark.pictures[0].items] == ids and len(benchmark.refused) == 1
    assert f"x.tsv row 1: expected {len(header.split())} cells as in the header, {found}" in benchmark.refused[0]


def test_labels_of_options_in_columns_are_taken_off(tmp_path):
    """They stayed, and the shuffled options were shown as "A) C. blue"."""
    cells = {"question": "Q?", "answer": "B", "image": b64("red")}
    rows = [cells | {"index": 0, "A": "A. red", "B": "B. green", "C": "C. blue"},
            cells | {"index": 1, "A": "(A)", "B": "(B)"}, cells | {"index": 2, "A": "B) red", "B": "A) green"}]
    found = load_benchmark(f"choice:{write_tsv(tmp_path / 'x.tsv', rows)}")
    assert asked(found) == [(RED, "0", "all", Question("Q?", ("red", "green", "blue"), 1)),
                            (RED, "1", "all", Question("Q?", ("(A)", "(B)"), 1))]
    assert len(found.refused) == 1 and "expected choices labelled A, B, C, ... in order" in found.refused[0]


def test_what_a_table_has_in_place_of_nothing_is_missing(tmp_path):
    """pandas writes missing options and hints as nan, lmms-lab's MMBench too; "None" and "NaN" are options."""
    cells = {"question": "Q?", "hint": "nan", "category": "nan", "answer": "A"}
    rows = [cells | {"index": 0, "A": "yes", "B": "no", "C": "nan", "D": "nan"},
            cells | {"index": 1, "A": "None", "B": "NaN", "C": "NA", "D": "nan"},
            cells | {"index": 2, "A": "x", "B": "nan", "C": "y", "D": "nan"}]
    path = write_tsv(tmp_path / "x.tsv", [row | {"image": b64("red")} for row in rows])
    stored = write_parquet(tmp_path / "x.parquet", [row | {"image": {"bytes": png("red")}} for row in rows])
    for source in (f"choice:{path}", f"choice:{stored}"):
        found = load_benchmark(source)
        assert asked(found) == [(RED, "0", "all", Question("Q?", ("yes", "no"), 0)),
                                (RED, "1", "all", Question("Q?", ("None", "NaN", "NA"), 0))]
        assert len(found.refused) == 1 and "non-empty text in every choice" in found.refused[0]
    question = "Which? Choices: (A) Yes (B) No (C) nan (D) nan"
    assert inline_options(question) == ("Which?", ["Yes", "No"])
    assert inline_options("Which? Options: A: 1, B: nan, C: 2") == ("Which?", ["1", "", "2"])  # to be refused


NAN = float("nan")


@pytest.mark.parametrize(("kind", "change", "reason"), [
    ("chartqa", {"answer": NAN}, "expected answers or answer, found columns"),
    ("chartqa", {"question": NAN}, "expected question or query, found columns"),
    ("chartqa", {"answer": ["12", None]}, "expected answers in words, got ['12', '']"),
    ("chartqa", {"answer": ["12", NAN]}, "expected answers in words, got ['12', '']"),
    ("docvqa", {"answer": "['12', None]"}, "expected answers in words, got ['12', '']"),
    ("choice", {"choices": ["12", None]}, "expected non-empty text in every choice"),
    ("choice", {"choices": ["12", NAN]}, "expected non-empty text in every choice"),
    ("choice", {"questions": [{"question": "Q?", "choices": ["12", "x"], "answer": NAN}]}, "expected answer, found columns"),
    ("chartqapro", {"Question": "[]", "Answer": "[]"}, "expected an answer for each of 0 questions"),
    ("chartqapro", {"Question": ["Q?"], "Answer": [None]}, "expected an answer for each of 1 questions"),
    ("chartqapro", {"Question": ["Q?", None], "Answer": ["1", "2"]}, "expected an answer for each of 2 questions"),
    ("chartqa", {"prompt": "How many?", "answer": [NAN]}, "expected answers in words"),
])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_null_and_nan_are_no_text(tmp_path, ending, kind, change, reason):
    """They became the words "None" and "nan": a gold that nobody says, an option, a line before the question."""
    (tmp_path / "a.png").write_bytes(png("red"))
    good = {"id": "a", "image": "a.png", "hint": NAN, "category": [None], "question": "Q?", "choices": ["12", "x"],
            "answer": "12", "Question": ["Q?"], "Answer": ["12"]}
    rows, path = [good, good | {"id": "b"} | change], tmp_path / f"x.{ending}"
    path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    found = load_benchmark(f"{kind}:{path}")
    (item,) = found.pictures[0].items
    assert item.question.question == "Q?" and item.family == "all"
    assert len(found.refused) == 1 and f"{path} " in found.refused[0] and reason in found.refused[0]


def test_null_and_nan_in_a_list_of_parquet_are_no_text(tmp_path):
    cases = [("docvqa", "answers", ["12"], None), ("docvqa", "answers", [12.0], NAN), ("choice", "choices", ["12", "x"], None)]
    for number, (kind, name, sound, entry) in enumerate(cases):
        row = {"question": "Q?", "answer": "12", "image": {"bytes": png("red")}}
        path = write_parquet(tmp_path / f"{number}.parquet", [row | {name: sound}, row | {name: [*sound, entry]}])
        found = load_benchmark(f"{kind}:{path}")
        assert len(found.pictures[0].items) == 1 and ", '']" in found.refused[0], found.refused


def test_case_and_signs_tell_options_apart(tmp_path):
    rows = [{"index": n, "image": b64("red"), "question": "Q?", "A": a, "B": b, "answer": "B"}
            for n, (a, b) in enumerate([("a", "A"), ("Ff", "FF"), ("6'", '6"'), ("5", "5!")])]
    found = load_benchmark(f"choice:{write_tsv(tmp_path / 'x.tsv', rows)}")
    assert not found.refused
    assert [question.choices for *_, question in asked(found)] == [("a", "A"), ("Ff", "FF"), ("6'", '6"'), ("5", "5!")]


def test_a_hint_is_shown_with_listed_options_too(tmp_path):
    """ScienceQA's: "Both parents are Ff.", without which there is no answer."""
    row = {"image": {"bytes": png("red")}, "question": "What ratio?", "choices": ["0:4", "2:2"],
           "answer": 1, "hint": "Both are Ff."}
    found = load_benchmark(f"choice:{write_parquet(tmp_path / 's.parquet', [row])}")
    assert asked(found)[0][3] == Question("Both are Ff.\nWhat ratio?", ("0:4", "2:2"), 1)


@pytest.mark.parametrize(("answer", "reason"), [
    ("y", ""), ("B", ""), ("B) y", ""), (1, ""), ("", ""), (None, ""),
    ("x", "expected one choice in answer_index and answer, got {'answer_index': 1, 'answer': 'x'}"),
    ("A", "expected one choice in answer_index"), (0, "expected one choice in answer_index"),
    ("Z nonsense", "expected an answer among the choices ['x', 'y'], got 'Z nonsense'"),
])
def test_answer_index_and_answer_of_our_jsonl_agree(tmp_path, answer, reason):
    (tmp_path / "a.png").write_bytes(png("red"))
    entry = {"question": "C?", "choices": ["x", "y"], "answer_index": 1}
    row = {"id": "a", "image": "a.png", "questions": [entry, entry | {"answer": answer}]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    found = load_benchmark(f"choice:{tmp_path}/own.jsonl")
    assert [q.answer_index for *_, q in asked(found)] == [1] * (1 if reason else 2)
    assert len(found.refused) == bool(reason) and all(f"question 1: {reason}" in text for text in found.refused)


def test_null_is_absent_in_our_jsonl_and_a_broken_row_is_refused_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    entry = {"question": "C?", "choices": ["x", "y"], "answer_index": None, "answer": "y", "hint": None}
    row = {"id": None, "image": None, "image_path": "a.png", "domain": None, "family": None, "questions": [entry]}
    lines = [json.dumps(row), json.dumps(row), '{"id": "s", "image": "a.png", "questions": [{"question": "\\ud83d"}]}', "{"]
    (tmp_path / "own.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n")
    found = load_benchmark(f"choice:{tmp_path}/own.jsonl")
    assert asked(found) == [(RED, f"{n}:0", "all", Question("C?", ("x", "y"), 1)) for n in (1, 2)]
    assert len(found.refused) == 2 and "own.jsonl line 3: expected text in the row, got half a" in found.refused[0]
    assert "own.jsonl line 4: expected a JSON object" in found.refused[1]


def test_a_picture_that_cannot_be_read_refuses_its_row_alone(tmp_path, monkeypatch):
    """The benchmark ended with the system's error, which names no row."""
    for name in ("a.png", "locked.png"):
        (tmp_path / name).write_bytes(png("red"))

    def read_bytes(path):  # tests may run as root, who may read everything
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied", str(path))
        return path.open("rb").read()

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    names = ("a.png", "locked.png", "long" * 100 + ".png")
    rows = [{"id": str(n), "image": name, "question": "Q?", "answer": "1"} for n, name in enumerate(names)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_benchmark(f"chartqa:{tmp_path}/x.jsonl")
    assert [picture.id for picture in found.pictures] == ["0"] and len(found.refused) == 2
    assert "x.jsonl line 2: expected a picture that can be read ([Errno 13] Permission denied" in found.refused[0]
    assert "x.jsonl line 3: image " in found.refused[1] and "expected a file, found nothing" in found.refused[1]
    rows[1]["image"] = "iVBO" * 3000  # base64, which such files do not have: not all of it is shown
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_benchmark(f"chartqa:{tmp_path}/x.jsonl").refused[0]) < 600


def test_half_a_surrogate_pair_in_the_text_of_a_list_refuses_its_row(tmp_path):
    """Text of a cell is sound UTF-8, but a list in it may spell out anything."""
    rows = [{"index": n, "image": b64("red"), "question": "Q?", "answer": answer}
            for n, answer in enumerate(["['a']", r"['\ud83d']"])]
    found = load_benchmark(f"docvqa:{write_tsv(tmp_path / 'x.tsv', rows)}")
    assert [item.id for item in found.pictures[0].items] == ["0"]
    assert "x.tsv row 1: expected text in question and answers, got half a surrogate pair" in found.refused[0]


def test_chartqapro_by_its_paper_and_by_its_script(tmp_path):
    """The script takes no notice of the type: 12.4 is within 5% of 12, "tree" 3 of 4 letters of
    "true", by hand. Years count in both."""
    kinds = ("Fact Checking", "Multi Choice", "Factoid", "Conversational")
    rows = [{"Question": ["Q?"], "Answer": [gold], "Question Type": kind, "Year": [year], "image": png("red")}
            for kind in kinds for gold, year in (("12", "NO"), ("true", "NO"), ("2016", "YES"))]
    path = write_parquet(tmp_path / "p.parquet", rows)
    scores = {}
    for kind in ("chartqapro", "chartqapro-script"):
        found = load_benchmark(f"{kind}:{path}")
        questions = [question for *_, question in asked(found)]
        scores[kind] = [question.score(found.metric, prediction)
                        for question, prediction in zip(questions, 4 * ["12.4", "tree", "2015"])]
        assert [family for _, _, family, _ in asked(found)] == [kind for kind in kinds for _ in range(3)]
    assert scores["chartqapro"] == [0, 0, 0, 0, 0, 0, 1, 0.75, 0, 1, 0.75, 0]
    assert scores["chartqapro-script"] == 4 * [1, 0.75, 0]


def capeval(folder, lines: list[str]):
    """A checklist as it is published, its images in the folder beside it."""
    (folder / "image").mkdir(exist_ok=True)
    for number, line in enumerate(lines):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "image" / json.loads(line)["img_path"])
    (folder / "checklist.jsonl").write_text("\n".join(lines) + "\n")
    return f"capeval:{folder / 'checklist.jsonl'}"


def test_capeval_checklist(tmp_path):
    """Items are in the order of its lists, whatever the order of the keys. What is no item is named."""
    lines = (DATA / "capeval_checklist.jsonl").read_text().splitlines()
    found = load_benchmark(capeval(tmp_path, lines))
    assert not found.refused and found.metric == "capeval"
    assert [(p.id, len(p.items), p.items[0].family) for p in found.pictures] == [
        ("SO001.png", 6, "Scene & Object"), ("PA002.png", 5, "People & Activity"), ("TI003.png", 6, "Text & Interface")]
    item = found.pictures[0].items[2]
    assert (item.id, item.question.kind) == ("SO001.png:2", "color")
    assert item.question.question == "Does the caption describe the bicycle as blue?"
    row = json.loads(lines[0])
    turned = dict(reversed(row.items())) | {"id": "other"}
    assert [i.question for i in load_benchmark(capeval(tmp_path, [json.dumps(turned)])).pictures[0].items] == [
        i.question for i in found.pictures[0].items]
    broken = row | {"instance_checklist": [{"Tags": "x", "Question": " "}, "Is it red?", {"Tags": "y"}], "ui_checklist": None}
    found = load_benchmark(capeval(tmp_path, [json.dumps(broken), lines[1]]))
    assert len(found.pictures[0].items) == 4 and [reason.split(", ", 1)[1][:7] for reason in found.refused] == [
        "item 0:", "item 1:", "item 2:"]
    assert "checklist.jsonl line 1, item 1: expected an object with a Question, got 'Is it red?'" in found.refused[1]
    found = load_benchmark(capeval(tmp_path, [json.dumps(row | {"ui_checklist": 5}), lines[1]]))
    assert len(found.refused) == 1 and "line 1: expected a list in ui_checklist, got 5" in found.refused[0]
    with pytest.raises(ValueError, match="line 1: expected items in instance_checklist or another list of its kind"):
        load_benchmark(capeval(tmp_path, ['{"id": "a", "img_path": "a.png"}']))
    path = tmp_path / "image" / "SO001.png"
    path.unlink()
    with pytest.raises(ValueError, match="img_path .*SO001.png: expected a file, found nothing"):
        (tmp_path / "checklist.jsonl").write_text(lines[0] + "\n")
        load_benchmark(f"capeval:{tmp_path / 'checklist.jsonl'}")


def test_the_published_judge_is_asked_where_all_benchmarks_have_it():
    assert judge_of(["captionqa:a", "capeval:b"]) == "Qwen/Qwen2.5-72B-Instruct"
    for sources in (["captionqa:a", "seed:b"], ["seed:b"], ["heldout.jsonl"], ["toy:heldout:2", "capeval:b"]):
        assert judge_of(sources) == "Qwen/Qwen2.5-3B-Instruct"


def test_a_number_is_a_place_for_ai2d_and_a_text_for_others(tmp_path):
    row = {"question": "How many?", "options": ["1", "2", "3", "4"], "answer": "2", "image": {"bytes": b"a"}}
    path = write_parquet(tmp_path / "x.parquet", [row])
    golds = {
        kind: load_benchmark(f"{kind}:{path}").pictures[0].items[0].question.answer_index
        for kind in ("ai2d", "choice")
    }
    assert golds == {"ai2d": 2, "choice": 1}


@pytest.mark.parametrize("place", ["1", "1.0"])
def test_answer_index_of_a_table_is_a_place(tmp_path, place):
    """As text in a TSV, with ".0" where pandas wrote it."""
    cells = ("a", base64.b64encode(png("red")).decode(), "Q?", "['1', '2']", place)
    head = ("index", "image", "question", "options", "answer_index")
    (tmp_path / "x.tsv").write_text("\t".join(head) + "\n" + "\t".join(cells))
    [(*_, question)] = asked(load_benchmark(f"choice:{tmp_path}/x.tsv"))
    assert question.answer_index == 1


@pytest.mark.parametrize("answer", [["1"], 1.5, True, "B", "-1", {"a": 1}])
def test_a_place_that_is_none_is_refused(tmp_path, answer):
    """A list ended the program, 1.5 and true were option 1."""
    (tmp_path / "a.png").write_bytes(png("red"))
    row = {"image": "a.png", "question": "Q?", "options": ["a", "b"]}
    rows = [row | {"answer": answer} for answer in (1, "1", 1.0, answer)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_benchmark(f"ai2d:{tmp_path}/x.jsonl")
    assert [question.answer_index for *_, question in asked(found)] == [1, 1, 1] and len(found.refused) == 1
    assert f"line 4: answer {answer!r}: expected the place, from 0, of one of 2 options" in found.refused[0]


@pytest.mark.parametrize(("kind", "row", "reason"), [
    ("chartqa", {"question": "Q?", "answer": "1", "image": [{"bytes": b"a"}, {"bytes": b"b"}]},
     "expected one image in 'image', got 2"),
    ("docvqa", {"question": "Q?", "answers": [], "image": {"bytes": b"a"}}, "expected answers or answer, found columns"),
    ("docvqa", {"question": "Q?", "answers": ["a", " "], "image": {"bytes": b"a"}}, "expected answers in words"),
    ("docvqa", {"question": "Q?", "answer": "[open", "image": {"bytes": b"a"}}, "expected a list in '[open'"),
    ("chartqapro", {"Question": ["a", "b"], "Answer": ["1"], "image": b"a"}, "expected an answer for each of 2 questions"),
    ("ai2d", {"question": "Q?", "options": ["a", "b"], "answer": "2", "image": {"bytes": b"a"}}, "answer_index 2 outside"),
    ("captionqa", {"prompt": "Q?", "answer": "a", "image": {"bytes": b"a"}}, "expected question, found columns"),
    ("chartqa", {"question": "Q?", "answer": "1", "image": {"bytes": None, "path": "x"}},
     "expected a picture in 'image', got {'bytes': None"),
])
def test_nothing_to_ask_is_an_error(tmp_path, kind, row, reason):
    path = write_parquet(tmp_path / "x.parquet", [row])
    with pytest.raises(ValueError, match=f"expected questions of kind {kind}, found none") as error:
        load_benchmark(f"{kind}:{path}")
    assert reason in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    (tmp_path / "x.tsv").write_bytes(b"index\timage\n\xff\n")
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "y.tsv").write_bytes(b"index\xff\timage\n")
    for name, reason in (("x.parquet", "expected a parquet file"), ("x.tsv", "expected tab-separated UTF-8 text"),
                         ("y.tsv", "y.tsv: expected tab-separated UTF-8 text"),
                         ("x.csv", "expected a .tsv, .parquet, .jsonl or .json file"), ("none.tsv", "found nothing")):
        with pytest.raises(ValueError, match=reason):
            load_benchmark(f"chartqa:{tmp_path / name}")
    with pytest.raises(ValueError, match="toy:SPLIT:NUM, SHARE:PATH or KIND:PATH with KIND one of chartqa, chartqapro"):
        load_benchmark("chartq:x.parquet")
    assert set(KINDS.values()) == {"choice", "captionqa", "capeval", "exact", "judged", "relaxed", "anls", "chartqapro"}


def released_file(folder, rows: list, name: str = "lmm_eval_chartqa.json"):
    """As the card of CapRL's evaluation files and its script describe them: JSON beside the folder of pictures."""
    for part in ("json_file", "bench_image_folder"):
        (folder / part).mkdir(exist_ok=True)
    for color in ("red", "blue"):
        (folder / f"bench_image_folder/{color}.png").write_bytes(png(color))
    path = folder / "json_file" / name
    path.write_text(json.dumps(rows))
    return path


def released_row(question: str, answer, color: str = "red", **more) -> dict:
    chat = [{"role": "user", "content": [{"type": "image", "image": f"bench_image_folder/{color}.png"},
                                         {"type": "text", "text": question}]}]
    prompt = ("<|im_start|>system\nThink first.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
              f"{question}<|im_end|>\n<|im_start|>assistant\n")
    return {"image": chat, "prompt": prompt, "answer": answer} | more


def test_caprls_own_files_are_asked_as_they_are_and_scored_twice(tmp_path):
    """The two scores by hand: 11.77 is off by 5.1% of 11.2, and by 4.8% of itself; "1120" is a hundred times 11.2."""
    rows = [released_row("How much?", 11.2, id="same"), released_row("And here?", "11.2", "blue", id="same"),
            released_row("Which <image> place?", "Asia", "red") | {"image": "bench_image_folder/red.png"}]
    found = load_benchmark(f"chartqa:{released_file(tmp_path, rows)}")
    assert not found.refused and found.metric == "relaxed"
    assert [(color, id, question.question, question.answers) for color, id, _, question in asked(found)] == [
        (RED, "0", "How much?", ("11.2",)), (RED, "2", "Which <image> place?", ("Asia",)), (BLUE, "1", "And here?", ("11.2",))]
    question = found.pictures[0].items[0].question
    for prediction, own, released in (("11.2", 1, 1), ("1120", 0, 1), ("10.7", 1, 1), ("11.77", 0, 1), ("12", 0, 0)):
        assert (question.score("relaxed", prediction), question.released_score(prediction)) == (own, released)


def test_a_letter_of_caprls_own_files_counts_as_it_does_elsewhere(tmp_path):
    text = "What color is it?\nA. red\nB. blue\nC. green\nAnswer with a letter."
    rows = [released_row(text, "B"), released_row("How many?", "12", "blue"), released_row("Which point?", "C")]
    path = released_file(tmp_path, rows)
    for kind in ("mmmu", "mathverse"):
        question = load_benchmark(f"{kind}:{path}").pictures[0].items[0].question
        assert question.question == text and question.choices == ("red", "blue", "green")
        for prediction, own, released in (("B", 1, 1), ("b", 1, 1), ("(B)", 1, 1), ("B. blue", 1, 0), ("blue", 1, 0),
                                          ("A", 0, 0), ("A or B", 0, 0)):
            scores = question.score(KINDS[kind], prediction), question.released_score(prediction)
            assert scores == (own, released), prediction
    number, point = (load_benchmark(f"mmmu:{path}").pictures[n].items[m].question for n, m in ((1, 0), (0, 1)))
    assert number.score("choice", "12") == 1 and number.score("choice", "A") == 0 and not number.choices
    assert point.score("choice", "C") == 1 and point.score("choice", "The answer is D.") == 0  # options that are not known
    assert load_benchmark(f"mathvision:{path}").pictures[0].items[1].question.choices == ()
    golds = released_file(tmp_path, [released_row("Who?", "['ITC', 'itc ltd']"), released_row("When?", ["2012", "12"])])
    assert [q.answers for *_, q in asked(load_benchmark(f"infovqa:{golds}"))] == [("ITC", "itc ltd"), ("2012", "12")]


@pytest.mark.parametrize(("change", "reason"), [
    ({"answer": ""}, "expected answer"),
    ({"answer": []}, "expected answer"),
    ({"answer": None}, "expected answer"),
    ({"answer": {"a": 1}}, "expected a text or a number, got"),
    ({"answer": ["red", ["blue"]]}, "expected a text or a number, got"),
    ({"answer": "D"}, "expected the letter of one of 2 options"),
    ({"prompt": "<|im_start|>user\n<image><|im_end|>"}, "expected one text of a user"),
    ({"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>user\nb<|im_end|>"}, "expected one text of a user, found 2"),
    ({"image": None}, "expected one file, found"),
    ({"image": ["bench_image_folder/red.png", "bench_image_folder/blue.png"]}, "expected one file, found"),
    ({"image": "bench_image_folder/green.png"}, "expected a file, found nothing"),
    ({"image": "../red.png"}, "expected a path below"),
    ({"answer": "\ud83d"}, "got half a surrogate pair"),
])
def test_a_row_of_caprls_own_files_that_cannot_be_used_is_refused_alone(tmp_path, change, reason):
    good = released_row("Which?\n(A) red\n(B) blue", "A")
    path = released_file(tmp_path, [good | change, good])
    found = load_benchmark(f"mmstar:{path}")
    assert [item.id for item in found.pictures[0].items] == ["1"]
    assert len(found.refused) == 1 and found.refused[0].startswith(f"{path} row 0: ") and reason in found.refused[0]


@pytest.mark.parametrize(("content", "reason"), [
    ("{}", "expected a JSON list of rows"), ("[]", "expected a JSON list of rows"), ("[1]", "expected a JSON object, got 1"),
    ("[{", "expected a JSON list of rows"),
])
def test_a_json_file_of_something_else_is_named(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path}.*{re.escape(reason)}"):
        load_benchmark(f"chartqa:{path}")
