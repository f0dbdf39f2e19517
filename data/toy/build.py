"""Makes the toy checkpoints from nothing and prints how good they are.

    python -m data.toy.build                    # into data/toy, hours on 2 cores
    python -m data.toy.build --folder runs/toy-models --models policy looker
    python -m data.toy.build --smoke --folder /tmp/toy    # a few steps: everything runs
"""

import random
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Literal

import torch
import tyro

from data.benchmarks.benchmark import example_benchmark
from data.curate.answers import answer_by_options
from data.examples import Question
from data.io import check_room
from data.program import run_program
from data.ranges import check_range
from data.toy.captioner import train_policy
from data.toy.looker import any_caption, any_claim, train_looker
from data.toy.tokenizer import build_tokenizer
from data.toy.verifier import train_verifier
from data.toy.world import (
    FAMILIES,
    Scene,
    draw,
    is_well_formed,
    make_scene,
    perturb,
    scene_questions,
    toy_example,
    write_caption,
    write_sentence,
)
from grpo.config import RewardConfig
from grpo.export import export_policy
from grpo.pretrained import load_policy
from reward.caprl import (
    PromptWriter,
    Verifier,
    caption_rewards,
    load_verifier,
    shuffle_options,
)
from reward.claims import Checker
from reward.judge import judge_rewards
from tools.caption_cache import CaptionsConfig, write_captions
from tools.prism import direct, prism
from tools.stats import markdown, mean, summarize
from tools.tables import format_table


@dataclass(frozen=True)
class BuildConfig:
    """Settings of the builder."""

    folder: Path = Path("data/toy")
    """The folder for policy/, verifier/ and looker/."""
    models: tuple[Literal["verifier", "policy", "looker"], ...] = ("verifier", "policy", "looker")
    """Those to make. The looker is grown from the policy."""
    verifier_steps: int = 1900
    """The most that each of its first two stages may take, see data/toy/verifier.py."""
    policy_steps: int = 3200
    looker_steps: int = 2400
    """The most that each of its first three stages may take, half as many for the last two, see
    data/toy/looker.py. The same command goes on after the stage that was done last."""
    num_images: int = 300
    """Held-out images behind the table."""
    seed: int = 0
    smoke: bool = False
    """A few steps and images: nothing is learnt, everything runs."""

    def __post_init__(self):
        check_range(self, "verifier_steps policy_steps looker_steps", at_least=1)
        check_range(self, "num_images", at_least=len(FAMILIES))
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models: expected different ones, at least one, got {self.models}")


def make_verifier(config: BuildConfig) -> None:
    torch.set_num_threads(1)  # one process per core: two models at a time
    tokenizer = build_tokenizer()
    model = train_verifier(tokenizer, config.verifier_steps, config.seed).to(torch.bfloat16)
    model.save_pretrained(config.folder / "verifier")
    tokenizer.save_pretrained(config.folder / "verifier")


def make_policy(config: BuildConfig) -> None:
    torch.set_num_threads(1)
    policy = train_policy(build_tokenizer(), config.policy_steps, config.seed)
    export_policy(policy, config.folder / "policy", torch.bfloat16)


def make_looker(config: BuildConfig) -> None:
    torch.set_num_threads(1)
    policy = load_policy(str(config.folder / "policy"), torch.device("cpu"))
    unfinished = config.folder / f"looker.{config.looker_steps}-{config.seed}.unfinished"
    looker = train_looker(policy, config.looker_steps, config.seed, unfinished)
    export_policy(looker, config.folder / "looker", torch.bfloat16)
    shutil.rmtree(unfinished)


# --------------------------------------------------------------------------------------- the tables


def family_accuracy(verifier: Verifier, scenes: Sequence[Scene], captions: Sequence[str],
                    questions: Sequence[Sequence[Question]],
                    abstain: bool = False) -> dict[str, float]:
    """Mean accuracy per family, and under "abstain" the share of abstentions."""
    sums: dict[str, list[float]] = {family: [] for family in FAMILIES}
    chosen = []
    settings = RewardConfig(num_questions=0, abstain=abstain)
    for scene, caption, asked in zip(scenes, captions, questions):
        example = replace(toy_example(scene), questions=tuple(asked))
        result = caption_rewards([caption], [example], [scene.id], [0], verifier, settings)
        sums[scene.family] += [row["correct"] for row in result.records[0] if not row["failure"]]
        chosen += [row["chosen"] == row["abstain"] for row in result.records[0]]
    means = {family: sum(values) / max(len(values), 1) for family, values in sums.items()}
    return means | {"abstain": sum(chosen) / len(chosen)}


def verifier_table(folder: Path, scenes: Sequence[Scene], seed: int) -> str:
    """Letter accuracy on held-out images for captions of known truth."""
    device, path = torch.device("cpu"), str(folder / "verifier")
    verifier = load_verifier(path, device)
    questions = [[q for q in scene_questions(scene) if q.needs_image] for scene in scenes]
    rng = random.Random("table")
    # the fact told wrongly, or left out
    places = [rng.randrange(len(scene.facts)) for scene in scenes]
    about = [[group[place]] for group, place in zip(questions, places)]
    wrong, missing = [], []
    for scene, place in zip(scenes, places):
        (false,) = perturb(scene.facts[place : place + 1], 1.0, rng)
        wrong.append(write_caption(scene.family,
                                   (*scene.facts[:place], false, *scene.facts[place + 1 :])))
        missing.append(write_caption(scene.family,
                                     (*scene.facts[:place], *scene.facts[place + 1 :])))
    dense = [write_caption(scene.family, scene.facts) for scene in scenes]
    free = [[q for q in scene_questions(scene) if not q.needs_image] for scene in scenes]
    chance = {
        family: sum(1 / len(q.choices) for s, group in zip(scenes, questions) if s.family == family
                    for q in group)
        / sum(len(group) for s, group in zip(scenes, questions) if s.family == family)
        for family in FAMILIES
    }
    rows = {
        "true dense captions": family_accuracy(verifier, scenes, dense, questions),
        "no caption": family_accuracy(verifier, scenes, [""] * len(scenes), questions),
        "chance": chance,
        "one wrong fact, the question on it": family_accuracy(verifier, scenes, wrong, about),
        "no caption, questions that need none": family_accuracy(
            verifier, scenes, [""] * len(scenes), free),
        "true dense captions, abstain option offered": family_accuracy(
            verifier, scenes, dense, questions, True),
    }
    unsaid = family_accuracy(verifier, scenes, missing, about, True)["abstain"]
    return (f"{format_families('verifier', rows)}\n\n"
            f"abstains on a fact that is not mentioned: {unsaid:.3f}")


def policy_table(folder: Path, scenes: Sequence[Scene], seed: int) -> str:
    """The policy before reinforcement learning, 4 captions per held-out image at temperature 1."""
    device = torch.device("cpu")
    policy = load_policy(str(folder / "policy"), device)
    own = folder / "verifier"  # else the shipped one
    verifier = load_verifier(str(own if own.exists() else BuildConfig.folder / "verifier"), device)
    examples = [toy_example(scene) for scene in scenes]
    config = CaptionsConfig(num_captions=4, max_new_tokens=96, cache="")
    benchmark = example_benchmark("toy:heldout", examples)
    captions = write_captions(policy, benchmark.pictures, config, seed)
    rows = prism(benchmark, captions, verifier, seed)
    well_formed = sum(is_well_formed(row["caption"]) for row in rows) / len(rows)
    groups = torch.tensor([row["accuracy"] for row in rows]).view(-1, 4)
    return (
        f"{format_table({(benchmark.name, 'policy'): summarize(rows)})}\n\n"
        f"well-formed captions: {well_formed:.3f}\nstandard deviation of the accuracy between "
        f"captions of one image: {groups.std(1).mean():.3f}"
    )


def looker_table(folder: Path, scenes: Sequence[Scene], seed: int) -> str:
    """What the looker makes of held-out images, of others of the same family in their place, and of
    none."""
    looker, policy = (load_policy(str(folder / name), torch.device("cpu"))
                      for name in ("looker", "policy"))
    writer, rng = PromptWriter(looker.tokenizer), random.Random("table")
    checkers = {"claims, yes or no": Checker(looker),
                "claims, likelihood by the shipped policy": Checker(policy, "likelihood")}
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    examples = [toy_example(scene) for scene in scenes]
    for number, (scene, example) in enumerate(zip(scenes, examples)):
        other = draw(make_scene("heldout", 30_000 + len(FAMILIES) * number
                                + FAMILIES.index(scene.family)))
        asked = [shuffle_options(question, n, rng) for n, question in enumerate(example.questions)]
        claims = [any_claim(scene, rng) for _ in range(8)]
        texts = [write_sentence(scene.family, claim) for claim, _ in claims]
        images = {"": example.image, ", another image": other, ", no image": None}
        for shown, image in images.items():
            answers = answer_by_options(looker, writer, replace(example, image=image or other),
                                        image is not None, asked, 32)
            rows[f"questions{shown}"][scene.family] += [
                answer.chosen == question.gold for answer, question in zip(answers, asked)]
            for name, checker in checkers.items() if image else ():
                rows[f"{name}{shown}"][scene.family] += [
                    (prob > 0.5) == (claim.value == value)
                    for prob, (claim, value) in zip(checker(image, texts), claims)]
        captions, _, fair = zip(*(any_caption(scene, rng) for _ in range(4)))
        ratings = judge_rewards(captions, [example] * 4, [scene.id] * 4, [0] * 4, looker).rewards
        rows["ratings of captions, distance from the fair ones"][scene.family] += (
            1 + 4 * ratings - torch.tensor(fair)).abs().tolist()
    for row in direct(example_benchmark("toy:heldout", examples), looker, seed=seed,
                      answer_tokens=4, temperature=0.0, batch_size=64):
        rows["questions, `evaluate.py direct`"][row["family"]].append(row["accuracy"])
    return format_families("looker", {name: {family: mean(values) for family, values in row.items()}
                                      for name, row in rows.items()})


def format_families(title: str, rows: dict[str, dict[str, float]]) -> str:
    header = " | ".join([title, *(f"{family}:" for family in FAMILIES)])
    return markdown(header, ([name, *(f"{row[family]:.3f}" for family in FAMILIES)]
                             for name, row in rows.items()))


def build(config: BuildConfig) -> None:
    if config.smoke:
        if config.folder == BuildConfig.folder:
            raise ValueError(f"smoke: expected a folder other than {config.folder}, whose "
                             "checkpoints it would overwrite")
        config = replace(config, verifier_steps=1, policy_steps=1, looker_steps=1, num_images=6)
    check_room(config.folder)
    # Fresh processes: a fork of a process that has used torch's threads can hang.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        makers = {"verifier": make_verifier, "policy": make_policy, "looker": make_looker}
        jobs = {name: pool.submit(makers[name], config)
                for name in ("verifier", "policy") if name in config.models}
        if "policy" in jobs:
            jobs["policy"].result()  # the looker is grown from it
        if "looker" in config.models:
            jobs["looker"] = pool.submit(make_looker, config)
        for job in jobs.values():
            job.result()
    scenes = [make_scene("heldout", 10_000 + index) for index in range(config.num_images)]
    for name in config.models:
        print({"verifier": verifier_table, "policy": policy_table, "looker": looker_table}[name](
            config.folder, scenes, config.seed), end="\n\n")


def stop(*_) -> None:
    """On SIGTERM. Without it the processes that train would go on for hours."""
    for process in active_children():
        process.terminate()
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    run_program(lambda arguments: build(tyro.cli(BuildConfig, args=arguments)))
