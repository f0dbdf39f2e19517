"""The report page: its numbers by hand, its text without a browser, and the whole of it in one,
where one is installed."""

import base64
import csv
import json
import math
import random
import re
import shutil
import zlib
from contextlib import contextmanager
from html import unescape
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data.benchmarks.benchmark import Benchmark, Picture
from data.benchmarks.questions import Item
from data.examples import Question
from data.jsonl import read_log
from grpo.log import log_step
from grpo.recipes import toy_config
from grpo.run_dir import start_run
from reward.caprl import Answer
from tools.prism import prism
from tools.report.captions import (
    browser_data,
    number_questions,
    outcome,
    pack_side,
    pages_of,
    side_index,
)
from tools.report.curves import axis_numbers, draw_panel, hours, panels, ticks
from tools.report.page import (
    PageConfig,
    evaluation_table,
    main,
    question_table,
    shown_sources,
    write_page,
)
from tools.report.sources import HELD_OUT, Source, evenly, load_sources
from tools.settings import nearest_preset
from tools.stats import paired_difference, summarize
from tools.thumbnails import keep_thumbnail

# ------------------------------------------------------------------------------------- made-up runs

HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> "
    "'q' \"Q\" שלום &amp; {{7*7}}"
)


def asked(question: str = "What color?", chosen: int | None = 0, gold: int = 0, **changes) -> dict:
    one = {"question": question, "options": ["red", "blue"], "gold": gold, "abstain": None, "source": 0, "chosen": chosen,
           "correct": chosen == gold, "score": float(chosen == gold), "probs": [0.75, 0.25], "reply": "", "failure": ""}
    return one | changes


def caption_row(id: str, caption: str = "It is red.", reward: float | None = 1.0, **changes) -> dict:
    row = {"id": id, "family": "a", "caption": caption, "length": 4, "truncated": False, "reward": reward,
           "parts": {"accuracy": reward}, "advantage": 0.0, "questions": [asked()]}
    return row | changes


def made_run(run_dir: Path, steps: list[list[dict]], **changes) -> Path:
    start_run(run_dir, toy_config(run_dir=str(run_dir), **changes).flat())
    for step, rows in enumerate(steps):
        log_step(run_dir, step, {"reward": step / 10, "accuracy": 0.5, "kl": math.nan}, {}, {"seconds": 1.0}, rows)
    return run_dir


def evaluation(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------ numbers


def test_evenly_spaced_places():
    assert evenly(9, 3) == [0, 4, 8] and evenly(4, 9) == [0, 1, 2, 3] and evenly(5, 1) == [4] and evenly(0, 5) == []
    for count in range(2, 40):
        for at_most in range(2, count + 1):
            places = evenly(count, at_most)
            assert len(set(places)) == at_most and places[0] == 0 and places[-1] == count - 1
            assert places == sorted(places)


@pytest.mark.parametrize(
    "low, high, want",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.42, 0.71, [0.4, 0.5, 0.6, 0.7, 0.8]), (-3, 47, [-10, 0, 10, 20, 30, 40, 50]),
     (1, 1, [0.9, 0.95, 1, 1.05, 1.1]), (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (2e-9, 9e-9, [2e-9, 4e-9, 6e-9, 8e-9, 1e-8])],
)
def test_ticks_are_round_and_cover(low, high, want):
    assert ticks(low, high) == pytest.approx(want)


def test_ticks_cover_whatever_comes():
    rng = random.Random(0)
    for _ in range(500):
        low, high = sorted(rng.gauss(0, 1) * 10 ** rng.uniform(-8, 8) for _ in range(2))
        found = ticks(low, high)
        assert 2 <= len(found) <= 8 and found[0] <= low + 1e-6 * (high - low)
        assert found[-1] >= high - 1e-6 * (high - low)


@pytest.mark.parametrize("values, labels, power", [
    ([0, 0.5, 1], ["0", "0.5", "1"], 0), ([0.9, 0.95, 1, 1.05], ["0.9", "0.95", "1", "1.05"], 0),
    ([1.065e-5, 1.07e-5, 1.075e-5], ["1.065", "1.07", "1.075"], -5), ([-2e-8, 0, 2e-8], ["-2", "0", "2"], -8),
    ([999.5, 1000, 1000.5], ["999.5", "1000", "1000.5"], 0), ([114000, 116000], ["114000", "116000"], 0),
    ([-1234500, -1234000], ["-1.2345", "-1.234"], 6), ([-0.1, -0.1 + 0.1, 0.1], ["-0.1", "0", "0.1"], 0),
    ([-20, -20 * 1e-18, 20], ["-20", "0", "20"], 0), ([98, 100, 102], ["98", "100", "102"], 0),
])
def test_labels_of_an_axis_by_hand(values, labels, power):
    assert axis_numbers(values) == (labels, power)


def test_labels_of_an_axis_differ_say_their_value_and_are_short():
    rng = random.Random(0)
    for _ in range(2000):
        low = rng.gauss(0, 1) * 10 ** rng.uniform(-12, 12)
        high = low + abs(low) * 10 ** rng.uniform(-9, 3)
        places = ticks(low, high)
        labels, power = axis_numbers(places)
        assert len(set(labels)) == len(labels) == len(places) and max(map(len, labels)) <= 7
        step = places[1] - places[0]
        assert all(abs(float(label) * 10.0**power - place) < 1e-3 * step for label, place in zip(labels, places))


def test_nearly_equal_values_are_a_nearly_flat_line():
    """Of 0.97312 and 0.97315 a thousandth is shown: 0.0010 about their middle, in steps of 0.0002."""
    assert ticks(0.97312, 0.97315) == pytest.approx([0.9726 + 0.0002 * i for i in range(7)])
    values = {0: 1.067e-5, 1: 1.072e-5}
    panel = draw_panel("small", "s", [], [{"label": "a", "source": 0, "values": values}], [{}], [[0, 1e-8, 2e-8]])
    assert panel["unit"] == "\u00d7 1e-5 s" and [label for _, label in panel["y_ticks"]] == ["1.066", "1.068", "1.07", "1.072"]


def test_a_curve_by_hand():
    """Steps 0 to 10 lie between x = 52 and 352, values 0 to 1 between y = 156 and 10; a gap where
    nothing was measured."""
    lines = [{"label": "a", "source": 0, "values": {0: 0.0, 5: 0.5, 6: None, 10: 1.0}}]
    band = {0: (0.0, 0.2), 10: (0.8, 1.0)}
    panel = draw_panel("title", "share", [], lines, [band], [[step / 5 for step in range(11)]])
    assert panel["lines"][0]["runs"] == ["52.0,156.0 202.0,83.0"]
    assert panel["lines"][0]["dots"] == [["52.0", "156.0"], ["202.0", "83.0"], ["352.0", "10.0"]]
    assert panel["bands"] == [(0, "52.0,126.8 352.0,10.0 352.0,39.2 52.0,156.0")]
    assert panel["values"]["lines"] == [{"source": 0, "values": [0.0, 0.5, None, 1.0]}]
    # 10 steps of 1/5 h: 2 h, a tick each half hour
    assert panel["values"]["hours"] == [0, 2]
    assert panel["hour_ticks"] == [(52.0, "0"), (127.0, "0.5"), (202.0, "1"), (277.0, "1.5"), (352.0, "2")]
    assert panel["x_ticks"] == [(52.0 + 60 * i, str(2 * i)) for i in range(6)] and panel["y_ticks"][1] == (126.8, "0.2")
    assert panel["summary"] == "a from 0 to 1"


def test_the_band_of_the_accuracy_is_over_images(tmp_path):
    rows = [caption_row(id, questions=[asked(chosen=chosen), asked("Other?", chosen=0)]) for id, chosen in
            [("1", 0), ("1", 1), ("2", 1), ("2", 1)]]
    rows.append(caption_row("3", questions=[asked(correct=None)]))  # a judge's: nothing was answered
    [source] = load_sources(made_run(tmp_path / "run", [rows]))
    # image 1 has 3 of 4, image 2 has 2 of 4: a draw of the two is 0.75, 0.625 or 0.5, the outer
    # ones a quarter of the time
    assert source.bands["accuracy"] == {0: (0.5, 0.75)}


def test_hours_are_those_of_the_steps_before(tmp_path):
    """Seconds 3600, unknown, 7200: the unknown one counts as the median, 5400 s or 1.5 h."""
    seconds = {0: 3600.0, 1: None, 2: 7200.0}
    assert hours(Source("a", tmp_path, [], 3, series={"seconds": seconds})) == [0, 1, 2.5, 4.5]
    assert hours(Source("a", tmp_path, [], 3, series={"reward": {0: 1.0}})) == []


def test_what_is_measured_on_held_out_images_is_drawn_with_its_interval(tmp_path):
    run = made_run(tmp_path / "run", [[caption_row("1")]] * 3)
    rows = [{"step": 0, "accuracy": 0.25, "low": 0.0, "high": 0.5, "words": 3}, {"step": 2, "accuracy": None},
            {"step": 3, "accuracy": 0.75}]
    evaluation(run / "eval.jsonl", rows)
    [source] = load_sources(run)
    assert source.series[HELD_OUT] == {0: 0.25, 3: 0.75} and source.bands[HELD_OUT] == {0: (0.0, 0.5)}
    titles = [panel["title"] for panel in panels([source])]
    assert titles[:3] == ["reward and its parts", "held-out accuracy", "accuracy"]
    assert "held-out accuracy" not in [panel["title"] for panel in panels(load_sources(made_run(tmp_path / "b", [[]])))]


def test_what_is_not_in_the_list_is_drawn_all_the_same(tmp_path):
    """A reward of another file, and two runs: each metric on its own."""
    def source(name):
        keys = ("reward", "reward_recall", "reward_style", "seconds", "seconds_update", "new")
        series = {key: {0: 0.1, 1: 0.2} for key in keys}
        return Source(name, tmp_path, [], 2, {}, (), series | {"kl": {0: None}}, {})

    titles = {panel["title"]: [line["label"] for line in panel["lines"]] for panel in panels([source("a")])}
    assert titles == {"reward and its parts": ["reward", "reward_recall", "reward_style"], "new": ["new"],
                      "seconds by phase": ["seconds", "seconds_update"]}
    for panel in panels([source("a"), source("b")]):
        assert [line["label"] for line in panel["lines"]] == ["a", "b"]


def test_the_recipe_is_the_one_that_differs_least():
    assert nearest_preset(vars(toy_config(seed=3, num_steps=7))) == ("toy", {"num_steps": (7, 40), "seed": (3, 0)})
    assert nearest_preset({"policy": "Qwen/Qwen3-VL-4B-Instruct", "setting of another version": 1}) == (
        "caprl-plus",
        {},
    )


def test_a_question_stands_once_for_all_captions_that_it_was_put_to():
    rows = [
        caption_row("1", questions=[asked(), asked("Other?", chosen=1)]),
        caption_row("1", questions=[asked(chosen=1)]),
    ]
    numbers = number_questions([rows, None])
    assert numbers == {(0, "What color?"): 0, (0, "Other?"): 1}
    side = pack_side(rows, numbers)
    assert [(question["number"], question["question"]) for question in side["asked"]] == [(0, "What color?"), (1, "Other?")]
    assert [[(answer["place"], answer["chosen"], answer["score"]) for answer in caption["answers"]]
            for caption in side["captions"]] == [[(0, 0, 1.0), (1, 1, 0.0)], [(0, 1, 0.0)]]


@pytest.mark.parametrize("changes, letter", [
    ({"chosen": 0}, "r"), ({"chosen": 1}, "w"), ({"chosen": 1, "abstain": 1}, "a"), ({"chosen": 0, "abstain": 0}, "r"),
    ({"chosen": None}, "u"), ({"chosen": None, "failure": "too long"}, "f"), ({"gold": None, "score": 0.5}, "s"),
])
def test_the_outcome_of_a_question(changes, letter):
    assert outcome(asked(**changes)) == letter


def test_what_filters_look_at_by_hand():
    """Two questions, the second asked twice of the first caption and not of the second one."""
    rows = [
        caption_row("1", reward=0.5, advantage=1.23456, questions=[asked(), asked("B?", chosen=1), asked("B?")]),
        {"id": "1", "caption": "c", "accuracy": math.nan, "tokens": 9, "finish_reason": "length", "questions": [asked()]},
    ]
    side = side_index(rows, 3, number_questions([rows]))
    assert side == {"step": 3, "captions": [[0.5, 1.2346, 4, 0, "r wr"], [None, None, 9, 1, "r "]]}
    assert side_index(None, 3, {}) is None


def test_questions_have_one_number_on_both_sides(tmp_path):
    """The second run asked in another order: a question is found by what it says, and where from."""
    first = Source("a", tmp_path, [(0, [caption_row("x", questions=[asked("A?"), asked("B?")])])], config={})
    other = Source("b", tmp_path, [(0, [caption_row("x", questions=[asked("B?", chosen=1), asked("C?")])])], config={})
    data = browser_data([first, other], 1e9)
    [group] = data["index"]["pages"][0]["groups"]
    assert [data["index"]["questions"][place] for place in group["questions"]] == ["A?", "B?", "C?"]
    assert [side["captions"][0][4] for side in group["sides"]] == ["r r ", " w r"]


def test_more_than_two_runs_have_curves_and_the_first_two_captions(tmp_path):
    runs = [made_run(tmp_path / name, [[caption_row("x", f"of {name}")]] * 2) for name in "abcdefg"]
    page = write_page(*runs[:3])
    assert page.name == "report_with_b_with_c.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("<polyline points=\"0,4 26,4\"") == 3 * text.count("<figure")
    [chunk] = [content for attributes, content in scripts(text) if 'id="page-0"' in attributes]
    [sides] = json.loads(zlib.decompress(base64.b64decode(chunk)))
    assert [side["captions"][0]["text"] for side in sides] == ["of a", "of b"]
    with pytest.raises(ValueError, match=f"expected at most 6 runs, got 7: {runs[0]} and {runs[1]} and "):
        write_page(*runs)
    rows = evaluation(tmp_path / "rows.jsonl", [caption_row("x")])
    with pytest.raises(ValueError, match="expected one or two evaluations, got 3: "):
        write_page(rows, rows, rows)


def test_pictures_at_full_size_are_kept_up_to_a_size(tmp_path, capsys):
    """Of three pictures one is gone since; the others take 4/3 of their bytes each."""
    questions = [{"question": "Color?", "choices": ["red", "blue"], "answer_index": 0}]
    rows = [{"id": id, "image": f"{id}.png", "questions": questions} for id in "xyz"]
    data = evaluation(tmp_path / "set.jsonl", rows)
    for id in "xyz":
        Image.effect_noise((640, 480), 60).convert("RGB").save(tmp_path / f"{id}.png")
    run = made_run(tmp_path / "run", [[caption_row(id)] for id in "xyz"], data=str(data))
    sources = load_sources(run)
    assert browser_data(sources, 1e9)["full"] == []
    whole = browser_data(sources, 1e9, 1e9)
    assert whole["index"]["full"] == ["z", "y", "x"]  # the last step first
    content = base64.b64decode(whole["full"][0].removeprefix("data:image/webp;base64,"))
    assert Image.open(BytesIO(content)).size == (640, 480)
    size = len(whole["full"][0])
    assert browser_data(sources, 1e9, 1.5 * size)["index"]["full"] == ["z"]
    (tmp_path / "z.png").write_bytes(b"no picture")
    assert browser_data(sources, 1e9, 1e9)["index"]["full"] == ["y", "x"]
    other = evaluation(tmp_path / "other.jsonl", [caption_row("x")])
    main([str(other), "--full-mb", "1", "--data", str(data)])
    assert "pictures at full size: 1 of 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="full_mb of an evaluation: expected --data, where its pictures are"):
        PageConfig(other, full_mb=1)
    data.unlink()
    main([str(run), "--full-mb", "1"])
    assert re.search(r"no pictures at full size: .*set.jsonl.*\nreport: ", capsys.readouterr().out)


def test_the_second_runs_captions_are_those_of_the_nearest_step(tmp_path):
    def source(steps):
        return Source("s", tmp_path, [(step, [caption_row(id, f"{id} at {step}")]) for step, id in steps], config={})

    pages = pages_of([source([(0, "x"), (9, "y")]), source([(0, "y"), (7, "y"), (5, "x")])])
    [x], [y] = pages["step 0"], pages["step 9"]
    assert (x.id, x.steps, x.sides[1][0]["caption"]) == ("x", [0, 5], "x at 5") and y.steps == [9, 7]
    [alone] = pages_of([source([(0, "x")]), source([(0, "z")])])["step 0"]
    assert alone.sides[1] is None


def test_tables_of_evaluations_by_hand(tmp_path):
    def rows(scores):
        return [
            {"id": str(place), "family": "ab"[place % 2], "caption": "two words",
             "questions": [asked(chosen=None if score is None else 0 if score >= 0.5 else 1, score=score),
                           asked(f"Only {place}?", chosen=None, source=1, score=None, correct=None)]}
            for place, score in enumerate(scores)
        ]

    [first] = load_sources(evaluation(tmp_path / "one.jsonl", rows([1.0, 0.0, 0.5, None])))
    [other] = load_sources(evaluation(tmp_path / "two.jsonl", rows([0.0, 0.5, 1.0, 0.5])))
    a, b, both = evaluation_table([first, other])
    assert (a["family"], b["family"], both["family"]) == ("a", "b", "all")
    assert [cell["accuracy"] for cell in a["cells"]] == [0.75, 0.5]  # images 0 and 2
    assert [cell["accuracy"] for cell in b["cells"]] == [0.0, 0.5]  # image 3 has none: no zero
    assert a["difference"]["difference"] == -0.25 and b["difference"]["questions"] == 1
    assert both["difference"]["difference"] == pytest.approx((-1 + 0.5 + 0.5) / 3)
    assert both["cells"][0]["words"] == 2 and both["cells"][0]["images"] == 3 and both["cells"][0]["unparsed"] == 0
    table = question_table([first, other])
    # "What color?" is right for images 0 and 2 of the first, for 1, 2 and 3 of the second
    assert len(table) == 1 and table[0]["question"] == "What color?" and table[0]["images"] == 4
    assert table[0]["shares"] == [0.5, 0.75] and table[0]["difference"] == 0.25


def test_the_page_says_what_the_tables_of_evaluate_say(tmp_path, capsys):
    """Images with 2, 3 and 4 questions of two families: a mean over images is another number than
    one over questions."""
    color, shape = Question("Color?", ("red", "blue"), 0), Question("Shape?", ("disc", "star"), 0)
    items = [Item(f"q{n}", color if n % 2 else shape, "ab"[n % 2]) for n in range(9)]
    parts = {"x": items[:2], "y": items[2:5], "z": items[5:]}
    pictures = [Picture(id, Image.new("RGB", (9, 9)), tuple(part)) for id, part in parts.items()]
    benchmark = Benchmark("b", "choice", "choice", pictures, [])

    def says(captions, asked_, names):  # what the caption says; one that is empty cannot be read
        return [[Answer(next((n for n, text in enumerate(one.options) if text in caption), None)) for one in group]
                for caption, group in zip(captions, asked_)]

    words = {"base": ["a red disc", "a red star", "a blue disc"], "ours": ["a red disc", "nothing", "a red disc"]}
    found = {name: prism(benchmark, [[{"caption": text}, {"caption": "a blue star"}] for text in texts], says)
             for name, texts in words.items()}
    path = evaluation(tmp_path / "two.jsonl", [
        {"benchmark": "b", "captioner": name} | row for name, rows in found.items() for row in rows
    ])
    tables = {name: summarize(rows) for name, rows in found.items()}
    # The second caption is always wrong, so that each question that the first one answers counts
    # 1/2: of x 2, of y 1 (its color), of z 2 (its shapes), in all 5/2 of 9. A mean over images
    # would be (2/4 + 1/6 + 2/8) / 3 = 0.306.
    assert tables["base"]["all"]["accuracy"] == pytest.approx(2.5 / 9)
    shown = {row["family"]: row for row in evaluation_table(load_sources(path))}
    assert list(shown) == ["a", "b", "all"]
    page = re.sub(r"<[^>]*>", "", write_page(path).read_text())
    for family, row in shown.items():
        unsaid = dict.fromkeys(("tokens", "cut"), pytest.approx(math.nan, nan_ok=True))
        assert row["cells"] == [table[family] | unsaid for table in tables.values()]
        for cell in row["cells"]:
            assert f"{cell['accuracy']:.3f} {cell['low']:.3f} to {cell['high']:.3f}" in page
    difference = paired_difference(found["base"], found["ours"])
    assert shown["all"]["difference"] == difference
    assert f"{difference['difference']:+.3f} {difference['low']:+.3f} to {difference['high']:+.3f}" in page


def test_one_evaluation_of_several_captioners_and_benchmarks_is_taken_apart(tmp_path):
    rows = [
        {"benchmark": benchmark, "captioner": captioner, "id": "0", "family": "all", "caption": "c", "accuracy": share,
         "questions": [asked(options=[], gold=None, chosen=None, reply="red", correct=None, score=share, unparsed=False)]}
        for captioner, share in (("base", 0.0), ("ours", 1.0), ("no caption", 0.5)) for benchmark in ("a", "b")
    ]
    path = evaluation(tmp_path / "table.jsonl", rows)
    sources = load_sources(path)
    assert [source.name for source in sources] == ["base", "ours", "no caption"]
    assert [group[0]["id"] for _, group in sources[0].groups] == ["a:0", "b:0"]
    table = evaluation_table(sources[:2])
    assert [row["family"] for row in table] == ["a all", "b all"]  # evaluate.py says nothing of both together
    assert [cell["accuracy"] for cell in table[1]["cells"]] == [0.0, 1.0]
    assert [cell["unparsed"] for cell in table[1]["cells"]] == [0, 0]  # answers in words choose no option
    text = write_page(path).read_text()
    assert "base and ours" in text
    assert "no caption and base" in write_page(path, captioners=["no caption", "base"]).read_text()
    with pytest.raises(ValueError, match=r"captioners: expected among \['base', 'ours', 'no caption'\], got 'x'"):
        write_page(path, captioners=["x"])
    again = tmp_path / "again.jsonl"
    again.write_bytes(path.read_bytes())
    both = shown_sources([path, again], ["ours"])  # it was that of the second file alone
    assert [(source.name, source.path) for source in both] == [(str(path), path), (str(again), again)]
    with pytest.raises(ValueError, match="captioners: expected one or two to show, found 4"):
        shown_sources([path, again], ["base", "ours"])


def test_pages_that_do_not_fit_are_left_out_evenly(tmp_path):
    noise = random.Random(0)
    steps = [
        [caption_row(f"i{step}", "".join(chr(noise.randrange(33, 9999)) for _ in range(2000)))]
        for step in range(9)
    ]
    [source] = load_sources(made_run(tmp_path / "run", steps))
    whole = browser_data([source], 1e9)
    assert whole["num_pages"] == len(whole["chunks"]) == 9
    size = sum(map(len, whole["chunks"]))
    some = browser_data([source], 0.4 * size)
    assert [page["title"] for page in some["index"]["pages"]] == ["step 0", "step 4", "step 8"]
    assert some["num_pages"] == 9
    assert len(browser_data([source], 1)["chunks"]) == 1  # the last is always there
    text = write_page(tmp_path / "run", max_mb=0.4 * size / 1e6).read_text()
    assert "3 of 9 steps are shown" in text


def test_a_copy_of_a_step_is_no_step(tmp_path):
    made_run(tmp_path / "run", [[caption_row("a")]])
    shutil.copy(tmp_path / "run/rollouts/step_000000.jsonl", tmp_path / "run/rollouts/step_000000 (copy).jsonl")
    [source] = load_sources(tmp_path / "run")
    assert [step for step, _ in source.groups] == [0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("NONE", "none: expected a run folder or a file of evaluate.py --out, found nothing"),
        ("EMPTY", "empty: expected a run folder with config.json of train.py, found none"),
        ("MODEL", "model: expected a run folder with config.json of train.py, found none"),
        ("HALF", "half row 2: expected a benchmark, as other rows have one, got ['caption', 'id', 'questions']"),
        ("BLANK", "blank: expected at least one row, found none"),
        ("NOCAPTION", "nocaption row 2: expected an id and a caption, got ['id']"),
        ("NOQUESTION", "noquestion row 1: expected questions as asked, got 'What?'"),
        ("BROKEN", "broken line 1: expected a JSON object ("),
        ("RUN BLANKS", "expected two runs or two evaluations, got "),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    shutil.copytree("data/toy/policy", tmp_path / "model")
    for name, text in {"half": '{"id": "1", "caption": "x", "benchmark": "b"}\n{"id": "2", "caption": "x"}\n',
                       "blank": "", "broken": "{\n", "nocaption": '{"id": "1", "caption": "x"}\n{"id": "2"}\n',
                       "noquestion": '{"id": "1", "caption": "x", "questions": ["What?"]}\n',
                       "blanks": '{"id": "1", "caption": "x"}\n'}.items():
        (tmp_path / name).write_text(text)
    made_run(tmp_path / "run", [])
    with pytest.raises(ValueError, match=re.escape(message)):
        main([str(tmp_path / word.lower()) for word in arguments.split()])
    assert not list(tmp_path.rglob("*.html"))


def test_what_is_null_or_cut_off_is_absent(tmp_path):
    question = {"question": "What?", "options": None, "chosen": None, "probs": None, "reply": None}
    rows = [
        {"id": "1", "caption": "first words", "questions": None, "family": None, "accuracy": None},
        {"id": "1", "caption": "more", "questions": [question], "parts": None, "length": None},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text + '{"id": "2", "capt\n')
    main([str(tmp_path / "rows.jsonl")])
    assert ">None<" not in (tmp_path / "rows.html").read_text()
    made_run(tmp_path / "run", [])
    (tmp_path / "run/metrics.jsonl").write_text('{"reward": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl row 1: expected step 0, got None"):
        main([str(tmp_path / "run")])
    (tmp_path / "run/metrics.jsonl").unlink()
    start = {"step": 0, "time": "now", "commit": None, "machine": {"cpu": "a chip", "cores": None}, "versions": None}
    evaluation(tmp_path / "run/starts.jsonl", [start])
    assert "a chip, ? cores, ? GiB, ?" in write_page(tmp_path / "run").read_text()
    evaluation(tmp_path / "run/starts.jsonl", [start, {"step": 1, "time": None}])
    with pytest.raises(ValueError, match="starts.jsonl row 2: expected a time and a step, got {'step': 1}"):
        main([str(tmp_path / "run")])
    with pytest.raises(ValueError, match="max_mb 0: expected more than 0"):
        PageConfig(tmp_path, max_mb=0)


WRONG_KINDS = {
    "metrics.jsonl": ('{"step": 1}', "row 1: expected step 0, got 1"),
    "timing.jsonl": ('{"step": 0}\n{"step": 0}', "row 2: expected step 1, got 0"),
    "eval.jsonl": ('{"step": 0, "accuracy": "half"}', "row 1: expected 'accuracy' in the form .* found 'half'"),
    "starts.jsonl": ('{"step": 0, "time": "now", "machine": [1]}', r"row 1: expected 'machine' in .* found \[1\]"),
    "rollouts/step_000000.jsonl": ('{"id": "1", "caption": "x", "reward": "much"}', "row 1: expected 'reward' in"),
}


def test_gpus_of_another_kind_are_named(tmp_path):
    run = made_run(tmp_path / "run", [[caption_row("x")]])
    (run / "starts.jsonl").write_text('{"step": 0, "time": "now", "machine": {"gpus": 8}}\n')
    with pytest.raises(ValueError, match="starts.jsonl row 1: expected 'machine' in .* found {'gpus': 8}"):
        write_page(run)


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_values_of_another_kind_are_named(tmp_path, name):
    text, message = WRONG_KINDS[name]
    run = made_run(tmp_path / "run", [[caption_row("x")]])
    (run / name).write_text(f"{text}\n")
    with pytest.raises(ValueError, match=f"{name} {message}"):
        write_page(run)


@pytest.mark.parametrize("change", [
    {"options": 3}, {"probs": ["x"]}, {"source": [1]}, {"reply": 5}, {"score": "1"}, {"correct": "yes"},
])
def test_values_of_a_question_of_another_kind_are_named(tmp_path, change):
    path = evaluation(tmp_path / "rows.jsonl", [caption_row("x", questions=[asked() | change])])
    with pytest.raises(ValueError, match=f"rows.jsonl row 1: expected '{next(iter(change))}' in "):
        load_sources(path)


def test_a_number_without_end_is_no_point_of_a_curve(tmp_path):
    run = made_run(tmp_path / "run", [[caption_row("x")]])
    (run / "metrics.jsonl").write_text('{"step": 0, "reward": Infinity, "kl": 1e999, "length": 3}\n')
    assert write_page(run).exists() and load_sources(run)[0].series["reward"] == {0: None}


def test_an_answer_in_words_is_right_if_all_of_it_is():
    words = {"question": "Where?", "options": [], "gold": -1}
    assert outcome(words | {"correct": True, "unparsed": False}) == "r"
    assert outcome(words | {"correct": False, "score": 0.5, "unparsed": False}) == "w"
    assert outcome(words | {"correct": False, "unparsed": True}) == "u" and outcome(words | {"failure": "x"}) == "f"


# --------------------------------------------------------------------------------------------- text


def scripts(text: str) -> list[tuple[str, str]]:
    """(attributes, content) of every script element, as a browser cuts them."""
    return re.findall(r"<script([^>]*)>(.*?)</script", text, re.DOTALL)


def test_the_page_of_a_real_run_has_its_curves_without_scripts(tiny_run, tmp_path, capsys):
    main([str(tiny_run), "--out", str(tmp_path / "r.html")])
    assert capsys.readouterr().out == f"report: {tmp_path / 'r.html'}\n"
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text == write_page(tiny_run).read_text(encoding="utf-8") and (tiny_run / "report.html").exists()
    without = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert without.count("<figure") >= 14
    assert len(re.findall(r'<polyline points="[\d.]+,[\d.]+ [\d.]+,[\d.]+"', without)) >= 20
    assert all(word in without for word in ("recipe", "toy, ", "length_weight", "torch 2.", "probe accuracy"))
    for loads in (r"https?://", r"\bsrc=", r'href="(?!#|data:,)', r"url\(", r"@import"):
        assert not re.search(loads, without), loads  # no network, nothing beside the file


def test_hostile_texts_stay_texts(tmp_path):
    question = asked(HOSTILE, options=[HOSTILE, "b"], reply=HOSTILE)
    rows = [caption_row(HOSTILE, HOSTILE, family=HOSTILE, questions=[question])]
    text = write_page(made_run(tmp_path / "run", [rows], data=HOSTILE), out=tmp_path / "r.html").read_text(
        encoding="utf-8"
    )
    executed = [content for attributes, content in scripts(text) if "type=" not in attributes]
    assert executed == [Path("tools/report/page.js").read_text(encoding="utf-8")]  # ours and no other
    assert "<img" not in text and "49" not in unescape(text.split("<main>")[1].split("<section id=\"curves\"")[0])
    [chunk] = [content for attributes, content in scripts(text) if 'id="page-0"' in attributes]
    [[side]] = json.loads(zlib.decompress(base64.b64decode(chunk)))
    [question] = side["asked"]
    assert side["captions"][0]["text"] == HOSTILE
    assert (question["question"], question["options"]) == (HOSTILE, [HOSTILE, "b"])
    # JSON can say it, UTF-8 cannot
    half = {"id": "\ud800", "caption": "half a surrogate pair \ud800", "accuracy": None}
    assert "half a" not in write_page(evaluation(tmp_path / "half.jsonl", [half])).read_text(encoding="utf-8")


def large_run(run_dir: Path) -> Path:
    """200 steps of 16 groups of 8 captions with 4 questions, photographs in size if not in content."""
    from PIL import Image

    noise = random.Random(0)
    words = [
        f"{a}{b}"
        for a in ("ta", "ri", "mo", "sel", "ku", "ven")
        for b in ("ro", "lin", "da", "mek", "pos", "tu", "ha")
    ]
    photo = Image.effect_noise((40, 30), 60).resize((256, 192)).convert("RGB")

    def row(id, place):
        names = [words[(place + n) % 42] for n in range(4)]
        questions = [
            asked(f"What is the {name} of {id}?", noise.choice([0, 1, None]), source=n, options=words[n : n + 4])
            for n, name in enumerate(names)
        ]
        text = " ".join(noise.choices(words, k=60))
        return caption_row(id, text, noise.random(), questions=questions, advantage=noise.gauss(0, 1))

    steps = []
    for step in range(200):
        ids = [f"image-{(step * 16 + place) % 800}" for place in range(16)]
        steps.append([row(id, place) for place, id in enumerate(ids) for _ in range(8)])
        for id in ids:
            keep_thumbnail(run_dir, id, photo)
    return made_run(run_dir, steps, num_steps=200)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write_page(large_run(tmp_path_factory.mktemp("large") / "run"))


def test_a_run_of_200_steps_fits_the_page(large):
    text = large.read_text(encoding="utf-8")
    assert len(text) < 20e6 and text.count('type="text/plain" id="page-') == 200 and "are shown, evenly" not in text


# ------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, service = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not service:
        pytest.skip("no browser is installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    yield found
    found.quit()


def set_size(driver, width: int, height: int = 900) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@contextmanager
def opened(driver, page: Path, width: int = 1400):
    """The page from disk, its captions rendered; at the end, nothing may be on the console."""
    set_size(driver, width)
    driver.get_log("browser")
    driver.get(page.resolve().as_uri())
    wait(driver, "return !!document.querySelector('#detail .caption')")
    yield
    assert driver.get_log("browser") == []


def wait(driver, script: str):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, 30, poll_frequency=0.02).until(lambda _: driver.execute_script(script))


def text_of(driver, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def press(driver, selector: str, *keys: str) -> None:
    from selenium.webdriver.common.by import By

    driver.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)


def choose_id(driver, id: str, value) -> None:
    driver.execute_script("""const control = document.getElementById(arguments[0]);
        control.value = arguments[1];""", id, value)


def choose(driver, name: str, value) -> None:
    """Sets a control, as a hand would, and waits for the page to be drawn again."""
    drawn = driver.execute_script("return document.getElementById('captions').dataset.drawn")
    driver.execute_script("""const control = document.getElementsByName(arguments[0])[0];
        if (arguments[1] === true) control.checked = true; else control.value = arguments[1];
        control.dispatchEvent(new Event('input', {bubbles: true}));""", name, value)
    wait(driver, f"return document.getElementById('captions').dataset.drawn !== '{drawn}'")


def type_(driver, name: str, text: str) -> None:
    """For letters that the driver cannot press."""
    driver.execute_script("document.getElementsByName(arguments[0])[0].focus()", name)
    driver.execute_cdp_cmd("Input.insertText", {"text": text})


def go_to(driver, address: str) -> None:
    """Another address of the page that is open."""
    drawn = driver.execute_script("return document.getElementById('captions').dataset.drawn")
    driver.execute_script("location.hash = arguments[0]", address)
    wait(driver, f"return document.getElementById('captions').dataset.drawn !== '{drawn}'")


def screenshot(driver, path: Path, width: int) -> None:
    """The whole page, for a careful eye."""
    set_size(driver, width, min(driver.execute_script("return document.documentElement.scrollHeight"), 12_000))
    driver.save_screenshot(path)
    set_size(driver, width)


CUT_OFF = """
const width = document.documentElement.clientWidth, bad = [];
for (const element of document.querySelectorAll('main *')) {
  const box = element.getBoundingClientRect();
  if (!box.width || element.closest('.scroll, #strip, svg')) continue;          // these scroll or scale by themselves
  if (box.left < -1 || box.right > width + 1) bad.push(element.tagName + '.' + element.className);
}
for (const label of document.querySelectorAll('.curve > svg text')) {
  const box = label.getBBox();
  if (box.x < 0 || box.x + box.width > 360) bad.push('label ' + label.textContent);
}
return bad.concat(document.documentElement.scrollWidth > width ? ['page wider than the screen'] : []);
"""
OVERLAPS = """
const bad = [];
const parents = '.curves, .captions, .cards, .bar-of-controls, .take, .turn, .checks, .caption header, .head, .legend, '
  + '.matrix tr';
for (const parent of document.querySelectorAll(parents)) {
  const boxes = [...parent.children].map((child) => child.getBoundingClientRect()).filter((box) => box.width);
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
      bad.push(parent.className || parent.id);
  }));
}
return bad;
"""


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overlaps_or_is_cut_off(driver, tiny_run, tmp_path, width):
    with opened(driver, write_page(tiny_run), width):
        driver.execute_script("document.querySelectorAll('.matrix button, summary').forEach((one) => one.click())")
        assert driver.execute_script(CUT_OFF) == [] and driver.execute_script(OVERLAPS) == []
        choose(driver, "hours", True)
        assert driver.execute_script(CUT_OFF) == [] and driver.execute_script(OVERLAPS) == []
        screenshot(driver, tmp_path / f"report-{width}.png", width)


def test_numbers_beside_a_curve_have_room_whatever_they_are(driver, tmp_path):
    pairs = [(1.067e-5, 1.072e-5), (-1.2345e-10, -1.2347e-10), (-0.0123456, -0.0123466), (0.97312, 0.97315), (1234567, 1234569),
             (-1e-5, 1e5), (-444444, 888888), (888444, 888888), (-8.8884, -8.8888), (0.88488, 0.88588), (-4e9, -1e8)]
    run_dir = made_run(tmp_path / "run", [])
    for step, values in enumerate(zip(*pairs)):
        numbers = {"reward": 0.5} | {f"number {place}": value for place, value in enumerate(values)}
        log_step(run_dir, step, numbers, {}, {"seconds": values[0]}, [caption_row("1")])
    with opened(driver, write_page(run_dir), 400):
        driver.execute_script("document.querySelectorAll('summary').forEach((one) => one.click())")
        assert len(driver.execute_script("return [...document.querySelectorAll('.curve > svg')].filter((one) => "
                                         "one.checkVisibility())")) > len(pairs)
        assert driver.execute_script(CUT_OFF) == []
        choose(driver, "hours", True)
        assert driver.execute_script(CUT_OFF) == []


def test_curves_tell_values_to_pointer_and_keys(driver, tiny_run):
    rows = read_log(tiny_run / "metrics.jsonl")
    with opened(driver, write_page(tiny_run)):
        place = driver.execute_script(
            "document.getElementById('more-curves').open = true;"
            "return [...document.querySelectorAll('.curve')].find((one) => one.textContent.includes('entropy')).dataset.place")
        svg, figure = f".curve[data-place='{place}'] > svg", f".curve[data-place='{place}']"
        press(driver, svg, "\ue014")  # right arrow: the first step
        assert text_of(driver, f"{figure} .at") == "step 0"
        assert float(text_of(driver, f"{figure} .value")) == pytest.approx(rows[0]["entropy"], rel=1e-3)
        press(driver, svg, "\ue014", "\ue014")  # the last, and no further
        assert text_of(driver, f"{figure} .at") == "step 1"
        assert float(text_of(driver, f"{figure} .value")) == pytest.approx(rows[1]["entropy"], rel=1e-3)
        driver.execute_script("""
            const svg = document.querySelector(arguments[0]), box = svg.getBoundingClientRect();
            svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 60, clientY: box.top + 20, bubbles: true}));
        """, svg)
        assert text_of(driver, f"{figure} .at") == "step 0"
        press(driver, svg, "\ue012", "\ue007")  # left arrow, Enter: the captions of step 0
        wait(driver, "return document.querySelector('[name=step]').selectedOptions[0].textContent === 'step 0'")


def test_steps_images_and_filters(driver, tmp_path):
    rows = [caption_row(f"{step}{id}", reward=reward, family=family, questions=[asked(question)])
            for step in range(3) for id, family, question in [("x", "a", "What color?"), ("y", "b", "How many?")]
            for reward in ((0.0, 1.0) if (step, id) == (1, "y") else (0.5, 0.5))]
    run = made_run(tmp_path / "run", [[row for row in rows if row["id"][0] == str(step)] for step in range(3)])

    def expect(page, image, count):
        wait(driver, f"""return document.querySelector('[name=step]').selectedOptions[0]?.textContent === "{page}"
            && document.querySelector('#detail dd')?.textContent === "{image}"
            && document.getElementById('count').textContent === "{count}" """)

    with opened(driver, write_page(run)):
        expect("step 2", "2x", "6 of 6 groups, 12 captions")
        press(driver, "#previous", "\ue007")
        expect("step 1", "1x", "6 of 6 groups, 12 captions")
        press(driver, "#strip button", "\ue014")  # right: the other image
        expect("step 1", "1y", "6 of 6 groups, 12 captions")
        press(driver, "#strip button", "\ue008\ue012")  # shift left: the other step, the same place
        expect("step 0", "0y", "6 of 6 groups, 12 captions")
        press(driver, "[name=search]", "how MANY")
        expect("step 0 (1)", "0y", "3 of 6 groups, 6 captions")
        choose(driver, "spread", 1)
        expect("step 1 (1)", "1y", "1 of 6 groups, 2 captions")
        choose(driver, "family", "a")
        wait(driver, "return document.getElementById('detail').textContent === 'No group passes the filters.'")
        assert text_of(driver, "#count") == "0 of 6 groups, 0 captions"


def searchable_run(run_dir: Path) -> Path:
    """Two steps of two images of two captions. Rewards, advantages, lengths and what is cut off by
    hand; 0:tree is flat."""
    def row(id, text, reward, advantage, length, cut=False, **question):
        return caption_row(id, text, reward, advantage=advantage, length=length, truncated=cut,
                           questions=[asked("What color is it?", **question), asked("How many?", source=1)])

    return made_run(run_dir, [
        [row("0:tree", "A green tree.", 0.5, 0.0, 3, chosen=1), row("0:tree", "A tall tree, (all) green.", 0.5, 0.0, 5),
         row("0:house", "A red house.", 0.25, -1.0, 8, chosen=1, abstain=1), row("0:house", "Bricks.", 1.0, 1.0, 2, True)],
        [row("1:car", "A car, again and again", 0.75, 0.5, 9, True, chosen=1), row("1:car", "A RED car.", 0.0, -2.0, 4),
         row("1:cup", "A cup.", None, None, 6), row("1:cup", "Çay, ✓ שלום 🦜", 0.5, 0.0, 7, chosen=None)],
    ])


def looked_at(driver) -> tuple[str, list[str]]:
    """Id of the image and the numbers of the captions that pass, in their order."""
    return driver.execute_script("""return [document.querySelector('#detail dd').textContent,
        [...document.querySelectorAll('.caption')].filter((one) => one.querySelector('.passes')
         || !document.querySelector('.passes')).map((one) => one.querySelector('b').textContent)]""")


def shown_list(driver) -> list[str]:
    return driver.execute_script("return [...document.querySelectorAll('#strip button')].map((one) => one.title)")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("search, images, captions, marks", [
    ("RED", ["0:house", "1:car"], 2, 1), ("how many", ["0:tree", "0:house", "1:car", "1:cup"], 8, 1),
    ("0:h", ["0:house"], 2, 1), ("(all)", ["0:tree"], 1, 1), ("green", ["0:tree"], 2, 2), ("שלום 🦜", ["1:cup"], 1, 1),
    ("çAY", ["1:cup"], 1, 1), ("</p>", [], 0, 0), ("  ", ["0:tree", "0:house", "1:car", "1:cup"], 8, 0),
])
def test_search_in_captions_questions_and_ids(driver, tmp_path, search, images, captions, marks, width):
    with opened(driver, write_page(searchable_run(tmp_path / "run")), width):
        choose(driver, "all", True)
        type_(driver, "search", search)
        count = f"{len(images)} of 4 groups, {captions} captions"
        wait(driver, f"return document.getElementById('count').textContent === '{count}'")
        assert shown_list(driver) == images
        assert driver.execute_script("return CSS.highlights.get('search')?.size ?? 0") == marks
        assert driver.execute_script(CUT_OFF) == [] and driver.execute_script(OVERLAPS) == []


@pytest.mark.parametrize("filters, want", [
    ({"cut": True}, {"0:house": ["2"], "1:car": ["1"]}), ({"flat": True}, {"0:tree": ["1", "2"]}),
    ({"wrong": True}, {"0:tree": ["1"], "1:car": ["1"]}), ({"abstained": True}, {"0:house": ["1"]}),
    ({"cut": True, "wrong": True}, {"1:car": ["1"]}), ({"abstained": True, "cut": True}, {}),
    ({"wrong": True, "search": "how many"}, {}), ({"wrong": True, "search": "color"}, {"0:tree": ["1"], "1:car": ["1"]}),
    ({"wrong": True, "search": "again"}, {"1:car": ["1"]}), ({"spread": 0.75}, {"0:house": ["1", "2"], "1:car": ["1", "2"]}),
])
def test_filters_by_hand(driver, tmp_path, filters, want):
    address = "&".join(f"{name}={'yes' if value is True else value}" for name, value in filters.items())
    with opened(driver, write_page(searchable_run(tmp_path / "run"))):
        go_to(driver, f"all=yes&{address}")
        assert shown_list(driver) == list(want)
        for place, (id, numbers) in enumerate(want.items()):
            driver.execute_script(f"document.querySelectorAll('#strip button')[{place}].click()")
            wait(driver, f"return document.querySelector('#detail dd').textContent === '{id}'")
            assert looked_at(driver) == [id, numbers]


@pytest.mark.parametrize("sort, images, captions", [
    ("", ["0:tree", "0:house", "1:car", "1:cup"], ["1", "2"]),
    ("reward-high", ["0:house", "1:car", "0:tree", "1:cup"], ["2", "1"]),
    ("reward-low", ["1:car", "0:house", "0:tree", "1:cup"], ["2", "1"]),
    ("advantage-high", ["0:house", "1:car", "0:tree", "1:cup"], ["2", "1"]),
    ("advantage-low", ["1:car", "0:house", "0:tree", "1:cup"], ["2", "1"]),
    ("length-high", ["1:car", "0:house", "1:cup", "0:tree"], ["1", "2"]),
    ("length-low", ["0:house", "0:tree", "1:car", "1:cup"], ["2", "1"]),
    ("disagreement-high", ["0:house", "1:car", "0:tree", "1:cup"], ["1", "2"]),
    ("disagreement-low", ["0:tree", "1:cup", "0:house", "1:car"], ["1", "2"]),
])
def test_orders_by_hand(driver, tmp_path, sort, images, captions):
    """Of images: the best (or least) caption decides; what has no value comes last. The first
    image's captions follow."""
    with opened(driver, write_page(searchable_run(tmp_path / "run"))):
        choose(driver, "all", True)
        choose(driver, "sort", sort)
        assert shown_list(driver) == images
        assert looked_at(driver) == [images[0], captions]
        assert text_of(driver, ".matrix thead") == "question \\ caption" + "".join(captions)


@pytest.mark.parametrize("width", [400, 1400])
def test_the_address_is_a_link(driver, tmp_path, width):
    page = write_page(searchable_run(tmp_path / "run"))
    with opened(driver, page, width):
        assert driver.execute_script("return location.hash") == ""
        press(driver, "[name=step]", "step 0")
        wait(driver, "return location.hash === '#step=0'")
        press(driver, "body", "\ue014")
        wait(driver, "return location.hash === '#step=0&image=0%3Ahouse'")
        press(driver, "body", "qq")
        wait(driver, "return location.hash === '#step=0&image=0%3Ahouse&question=2'")
        address = driver.current_url
        driver.execute_script("document.querySelector('nav a').click()")  # names a section: the state stays
        assert looked_at(driver)[0] == "0:house"
        assert driver.execute_script("return location.hash") == "#run"
        press(driver, "body", "\ue00c")  # Escape
        wait(driver, "return location.hash === '#step=0&image=0%3Ahouse'")
        driver.get("about:blank")
        driver.get(f"{page.resolve().as_uri()}#captions")
        wait(driver, """return document.getElementById('captions').getBoundingClientRect().top < 100
            || Math.abs(scrollY + innerHeight - document.body.scrollHeight) < 30""")
        driver.get("about:blank")
        driver.get(address)  # another one opens it
        wait(driver, "return !!document.querySelector('.answer')")
        assert looked_at(driver)[0] == "0:house"
        assert driver.execute_script("return document.querySelector('[aria-expanded=true]').textContent") == "2  How many?"
        wait(driver, """const top = document.getElementById('captions').getBoundingClientRect().top;
            return top < 100 || Math.abs(scrollY + innerHeight - document.body.scrollHeight) < 30""")
        for odd in ("step=99&image=none&question=77&sort=x&family=y&spread=z&smooth=z", "step=x&=&&%", "search=%ED%A0%80"):
            go_to(driver, odd)
        assert text_of(driver, "#detail") == "No group passes the filters."
        go_to(driver, "step=99&image=none")
        assert looked_at(driver)[0] == "1:car"
        assert text_of(driver, "#position") == "image 1 of 2, the nearest to what was asked for"


def test_keys_work_before_anything_is_clicked(driver, tmp_path):
    with opened(driver, write_page(searchable_run(tmp_path / "run"))):
        press(driver, "body", "\ue014")
        wait(driver, "return document.querySelector('#detail dd').textContent === '1:cup'")
        press(driver, "body", "\ue008\ue012\ue008")
        wait(driver, "return document.querySelector('#detail dd').textContent === '0:house'")
        press(driver, "body", "/")
        assert driver.execute_script("return document.activeElement.name") == "search"
        press(driver, "[name=search]", "q/z\ue014")  # letters to search for, no commands
        wait(driver, "return document.getElementById('detail').textContent === 'No group passes the filters.'")
        assert not driver.execute_script("return document.getElementById('zoom').open")


def test_all_steps_in_one_list(driver, tmp_path):
    """130 images in parts of 60; the third part has 10."""
    steps = [[caption_row(f"{step}-{place}", reward=(65 * step + place) / 130) for place in range(65)] for step in range(2)]
    run = made_run(tmp_path / "run", [rows[:16] for rows in steps])
    for step, rows in enumerate(steps):  # 16 groups of a step are shown
        evaluation(run / f"rollouts/step_{step:06d}.jsonl", rows)
    rows = evaluation(tmp_path / "rows.jsonl", steps[0] + steps[1])
    with opened(driver, write_page(run)):
        go_to(driver, "all=yes&sort=reward-high")
        assert text_of(driver, "#position") == "image 1 of 32" and shown_list(driver)[:2] == ["1-15", "1-14"]
    with opened(driver, write_page(rows)):
        choose(driver, "sort", "accuracy-low")
        wait(driver, "return document.querySelectorAll('#strip button').length === 60")
        press(driver, "body", "\ue008\ue014\ue014\ue008")
        wait(driver, "return document.getElementById('position').textContent === 'image 121 of 130'")
        assert len(shown_list(driver)) == 10 and driver.execute_script("return document.getElementById('next').disabled")
        press(driver, "body", "\ue012")
        wait(driver, "return document.getElementById('position').textContent === 'image 120 of 130'")


@pytest.mark.parametrize("width", [400, 1400])
def test_a_question_shows_its_words_in_long_captions(driver, tmp_path, width):
    """900 words, those that answer near the end; a second question overlaps the first one's."""
    text = "one two three four " * 220 + "The big star is dark red. " + "five six " * 10
    questions = [asked("What star?", options=["dark red", "blue"]), asked("What color?", options=["red", "blue"], source=1)]
    run = made_run(tmp_path / "run", [[caption_row("1", text, questions=questions)] * 8])
    in_sight = """const mark = document.querySelector('mark.active');
        if (!mark) return false;
        const [box, text] = [mark.getBoundingClientRect(), mark.closest('p').getBoundingClientRect()];
        return box.top >= text.top && box.bottom <= text.bottom && box.top >= 40 && box.bottom <= innerHeight
            && mark.textContent === arguments[0]"""

    def wait_for(words):
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(driver, 30, poll_frequency=0.02).until(lambda _: driver.execute_script(in_sight, words))

    with opened(driver, write_page(run), width):
        driver.execute_script("document.querySelectorAll('.matrix button')[0].click()")
        wait_for("dark red1")
        assert len(driver.find_elements("css selector", "mark.active")) == 8
        assert text_of(driver, ".answer") == "✓ dark red"
        driver.execute_script("document.querySelectorAll('.matrix button')[1].click()")
        wait_for("red2")
        assert driver.execute_script(CUT_OFF) == [] and driver.execute_script(OVERLAPS) == []
        screenshot(driver, tmp_path / f"long-{width}.png", width)
        choose(driver, "whole", True)
        wait(driver, "return document.querySelector('.caption p').clientHeight > 1000")


def test_captions_are_taken_along(driver, tmp_path):
    """As JSONL that opens as a page again, and as CSV that reads back to the letter."""
    texts = [HOSTILE, 'a "quoted", line\r\nand = another', "\u202e אב 🦜 " + "x" * 10_000]
    rows = [caption_row(HOSTILE, text, 0.5, advantage=None, questions=[asked(), asked("B?", chosen=1)]) for text in texts]
    run = made_run(tmp_path / "run", [rows, [caption_row("other", "cut", truncated=True)]])
    (folder := tmp_path / "downloads").mkdir()
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})

    def take(what, format, name):
        choose_id(driver, "what", what)
        choose_id(driver, "format", format)
        press(driver, "#download", "\ue007")
        from selenium.webdriver.support.wait import WebDriverWait

        # Chromium may keep the name with an empty file until all is there
        WebDriverWait(driver, 30).until(lambda _: (folder / name).is_file() and (folder / name).stat().st_size)
        return folder / name

    with opened(driver, write_page(run)):
        go_to(driver, "step=0")
        taken = [json.loads(line) for line in take("image", "JSONL", "captions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["caption"] for row in taken] == texts and taken[0]["id"] == HOSTILE and taken[0]["step"] == 0
        assert [question["correct"] for question in taken[0]["questions"]] == [True, False]
        assert write_page(folder / "captions.jsonl").exists()
        path = take("image", "CSV", "captions.csv")
        with path.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        assert [row["caption"] for row in table] == texts
        assert (table[0]["reward"], table[0]["advantage"], table[0]["right"], table[0]["asked"]) == ("0.5", "", "1", "2")
        path.unlink()
        choose(driver, "cut", True)
        wait(driver, "return document.getElementById('count').textContent.startsWith('1 of 2')")
        with take("all", "CSV", "captions.csv").open(encoding="utf-8", newline="") as file:
            assert [row["caption"] for row in csv.DictReader(file)] == ["cut"]
        press(driver, "#copy", "\ue007")
        wait(driver, "return document.getElementById('taken').textContent === '1 captions'")
        read = "navigator.clipboard.readText().then(arguments[arguments.length - 1])"
        assert driver.execute_async_script(read).splitlines()[1].endswith(",cut")
        press(driver, "#link", "\ue007")
        wait(driver, "return document.getElementById('taken').textContent === 'the link is copied'")
        assert driver.execute_async_script(read).endswith("#step=1&image=other&cut=yes")


@pytest.mark.parametrize("width", [400, 1400])
def test_the_picture_is_shown_large(driver, tmp_path, width):
    picture = Image.effect_noise((900, 600), 60).convert("RGB")
    questions = [{"question": "Color?", "choices": ["red", "blue"], "answer_index": 0}]
    data = evaluation(tmp_path / "set.jsonl", [{"id": "x", "image": "x.png", "questions": questions}])
    picture.save(tmp_path / "x.png")
    run = made_run(tmp_path / "run", [[caption_row("x"), caption_row("y")]], data=str(data))
    keep_thumbnail(run, "x", picture)
    keep_thumbnail(run, "y", picture)
    with opened(driver, write_page(run, full_mb=5), width):
        press(driver, "body", "z")
        said = "return document.querySelector('#zoom output')?.textContent"  # it comes after the picture
        wait(driver, f"{said}?.includes('900 \u00d7 600 pixels, full size')")
        room, shown = driver.execute_script(
            "return ['.frame', '#zoom img'].map((one) => document.querySelector(one).clientWidth)")
        assert shown <= room
        screenshot(driver, tmp_path / f"zoom-{width}.png", width)
        driver.execute_script("document.querySelector('#zoom img').click()")
        assert text_of(driver, "#zoom output").startswith("100 % of")
        press(driver, "#zoom [data-zoom=in]", "\ue007")
        assert driver.execute_script("return document.querySelector('#zoom img').clientWidth") == 1350
        press(driver, "#zoom", "\ue00c")
        assert not driver.execute_script("return document.getElementById('zoom').open")
        press(driver, "body", "\ue014")
        wait(driver, "return document.querySelector('#detail dd').textContent === 'y'")
        driver.execute_script("document.querySelector('.picture').click()")
        wait(driver, "return document.querySelector('#zoom img').naturalWidth === 256")
        wait(driver, f"{said}.includes('a small copy; --full-mb keeps whole ones')")
        driver.execute_script("document.getElementById('zoom').close()")


def test_curves_are_smoothed_and_drawn_against_hours(driver, tmp_path):
    """Rewards 0, 1, 0 after 0, 1 and 4 hours. Smoothed by 1/2 they are 0, (1/2 1) / (3/4) = 2/3 and
    (1/4 1) / (7/8) = 2/7."""
    run = made_run(tmp_path / "run", [[caption_row("1")]] * 3)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "reward": {n % 2}}}\n' for n in range(3)))
    (run / "timing.jsonl").write_text("".join(f'{{"step": {n}, "seconds": {s}}}\n' for n, s in enumerate((3600, 10800, 9))))
    evaluation(run / "eval.jsonl", [{"step": step, "accuracy": 0.5, "low": 0.25, "high": 0.75} for step in (0, 2)])

    def points(line):
        script = "return document.querySelector(arguments[0]).getAttribute('points')"
        text = driver.execute_script(script, f".curve[data-place='0'] {line}")
        return [tuple(map(float, point.split(","))) for point in text.split(" ")]

    with opened(driver, write_page(run)):
        assert points(".line polyline") == [(52, 156), (202, 10), (352, 156)]
        choose(driver, "smooth", 0.5)
        assert points(".line polyline.measured") == [(52, 156), (202, 10), (352, 156)]
        smooth = points(".line polyline.smoothed")
        assert [y for _, y in smooth] == pytest.approx([156, 156 - 146 * 2 / 3, 156 - 146 * 2 / 7], abs=0.01)
        choose(driver, "hours", True)  # an hour is a quarter of the way
        assert [x for x, _ in points(".line polyline.smoothed")] == [52, 127, 352]
        band = driver.execute_script("return document.querySelector('.band').getAttribute('points')")
        assert [point.split(",")[0] for point in band.replace("\n", " ").split(" ")] == ["52", "352", "352", "52"]
        assert text_of(driver, ".curve[data-place='0'] .axis:not([hidden])").split() == list("01234")
        press(driver, ".curve[data-place='0'] > svg", "\ue014\ue014")
        assert text_of(driver, ".curve[data-place='0'] .at") == "step 1, 1.00 h"
        assert text_of(driver, ".curve[data-place='0'] .value") == "1"
        wait(driver, "return location.hash === '#smooth=0.5&hours=yes'")
        go_to(driver, "")
        assert points(".line polyline") == [(52, 156), (202, 10), (352, 156)]
        assert not driver.find_elements("css selector", ".smoothed")


def test_captions_come_after_a_row_of_curves(driver, tiny_run):
    with opened(driver, write_page(tiny_run)):
        visible = "return [...document.querySelectorAll('.curve')].filter((one) => one.checkVisibility()).length"
        assert driver.execute_script(visible) == 4
        assert driver.execute_script("return document.querySelector('#captions').getBoundingClientRect().top") < 900
        assert driver.execute_script("return document.querySelectorAll('.curve').length") >= 14
        choose(driver, "smooth", 0.5)  # those folded away follow when they are unfolded
        driver.execute_script("document.getElementById('more-curves').open = true")
        wait(driver, "return !!document.querySelector('#more-curves .smoothed')")


def test_captions_questions_and_answers_of_a_group(driver, tmp_path):
    questions = [
        asked(chosen=0), asked("How many?", chosen=1, source=1), asked("Where?", chosen=None, source=2, reply="hm"),
        asked("What shape?", chosen=1, source=3, abstain=1, options=["star", "The caption does not say"]),
        asked("What size?", chosen=None, correct=None, score=None, source=4, failure="too long"),
    ]
    text = "A red star, blue sky. What color it is: red."
    claims = [{"claim": HOSTILE, "score": 0.5, "failure": ""}, {"claim": "Blue sky.", "score": 0.494, "failure": ""},
              {"claim": "x", "score": None, "failure": "not finite"}]
    row = caption_row("1", text, 0.25, advantage=-1.5, truncated=True, questions=questions, claims=claims)
    run = made_run(tmp_path / "run", [[row, caption_row("1", "Nothing.", advantage=1.5)]])
    with opened(driver, write_page(run)):
        cells = driver.execute_script(
            "return [...document.querySelectorAll('.matrix tbody tr:not(.options)')].map((row) => row.textContent)")
        assert cells == ["1  What color?✓✓", "2  How many?✗", "3  Where??", "4  What shape?\u2013", "5  What size?!"]
        marks = driver.execute_script(
            "return [...document.querySelectorAll('mark[data-number]')].map((one) => [one.className, one.textContent])")
        assert marks == [["wrong", "blue2"], ["right", "red1"]]  # in the sentence that speaks of the color
        assert text_of(driver, ".caption p") == "A red star, blue2 sky. What color it is: red1."
        header = text_of(driver, ".caption header")
        assert all(word in header for word in ("reward 0.25", "advantage -1.50", "4 tokens", "cut off"))
        judged = driver.execute_script("""return [...document.querySelectorAll('.claims li')].map((one) =>
            [one.querySelector('.cell').className, one.querySelector('.cell').title, one.textContent])""")
        assert judged == [["cell right", "likely true", f"0.50 {HOSTILE}"], ["cell wrong", "likely not true", "0.49 Blue sky."],
                          ["cell failed", "not finite", "\u2013 x"]]
        bars = driver.execute_script(
            "return [...document.querySelectorAll('.bar i')].map((one) => [one.className, one.style.width])")
        assert bars == [["down", "50%"], ["up", "50%"]]
        press(driver, ".matrix button", "\ue007")
        options = "A) red ✓ · chosen by 1, 2 · mean probability 0.75", "B) blue · mean probability 0.25"
        assert text_of(driver, ".options") == "".join(options)
        assert driver.execute_script("return document.querySelector('mark.active').textContent") == "red1"


@pytest.mark.parametrize("width", [400, 1400])
def test_hostile_captions_in_a_browser(driver, tmp_path, width):
    families = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
    texts = [HOSTILE, "\u202eturned around אבג العربية", families * 30, "x" * 10_000, "", " \n\t"]
    rows = [
        caption_row(text or "none", text, family=text, questions=[asked(text or "?", options=[text or "?", "b"], reply=text)])
        for text in texts
    ]
    with opened(driver, write_page(made_run(tmp_path / "run", [rows], data=HOSTILE)), width):
        for place, text in enumerate(texts):
            driver.execute_script("document.querySelectorAll('#strip button')[arguments[0]].click()", place)
            wait(driver, f"return document.getElementById('position').textContent === 'image {place + 1} of 6'")
            marked = text + "1" if text.strip() else text  # all of it is an option's text
            assert driver.execute_script("return document.querySelector('.caption p').textContent") == marked
            press(driver, "body", "q")
            wait(driver, "return !!document.querySelector('.answer')")
            assert driver.execute_script(CUT_OFF) == [] and driver.execute_script(OVERLAPS) == []
            wait(driver, """const address = new URLSearchParams(location.hash.slice(1));
                return address.get('question') && address.get('image') === document.querySelector('#detail dd').textContent""")
            address = driver.current_url
            driver.get("about:blank")
            driver.get(address)
            wait(driver, "return !!document.querySelector('.answer')")
            assert text_of(driver, "#detail dd") == (text or "none")
        assert driver.title == "run"
        assert driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0
        style = driver.execute_script("return getComputedStyle(document.querySelector('.caption p')).unicodeBidi")
        assert style == "plaintext"
        screenshot(driver, tmp_path / f"hostile-{width}.png", width)


def test_two_runs_and_two_evaluations_side_by_side(driver, tiny_run, tmp_path):
    other = shutil.copytree(tiny_run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"seed": 5}
    (other / "config.json").write_text(json.dumps(config))
    page = write_page(tiny_run, other, out=tmp_path / "two.html")
    for width in (400, 1400):
        with opened(driver, page, width):
            assert text_of(driver, "#run > .scroll tbody") == "seed05"
            assert driver.execute_script("return document.querySelectorAll('.curve .legend li').length") >= 40
            sides = driver.execute_script(
                "return [...document.querySelectorAll('.side h3')].map((one) => one.textContent)"
            )
            assert sides == ["run, step 1", "other, step 1"]
            assert driver.execute_script(CUT_OFF) == [] and driver.execute_script(OVERLAPS) == []
            screenshot(driver, tmp_path / f"two-{width}.png", width)
    rows = read_log(tiny_run / "rollouts/step_000001.jsonl")
    rows = [
        {key: row[key] for key in ("id", "family", "caption", "questions")} | {"accuracy": row["parts"]["accuracy"]}
        for row in rows
    ]
    paths = [evaluation(tmp_path / "before.jsonl", rows), evaluation(tmp_path / "after.jsonl", rows[4:])]
    shutil.copytree(tiny_run / "thumbnails", tmp_path / "before.thumbnails")
    for width in (400, 1400):
        with opened(driver, write_page(*paths), width):
            assert driver.execute_script("return document.querySelectorAll('#questions tbody tr').length") > 3
            assert "no captions of this image" in text_of(driver, "#detail")
            press(driver, "#questions tbody tr button", "\ue007")
            wait(driver, "return document.querySelectorAll('.side .caption').length === 8")
            assert driver.execute_script(CUT_OFF) == [] and driver.execute_script(OVERLAPS) == []
            screenshot(driver, tmp_path / f"evaluation-{width}.png", width)


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it, of "rgb(r, g, b)"."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_no_meaning_is_in_colour_alone_and_contrast_suffices(driver, tiny_run):
    with opened(driver, write_page(tiny_run)):
        dashes = driver.execute_script("""return [0, 1, 2, 3, 4, 5].map((i) => {
            const svg = document.querySelector('.curve > svg'), line = svg.querySelector('.line polyline').cloneNode();
            const group = document.createElementNS('http://www.w3.org/2000/svg', 'g');
            group.setAttribute('class', `line line-${i}`); group.append(line); svg.append(group);
            return [getComputedStyle(line).strokeDasharray, getComputedStyle(line).stroke];
        })""")
        assert len({dash for dash, _ in dashes}) == 6
        assert all((1.05) / (luminance(color) + 0.05) >= 3 for _, color in dashes)
        cells = driver.execute_script("""return [...document.querySelectorAll('.marks .cell')].map(
            (one) => [one.textContent, getComputedStyle(one).color, getComputedStyle(one).backgroundColor])""")
        assert len({symbol for symbol, _, _ in cells}) == 5
        for _, ink, ground in cells:
            assert (luminance(ground) + 0.05) / (luminance(ink) + 0.05) >= 4.5


def test_the_page_of_a_long_run_opens(driver, large):
    with opened(driver, large):
        assert driver.execute_script("return document.querySelectorAll('#strip button').length") == 16
        for _ in range(3):
            press(driver, "#previous", "\ue007")
        wait(driver, "return document.querySelector('[name=step]').selectedOptions[0].textContent === 'step 196'")
        wait(driver, "return document.querySelectorAll('#detail .caption').length === 8")
        took = driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
        print(f"a page of {large.stat().st_size / 1e6:.1f} MB opened in {took / 1000:.2f} s")
