"""Training sets out of images: images chosen, questions written on them, questions filtered. Three commands, in this order:

    python -m data.curate images   --images photos --out chosen
    python -m data.curate generate --images chosen/examples.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --out written
    python -m data.curate filter   --data written/examples.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --out set
    python train.py --data set/examples.jsonl

Each runs under torchrun too (`torchrun --nproc-per-node 8 -m data.curate ...`). Each may be stopped in any way and started
again: a line per input goes to OUT/rows/ when it is done, and what is in there is not done again, by however many ranks. When
nothing is left, rank 0 writes OUT/examples.jsonl, with the images beside it, and OUT/report.md. Nothing is deleted.
"""

import base64
import copy
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoModelForImageClassification, DynamicCache
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from data.choices import fold_choice
from data.examples import Example, Question, load_examples, merge_pictures
from data.export import question_row, write_examples
from data.folders import load_images
from data.images import ImageSource, open_image
from data.io import check_room, naming, read_jsonl, to_json
from data.likeness import detail, hash_distances, near_duplicates, perceptual_hash, pixel_hash, semantic_duplicates
from data.program import run_program
from data.rows import Dropped, read_question
from data.written import parse_questions
from grpo.distributed import all_or_none, gather_rows, init_distributed, print0, rank, world_size
from grpo.policy import Policy, chat_text
from grpo.pretrained import load_policy
from grpo.rollout import sample_rollouts
from reward.caprl import Answer, Asked, PromptWriter, choose_letter, pad_left, shuffle_options

A_WEEK = 7 * 24 * 60
"""Minutes that a rank waits for the others: shares of the work are equal in number, not in time."""


# ------------------------------------------------------------------------------------------------ rows that survive a stop


def work_through(inputs: Sequence[tuple[str, Any]], folder: Path, settings: dict, retry_failed: bool, batch_size: int,
                 work: Callable[[Sequence[tuple[str, Any]]], list[dict]], what: str) -> list[dict]:
    """A row for each (id, input), in the order of the inputs, on every rank; `work` is asked for those that have none yet.

    `work` takes a batch and returns a row with `id` and `fate` for each. Raises ValueError for ids that are not unique, and
    where the rows in the folder were made with other settings.
    """
    if again := [id for id, count in Counter(id for id, _ in inputs).items() if count > 1]:
        raise ValueError(f"expected ids that are unique, found {again[0]!r} more than once")
    rows = folder / "rows"
    with all_or_none(what):
        if rank() == 0:
            rows.mkdir(parents=True, exist_ok=True)
            check_settings(folder / "settings.json", settings)
            for path in rows.glob("*.jsonl"):
                mend(path, retry_failed)
    done = read_rows(rows)
    gather_rows([])  # all have read before anyone writes
    mine = [one for one in inputs if one[0] not in done][rank() :: world_size()]
    print0(f"{len(inputs)} {what}, {len(done)} done before")
    with all_or_none(what), (rows / f"rank-{rank():03d}.jsonl").open("a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(mine), batch_size), desc=what, unit="batch", disable=rank() != 0):
            for row in work(mine[start : start + batch_size]):
                file.write(to_json(row) + "\n")
            file.flush()
    done = read_rows(rows)
    return [done[id] for id, _ in inputs]


def check_settings(path: Path, settings: dict) -> None:
    """Writes the settings, or raises ValueError where others are written."""
    if not path.exists():
        unfinished = path.with_name("settings.json.unfinished")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(settings)).items():
        if saved.get(key) != value:
            raise ValueError(f"{path}: expected {key} {value!r} as now asked for, found {saved.get(key)!r}; take another --out")


def mend(path: Path, retry_failed: bool) -> None:
    """Cuts off a last line that was not finished, which is redone, and, if they are to be tried again, rows that failed."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n")]
    if retry_failed:
        kept = [line for line in kept if json.loads(line)["fate"] != "failed"]
    if kept != lines:
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_bytes(b"".join(kept))
        unfinished.replace(path)


def read_rows(folder: Path) -> dict[str, dict]:
    return {row["id"]: row for path in sorted(folder.glob("*.jsonl")) if path.stat().st_size for _, row in read_jsonl(path)}


def finish(folder: Path, examples: Iterable[Example], lines: Sequence[str], decisions: Sequence[dict] = ()) -> None:
    """Rank 0 writes the set, the report and, where measurements were decided on, decisions.jsonl; the others wait."""
    with all_or_none("finish"):
        if rank() == 0:
            if decisions:
                text = "".join(to_json(row) + "\n" for row in decisions)
                (folder / "decisions.jsonl").write_text(text, encoding="utf-8")
            num = write_examples(folder, examples)
            (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print("\n".join([*lines, f"{num} images: {folder / 'examples.jsonl'}"]))


def count_table(name: str, counts: Counter) -> list[str]:
    total = sum(counts.values())
    rows = [f"| {key} | {count} | {count / total:.1%} |" for key, count in counts.most_common()]
    return [f"| {name} | {total} | |", "| --- | ---: | ---: |", *rows, ""]


# ------------------------------------------------------------------------------------------------------ writing questions

WRITING_INSTRUCTION = """\
Write {num} multiple-choice questions about this image. They are for someone who cannot see it and has only read a description \
of it: whoever read a good description can answer all of them, and whoever guesses is right no more often than by chance.

Ask about what can be seen: objects, their number, colors, places and relations, what is written, what a chart says, about a \
different detail each time. Give four options of the same kind, of which exactly one is right and none is silly. Do not let a \
question, or another one, tell the answer, and ask nothing that general knowledge can answer.

Keep to this layout:

#### 1. **The question?**
   - A) an option
   - B) an option
   - C) an option
   - D) an option

**Answer:** B) an option
------"""


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `python -m data.curate generate`."""

    images: str
    """A folder, a JSONL or a parquet file."""
    out: str
    """A folder for the questions."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """The vision-language model that writes, a local folder or a hub name; each rank loads it whole."""
    num_questions: int = 5
    """Questions that are asked for per image."""
    max_new_tokens: int = 2048
    temperature: float = 1.0
    attempts: int = 3
    """How often an image is tried until a sound question comes."""
    batch_size: int = 16
    """Images at a time."""
    retry_failed: bool = False
    """Try again what failed in an earlier run."""
    seed: int = 0

    def __post_init__(self):
        if min(self.num_questions, self.max_new_tokens, self.attempts, self.batch_size) < 1 or not self.temperature > 0:
            raise ValueError("expected num_questions, max_new_tokens, attempts, batch_size of at least 1, temperature over 0")


WriteTexts = Callable[[Sequence[Image.Image], Sequence[str]], list[tuple[str, bool]]]
"""(images, the name of each one's random stream) -> for each, the text and whether it was cut off."""


def generate(config: GenerateConfig, write: WriteTexts | None = None) -> None:
    """Questions on every image, by `write` or the configured model."""
    device, folder = init_distributed(A_WEEK), Path(config.out)
    with all_or_none("start"):
        images = load_images(Path(config.images))
        if write is None:
            model = load_policy(config.model, device, "auto" if device.type == "cuda" else torch.float32)
            write = partial(write_texts, model, config=config)
    settings = asdict(config)
    for key in ("out", "batch_size", "retry_failed"):
        settings.pop(key)
    work = partial(write_batch, write=write, config=config)
    rows = work_through(images, folder, settings, config.retry_failed, config.batch_size, work, "images")
    sources = dict(images)
    examples = (
        Example(row["id"], sources[row["id"]], tuple(map(read_question, row["questions"]))) for row in rows if row["questions"]
    )
    dropped = Counter(one["reason"] for row in rows for attempt in row["attempts"] for one in attempt["dropped"])
    lines = count_table("images", Counter(f"{row['fate']}: {row['reason']}".strip(": ") for row in rows))
    lines += [f"{sum(len(row['questions']) for row in rows)} questions", ""]
    finish(folder, examples, lines + (count_table("dropped blocks", dropped) if dropped else []))


def write_batch(batch: Sequence[tuple[str, ImageSource]], write: WriteTexts, config: GenerateConfig) -> list[dict]:
    """A row per image: its questions, and every attempt with the text as it was written and what of it was dropped."""
    rows, waiting = {}, {}
    for id, source in batch:
        rows[id] = {"id": id, "fate": "failed", "reason": "no sound question", "questions": [], "attempts": []}
        try:
            waiting[id] = open_image(source)
        except ValueError as error:
            rows[id]["reason"] = str(error)
    for attempt in range(config.attempts):
        keys = [f"{config.seed}:{id}:questions:{attempt}" for id in waiting]
        texts = write(list(waiting.values()), keys) if waiting else []
        for id, (text, truncated) in zip(list(waiting), texts, strict=True):
            found = parse_questions(text)
            questions = [one for one in found if isinstance(one, Question)]
            dropped = [asdict(one) for one in found if isinstance(one, Dropped)]
            rows[id]["attempts"].append({"text": text, "truncated": truncated, "dropped": dropped})
            if questions:
                rows[id] |= {"fate": "written", "reason": "", "questions": list(map(question_row, questions))}
                del waiting[id]
    return list(rows.values())


def write_texts(model: Policy, images: Sequence[Image.Image], keys: Sequence[str],
                config: GenerateConfig) -> list[tuple[str, bool]]:
    prompts = [model.prompt(image, WRITING_INSTRUCTION.format(num=config.num_questions)) for image in images]
    rollouts = sample_rollouts(model, prompts, keys, config.max_new_tokens, config.temperature)
    return list(zip(rollouts.captions, rollouts.truncated.tolist()))


# ---------------------------------------------------------------------------------------------------- filtering questions

SEEING = "Answer a question about this image. Reply with the letter of one option.\n\nQuestion:"
BLIND = """\
Answer a question about an image that you cannot see. Choose the option that is likeliest to be right. \
Reply with the letter of one option.

Question:"""


@dataclass(frozen=True)
class FilterConfig:
    """Settings of `python -m data.curate filter`. The rule of 4 of 4 and 0 of 4 is the published one."""

    data: str
    """Images with questions, in any format that data/examples.py reads."""
    out: str
    """A folder for the filtered set."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """The vision-language model that answers, a local folder or a hub name; each rank loads it whole."""
    tries: int = 4
    """Shuffles of the options; each is offered with the image and without it."""
    min_with_image: int = 4
    """Right answers that are needed with the image."""
    max_without_image: int = 0
    """Right answers that are allowed without it. 0 of 4 alone lets 0.75 ** 4 = 32% of pure guesses through."""
    max_prior: float = 1.5
    """Mean probability of the right option without the image that is allowed, as a multiple of chance. Ours."""
    max_similarity: float = 0.75
    """Of two questions with the same answer on one image; 1 lets all but exact repeats through. Ours."""
    max_questions: int = 0
    """Kept per image, those hardest to guess first; 0 for all."""
    batch_size: int = 32
    """Questions put to the model at a time; any value gives the same answers."""
    retry_failed: bool = False
    """Try again the images that could not be opened or had a question that could not be scored."""
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.max_without_image <= self.tries or not 0 <= self.min_with_image <= self.tries or self.tries < 1:
            raise ValueError("min_with_image and max_without_image: expected 0 to tries, and tries at least 1")
        if self.batch_size < 1 or self.max_questions < 0:
            raise ValueError("batch_size: expected at least 1; max_questions: 0 or more")


AnswerQuestions = Callable[[Example, bool, Sequence[Asked]], list[Answer]]
"""(whose questions, whether the image is shown, questions with shuffled options) -> an answer with probabilities for each."""


def filter_questions(config: FilterConfig, answer: AnswerQuestions | None = None) -> None:
    """Keeps the questions that are answered rightly with the image and not without it, by `answer` or the configured model.

    Measures every question, then decides: another rule on a second run uses the same measurements.
    """
    device, folder = init_distributed(A_WEEK), Path(config.out)
    with all_or_none("start"):
        examples = load_examples(config.data)
        if answer is None:
            model = load_policy(config.model, device, "auto" if device.type == "cuda" else torch.float32, writes=False)
            answer = partial(answer_by_options, model, PromptWriter(model.tokenizer), batch_size=config.batch_size)
    examples = merge_pictures(examples)
    settings = {key: getattr(config, key) for key in ("data", "model", "tries", "seed")}
    # Measurements are by place: of a file that has changed since, they would be of other questions.
    questions = json.dumps([[example.id, *map(question_row, example.questions)] for example in examples])
    settings["questions"] = hashlib.sha256(questions.encode()).hexdigest()[:16]
    inputs = [(example.id, example) for example in examples]
    work = partial(measure_questions, answer=answer, config=config)
    rows = work_through(inputs, folder, settings, config.retry_failed, 1, work, "images")
    decisions = decide_questions(examples, rows, config)
    finish(folder, kept_examples(examples, decisions), filter_report(examples, decisions), decisions)


def kept_examples(examples: Sequence[Example], rows: Sequence[dict]) -> Iterable[Example]:
    for example, row in zip(examples, rows, strict=True):
        kept = tuple(q for q, verdict in zip(example.questions, row["questions"]) if verdict["fate"] == "kept")
        if kept:
            yield Example(example.id, example.image, kept, example.family)


def measure_questions(batch: Sequence[tuple[str, Example]], answer: AnswerQuestions, config: FilterConfig) -> list[dict]:
    """A row per image with `measure_question` of each question. No threshold enters."""
    rows = []
    for id, example in batch:
        asked = [
            shuffle_options(question, place, random.Random(f"{config.seed}:{id}:{place}:{attempt}:filter"))
            for place, question in enumerate(example.questions) for attempt in range(config.tries)
        ]
        try:
            seen, blind = (answer(example, with_image, asked) for with_image in (True, False))  # the same options both ways
        except ValueError as error:
            rows.append({"id": id, "fate": "failed", "reason": str(error), "questions": []})
            continue
        parts = [slice(start, start + config.tries) for start in range(0, len(asked), config.tries)]
        measured = [measure_question(asked[part], seen[part], blind[part]) for part in parts]
        unscored = [one["failure"] for one in measured if "failure" in one]
        fate = {"fate": "failed", "reason": unscored[0]} if unscored else {"fate": "measured", "reason": ""}
        rows.append({"id": id} | fate | {"questions": measured})
    return rows


def measure_question(asked: Sequence[Asked], seen: Sequence[Answer], blind: Sequence[Answer]) -> dict:
    """Right answers `with_image` and `without_image`; `prior`, the mean probability of the right option without the image."""
    if failures := [one.failure for one in [*seen, *blind] if one.failure]:
        return {"failure": failures[0]}
    with_image, without_image = (
        sum(one.chosen == it.gold for one, it in zip(answers, asked, strict=True)) for answers in (seen, blind)
    )
    prior = sum(one.probs[it.gold] for one, it in zip(blind, asked, strict=True)) / len(asked)
    return {"with_image": with_image, "without_image": without_image, "prior": round(prior, 6)}


def decide_questions(examples: Sequence[Example], rows: Sequence[dict], config: FilterConfig) -> list[dict]:
    """The rows with the fate of each question beside the numbers that it rests on."""
    decisions = []
    for example, row in zip(examples, rows, strict=True):
        verdicts = [judge_question(question, one, config) for question, one in zip(example.questions, row["questions"])]
        fate = "failed" if row["fate"] == "failed" else "filtered"
        decisions.append(row | {"fate": fate, "questions": select_questions(example.questions, verdicts, config)})
    return decisions


def judge_question(question: Question, measured: dict, config: FilterConfig) -> dict:
    """Its measurements with its fate, by itself: "kept" or why not."""
    if "failure" in measured:
        return {"fate": "could not be scored", "failure": measured["failure"]}
    fates = {
        "tells its answer": tells_answer(question),
        "wrong with the image": measured["with_image"] < config.min_with_image,
        "right without the image": measured["without_image"] > config.max_without_image,
        "likely without the image": measured["prior"] > config.max_prior / len(question.choices),
    }
    fate = next((fate for fate, is_so in fates.items() if is_so), "kept")
    return {"fate": fate} | {key: measured[key] for key in ("with_image", "without_image", "prior")}


def tells_answer(question: Question) -> bool:
    """The right option stands in the question, and no other one does."""
    text = f" {' '.join(words(question.question))} "
    named = [f" {' '.join(words(choice))} " in text for choice in question.choices]
    return named[question.answer_index] and sum(named) == 1


def words(text: str) -> list[str]:
    """In small letters; a Chinese or Japanese character is a word."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.casefold())


def select_questions(questions: Sequence[Question], verdicts: Sequence[dict], config: FilterConfig) -> list[dict]:
    """Of those kept so far, repeats go, and what is over the cap; of two alike the one that is harder to guess stays."""
    verdicts, chosen = [dict(one) for one in verdicts], []
    sound = [place for place, one in enumerate(verdicts) if one["fate"] == "kept"]
    for place in sorted(sound, key=lambda place: verdicts[place]["prior"]):
        alike = {other: similarity(questions[place], questions[other]) for other in chosen}
        nearest = max(alike, key=alike.get, default=None)
        if nearest is not None and (alike[nearest] == 1 or alike[nearest] > config.max_similarity):
            verdicts[place] |= {"fate": "repeated", "of": nearest, "similarity": round(alike[nearest], 4)}
        elif config.max_questions and len(chosen) == config.max_questions:
            verdicts[place]["fate"] = "over the cap"
        else:
            chosen.append(place)
    return verdicts


def similarity(a: Question, b: Question) -> float:
    """Shared words over all words of two questions with the same answer; 0 if their answers differ: "What color is the cup?"
    and "What color is the cap?" are two questions."""
    if fold_choice(a.choices[a.answer_index]) != fold_choice(b.choices[b.answer_index]):
        return 0.0
    first, second = set(words(a.question)), set(words(b.question))
    return len(first & second) / len(first | second) if first | second else 1.0


def filter_report(examples: Sequence[Example], rows: Sequence[dict]) -> list[str]:
    """Counts by fate, the answer prior before and after, and examples of each fate."""
    pairs = [
        (example.id, question, verdict) for example, row in zip(examples, rows, strict=True)
        for question, verdict in zip(example.questions, row["questions"])
    ]
    lines = []
    if failed := Counter(row["reason"] for row in rows if row["fate"] == "failed"):
        lines += count_table("images that failed", failed)
    if not pairs:
        return lines
    lines += count_table("questions", Counter(verdict["fate"] for _, _, verdict in pairs))
    for name, group in (("all", pairs), ("kept", [pair for pair in pairs if pair[2]["fate"] == "kept"])):
        known = [(verdict["prior"], 1 / len(question.choices)) for _, question, verdict in group if "prior" in verdict]
        if known:
            above = sum(prior > chance for prior, chance in known) / len(known)
            mean = sum(prior / chance for prior, chance in known) / len(known)
            lines.append(f"Without the image the right option is likelier than chance in {above:.1%} of {name} questions; its "
                         f"probability is {mean:.2f} times chance on average.")
    for fate in dict.fromkeys(verdict["fate"] for _, _, verdict in pairs):
        lines += ["", f"## {fate}", ""]
        for id, question, verdict in [pair for pair in pairs if pair[2]["fate"] == fate][:3]:
            numbers = ", ".join(f"{key} {value}" for key, value in verdict.items() if key != "fate")
            lines.append(f"- `{id}` {question.question} {list(question.choices)}, answer "
                         f"{question.choices[question.answer_index]!r}: {numbers}")
    return lines


@torch.no_grad()
def answer_by_options(model: Policy, writer: PromptWriter, example: Example, with_image: bool, asked: Sequence[Asked],
                      batch_size: int) -> list[Answer]:
    """The likeliest offered letter after "The answer is", with all options' probabilities. The image and what comes before the
    question are run once for all questions."""
    ids, positions, pixels = _head(model, example.image if with_image else None)
    rows = [writer.question_ids(one) for one in asked]
    device = model.model.device
    head = DynamicCache(config=model.model.config.get_text_config())
    run = partial(model.model.model, use_cache=True)
    run(input_ids=ids[None].to(device), attention_mask=torch.ones_like(ids)[None].to(device),
        position_ids=positions[:, None].to(device), past_key_values=head, **{key: x.to(device) for key, x in pixels.items()})
    answers = []
    for start in range(0, len(rows), batch_size):
        tokens, mask = pad_left(rows[start : start + batch_size], device)  # (B, L)
        cache = copy.deepcopy(head)
        cache.batch_select_indices(torch.zeros(len(tokens), dtype=torch.long, device=device))
        place = (int(positions.max()) + mask.cumsum(1)).expand(3, -1, -1)  # (3, B, L): text goes on after the image
        seen = torch.cat([mask.new_ones(len(tokens), len(ids)), mask], dim=1)
        hidden = run(input_ids=tokens, attention_mask=seen, position_ids=place, past_key_values=cache).last_hidden_state
        logits = F.linear(hidden[:, -1].float(), model.model.lm_head.weight[writer.letter_ids].float()).cpu()  # (B, letters)
        answers += [choose_letter(row[: len(one.options)]) for row, one in zip(logits, asked[start : start + batch_size])]
    return answers


def _head(model: Policy, image: ImageSource | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Token ids (T,), positions (3, T) and pixels of the prompt up to the question, with the image or without one."""
    instruction = BLIND if image is None else SEEING
    text = chat_text(model.tokenizer, [{"type": "text", "text": instruction}])
    tail = model.tokenizer.encode(text.split(instruction)[1], add_special_tokens=False)
    if image is None:
        ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))
        positions, pixels = torch.arange(len(ids)).expand(3, -1), {}
    else:
        prompt = model.prompt(open_image(image), instruction)
        ids, positions = prompt.input_ids, prompt.position_ids
        pixels = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid}
    if ids[-len(tail) :].tolist() != tail:
        raise ValueError("expected the chat template to end the user's turn with a special token")
    return ids[: -len(tail)], positions[:, : -len(tail)], pixels


# ---------------------------------------------------------------------------------------------------------- choosing images


@dataclass(frozen=True)
class ImagesConfig:
    """Settings of `python -m data.curate images`. Without a source a threshold is ours."""

    images: str
    """A folder, a JSONL or a parquet file."""
    out: str
    """A folder for decisions.jsonl and the chosen images."""
    min_side: int = 64
    """Pixels of the shorter side."""
    min_entropy: float = 0.2
    """Bits per pixel of the gray values' histogram; a blank page has 0, one of text under 1, a photograph 7."""
    min_edges: float = 0.002
    """Share of pixels with an edge."""
    max_hash_distance: int = 32
    """Of 255 bits, up to which two pictures are near duplicates; unrelated ones differ in about 128."""
    benchmarks: tuple[str, ...] = ()
    """Folders, JSONL or parquet files whose images must not be trained on."""
    encoder: str = ""
    """A vision encoder (CLIP, SigLIP, DINOv2, ViT) for duplicates in meaning, as SemDeDup (arXiv 2303.09540) finds them."""
    max_similarity: float = 0.95
    """Cosine of two embeddings, over which one of the images goes."""
    clusters: int = 0
    """Within which embeddings are compared; 0 for one per 1,000 images."""
    classifier: str = ""
    """An image classifier for what is not wanted."""
    unsafe_label: str = "nsfw"
    """The classifier's label for it."""
    max_unsafe: float = 0.5
    """Its probability, over which an image goes."""
    batch_size: int = 32
    retry_failed: bool = False
    """Try again what could not be opened or measured in an earlier run."""
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.clusters < 0:
            raise ValueError("batch_size: expected at least 1; clusters: 0 or more")


Measure = Callable[[Sequence[Image.Image]], list[Any]]


def choose_images(config: ImagesConfig) -> None:
    """Measures every image, then decides on all together; decisions.jsonl has each decision with what it rests on."""
    device, folder = init_distributed(A_WEEK), Path(config.out)
    with all_or_none("start"):
        images = load_images(Path(config.images))
        benchmarks = [(f"{source} {id}", image) for source in config.benchmarks for id, image in load_images(Path(source))]
        extra: dict[str, Measure] = {}
        if config.encoder:
            extra["embedding"] = load_encoder(config.encoder, device)
        if config.classifier:
            extra["unsafe"] = load_classifier(config.classifier, config.unsafe_label, device)
    work = partial(measure_batch, extra=extra)
    settings = {key: getattr(config, key) for key in ("images", "encoder", "classifier", "unsafe_label")}
    rows = work_through(images, folder, settings, config.retry_failed, config.batch_size, work, "images")
    lines, examples, decisions = [], [], []
    if rank() == 0:
        bar = tqdm(benchmarks, desc="benchmarks", unit="image", disable=not benchmarks)
        decisions = decide(rows, {name: perceptual_hash(open_image(image)) for name, image in bar}, config)
        sources = dict(images)
        examples = [Example(row["id"], sources[row["id"]], ()) for row in decisions if row["fate"] == "kept"]
        lines = count_table("images", Counter(row["fate"] for row in decisions))
    finish(folder, examples, lines, decisions)


def measure_batch(batch: Sequence[tuple[str, ImageSource]], extra: dict[str, Measure]) -> list[dict]:
    rows, opened = [], []
    for id, source in batch:
        try:
            image = open_image(source)
        except ValueError as error:
            rows.append({"id": id, "fate": "failed", "reason": str(error)})
            continue
        entropy, edges = detail(image)
        rows.append({
            "id": id, "fate": "measured", "width": image.width, "height": image.height, "digest": pixel_hash(image),
            "hash": perceptual_hash(image).tobytes().hex(), "entropy": round(entropy, 4), "edges": round(edges, 5),
        })
        opened.append((rows[-1], image))
    for name, measure in extra.items():
        for (row, _), value in zip(opened, measure([image for _, image in opened]) if opened else [], strict=True):
            row |= {"fate": "failed", "reason": f"{name}: not finite"} if value is None else {name: value}
    return rows


def load_encoder(path: str, device: torch.device) -> Measure:
    """Embeddings of length 1, in base64 of float16. Raises ValueError if the model is none that sees images."""
    model, processor = _load(AutoModel, path, device)

    @torch.no_grad()
    def embed(images: Sequence[Image.Image]) -> list[str | None]:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(device, model.dtype)
        see = model.get_image_features if hasattr(model, "get_image_features") else model
        out = see(pixel_values=pixels)
        if not isinstance(out, Tensor):
            pooled = getattr(out, "pooler_output", None)
            out = out.last_hidden_state.mean(1) if pooled is None else pooled
        vectors = F.normalize(out.flatten(1).float(), dim=-1).half().cpu().numpy()
        return [base64.b64encode(vector.tobytes()).decode() if np.isfinite(vector).all() else None for vector in vectors]

    return embed


def load_classifier(path: str, label: str, device: torch.device) -> Measure:
    """Probabilities of the label. Raises ValueError if the model has none of that name."""
    model, processor = _load(AutoModelForImageClassification, path, device)
    places = [place for place, name in model.config.id2label.items() if name == label]
    if not places:
        raise ValueError(f"{path}: expected the label {label!r}, found {list(model.config.id2label.values())[:20]}")

    @torch.no_grad()
    def classify(images: Sequence[Image.Image]) -> list[float | None]:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(device, model.dtype)
        probs = model(pixel_values=pixels).logits.float().softmax(-1)[:, int(places[0])].tolist()
        return [round(p, 5) if math.isfinite(p) else None for p in probs]

    return classify


def _load(kind: Any, path: str, device: torch.device) -> tuple[Any, Any]:
    try:
        model = kind.from_pretrained(path, use_safetensors=True)
        return model.to(device).eval(), AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a vision model ({str(error).splitlines()[0][:200]})") from None


def decide(rows: Sequence[dict], benchmark: dict[str, np.ndarray], config: ImagesConfig) -> list[dict]:
    """The rows with their fate: "kept", or the first reason against, with `of`, the picture it is too close to. Of pictures
    alike the largest stays, then the first."""
    decisions = [{key: value for key, value in row.items() if key != "embedding"} for row in rows]
    for row in decisions:
        if row["fate"] == "failed":
            continue
        reasons = {
            "low resolution": min(row["width"], row["height"]) < config.min_side,
            "too simple": row["entropy"] < config.min_entropy or row["edges"] < config.min_edges,
            "unsafe": row.get("unsafe", 0.0) > config.max_unsafe,
        }
        row["fate"] = next((reason for reason, holds in reasons.items() if holds), "kept")
    kept = [row for row in decisions if row["fate"] == "kept"]
    hashes = {row["id"]: np.frombuffer(bytes.fromhex(row["hash"]), dtype=np.uint64) for row in kept}
    if benchmark:
        names, known = list(benchmark), np.stack(list(benchmark.values()), axis=1)
        for row in kept:
            distances = hash_distances(known, hashes[row["id"]])
            row["benchmark_distance"] = int(distances.min())
            if row["benchmark_distance"] <= config.max_hash_distance:
                row |= {"fate": "in a benchmark", "of": names[int(distances.argmin())]}
    by_size = sorted((row for row in decisions if row["fate"] == "kept"), key=lambda row: -row["width"] * row["height"])
    if by_size:
        near = near_duplicates(np.stack([hashes[row["id"]] for row in by_size]), config.max_hash_distance)
        for row, (other, distance) in zip(by_size, near, strict=True):
            row["hash_distance"] = distance
            if distance is not None and distance <= config.max_hash_distance:
                is_exact = row["digest"] == by_size[other]["digest"]
                row |= {"fate": "exact duplicate" if is_exact else "near duplicate", "of": by_size[other]["id"]}
    chosen = [place for place, row in enumerate(decisions) if row["fate"] == "kept"]
    if config.encoder and chosen:
        stored = [base64.b64decode(rows[place]["embedding"]) for place in chosen]
        vectors = np.stack([np.frombuffer(one, dtype=np.float16) for one in stored]).astype(np.float32)
        near = semantic_duplicates(vectors, config.max_similarity, config.clusters, config.seed)
        for place, (other, cosine) in zip(chosen, near, strict=True):
            decisions[place]["similarity"] = cosine
            if cosine is not None and cosine > config.max_similarity:
                decisions[place] |= {"fate": "similar", "of": decisions[chosen[other]]["id"]}
    return decisions


def main(arguments: list[str]) -> None:
    config = tyro.extras.subcommand_cli_from_dict(
        {"images": ImagesConfig, "generate": GenerateConfig, "filter": FilterConfig}, args=arguments
    )
    with naming(Path(config.out)):
        check_room(Path(config.out))
        {ImagesConfig: choose_images, GenerateConfig: generate, FilterConfig: filter_questions}[type(config)](config)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
