"""evaluate.py: the three programs, the cache of captions, captions read from files, settings that do not fit."""

import base64
import csv
import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import evaluate
import tools.caption_cache
from data.benchmarks.benchmark import Benchmark, Picture, load_benchmark, load_benchmarks
from data.benchmarks.questions import KINDS, Item
from data.examples import Question
from data.export import question_row
from data.jsonl import read_log
from data.toy.world import draw, make_scene, scene_questions, write_caption
from evaluate import DirectConfig, FloorConfig, PrismConfig, main, run
from reward.caprl import Answer
from tools.budgets import asked_once
from tools.caption_cache import _read_cache, read_captions
from tools.prism import prism
from tools.published import PUBLISHED, judge_name
from tools.report.captions import browser_data
from tools.report.sources import load_sources
from tools.stats import summarize
from tools.tables import keep_thumbnails, report
from tools.thumbnails import thumbnail_file

TOY = dict(verifier="data/toy/verifier", max_new_tokens=96)


def tsv(path: Path, rows: list[dict]) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(buffer, "png")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", "image", *(key for key in rows[0])], delimiter="\t")
        writer.writeheader()
        for n, cells in enumerate(rows):
            writer.writerow({"index": n, "image": "0" if n else base64.b64encode(buffer.getvalue()).decode()} | cells)
    return path


def test_a_disk_that_fills_after_the_tables_is_named_and_they_stay(tmp_path, monkeypatch, capsys):
    """The thumbnails of an evaluation come last."""
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tools.tables.keep_thumbnail", full)
    out = tmp_path / "p.jsonl"
    with pytest.raises(OSError) as error:
        main(["floor", "--verifier", "data/toy/verifier", "--data", "toy:heldout:2", "--out", str(out)])
    assert error.value.filename == str(out) and out.with_suffix(".md").exists() and out.with_suffix(".json").exists()
    assert "toy:heldout:2" in capsys.readouterr().out


def test_an_evaluation_that_could_measure_nothing_fails_when_all_is_written(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    row = {"id": "a", "image": "a.png", "questions": [{"question": "Q?", "choices": ["yes", "no"], "answer_index": 0}]}
    (tmp_path / "qa.jsonl").write_text(json.dumps(row))
    data, out = f"{tmp_path}/qa.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"qa.*, data/toy/policy, looking: expected at least one .*none of 1 \(.*a.png"):
        main(["direct", "--policy", "data/toy/policy", "--data", data, "--out", str(out)])
    [written] = map(json.loads, out.read_text().splitlines())
    assert written["questions"][0]["score"] is None and out.with_suffix(".md").exists() and out.with_suffix(".json").exists()


def test_prism_caches_and_reproduces_exactly(tmp_path, monkeypatch):
    """The mean over 2 captions is the same from the cache, where no captioner runs, and from the written file."""
    config = PrismConfig(data=("toy:heldout:4",), policy=("data/toy/policy",), num_captions=2, out=str(tmp_path / "p.jsonl"),
                         cache=str(tmp_path / "cache"), **TOY)
    benchmarks, by_captioner = run(config)
    (rows,) = by_captioner.values()
    keep_thumbnails(tmp_path / "p.jsonl", benchmarks)
    assert len(rows) == 8 and [r["id"] for r in rows[::2]] == [f"heldout-00000{n}" for n in range(4)]
    for r in rows:
        assert r["accuracy"] == pytest.approx(
            sum(q["chosen"] == q["gold"] for q in r["questions"]) / len(r["questions"])
        )
    with monkeypatch.context() as patched:
        patched.setattr(tools.caption_cache, "caption_batches", lambda *a, **k: iter(()))
        (again,) = run(PrismConfig(**{**vars(config), "out": ""}))[1].values()
    assert again == rows
    (read,) = run(PrismConfig(data=("toy:heldout:4",), captions=(str(tmp_path / "p.jsonl"),), cache="", **TOY))[
        1
    ].values()
    assert [r["accuracy"] for r in read] == [r["accuracy"] for r in rows] and [r["tokens"] for r in read] == [
        r["tokens"] for r in rows]
    written = read_log(tmp_path / "p.jsonl")
    assert [r["accuracy"] for r in written] == [r["accuracy"] for r in rows]
    assert written[0]["benchmark"] == "toy:heldout:4"
    # Thumbnails lie beside the file under its name: not among other files', whose images may have the same ids.
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "p.thumbnails", "cache"}
    assert all(thumbnail_file(tmp_path / "p.jsonl", r["id"]).is_file() for r in rows)
    assert len(browser_data(load_sources(tmp_path / "p.jsonl"), 1e9)["pictures"]) == 4
    with pytest.raises(ValueError, match="p.jsonl: expected nothing there yet, found an earlier evaluation's"):
        run(config)
    one = PrismConfig(**{**vars(config), "out": "", "num_captions": 3, "limit": 1})  # what is not there yet is written
    assert [r["caption"] for r in next(iter(run(one)[1].values()))][:2] == [r["caption"] for r in rows[:2]]


@pytest.mark.parametrize("taken", ["o.jsonl", "o.md", "o.json", "o.thumbnails"])
def test_nothing_of_an_earlier_evaluation_becomes_part_of_a_new_one(tmp_path, taken):
    """Its thumbnails did: the page of a new data set with the same ids had the old one's pictures."""
    (tmp_path / taken).mkdir()
    with pytest.raises(ValueError, match=f"{taken}: expected nothing there yet, found an earlier evaluation's"):
        run(FloorConfig(data=("toy:heldout:2",), out=f"{tmp_path}/o.jsonl", verifier="data/toy/verifier"))


def test_several_captioners_and_floors_in_one_call(tmp_path, capsys):
    """True captions beat wrong ones beat none, in one table with paired differences."""
    scenes = [make_scene("heldout", n) for n in range(6)]
    for name, part in (("dense", 1.0), ("half", 0.5)):
        lines = [json.dumps({"id": s.id, "caption": write_caption(s.family, s.facts[: round(len(s.facts) * part)])})
                 for s in scenes]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    main(["prism", "--captions", f"dense={tmp_path}/dense.jsonl", f"half={tmp_path}/half.jsonl", "--floors", "--verifier",
          "data/toy/verifier", "--data", "toy:heldout:6", "--out", str(tmp_path / "t.jsonl")])
    printed = capsys.readouterr().out
    found = {
        t["captioner"]: t["families"]["all"]["accuracy"]
        for t in json.loads((tmp_path / "t.json").read_text())["tables"]
    }
    assert list(found) == ["dense", "half", "dense, another image's", "half, another image's", "no caption"]
    assert found["dense"] > found["half"] > found["no caption"] and found["dense"] > found["dense, another image's"]
    assert "| toy:heldout:6 | half | dense |" in printed and (tmp_path / "t.md").read_text() in printed + "\n"
    floors = run(FloorConfig(data=("toy:heldout:2",), verifier="data/toy/verifier"))[1]
    assert list(floors) == [("toy:heldout:2", "no caption")]


def test_scores_by_budget_of_words(tmp_path, capsys):
    """A caption of two facts a sentence loses what is behind the cut, at any budget less than a longer one leaves."""
    scenes = [make_scene("heldout", n) for n in range(4)]
    lines = [json.dumps({"id": s.id, "caption": write_caption(s.family, s.facts), "tokens": 9, "finish_reason": "stop"})
             for s in scenes]
    (tmp_path / "dense.jsonl").write_text("\n".join(lines) + "\n")
    main(["prism", "--captions", f"dense={tmp_path}/dense.jsonl", "--max-words", "8", "20", "400", "--verifier",
          "data/toy/verifier", "--data", "toy:heldout:4", "--floors", "--out", str(tmp_path / "t.jsonl")])
    tables = {t["captioner"]: t["families"]["all"] for t in json.loads((tmp_path / "t.json").read_text())["tables"]}
    names = ["dense", "dense, 8 words", "dense, 20 words", "dense, 400 words"]
    assert list(tables) == [*names, *(f"{name}, another image's" for name in names), "no caption"]
    assert tables["dense"] == tables["dense, 400 words"]
    scores = [tables[name]["accuracy"] for name in names]
    assert scores[1] < scores[2] < scores[0]
    assert tables["dense, 8 words"]["words"] <= 8 < tables["dense, 20 words"]["words"] <= 20
    cells = [f"{tables[name]['accuracy']:.3f} ({tables[name]['words']:.1f})" for name in (*names[1:], names[0])]
    printed = capsys.readouterr().out
    assert f"| toy:heldout:4 | dense | {' | '.join(cells)} |" in printed and "all |\n" in printed
    rows = read_log(tmp_path / "t.jsonl")
    assert "tokens" in rows[0] and "tokens" not in rows[4] and rows[0]["caption"].startswith(rows[4]["caption"])
    main(["floor", "--captions", f"dense={tmp_path}/dense.jsonl", "--max-words", "8", "--verifier", "data/toy/verifier",
          "--data", "toy:heldout:4"])
    printed = capsys.readouterr().out
    assert "dense, 8 words, another image's" in printed and "Score by budget" not in printed  # of the captions: none asked


def test_a_caption_within_several_budgets_is_asked_about_once():
    """Also where it comes twice in a call. Another stream of replies, and other questions, are other questions."""
    calls = []

    def count(captions, asked, names):
        calls.append(list(zip(captions, asked, names)))
        return [[(caption, one, name) for one in group] for caption, group, name in calls[-1]]

    ask = asked_once(count)
    assert ask(["a", "b", "a"], [[1, 2], [1], [1, 2]], ["x", "y", "x"]) == [
        [("a", 1, "x"), ("a", 2, "x")], [("b", 1, "y")], [("a", 1, "x"), ("a", 2, "x")]]
    assert ask(["b", "a", "a"], [[1], [1, 2], [1]], ["y", "z", "x"]) == [
        [("b", 1, "y")], [("a", 1, "z"), ("a", 2, "z")], [("a", 1, "x")]]
    assert ask(["b"], [[1]], ["y"]) == [[("b", 1, "y")]] and [len(call) for call in calls] == [2, 2]


def test_free_answers_and_the_model_that_looks(tmp_path, capsys):
    """Words are generated, read and scored through the whole program; toy models know none of it
    and earn about nothing."""
    path = tsv(tmp_path / "c.tsv", [{"question": "Which color?", "answer": "red", "split": "x"},
                                    {"question": "How many?", "answer": "3", "split": "y"}])
    (tmp_path / "captions.jsonl").write_text('{"id": "0", "caption": "The circle is red."}\n')
    main(["prism", "--captions", f"{tmp_path}/captions.jsonl", "--verifier", "data/toy/verifier", "--data", f"chartqa:{path}",
          "--out", str(tmp_path / "o.jsonl"), "--answer-tokens", "4"])
    printed = capsys.readouterr().out
    assert ("| chartqa | CapRL-3B | 80.5 | release's | internlm/CapRL-Eval-3B | arXiv 2509.22647, Table 3 | "
            "benchmark (CapRL's own file), judge, metric |") in printed
    assert f"| chartqa | {tmp_path}/captions.jsonl | 0.0 | score | data/toy/verifier | this run |  |" in printed
    (line,) = (tmp_path / "o.jsonl").read_text().splitlines()
    questions = json.loads(line)["questions"]
    assert [q["answers"] for q in questions] == [["red"], ["3"]] and all("reply" in q for q in questions)
    config = DirectConfig(data=(f"chartqa:{path}", "toy:heldout:2"), policy=("data/toy/policy",), answer_tokens=4)
    benchmarks, found = run(config)
    assert [len(rows) for rows in found.values()] == [1, 2]
    rows = found["toy:heldout:2", "data/toy/policy, looking"]
    assert all(q["reply"] or q["unparsed"] for r in rows for q in r["questions"]) and rows[0]["caption"] == ""
    tables = {key: summarize(rows) for key, rows in found.items()}
    assert "| chartqa | CapRL-3B | 80.5 |" in report(benchmarks, found, tables)


def test_captions_from_a_file_must_cover_the_data(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "heldout-000000", "caption": "x"}\n')
    with pytest.raises(ValueError, match="found none of 1, first 'heldout-000001'; its captions are of 'heldout-000000'"):
        run(PrismConfig(data=("toy:heldout:2",), captions=(str(path),), **TOY))
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match="c.jsonl line 1: expected an object with id and caption, got"):
        run(PrismConfig(data=("toy:heldout:2",), captions=(str(path),), **TOY))


@pytest.mark.parametrize("config", [
    PrismConfig(data=("toy:heldout:2",), policy=("data/toy/policy", "a/typo/here"), **TOY),
    PrismConfig(data=("toy:heldout:2",), policy=("data/toy/policy",), **TOY | {"verifier": "a/typo/here"}),
    DirectConfig(data=("toy:heldout:2",), policy=("data/toy/policy", "a/typo/here")),
])
def test_a_mistyped_model_is_named_before_any_model_runs(monkeypatch, config):
    for module, name in ((evaluate, "load_policy"), (tools.caption_cache, "load_policy"), (evaluate, "verifier_of")):
        monkeypatch.setattr(module, name, lambda *args, **settings: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="a/typo/here: expected a model's folder or a hub name, found no such folder"):
        run(config)


def test_the_cache_is_no_folder_that_the_readme_gives_to_other_programs():
    assert PrismConfig(policy=("x",)).cache not in Path("README.md").read_text()


def test_captions_of_a_folder_of_shards(tmp_path):
    """As caption.py leaves them; an image that could not be opened keeps its reason."""
    (tmp_path / "about.json").write_text('{"shards": 2}')
    (tmp_path / "shard-000000.jsonl").write_text('{"id": "b", "error": "broken", "model": "m"}\n')
    pictures = [Picture(id, Path("x.png"), ()) for id in ("a", "b")]
    with pytest.raises(ValueError, match="expected 2 finished shards, found 1"):
        read_captions(str(tmp_path), pictures)
    (tmp_path / "shard-000001.jsonl").write_text('{"id": "a", "caption": "x", "tokens": 2, "finish_reason": "stop"}\n')
    assert read_captions(str(tmp_path), pictures) == [
        [{"caption": "x", "tokens": 2, "finish_reason": "stop"}], [{"error": "broken"}]
    ]


def one_question_a_row(folder: Path, order: int = 1) -> Path:
    """Two pictures in five rows, as files of VQA have it; of one picture there is a copy under another name."""
    for name, index in (("a.png", 0), ("copy.png", 0), ("b.png", 1)):
        draw(make_scene("heldout", index)).save(folder / name)
    rows = []
    for number, name in enumerate(("a.png", "b.png", "copy.png", "a.png", "b.png")):
        questions = scene_questions(make_scene("heldout", int(name == "b.png")))
        rows.append(
            {"id": f"q{number}", "image": name, "family": "all", "questions": [question_row(questions[number])]}
        )
    path = folder / "vqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::order]))
    return path


def test_a_picture_in_many_rows_is_one_picture(tmp_path, capsys):
    """Its captions are written once, another image's are never its own, and intervals are over pictures."""
    data = str(one_question_a_row(tmp_path))
    config = PrismConfig(data=(data,), policy=("data/toy/policy",), floors=True, num_captions=1, cache="", **TOY)
    found = run(config)[1]
    assert "5 rows show 2 pictures" in capsys.readouterr().err
    own, other = found["vqa", "data/toy/policy"], found["vqa", "data/toy/policy, another image's"]
    assert [(row["id"], len(row["questions"])) for row in own] == [("q0", 3), ("q1", 2)]
    assert [row["caption"] for row in other] == [row["caption"] for row in own][::-1]
    assert summarize(own)["all"]["images"] == 2 and summarize(own)["all"]["questions"] == 5
    with pytest.raises(ValueError, match="floor: expected at least 2 images"):  # before any model is loaded
        run(replace(config, limit=1, policy=("data/toy/verifier",)))


def test_captions_may_be_one_object_from_ids_to_captions(tmp_path):
    """Also one that is written over several lines, with a byte order mark, and of one picture only."""
    pictures = [Picture(id, tmp_path / "x", ()) for id in "ab"]
    path = tmp_path / "c.json"
    given = {"a": "One.", "b": ["Two.", {"caption": "Three.", "tokens": 2, "error": None}], "c": "None's."}
    for indent, mark in ((None, ""), (1, "\ufeff")):
        path.write_text(mark + json.dumps(given, indent=indent))
        assert read_captions(str(path), pictures) == [
            [{"caption": "One."}], [{"caption": "Two."}, {"caption": "Three.", "tokens": 2}]
        ]
    path.write_text(json.dumps({"a": "One."}))
    assert read_captions(str(path), pictures[:1]) == [[{"caption": "One."}]]
    path.write_text('{\n "a": "One.",\n "a": "Two."\n}')
    with pytest.raises(ValueError, match="c.json: expected an object .*'a'.* twice"):
        read_captions(str(path), pictures[:1])
    path.write_text(json.dumps({"a": 3}))
    with pytest.raises(ValueError, match="c.json, the object's 'a': expected an object with id and caption"):
        read_captions(str(path), pictures[:1])


def test_null_in_captions_is_absent_and_half_a_surrogate_pair_is_named(tmp_path):
    """A null error was one, and the caption beside it was lost."""
    pictures, path = [Picture("a", tmp_path / "x", ())], tmp_path / "c.jsonl"
    path.write_text("\ufeff" + json.dumps({"id": "a", "caption": "x", "error": None, "tokens": None}) + "\n")
    assert read_captions(str(path), pictures) == [[{"caption": "x"}]]
    for text in (json.dumps({"id": "a", "caption": "x\ud83d"}), json.dumps({"a": "x\ud83d"})):
        path.write_text(text + "\n")
        with pytest.raises(ValueError, match="c.jsonl.* got half a surrogate pair"):
            read_captions(str(path), pictures)


def test_captions_of_two_images_under_one_id_are_refused(tmp_path):
    """Two parquet files with ids from 0 each: a picture was scored by the other's caption too."""
    pictures, path = [Picture("0", tmp_path / "x", ())], tmp_path / "c.jsonl"
    rows = [{"id": "0", "caption": f"{n}", "image": f"p{n}.parquet row 0"} for n in (0, 0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="c.jsonl line 3: expected one image of id '0', found 'p0.parquet row 0' and 'p1"):
        read_captions(str(path), pictures)
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows[:2], {"id": "0", "caption": "c"})))
    assert len(read_captions(str(path), pictures)[0]) == 3


@pytest.mark.parametrize(("row", "reason"), [
    ({"error": ""}, "c.jsonl line 1: expected an object with id and caption, got"),
    ({"error": 5}, "c.jsonl line 1: expected an object with id and error, got"),
    ({"error": "broken", "caption": 5}, "c.jsonl line 1: expected an object with id and error, got"),
    ({"caption": "x", "tokens": "5"}, "c.jsonl line 1: expected a number of tokens, got '5'"),
    ({"caption": "x", "tokens": True}, "c.jsonl line 1: expected a number of tokens, got True"),
])
def test_a_row_of_captions_that_is_none_is_named_before_anything_is_asked(tmp_path, row, reason):
    """An empty error was scored 0, and a text for `tokens` ended the program when all was answered."""
    pictures, path = [Picture("a", tmp_path / "x", ())], tmp_path / "c.jsonl"
    path.write_text(json.dumps({"id": "a"} | row) + "\n")
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_captions(str(path), pictures)
    path.write_text(json.dumps({"id": "a", "caption": "x", "error": ""}) + "\n")
    assert read_captions(str(path), pictures) == [[{"caption": "x"}]]


@pytest.mark.parametrize(("change", "reason"), [
    ({"k": None}, "row 2: expected a number k, got {'image'"),
    ({"k": "0"}, "row 2: expected a number k, got {'image'"),
    ({"caption": None}, "row 2: expected an object with image and caption, got"),
    ({"image": None}, "row 2: expected an object with image and caption, got"),
    ({"tokens": "5"}, "row 2: expected a number of tokens, got '5'"),
    ({"caption": "x\ud83d"}, "row 2, got half a surrogate pair"),
])
def test_a_row_of_the_cache_that_is_none_is_named(tmp_path, change, reason):
    """Each ended the evaluation with a traceback, some of them when all was answered. An empty file had only errors."""
    row = {"image": "a", "k": 0, "caption": "x", "tokens": 2, "finish_reason": "stop"}
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"k": 1}) + "\n")
    kept = {key: row[key] for key in ("caption", "tokens", "finish_reason")}
    assert _read_cache(tmp_path) == {("a", 0): kept, ("a", 1): kept}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/c.jsonl {reason}")):
        _read_cache(tmp_path)


def test_captions_are_found_by_the_ids_of_all_rows_of_a_picture(tmp_path):
    [a, b] = load_benchmark(str(one_question_a_row(tmp_path))).pictures
    assert (a.id, a.other_ids, b.id, b.other_ids) == ("q0", ("q2", "q3"), "q1", ("q4",))
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps({"id": id, "caption": id}) + "\n" for id in ("q4", "q3", "q0")))
    assert read_captions(str(path), [a, b]) == [[{"caption": "q0"}, {"caption": "q3"}], [{"caption": "q4"}]]
    table = tsv(tmp_path / "c.tsv", [{"question": "Q?", "answer": "red"}, {"question": "R?", "answer": "blue"}])
    assert [(one.id, one.other_ids) for one in load_benchmark(f"exact:{table}").pictures] == [("0", ("1",))]


def test_two_evaluations_at_once_do_not_share_a_file(tmp_path, monkeypatch):
    """Both found no file at their start, and every row was there twice."""
    out = tmp_path / "o.jsonl"

    def load_meanwhile(*arguments):
        out.write_text("{}\n")
        return load_benchmarks(*arguments)

    monkeypatch.setattr(evaluate, "load_benchmarks", load_meanwhile)
    config = FloorConfig(data=("toy:heldout:2",), out=str(out), verifier="data/toy/verifier")
    with pytest.raises(ValueError, match="o.jsonl: expected a new file, found another evaluation's"):
        run(config)
    assert out.read_text() == "{}\n" and [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]


def test_what_is_evaluated_is_named_once():
    for settings in (dict(data=("a", "a")), dict(policy=("a", "b", "a"))):
        with pytest.raises(ValueError, match="each once, got \\('a'"):
            DirectConfig(**settings)


@pytest.mark.parametrize(("settings", "reason"), [
    (dict(), "expected captioners in policy or captions, got neither"),
    (dict(policy=("a", "a")), "expected captioners of different names"),
    (dict(policy=("a",), data=()), "expected at least one benchmark"),
    (dict(policy=("a",), num_captions=0), "num_captions 0: expected at least 1"),
    (dict(policy=("a",), max_words=(0, 100)), "max_words .*: expected different numbers of words, each at least 1"),
    (dict(policy=("a",), max_words=(100, 100)), "max_words .*: expected different numbers of words, each at least 1"),
    (dict(policy=("a",), verifier_temperature=0.0), "verifier_temperature 0.0: expected more than 0"),
])
def test_settings_that_do_not_fit(settings, reason):
    with pytest.raises(ValueError, match=reason):
        PrismConfig(**settings)


def test_a_judge_that_is_not_named_and_a_benchmark_of_captions():
    assert PrismConfig(policy=("a",), data=("captionqa:x",)).verifier == "Qwen/Qwen2.5-72B-Instruct"
    assert PrismConfig(policy=("a",), data=("captionqa:x",), verifier="b").verifier == "b"
    assert PrismConfig(policy=("a",)).verifier == "Qwen/Qwen2.5-3B-Instruct"
    with pytest.raises(ValueError, match="capeval: its items are on captions, expected prism or floor"):
        DirectConfig(data=("capeval:checklist.jsonl",))


def test_refused_rows_are_told(tmp_path, capsys):
    path = tsv(tmp_path / "c.tsv", [{"question": "Q?", "answer": "red"}, {"question": "Q?", "answer": ""}])
    main(["floor", "--verifier", "data/toy/verifier", "--data", f"exact:{path}", "--answer-tokens", "1", "--out",
          str(tmp_path / "o.jsonl")])
    assert "exact: 1 rows or questions refused, the first: " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "o.json").read_text())["refused"]["exact"]) == 1
    assert load_benchmark(f"exact:{path}").metric == "exact"


def test_a_prompt_for_answers_in_words_is_read_first_and_handed_on(tmp_path, monkeypatch):
    path, file = tsv(tmp_path / "c.tsv", [{"question": "Q?", "answer": "red"}]), tmp_path / "prompt.txt"
    prompts, make = [], evaluate.word_answerer
    monkeypatch.setattr(evaluate, "word_answerer", lambda *args: prompts.append(args[-1]) or make(*args))
    config = partial(FloorConfig, verifier="data/toy/verifier", data=(f"exact:{path}",), answer_tokens=1)
    with pytest.raises(ValueError, match=r"prompt.txt: expected a text file with a prompt"):
        run(config(words_prompt=str(file), verifier="data/toy/none"))
    file.write_text("[CAPTION] [QUESTION]\n")
    for words_prompt in (str(file), ""):
        run(config(words_prompt=words_prompt))
    assert prompts == ["[CAPTION] [QUESTION]", ""]


def own_file(folder: Path, answers: list[str]) -> Path:
    """A file as CapRL's own are: a question of a chart in each row."""
    Image.new("RGB", (56, 56), "red").save(folder / "a.png")
    rows = [{"image": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "answer": answer,
             "prompt": f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Number {n}?<|im_end|>\n"}
            for n, answer in enumerate(answers)]
    (folder / "lmm_eval_chartqa.json").write_text(json.dumps(rows))
    return folder / "lmm_eval_chartqa.json"


def told_rows(benchmark, replies: list[str], num_captions: int) -> list[dict]:
    def write(captions, asked, names):
        return [[Answer(None, reply=reply or "", failure="" if reply else "late") for reply in replies] for _ in captions]
    return prism(benchmark, [[{"caption": "x"}] * num_captions], write, 0, write)


@pytest.mark.parametrize(("change", "last"), [
    ({}, "same"),
    ({"judge": "CapRL-Eval-3B"}, "same"),
    ({"judge": "Qwen/Qwen2.5-3B-Instruct"}, "judge"),
    ({"num_captions": 1}, "metric (mean over 4 captions)"),
    ({"limit": 5}, "benchmark (a part of it here)"),
    ({"answers": ["10", "20", ""], "judge": "x"}, "benchmark (a part of it here), judge"),
    ({"replies": ["1000", None], "own": "100.0"}, "benchmark (a part of it here)"),
])
def test_published_scores_are_the_same_only_where_benchmark_judge_and_metric_are(tmp_path, change, last):
    """By hand: 1000 for 10 is right by the release's script, 25 for 20 is not: 50%, where our own metric gives 0."""
    benchmark = load_benchmark(f"chartqa:{own_file(tmp_path, change.get('answers', ['10', '20']))}")
    rows = {("chartqa", "ours"): told_rows(benchmark, change.get("replies", ["1000", "25"]), change.get("num_captions", 4))}
    tables = {key: summarize(group) for key, group in rows.items()}
    judge = change.get("judge", "internlm/CapRL-Eval-3B")
    text = report([benchmark], rows, tables, SimpleNamespace(verifier=judge, limit=change.get("limit", 0)))
    assert f"| chartqa | ours | {change.get('own', '50.0')} | release's | {judge} | this run |  |" in text
    row = "| chartqa | CapRL-3B | 80.5 | release's | internlm/CapRL-Eval-3B | arXiv 2509.22647, Table 3 |"
    assert f"{row} {last} |" in text and tables["chartqa", "ours"]["all"]["accuracy"] == 0


@pytest.mark.parametrize(("kind", "row"), [
    ("captionqa", "| captionqa | Qwen2.5-VL-7B | 75.31 | score | Qwen/Qwen2.5-72B-Instruct | captionqa.github.io, 19 November "
                  "2025 | benchmark (all 33,027 questions, of which a part is public) |"),
    ("captionqa", "| captionqa | CapRL-3B | 82.6 | score |  | arXiv 2605.07394 | benchmark (not known which questions), judge "
                  "(not known) |"),
    ("capeval", "| capeval | Qwen3-VL-8B | 83.5 | precision | Qwen/Qwen2.5-72B-Instruct | github liuzhipenggg/CAPEval, "
                "leaderboard of 30 July 2026 | same |"),
    ("capeval", "| capeval | ours | 100.0 | completeness | Qwen/Qwen2.5-72B-Instruct | this run |  |"),
])
def test_what_is_not_known_of_a_published_score_is_said(kind, row):
    items = (Item("a:0", Question("Q?", ("yes", "no", "says nothing"), 0)),)
    benchmark = Benchmark(kind, kind, "choice", [Picture("a", Path("a.png"), items)], [])

    def choose(captions, asked, names):
        return [[Answer(one.gold) for one in group] for group in asked]

    rows = {(kind, "ours"): prism(benchmark, [[{"caption": "x"}]], choose)}
    tables = {key: summarize(group) for key, group in rows.items()}
    assert row in report([benchmark], rows, tables, SimpleNamespace(verifier="Qwen/Qwen2.5-72B-Instruct"))


def test_published_tables_have_a_score_for_each_column():
    for table in PUBLISHED:
        assert all(len(scores) == len(table.columns) for scores in table.scores.values()), table.source
        assert all(kind in KINDS and 0 < score < 100 for scores in table.scores.values()
                   for (kind, _), score in zip(table.columns, scores, strict=True))
    settings = PrismConfig(policy=("x",), verifier="http://a:1/v1", verifier_name="Judge=folder")
    assert judge_name(settings) == "Judge" and judge_name(DirectConfig()) == "none, it looks"
    assert judge_name(PrismConfig(policy=("x",))) == "Qwen/Qwen2.5-3B-Instruct"
