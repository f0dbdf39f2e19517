"""What the mean reward does not tell. Does it still tell captions apart? How noisy is it? Can it be
had for nothing?

Everything here reads rollout rows, as a run writes them to rollouts/step_*.jsonl. They are
dictionaries with `id`, `caption`, `length`, `reward` and `questions`, the records of
reward/caprl.py.

    python -m reward.caprl audit runs/toy                                    # of a whole run
    python -m reward.caprl replay RECORDS --verifier Qwen/Qwen2.5-7B-Instruct    # the same captions, another verifier
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from data.choices import LETTERS
from data.examples import Example
from data.images import open_image
from data.jsonl import read_jsonl
from grpo.config import RewardConfig, TrainConfig
from grpo.policy import Policy
from grpo.rollout import sample_rollouts
from reward.caprl import Asked, AskVerifier, answer_stats, caption_rewards, load_verifier, repetition


def audit(rows: Sequence[dict]) -> dict:
    """Of the captions of one step. A value that cannot be told from these rows is NaN.

    gold_letters, chosen_letters   shares of the letters A, B, ...; gold ones as even as the numbers of options allow
    abstain_share, unparsed_share  of the questions that could be scored
    shuffle_agreement              two different shuffles of a question lead to the same option's text
    split_half                     reliability of the reward, -1 to 1. Each caption's questions are halved; r is the
                                   correlation of the halves within groups. A positive r is stepped up to all
                                   questions (Spearman and Brown, 2r / (1 + r))
    length_correlation             of reward and length in tokens, within groups: how the reward pays for length
    repetition                     mean share of repeated 4-grams
    flat_groups                    share of groups whose measured rewards are all equal, which teach nothing
    always_right, always_wrong     questions ("id:place") on which all captions of two or more agree
    """
    records = [[one for one in row["questions"] if one.get("gold") is not None and not one["failure"]] for row in rows]
    groups = [row["id"] for row in rows]
    rewards = [math.nan if row["reward"] is None else row["reward"] for row in rows]
    halves = [_half_means(record) for record in records]
    half_correlation = within_group_correlation(groups, [a for a, _ in halves], [b for _, b in halves])
    right: dict[str, list[bool]] = {}
    for row, record in zip(rows, records):
        for one in record:
            right.setdefault(f"{row['id']}:{one['source']}", []).append(one["correct"])
    repeated = {question: answers for question, answers in right.items() if len(answers) > 1}
    measured = _paired_by_group(groups, rewards, rewards)
    flat = [one for record in records for one in record]
    stats = answer_stats(records)
    return {
        "gold_letters": _letter_shares([one["gold"] for one in flat]),
        "chosen_letters": _letter_shares([one["chosen"] for one in flat if one["chosen"] is not None]),
        "abstain_share": stats["abstain_share"],
        "unparsed_share": stats["unparsed_share"],
        "shuffle_agreement": _mean(_agreements(records)),
        "split_half": 2 * half_correlation / (1 + half_correlation) if half_correlation > 0 else half_correlation,
        "length_correlation": within_group_correlation(groups, rewards, [row["length"] for row in rows]),
        "repetition": _mean([repetition(row["caption"]) for row in rows]),
        "flat_groups": sum(np.ptp(pairs[:, 0]) < 1e-6 for pairs in measured) / len(set(groups)) if measured else math.nan,
        "always_right": sorted(question for question, answers in repeated.items() if all(answers)),
        "always_wrong": sorted(question for question, answers in repeated.items() if not any(answers)),
    }


def probe(captions: Sequence[str], examples: Sequence[Example], verifier: AskVerifier,
          config: RewardConfig, seed: int = 0) -> dict[str, float]:
    """What the verifier answers rightly from each image's own caption, from another image's and
    from none. Every question is asked under two shuffles. The last two are floors: a reward near
    them measures guessing. `captions[i]` is of `examples[i]`. There must be two or more, so that
    there is another image.
    """
    asking = RewardConfig(num_questions=0, num_shuffles=2, abstain=config.abstain)

    def answers(texts: Sequence[str]) -> list[list[dict]]:
        keys = [f"{seed}:probe:{example.id}" for example in examples]
        return caption_rewards(texts, examples, keys, [0] * len(texts), verifier, asking).records

    others = [captions[_another_of_the_family(examples, place)] for place in range(len(examples))]
    own = answers(captions)
    return {
        "probe_accuracy": answer_stats(own)["accuracy"],
        "probe_other_image": answer_stats(answers(others))["accuracy"],
        "probe_no_caption": answer_stats(answers([""] * len(examples)))["accuracy"],
        "probe_shuffle_agreement": _mean(_agreements(own)),
    }


def gold_probe(examples: Sequence[Example], verifier: AskVerifier, config: RewardConfig) -> dict[str, float]:
    """Can the verifier do its work at all? What it answers rightly when the caption is the question
    with its right answer, and when there is no caption. "chance" is what guessing gives among the
    options."""
    single = [replace(example, questions=(question,)) for example in examples for question in example.questions]
    told = [f"{one.questions[0].question} {one.questions[0].choices[one.questions[0].answer_index]}." for one in single]
    asking = RewardConfig(num_questions=0, abstain=config.abstain)
    keys = [f"gold:{place}" for place in range(len(single))]
    gold, none = (
        answer_stats(caption_rewards(texts, single, keys, [0] * len(single), verifier, asking).records)
        for texts in (told, [""] * len(single))
    )
    chance = _mean([1 / (len(one.questions[0].choices) + config.abstain) for one in single])
    return {"gold_caption": gold["accuracy"], "no_caption": none["accuracy"], "chance": chance,
            "failed_share": gold["failed_share"], "unparsed_share": gold["unparsed_share"]}


def _another_of_the_family(examples: Sequence[Example], place: int) -> int:
    """The next example of the same family, round the end; the next of any where there is none."""
    following = [*range(place + 1, len(examples)), *range(place)]
    return next((i for i in following if examples[i].family == examples[place].family), (place + 1) % len(examples))


# ------------------------------------------------------------------------------------------------------------ statistics


def within_group_correlation(groups: Sequence[str], x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's, of the deviations from each group's means; NaN where one never deviates. Pairs with NaN are left out."""
    deviations = [pairs - pairs.mean(0) for pairs in _paired_by_group(groups, x, y)]
    dx, dy = np.concatenate(deviations).T if deviations else np.zeros((2, 0))
    spread = math.sqrt(float(dx @ dx) * float(dy @ dy))
    return float(dx @ dy) / spread if spread > 1e-9 else math.nan


def rank_correlation(groups: Sequence[str], x: Sequence[float], y: Sequence[float]) -> tuple[float, int]:
    """Mean over groups of Spearman's rank correlation, ties at their mean rank. Also the number of
    groups behind it: those in which both vary. Pairs with NaN are left out."""
    ranks = [(_ranks(pairs[:, 0]), _ranks(pairs[:, 1])) for pairs in _paired_by_group(groups, x, y)]
    found = [float(np.corrcoef(a, b)[0, 1]) for a, b in ranks if np.ptp(a) > 0 and np.ptp(b) > 0]
    return _mean(found), len(found)


def _paired_by_group(groups: Sequence[str], x: Sequence[float], y: Sequence[float]) -> list[np.ndarray]:
    """An (n, 2) array for each group, without the pairs in which one is NaN."""
    found: dict[str, list[tuple[float, float]]] = {}
    for group, *pair in zip(groups, x, y, strict=True):
        if not math.isnan(sum(pair)):
            found.setdefault(group, []).append(pair)
    return [np.array(pairs, dtype=float) for pairs in found.values()]


def _ranks(values: np.ndarray) -> np.ndarray:
    values = values.round(6)  # float noise must not order what is equal
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


def _half_means(record: Sequence[dict]) -> tuple[float, float]:
    """Mean scores of every other question; all askings of a question fall into one half."""
    order = {source: place for place, source in enumerate(dict.fromkeys(one["source"] for one in record))}
    halves = [[one["score"] for one in record if order[one["source"]] % 2 == half] for half in (0, 1)]
    return _mean(halves[0]), _mean(halves[1])


def _agreements(records: Sequence[Sequence[dict]]) -> list[bool]:
    """For each two different shuffles of a question on one caption: was the same option chosen?"""
    return [
        a["options"][a["chosen"]] == b["options"][b["chosen"]]
        for record in records
        for a, b in combinations([one for one in record if one["chosen"] is not None], 2)
        if a["source"] == b["source"] and a["options"] != b["options"]
    ]


def _letter_shares(places: Sequence[int]) -> list[float]:
    return [round(places.count(place) / len(places), 4) for place in range(max(places) + 1)] if places else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# -------------------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class AuditConfig:
    """Audit of a run, from its rollout records."""

    run_dir: tyro.conf.Positional[Path]
    min_asked: int = 8
    """Only questions answered at least so many times are listed as always right or always wrong."""


@dataclass(frozen=True)
class ReplayConfig:
    """Scores the captions of a run again with another verifier: same questions, same shuffles."""

    records: tyro.conf.Positional[Path]
    """A rollouts/step_*.jsonl of a run, or what `evaluate.py prism --out` wrote."""
    verifier: str
    """The other verifier, a local folder or a hub name."""
    mode: Literal["logits", "sample"] = "logits"
    temperature: float = 0.6
    """Of the replies in mode "sample"."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: expected more than 0")


RECORD_KEYS = ("question", "options", "gold", "abstain", "source", "chosen", "correct", "score", "failure")


def read_rows(path: Path) -> list[dict]:
    """Rollout rows of a file. Raises ValueError for a row that is not one, naming file and line."""
    rows = []
    for number, row in read_jsonl(path):
        if missing := [key for key in ("id", "caption", "questions") if key not in row]:
            raise ValueError(f"{path} line {number}: expected the key {missing[0]!r}, got {sorted(row)}")
        for one in row["questions"]:
            if not isinstance(one, dict) or not set(RECORD_KEYS) <= set(one):
                raise ValueError(f"{path} line {number}: expected a question as asked with {RECORD_KEYS}, got {one!r}")
        rows.append(row)
    return rows


def audit_run(config: AuditConfig) -> dict:
    """Steps are audited one at a time and averaged, the probes of audit.jsonl too; questions are counted over all steps."""
    files = sorted(config.run_dir.glob("rollouts/step_*.jsonl"))
    if not files:
        raise ValueError(f"{config.run_dir}: expected a run folder with rollouts/step_*.jsonl, found none")
    log = config.run_dir / "audit.jsonl"
    probes = [row for _, row in read_jsonl(log) if "probe_accuracy" in row] if log.exists() else []
    steps, right = [], {}
    for path in tqdm(files, desc="audit", unit="step"):
        rows = read_rows(path)
        steps.append(audit(rows))
        for row in rows:
            for one in (one for one in row["questions"] if one["gold"] is not None and not one["failure"]):
                right.setdefault(f"{row['id']}:{one['source']}", []).append(one["correct"])
    often = {question: answers for question, answers in right.items() if len(answers) >= config.min_asked}
    series = {key: [step[key] for step in steps] for key, value in steps[0].items() if isinstance(value, float)}
    for key in (key for key in (probes[0] if probes else {}) if key.startswith("probe")):
        series[key] = [math.nan if row[key] is None else row[key] for row in probes]
    return {
        "steps": len(steps),
        "first": {key: values[0] for key, values in series.items()},
        "last": {key: values[-1] for key, values in series.items()},
        "mean": {key: _mean([value for value in values if not math.isnan(value)]) for key, values in series.items()},
        "gold_letters": _mean_shares([step["gold_letters"] for step in steps]),
        "chosen_letters": _mean_shares([step["chosen_letters"] for step in steps]),
        "questions": len(right),
        "asked_often": len(often),
        "always_right": sorted(question for question, answers in often.items() if all(answers)),
        "always_wrong": sorted(question for question, answers in often.items() if not any(answers)),
    }


def _mean_shares(steps: Sequence[list[float]]) -> list[float]:
    width = max(map(len, steps), default=0)
    return [round(_mean([shares[i] if i < len(shares) else 0.0 for shares in steps]), 4) for i in range(width)]


def format_audit(found: dict) -> str:
    lines = [f"| over {found['steps']} steps | first | last | mean |", "| --- | ---: | ---: | ---: |"]
    for key in found["first"]:
        lines.append(f"| {key} | " + " | ".join(f"{found[when][key]:.3f}" for when in ("first", "last", "mean")) + " |")
    for key in ("gold_letters", "chosen_letters"):
        lines.append(f"\n{key}: " + "  ".join(f"{letter} {share:.3f}" for letter, share in zip(LETTERS, found[key])))
    for key in ("always_right", "always_wrong"):
        shown = ", ".join(found[key][:20]) + (", ..." if len(found[key]) > 20 else "")
        lines.append(f"\n{key}: {len(found[key])} of the {found['asked_often']} questions asked often enough: {shown}")
    return "\n".join(lines)


def replay(rows: Sequence[dict], verifier: AskVerifier, batch_size: int = 64) -> dict[str, float]:
    """How far another verifier agrees with the recorded answers, on the very same prompts.

    agreement: share of questions with the same choice, unreadable replies among them. rank_correlation: mean within
    groups, of the captions' mean scores. Questions that either could not score are left out.
    """
    agree, before, after = [], [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="replay", unit="batch"):
        part = rows[start : start + batch_size]
        asked = [
            [Asked(q["question"], tuple(q["options"]), q["gold"], q["source"], q["abstain"]) for q in row["questions"]]
            for row in part
        ]
        names = [f"replay:{start + place}" for place in range(len(part))]
        for row, answers in zip(part, verifier([row["caption"] for row in part], asked, names)):
            both = [(q, a) for q, a in zip(row["questions"], answers) if not q["failure"] and not a.failure]
            agree += [q["chosen"] == a.chosen for q, a in both]
            before.append(_mean([float(q["chosen"] == q["gold"]) for q, _ in both]))
            after.append(_mean([float(a.chosen == q["gold"]) for q, a in both]))
    correlation, num_groups = rank_correlation([row["id"] for row in rows], before, after)
    return {
        "captions": len(rows), "questions": len(agree), "accuracy before": float(np.nanmean(before)),
        "accuracy after": float(np.nanmean(after)), "agreement": _mean(agree), "rank correlation within groups": correlation,
        "groups behind it": num_groups,
    }


def main(arguments: list[str]) -> None:
    config = tyro.extras.subcommand_cli_from_dict({"audit": AuditConfig, "replay": ReplayConfig}, args=arguments)
    if isinstance(config, AuditConfig):
        print(format_audit(audit_run(config)))
        return
    rows = read_rows(config.records)
    if any(one["gold"] is None for row in rows for one in row["questions"]):
        raise ValueError(f"{config.records}: expected answers of a verifier, found a judge's ratings")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    verifier = load_verifier(config.verifier, device, dtype, mode=config.mode, temperature=config.temperature)
    for key, value in replay(rows, verifier).items():
        print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")


def audit_step(rows: list[dict], step: int, sampler: Policy, verifier: AskVerifier | None, probe_set: Sequence[Example],
               config: TrainConfig) -> dict:
    """The audit of the step's captions. Every `audit_every` steps, and at the last, also of the
    policy's captions of the probe set."""
    found = audit(rows)
    is_due = config.audit_every and (step % config.audit_every == 0 or step + 1 == config.num_steps)
    if verifier is not None and is_due and len(probe_set) > 1:
        prompts = [sampler.prompt(open_image(example.image)) for example in probe_set]
        keys = [f"{config.seed}:probe:{example.id}:caption" for example in probe_set]
        captions = sample_rollouts(
            sampler, prompts, keys, config.max_new_tokens, config.temperature, config.rollout_tokens
        ).captions
        found |= probe(captions, probe_set, verifier, config.reward_config, config.seed)
    return found
