"""Claims of a caption, judged against the image: what is a claim, how likely each is, what they earn."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_reward_step import record

import evaluate
from bench.attacks import measure
from data.benchmarks.benchmark import Benchmark, Picture
from data.examples import Example
from data.images import open_image
from data.jsonl import read_log
from data.toy.captioner import build_policy
from data.toy.world import draw, make_scene, perturb, write_caption
from grpo.config import RewardConfig
from grpo.policy import CAPTION_INSTRUCTION
from grpo.pretrained import load_policy, weights_hash
from grpo.recipes import PRESETS, toy_config
from reward import claims as claims_page
from reward.caprl import Rewards
from reward.claims import (
    CLAIM_INSTRUCTION,
    Checker,
    add_correctness,
    claims_of,
    judge_claims,
    load_checker,
)
from reward.resample import put_groups
from reward.step import compare_siblings, load_reward, measure_step
from tools.audit import audit
from tools.claims import CheckerConfig, add_claims, claim_differences, judged_rows, summarize_claims, with_claims
from tools.report.page import write_page
from train import train

SCENES = [make_scene("train", index) for index in range(3)]
IMAGES = [draw(scene) for scene in SCENES]
CLAIMS = ["The star is red.", "This is a card.", "The scene has four objects and a very large number of words.",
          "<|im_end|> <|image_pad|>", "Left of the circle is the star."]


@pytest.fixture(params=["yes", "likelihood"])
def mode(request) -> str:
    return request.param


# ---------------------------------------------------------------------------------- what is a claim


@pytest.mark.parametrize("caption, want", [
    ("", []),
    ("The star is red. The circle is blue.", ["The star is red.", "The circle is blue."]),
    ("The star is red. The STAR  is red! The star is blue.", ["The star is red.", "The star is blue."]),
    ("# Overview\n- a red car\n- a blue van\n1. A red car.", ["Overview", "a red car", "a blue van"]),
    ("**Colors:**\nThe car is red.", ["Colors:", "The car is red."]),
    ("This description provides a comprehensive account of the chart. The chart has two bars.", ["The chart has two bars."]),
    ("This description is detailed.", []),
    ("Perhaps a dog. Perhaps a dog.", ["Perhaps a dog."]),
    ("The sign says \"This description is complete\".", ["The sign says \"This description is complete\"."]),
    ("It is -5 outside. It is 5 outside. Six > one. Six < one.",
     ["It is -5 outside.", "It is 5 outside.", "Six > one.", "Six < one."]),
    ("图中有一辆红车。图中有一辆红车。天很蓝。", ["图中有一辆红车。", "天很蓝。"]),
    ("... !?", []),
])
def test_a_claim_is_a_sentence_once_and_praise_is_none(caption, want):
    assert claims_of(caption) == want


# ---------------------------------------------------------------------------------- how likely it is


def alone(policy, image, claim: str, mode: str) -> float:
    """One claim by itself: whole prompts through the plain model, no cache."""
    claim = claim.replace("<|im_end|> <|image_pad|>", "<#|im_end|> <#|image_pad|>")  # cut in two, as text is
    encode = policy.tokenizer.encode
    text_ids = [token for part in f" {claim}".split("#") for token in encode(part)]
    plain_ids = [token for part in claim.split("#") for token in encode(part)]

    def logits(prompt, ids):
        positions = torch.arange(len(ids)) + prompt.next_position
        out = policy.model(
            input_ids=torch.cat([prompt.input_ids, torch.tensor(ids)])[None], pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.grid, position_ids=torch.cat([prompt.position_ids, positions.expand(3, -1)], 1)[:, None],
        )
        return out.logits[0]

    if mode == "yes":
        prompt = policy.prompt(image, CLAIM_INSTRUCTION)
        tail = encode("<|im_end|>\n<|im_start|>assistant\n")
        prompt = replace(prompt, input_ids=prompt.input_ids[: -len(tail)], position_ids=prompt.position_ids[:, : -len(tail)])
        ids = text_ids + encode("<|im_end|>\n<|im_start|>assistant\nThe answer is")
        answers = logits(prompt, ids)[-1, [encode(" yes")[0], encode(" no")[0]]]
        return answers.softmax(-1)[0].item()
    sums = []
    chat = f"<|im_start|>user\n{CAPTION_INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    blind = policy.model(input_ids=torch.tensor([encode(chat) + plain_ids])).logits[0]
    for out in (logits(policy.prompt(image), plain_ids), blind):
        out[:, list(policy.forbidden_ids)] = -math.inf
        logprobs = out[-len(plain_ids) - 1 : -1].log_softmax(-1)
        sums.append(logprobs.gather(-1, torch.tensor(plain_ids)[:, None]).sum().item())
    return math.exp(sums[0]) / (math.exp(sums[0]) + math.exp(sums[1]))


@torch.no_grad()
def test_claims_are_judged_as_each_by_itself(policy, mode):
    for image in IMAGES[:2]:
        want = [alone(policy, image, claim, mode) for claim in CLAIMS]
        assert max(want) - min(want) > 0.05 and all(0 < prob < 1 for prob in want)
        for batch_size in (2, 32):
            assert Checker(policy, mode, batch_size)(image, CLAIMS) == pytest.approx(want, abs=2e-5)
    assert Checker(policy, mode)(IMAGES[0], []) == []


def test_claims_of_a_large_image_are_run_a_few_at_a_time(policy, mode, monkeypatch):
    """32 rows with an image of 16,000 tokens each took 19 GB of cache at 3 billion parameters, 30 at 7."""
    shapes, forward = [], type(policy.model.model).forward
    monkeypatch.setattr(type(policy.model.model), "forward", lambda self, **inputs: shapes.append(
        inputs["attention_mask"].shape) or forward(self, **inputs))
    want = Checker(policy, mode)(IMAGES[0], CLAIMS)
    (_, length), (rows, _), *_ = shapes  # of the image and the instruction, and of the claims behind it
    assert rows == len(CLAIMS)
    for room, most in ((2 * length + 1, 2), (1, 1)):  # a row alone always runs
        shapes.clear()
        monkeypatch.setattr("reward.branches.CACHE_TOKENS", room)
        assert Checker(policy, mode)(IMAGES[0], CLAIMS) == pytest.approx(want, abs=2e-5)
        assert shapes[1][0] == most


def test_likelihood_by_hand(policy, monkeypatch):
    """ln p of -5 with the image and -7 without: e^-5 / (e^-5 + e^-7) = 0.8808. A claim that is as likely
    without has a half, and a long claim's words count all: -30 against -20 nats is 4.5e-5."""
    logprobs = {"a": (-5.0, -7.0), "b": (-4.0, -4.0), "c": (-30.0, -20.0)}
    monkeypatch.setattr(Checker, "_log_likelihoods", lambda self, image, claims: torch.tensor(
        [logprobs[claim][image is None] for claim in claims]))
    assert Checker(policy, "likelihood")("image", ["a", "b", "c"]) == pytest.approx([0.8808, 0.5, 4.54e-5], abs=1e-4)


def test_a_checker_that_breaks_is_no_zero(policy, mode):
    policy.model.lm_head.weight.data[:] = math.nan
    [[claim]] = judge_claims(["A star."], IMAGES[:1], ["a"], Checker(policy, mode))
    assert claim == {"claim": "A star.", "score": None, "failure": "the model's logits are not finite"}


def test_yes_and_no_must_begin_with_other_tokens(policy, monkeypatch):
    """The shipped tokenizer writes " yes" as two tokens, of which the first tells it from " no"."""
    assert policy.tokenizer.convert_ids_to_tokens(Checker(policy).answer_ids) == ["Ġy", "Ġno"]
    monkeypatch.setattr(claims_page, "YES_NO", ("yes", "yesterday"))
    with pytest.raises(ValueError, match=r"^expected the checker's tokenizer to begin 'yes' and 'yesterday' with two tokens"):
        Checker(policy, "yes")
    Checker(policy, "likelihood")


# ------------------------------------------------------------------------------------ what it earns


class Scripted:
    """Judges by a table, and notes what it was asked."""

    def __init__(self, **probs: float):
        self.probs, self.asked = probs, []

    def __call__(self, image, claims):
        self.asked.append((image, list(claims)))
        return [self.probs[claim] for claim in claims]


EXAMPLES = [Example("one", "1.png", ()), Example("two", "2.png", ())]


def earned(captions, checker, weight=0.5, accuracy=(0.25, 0.5, 0.75, 1.0), keys=("k", "k", "l", "l")) -> Rewards:
    def score(captions, examples, keys, lengths):
        rewards = torch.tensor(accuracy)
        return Rewards(rewards, {"accuracy": rewards.clone()}, [record(True)] * 4)

    examples = [EXAMPLES[0]] * 2 + [EXAMPLES[1]] * 2
    return add_correctness(captions, examples, keys, [1] * 4, score, checker, weight)


def test_the_part_hand_computed():
    """Mean of 0.9 and 0.5; 0.9 once though said twice; nothing said; one claim of two that could be judged."""
    checker = Scripted(A=0.9, B=0.5, C=math.nan, D=0.2)
    result = earned(["A\nB", "A\nA\na", "...", "C\nD"], checker)
    assert checker.asked == [("1.png", ["A", "B"]), ("2.png", ["C", "D"])]  # siblings' once, each image once
    assert result.parts["correctness"].tolist() == pytest.approx([0.35, 0.45, 0.0, 0.1])
    assert result.rewards.tolist() == pytest.approx([0.6, 0.95, 0.75, 1.1])
    assert result.weights == {"correctness": 0.5} and result.stats["failed_claims"] == pytest.approx(1 / 5)
    assert [len(claims) for claims in result.claims] == [2, 1, 0, 2]
    failed = earned(["A", "C", "C", "D"], checker)
    assert failed.rewards.isnan().tolist() == [False, True, True, False]  # not measured, never 0


def test_parts_apart_hand_computed():
    """Each part by itself: a caption that says nothing has a correctness of 0, one whose claims failed has none."""
    config = toy_config(group_size=4, normalize_parts=True, scale_by_std=False)
    result = earned(["A", "B", "...", "C"], Scripted(A=0.9, B=0.6, C=math.nan), keys=("k",) * 4)
    # accuracy less its mean 0.5 of three; 0.5 times (correctness less its mean 0.5)
    want = [-0.25 + 0.2, 0.0 + 0.05, 0.25 - 0.25, 0.0]
    assert compare_siblings(result, config).tolist() == pytest.approx(want, abs=1e-6)


def test_a_group_in_anothers_place_has_its_claims(batch):
    old, new = (earned(captions, Scripted(A=0.9, B=0.5)) for captions in (["A"] * 4, ["B"] * 4))
    _, merged = put_groups(batch[0].groups(0, 2), old, batch[0].groups(2, 3), replace(
        new, rewards=new.rewards[:2], parts={key: part[:2] for key, part in new.parts.items()},
        records=new.records[:2], claims=new.claims[:2]), [1])
    assert [claim["claim"] for [claim] in merged.claims] == ["A", "A", "B", "B"]
    assert merged.parts["correctness"].tolist() == pytest.approx([0.45, 0.45, 0.25, 0.25])


def test_too_many_claims_that_fail_stop_the_run(batch):
    result = earned(["A", "B", "C", "A\nC"], Scripted(A=0.9, B=0.5, C=math.nan))  # 2 of 5 claims
    rollouts = batch[0].groups(0, 2)
    assert measure_step(rollouts, result, toy_config(max_failed_share=0.4))["failed_claims"] == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"^40% of the step's claims could not be scored \(the model's logits"):
        measure_step(rollouts, result, toy_config(max_failed_share=0.3))


def test_the_audit_hand_computed():
    rows = [{"id": "a", "caption": "x", "reward": 1.0, "length": 1, "questions": [], "claims": claims} for claims in (
        [{"score": 0.9, "failure": ""}, {"score": 0.1, "failure": ""}], [], [{"score": None, "failure": "x"}],
        [{"score": 0.7, "failure": ""}])]
    numbers = audit(rows)
    assert numbers["correctness"] == pytest.approx((0.5 + 0.7) / 2) and numbers["doubted_claims"] == pytest.approx(1 / 3)
    assert numbers["claims"] == pytest.approx(4 / 4)
    assert "correctness" not in audit([{key: value for key, value in row.items() if key != "claims"} for row in rows])


def test_attacks_by_part():
    """The shipped verifier, and a checker that knows the facts, to which what is vague is true. No attack
    has more of a part than the whole truth, and each lacks much of the accuracy."""
    rows = measure([make_scene("heldout", index) for index in range(6)])
    truth, guessed = rows.pop("the whole truth"), rows.pop("half of it guessed")
    assert truth["correctness"] == 1 and truth["accuracy"] > 0.9 and truth["empty"] == 0
    assert 0.3 < guessed["correctness"] < 0.8 and guessed["accuracy"] < truth["accuracy"] - 0.2
    assert {name: row["correctness"] for name, row in rows.items()} == {
        "one safe claim": 1, "one safe claim, nine times": 1, "vague claims": 1, "claims about nothing": 0, "no claim": 0}
    assert all(row["accuracy"] < truth["accuracy"] - 0.3 for row in rows.values())
    assert rows["one safe claim, nine times"]["empty"] == pytest.approx(8 / 9) and rows["claims about nothing"]["empty"] == 1


# ------------------------------------------------------------------------------------------ in a run


def test_it_is_off_and_loads_nothing_unless_asked():
    assert [name for name, (_, preset) in PRESETS.items() if preset.reward_config.correctness_weight] == ["caprl-true"]
    assert load_reward(toy_config(), torch.device("cpu")).image_models == {}
    with pytest.raises(ValueError, match=r"^correctness_weight -1.0: expected"):
        RewardConfig(correctness_weight=-1.0)
    with pytest.raises(ValueError, match="^reward judge: expected neither"):
        toy_config(reward="judge", correctness_weight=0.5)


def test_the_checker_is_the_named_model_or_the_initial_policy(tmp_path, tokenizer):
    other = build_policy(tokenizer, seed=1)
    for part in (other.model, tokenizer, other.image_processor):
        part.save_pretrained(tmp_path / "other")
    device, weights = torch.device("cpu"), []
    for path in (str(tmp_path / "other"), ""):
        reward = load_reward(toy_config(correctness_weight=0.5, checker=path, checker_mode="likelihood"), device)
        checker = reward.image_models["checker"].model
        assert not any(parameter.requires_grad for parameter in checker.parameters())
        weights.append(weights_hash(checker))
    assert weights == [weights_hash(other.model), weights_hash(load_policy("data/toy/policy", device).model)]
    with pytest.raises(ValueError, match=r"^nowhere/at/all: expected"):
        load_checker("nowhere/at/all", "yes", device)


TINY = dict(data="toy:train:6", prompts_per_step=2, group_size=3, max_new_tokens=32, probe_images=2, audit_every=0,
            correctness_weight=0.5, checker_mode="likelihood", normalize_parts=True, resample_flat=1, save_every=1)


def test_a_run_records_claims_and_resumes_bit_for_bit(tmp_path):
    whole, parts = (toy_config(run_dir=str(tmp_path / name), num_steps=2, **TINY) for name in ("whole", "parts"))
    train(whole)
    train(replace(parts, num_steps=1))
    train(replace(parts, resume=True))
    for name in ("metrics.jsonl", "audit.jsonl", "rollouts/step_000001.jsonl", "final/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    rows = read_log(tmp_path / "whole/rollouts/step_000000.jsonl")
    for row in rows:
        scores = [claim["score"] for claim in row["claims"]]
        assert [claim["claim"] for claim in row["claims"]] == claims_of(row["caption"])
        assert row["correctness"] == pytest.approx(sum(scores) / len(scores))
        assert row["parts"]["correctness"] == pytest.approx(0.5 * row["correctness"])
        assert row["reward"] == pytest.approx(sum(row["parts"].values()))
    metrics = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0])
    assert metrics["reward_correctness"] == pytest.approx(sum(row["parts"]["correctness"] for row in rows) / 6)
    assert metrics["failed_claims"] == 0
    with pytest.raises(ValueError, match="^correctness_weight 0.25: expected 0.5 as the run to resume"):
        train(toy_config(run_dir=whole.run_dir, num_steps=3, resume=True, **TINY | {"correctness_weight": 0.25}))


# -------------------------------------------------------------------------------- in an evaluation


def evaluated(id: str, caption: str, scores: list[float | None], claims: list[tuple], recall: float | None = None) -> dict:
    """claims: (probability, or None where it could not be judged; what the facts say)."""
    questions = [{"id": f"{id}:{n}", "family": "all", "score": score} for n, score in enumerate(scores)]
    judged = [{"claim": "x", "score": prob, "failure": "" if prob is not None else "not finite", "is_true": truth}
              for prob, truth in claims]
    row = {"id": id, "caption": caption, "questions": questions, "claims": judged}
    return row if recall is None else row | {"recall": recall}


ROWS = [
    evaluated("1", "a b c", [1.0, 0.0], [(0.9, True), (0.6, False), (0.2, True)], 0.5),
    evaluated("1", "a b", [1.0, None], [(0.4, None), (None, False)], 0.25),
    evaluated("2", "a", [0.0], [], 0.0),
    evaluated("3", "", [None], [], 0.0) | {"error": "no picture"},
]


def test_the_numbers_of_an_evaluation_hand_computed():
    numbers = {key: value["mean"] for key, value in summarize_claims(ROWS).items()}
    assert numbers == pytest.approx({
        "Prism": (1 + 0 + 0) / 3,  # each question's mean over the captions, then over questions
        "precision": 2 / 4,  # above a half: 0.9 and 0.6, of the four that were judged
        "exact precision": 2 / 4, "checker right": 1 / 3,  # 0.9 is; 0.6 and 0.2 are not
        "exact recall": (0.5 + 0.25 + 0) / 3, "claims": 5 / 3, "words": 2.0,  # the failed one counts nowhere
    })
    low, high = (summarize_claims(ROWS)["exact recall"][end] for end in ("low", "high"))
    assert 0 <= low < 0.25 < high <= 0.375 + 1e-9  # a draw of two images: 0, or 0.375 where both are the first


def test_differences_hand_computed():
    others = [evaluated("1", "a", [1.0], [(0.9, True)], 1.0), evaluated("2", "a b", [1.0], [(0.9, False)], 1.0)]
    numbers = claim_differences(ROWS, others)
    # image 1: 1 - 2/4, image 2 has no claim to compare with; words 1 - 2.5 and 2 - 1
    assert numbers["precision"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert numbers["words"]["mean"] == pytest.approx((-1.5 + 1) / 2)
    assert numbers["exact recall"]["mean"] == pytest.approx((1 - 0.375 + 1 - 0) / 2)
    tables = {("b", "first"): {"all": {}}, ("b", "second"): {"all": {}}}
    table = add_claims({("b", "first"): ROWS, ("b", "second"): others}, tables)
    assert tables["b", "second"]["all"]["claims"] == summarize_claims(others)
    assert "| b | first | 0.333 (" in table and "| b | second, less first |" in table and "+0.500 (+0.500 to +0.500)" in table
    plain = [{key: value for key, value in row.items() if key != "recall"} | {
        "claims": [{"claim": "x", "score": 1.0, "failure": ""}]} for row in ROWS]
    assert "exact" not in add_claims({("b", "first"): plain}, tables)  # no facts, no column


def test_a_picture_that_cannot_be_opened_fails_alone(tmp_path):
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    pictures = [Picture(name, tmp_path / f"{name}.png", ()) for name in ("a", "gone")]
    rows = [{"id": name, "caption": caption, "questions": []} for name, caption in (
        ("gone", "It is red."), ("a", "It is red."), ("gone", "It is blue."))]
    benchmark = Benchmark("b", "choice", "choice", pictures, [])
    rows = with_claims(benchmark, rows, lambda image, claims: open_image(image) and [0.9])
    assert [row["id"] for row in rows] == ["gone", "a", "gone"]
    assert [claim["claim"] for row in rows for claim in row["claims"]] == ["It is red.", "It is red.", "It is blue."]
    failures = [row["claims"][0]["failure"] for row in rows]
    assert failures[1] == "" and "gone.png" in failures[0] == failures[2] and rows[0]["claims"][0]["score"] is None


def test_a_caption_that_is_not_there_has_no_recall():
    """It was 0 in the rows."""
    rows = [{"id": SCENES[0].id, "caption": "", "questions": []} | change for change in ({}, {"error": "broken"})]
    benchmark = Benchmark("toy:train:1", "choice", "choice", [Picture(SCENES[0].id, "x.png", ())], [])
    assert [row.get("recall") for row in with_claims(benchmark, rows, Scripted())] == [0.0, None]


def test_a_checker_that_cannot_see_is_named_before_anything_is_asked():
    """It was when the first captioner's answers were there, and these were lost."""
    for checker, reason in (("data/toy/verifier", "^data/toy/verifier: expected a checker's folder"),
                            ("", "^expected a model's folder or a hub name, got an empty text")):
        with pytest.raises(ValueError, match=reason):
            next(judged_rows(CheckerConfig(checker), [], iter(())), None)


def test_the_program_measures_captioner_and_checker(tmp_path, capsys):
    """A perfect captioner, one with each value wrong, and one that says one safe thing. The checker of
    this test knows nothing: what the facts say stands beside what it says."""
    files = {}
    for name, told in (("true", 0.0), ("false", 1.0)):
        lines = []
        for index in range(3):
            scene = make_scene("heldout", index)
            facts = [fact for fact in perturb(scene.facts, told, random.Random(index)) if fact.attribute != "left of"]
            facts = [fact for fact in facts if fact.attribute != "above"]
            lines.append(json.dumps({"id": scene.id, "caption": write_caption(scene.family, facts)}))
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(lines))
    evaluate.main(["claims", "--captions", *(f"{name}={path}" for name, path in files.items()), "--floors", "--verifier",
                   "data/toy/verifier", "--checker", "data/toy/policy", "--checker-mode", "likelihood", "--data",
                   "toy:heldout:3", "--out", str(tmp_path / "out.jsonl")])
    table = capsys.readouterr().out.split("Claims, each")[1]
    lines = {line.split(" | ")[1]: line.split(" | ") for line in table.splitlines() if line.startswith("| toy")}
    assert lines["true"][4] == "1.000 (1.000 to 1.000)" and lines["false"][4] == "0.000 (0.000 to 0.000)"
    assert lines["false, less true"][4] == "-1.000 (-1.000 to -1.000)" and "no caption" in lines
    assert float(lines["true"][5].split()[0]) > 0.9 and lines["false"][5].startswith("0.000")
    rows = read_log(tmp_path / "out.jsonl")
    assert all(claim["is_true"] in (True, None) for row in rows[:3] for claim in row["claims"]) and rows[0]["recall"] > 0.9
    written = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert written[0]["families"]["all"]["claims"]["exact precision"]["mean"] == 1
    assert "Claims, each" in (tmp_path / "out.md").read_text()
    assert write_page(tmp_path / "out.jsonl").exists()
