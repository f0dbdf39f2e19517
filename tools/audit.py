"""What the mean reward does not tell. Does it still tell captions apart? How noisy is it? Can it be
had for nothing?

Everything here reads rollout rows, as a run writes them to rollouts/step_*.jsonl. They are
dictionaries with `id`, `caption`, `length`, `reward` and `questions`, the records of
reward/caprl.py.

    python -m reward.caprl audit runs/toy

audits a whole run, and this asks another verifier about the same captions:

    python -m reward.caprl replay RECORDS --verifier Qwen/Qwen2.5-7B-Instruct
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from data.choices import LETTERS
from data.examples import Example
from data.images import open_image
from data.io import short
from data.jsonl import check_form, read_jsonl, read_log
from data.ranges import check_range
from grpo.config import RewardConfig, TrainConfig
from grpo.distributed import compute_dtype, local_device
from grpo.log import ROLLOUTS
from grpo.policy import Policy
from grpo.rollout import sample_rollouts
from reward.caprl import Asked, AskVerifier, answer_stats, caption_rewards, load_verifier
from reward.style import empty_kinds, repetition
from tools.prism import ask_all
from tools.stats import markdown, mean


def audit(rows: Sequence[dict]) -> dict:
    """The audit of the captions of one step. A value that cannot be told from these rows is NaN.

    gold_letters, chosen_letters   shares of the letters A, B, ...; gold ones as even as the numbers
                                   of options allow
    abstain_share, unparsed_share  of the questions that could be scored
    shuffle_agreement              two different shuffles of a question lead to the same option
    split_half                     reliability of the reward, -1 to 1. Each caption's questions are
                                   halved; r is the correlation of the halves within groups. A
                                   positive r is stepped up to all questions (Spearman and Brown,
                                   2r / (1 + r))
    length_correlation             of reward and length in tokens, within groups: how the reward
                                   pays for length
    repetition                     mean share of repeated 4-grams
    praise_share, hedge_share, repeat_share
                                   mean shares of a caption's sentences that praise the caption,
                                   leave open whether they hold, or were said before
    flat_groups                    share of groups whose measured rewards are all equal, which teach
                                   nothing
    correctness, claims, doubted_claims
                                   where claims are judged: mean correctness of the captions that
                                   have any, claims per caption, share of claims below 0.5
    """
    records = [scored_questions(row) for row in rows]
    groups = [row["id"] for row in rows]
    rewards = [math.nan if row["reward"] is None else row["reward"] for row in rows]
    first, second = ([_half_mean(record, half) for record in records] for half in (0, 1))
    half = within_group_correlation(groups, first, second)
    measured = _paired_by_group(groups, rewards, rewards)
    is_flat = [np.ptp(pairs[:, 0]) < 1e-6 for pairs in measured]
    questions = [question for record in records for question in record]
    sentences = [empty_kinds(row["caption"]) for row in rows]
    stats = answer_stats(records)
    return {
        "gold_letters": _letter_shares([question["gold"] for question in questions]),
        "chosen_letters": _letter_shares([question["chosen"] for question in questions]),
        "abstain_share": stats["abstain_share"],
        "unparsed_share": stats["unparsed_share"],
        "shuffle_agreement": mean(_agreements(records)),
        "split_half": 2 * half / (1 + half) if half > 0 else half,
        "length_correlation": within_group_correlation(
            groups, rewards, [row["length"] for row in rows]),
        "repetition": mean([repetition(row["caption"]) for row in rows]),
    } | {
        f"{kind}_share": mean([kinds.count(kind) / max(len(kinds), 1) for kinds in sentences])
        for kind in ("praise", "hedge", "repeat")
    } | {
        "flat_groups": sum(is_flat) / len(set(groups)) if measured else math.nan,
    } | claim_stats([row["claims"] for row in rows if "claims" in row])


def claim_stats(records: Sequence[Sequence[dict]]) -> dict[str, float]:
    """Of captions with the claims of each; empty where no claims were judged."""
    scores = [[claim["score"] for claim in record if not claim["failure"]] for record in records]
    return {} if not records else {
        "correctness": mean([mean(given) for given in scores if given]),
        "claims": mean(list(map(len, records))),
        "doubted_claims": mean([score < 0.5 for given in scores for score in given]),
    }


def scored_questions(row: dict) -> list[dict]:
    """Those that have a right option and could be scored."""
    return [question for question in row["questions"]
            if question.get("gold") is not None and not question["failure"]]


def audit_step(rows: list[dict], step: int, sampler: Policy, verifier: AskVerifier | None,
               probe_set: Sequence[Example], config: TrainConfig) -> dict:
    """The audit of the step's captions. Every `audit_every` steps, and at the last, also of the
    policy's captions of the probe set."""
    numbers = audit(rows)
    is_last = step + 1 == config.num_steps
    is_due = config.audit_every and (step % config.audit_every == 0 or is_last)
    if verifier is not None and is_due and len(probe_set) > 1:
        prompts = [sampler.prompt(open_image(example.image)) for example in probe_set]
        keys = [f"{config.seed}:probe:{example.id}:caption" for example in probe_set]
        rollouts = sample_rollouts(sampler, prompts, keys, config.max_new_tokens,
                                   config.temperature, config.rollout_tokens)
        numbers |= probe(rollouts.captions, probe_set, verifier, config.reward_config, config.seed)
    return numbers


def probe(captions: Sequence[str], examples: Sequence[Example], verifier: AskVerifier,
          config: RewardConfig, seed: int = 0) -> dict[str, float]:
    """What the verifier answers rightly from each image's own caption, from another image's and
    from none. Every question is asked under two shuffles. The last two are floors: a reward near
    them measures guessing. `captions[i]` is of `examples[i]`. There must be two or more, so that
    there is another image.
    """
    settings = RewardConfig(num_questions=0, num_shuffles=2, abstain=config.abstain)
    keys = [f"{seed}:probe:{example.id}" for example in examples]
    others = [captions[_another_of_the_family(examples, n)] for n in range(len(examples))]
    own, other, none = (
        _records(texts, examples, keys, verifier, settings)
        for texts in (captions, others, [""] * len(examples))
    )
    return {
        "probe_accuracy": answer_stats(own)["accuracy"],
        "probe_other_image": answer_stats(other)["accuracy"],
        "probe_no_caption": answer_stats(none)["accuracy"],
        "probe_shuffle_agreement": mean(_agreements(own)),
    }


def gold_probe(examples: Sequence[Example], verifier: AskVerifier,
               config: RewardConfig) -> dict:
    """Can the verifier do its work at all? What it answers rightly when the caption is the question
    with its right answer, and when there is no caption. "chance" is what guessing gives among the
    options, "failure" why the first question that failed could not be scored, or empty."""
    questions = [question for example in examples for question in example.questions]
    single = [replace(example, questions=(question,))
              for example in examples for question in example.questions]
    told = [f"{question.question} {question.choices[question.answer_index]}."
            for question in questions]
    settings = RewardConfig(num_questions=0, abstain=config.abstain)
    keys, started = [f"gold:{place}" for place in range(len(single))], time.perf_counter()
    records = [_records(texts, single, keys, verifier, settings)
               for texts in (told, [""] * len(single))]
    speed = 2 * len(single) / (time.perf_counter() - started)
    gold, none = map(answer_stats, records)
    failures = (row["failure"] for record in records[0] + records[1] for row in record)
    chance = mean([1 / (len(question.choices) + config.abstain) for question in questions])
    return {"gold_caption": gold["accuracy"], "no_caption": none["accuracy"], "chance": chance,
            "failed_share": (gold["failed_share"] + none["failed_share"]) / 2,
            "unparsed_share": gold["unparsed_share"], "questions_per_second": speed,
            "failure": next(filter(None, failures), "")}


def _records(captions: Sequence[str], examples: Sequence[Example], keys: Sequence[str],
             verifier: AskVerifier, settings: RewardConfig) -> list[list[dict]]:
    lengths = [0] * len(captions)
    return caption_rewards(captions, examples, keys, lengths, verifier, settings).records


def _another_of_the_family(examples: Sequence[Example], place: int) -> int:
    """The next example of the same family, round the end; the next of any where there is none."""
    following = [*range(place + 1, len(examples)), *range(place)]
    alike = [i for i in following if examples[i].family == examples[place].family]
    return [*alike, *following][0]


# ---------------------------------------------------------------------------------- statistics


def within_group_correlation(groups: Sequence[str], x: Sequence[float],
                             y: Sequence[float]) -> float:
    """Pearson's, of the deviations from each group's means; NaN where one never deviates. Pairs
    with NaN are left out."""
    deviations = [pairs - pairs.mean(0) for pairs in _paired_by_group(groups, x, y)]
    dx, dy = np.concatenate(deviations).T if deviations else np.zeros((2, 0))
    spread = math.sqrt(float(dx @ dx) * float(dy @ dy))
    return float(dx @ dy) / spread if spread > 1e-9 else math.nan


def rank_correlation(groups: Sequence[str], x: Sequence[float],
                     y: Sequence[float]) -> tuple[float, int]:
    """Mean over groups of Spearman's rank correlation, ties at their mean rank. Also the number of
    groups behind it: those in which both vary. Pairs with NaN are left out."""
    ranks = [(_ranks(pairs[:, 0]), _ranks(pairs[:, 1])) for pairs in _paired_by_group(groups, x, y)]
    correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in ranks
                    if np.ptp(a) > 0 and np.ptp(b) > 0]
    return mean(correlations), len(correlations)


def _paired_by_group(groups: Sequence[str], x: Sequence[float],
                     y: Sequence[float]) -> list[np.ndarray]:
    """An (n, 2) array for each group, without the pairs in which one is NaN."""
    pairs_of: dict[str, list[list[float]]] = {}
    for group, *pair in zip(groups, x, y, strict=True):
        if not math.isnan(sum(pair)):
            pairs_of.setdefault(group, []).append(pair)
    return [np.array(pairs, dtype=float) for pairs in pairs_of.values()]


def _ranks(values: np.ndarray) -> np.ndarray:
    values = values.round(6)  # float noise must not order what is equal
    is_more, is_equal = values[:, None] > values, values[:, None] == values
    return is_more.sum(1) + (is_equal.sum(1) - 1) / 2


def _half_mean(record: Sequence[dict], half: int) -> float:
    """Mean score of every other question; all askings of a question fall into one half."""
    sources = list(dict.fromkeys(question["source"] for question in record))[half::2]
    return mean([question["score"] for question in record if question["source"] in sources])


def _agreements(records: Sequence[Sequence[dict]]) -> list[bool]:
    """For each two different shuffles of a question on one caption: was the same option chosen?"""
    agreements = []
    for record in records:
        chosen = [question for question in record if question["chosen"] is not None]
        agreements += [
            a["options"][a["chosen"]] == b["options"][b["chosen"]]
            for a, b in combinations(chosen, 2)
            if a["source"] == b["source"] and a["options"] != b["options"]
        ]
    return agreements


def _letter_shares(places: Iterable[int | None]) -> list[float]:
    places = [place for place in places if place is not None]
    counts = np.bincount(np.array(places, dtype=int))
    return [round(int(count) / len(places), 4) for count in counts]


# ------------------------------------------------------------------------------------ programs


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
    """The other verifier: a local folder, a hub name, or a server's address."""
    verifier_name: str = ""
    """The model's name at that server; NAME=FOLDER says where its tokenizer is."""
    mode: Literal["logits", "sample"] = "logits"
    temperature: float = 0.6
    """Temperature of the replies in mode "sample"."""

    def __post_init__(self):
        check_range(self, "temperature", above=0)


PLACE = (int, NoneType)
RECORD = {"question": str, "options": [str], "gold": PLACE, "abstain": PLACE, "source": PLACE,
          "chosen": PLACE, "correct": (bool, NoneType), "score": (int, float, NoneType),
          "failure": str}
"""The forms of a question as asked, see `data.jsonl.fits`."""
CLAIM = {"score": (int, float, NoneType), "failure": str}
"""And of a claim as judged."""


def read_rows(path: Path, **numbers: tuple) -> list[dict]:
    """Rollout rows of a file, with these numbers in these forms. Raises ValueError for a row that
    is none, naming file and line."""
    rows = []
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        missing = [key for key in ("id", "caption", "questions", *numbers) if key not in row]
        if missing:
            raise ValueError(f"{where}: expected the key {missing[0]!r}, got {sorted(row)}")
        form = {"id": str, "caption": str, "questions": list} | numbers
        check_form(where, row, form | ({"claims": [CLAIM]} if "claims" in row else {}))
        for question in row["questions"]:
            if not isinstance(question, dict) or not set(RECORD) <= set(question):
                raise ValueError(f"{where}: expected a question as asked with {', '.join(RECORD)}, "
                                 f"got {short(question)}")
            scored = {} if question["failure"] else {"score": (int, float)}
            check_form(where, question, RECORD | scored)
            places = {question[key] for key in ("gold", "abstain", "chosen")} - {None}
            allowed = set(range(len(question["options"]))) or {-1}  # -1: an answer in words
            if not places <= allowed:
                raise ValueError(f"{where}: expected gold, abstain and chosen among the options, "
                                 f"got {short(question)}")
        for claim in row.get("claims", ()):
            check_form(where, claim, {} if claim["failure"] else {"score": (int, float)})
        rows.append(row)
    return rows


def audit_run(config: AuditConfig) -> dict:
    """Steps are audited one at a time and averaged, the probes of audit.jsonl too; questions are
    counted over all steps. always_right, always_wrong: questions ("id:place") asked often enough
    whose answers agree."""
    files = sorted(config.run_dir.glob(f"rollouts/{ROLLOUTS}"))
    if not files:
        raise ValueError(f"{config.run_dir}: expected a run folder with rollouts/step_*.jsonl, "
                         "found none")
    path, probes = config.run_dir / "audit.jsonl", []
    for number, row in enumerate(read_log(path), start=1):
        found = {key: value for key, value in row.items() if key.startswith("probe")}
        check_form(f"{path} row {number}", found, dict.fromkeys(found, (int, float, NoneType)))
        probes += [found] if found else []
    steps, right = [], {}
    for path in tqdm(files, desc="audit", unit="step"):
        rows = read_rows(path, reward=(int, float, NoneType), length=(int, float))
        steps.append(audit(rows))
        for row in rows:
            for question in scored_questions(row):
                name = f"{row['id']}:{question['source']}"
                right.setdefault(name, []).append(question["correct"])
    often = {name: answers for name, answers in right.items() if len(answers) >= config.min_asked}
    series = {key: [step[key] for step in steps] for key in steps[0] if "letters" not in key}
    for key in probes[0] if probes else ():
        series[key] = [math.nan if row.get(key) is None else row[key] for row in probes]
    measured = {key: [value for value in values if not math.isnan(value)]
                for key, values in series.items()}
    return {
        "steps": len(steps),
        "first": {key: values[0] for key, values in series.items()},
        "last": {key: values[-1] for key, values in series.items()},
        "mean": {key: mean(values) for key, values in measured.items()},
        "gold_letters": _mean_shares([step["gold_letters"] for step in steps]),
        "chosen_letters": _mean_shares([step["chosen_letters"] for step in steps]),
        "questions": len(right),
        "asked_often": len(often),
        "always_right": sorted(name for name, answers in often.items() if all(answers)),
        "always_wrong": sorted(name for name, answers in often.items() if not any(answers)),
    }


def _mean_shares(steps: Sequence[list[float]]) -> list[float]:
    width = max(map(len, steps), default=0)
    padded = [shares + [0.0] * (width - len(shares)) for shares in steps]
    return [round(mean(shares), 4) for shares in zip(*padded)]


def format_audit(numbers: dict) -> str:
    rows = [[key, *(f"{numbers[when][key]:.3f}" for when in ("first", "last", "mean"))]
            for key in numbers["first"]]
    lines = [markdown(f"over {numbers['steps']} steps | first: | last: | mean:", rows)]
    for key in ("gold_letters", "chosen_letters"):
        shares = (f"{letter} {share:.3f}" for letter, share in zip(LETTERS, numbers[key]))
        lines.append(f"\n{key}: " + "  ".join(shares))
    for key in ("always_right", "always_wrong"):
        names = numbers[key]
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        lines.append(f"\n{key}: {len(names)} of the {numbers['asked_often']} questions asked often "
                     f"enough: {shown}")
    return "\n".join(lines)


def replay(rows: Sequence[dict], verifier: AskVerifier, batch_size: int = 64) -> dict[str, float]:
    """How far another verifier agrees with the recorded answers, on the very same prompts.

    agreement: share of questions with the same choice, unreadable replies among them.
    rank_correlation: mean within groups, of the captions' mean scores. Questions that either could
    not score are left out. Raises ValueError if none is left.
    """
    agree, before, after = [], [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="replay", unit="batch"):
        part = rows[start : start + batch_size]
        captions = [row["caption"] for row in part]
        asked = [list(map(_as_asked, row["questions"])) for row in part]
        names = [f"replay:{start + place}" for place in range(len(part))]
        for row, answers in zip(part, ask_all(captions, asked, names, verifier, write=None)):
            both = [(question, answer) for question, answer in zip(row["questions"], answers)
                    if not question["failure"] and not answer.failure]
            agree += [question["chosen"] == answer.chosen for question, answer in both]
            before.append(mean([question["chosen"] == question["gold"] for question, _ in both]))
            after.append(mean([answer.chosen == question["gold"] for question, answer in both]))
    if not agree:
        raise ValueError("expected at least one question that both verifiers could score, found "
                         "none")
    correlation, num_groups = rank_correlation([row["id"] for row in rows], before, after)
    return {
        "captions": len(rows), "questions": len(agree),
        "accuracy before": float(np.nanmean(before)), "accuracy after": float(np.nanmean(after)),
        "agreement": mean(agree), "rank correlation within groups": correlation,
        "groups behind it": num_groups,
    }


def _as_asked(question: dict) -> Asked:
    return Asked(question["question"], tuple(question["options"]), question["gold"],
                 question["source"], question["abstain"])


def main(arguments: list[str]) -> None:
    programs = {"audit": AuditConfig, "replay": ReplayConfig}
    config = tyro.extras.subcommand_cli_from_dict(programs, args=arguments)
    if isinstance(config, AuditConfig):
        print(format_audit(audit_run(config)))
        return
    rows = read_rows(config.records)
    questions = [question for row in rows for question in row["questions"]]
    if any(question["gold"] is None or not question["options"] for question in questions):
        raise ValueError(f"{config.records}: expected answers of a verifier to questions with "
                         "options, found a judge's ratings, or answers in words")
    device = local_device()
    verifier = load_verifier(config.verifier, device, compute_dtype(device), config.verifier_name,
                             mode=config.mode, temperature=config.temperature)
    try:
        numbers = replay(rows, verifier)
    except ValueError as error:
        raise ValueError(f"{config.records}: {error}") from None
    for key, value in numbers.items():
        print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
