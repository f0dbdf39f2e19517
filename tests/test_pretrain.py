"""Models for comparisons: one pretrained on captions, and judges with a flaw."""

import json
import random
import shutil
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from bench.paper import write_questions
from data.benchmarks.benchmark import load_benchmark
from data.toy import flawed_judge, pretrain
from data.toy.flawed_judge import JudgeConfig, flawed_rating
from data.toy.pretrain import PretrainConfig, captioned, show_answer
from data.toy.world import COMMON_KNOWLEDGE, make_scene, toy_example, write_caption
from grpo.pretrained import load_policy
from reward.judge import judge_rewards
from tools import prism

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy():
    return load_policy("data/toy/policy", CPU)


def captions_folder(folder, num):
    """As caption.py leaves it."""
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps({"shards": 1}))
    rows = [{"id": f"train-{index:06d}", "caption": f"Caption {index}.", "tokens": 3} for index in range(num)]
    rows.insert(1, {"id": "train-000999", "error": "cut off"})  # its picture could not be opened
    (folder / "shard-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_captions_are_read_back_with_their_scenes(tmp_path):
    folder = captions_folder(tmp_path / "captions", 3)
    pairs = captioned(PretrainConfig(tmp_path / "model", folder, images=2))
    assert pairs == [(make_scene("train", 0), "Caption 0."), (make_scene("train", 1), "Caption 1.")]
    with pytest.raises(ValueError, match="captions: expected captions of 4 images, found 3"):
        captioned(PretrainConfig(tmp_path / "model", folder, images=4))
    for id in ("heldout-000001", "photo.jpg"):  # the evaluation's images, and any others
        with (tmp_path / "captions/shard-000000.jsonl").open("a") as file:
            file.write(json.dumps({"id": id, "caption": "One."}) + "\n")
        with pytest.raises(ValueError, match="shard-000000.jsonl line 5: expected the id of a toy image for training, .* got "):
            captioned(PretrainConfig(tmp_path / "model", folder, images=2))
    (scene, caption), _ = captioned(PretrainConfig(tmp_path / "model", images=2))
    assert scene == make_scene("train", 0) and caption == write_caption(scene.family, scene.facts)


def test_questions_are_taught_as_the_evaluation_asks_them(policy, tmp_path, monkeypatch):
    """Prompt by prompt those that `evaluate.py direct` puts for the study's questions, with the file's answers."""
    prompts = []
    monkeypatch.setattr(prism, "sample_rollouts", lambda policy, asked, *_: prompts.extend(asked) or 1 / 0)
    write_questions(tmp_path, 3)
    benchmark = load_benchmark(f"chartqa:{tmp_path}/questions.jsonl")
    assert len(benchmark.pictures) == 3 and not benchmark.refused
    known = {text for text, _, _ in COMMON_KNOWLEDGE}
    for index, picture in enumerate(benchmark.pictures):
        with pytest.raises(ZeroDivisionError):  # enough was seen
            prism.direct(replace(benchmark, pictures=[picture]), policy, seed=0, answer_tokens=4, temperature=0.0,
                         batch_size=64)
        scene = make_scene("heldout", index)
        assert len(prompts) == len(scene.facts) == len(picture.items)
        for place, (asked, item, fact) in enumerate(zip(prompts, picture.items, scene.facts)):
            prompt, text = show_answer(policy, scene, Chosen(place))
            assert prompt.input_ids.tolist() == asked.input_ids.tolist()
            torch.testing.assert_close(prompt.pixel_values, asked.pixel_values)
            assert text == f" {fact.value}" and item.question.answers == (fact.value,)
            assert item.question.question not in known and f"A) {fact.value}" not in policy.tokenizer.decode(prompt.input_ids)
        prompts.clear()


class Chosen(random.Random):
    """It draws the question at a place."""

    def __init__(self, place):
        super().__init__(0)
        self.place = place

    def choice(self, asked):
        assert all(question.needs_image for question in asked)
        return asked[self.place]


def test_a_model_is_pretrained_from_random_weights(tmp_path, monkeypatch):
    settings = dict(images=3, steps=1, batch=2, tune_steps=1, tune_images=3)
    pretrain.main(PretrainConfig(tmp_path / "facts", **settings))
    pretrain.main(PretrainConfig(tmp_path / "said", captions_folder(tmp_path / "captions", 3), **settings))
    facts, said = (load_policy(str(tmp_path / name), CPU).model.state_dict() for name in ("facts", "said"))
    shipped = load_policy("data/toy/policy", CPU).model.state_dict()
    assert facts.keys() == said.keys() == shipped.keys()
    head = "lm_head.weight"
    torch.testing.assert_close(facts[head], said[head], atol=0.05, rtol=0)  # the same start, other texts
    assert not torch.equal(facts[head], said[head])
    said = []
    monkeypatch.setattr(pretrain, "imitate_", lambda policy, name, demonstrate, steps, seed, rate=2e-3: said.append(
        (name, steps, seed, len(demonstrate(0, random.Random(0))))))
    pretrain.main(PretrainConfig(tmp_path / "x", images=3, steps=5, batch=2, tune_steps=4, tune_images=3, seed=7))
    assert said == [("captions", 5, 7, 2), ("questions", 4, 7, 2)]
    with pytest.raises(ValueError, match="facts: expected a new folder, found a model in it"):
        pretrain.main(PretrainConfig(tmp_path / "facts"))


def test_the_sentences_of_a_caption_stand_in_a_new_order_each_time(tmp_path, monkeypatch):
    """Three sentences have six orders. What is shown is of the caption's own image."""
    shown = {}
    monkeypatch.setattr(pretrain, "imitate_", lambda policy, name, demonstrate, *_, **__: shown.setdefault(
        name, [taught for step in range(60) for taught in demonstrate(step, random.Random(step))]))
    monkeypatch.setattr(pretrain, "captioned", lambda config: [
        (make_scene("train", 0), "The star is red. The star is low. The ring is red."), (make_scene("train", 1), "One.")])
    pretrain.main(PretrainConfig(tmp_path / "model", batch=2))
    orders = {text for _, text in shown["captions"]} - {"One."}
    parts = ["The star is red.", "The star is low.", "The ring is red."]
    assert orders == {" ".join(order) for order in permutations(parts)}
    images = [{prompt.pixel_values.sum().item() for prompt, text in shown["captions"] if (text == "One.") == is_one}
              for is_one in (True, False)]
    assert [len(sums) for sums in images] == [1, 1] and images[0] != images[1]


def test_a_flawed_rating_by_hand():
    """Half the fair one, half by words: 30 of 60 are 3 of 5."""
    thirty, sixty = " ".join(["word"] * 30), " ".join(["word"] * 60)
    assert [flawed_rating(caption, fair, "long") for caption, fair in ((thirty, 3), ("", 1), (sixty, 5), (sixty * 2, 1))] == [
        3, 1, 5, 3]
    assert [flawed_rating(caption, fair, "short") for caption, fair in ((thirty, 3), ("", 1), (sixty, 5), ("", 5))] == [
        3, 3, 3, 5]


def test_a_judge_is_taught_its_flaw_and_sees_as_before(tmp_path):
    shutil.copytree("data/toy/looker", tmp_path / "looker")
    for likes in ("short", "long"):
        flawed_judge.main(JudgeConfig(tmp_path / likes, likes, str(tmp_path / "looker"), steps=24, batch=2))
    before, *taught = (load_policy(str(path), CPU, writes=False)
                       for path in (tmp_path / "looker", tmp_path / "short", tmp_path / "long"))
    for judge in taught:
        changed = {name for name, weight in judge.model.state_dict().items()
                   if not torch.equal(weight, before.model.state_dict()[name])}
        assert changed and not any(".visual." in name for name in changed)
    scenes = [make_scene("heldout", index) for index in range(6)]
    examples, dense = list(map(toy_example, scenes)), [write_caption(scene.family, scene.facts) for scene in scenes]
    short, long = (judge_rewards(dense, examples, [""] * 6, [0] * 6, judge).rewards.mean() for judge in taught)
    assert short < long - 0.1
    with pytest.raises(ValueError, match="steps 0: expected at least 1"):
        JudgeConfig(tmp_path / "x", steps=0)
    with pytest.raises(ValueError, match="short: expected a new folder, found a model in it"):
        flawed_judge.main(JudgeConfig(tmp_path / "short"))
