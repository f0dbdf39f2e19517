import json
import math
import random

import numpy as np
import pytest
import torch

from data.examples import Example, Question
from grpo.config import RewardConfig
from reward.caprl import Answer
from tools.audit import (
    AuditConfig,
    _another_of_the_family,
    audit,
    audit_run,
    format_audit,
    main,
    probe,
    rank_correlation,
    read_rows,
    replay,
    within_group_correlation,
)


def one(source: int, chosen: int | None, gold: int = 0, options=("x", "y"), **more) -> dict:
    correct = chosen == gold
    return {"question": f"q{source}", "options": list(options), "gold": gold, "abstain": None, "source": source,
            "chosen": chosen, "correct": correct, "score": float(correct), "failure": ""} | more


def row(id: str, questions: list[dict], reward: float | None = 0.5, length: int = 5, caption: str = "a b c") -> dict:
    return {"id": id, "caption": caption, "length": length, "reward": reward, "questions": questions}


@pytest.mark.parametrize("change, message", [
    ({"reward": "much"}, r"line 1: expected 'reward' in .*, found 'much'"), ({"questions": None}, "questions.*, found None"),
    ({"questions": [one(0, 0, score="1")]}, "expected 'score' in"), ({"questions": [one(0, [1])]}, "expected 'chosen' in"),
    ({"questions": [one(0, 2)]}, "line 1: expected gold, abstain and chosen among"), ({"questions": [one(0, -1)]}, "among"),
    ({"questions": [one(0, 0, gold=5)]}, "among"), ({"questions": [one(0, 0, options=[])]}, "among the options, got {'que"),
    ({"claims": "none"}, "expected 'claims' in the form"), ({"claims": [{"claim": "x"}]}, "line 1: expected 'claims' in"),
    ({"claims": [{"claim": "x", "score": None, "failure": ""}]}, "line 1: expected 'score' in the form"),
])
def test_records_of_another_kind_are_named(tmp_path, change, message):
    (tmp_path / "rollouts").mkdir()
    path = tmp_path / "rollouts/step_000000.jsonl"
    path.write_text(json.dumps(row("i", [one(0, 0)]) | change))
    (tmp_path / "rollouts/step_000000 (copy).jsonl").write_text("no step of the run")
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        audit_run(AuditConfig(tmp_path))
    path.write_text(json.dumps(row("i", [one(0, 0)])))
    assert audit_run(AuditConfig(tmp_path))["steps"] == 1
    path.write_text(json.dumps({key: value for key, value in row("i", []).items() if key != "reward"}))
    with pytest.raises(ValueError, match="line 1: expected the key 'reward'"):
        audit_run(AuditConfig(tmp_path))


def test_shares_of_sentences_that_say_nothing_hand_computed():
    captions = ["This caption is clear and full.", "A cat sits. Perhaps it sleeps. A cat sits. It is red.", ""]
    found = audit([row(f"{n}", [one(0, 0)], caption=caption) for n, caption in enumerate(captions)])
    shares = [found[f"{kind}_share"] for kind in ("praise", "hedge", "repeat")]
    assert shares == pytest.approx([1 / 3, (1 / 4) / 3, (1 / 4) / 3])


def test_audit_hand_computed():
    rows = [
        row("i", [one(0, 0), one(1, 0, gold=1)], 0.5, 10),
        row("i", [one(0, 0), one(1, None, gold=1)], 0.5, 30, "a b c d a b c d"),
        row("j", [one(0, 0), one(0, 1, options=("y", "x")), one(1, 2, options=("x", "y", "z"), abstain=2)], 0.0, 10),
        row("j", [one(0, 1), one(0, 1, options=("y", "x")), one(1, 0, failure="too long")], 1.0, 20),
    ]
    found = audit(rows)
    assert found["gold_letters"] == [round(7 / 9, 4), round(2 / 9, 4)]  # the failed question counts nowhere
    assert found["chosen_letters"] == [0.5, 0.375, 0.125]  # 4, 3 and 1 of the 8 that could be read
    assert found["abstain_share"] == pytest.approx(1 / 9) and found["unparsed_share"] == pytest.approx(1 / 9)
    assert found["shuffle_agreement"] == 0.5  # (x, x) agrees; (y, x) does not
    assert found["flat_groups"] == 0.5 and found["repetition"] == pytest.approx(0.2 / 4)
    # (0, -10), (0, 10), (-.5, -5), (.5, 5)
    assert found["length_correlation"] == pytest.approx(5 / math.sqrt(0.5 * 250))


def test_split_half_of_independent_halves_hand_computed():
    """Halves (1, 1), (0, 0), (1, 0), (0, 1) within one group: r = 0. With (1, 1), (0, 0) twice and the others once:
    deviations all 1/2, 4 equal in sign and 2 opposite, r = 2/6, stepped up 2r / (1 + r) = 1/2."""
    def caption(a, b):
        return row("i", [one(0, 0 if a else 1), one(1, 0 if b else 1)])

    assert audit([caption(1, 1), caption(0, 0), caption(1, 0), caption(0, 1)])["split_half"] == pytest.approx(0)
    rows = [caption(1, 1), caption(0, 0)] * 2 + [caption(1, 0), caption(0, 1)]
    assert audit(rows)["split_half"] == pytest.approx(0.5)
    assert math.isnan(audit([caption(1, 1), caption(1, 1)])["split_half"])


def test_what_cannot_be_told_is_nan_and_no_rows_break_nothing():
    found = audit([row("i", [], None)])
    assert all(
        math.isnan(found[key])
        for key in ("split_half", "length_correlation", "shuffle_agreement", "flat_groups")
    )
    # of four groups two are flat, one varies, and of one nothing was measured: as in metrics.jsonl
    rewards = [("i", 0.5), ("i", 0.5), ("j", 1.0), ("j", 0.0), ("k", None), ("k", None), ("l", 0.25), ("l", None)]
    assert audit([row(id, [], reward) for id, reward in rewards])["flat_groups"] == 0.5
    judged = audit([row("i", [one(0, None, gold=None, options=())], 0.4)])
    assert judged["gold_letters"] == [] and math.isnan(judged["abstain_share"])


def test_within_group_correlation_against_a_loop():
    rng = random.Random(0)
    groups = [rng.choice("abc") for _ in range(60)]
    x = [rng.random() + ord(group) for group in groups]  # large differences between groups must not enter
    y = [0.5 * a % 1 + rng.random() - 3 * ord(group) for a, group in zip(x, groups)]
    y[7] = math.nan
    dx, dy = [], []
    for name in "abc":
        members = [(a, b) for group, a, b in zip(groups, x, y) if group == name and not math.isnan(b)]
        dx += [a - sum(p[0] for p in members) / len(members) for a, _ in members]
        dy += [b - sum(p[1] for p in members) / len(members) for _, b in members]
    assert within_group_correlation(groups, x, y) == pytest.approx(np.corrcoef(dx, dy)[0, 1])


def test_rank_correlation_hand_computed():
    assert rank_correlation(["a"] * 3, [1, 2, 3], [10, 20, 90]) == (pytest.approx(1), 1)
    # group b: ranks 0, 1, 2 against 2, 1, 0; group c never varies in x and does not count
    value, number = rank_correlation(list("aaabbbcc"), [1, 2, 3, 1, 2, 3, 5, 5], [1, 2, 3, 3, 2, 1, 0, 1])
    assert (value, number) == (pytest.approx(0), 2)
    # ties at their mean rank: (0.5, 0.5, 2) against (0, 1, 2): 1.5 / sqrt(1.5 * 2)
    assert rank_correlation(["a"] * 3, [1, 1, 2], [1, 2, 3])[0] == pytest.approx(1.5 / math.sqrt(3))
    assert rank_correlation(["a"] * 3, [1, 2, math.nan], [1, 2, 0])[0] == pytest.approx(1)


QUESTIONS = (Question("What color?", ("red", "blue", "pink"), 0), Question("How many?", ("one", "two"), 1))


def reads(captions, asked, keys):
    """Chooses the first option whose text the caption holds, or else the first."""
    return [
        [Answer(next((i for i, text in enumerate(one.options) if text in caption), 0)) for one in group]
        for caption, group in zip(captions, asked)
    ]


def test_the_probe_tells_floors_from_the_real_thing():
    """Two images of a family have opposite truths; a caption of the other family answers the count alone."""
    other = (Question("What color?", ("red", "blue", "pink"), 1), Question("How many?", ("one", "two"), 0))
    examples = [Example(str(i), None, (QUESTIONS, other)[i % 2], "aabb"[i % 4]) for i in range(40)]
    captions = [("red two", "blue one", "red two", "blue one")[i % 4] for i in range(40)]
    found = probe(captions, examples, reads, RewardConfig(num_questions=1, question_draw="independent", soft=True))
    assert found["probe_accuracy"] == 1 and found["probe_shuffle_agreement"] == 1
    assert found["probe_other_image"] == pytest.approx(0.0, abs=0.01)
    assert found["probe_no_caption"] == pytest.approx((1 / 3 + 1 / 2) / 2, abs=0.12)


def test_the_other_image_is_of_the_family_where_there_is_one():
    families = ["a", "b", "a", "c", "b"]
    examples = [Example(str(i), None, QUESTIONS, family) for i, family in enumerate(families)]
    assert [_another_of_the_family(examples, place) for place in range(5)] == [2, 4, 0, 4, 1]


def test_a_guesser_by_letter_agrees_with_itself_never():
    """Two shuffles of two options are the same prompt half of the time: such pairs say nothing."""
    def always_a(captions, asked, keys):
        return [[Answer(0) for _ in group] for group in asked]

    examples = [Example(str(i), None, QUESTIONS[1:]) for i in range(40)]
    assert probe(["x"] * 40, examples, always_a, RewardConfig())["probe_shuffle_agreement"] == 0


def test_a_run_is_audited_over_its_steps(tmp_path, capsys):
    (tmp_path / "rollouts").mkdir()
    for step, reward in enumerate((0.0, 1.0)):
        rows = [row("i", [one(0, 0), one(1, step)], 0.5), row("i", [one(0, 0), one(1, 1)], reward)]
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = audit_run(AuditConfig(tmp_path, min_asked=4))
    assert found["steps"] == 2 and found["questions"] == found["asked_often"] == 2
    assert found["always_right"] == ["i:0"] and found["always_wrong"] == []
    assert found["mean"]["flat_groups"] == 0
    main(["audit", str(tmp_path)])
    assert "always_right: 0 of the 0 questions" in capsys.readouterr().out  # by default 8 answers are needed
    assert "always_right: 1 of the 2 questions asked often enough: i:0" in format_audit(found)
    with pytest.raises(ValueError, match="expected a run folder with rollouts/step_"):
        audit_run(AuditConfig(tmp_path / "none"))
    probes = tmp_path / "audit.jsonl"
    probes.write_text('{"step": 0, "probe_accuracy": 0.5, "probe_no_caption": 0.25}\n{"probe_accuracy": 1.0}\n')
    found = audit_run(AuditConfig(tmp_path))["mean"]
    assert (found["probe_accuracy"], found["probe_no_caption"]) == (0.75, 0.25)
    probes.write_text('{"step": 0, "probe_accuracy": "much"}\n')
    with pytest.raises(ValueError, match="audit.jsonl row 1: expected 'probe_accuracy' in the form .* found 'much'"):
        audit_run(AuditConfig(tmp_path))


def test_a_question_without_failure_has_a_score(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row("a", [one(0, 1) | {"score": None}])))
    with pytest.raises(ValueError, match="r.jsonl line 1: expected 'score' in the form .* found None"):
        read_rows(path)
    path.write_text(json.dumps(row("a", [one(0, None, failure="too long") | {"score": None}])))
    assert len(read_rows(path)) == 1
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/step_000000.jsonl").write_text(json.dumps(row("a", [one(0, 1)]) | {"length": None}))
    with pytest.raises(ValueError, match="line 1: expected 'length' in the form .* found None"):
        audit_run(AuditConfig(tmp_path))


def test_replay_hand_computed():
    rows = [
        row("i", [one(0, 0), one(1, 1)], caption="x x"), row("i", [one(0, 1), one(1, 1)], caption="y y"),
        row("j", [one(0, 0), one(1, 0, failure="too long")], caption="x"), row("j", [one(0, None), one(1, 1)], caption="z"),
    ]
    found = replay(rows, reads, batch_size=3)
    # x x: 0, 0 (one agrees); y y: 1, 1 (both); x: 0 (agrees); z: 0, 0 (neither)
    assert found["agreement"] == pytest.approx(4 / 7) and found["questions"] == 7
    assert found["accuracy before"] == pytest.approx((0.5 + 0 + 1 + 0) / 4)
    assert found["accuracy after"] == pytest.approx((1 + 0 + 1 + 1) / 4)
    assert (found["rank correlation within groups"], found["groups behind it"]) == (pytest.approx(1), 1)  # j: 1, 1


def test_records_without_questions_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "caption": "x"}\n')
    with pytest.raises(ValueError, match="r.jsonl line 1: expected the key 'questions', got"):
        read_rows(path)
    path.write_text(json.dumps(row("a", [{"question": "rating", "gold": None}])))
    with pytest.raises(ValueError, match="line 1: expected a question as asked with"):
        read_rows(path)
    path.write_text(json.dumps(row("a", [one(0, None, gold=None)])))
    with pytest.raises(ValueError, match="expected answers of a verifier .* found a judge's ratings"):
        main(["replay", str(path), "--verifier", "data/toy/verifier"])


def test_questions_of_all_sorts_are_replayed_and_those_in_words_refused(tmp_path):
    """CaptionQA offers its abstain option on some questions only: the verifier's call on all of them had failed."""
    def of_one_sort(captions, asked, names):
        assert len({question.abstain for group in asked for question in group}) == 1
        return reads(captions, asked, names)

    assert replay([row("i", [one(0, 0), one(1, 1, abstain=1)], caption="x x")], of_one_sort)["questions"] == 2
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row("a", [one(0, None, gold=-1, options=[])])))
    with pytest.raises(ValueError, match="expected answers of a verifier to questions with options"):
        main(["replay", str(path), "--verifier", "data/toy/verifier"])


def test_a_replay_that_could_score_nothing_is_no_result(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row("i", [one(0, None, failure="too long")])))
    with pytest.raises(ValueError, match="r.jsonl: expected at least one question that both verifiers could score"):
        main(["replay", str(path), "--verifier", "data/toy/verifier"])


def test_the_replay_command_on_the_shipped_verifier(tmp_path, capsys):
    """The verifier that wrote the records agrees with itself."""
    from data.toy.world import make_scene, toy_example, write_caption
    from reward.caprl import caption_rewards, load_verifier

    scenes = [make_scene("heldout", index) for index in range(2)]
    examples = [toy_example(scene) for scene in scenes for _ in range(2)]
    captions = [text for scene in scenes for text in (write_caption(scene.family, scene.facts), "")]
    verifier = load_verifier("data/toy/verifier", torch.device("cpu"))
    result = caption_rewards(captions, examples, [e.id for e in examples], [1] * 4, verifier, RewardConfig())
    rows = [{"id": e.id, "caption": c, "questions": r} for e, c, r in zip(examples, captions, result.records)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["replay", str(tmp_path / "r.jsonl"), "--verifier", "data/toy/verifier"])
    said = capsys.readouterr().out
    assert "agreement: 1.000" in said and "rank correlation within groups: 1.000" in said
