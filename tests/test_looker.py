"""The toy model that looks: what it is taught is true, and asked as the programs ask."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data.curate.answers import BLIND, SEEING
from data.toy.facts import is_true
from data.toy.looker import (
    Pupil,
    any_caption,
    any_claim,
    claim_turn,
    fair_rating,
    grow,
    question_turn,
    rating_turn,
    sights,
    train_looker,
    turns_of,
    write_lesson,
)
from data.toy.world import COLORS, COMMON_KNOWLEDGE, draw, make_scene, scene_questions, write_sentence
from grpo.pretrained import load_policy
from reward.branches import _head
from reward.caprl import PromptWriter, shuffle_options
from reward.claims import CLAIM_INSTRUCTION, Checker, claims_of
from reward.judge import RATING_INSTRUCTION, RATING_START
from tools.prism import LETTER_FORM

CPU = torch.device("cpu")
SCENES = [make_scene("train", index) for index in range(90)]


@pytest.fixture(scope="module")
def policy():
    return load_policy("data/toy/policy", CPU)


def row_of(lesson, place):
    """The tokens of a turn without its answer and its end."""
    return lesson.prompt.input_ids.tolist() + lesson.rests[place][: lesson.marks[place][-2][0] + 1]


def test_questions_are_asked_as_the_filter_asks_them(policy):
    writer = PromptWriter(policy.tokenizer)
    for scene in SCENES[:6]:
        for form, image, instruction in (("filter", draw(scene), SEEING), ("blind", None, BLIND)):
            questions = [question for question in scene_questions(scene) if question.needs_image][:4]
            turns = [question_turn(q, q.choices[q.answer_index], form, random.Random("one")) for q in questions]
            lesson = write_lesson(policy, scene if image else None, turns)
            head = _head(policy, image, instruction)[0].tolist()
            for place, question in enumerate(questions):
                asked = shuffle_options(question, 0, random.Random("one"))
                assert row_of(lesson, place) == head + writer.question_ids(asked)
                (letter,) = lesson.marks[place][-2][2]
                assert letter == f" {'ABCD'[asked.gold]}"


def test_other_turns_are_those_of_their_programs(policy):
    checker = Checker(policy)
    for scene in SCENES[:6]:
        turns = [claim_turn(scene, random.Random(n)) for n in range(4)]
        head, lesson = _head(policy, draw(scene), CLAIM_INSTRUCTION)[0].tolist(), write_lesson(policy, scene, turns)
        tail = checker.writer.template_ids(checker.turn_end + "The answer is")
        for place, turn in enumerate(turns):
            claim = turn.text.removeprefix(f"{CLAIM_INSTRUCTION} ")
            assert row_of(lesson, place) == head + checker.writer.plain_ids(f" {claim}") + tail
        turns = [rating_turn(*any_caption(scene, random.Random(n))) for n in range(4)]
        lesson = write_lesson(policy, scene, turns)
        for place in range(4):
            caption, _, rating = any_caption(scene, random.Random(place))
            assert sum(int(digit) * prob for digit, prob in turns[place].answer.items()) == pytest.approx(rating)
            prompt = policy.prompt(draw(scene), RATING_INSTRUCTION + caption, RATING_START)
            assert row_of(lesson, place) == prompt.input_ids.tolist()
            assert prompt.position_ids[:, : len(lesson.prompt.input_ids)].equal(lesson.prompt.position_ids)
        question = scene_questions(scene)[0]
        turns = [question_turn(question, None, "direct", random.Random(n)) for n in range(2)]
        asked = shuffle_options(question, 0, random.Random(1))
        text = "\n".join([question.question, *(f"{a}) {b}" for a, b in zip("ABCD", asked.options)), LETTER_FORM])
        prompt = policy.prompt(draw(scene), text, "The answer is")
        assert row_of(write_lesson(policy, scene, turns), 1) == prompt.input_ids.tolist()


def test_marks_stand_on_the_words_they_are_about(policy):
    word, num_options = policy.tokenizer.decode, 0
    for scene in SCENES[:12]:
        rng = random.Random(scene.id)
        for form in ("question", "statement", "filter", "blind", "claim", "rating"):
            lesson = write_lesson(policy, scene, turns_of(scene, form, 6, rng))
            for rest, marks in zip(lesson.rests, lesson.marks):
                recalled = [(place, target) for place, kind, target in marks if kind == "recall"]
                answered = [place for place, kind, _ in marks if kind == "letter"]
                values = [target for _, kind, target in marks if kind == "value"]
                # where the letter is said; not where the value cannot be known
                assert recalled == list(zip(answered, values if answered else []))
                for place, kind, target in marks:
                    if kind == "value":
                        assert word(rest[place]).strip() == "?"
                    elif kind == "truth" and form in ("filter", "blind"):  # the end of an option
                        line = word(rest[: place + 1]).splitlines()[-1]
                        letter, _, value = line.partition(") ")
                        asked = next(t for p, k, t in marks if k == "value")
                        assert target == {"": float(f" {value}" in asked)}
                        assert (place, "subject", {f" {letter}": 1.0}) in marks
                        num_options += 1
                    elif kind == "truth":  # the claimed value, before the sentence's end
                        # a statement ends with its last mark; "The scene has two objects."
                        assert word(rest[place + 1]) in (".", "<|im_end|>", " objects", " bars")
                        known = [t for p, k, t in marks if (p, k) == (place, "true value")]
                        assert target == {"": float(word(rest[place]) in (known or [{}])[0])}
                    elif kind == "end":
                        assert word(rest[place + 1]) == "<|im_end|>" and len(rest) == place + 2
                    elif kind in ("letter", "claim"):
                        assert word(rest[place]) == " is" and max(target, key=target.get).startswith(word(rest[place + 1]))
                    if kind == "claim":
                        (holds,) = (t[""] for _, k, t in marks if k == "truth")
                        assert target == {" yes" if holds else " no": 1.0}
                    assert sum(target.values()) == pytest.approx(1) or kind == "truth"
    assert num_options > 200


def test_claims_are_as_true_as_they_are_taught_to_be():
    truths = []
    for scene in SCENES:
        rng = random.Random(scene.id)
        for _ in range(10):
            claim, value = any_claim(scene, rng)
            told = is_true(write_sentence(scene.family, claim), scene)
            # of pairs of shapes the scene names one, and others may be true: these are not taught
            assert told == (claim.value == value) or claim.attribute in ("left of", "above")
            truths.append(told)
    assert 0.45 < np.mean(truths) < 0.6


def test_a_rating_by_hand():
    assert [fair_rating(*counts) for counts in ((0, 0, 8), (8, 0, 8), (4, 0, 8), (6, 2, 8), (0, 8, 8))] == (
        [1, 5, 3, pytest.approx(3.4), 1]
    )
    for scene in SCENES[:30]:
        caption, _, rating = any_caption(scene, random.Random(scene.id))
        told = [is_true(claim, scene) for claim in claims_of(caption) if claim != "This is a card."]
        assert rating == pytest.approx(fair_rating(told.count(True), told.count(False), len(scene.facts)), abs=0.8)


def test_an_image_token_tells_what_is_drawn_there():
    """The color that the words of a place name is on the picture there."""
    num_seen = 0
    for scene in SCENES:
        image = draw(scene)
        pixels = np.asarray(image, dtype=int)
        columns = image.width // 28
        for place, words in sights(scene, columns, image.width):
            row, column = divmod(place, columns)
            part = pixels[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28].reshape(-1, 3)
            for color in set(words) & set(COLORS):
                num_seen += 1
                assert (abs(part - np.array(COLORS[color])).max(1) <= 10).any(), (scene.id, place, words)
    assert num_seen > 500


def test_what_no_image_tells_has_even_targets():
    known = {text for text, _, _ in COMMON_KNOWLEDGE}
    for scene in SCENES[:12]:
        for turn in turns_of(scene, "blind", 6, random.Random(scene.id)):
            is_known = any(text in turn.text for text in known)
            assert set(turn.answer.values()) == {1.0 if is_known else 1 / len(turn.answer)}
            assert (len(turn.answer) == 1) == is_known == bool(turn.marks)


def test_a_loss_and_a_share_by_hand(policy):
    """A probe that says red with e^3, blue with e^2 and each other token with e^0, whatever the state."""
    pupil, num = Pupil(grow(policy, 0)), len(policy.tokenizer)
    red, blue = (policy.tokenizer.encode(text)[0] for text in (" red", " blue"))
    for probe in pupil.probes.values():
        torch.nn.init.zeros_(probe.weight)
        torch.nn.init.zeros_(probe.bias)
    state = torch.zeros(128)
    with torch.no_grad():
        pupil.probes["subject"].bias[[red, blue]] = torch.tensor([3.0, 2.0])
        pupil.probes["truth"].bias.fill_(2.0)
    norm = np.log(np.exp(3) + np.exp(2) + num - 2)
    loss, right = pupil.loss("subject", [(state, {" red": 1.0}), (state, {" blue": 1.0}), (state, {" red": 0.5, " blue": 0.5})])
    assert loss.item() == pytest.approx(norm - (3 + 2 + 2.5) / 3, rel=1e-5) and right == pytest.approx((1 + 0 + 1) / 3)
    loss, right = pupil.loss("truth", [(state, {"": 1.0}), (state, {"": 1.0}), (state, {"": 0.0})])
    assert loss.item() == pytest.approx((3 * np.log1p(np.exp(-2)) + 2) / 3, rel=1e-5) and right == pytest.approx(2 / 3)


def test_the_grown_model_begins_as_the_policy(policy):
    """The added layers do nothing yet; only the sharpening is taken back."""
    prompt = policy.prompt(draw(SCENES[0]))
    inputs = {"input_ids": prompt.input_ids[None], "position_ids": prompt.position_ids[:, None],
              "pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid}
    with torch.no_grad():
        before, after = (model.model(**inputs).logits for model in (policy, grow(policy, 0)))
    torch.testing.assert_close(after, before * 0.7, rtol=1e-4, atol=1e-4)


def test_a_lesson_is_scored_as_its_turns_alone_are(policy):
    """By brute force: each turn run by itself, without cache or packing."""
    torch.manual_seed(0)
    looker = grow(policy, 0)
    pupil, scene = Pupil(looker).eval(), SCENES[2]
    turns = turns_of(scene, "filter", 3, random.Random(0))
    lesson = write_lesson(looker, scene, turns)
    with torch.no_grad():
        total, _ = pupil([lesson])
        kinds = {}
        for rest, marks in zip(lesson.rests, lesson.marks):
            ids = torch.tensor(lesson.prompt.input_ids.tolist() + rest)
            places = lesson.prompt.position_ids.amax() + 1 + torch.arange(len(rest)).expand(3, -1)
            states = looker.model.model(
                input_ids=ids[None], position_ids=torch.cat([lesson.prompt.position_ids, places], 1)[:, None],
                pixel_values=lesson.prompt.pixel_values, image_grid_thw=lesson.prompt.grid, output_hidden_states=True,
            ).hidden_states
            norm, start = looker.model.model.language_model.norm, len(lesson.prompt.input_ids)
            early, before, last = (norm(states[6]), norm(states[7]), states[8])  # of 8 layers
            for place, kind, target in marks:
                hidden = {"value": early, "true value": early, "subject": early, "truth": before}.get(kind, last)
                kinds.setdefault(kind, []).append((hidden[0, start + place], target))
        features = looker.model.model.get_image_features(lesson.prompt.pixel_values, lesson.prompt.grid).pooler_output
        kinds |= pupil.sight_lessons([scene], features, lesson.prompt.grid)
        alone = sum(pupil.loss(kind, marks)[0] for kind, marks in kinds.items())
    assert total.item() == pytest.approx(alone.item(), rel=1e-4)


def test_each_kind_teaches_the_layers_below_its_own_alone(policy):
    """What an option is compared with is known two layers before the answer, how it compares one."""
    lessons = turns_of(SCENES[0], "filter", 3, random.Random(0))
    for kind, num in (("value", 6), ("truth", 7), ("recall", 7), ("letter", 8)):
        looker = grow(policy, 0)
        pupil = Pupil(looker)
        lesson = write_lesson(looker, SCENES[0], lessons)
        lesson.marks = [[mark for mark in marks if mark[1] == kind] for marks in lesson.marks]
        pupil.sight_lessons = lambda *_: {}
        pupil([lesson])[0].backward()
        taught = [layer.mlp.down_proj.weight.grad is not None for layer in looker.model.model.language_model.layers]
        assert taught == [True] * num + [False] * (8 - num), kind


def test_a_training_that_was_stopped_goes_on_with_its_next_stage(policy, tmp_path, monkeypatch):
    stages, last = [], ["answers"]

    def fit(pupil, loss_at, steps, name, **settings):
        stages.append(name)
        if name == last[0]:
            raise KeyboardInterrupt
        with torch.no_grad():
            pupil.model.lm_head.weight.mul_(len(stages) + 1)

    monkeypatch.setattr("data.toy.looker.fit", fit)
    with pytest.raises(KeyboardInterrupt):
        train_looker(policy, 1, 0, tmp_path / "a")
    last[0] = ""
    resumed = train_looker(policy, 1, 0, tmp_path / "a").model.lm_head.weight
    assert stages == ["sights", "lookups", "names", "letters", "answers", "answers"]
    stages.clear()
    whole = train_looker(policy, 1, 0, tmp_path / "b").model.lm_head.weight
    assert stages == ["sights", "lookups", "names", "letters", "answers"] and torch.allclose(whole * 7 / 6, resumed)
    file = tmp_path / "b/lookups.safetensors"
    for content in (b"", b"junk", file.read_bytes()[:9000], save({"weight": torch.zeros(2)})):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"lookups.safetensors: expected weights of this looker, found others; delete it"):
            train_looker(policy, 1, 0, tmp_path / "b")
