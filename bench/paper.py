"""The paper's ablations in miniature: on the toy world, on a CPU, with intervals.

    python bench/paper.py sampling --seeds 0 1 2
    python bench/paper.py true --seeds 0 --cells "correctness 0.5"

A study is a table of cells. A cell is a name with flags of `train.py toy`, or of the study's own
program (bench/studies.py). It is trained once per seed, then evaluate.py measures its final policy
on 120 held-out images: from 4 captions of each, or by its own answers. Runs are kept in --folder by
a hash of their settings and of the shipped weights: a run that is there is not made again, also by
another study, and a study that was killed goes on. docs/paper.md tells what each study asks.

Columns, with a 95% interval over seeds and images (`over_seeds`):

paper       what the paper has for this, on its own benchmarks
Prism       accuracy of the shipped verifier on all questions, from the captions alone
area        its mean over the training, on fewer images: intervals are over seeds alone; not of a
            cell with a verifier of its own
precision   share of the claims that the checker holds for true; the exact one by the scene's facts
recall      share of the scene's facts that the caption says
empty       share of the sentences that say nothing of the picture (reward/style.py)
noise       standard deviation of a reward in its group, over draws (bench/reward_noise.py)
looking     accuracy of a model that answers from the pictures itself (data/toy/pretrain.py)
"""

import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from shlex import join, split
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.figure import Interval, points_svg
from bench.studies import (
    ALWAYS,
    NOISE_SMOKE,
    PRODUCTS,
    SETS,
    SMOKE,
    STUDIES,
    TRAINING,
    UNTRAINED,
    Study,
)
from data.export import write_examples
from data.io import check_room, json_lines, text_hash, write_whole
from data.jsonl import read_log
from data.program import run_program
from data.ranges import check_range
from data.toy.world import toy_examples
from grpo.log import EVAL_LOG
from grpo.recipes import parse_train_config
from reward.claims import claim_record, claims_of
from reward.style import empty_share
from tools.claims import DIGITS, exact, image_values
from tools.stats import bootstrap_interval, markdown, mean, question_means

Values = dict[str, dict[str, list[float]]]
"""column -> image -> its values, of one seed"""


@dataclass(frozen=True)
class PaperConfig:
    """Settings of a study's run."""

    study: Annotated[Literal[*STUDIES], tyro.conf.Positional]
    seeds: tuple[int, ...] = (0, 1, 2)
    cells: tuple[str, ...] = ()
    """Only these cells."""
    jobs: int = 2
    """Programs at a time, each with one thread."""
    folder: Path = Path("runs/paper")
    checker: str = "data/toy/looker"
    """The folder of a model that looks: it judges claims and captions, and filters questions."""
    checker_mode: Literal["yes", "likelihood"] = "yes"
    figure: str = ""
    """A file for a picture (SVG) of what the captions tell and how much of it is true."""
    smoke: bool = False
    """Two steps and a few images: everything runs, nothing is learnt."""

    def __post_init__(self):
        check_range(self, "jobs", at_least=1)
        known = STUDIES[self.study].cells
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different ones, at least one, got {self.seeds}")
        if unknown := [cell for cell in self.cells if cell not in known]:
            raise ValueError(f"cells: expected some of {list(known)}, got {unknown}")

    @cached_property
    def weights(self) -> str:
        """A hash of the models that no study makes: with other weights a run is another run."""
        folders = ("data/toy/policy", "data/toy/verifier", self.checker)
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# --------------------------------------------------------------------------------- what is to do


@dataclass(frozen=True)
class Task:
    """A program that makes `product`, once the products of `needs` are there."""

    arguments: tuple[str, ...]
    product: Path
    log: Path
    needs: tuple["Task", ...] = ()


def plan(config: PaperConfig, cell: str, seed: int) -> list[Task]:
    """What a cell needs with one seed, in order, its evaluation last. Writes the sets that it
    names."""
    study, tasks = STUDIES[config.study], []
    folder = config.folder / "smoke" if config.smoke else config.folder
    num_images, num_captions = (3, 1) if config.smoke else (120, 4)
    known = {"seed": seed, "checker": config.checker, "checker_mode": config.checker_mode,
             "num_images": num_images, "num_captions": num_captions,
             "folder": "{folder}"}  # filled once its name is known, a hash of the other words

    def words_of(text: str) -> tuple[str, ...]:
        return tuple(re.sub(r"{(\w+)}", lambda name: str(value_of(name[1])), word)
                     for word in split(text))

    def value_of(name: str) -> str | int | Path:
        if name == "sets":
            write_sets(folder / "sets", 4 if config.smoke else None)
            write_questions(folder / "sets/heldout", num_images)
            return folder / "sets"
        if name == "caprl":
            return add_training(())
        if name not in PRODUCTS:
            return known[name]
        product = PRODUCTS[name]
        return add_product(name, words_of(product.command), product.file, product.smoke)

    def add_product(name: str, words: tuple[str, ...], file: str, smoke: str) -> Path:
        words = (*words, *split(smoke if config.smoke else ""))
        out = folder / f"{name}-{text_hash(repr((config.weights, words)))[:12]}"
        words = tuple(word.format(folder=out) for word in words)
        tasks.append(Task(words, out / file, folder / f"{out.name}.log", tuple(tasks)))
        return out

    def add_training(flags: Sequence[str]) -> Path:
        words = ("toy", *split(ALWAYS), *flags, *split(SMOKE if config.smoke else ""),
                 "--seed", str(seed))
        # By what they mean, not by their words: a run of other defaults is another run.
        meant = parse_train_config(list(words)).flat() | {"run_dir": ""}
        name = f"run-{text_hash(repr((config.weights, sorted(meant.items()))))[:12]}"
        words = ("train.py", *words, "--run-dir", str(folder / name), "--resume")
        policy = folder / name / "final"
        tasks.append(Task(words, policy, folder / f"{name}.log", tuple(tasks)))
        return policy

    flags = words_of(study.cells[cell])
    if flags[:1] == (UNTRAINED,):
        policy = parse_train_config(["toy", *flags[1:]]).policy
    elif study.program == TRAINING:
        policy = add_training(flags)
    else:
        policy = add_product(config.study, (*words_of(study.program), *flags), "config.json",
                             study.smoke)
    if study.has_noise and flags[:1] != (UNTRAINED,):
        words = ("bench/reward_noise.py", f"--flags={join(flags)}",
                 *split(NOISE_SMOKE if config.smoke else ""))
        noise = folder / f"noise-{text_hash(repr((config.weights, words)))[:12]}.json"
        tasks.insert(0, Task((*words, "--out", str(noise)), noise, noise.with_suffix(".log"),
                             tuple(tasks[:-1])))  # not the training
    words = ("evaluate.py", *words_of(study.evaluation), "--policy", str(policy),
             "--seed", str(seed))
    rows = folder / f"rows-{text_hash(repr((config.weights, words)))[:12]}.jsonl"
    return [*tasks, Task((*words, "--out", str(rows)), rows.with_suffix(".json"),
                         rows.with_suffix(".log"), tuple(tasks))]


def write_sets(folder: Path, num_images: int | None) -> None:
    """num_images: None takes each set's own number."""
    for name, (num, choose) in SETS.items():
        if (folder / name / "examples.jsonl").exists():
            continue
        examples = []
        for example in toy_examples(f"toy:train:{num_images or num}"):
            order = random.Random(f"{example.id}:sets")  # the same for all sets
            asked = order.sample(example.questions, len(example.questions))
            examples.append(replace(example, questions=tuple(choose(asked))))
        write_examples(folder / name, examples)


def write_questions(folder: Path, num_images: int) -> None:
    """What `evaluate.py direct` asks of held-out images for answers in words."""
    if (folder / "questions.jsonl").exists():
        return
    write_examples(folder, toy_examples(f"toy:heldout:{num_images}"))
    rows = [
        {"id": f"{image['id']}-{place}", "image": image["image"], "question": asked["question"],
         "answer": asked["choices"][asked["answer_index"]]}
        for image in read_log(folder / "examples.jsonl")
        for place, asked in enumerate(image["questions"])
    ]
    write_whole(folder / "questions.jsonl", json_lines(rows))


# ------------------------------------------------------------------------------------ doing it


def carry_out(tasks: Sequence[Task], jobs: int) -> None:
    """Runs each task whose product is not there, `jobs` at a time. If one fails, those that run
    are ended, and ValueError names its log. What is done is there the next time."""
    unique = {task.product: task for task in tasks}
    left = [task for task in unique.values() if not task.product.exists()]
    running: dict[subprocess.Popen, Task] = {}
    bar = tqdm(total=len(unique), initial=len(unique) - len(left), desc="programs", unit="program")
    try:
        while left or running:
            under_way = {task.product for task in running.values()}
            ready = [task for task in left if all(need.product.exists()
                                                  and need.product not in under_way
                                                  for need in task.needs)]
            assert ready or running, "expected that some task makes what the others need"
            for task in ready[: jobs - len(running)]:
                left.remove(task)
                running[begin(task)] = task
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                task = running.pop(process)
                if process.returncode or not task.product.exists():
                    said = task.log.read_text("utf-8", "replace").strip().splitlines()
                    raise ValueError(f"{task.log}: expected {task.product.name}, found exit "
                                     f"code {process.returncode}: {(said or [''])[-1]}")
                bar.update()
    finally:
        bar.close()
        for process in running:  # with what they have started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait()


def begin(task: Task) -> subprocess.Popen:
    """A training goes on from its checkpoint. What evaluate.py had written when it was stopped is
    deleted: it writes no file twice."""
    if task.product.name.startswith("rows-"):
        for ending in (".jsonl", ".md"):
            task.product.with_suffix(ending).unlink(missing_ok=True)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("wb") as log:
        return subprocess.Popen([sys.executable, *task.arguments], stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


# ---------------------------------------------------------------------------------- what it says


def values_of(tasks: Sequence[Task]) -> Values:
    """What training and evaluation of one seed have measured."""
    *before, evaluation = tasks
    rows = read_log(evaluation.product.with_suffix(".jsonl"))
    if evaluation.arguments[1] == "direct":  # the policy answers itself
        scores = question_means(rows).items()
        return {"looking": {id: list(given.values()) for id, given in scores}}
    if "claims" not in rows[0]:  # unjudged, but the facts are known
        claims = [[claim_record(claim, math.nan) for claim in claims_of(row["caption"])]
                  for row in rows]
        rows = [row | exact(row | {"claims": said}) for row, said in zip(rows, claims)]
    values = image_values(rows) | {"area": {}, "empty": {}, "noise": {}}
    for row in rows:
        values["empty"].setdefault(row["id"], []).append(empty_share(row["caption"]))
    for task in before:
        if task.arguments[0] == "bench/reward_noise.py":
            values["noise"] = json.loads(task.product.read_text())
        # By another verifier it would be another measure.
        if task.arguments[0] == "train.py" and "--verifier" not in task.arguments:
            values["area"]["all"] = [area_under(read_log(task.product.parent / EVAL_LOG))]
    return values


def area_under(curve: Sequence[dict]) -> float:
    """Mean held-out accuracy over the steps, the curve being straight between its points."""
    area = sum((a["accuracy"] + b["accuracy"]) / 2 * (b["step"] - a["step"])
               for a, b in pairwise(curve))
    return area / (curve[-1]["step"] - curve[0]["step"])


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 0.975 quantile of Student's t with 1 to 9 degrees of freedom; the last also for more."""


def over_seeds(seeds: Sequence[dict[str, list[float]]]) -> tuple[float, float, float]:
    """Mean over seeds, and its 95% interval. seeds: image -> values, of each seed.

    Two half widths are put together as the root of their squares: the bootstrap's over images, a
    drawn image bringing its values of all seeds, and Student's over the seeds' means. With one
    seed, the first alone; of one image too there is no interval (NaN). All three are NaN where a
    seed has no value.
    """
    means = [mean([value for group in images.values() for value in group]) for images in seeds]
    groups: dict[str, list[float]] = {}
    for images in seeds:
        for image, values in images.items():
            groups.setdefault(image, []).extend(values)
    pooled = mean([value for values in groups.values() for value in values])
    low, high = bootstrap_interval(groups.values())
    across = 0.0 if len(groups) > 1 else math.nan
    if len(means) > 1:
        quantile = STUDENT[min(len(means) - 2, len(STUDENT) - 1)]
        across = quantile * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    below, above = math.hypot(pooled - low, across), math.hypot(high - pooled, across)
    return mean(means), mean(means) - below, mean(means) + above


def differences(more: Sequence[Values], less: Sequence[Values],
                column: str) -> list[dict[str, list[float]]]:
    """Of each seed: image -> its mean in `more` less that in `less`; images that both have."""
    return [
        {image: [mean(given) - mean(second[column][image])]
         for image, given in first[column].items() if image in second[column]}
        for first, second in zip(more, less, strict=True)
    ]


def report(study: Study, measured: dict[str, list[Values]]) -> str:
    """Two tables as Markdown: the cells, and the orders between those that are there. The paper's
    numbers have a column where it has any. measured: cell -> `values_of` each seed."""
    paper = ["paper:"] * bool(study.paper)
    digits = {"Prism": 3, "area": 3, **DIGITS, "empty": 3, "noise": 3, "looking": 3}

    def shown(seeds: Sequence[dict[str, list[float]]], column: str, sign: str = "") -> str:
        numbers = over_seeds(seeds)
        middle, low, high = (f"{number:{sign}.{digits[column]}f}" for number in numbers)
        if math.isnan(numbers[0]):
            return ""
        return middle if math.isnan(numbers[1]) else f"{middle} ({low} to {high})"

    columns = [column for column in digits
               if any(seed.get(column) for seeds in measured.values() for seed in seeds)]
    rows = [[cell, *(study.paper.get(cell, "") for _ in paper),
             *(shown([seed[column] for seed in seeds], column) for column in columns)]
            for cell, seeds in measured.items()]
    orders = []
    for chain in study.orders:
        column, _, names = chain.partition(": ")
        for more, less in pairwise(names.split(" > ")):
            if more in measured and less in measured:
                pairs = differences(measured[more], measured[less], column)
                _, low, high = over_seeds(pairs)
                is_published = column == "Prism" and {more, less} <= study.paper.keys()
                published = (f"{study.paper[more] - study.paper[less]:+.1f}" if is_published
                             else "")
                orders.append([f"{more} > {less}", column, *(published for _ in paper),
                               shown(pairs, column, "+"), verdict(low, high)])
    tables = [markdown(" | ".join(["cell", *paper, *(f"{name}:" for name in columns)]), rows)]
    if orders:
        tables.append(markdown(" | ".join(["order | of", *paper, "difference: | holds"]), orders))
    return "\n\n".join(tables)


def intervals(measured: dict[str, list[Values]]) -> dict[str, dict[str, Interval]]:
    """cell -> column -> mean and interval, of what a figure shows and was measured."""
    rows: dict[str, dict[str, Interval]] = {}
    for cell, seeds in measured.items():
        for column in ("Prism", "exact precision", "looking"):
            numbers = over_seeds([seed.get(column, {}) for seed in seeds])
            if not math.isnan(numbers[1]):
                rows.setdefault(cell, {})[column] = numbers
    return rows


def verdict(low: float, high: float) -> str:
    """Of the interval of a difference; nothing where it was not measured."""
    if math.isnan(low):
        return ""
    return "yes" if low > 0 else "reversed" if high < 0 else "open"


def main(config: PaperConfig) -> None:
    study = STUDIES[config.study]
    if not Path(config.checker).is_dir():
        raise ValueError(f"checker: expected the folder of a model, found none at {config.checker}")
    check_room(config.folder)
    if config.figure:
        check_room(Path(config.figure).parent)  # now, not after hours
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cells = [cell for cell in study.cells if cell in (config.cells or study.cells)]
    # All cells of a seed before the next seed.
    plans = {(cell, seed): plan(config, cell, seed) for seed in config.seeds for cell in cells}
    carry_out([task for tasks in plans.values() for task in tasks], config.jobs)
    measured = {cell: [values_of(plans[cell, seed]) for seed in config.seeds] for cell in cells}
    print(report(study, measured))
    if config.figure:
        write_whole(Path(config.figure), points_svg(intervals(measured)).encode())


if __name__ == "__main__":
    run_program(lambda arguments: main(tyro.cli(PaperConfig, args=arguments)))
