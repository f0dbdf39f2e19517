"""How much can be answered from captions: Prism evaluation (paper, section 4.3) and its bounds.

    python evaluate.py prism --policy data/toy/policy --verifier data/toy/verifier \\
        --data toy:heldout:96
    python evaluate.py prism --policy base=Qwen/Qwen2.5-VL-3B-Instruct ours=runs/caprl-3b/final \\
        --captions gpt=captions --floors --out table3.jsonl \\
        --data chartqa:ChartQA/data/test-*.parquet mmstar:MMStar.tsv heldout.jsonl
    python evaluate.py direct --policy Qwen/Qwen2.5-VL-3B-Instruct --data mmstar:MMStar.tsv
    torchrun --nproc-per-node 8 evaluate.py claims --policy runs/caprl-3b/final --data qa.jsonl

prism: a captioner writes K captions of each image, or they are read from a file or a folder of
caption.py. A text-only model answers the image's questions from each caption. floor: the same
without a caption and with another's. claims: prism, and a vision-language model judges the claims.
direct: such a model answers, it sees the image itself.

Benchmarks and their metrics are those of data/benchmarks/. Every question counts once, with its
mean over the captions (the paper's Table 3 is that mean over 4). Intervals are bootstrap 95%
intervals over images; differences are taken on the same questions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from data.benchmarks.benchmark import Benchmark, judge_of, load_benchmarks
from data.io import check_room, naming
from data.program import run_program
from data.ranges import check_range
from grpo.distributed import all_or_none, compute_dtype, init_distributed, print0, rank
from grpo.pretrained import find_model, load_policy
from reward.step import verifier_of
from tools.budgets import asked_once, with_budgets
from tools.caption_cache import CaptionsConfig, all_captions
from tools.claims import CheckerConfig, add_claims, judged_rows
from tools.prism import direct, floor_captions, others_captions, prism, read_prompt, word_answerer
from tools.reply_judge import reply_judge
from tools.settings import check_verifiers
from tools.stats import summarize
from tools.tables import Rows, append_rows, check_measured, check_out, report, write_tables


@dataclass(frozen=True)
class EvalConfig:
    """What all evaluations share."""

    data: tuple[str, ...] = ("caprl-qa.jsonl",)
    """Benchmarks: KIND:PATH (docs/formats.md), a JSONL file of images with questions, SHARE:PATH
    for what `train.py --eval-data SHARE` held out of it, or toy:SPLIT:NUM."""
    limit: int = 0
    """Only the first so many images of each benchmark; 0 for all."""
    answer_tokens: int = 32
    """Longest answer in words, in tokens."""
    seed: int = 0
    out: str = ""
    """A new file: a JSON line per caption, with every question and answer. Tables (.md, .json) and
    thumbnails go beside it; none of them may be there yet."""

    def __post_init__(self):
        check_range(self, "answer_tokens", at_least=1)
        check_range(self, "limit", at_least=0)
        if not 0 < len(self.data) == len(set(self.data)):
            raise ValueError(f"data: expected at least one benchmark, each once, got {self.data}")


@dataclass(frozen=True)
class PrismConfig(CaptionsConfig, EvalConfig):
    """Settings of `evaluate.py prism`."""

    verifier: str = ""
    """The text-only model that answers from captions; http://HOST:8000/v1 asks a server. Empty:
    Qwen/Qwen2.5-3B-Instruct, the paper's. For data of the kinds captionqa and capeval alone it is
    their published judge, Qwen/Qwen2.5-72B-Instruct."""
    verifier_name: str = ""
    """The model's name at that server; NAME=FOLDER says where its tokenizer is."""
    verifier_mode: Literal["sample", "logits"] = "logits"
    """Take the likeliest letter and the likeliest words, or sample replies (the release)."""
    verifier_temperature: float = 1.0
    """Temperature of the replies in mode "sample". The release's evaluation has 1."""
    verifier_max_new_tokens: int = 10
    """Longest reply to a question with options in mode "sample"."""
    words_prompt: str = ""
    """A file with the prompt for answers in words, to ask as others do: a text with [CAPTION] and
    then [QUESTION] in it. Empty: our own."""
    floors: bool = False
    """Add rows without a caption, and with another image's captions."""

    def __post_init__(self):
        EvalConfig.__post_init__(self)
        CaptionsConfig.__post_init__(self)
        object.__setattr__(self, "verifier", self.verifier or judge_of(self.data))
        check_range(self, "verifier_max_new_tokens", at_least=1)
        check_range(self, "verifier_temperature", above=0)
        if not (self.captioners or isinstance(self, FloorConfig)):
            raise ValueError("expected captioners in policy or captions, got neither")


@dataclass(frozen=True)
class FloorConfig(PrismConfig):
    """Settings of `evaluate.py floor`: prism without a caption, and with another image's."""


@dataclass(frozen=True)
class ClaimsConfig(CheckerConfig, PrismConfig):
    """Settings of `evaluate.py claims`: prism, with each claim of the captions judged."""


@dataclass(frozen=True)
class DirectConfig(EvalConfig):
    """Settings of `evaluate.py direct`."""

    policy: tuple[str, ...] = ("runs/caprl/final",)
    """Vision-language models that see the image, local folders or hub names."""
    temperature: float = 0.0
    """Temperature of their answers; 0 takes the most likely token."""
    batch_size: int = 64
    """Questions answered at a time."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "temperature", at_least=0)
        check_range(self, "batch_size", at_least=1)
        if not 0 < len(self.policy) == len(set(self.policy)):
            raise ValueError(f"expected at least one policy, each once, got {self.policy}")
        if any(source.startswith("capeval:") for source in self.data):
            raise ValueError("capeval: its items are on captions, expected prism or floor")


def prism_rows(config: PrismConfig,
               benchmarks: Sequence[Benchmark]) -> Iterator[tuple[str, str, list[dict]]]:
    """(benchmark, captioner, rows) of each pair; every rank gets all rows."""
    device = init_distributed()
    only_floors = isinstance(config, FloorConfig)
    with_floors = only_floors or config.floors
    policies = [path for _, path in config.captioners[: len(config.policy)]]
    load = partial(verifier_of, config, device)
    is_remote = "://" in config.verifier  # it takes no memory here
    with all_or_none("models"):  # now, not when captions have been written
        prompt = read_prompt(config.words_prompt) if config.words_prompt else ""
        for path in policies + [config.verifier] * (not is_remote):
            find_model(path)
        verifier = load() if is_remote else None
    if config.captioners and with_floors:
        for benchmark in benchmarks:  # now too: a set of one image has no other image
            others_captions([[]] * len(benchmark.pictures), config.seed)
    captions = all_captions(config, benchmarks, config.seed, device)
    with all_or_none("verifier"):
        verifier = verifier or load()
    check_verifiers(verifier)
    write, judge = word_answerer(verifier, config.answer_tokens, prompt), reply_judge(verifier)
    if config.max_words:
        verifier, write, judge = map(asked_once, (verifier, write, judge))
    for benchmark in benchmarks:
        own = {name: captions[benchmark.name, name] for name, _ in config.captioners}
        own = with_budgets(own, config.max_words)
        floors = floor_captions(own, len(benchmark.pictures), config.seed) if with_floors else {}
        told = floors if only_floors else own | floors
        for name, given in told.items():
            yield benchmark.name, name, prism(benchmark, given, verifier, config.seed, write, judge)


def direct_rows(config: DirectConfig,
                benchmarks: Sequence[Benchmark]) -> Iterator[tuple[str, str, list[dict]]]:
    """As `prism_rows`."""
    device = init_distributed()
    with all_or_none("models"):
        for path in config.policy:
            find_model(path)
    for path in config.policy:
        with all_or_none("policy"):
            policy = load_policy(path, device, compute_dtype(device))
        for benchmark in benchmarks:
            rows = direct(benchmark, policy, seed=config.seed, answer_tokens=config.answer_tokens,
                          temperature=config.temperature, batch_size=config.batch_size)
            yield benchmark.name, f"{path}, looking", rows


def run(config: PrismConfig | DirectConfig) -> tuple[list[Benchmark], Rows]:
    """The whole evaluation, written as it comes. Every rank returns all rows."""
    init_distributed()
    out = check_out(config.out) if config.out else None  # now: answers take hours
    if isinstance(config, PrismConfig) and config.cache:
        check_room(Path(config.cache))
    with all_or_none("data"):
        benchmarks = load_benchmarks(config.data, config.limit)
    for benchmark in benchmarks:
        if benchmark.refused:
            print0(f"{benchmark.kind}: {len(benchmark.refused)} rows or questions refused, "
                   f"the first: {benchmark.refused[0]}")
    pairs = (direct_rows if isinstance(config, DirectConfig) else prism_rows)(config, benchmarks)
    if isinstance(config, ClaimsConfig):
        pairs = judged_rows(config, benchmarks, pairs)
    rows: Rows = {}
    for benchmark, captioner, new in pairs:
        with all_or_none("out"), naming(config.out):
            if rank() == 0 and out:
                append_rows(out, benchmark, captioner, new, is_first=not rows)
        rows[benchmark, captioner] = new
    return benchmarks, rows


def main(arguments: list[str]) -> None:
    programs = dict(prism=PrismConfig, floor=FloorConfig, direct=DirectConfig, claims=ClaimsConfig)
    config = tyro.extras.subcommand_cli_from_dict(programs, args=arguments)
    benchmarks, rows = run(config)
    if rank() == 0:
        tables = {key: summarize(group) for key, group in rows.items()}
        text = report(benchmarks, rows, tables, config) + add_claims(rows, tables)
        print0(text)
        if config.out:
            with naming(config.out):
                write_tables(Path(config.out), text, benchmarks, tables)
        check_measured(rows)


if __name__ == "__main__":
    run_program(main)
