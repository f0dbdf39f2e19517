"""How noisy is the reward, and what does less noise cost? On the toy world, where the truth can be
measured.

    python bench/reward_noise.py
    python bench/reward_noise.py --flags="--num-questions 2" --out noise.json    # of one setting

Groups of captions by the shipped policy are scored again and again under every setting. Each time
other questions, shuffles and replies are drawn. The truth of a caption is its accuracy over all of
its image's questions under many shuffles. Printed for each setting, means over the draws:

noise      standard deviation of a caption's reward around its own mean, in units of the reward in
group   the same for the reward minus its group's mean: what the advantage sees rank
Spearman's correlation of reward and truth within groups, over all groups whose truth varies; one
whose rewards
           are all equal counts 0: it teaches nothing
seconds    for the captions of one draw
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import split

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.examples import Example, load_examples
from data.io import write_whole
from data.program import run_program
from data.ranges import check_range
from grpo.config import RewardConfig
from grpo.pretrained import load_policy
from grpo.recipes import parse_train_config
from grpo.rollout import sample_rollouts
from reward.caprl import Verifier, caption_rewards, load_verifier
from tools.audit import rank_correlation


@dataclass(frozen=True)
class BenchConfig:
    """Sizes of the measurement."""

    images: int = 24
    group_size: int = 8
    draws: int = 12
    truth_shuffles: int = 8
    policy: str = "data/toy/policy"
    verifier: str = "data/toy/verifier"
    num_questions: tuple[int, ...] = (1, 2, 4, 8)
    flags: str | None = None
    """Only the accuracy that `train.py toy FLAGS` rewards, by its verifier."""
    out: Path = Path("noise.json")
    """With `flags`: a file for the noise in the group, image -> that of each caption."""

    def __post_init__(self):
        check_range(self, "images", at_least=1)
        check_range(self, "group_size draws", at_least=2)


def relative_to_group(scores: np.ndarray, group_size: int) -> np.ndarray:
    """Rewards (draws, B) less the mean of their group in the draw."""
    means = scores.reshape(len(scores), -1, group_size).mean(2)
    return scores - means.repeat(group_size, 1)


def measure_flags(config: BenchConfig, score: Callable, by_caption: Sequence[Example]) -> None:
    """Writes the noise of one setting. score: (verifier, reward's settings, draw) -> (B,)."""
    trained = parse_train_config(["toy", *split(config.flags)])
    verifier = load_verifier(
        trained.verifier, torch.device("cpu"), mode=trained.verifier_mode,
        temperature=trained.verifier_temperature, max_new_tokens=1,
    )
    scores = np.stack([score(verifier, trained.reward_config, draw)
                       for draw in tqdm(range(config.draws), desc="draws")])
    deviations = relative_to_group(scores, config.group_size).std(0, ddof=1)
    noise: dict[str, list[float]] = {}
    for example, value in zip(by_caption, deviations):
        noise.setdefault(example.id, []).append(float(value))
    write_whole(config.out, json.dumps(noise).encode())


def main(config: BenchConfig) -> None:
    device = torch.device("cpu")
    examples = load_examples(f"toy:heldout:{config.images}")
    policy = load_policy(config.policy, device)
    keys = [f"noise:{e.id}:{g}" for e in examples for g in range(config.group_size)]
    captions = sample_rollouts(policy, [policy.prompt(e.image) for e in examples], keys,
                               96).captions
    by_caption = [e for e in examples for _ in range(config.group_size)]
    groups = [e.id for e in by_caption]

    def score_by(verifier: Verifier, settings: RewardConfig, draw: int | str) -> np.ndarray:
        drawn = [f"{draw}:{e.id}" for e in by_caption]
        return caption_rewards(captions, by_caption, drawn, [0] * len(captions), verifier,
                               settings).rewards.numpy()

    if config.flags is not None:
        measure_flags(config, score_by, by_caption)
        return
    # The toy verifier was taught to say a letter, and nothing after it: a reply is one token.
    verifiers = {mode: load_verifier(config.verifier, device, mode=mode, max_new_tokens=1)
                 for mode in ("sample", "logits")}

    def score(mode: str, settings: RewardConfig, draw: int | str) -> np.ndarray:
        return score_by(verifiers[mode], settings, draw)

    truth = score("logits", RewardConfig(num_questions=0, num_shuffles=config.truth_shuffles),
                  "truth")
    num_varied = rank_correlation(groups, list(truth), list(truth))[1]
    spread = truth.reshape(-1, config.group_size).std(1).mean()
    print(f"{len(examples)} images x {config.group_size} captions, {config.draws} draws; truth "
          f"{truth.mean():.3f}, "
          f"its standard deviation within a group {spread:.3f}")
    print("| verifier | questions | N | noise | in group | rank | seconds |\n"
          "| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    settings = [
        (name, question_draw, number) for name in ("sample", "logits", "soft")
        for question_draw in ("independent", "paired")
        for number in config.num_questions
    ]
    for name, question_draw, number in tqdm(settings, desc="settings", leave=False):
        asking = replace(RewardConfig(), num_questions=number, question_draw=question_draw,
                         soft=name == "soft")
        started = time.perf_counter()
        scores = np.stack([score("sample" if name == "sample" else "logits", asking, draw)
                           for draw in range(config.draws)])
        seconds = (time.perf_counter() - started) / config.draws
        relative = relative_to_group(scores, config.group_size)
        ranks = [rank_correlation(groups, list(row), list(truth)) for row in scores]
        rank = np.mean([value * count / num_varied if count else 0.0 for value, count in ranks])
        noise, in_group = (values.std(0, ddof=1).mean() for values in (scores, relative))
        tqdm.write(f"| {name} | {question_draw} | {number} | {noise:.3f} | {in_group:.3f} | "
                   f"{rank:.3f} | {seconds:.2f} |", file=sys.stdout)


if __name__ == "__main__":
    run_program(lambda arguments: main(tyro.cli(BenchConfig, args=arguments)))
