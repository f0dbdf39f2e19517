"""GRPO with the CapRL reward (arXiv 2509.22647), the whole loop.

    python train.py toy                             # tiny models, a CPU, minutes
    torchrun --nproc-per-node 8 train.py --data qa.jsonl --run-dir runs/caprl-3b    # one node
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py --data qa.jsonl                    # two nodes, by default the paper's settings
    torchrun --nproc-per-node 8 train.py --data qa.jsonl --check     # check before the first step
    torchrun --nproc-per-node 8 train.py --data qa.jsonl --resume    # go on after a stop
    python train.py --help                          # every setting with its source

The way of the data through one step, and the file that makes each:

    Example       data/examples.py     an image with its questions; P of them in a step
    Rollouts      grpo/rollout.py      G captions of each image: tokens and log-probabilities (B, L)
    Rewards       reward/caprl.py      (B,) accuracy of the verifier; NaN where it was not measured
    advantages    grpo/advantage.py    (B,) each reward relative to its own group
    loss          grpo/update.py       log-probabilities (B, L) of policy and reference, one number

Shape letters, here and in all files: P images (prompts), G captions of each, B = P * G captions.
The G captions of an image are a group. A prompt has T tokens, a caption L tokens, the vocabulary V
tokens. docs/tour.md follows one caption, one picture and one question through the code.
"""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.examples import Example, load_examples
from data.io import ahead, check_room, naming
from grpo.config import TrainConfig
from grpo.distributed import Phases, all_or_none, deal, init_distributed, print0, rank, world_size
from grpo.policy import Policy, Prompt
from grpo.run import Run, begin, export, load_run, sample_step, save_step
from grpo.update import update_policy, warm_up_
from reward.step import (
    Reward,
    check_examples,
    compare_siblings,
    load_reward,
    measure_step,
    reward_step,
    rollout_rows,
)


def train(config: TrainConfig) -> Path:
    """The whole run. Returns the folder of the trained policy."""
    from data.pictures import merge_pictures  # here: files are no part of the algorithm
    from grpo.run_dir import check_ranks, check_run_dir, only_writer
    from tools.settings import describe_run, run_contents
    from tools.tracker import open_trackers

    device = init_distributed(config.timeout_minutes)
    run_dir, trackers = Path(config.run_dir), []
    check_ranks(config)
    with ExitStack() as stack:
        with all_or_none("run folder"):  # first: loading the models takes minutes
            if not config.resume:
                check_run_dir(run_dir)
            check_room(run_dir)
            if rank() == 0:
                stack.enter_context(only_writer(run_dir))
                trackers = open_trackers(config)
        with all_or_none("data"):
            examples, held_out = merge_pictures(load_examples(config.data)), None
            if config.held_out.eval_data:
                from tools.held_out import set_aside  # here: for who asks for it

                examples, held_out = set_aside(examples, config)
            check_examples(examples, config)
        with all_or_none("start"):
            reward = load_reward(config, device)
        run = load_run(config, device)
        contents = run_contents(examples, run.sampler, reward)
        if held_out:
            contents |= held_out.contents()
        first_step = begin(run_dir, run, config, contents)
        describe_run(run, len(examples), config)
        for tracker in trackers:
            tracker.begin(run_dir, config.flat(), first_step)
            stack.push(tracker.finish)
        take_steps(run_dir, run, reward, examples, held_out, trackers, first_step, config)
        export(run, run_dir / "final", config)
        print0(f"trained policy: {run_dir / 'final'}")
        if rank() == 0:
            from tools.report.page import write_page  # here: a reader of training need not meet it

            print0(f"report: {write_page(run_dir)}")
    return run_dir / "final"


def take_steps(run_dir: Path, run: Run, reward: Reward, examples: Sequence[Example], held_out: Any,
               trackers: list, first_step: int, config: TrainConfig) -> None:
    """The loop. A signal to stop ends it after the step, with a checkpoint and the shell's code
    for that signal. held_out: it measures the policy between steps (tools/held_out.py), or None."""
    # here: a reader of the algorithm need not meet them
    from grpo.log import alarms, count_skipped, log_step, step_timing
    from grpo.signals import catch_stop_signals
    from tools.records import gather_records

    phases = Phases(run.device, config.timeout_minutes)
    saved_at, num_skipped, step = time.monotonic(), 0, first_step
    numbers = range(first_step, config.num_steps)
    opened = ahead(partial(open_step, run.sampler, examples, config), numbers, num_ahead=1)
    steps = bar = tqdm(numbers, desc="train", unit="step", disable=rank() != 0)
    if held_out:
        steps = held_out.watch(bar, first_step, run_dir, run, reward.verifier, phases, trackers)
    with bar, catch_stop_signals(lambda: step) as signals:  # an error gets a line of its own
        for step in steps:
            started = time.perf_counter()
            # 1. The policy writes G captions of each image. Images were opened in the step before.
            with phases("rollout", alone=True):
                batch, mine, prompts = next(opened)
                rollouts = sample_step(run, mine, prompts, step, config)

            # 2. The verifier answers questions from each caption, the same for all of an image.
            with phases("reward", alone=True):
                result = reward_step(reward, mine, rollouts, step, config)
            measured = {}
            if config.resample_flat:
                from reward.resample import resample_flat  # here: the paper has none

                with phases("resample"):
                    batch, mine, rollouts, result, measured = resample_flat(
                        run, reward, examples, batch, mine, rollouts, result, step, config)
            measured |= measure_step(rollouts, result, config)

            # 3. Each caption's reward is compared with those of its group.
            advantages = compare_siblings(result, config).to(run.device)  # (B,)
            is_measured = ~result.rewards.isnan().to(run.device)  # (B,)

            # 4. The clipped surrogate with the KL penalty, and the optimizer's step.
            with phases("update"):
                warm_up_(run.optimizer, step, config)
                metrics = measured | update_policy(
                    run.scorer, run.reference, run.optimizer, rollouts, advantages,
                    is_measured, config)

            # 5. The sampler gets the new weights.
            with phases("weights"):
                run.update_sampler_()

            # 6. The step is written to the logs, and a checkpoint is saved when it is due.
            with phases("records"):
                rows = rollout_rows(mine, rollouts, result, advantages)
                rows, audit = gather_records(run_dir, run, reward, examples, batch, rows, step,
                                             config)
            del rollouts  # its images' pixels are not held beside the next step's
            timing = step_timing(phases.take(), started, metrics["length"] * config.num_captions)
            with all_or_none("log"), naming(run_dir):
                if rank() == 0:
                    lines = log_step(run_dir, step, metrics, audit, timing, rows, trackers)
                    bar.write("\n    ".join([lines, *alarms(metrics)]))
            num_skipped = count_skipped(metrics, num_skipped, step, batch, run_dir, config)
            saved_at = save_step(run_dir, run, step, saved_at, signals, config)


def step_examples(examples: Sequence[Example], step: int, prompts_per_step: int,
                  seed: int) -> list[Example]:
    """The P images of a step. Each pass over the data has a new order, and no image comes twice in
    it. The images at its end that do not fill a step are left out of that pass."""
    pass_number, place = divmod(step, len(examples) // prompts_per_step)
    order = list(examples)
    random.Random(f"{seed}:pass:{pass_number}").shuffle(order)
    return order[place * prompts_per_step : (place + 1) * prompts_per_step]


def open_step(sampler: Policy, examples: Sequence[Example], config: TrainConfig,
              step: int) -> tuple[list[Example], list[Example], list[Prompt]]:
    """The P images of a step, this rank's share, and its prompts. Every rank gets as many images,
    and about as many image tokens. Runs in a thread, so no rank waits for another here."""
    from data.images import image_size, open_image  # here: files, as above

    mine = batch = step_examples(examples, step, config.prompts_per_step, config.seed)
    if world_size() > 1:
        sizes = [sampler.image_tokens(*image_size(example.image)) for example in batch]
        mine = [batch[place] for place in deal(sizes, world_size())[rank()]]
    return batch, mine, [sampler.prompt(open_image(example.image)) for example in mine]


def main(arguments: list[str]) -> None:
    from grpo.recipes import parse_train_config  # here: presets are no part of the algorithm

    config = parse_train_config(arguments)
    with naming(Path(config.run_dir)):
        if config.check:
            from tools.check import check  # here: a reader of training need not meet it

            check(config)
        else:
            train(config)


if __name__ == "__main__":
    from data.program import run_program

    run_program(main)
