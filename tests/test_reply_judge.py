"""Answers in words that a model compares with the right one."""

import pytest
import torch
from PIL import Image

from data.benchmarks.benchmark import Benchmark, Picture
from data.benchmarks.questions import KINDS, FreeQuestion, Item
from data.benchmarks.released import ReleasedQuestion
from reward.caprl import CAPTION_END, Answer, load_verifier
from tools.prism import prism
from tools.reply_judge import JUDGE_PROMPT, SAME, reply_judge

REPLIES = {"How many?": "three birds", "Which year?": "1999", "What is it?": "a hen", "Who?": "", "Which letter?": "B",
           "How far?": "3 km", "Where?": "north"}
"""What the answerer writes."""
ANSWERS = {"How many?": "3", "Which year?": "1999", "What is it?": "a cat", "Who?": "Ann", "How far?": "5 km", "Where?": "N"}


def test_what_is_not_equal_is_judged_and_nothing_else():
    """Equal, empty and lettered replies are not asked about; a judge that fails is no zero, one that cannot be read is.
    Of "What is it?" the judge says A under both orders: yes, then no."""
    items = [Item(f"q{n}", FreeQuestion(text, (answer,))) for n, (text, answer) in enumerate(ANSWERS.items())]
    lettered = ReleasedQuestion("Which letter?", ("A",), choices=("red", "blue"))
    picture = Picture("p", Image.new("RGB", (8, 8)), (*items, Item("q9", lettered)))
    benchmark = Benchmark("charxiv:x", "charxiv", "judged", [picture], [])
    asked = []

    def write(captions, questions, names):
        return [[Answer(None, reply=f" {REPLIES[question.question]}") for question in group] for group in questions]

    def judge(captions, questions, names):
        asked.extend(zip(captions, [group[0].question for group in questions], names))
        choices = {"How many?": (Answer(0), Answer(1)), "What is it?": (Answer(0), Answer(0)),
                   "How far?": (Answer(0), Answer(None)),
                   "Where?": (Answer(0), Answer(None, failure="no answer after 3 tries"))}
        assert all([question.options[question.gold] for question in group] == ["yes", "yes"] for group in questions)
        assert all([question.gold for question in group] == [0, 1] for group in questions)
        return [list(choices[group[0].question.removesuffix(f" {SAME}")]) for group in questions]

    (row,) = prism(benchmark, [[{"caption": "A field."}]], None, 0, write, judge)
    scores = {question["question"]: question["score"] for question in row["questions"]}
    assert scores == {"How many?": 1, "Which year?": 1, "What is it?": 0, "Who?": 0, "How far?": 0, "Where?": None,
                      "Which letter?": 0}
    judged = {question["question"]: question["judged"] for question in row["questions"] if "judged" in question}
    assert judged == {"How many?": True, "What is it?": False, "How far?": None, "Where?": None}
    assert row["questions"][5]["failure"] == "no answer after 3 tries" and row["questions"][5]["correct"] is None
    assert row["accuracy"] == pytest.approx(2 / 6)
    assert asked[0] == ("Right answer: 3. Reply: three birds", f"How many? {SAME}", "q0:three birds:judged")
    (row,) = prism(benchmark, [[{"caption": "A field."}]], None, 0, write)  # without a judge: equal or not
    assert row["accuracy"] == pytest.approx(1 / 7)


def test_the_judge_is_the_verifier_with_another_prompt():
    verifier = load_verifier("data/toy/verifier", torch.device("cpu"), mode="logits")
    judge = reply_judge(verifier)
    assert judge.model is verifier.model and judge.mode == "logits"
    assert judge.writers[False].head_ids != verifier.writers[False].head_ids
    assert JUDGE_PROMPT.count(CAPTION_END) == 3 and JUDGE_PROMPT.count(SAME) == 2  # worked examples as the question is put
    assert {kind for kind, metric in KINDS.items() if metric == "judged"} == {"charxiv", "mathverse", "mathvision"}


def test_each_batch_of_pictures_has_its_own_replies_judged(monkeypatch):
    monkeypatch.setattr("tools.prism.PICTURES_AT_A_TIME", 1)
    pictures = [Picture(text, Image.new("RGB", (8, 8)), (Item(text, FreeQuestion(text, (ANSWERS[text],))),))
                for text in ("How many?", "What is it?")]
    benchmark = Benchmark("charxiv:x", "charxiv", "judged", pictures, [])
    rows = prism(benchmark, [[{"caption": "A field."}]] * 2, None, 0,
                 lambda captions, asked, names: [[Answer(None, reply=REPLIES[q.question]) for q in group] for group in asked],
                 lambda captions, asked, names: [[Answer(question.gold) for question in group] for group in asked])
    assert [row["accuracy"] for row in rows] == [1, 1]
