"""Prism evaluation (arXiv 2509.22647, section 4.3): questions on a picture, answered from captions.

    1. what is asked      ask_item, and the prompts for answers in words
    2. who answers        read_prompt, word_answerer, ask_all
    3. what is recorded   record
    4. the evaluations    prism, from captions; direct, by a model that looks

Questions with options are asked as the reward asks them (reward/caprl.py). A question without
options is answered in words, on a line that the benchmark's metric scores.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data.benchmarks.benchmark import Benchmark, Picture
from data.benchmarks.metrics import captionqa_abstain_credit, captionqa_offers_abstain
from data.benchmarks.questions import FreeQuestion, Item, Metric
from data.choices import LETTERS
from data.images import open_image
from data.replies import parse_choice, without_thoughts
from grpo.distributed import all_or_none, check_alike, gather_rows, rank, world_size
from grpo.policy import Policy
from grpo.pretrained import check_models
from grpo.rollout import sample_rollouts
from reward.caprl import (
    ANSWER_START,
    CAPTION_AND_QUESTION,
    CAPTION_END,
    CAPTION_START,
    Answer,
    Asked,
    AskVerifier,
    Verifier,
    answer_record,
    shuffle_options,
)
from reward.judge import as_plain_text
from tools.reply_judge import judge_replies_
from tools.stats import mean

PICTURES_AT_A_TIME = 8
"""Pictures whose questions are handed to the answerer together; it makes batches of them."""

# ------------------------------------------------------------------------------- 1. what is asked

CAPTIONQA_ABSTAIN = "Cannot answer from the caption"
LETTER_FORM = "Reply with the letter of one option."
WORDS_FORM = (
    "Reply with the answer alone, on one line: a number, a name or a few words, without a sentence "
    "around it."
)
WORDS_START = "Answer:"
"""Where the model answers in words, its turn begins with this. The rest of the line is the
answer."""

WORDS_PROMPT = f"""\
Answer a question about an image that you cannot see. All that you know about the image is its \
caption. Use no outside knowledge: what the caption does not say, you do not know. \
{WORDS_FORM} Several answers are written as a list, [first, second].

Caption: {CAPTION_START} A bar chart of rainfall. May has 40 mm, June has 55 mm. {CAPTION_END}
Question: How much rain fell in June?
{WORDS_START} 55 mm

Caption: {CAPTION_START} A poster in red letters says: Summer fair, 12 July, Town Hall. \
{CAPTION_END}
Question: Where is the fair?
{WORDS_START} Town Hall

{CAPTION_AND_QUESTION}"""


def ask_item(item: Item, metric: Metric, seed: int, from_caption: bool = True) -> Asked:
    """The question with its options shuffled, always alike for the same seed and id, whatever else
    is asked.

    CaptionQA's abstain option is among the options of questions that are answered from a caption,
    see `captionqa_offers_abstain`. CAPEval's third verdict is the reward's own abstain option.
    """
    question = item.question
    if isinstance(question, FreeQuestion):
        return Asked(question.question, (), gold=-1, source=0)
    offers_abstain = metric == "capeval" or (
        from_caption and metric == "captionqa"
        and captionqa_offers_abstain(question.question, question.choices)
    )
    rng = random.Random(f"{seed}:{item.id}:options")
    asked = shuffle_options(question, 0, rng, offers_abstain)
    if not offers_abstain or metric == "capeval":
        return asked
    options = list(asked.options)
    options[asked.abstain] = CAPTIONQA_ABSTAIN
    return replace(asked, options=tuple(options))


def others_captions(captions: Sequence[list[dict]], seed: int) -> list[list[dict]]:
    """Each picture with the captions of another one, for a floor. Raises ValueError where there is
    only one picture."""
    if len(captions) < 2:
        raise ValueError("floor: expected at least 2 images, one takes another's captions")
    order = random.Random(f"{seed}:others").sample(range(len(captions)), len(captions))
    taken = dict(zip(order, [*order[1:], order[0]]))
    return [captions[taken[place]] for place in range(len(captions))]


def floor_captions(captions: dict[str, list[list[dict]]], num_pictures: int,
                   seed: int) -> dict[str, list[list[dict]]]:
    """Name of the row in the tables -> captions of each picture: another image's, for each
    captioner in `captions`, and none."""
    floors = {
        f"{name}, another image's": others_captions(groups, seed)
        for name, groups in captions.items()
    }
    return floors | {"no caption": [[{"caption": ""}]] * num_pictures}


# --------------------------------------------------------------------------------- 2. who answers


def read_prompt(path: str) -> str:
    """The text of a file with [CAPTION] and then [QUESTION] in it. Raises ValueError for others."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file with a prompt ({error})") from None
    found = re.findall(r"\[CAPTION\]|\[QUESTION\]", text)
    if found != ["[CAPTION]", "[QUESTION]"]:
        raise ValueError(f"{path}: expected [CAPTION] and then [QUESTION], once each, found "
                         f"{', '.join(found) or 'neither'}")
    if "[CAPTION][QUESTION]" in text:  # an empty caption would have no token
        raise ValueError(f"{path}: expected text or a space between [CAPTION] and [QUESTION]")
    return text


def word_answerer(verifier: Verifier, answer_tokens: int, prompt: str = "") -> Verifier:
    """The same model, answering in words of at most so many tokens. They are the likeliest ones
    where the verifier takes the likeliest letter. prompt: as `read_prompt` returns it; the answer
    to it is not begun with `WORDS_START`. Raises ValueError if it leaves no room for a caption."""
    temperature = verifier.temperature if verifier.mode == "sample" else 1e-4
    answerer = verifier.under(
        mode="sample", temperature=temperature, max_new_tokens=answer_tokens,
        prompt_text=prompt or WORDS_PROMPT, answer_start="" if prompt else WORDS_START,
    )
    writer = answerer.writers[False]
    length = len(writer.head_ids + writer.middle_ids + writer.tail_ids) + answer_tokens
    if prompt and length >= answerer.context:
        raise ValueError(f"words_prompt: expected less than the verifier's {answerer.context} "
                         f"tokens, found {length} without caption and question")
    return answerer


def ask_all(captions: Sequence[str], asked: Sequence[Sequence[Asked]], names: Sequence[str],
            choose: AskVerifier, write: AskVerifier | None) -> list[list[Answer]]:
    """As `choose`, but for questions of all sorts. `write` answers those without options. Options
    may include the abstain option; `choose` wants it on all questions of a call or on none."""
    answers: list[list] = [[None] * len(group) for group in asked]
    for answerer, sort in ((write, "words"), (choose, "options"), (choose, "abstain")):
        rows, places, questions = [], [], []
        for row, group in enumerate(asked):
            chosen = [place for place, question in enumerate(group) if _sort(question) == sort]
            if chosen:
                rows.append(row)
                places.append(chosen)
                questions.append([group[place] for place in chosen])
        if not rows:
            continue
        given = answerer([captions[row] for row in rows], questions, [names[row] for row in rows])
        for row, chosen, replies in zip(rows, places, given, strict=True):
            for place, answer in zip(chosen, replies, strict=True):
                answers[row][place] = answer
    return answers


def _sort(asked: Asked) -> str:
    if not asked.options:
        return "words"
    return "options" if asked.abstain is None else "abstain"


# ---------------------------------------------------------------------------- 3. what is recorded


def answer_line(reply: str) -> str | None:
    """The answer: the line that was asked for, without `WORDS_START` or its Chinese form, or what
    the last \\boxed{} has, after any thoughts. None if there is none."""
    _, box, rest = without_thoughts(reply).rpartition("\\boxed{")
    if not box:
        said = re.sub(r"^(?:Answer|答案)[:\uff1a]", "", rest.strip()).strip()
        return said.splitlines()[0].strip() if said else None
    depth = 1
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return " ".join(rest[:place].split()) or None
    return None  # cut off before the box was closed


def record(item: Item, asked: Asked, answer: Answer, metric: Metric) -> dict:
    """The question as asked and answered, and its `score`. That is None where it could not be asked
    (`failure`), 0 where the answer cannot be read (`unparsed`). CapRL's own files have a second
    score, `released_score`."""
    row = {"id": item.id, "family": item.family} | answer_record(asked, answer, soft=False)
    if isinstance(item.question, FreeQuestion):
        line = None if answer.failure else answer_line(answer.reply)
        row |= {"answers": list(item.question.answers), "prediction": line,
                "unparsed": not answer.failure and line is None}
        if not answer.failure:
            row["score"] = 0.0 if line is None else item.question.score(metric, line)
            row["correct"] = row["score"] == 1
        if hasattr(item.question, "released_score"):
            row["released_score"] = (None if answer.failure
                                     else item.question.released_score(line or ""))
        return row
    row["unparsed"] = not answer.failure and answer.chosen is None
    has_abstained = asked.abstain is not None and answer.chosen == asked.abstain
    if metric == "captionqa" and has_abstained:
        row["score"] = captionqa_abstain_credit(len(item.question.choices))
    return row


def _row(benchmark: Benchmark, picture: Picture, asked: Sequence[Asked],
         answers: Sequence[Answer]) -> dict:
    """All questions on a picture, asked once."""
    questions = [
        record(item, question, answer, benchmark.metric)
        for item, question, answer in zip(picture.items, asked, answers, strict=True)
    ]
    scores = [question["score"] for question in questions if question["score"] is not None]
    return {"id": picture.id, "family": picture.items[0].family, "caption": "",
            "accuracy": mean(scores), "questions": questions}


# ------------------------------------------------------------------------------ 4. the evaluations


def prism(benchmark: Benchmark, captions: Sequence[list[dict]], choose: AskVerifier, seed: int = 0,
          write: AskVerifier | None = None, judge: AskVerifier | None = None) -> list[dict]:
    """A row for each caption: id and family of its picture, the caption, and each question as
    asked. `accuracy` is its mean score (NaN if none could be asked).

    `captions` has those of each picture. `choose` answers questions with options, `write` those
    without, see `word_answerer`. `judge` compares replies with right answers, where the metric is
    "judged", see tools/reply_judge.py. Each rank asks on its share of the pictures, and returns all
    rows.
    """
    rows = []
    pairs = list(zip(benchmark.pictures, captions, strict=True))[rank() :: world_size()]
    starts = range(0, len(pairs), PICTURES_AT_A_TIME)
    with all_or_none("answers"):
        for start in tqdm(starts, desc="answers", unit="batch", leave=None, disable=rank() != 0):
            pictures, names, captioned, asked = [], [], [], []
            for picture, group in pairs[start : start + PICTURES_AT_A_TIME]:
                questions = [ask_item(item, benchmark.metric, seed) for item in picture.items]
                pictures += [picture] * len(group)
                asked += [questions] * len(group)
                captioned += group
                names += [f"{seed}:{picture.id}:{k}" for k in range(len(group))]
            told = [n for n, caption in enumerate(captioned) if "error" not in caption]
            answers = iter(ask_all(
                [captioned[n]["caption"] for n in told], [asked[n] for n in told],
                [names[n] for n in told], choose, write,
            ))
            for picture, caption, questions in zip(pictures, captioned, asked, strict=True):
                failed = [Answer(None, failure=caption.get("error", ""))] * len(questions)
                given = failed if "error" in caption else next(answers)
                rows.append(_row(benchmark, picture, questions, given) | caption)
            if benchmark.metric == "judged" and judge:
                judge_replies_(rows[-len(pictures) :], pictures, judge)
    return _gather(benchmark, rows)


def direct(benchmark: Benchmark, policy: Policy, *, seed: int, answer_tokens: int,
           temperature: float, batch_size: int) -> list[dict]:
    """As `prism`, but the policy answers while it sees the picture. A row for each picture, without
    a caption."""
    check_alike({"benchmark": benchmark.contents})
    check_models("policy", policy)
    pictures = benchmark.pictures[rank() :: world_size()]
    asked = [
        (picture, item, ask_item(item, benchmark.metric, seed, from_caption=False))
        for picture in pictures for item in picture.items
    ]
    answers: list[Answer] = []
    starts = range(0, len(asked), batch_size)
    with all_or_none("answers"):
        for start in tqdm(starts, desc="answers", unit="batch", leave=None, disable=rank() != 0):
            answers += _look(policy, asked[start : start + batch_size], seed, answer_tokens,
                             temperature)
    rows, questions, given = [], (question for _, _, question in asked), iter(answers)
    for picture in pictures:
        num = len(picture.items)
        rows.append(_row(benchmark, picture, list(islice(questions, num)),
                         list(islice(given, num))))
    return _gather(benchmark, rows)


def look_text(asked: Asked) -> tuple[str, str]:
    """What the user says to a model that sees the picture, and the given start of the answer."""
    options = [f"{letter}) {text}" for letter, text in zip(LETTERS, asked.options)]
    form, start = (LETTER_FORM, ANSWER_START) if options else (WORDS_FORM, WORDS_START)
    return "\n".join([asked.question, *options, form]), start


def _look(policy: Policy, asked: Sequence[tuple[Picture, Item, Asked]], seed: int,
          answer_tokens: int, temperature: float) -> list[Answer]:
    """The policy's answers. A picture that cannot be opened is the failure of its questions."""
    prompts, keys, failures = [], [], []
    for picture, item, question in asked:
        text, start = look_text(question)
        text = as_plain_text(text, policy)
        try:
            prompts.append(policy.prompt(open_image(picture.image), text, start))
        except ValueError as error:
            failures.append(str(error))
        else:
            keys.append(f"{seed}:{item.id}:direct")
            failures.append("")
    replies = iter(())
    if prompts:
        rollouts = sample_rollouts(policy, prompts, keys, answer_tokens, temperature)
        replies = iter(rollouts.captions)
    answers = []
    for (_, _, question), failure in zip(asked, failures):
        reply = "" if failure else next(replies)
        is_choice = question.options and not failure
        chosen = parse_choice(reply, question.options) if is_choice else None
        answers.append(Answer(chosen, reply=reply, failure=failure))
    return answers


def _gather(benchmark: Benchmark, rows: list[dict]) -> list[dict]:
    """All ranks' rows in the benchmark's order, on every rank; captions keep their order."""
    place = {picture.id: n for n, picture in enumerate(benchmark.pictures)}
    return sorted(gather_rows(rows), key=lambda row: place[row["id"]])
