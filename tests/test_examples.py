import json
from pathlib import Path

import pytest
from PIL import Image

from data.examples import Question, example_row, load_examples, load_images
from data.images import StoredImage, image_size, list_images, open_image

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
        (["A", "B"], ("A", "B")),
        (["B. Obama", "A. Lincoln"], ("B. Obama", "A. Lincoln")),  # names, not labels
        (["A.M.", "B.C."], ("A.M.", "B.C.")),
        (["A) B) x", "B) y"], ("B) x", "y")),  # once
    ],
)
def test_labels_are_taken_off_once(tmp_path, choices, want):
    [_, example] = load_examples(write(tmp_path / "q.jsonl", ROW, question(choices=choices, answer_index=0) | {"id": "b"}))
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
        (question(choices=["x", " X"]), "line 2: id 'a', question 1: expected distinct choices"),
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


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl: expected a JSONL file, found nothing"):
        load_examples(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="expected a JSONL file, found a folder"):
        load_examples(str(tmp_path))
    with pytest.raises(ValueError, match="expected at least one row, found none"):
        load_examples(write(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match="expected toy:train:NUM or toy:heldout:NUM"):
        load_examples("toy:test:5")


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl line 1: expected a JSON object \\('utf-8' codec"):
        load_examples(str(tmp_path / "latin.jsonl"))


def test_load_images(tmp_path):
    path = write(tmp_path / "i.jsonl", {"image": "x/1.png"}, {"id": 7, "image": "2.png"})
    assert load_images(Path(path)) == [("x/1.png", tmp_path / "x/1.png"), ("7", tmp_path / "2.png")]
    with pytest.raises(ValueError, match="line 1: image .*3.png: expected a file, found nothing"):
        load_images(Path(write(tmp_path / "j.jsonl", {"image": "3.png"})))
    with pytest.raises(ValueError, match="line 1: expected a path in 'image', got None"):
        load_images(Path(write(tmp_path / "j.jsonl", {"id": "a"})))


@pytest.mark.parametrize("mode, color", [("RGBA", (255, 0, 0, 9)), ("P", 3), ("L", 80), ("CMYK", (9, 9, 9, 9)), ("I;16", 999)])
def test_any_kind_of_picture_becomes_rgb(tmp_path, mode, color):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (30, 20), color).save(path)
    assert open_image(path).mode == "RGB" and open_image(path).size == (30, 20)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (20, 30)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("RGB", (300, 200)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-40])
    for name in ("broken.png", "cut.png"):
        with pytest.raises(ValueError, match=f"{name}: expected an image that Pillow can read"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"none.png: expected an image, found nothing"):
        open_image(tmp_path / "none.png")


def test_list_images_goes_into_subfolders_and_refuses_an_empty_one(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "deep/a.jpg", "note.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["b.PNG", "a.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected images"):
        list_images(tmp_path / "empty")


def test_a_picture_inside_a_larger_file_is_read_when_it_is_needed_and_named(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "x.png")
    reads = []

    def read():
        reads.append(1)
        return (tmp_path / "x.png").read_bytes()

    stored = StoredImage("set.parquet row 7", read)
    assert not reads and image_size(stored) == (30, 20) and open_image(stored).mode == "RGB" and len(reads) == 2
    with pytest.raises(ValueError, match=r"set.parquet row 8: expected an image that Pillow can read"):
        open_image(StoredImage("set.parquet row 8", lambda: b"no image"))
