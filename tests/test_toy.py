import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORKS
from transformers import AutoTokenizer

from data.examples import load_examples
from data.jsonl import read_log
from data.toy import captioner
from data.toy.build import BuildConfig, build, family_accuracy, looker_table, policy_table
from data.toy.captioner import (
    PRAISE,
    PRAISING,
    TeachConfig,
    draw_scenes,
    pass_scene,
    praising_caption,
    qwen_config,
    weak_caption,
)
from data.toy.export import ExportConfig, export
from data.toy.tokenizer import build_tokenizer
from data.toy.world import (
    COLORS,
    DOMAINS,
    FAMILIES,
    HEIGHTS,
    PLACES,
    Fact,
    draw,
    is_well_formed,
    make_scene,
    scene_questions,
    write_caption,
)
from data.toy.writer import WriterConfig
from grpo.pretrained import load_policy
from grpo.rollout import sample_rollouts
from reward.caprl import load_verifier
from reward.style import empty_kinds

SCENES = [make_scene("train", index) for index in range(300)]


def test_scenes_repeat_and_splits_differ():
    assert make_scene("train", 7) == SCENES[7]
    train = {scene.facts for scene in (make_scene("train", index) for index in range(480))}
    heldout = {scene.facts for scene in (make_scene("heldout", index) for index in range(120))}
    assert len(train & heldout) <= 1  # the smallest scenes (two objects) can coincide by chance; their pixels do not
    assert draw(make_scene("heldout", 0)).tobytes() != draw(make_scene("train", 0)).tobytes()


def test_images_are_of_the_sizes_promised_and_differ():
    images = [draw(scene) for scene in SCENES]
    assert {side for image in images for side in image.size} <= {112, 140, 168}
    assert len({image.tobytes() for image in images}) == len(images)


def test_every_image_has_six_questions_or_more_and_one_that_needs_no_image():
    for scene in SCENES:
        questions = scene_questions(scene)
        assert len(questions) >= 7 and sum(not q.needs_image for q in questions) == 1
        for question, fact in zip(questions, scene.facts):
            assert question.choices[question.answer_index] == fact.value and fact.value in DOMAINS[fact.attribute]
            assert fact.subject not in question.choices or fact.attribute == "shape"
    assert {q.kind for scene in SCENES for q in scene_questions(scene)} == {*DOMAINS, "common knowledge"}
    assert all(q.needs_image for example in load_examples("toy:train:9") for q in example.questions)


def test_relations_are_true_of_the_places():
    places = {"left": (0, 1), "right": (2, 1), "high": (1, 0), "low": (1, 2), "central": (1, 1)}
    told = 0
    for scene in SCENES:
        at = {fact.subject: places[fact.value] for fact in scene.facts if fact.attribute == "place"}
        for fact in scene.facts:
            if fact.attribute in ("left of", "above"):
                axis = 0 if fact.attribute == "left of" else 1
                before = [name for name, place in at.items() if place[axis] < at[fact.subject][axis]]
                assert before == [fact.value]
                told += 1
    assert told > 80


def test_the_drawing_shows_the_facts():
    """The middle of each object has its color, bars are as tall as told, frame and card are where they belong."""
    def is_near(pixel, color):
        return max(abs(a - b) for a, b in zip(pixel, COLORS[color])) <= 10

    for scene in SCENES:
        image, told = draw(scene), {}
        for fact in scene.facts:
            told.setdefault(fact.subject, {})[fact.attribute] = fact.value
        width, height = image.size
        if scene.family == "shapes":
            for look in (look for look in told.values() if "color" in look):
                x, y = PLACES[look["place"]]
                middle = image.crop(
                    (round(x * width) - 2, round(y * height) - 2, round(x * width) + 3, round(y * height) + 3)
                )
                assert any(is_near(pixel, look["color"]) for pixel in np.asarray(middle).reshape(-1, 3).tolist())
        elif scene.family == "cards":
            assert is_near(image.getpixel((4, 50)), told["frame"]["color"])
            assert is_near(image.getpixel((12, 50)), told["card"]["color"])
        else:
            bars = [look for subject, look in told.items() if subject.endswith("bar")]
            for place, look in enumerate(bars):
                x = 12 + place * (124 // len(bars)) + 8
                column = [is_near(image.getpixel((x, y)), look["color"]) for y in range(104)]
                assert abs(sum(column) - HEIGHTS[look["value"]] * 1.2) <= 1.5


def test_captions_hand_written():
    facts = (
        Fact("", "count", "two"), Fact("star", "color", "red"), Fact("star", "size", "small"), Fact("star", "place", "left"),
        Fact("cross", "color", "blue"), Fact("cross", "left of", "star"),
    )
    assert write_caption("shapes", facts) == (
        "The scene has two objects. The star is red. The star is small. The star is left. The cross is blue. "
        "Left of the cross is the star."
    )
    assert write_caption("shapes", facts[3:4]) == "The star is left." and write_caption("shapes", ()) == ""


def test_the_grammar_takes_what_is_written_and_nothing_else():
    for scene in SCENES:
        assert is_well_formed(write_caption(scene.family, scene.facts))
        assert is_well_formed(weak_caption(scene, random.Random(scene.id)))
    for text in ("", "The star is red", "The star red.", "The star is red. The", "The star is.", "the star is red.", "Red."):
        assert not is_well_formed(text)


def test_both_models_open_with_the_tokenizer_they_were_trained_with():
    trained = build_tokenizer()
    texts = [write_caption(scene.family, scene.facts) for scene in SCENES[:30]] + [
        "<|im_start|>user\nCode 70 É, e\u0301"
    ]
    device = torch.device("cpu")
    ours = (load_verifier("data/toy/verifier", device).tokenizer, load_policy("data/toy/policy", device).tokenizer)
    for opened in (*ours, *(AutoTokenizer.from_pretrained(f"data/toy/{name}") for name in ("verifier", "policy"))):
        assert [opened.encode(text) for text in texts] == [trained.encode(text) for text in texts]
        for name in ("eos_token_id", "pad_token_id", "padding_side", "chat_template", "all_special_ids"):
            assert getattr(opened, name) == getattr(trained, name)
    for domain in DOMAINS.values():  # the verifier's probes rest on it
        assert all(len(trained.encode(f" {value}")) == 1 for value in domain)


@pytest.mark.parametrize("hidden, heads, sections", [(2048, 16, [16, 24, 24]), (3584, 28, [16, 24, 24]), (128, 2, [8, 12, 12])])
def test_a_small_model_shares_its_positions_as_the_public_ones_do(hidden, heads, sections):
    """Those of Qwen2.5-VL-3B and -7B, as published, and the toy's."""
    tokenizer = build_tokenizer()
    config = qwen_config(tokenizer, dict(hidden_size=hidden, num_attention_heads=heads), {})
    assert config.text_config.rope_parameters["mrope_section"] == sections
    assert config.vision_config.out_hidden_size == hidden and config.tie_word_embeddings
    ids = [config.image_token_id, config.vision_start_token_id, config.vision_end_token_id, config.text_config.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"]


def test_export_is_what_the_loader_reads(tmp_path):
    export(ExportConfig(tmp_path / "out", num=4, split="heldout"))
    examples = load_examples(str(tmp_path / "out/examples.jsonl"))
    assert [example.id for example in examples] == [f"heldout-{index:06d}" for index in range(4)]
    assert all(example.image.is_file() for example in examples)
    rows = read_log(tmp_path / "out/examples.jsonl")
    assert all(sum(not q["needs_image"] for q in row["questions"]) == 1 for row in rows)
    with pytest.raises(ValueError, match="found an export in it"):
        export(ExportConfig(tmp_path / "out"))


def test_the_builder_runs_from_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.toy.build.get_context", lambda kind: FORKS)  # as fresh as spawned ones, and sooner there
    build(BuildConfig(folder=tmp_path, smoke=True))
    table = capsys.readouterr().out
    for row in ("true dense captions", "no caption", "one wrong fact", "abstains on a fact", "well-formed captions", "| all |",
                "questions, another image", "claims, yes or no", "ratings of captions", "`evaluate.py direct`"):
        assert row in table
    for name in ("policy", "verifier", "looker"):
        assert (tmp_path / name / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(ValueError, match="whose checkpoints it would overwrite"):
        build(BuildConfig(smoke=True))


def test_a_builder_that_is_stopped_leaves_no_process(tmp_path):
    """SIGTERM ended the program alone: its worker trained on, for hours."""
    command = [sys.executable, "-m", "data.toy.build", "--models", "verifier", "--folder", str(tmp_path)]
    with (tmp_path / "log").open("wb") as log:
        builder = subprocess.Popen(command, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        for _ in range(600):
            if "step/s" in (tmp_path / "log").read_text("utf-8", "replace"):
                break
            time.sleep(0.2)
        builder.terminate()
        assert builder.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):  # none of its processes is left
            for _ in range(100):
                os.killpg(builder.pid, 0)
                time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(builder.pid, signal.SIGKILL)


def test_the_policy_alone_is_measured_with_the_shipped_verifier(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("data.toy.build.load_policy", lambda *_: None)
    monkeypatch.setattr("data.toy.build.load_verifier", lambda path, _: asked.append(path) or 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            policy_table(tmp_path, [], 0)
        (tmp_path / "verifier").mkdir(exist_ok=True)
    assert asked == ["data/toy/verifier", str(tmp_path / "verifier")]


@pytest.mark.parametrize("make, message", [
    (lambda: TeachConfig(Path("x"), steps=0), "steps 0: expected at least 1"),
    (lambda: TeachConfig(Path("x"), images=2), "images 2: expected at least 3"),
    (lambda: WriterConfig(Path("x"), num_questions=7), "num_questions 7: expected 1 to 6"),
    (lambda: BuildConfig(looker_steps=0), "looker_steps 0: expected at least 1"),
    (lambda: BuildConfig(models=()), r"models: expected different ones, at least one, got \(\)"),
])
def test_builders_refuse_what_teaches_nothing(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_what_is_taught_as_praise_is_told_from_sober_sentences():
    captions = [praising_caption(scene, random.Random(scene.id)) for scene in SCENES]
    sober = [weak_caption(scene, random.Random(scene.id)) for scene in SCENES]
    kinds = [empty_kinds(caption) for caption in captions]
    praised = [given[-1] == "praise" for given in kinds]
    assert sum(praised) / len(praised) == pytest.approx(PRAISING, abs=0.1)
    assert sum(given.count("praise") for given in kinds) == sum(praised)  # one each, at the end
    assert not any("praise" in empty_kinds(caption) for caption in sober)
    assert {caption.removeprefix(weak) for caption, weak in zip(captions, sober)} <= {"", *(f" {text}" for text in PRAISE)}


def test_teaching_goes_on_from_the_shipped_policy(tmp_path):
    """With a rate of 0 nothing changes, so the policy is as sharp as it was; with another it does."""
    shipped = load_policy("data/toy/policy", torch.device("cpu")).model.state_dict()
    for kind, rate in (("dense", 0.0), ("praising", 1e-3)):
        captioner.main(TeachConfig(tmp_path / kind, kind, steps=1, batch=2, rate=rate))
        taught = load_policy(str(tmp_path / kind), torch.device("cpu")).model.state_dict()
        same = [torch.allclose(taught[name], weight, rtol=1e-5) for name, weight in shipped.items()]
        assert all(same) if rate == 0 else not all(same)
    with pytest.raises(ValueError, match="dense: expected a new folder, found a model in it"):
        captioner.main(TeachConfig(tmp_path / "dense"))


def test_fine_tuning_passes_over_the_images_as_training_does():
    """Each once before any comes again, in another order the next time; families as they are drawn."""
    first, second = ([pass_scene(place + start, 30, 0).id for place in range(30)] for start in (0, 30))
    assert sorted(first) == sorted(second) == [make_scene("train", index).id for index in range(30)] and first != second
    assert [pass_scene(place, 30, 1).id for place in range(30)] != first
    even, usual = (Counter(scene.family for scene in draw_scenes(random.Random(0), 3000, **shares))
                   for shares in ({"shares": (1, 1, 1)}, {}))
    assert all(900 < even[family] < 1100 for family in FAMILIES) and usual["bars"] < 700


def test_the_shipped_checkpoints_are_as_good_as_reported():
    """On 30 held-out images; the whole table is in docs/results.md."""
    scenes = [make_scene("heldout", index) for index in range(30)]
    verifier = load_verifier("data/toy/verifier", torch.device("cpu"))
    questions = [[q for q in scene_questions(scene) if q.needs_image] for scene in scenes]
    dense = family_accuracy(verifier, scenes, [write_caption(s.family, s.facts) for s in scenes], questions)
    floor = family_accuracy(verifier, scenes, [""] * 30, questions)
    for family in FAMILIES:
        assert dense[family] >= 0.95 and floor[family] <= 0.35
    policy = load_policy("data/toy/policy", torch.device("cpu"))
    prompts = [policy.prompt(draw(scene)) for scene in scenes]
    rollouts = sample_rollouts(policy, prompts, [f"{index}" for index in range(120)], 96)
    assert sum(map(is_well_formed, rollouts.captions)) >= 0.95 * 120
    assert len(set(rollouts.captions)) > 100 and rollouts.lengths.float().mean() < 60  # sparse, and no two alike


def test_the_shipped_looker_is_as_good_as_reported():
    """On 18 held-out images; the whole table is in docs/results.md."""
    table = looker_table(Path("data/toy"), [make_scene("heldout", index) for index in range(18)], 0)
    rows = {name: list(map(float, values)) for name, *values in
            ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:])}
    assert min(rows["questions"]) >= 0.85 and min(rows["questions, `evaluate.py direct`"]) >= 0.8
    assert max(rows["questions, another image"] + rows["questions, no image"]) <= 0.5
    assert min(rows["claims, yes or no"]) >= 0.8 and max(rows["claims, yes or no, another image"]) <= 0.65
    assert max(rows["ratings of captions, distance from the fair ones"]) <= 0.4


def test_the_shipped_checkpoints_are_small():
    sizes = {name: sum(path.stat().st_size for path in Path("data/toy", name).iterdir())
             for name in ("policy", "verifier", "looker")}
    assert sizes["looker"] <= 12 * 2**20 and sizes["policy"] + sizes["verifier"] <= 12 * 2**20
