"""How much can be answered from captions: Prism evaluation (paper, section 4.3), beside its floors and the model that looks.

    python evaluate.py prism --policy data/toy/policy --verifier data/toy/verifier --data toy:heldout:96
    python evaluate.py prism --policy base=Qwen/Qwen2.5-VL-3B-Instruct ours=runs/caprl-3b/final --captions gpt=captions \\
        --floors --data chartqa:ChartQA/data/test-*.parquet mmstar:MMStar.tsv heldout.jsonl --out table3.jsonl
    python evaluate.py floor --policy ours=runs/caprl-3b/final --data mmstar:MMStar.tsv
    python evaluate.py direct --policy Qwen/Qwen2.5-VL-3B-Instruct --data chartqa:ChartQA/data/test-*.parquet
    torchrun --nproc-per-node 8 evaluate.py prism --policy runs/caprl-3b/final --data qa.jsonl

prism: a captioner writes K captions of each image, or they are read from a file or a folder of caption.py; a text-only model
answers the image's questions from each. floor: the same without a caption, and with another image's. direct: a vision-language
model looks itself.

Benchmarks and their metrics are those of data/benchmarks.py. Every question counts once, with the mean over the captions
(the paper's Table 3 is that mean over 4). Intervals are bootstrap 95% intervals over images, differences are taken on the
same questions.
"""

import math
import random
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from caption import caption_batches, model_hash, text_hash
from data.benchmarks import Benchmark, FreeQuestion, Item, Metric, Picture, load_benchmark
from data.captions import caption_rows
from data.images import ImageSource, image_name, open_image, picture_hash
from data.metrics import captionqa_abstain_credit, captionqa_offers_abstain
from grpo.config import run_program
from grpo.disk import check_room, naming
from grpo.distributed import all_or_none, gather_rows, init_distributed, print0, rank, world_size
from grpo.policy import INSTRUCTION, Policy, check_model_path, load_policy
from grpo.report import keep_thumbnail, read_log, to_json
from grpo.rollout import sample_rollouts
from grpo.scores import paired_difference, summarize
from reward.caprl import (
    ANSWER_START,
    CAPTION_END,
    CAPTION_START,
    LETTERS,
    Answer,
    Asked,
    AskVerifier,
    Verifier,
    answer_record,
    load_verifier,
    parse_choice,
    shuffle_options,
)
from reward.judge import as_plain_text

CAPTIONQA_ABSTAIN = "Cannot answer from the caption"
WORDS_START = "Answer:"
"""The answerer's turn is begun with this where it answers in words; the rest of the line is the answer."""
WORDS_FORM = "Reply with the answer alone, on one line: a number, a name or a few words, without a sentence around it."

WORDS_TASK = f"""\
Answer a question about an image that you cannot see. All that you know about the image is its caption. \
Use no outside knowledge: what the caption does not say, you do not know. \
{WORDS_FORM} Several answers are written as a list, [first, second].

Caption: {CAPTION_START} A bar chart of rainfall. May has 40 mm, June has 55 mm. {CAPTION_END}
Question: How much rain fell in June?
{WORDS_START} 55 mm

Caption: {CAPTION_START} A poster in red letters says: Summer fair, 12 July, Town Hall. {CAPTION_END}
Question: Where is the fair?
{WORDS_START} Town Hall"""

PAPER_TABLE = {  # arXiv 2509.22647, Table 3, in percent
    "Qwen2.5-VL-3B": {"chartqa": 65.6, "chartqapro": 27.1, "infovqa": 40.2, "mmstar": 46.4, "seed": 64.1},
    "Qwen2.5-VL-72B": {"chartqa": 80.2, "chartqapro": 38.0, "infovqa": 60.8, "mmstar": 55.0, "seed": 69.3},
    "UnifiedReward as judge, 3B": {"chartqa": 54.9, "chartqapro": 25.1, "infovqa": 33.6, "mmstar": 45.4, "seed": 61.2},
    "Qwen2.5-VL as judge, 3B": {"chartqa": 71.4, "chartqapro": 34.2, "infovqa": 49.3, "mmstar": 47.7, "seed": 64.5},
    "CapRL-3B": {"chartqa": 80.5, "chartqapro": 39.9, "infovqa": 64.8, "mmstar": 55.0, "seed": 70.6},
}

PICTURES_AT_A_TIME = 8
"""Pictures whose questions are handed to the answerer together; it makes its own batches of them."""


@dataclass(frozen=True)
class EvalConfig:
    """What all three evaluations share."""

    data: tuple[str, ...] = ("caprl-qa.jsonl",)
    """Benchmarks: KIND:PATH (docs/formats.md), a JSONL file of images with questions, or toy:SPLIT:NUM."""
    limit: int = 0
    """Only the first so many images of each benchmark; 0 for all."""
    answer_tokens: int = 32
    """Longest answer in words, in tokens."""
    seed: int = 0
    out: str = ""
    """A new file for a JSON line per caption with every question and answer; the tables go beside it, as .md and .json."""

    def __post_init__(self):
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens {self.answer_tokens}: expected at least 1")
        if self.limit < 0:
            raise ValueError(f"limit {self.limit}: expected 0 or more")
        if not self.data:
            raise ValueError("data: expected at least one benchmark")


@dataclass(frozen=True)
class PrismConfig(EvalConfig):
    """Settings of `evaluate.py prism`."""

    policy: tuple[str, ...] = ()
    """Captioners, local folders or hub names; NAME=PATH gives one a name in the tables."""
    captions: tuple[str, ...] = ()
    """Captions that are written already: a folder of caption.py, or JSONL with `id` and `caption`, one or more per image."""
    verifier: str = "Qwen/Qwen2.5-3B-Instruct"
    """The text-only model that answers from captions."""
    verifier_mode: Literal["sample", "logits"] = "logits"
    """Take the likeliest offered letter and the likeliest words, or sample replies (the release)."""
    verifier_temperature: float = 1.0
    """Of the replies in mode "sample", as in the release's evaluation."""
    verifier_max_new_tokens: int = 10
    """Longest reply to a question with options in mode "sample"."""
    num_captions: int = 4
    """K, captions per image; at temperature 0 there is one."""
    instruction: str = INSTRUCTION
    """What the captioner is told."""
    temperature: float = 1.0
    """Of captioning; 0 takes the most likely token."""
    max_new_tokens: int = 4096
    """Longest caption in tokens."""
    batch_size: int = 64
    """Images captioned at a time; any value gives the same captions."""
    rollout_tokens: int = 524_288
    """Tokens that the sampler's cache has room for."""
    floors: bool = False
    """Add rows without a caption, and with another image's captions."""
    cache: str = "runs/cache"
    """Captions are kept here by model, image, instruction and settings, and never written twice; empty for nowhere."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_captions", "max_new_tokens", "batch_size", "rollout_tokens", "verifier_max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: expected 0 or more")
        if not self.verifier_temperature > 0:
            raise ValueError(f"verifier_temperature {self.verifier_temperature}: expected more than 0")
        if not (self.policy or self.captions or isinstance(self, FloorConfig)):
            raise ValueError("expected captioners in policy or captions, got neither")
        if len(names := [name for name, _ in self.captioners]) > len(set(names)):
            raise ValueError(f"expected captioners of different names (NAME=PATH), got {names}")

    @property
    def captioners(self) -> list[tuple[str, str]]:
        """(name, path), policies first."""
        return [(path, path) if Path(path).exists() or "=" not in path else tuple(path.split("=", 1))
                for path in (*self.policy, *self.captions)]


@dataclass(frozen=True)
class FloorConfig(PrismConfig):
    """Settings of `evaluate.py floor`: prism without a caption and, for each captioner, with another image's captions."""


@dataclass(frozen=True)
class DirectConfig(EvalConfig):
    """Settings of `evaluate.py direct`."""

    policy: tuple[str, ...] = ("runs/caprl/final",)
    """Vision-language models that see the image, local folders or hub names."""
    temperature: float = 0.0
    """Of their answers; 0 takes the most likely token."""
    batch_size: int = 64
    """Questions answered at a time."""

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: expected 0 or more")
        if self.batch_size < 1 or not self.policy:
            raise ValueError("expected at least one policy, and a batch_size of at least 1")


# --------------------------------------------------------------------------------------------------------- the captions


def write_captions(policy: Policy, pictures: Sequence[Picture], config: PrismConfig) -> list[list[dict]]:
    """K captions of each picture, from the cache where they are there: rows with caption, tokens and finish reason, or one
    with the `error` that kept the image from being opened."""
    num = config.num_captions if config.temperature else 1
    keys = [_cache_key(picture.image) for picture in pictures]
    settings = f"{config.instruction}\n{config.temperature} {config.max_new_tokens} {config.seed}"
    folder = Path(config.cache) / f"{model_hash(policy)}-{text_hash(settings)}" if config.cache else None
    known = _read_cache(folder) if folder else {}
    missing = {key: picture.image for key, picture in zip(keys, pictures) if any((key, k) not in known for k in range(num))}
    batches = caption_batches(
        policy, missing.items(), num_captions=num, instruction=config.instruction, temperature=config.temperature,
        max_new_tokens=config.max_new_tokens, seed=config.seed, batch_size=config.batch_size,
        rollout_tokens=config.rollout_tokens,
    )
    waiting = iter(missing)
    if missing and folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "about.txt").write_text(settings, encoding="utf-8")
    with tqdm(total=len(missing), desc="captions", unit="image", disable=rank() != 0 or not missing) as bar:
        for batch in batches if missing else ():
            new = [(next(waiting), rows) for rows in batch]
            known |= {(key, k): row for key, rows in new for k, row in enumerate(rows)}
            if folder:  # a file of its own for each batch: nobody else writes to it, and it is whole or not there
                lines = [to_json({"image": key, "k": k} | row) + "\n" for key, rows in new for k, row in enumerate(rows)
                         if "error" not in row]
                new = folder / f"{uuid.uuid4().hex}.unfinished"  # tempfile's would be readable by nobody else
                with naming(folder):
                    new.write_text("".join(lines), encoding="utf-8")
                    new.rename(new.with_suffix(".jsonl"))
            bar.update(len(batch))
    return [[known[key, k] for k in range(num) if (key, k) in known] for key in keys]


def _read_cache(folder: Path) -> dict[tuple[str, int], dict]:
    known = {}
    for path in folder.glob("*.jsonl"):
        for row in read_log(path):
            known[row.pop("image"), row.pop("k")] = row
    return known


def _cache_key(image: ImageSource) -> str:
    """16 digits of the picture's hash; of its name, if it cannot be read."""
    try:
        return picture_hash(image)[:16]
    except (OSError, ValueError):
        return text_hash(image_name(image))


def read_captions(path: str, pictures: Sequence[Picture]) -> list[list[dict]]:
    """Captions of each picture by the ids of all its rows. Raises ValueError for a broken line or a picture without any."""
    by_id: dict[str, list[dict]] = {}
    for where, row in caption_rows(Path(path)):
        if "id" not in row or not (isinstance(row.get("caption"), str) or "error" in row):
            raise ValueError(f"{where}: expected an object with id and caption, got {sorted(row)}")
        kept = {key: row[key] for key in ("caption", "tokens", "finish_reason", "error") if key in row}
        by_id.setdefault(str(row["id"]), []).append(kept)
    captions = [
        [row for id in (picture.id, *picture.other_ids) for row in by_id.get(id, [])] for picture in pictures
    ]
    if missing := [picture.id for picture, group in zip(pictures, captions) if not group]:
        raise ValueError(f"{path}: expected a caption of every image, found none of {len(missing)}, first {missing[0]!r}; "
                         f"its captions are of {', '.join(map(repr, list(by_id)[:3])) or 'no image'}")
    return captions


def others_captions(captions: Sequence[list[dict]], seed: int) -> list[list[dict]]:
    """Each picture with the captions of another one. Raises ValueError where there is only one."""
    if len(captions) < 2:
        raise ValueError("floor: expected at least 2 images, one takes another's captions")
    order = random.Random(f"{seed}:others").sample(range(len(captions)), len(captions))
    taken = dict(zip(order, [*order[1:], order[0]]))
    return [captions[taken[place]] for place in range(len(captions))]


# ---------------------------------------------------------------------------------------------------------- the answers


def ask_item(item: Item, metric: Metric, seed: int, from_caption: bool = True) -> Asked:
    """The question with its options shuffled, always alike for the same seed and id, whatever else is asked.

    CaptionQA's abstain option is among the options of its captions' questions, see `captionqa_offers_abstain`.
    """
    question = item.question
    if isinstance(question, FreeQuestion):
        return Asked(question.question, (), gold=-1, source=0)
    offers = from_caption and metric == "captionqa" and captionqa_offers_abstain(question.question, question.choices)
    asked = shuffle_options(question, 0, random.Random(f"{seed}:{item.id}:options"), offers)
    if not offers:
        return asked
    options = tuple(CAPTIONQA_ABSTAIN if n == asked.abstain else text for n, text in enumerate(asked.options))
    return replace(asked, options=options)


def answer_line(reply: str) -> str | None:
    """The answer: the one line that was asked for. None if there is none."""
    lines = reply.strip().splitlines()
    line = lines[0].strip().removeprefix(WORDS_START).strip() if lines else ""
    return line or None


def record(item: Item, asked: Asked, answer: Answer, metric: Metric) -> dict:
    """The question as asked and answered, and its `score`: None where it could not be asked (`failure`), 0 where the answer
    cannot be read (`unparsed`)."""
    row = {"id": item.id, "family": item.family} | answer_record(asked, answer, soft=False)
    if isinstance(item.question, FreeQuestion):
        line = None if answer.failure else answer_line(answer.reply)
        row |= {"answers": list(item.question.answers), "prediction": line, "unparsed": not answer.failure and line is None}
        if not answer.failure:
            row["score"] = 0.0 if line is None else item.question.score(metric, line)
            row["correct"] = row["score"] == 1
        return row
    row["unparsed"] = not answer.failure and answer.chosen is None
    if metric == "captionqa" and asked.abstain is not None and answer.chosen == asked.abstain:
        row["score"] = captionqa_abstain_credit(len(item.question.choices))
    return row


def ask_all(captions: Sequence[str], asked: Sequence[Sequence[Asked]], names: Sequence[str], choose: AskVerifier,
            write: AskVerifier | None) -> list[list[Answer]]:
    """As `choose`, which wants the abstain option on all questions of a call or on none, but for questions of all sorts."""
    found: list[list] = [[None] * len(group) for group in asked]
    for answerer, options, abstain in ((write, False, False), (choose, True, False), (choose, True, True)):
        places = [
            [n for n, one in enumerate(group) if (bool(one.options), one.abstain is not None) == (options, abstain)]
            for group in asked
        ]
        rows = [row for row, group in enumerate(places) if group]
        if rows:
            questions = [[asked[row][n] for n in places[row]] for row in rows]
            answers = answerer([captions[row] for row in rows], questions, [names[row] for row in rows])
            for row, given in zip(rows, answers, strict=True):
                for n, answer in zip(places[row], given, strict=True):
                    found[row][n] = answer
    return found


def prism(benchmark: Benchmark, captions: Sequence[list[dict]], choose: AskVerifier, seed: int = 0,
          write: AskVerifier | None = None) -> list[dict]:
    """One row per caption: id and family of its picture, the caption, each question as asked, and its mean score as `accuracy`
    (NaN if none could be asked).

    `choose` answers questions with options, `write` those without, see `word_answerer`.
    """
    rows = []
    pairs = list(zip(benchmark.pictures, captions, strict=True))
    for start in tqdm(range(0, len(pairs), PICTURES_AT_A_TIME), desc="answers", unit="batch", disable=rank() != 0):
        part = [
            (picture, k, row) for picture, group in pairs[start : start + PICTURES_AT_A_TIME] for k, row in enumerate(group)
        ]
        asked = [[ask_item(item, benchmark.metric, seed) for item in picture.items] for picture, _, _ in part]
        names = [f"{seed}:{picture.id}:{k}" for picture, k, _ in part]
        told = [n for n, (_, _, row) in enumerate(part) if "error" not in row]
        answers = iter(ask_all([part[n][2]["caption"] for n in told], [asked[n] for n in told], [names[n] for n in told],
                               choose, write))
        for (picture, _, row), group in zip(part, asked, strict=True):
            given = [Answer(None, failure=row["error"])] * len(group) if "error" in row else next(answers)
            rows.append(_row(benchmark, picture, group, given) | row)
    return rows


def _row(benchmark: Benchmark, picture: Picture, asked: Sequence[Asked], answers: Sequence[Answer]) -> dict:
    questions = [
        record(item, one, answer, benchmark.metric) for item, one, answer in zip(picture.items, asked, answers, strict=True)
    ]
    scores = [question["score"] for question in questions if question["score"] is not None]
    mean = sum(scores) / len(scores) if scores else math.nan
    return {"id": picture.id, "family": picture.items[0].family, "caption": "", "accuracy": mean, "questions": questions}


def word_answerer(verifier: Verifier, config: PrismConfig) -> Verifier:
    """The same model, answering in words: likeliest ones where the verifier takes the likeliest letter."""
    temperature = config.verifier_temperature if config.verifier_mode == "sample" else 1e-4
    return Verifier(
        verifier.model, verifier.tokenizer, "sample", temperature, config.answer_tokens, task=WORDS_TASK,
        answer_start=WORDS_START,
    )


def direct(benchmark: Benchmark, policy: Policy, config: DirectConfig) -> list[dict]:
    """As `prism`, but of answers that the policy gives looking at the picture: one row per picture, without a caption."""
    asked = [
        [ask_item(item, benchmark.metric, config.seed, from_caption=False) for item in picture.items]
        for picture in benchmark.pictures
    ]
    flat = [(picture, item, one) for picture, group in zip(benchmark.pictures, asked)
            for item, one in zip(picture.items, group)]
    answers: list[Answer] = []
    for start in tqdm(range(0, len(flat), config.batch_size), desc="answers", unit="batch", disable=rank() != 0):
        part = flat[start : start + config.batch_size]
        prompts, failures = [], []
        for picture, _, one in part:
            task = "Reply with the letter of one option." if one.options else WORDS_FORM
            lines = [one.question, *(f"{letter}) {text}" for letter, text in zip(LETTERS, one.options)), task]
            try:
                prompts.append(policy.prompt(open_image(picture.image), as_plain_text("\n".join(lines), policy),
                                             ANSWER_START if one.options else WORDS_START))
                failures.append("")
            except ValueError as error:
                failures.append(str(error))
        keys = [f"{config.seed}:{item.id}:direct" for (_, item, _), failure in zip(part, failures) if not failure]
        found = sample_rollouts(policy, prompts, keys, config.answer_tokens, config.temperature).captions if keys else []
        replies = iter(found)
        for (_, _, one), failure in zip(part, failures):
            reply = "" if failure else next(replies)
            chosen = parse_choice(reply, one.options) if one.options and not failure else None
            answers.append(Answer(chosen, reply=reply, failure=failure))
    given = iter(answers)
    return [
        _row(benchmark, picture, group, [next(given) for _ in group]) for picture, group in zip(benchmark.pictures, asked)
    ]


# ----------------------------------------------------------------------------------------------------------- the tables


Found = dict[tuple[str, str], list[dict]]
"""(benchmark, captioner) -> a row per caption"""
Tables = dict[tuple[str, str], dict[str, dict[str, float]]]
"""(benchmark, captioner) -> `summarize`"""


def format_table(tables: Tables) -> str:
    lines = [
        "| benchmark | captioner | family | images | questions | score | 95% interval | best caption | words | tokens | cut | "
        "unparsed | failed |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (benchmark, captioner), table in tables.items():
        for family, row in table.items():
            lines.append(
                f"| {benchmark} | {captioner} | {family} | {row['images']} | {row['questions']} | {_number(row['accuracy'])} | "
                f"{_number(row['low'])} to {_number(row['high'])} | {_number(row['best'])} | {_number(row['words'], 1)} | "
                f"{_number(row['tokens'], 1)} | {_number(row['cut'])} | {_number(row['unparsed'])} | {row['failed']} |"
            )
    return "\n".join(lines)


def _number(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def report(benchmarks: Sequence[Benchmark], rows: Found, tables: Tables) -> str:
    """All tables as Markdown: scores, differences to the first captioner, CaptionQA's shares, the paper's rows."""
    parts = [format_table(tables)]
    first = {benchmark: captioner for benchmark, captioner in reversed(rows)}
    differences = [
        (benchmark, captioner, paired_difference(rows[benchmark, first[benchmark]], found))
        for (benchmark, captioner), found in rows.items() if captioner != first[benchmark]
    ]
    if differences:
        lines = ["| benchmark | captioner | less | questions | difference | 95% interval |",
                 "| --- | --- | --- | ---: | ---: | --- |"]
        lines += [
            f"| {benchmark} | {captioner} | {first[benchmark]} | {row['questions']} | {row['difference']:+.3f} | "
            f"{row['low']:+.3f} to {row['high']:+.3f} |" for benchmark, captioner, row in differences
        ]
        parts.append("Paired, on the same questions:\n\n" + "\n".join(lines))
    kinds = {benchmark.name: benchmark.kind for benchmark in benchmarks}
    if "captionqa" in kinds.values():
        lines = ["| captioner | score | accuracy | abstained |", "| --- | ---: | ---: | ---: |"]
        for (benchmark, captioner), table in tables.items():
            if kinds[benchmark] == "captionqa":
                row = [_number(table["all"][key]) for key in ("accuracy", "right", "abstained")]
                lines.append(f"| {captioner} | {' | '.join(row)} |")
        parts.append("CaptionQA:\n\n" + "\n".join(lines))
    columns = [benchmark for benchmark in benchmarks if benchmark.kind in PAPER_TABLE["CapRL-3B"]]
    if columns:
        lines = ["| captioner | " + " | ".join(b.name for b in columns) + " |", "| --- |" + " ---: |" * len(columns)]
        for captioner in dict.fromkeys(captioner for _, captioner in tables):
            cells = [tables.get((b.name, captioner), {}).get("all", {}).get("accuracy", math.nan) * 100 for b in columns]
            lines.append(f"| {captioner} | " + " | ".join(_number(cell, 1) for cell in cells) + " |")
        lines += [f"| paper: {name} | " + " | ".join(str(row[b.kind]) for b in columns) + " |"
                  for name, row in PAPER_TABLE.items()]
        parts.append("Beside the paper's Table 3, in percent (its answerer, its prompts and its looser metrics):\n\n"
                     + "\n".join(lines))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------- the programs


def load_benchmarks(config: EvalConfig) -> list[Benchmark]:
    """Each of `data`. Says how many rows were refused, and the first reason. Raises ValueError for two of one name."""
    found = []
    for source in config.data:
        with all_or_none("data"):
            benchmark = load_benchmark(source)
        if benchmark.refused:
            print0(f"{benchmark.name}: {len(benchmark.refused)} rows or questions refused, the first: {benchmark.refused[0]}")
        kept = benchmark.pictures[: config.limit or None]
        found.append(replace(benchmark, pictures=kept))
    if len({benchmark.name for benchmark in found}) < len(found):  # two files of one kind
        found = [replace(benchmark, name=source) for benchmark, source in zip(found, config.data)]
    return found


def _mine(benchmark: Benchmark) -> Benchmark:
    """This rank's pictures."""
    return replace(benchmark, pictures=benchmark.pictures[rank() :: world_size()])


def _gather(benchmark: Benchmark, rows: Sequence[dict]) -> list[dict]:
    """All ranks' rows in the benchmark's order, on every rank."""
    place = {picture.id: n for n, picture in enumerate(benchmark.pictures)}
    return sorted(gather_rows(list(rows)), key=lambda row: place[row["id"]])  # stable: captions keep their order


def prism_rows(config: PrismConfig, benchmarks: Sequence[Benchmark]) -> Iterator[tuple[str, str, list[dict]]]:
    """(benchmark, captioner, rows) of each pair; every rank gets all rows."""
    device = init_distributed()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with all_or_none("models"):  # now, not when captions have been written
        for path in (*(path for _, path in config.captioners[: len(config.policy)]), config.verifier):
            check_model_path(path)
    if config.captioners and (isinstance(config, FloorConfig) or config.floors):
        for benchmark in benchmarks:
            others_captions([[]] * len(benchmark.pictures), config.seed)  # are there others? Said now, too
    captions: dict[tuple[str, str], list[list[dict]]] = {}  # of all pictures
    for number, (name, path) in enumerate(config.captioners):
        with all_or_none("captions"):
            policy = load_policy(path, device, dtype) if number < len(config.policy) else None
            for benchmark in benchmarks:
                pictures = _mine(benchmark).pictures
                found = write_captions(policy, pictures, config) if policy else read_captions(path, pictures)
                captions[benchmark.name, name] = found
        del policy  # before the next one is loaded
        for benchmark in benchmarks:
            pairs = zip(_mine(benchmark).pictures, captions[benchmark.name, name])
            whole = _gather(benchmark, [{"id": picture.id, "captions": group} for picture, group in pairs])
            captions[benchmark.name, name] = [row["captions"] for row in whole]
    with all_or_none("verifier"):
        verifier = load_verifier(
            config.verifier, device, dtype, mode=config.verifier_mode, temperature=config.verifier_temperature,
            max_new_tokens=config.verifier_max_new_tokens,
        )
    write = word_answerer(verifier, config)
    only_floors = isinstance(config, FloorConfig)
    for benchmark in benchmarks:
        given = {name: captions[benchmark.name, name] for name, _ in config.captioners}
        told = {} if only_floors else dict(given)
        if only_floors or config.floors:
            told |= {f"{name}, another image's": others_captions(found, config.seed) for name, found in given.items()}
            told["no caption"] = [[{"caption": ""}]] * len(benchmark.pictures)
        for name, found in told.items():
            rows = prism(_mine(benchmark), found[rank() :: world_size()], verifier, config.seed, write)
            yield benchmark.name, name, _gather(benchmark, rows)


def direct_rows(config: DirectConfig, benchmarks: Sequence[Benchmark]) -> Iterator[tuple[str, str, list[dict]]]:
    """As `prism_rows`."""
    device = init_distributed()
    with all_or_none("models"):
        for path in config.policy:
            check_model_path(path)
    for path in config.policy:
        with all_or_none("policy"):
            policy = load_policy(path, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        for benchmark in benchmarks:
            yield benchmark.name, f"{path}, looking", _gather(benchmark, direct(_mine(benchmark), policy, config))


THUMBNAILS = 400
"""Pictures of a benchmark, the first ones, that are kept small beside `--out`, for the page of grpo/report.py."""


def run(config: PrismConfig | DirectConfig) -> tuple[list[Benchmark], Found]:
    """The whole evaluation, each pair of benchmark and captioner written as it comes. Every rank returns all rows."""
    init_distributed()
    out = Path(config.out) if config.out else None
    if out and (taken := [path for ending in (".jsonl", ".md", ".json") if (path := out.with_suffix(ending)).exists()]):
        raise ValueError(f"{taken[0]}: expected a new file, found one")
    if out and out.suffix != ".jsonl":
        raise ValueError(f"{out}: expected a name that ends in .jsonl")
    for folder in (out and out.parent, getattr(config, "cache", "")):
        if folder:
            check_room(Path(folder))  # now, not when hours of answers are to be written
    benchmarks = load_benchmarks(config)
    found: Found = {}
    make: Callable = direct_rows if isinstance(config, DirectConfig) else prism_rows
    for benchmark, captioner, rows in make(config, benchmarks):
        found[benchmark, captioner] = rows
        with all_or_none("out"), naming(config.out):
            if rank() == 0 and out:
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a", encoding="utf-8") as file:
                    file.writelines(to_json({"benchmark": benchmark, "captioner": captioner} | row) + "\n" for row in rows)
    if rank() == 0 and out:
        for benchmark in benchmarks:
            for picture in benchmark.pictures[:THUMBNAILS]:
                id = picture.id if len(benchmarks) == 1 else f"{benchmark.name}:{picture.id}"  # as grpo/page.py names it
                with suppress(ValueError):  # one that cannot be opened has its sentence in the rows
                    keep_thumbnail(out, id, partial(open_image, picture.image))
    return benchmarks, found


def main(arguments: list[str]) -> None:
    programs = {"prism": PrismConfig, "floor": FloorConfig, "direct": DirectConfig}
    config = tyro.extras.subcommand_cli_from_dict(programs, args=arguments)
    benchmarks, found = run(config)
    if rank() == 0:
        tables = {key: summarize(rows) for key, rows in found.items()}
        text = report(benchmarks, found, tables)
        print0(text)
        if config.out:
            Path(config.out).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
            plain = {
                "tables": [{"benchmark": b, "captioner": c, "families": table} for (b, c), table in tables.items()],
                "refused": {benchmark.name: benchmark.refused for benchmark in benchmarks},
            }
            Path(config.out).with_suffix(".json").write_text(to_json(plain) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
