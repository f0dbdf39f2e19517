"""The questions that need the image, and that can be answered from it.

Every question is put to a vision-language model with the image and without it. All are measured
first, then decided on: another rule on a second run uses the same measurements.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.choices import fold_choice
from data.curate.answers import answer_by_options
from data.curate.work import Inputs, count_table, finish, work_through
from data.examples import Example, Question, load_examples
from data.export import question_row
from data.images import picture_hash
from data.io import text_hash
from data.pictures import merge_pictures
from data.ranges import check_range
from grpo.distributed import all_or_none, compute_dtype, init_distributed
from grpo.pretrained import load_policy
from reward.caprl import Answer, Asked, PromptWriter, shuffle_options
from reward.style import words


@dataclass(frozen=True)
class FilterConfig:
    """Settings of `python -m data.curate filter`. The rule of 4 of 4 and 0 of 4 is the published
    one."""

    data: str
    """Images with questions, in any format that data/formats.py reads."""
    out: str
    """A folder for the filtered set."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """The vision-language model that answers, a local folder or a hub name; each rank loads it
    whole."""
    tries: int = 4
    """Shuffles of the options; each is offered with the image and without it."""
    min_with_image: int = 4
    """Right answers that are needed with the image."""
    max_without_image: int = 0
    """Right answers that are allowed without it. 0 of 4 alone lets 0.75 ** 4 = 32% of pure guesses
    through."""
    max_prior: float = 1.5
    """Mean probability of the right option without the image that is allowed, as a multiple of
    chance. Ours."""
    max_similarity: float = 0.75
    """Similarity that is allowed between two questions with the same answer on one image. 1 lets
    all but exact repeats through. Ours."""
    max_questions: int = 0
    """Questions kept per image, those hardest to guess first; 0 for all."""
    batch_size: int = 32
    """Questions put to the model at a time; any value gives the same answers."""
    retry_failed: bool = False
    """Try again the images that could not be opened or had a question that could not be scored."""
    seed: int = 0

    def __post_init__(self):
        check_range(self, "tries batch_size", at_least=1)
        check_range(self, "min_with_image max_without_image", at_least=0, at_most=self.tries)
        check_range(self, "max_prior max_similarity max_questions", at_least=0)


AnswerQuestions = Callable[[Example, bool, Sequence[Asked]], list[Answer]]
"""(whose questions, whether the image is shown, questions with shuffled options) -> an answer with
probabilities for each."""


def filter_questions(config: FilterConfig, answer: AnswerQuestions | None = None) -> None:
    """Keeps the questions that are answered rightly with the image and not without it, by `answer`
    or the configured model."""
    device, folder = init_distributed(), Path(config.out)
    with all_or_none("start"):
        examples = load_examples(config.data)
        if answer is None:
            model = load_policy(config.model, device, compute_dtype(device), writes=False)
            answer = partial(answer_by_options, model, PromptWriter(model.tokenizer),
                             batch_size=config.batch_size)
    examples = merge_pictures(examples)
    settings = {key: getattr(config, key) for key in ("data", "model", "tries", "seed")}
    # Measurements go by the place of a question. In a file that has changed since, another question
    # may be there.
    questions = [[example.id, *map(question_row, example.questions)] for example in examples]
    settings["questions"] = text_hash(json.dumps(questions))
    inputs = [(example.id, example) for example in examples]
    work = partial(measure_questions, answer=answer, config=config)
    forms = {"failed": FORM, "measured": FORM}
    rows = work_through(inputs, folder, settings, config.retry_failed, 1, work, forms)
    decisions = decide_questions(examples, rows, config)
    finish(folder, rows, kept_examples(examples, decisions), filter_report(examples, decisions),
           decisions)


def kept_examples(examples: Sequence[Example], rows: Sequence[dict]) -> Iterable[Example]:
    for example, row in zip(examples, rows, strict=True):
        verdicts = zip(example.questions, row["questions"])
        kept = tuple(question for question, verdict in verdicts if verdict["fate"] == "kept")
        if kept:
            yield replace(example, questions=kept)


# ---------------------------------------------------------------------------------- measurements


NUMBERS = {"with_image": int, "without_image": int, "prior": (int, float)}
FORM = {"reason": str, "questions": [({"failure": str}, NUMBERS)]}
"""What is expected in rows/, see `data.jsonl.fits`."""


def measure_questions(batch: Inputs, answer: AnswerQuestions, config: FilterConfig) -> list[dict]:
    """A row per image with `measure_question` of each question, and the picture's hash. No
    threshold enters."""
    rows = []
    for id, example in batch:
        asked = []
        for place, question in enumerate(example.questions):
            names = [f"{config.seed}:{id}:{place}:{n}:filter" for n in range(config.tries)]
            asked += [shuffle_options(question, place, random.Random(name)) for name in names]
        try:  # the same options both ways
            seen, blind = (answer(example, with_image, asked) for with_image in (True, False))
        except ValueError as error:
            rows.append({"id": id, "fate": "failed", "reason": str(error), "questions": []})
            continue
        parts = [slice(n, n + config.tries) for n in range(0, len(asked), config.tries)]
        measured = [measure_question(asked[part], seen[part], blind[part]) for part in parts]
        failures = [row["failure"] for row in measured if "failure" in row]
        rows.append({
            "id": id, "fate": "failed" if failures else "measured",
            "reason": failures[0] if failures else "", "questions": measured,
            "picture": picture_hash(example.image),
        })
    return rows


def measure_question(asked: Sequence[Asked], seen: Sequence[Answer],
                     blind: Sequence[Answer]) -> dict:
    """Right answers `with_image` and `without_image`; `prior`, the mean probability of the right
    option without the image."""
    failures = [answer.failure for answer in (*seen, *blind) if answer.failure]
    if failures:
        return {"failure": failures[0]}
    golds = [question.gold for question in asked]
    priors = [answer.probs[gold] for answer, gold in zip(blind, golds, strict=True)]
    return {
        "with_image": sum(answer.chosen == gold for answer, gold in zip(seen, golds, strict=True)),
        "without_image": sum(answer.chosen == gold for answer, gold in zip(blind, golds)),
        "prior": round(sum(priors) / len(priors), 6),
    }


# ------------------------------------------------------------------------------------- decisions


def decide_questions(examples: Sequence[Example], rows: Sequence[dict],
                     config: FilterConfig) -> list[dict]:
    """The rows with the fate of each question beside the numbers that it rests on. Raises
    ValueError for a row that has not the numbers of all its questions."""
    decisions = []
    for example, row in zip(examples, rows, strict=True):
        num, found = len(example.questions), len(row["questions"])
        if found != num and (found or row["fate"] != "failed"):  # there are none without a picture
            raise ValueError(f"{Path(config.out) / 'rows'}: expected {num} questions of id "
                             f"{example.id!r}, found {found}")
        measured = zip(example.questions, row["questions"])
        verdicts = [judge_question(question, numbers, config) for question, numbers in measured]
        fate = "failed" if row["fate"] == "failed" else "filtered"
        questions = select_questions(example.questions, verdicts, config)
        decisions.append(row | {"fate": fate, "questions": questions})
    return decisions


def judge_question(question: Question, measured: dict, config: FilterConfig) -> dict:
    """Its measurements with its fate when it is looked at alone: "kept", or why not."""
    if "failure" in measured:
        return {"fate": "could not be scored", "failure": measured["failure"]}
    fates = {
        "tells its answer": tells_answer(question),
        "wrong with the image": measured["with_image"] < config.min_with_image,
        "right without the image": measured["without_image"] > config.max_without_image,
        "likely without the image": measured["prior"] > config.max_prior / len(question.choices),
    }
    fate = next((fate for fate, is_so in fates.items() if is_so), "kept")
    return {"fate": fate} | measured


def tells_answer(question: Question) -> bool:
    """The right option stands in the question, and no other one does."""
    text = f" {' '.join(words(question.question))} "
    named = [f" {' '.join(words(choice))} " in text for choice in question.choices]
    return named[question.answer_index] and sum(named) == 1


def select_questions(questions: Sequence[Question], verdicts: Sequence[dict],
                     config: FilterConfig) -> list[dict]:
    """Of those kept so far, repeats go, and what is over the cap. Of two alike the one that is
    harder to guess stays."""
    verdicts, chosen = list(map(dict, verdicts)), []
    sound = [place for place, verdict in enumerate(verdicts) if verdict["fate"] == "kept"]
    for place in sorted(sound, key=lambda place: verdicts[place]["prior"]):
        alike = {other: similarity(questions[place], questions[other]) for other in chosen}
        nearest = max(alike, key=alike.get, default=None)
        highest = alike.get(nearest, 0)
        if highest == 1 or highest > config.max_similarity:
            repeat = {"fate": "repeated", "of": nearest, "similarity": round(highest, 4)}
            verdicts[place] |= repeat
        elif config.max_questions and len(chosen) == config.max_questions:
            verdicts[place]["fate"] = "over the cap"
        else:
            chosen.append(place)
    return verdicts


def similarity(a: Question, b: Question) -> float:
    """Shared words over all words of two questions with the same answer. 0 if their answers differ:
    "What color is the cup?" and "What color is the cap?" are two questions."""
    if fold_choice(a.choices[a.answer_index]) != fold_choice(b.choices[b.answer_index]):
        return 0.0
    first, second = set(words(a.question)), set(words(b.question))
    return len(first & second) / len(first | second) if first | second else 1.0


# ---------------------------------------------------------------------------------------- report


def filter_report(examples: Sequence[Example], rows: Sequence[dict]) -> list[str]:
    """Counts by fate, the answer prior before and after, and examples of each fate."""
    failed = Counter(row["reason"] for row in rows if row["fate"] == "failed")
    lines = count_table("images that failed", failed) if failed else []
    by_fate: dict[str, list[tuple[str, Question, dict]]] = {}
    for example, row in zip(examples, rows, strict=True):
        for question, verdict in zip(example.questions, row["questions"]):
            by_fate.setdefault(verdict["fate"], []).append((example.id, question, verdict))
    counts = Counter({fate: len(group) for fate, group in by_fate.items()})
    lines += count_table("questions", counts)
    everything = [entry for group in by_fate.values() for entry in group]
    for name, group in (("all", everything), ("kept", by_fate.get("kept", []))):
        ratios = [verdict["prior"] * len(question.choices) for _, question, verdict in group
                  if "prior" in verdict]
        if ratios:
            above = sum(ratio > 1 for ratio in ratios) / len(ratios)
            mean = sum(ratios) / len(ratios)
            lines.append(f"Without the image the right option is likelier than chance in "
                         f"{above:.1%} of {name} questions; its probability is {mean:.2f} times "
                         "chance on average.")
    for fate, group in by_fate.items():
        lines += ["", f"## {fate}", ""]
        for id, question, verdict in group[:3]:
            numbers = ", ".join(f"{key} {value}" for key, value in verdict.items() if key != "fate")
            lines.append(f"- `{id}` {question.question} {list(question.choices)}, answer "
                         f"{question.choices[question.answer_index]!r}: {numbers}")
    return lines
