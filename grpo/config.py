"""Settings of a training run: one flat dataclass, one preset per recipe, and the way programs end on bad input.

Sources: [P] the paper, arXiv 2509.22647; [C1] the released CapRL-3B launch and reward scripts; [C++] the CapRL++ release, arXiv
2606.09393; [GRPO] DeepSeekMath, arXiv 2402.03300. docs/recipes.md shows the presets side by side.
A value without a source says "ours" and why.
"""

import atexit
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch.distributed as dist
import tyro

from grpo.disk import disk_sentence
from grpo.loss import Reduction


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are the paper's main run; where the paper is silent, the released scripts'."""

    # models and data
    policy: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """The captioner to train, a local folder or a hub name. [P]"""
    verifier: str = "Qwen/Qwen2.5-3B-Instruct"
    """The text-only model that answers from captions. [P]"""
    data: str = "caprl-qa.jsonl"
    """A file or folder of images with questions (docs/formats.md), or toy:SPLIT:NUM."""
    run_dir: str = "runs/caprl"
    """Where everything that the run writes goes; refused if a run is there already."""

    # rollout
    prompts_per_step: int = 128
    """P, images per optimizer step, over all ranks. [C1]"""
    group_size: int = 8
    """G, captions per image. [C1]"""
    max_new_tokens: int = 4096
    """Longest caption in tokens. [C1]"""
    temperature: float = 1.0
    """Of sampling and of all log-probabilities. [C1]"""

    # reward
    reward: Literal["caprl", "judge"] = "caprl"
    """Questions answered from the caption, or the baseline: a judge that sees the image and rates the caption. [P] has both."""
    judge: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """The vision-language judge, with reward "judge" only. [P] names Qwen2.5-VL, the size is ours."""
    num_questions: int = 4
    """N, questions per caption; 8 are no better, 48.3 against 48.4. [P]"""
    question_draw: Literal["paired", "independent"] = "paired"
    """The same questions and shuffles for all captions of an image, without replacement while they last; or each caption
    for itself, with replacement [C1, C++]. Ours: paired, see docs/results.md."""
    num_shuffles: int = 1
    """Shuffles of the options under which each question is asked; the first released script had none. [P]"""
    verifier_mode: Literal["sample", "logits"] = "sample"
    """Answer by a sampled and parsed reply [C1], or by the likeliest offered letter."""
    verifier_temperature: float = 0.6
    """Of the verifier's replies in mode "sample". [C1]"""
    verifier_max_new_tokens: int = 10
    """Longest reply in mode "sample". [C1]"""
    soft: bool = False
    """A question earns the right option's probability, not 1 or 0. Ours: off; needs verifier_mode "logits"."""
    abstain: bool = False
    """Offer "The caption does not say" among the options, shuffled with them and never right. [C1] does, always last."""
    length_weight: float = 0.0
    """Weight of a length term beside the accuracy: 1 up to length_full tokens, falling to 0 at length_zero. [C++] 0.2"""
    length_full: int = 2048
    """[C++]"""
    length_zero: int = 3072
    """[C++]"""
    repetition_weight: float = 0.0
    """Weight of a penalty, the share of repeated 4-grams. Ours: off."""
    max_failed_share: float = 0.1
    """A larger share of questions that could not be scored stops the run, with the reasons. Ours."""
    audit_every: int = 50
    """Steps between two looks at the probe set: floors of the reward, agreement of shuffles. Ours; 0 for none."""
    probe_images: int = 16
    """Images of the probe set, the first of the data. Ours."""

    # advantage
    leave_one_out: bool = False
    """Baseline: the mean of the other rewards of the group. [C1] uses it, [P] the group's mean."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation. [P]"""

    # loss
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low. Ours: PPO's usual value, not found in [P]."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high. Ours, as above."""
    kl_coef: float = 0.04
    """Weight of the KL to the frozen initial policy; 0 loads no reference. [P] has the term, the value is [GRPO]'s."""
    reduction: Reduction = "sequence"
    """How tokens are averaged, see grpo/loss.py. [GRPO] equation 3."""
    inner_epochs: int = 1
    """Optimizer steps on each batch of rollouts. Ours: 1, so that the ratio is 1 and nothing is clipped."""
    sampler_logprobs: bool = False
    """Take the sampler's log-probabilities as the old ones, not the trainer's own at the start of the step."""

    # optimizer
    freeze: Literal["none", "vision", "vision+merger"] = "none"
    """What is not trained: nothing; the vision tower; the tower and what maps it to the language model. Not found in [P]."""
    num_steps: int = 1800
    """Steps; about 3 passes over 75k images at 128 a step. [C1]"""
    learning_rate: float = 1e-6
    """AdamW's, constant after the warm-up. [C1]"""
    warmup_steps: int = 20
    """Steps of linear warm-up. [C1]"""
    weight_decay: float = 0.0
    """Ours: none; at this rate it would only pull towards zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm. Ours: the usual value."""

    # run
    micro_batch_tokens: int = 16_384
    """Tokens in memory at a time in the update; any value gives the same gradient."""
    rollout_tokens: int = 524_288
    """Tokens that the sampler's cache has room for; finished groups make room for waiting ones. Any value gives the same
    captions."""
    gradient_checkpointing: bool = True
    """Keep a layer's inputs only and compute the layer again in the backward pass: less memory, a third more time. Ours: on;
    without it a group of the longest captions does not fit into 80 GB (docs/scale.md)."""
    seed: int = 0
    """Every random draw is a function of (seed, step, image, use)."""
    check: bool = False
    """Look at models, data and machine before a run, print what was found and stop: exit code 2 if something is wrong."""

    tensorboard: bool = False
    """Write the numbers, and now and then images with their captions, for TensorBoard too, to run_dir/tensorboard."""

    # checkpoints
    resume: bool = False
    """Go on with the run in run_dir from its latest checkpoint, or from the start where there is none yet."""
    save_every: int = 50
    """Steps between two checkpoints, 0 for none but the last. Ours."""
    save_minutes: float = 60.0
    """Minutes after which one is saved anyway, 0 for never. Ours. SIGTERM and SIGINT save one and stop."""
    keep_checkpoints: int = 2
    """The newest so many are kept, 12 bytes per parameter each. Ours."""
    export_every: int = 0
    """Steps between two exports of the policy as a Hugging Face folder; 0 for the final one only. Ours."""
    max_skipped: int = 3
    """So many steps in a row without a finite gradient stop the run. Ours."""

    # ranks
    replicas: int = 1
    """HSDP: weights are sharded inside each of so many equal groups of ranks, for one the number of nodes. Ours: over all."""
    offload_reference: bool = False
    """Keep the reference's shards in the host's memory. Ours: on the GPUs."""
    timeout_minutes: float = 30.0
    """A rank that others wait for so long stops the run, with its name and phase. Ours."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the exported weights. Ours: what the released checkpoints use. On GPUs the bfloat16 copy is what is exported."""

    def __post_init__(self):
        for name in ("prompts_per_step", "max_new_tokens", "num_questions", "inner_epochs", "num_steps",
                     "micro_batch_tokens", "rollout_tokens", "num_shuffles", "verifier_max_new_tokens", "keep_checkpoints",
                     "max_skipped", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("kl_coef", "learning_rate", "warmup_steps", "weight_decay", "clip_high", "length_weight",
                     "repetition_weight", "audit_every", "save_every", "save_minutes", "export_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")
        for name in ("temperature", "verifier_temperature", "max_grad_norm", "timeout_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected more than 0")
        if self.probe_images < 2:
            raise ValueError(f"probe_images {self.probe_images}: expected at least 2, one floor takes another image's caption")
        if self.reward == "judge" and (self.soft or self.abstain or self.length_weight or self.repetition_weight):
            raise ValueError("reward judge: expected neither soft nor abstain nor weights, its rating is the whole reward")
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share {self.max_failed_share}: expected 0 to 1")
        if self.soft and self.verifier_mode == "sample":
            raise ValueError("soft: expected verifier_mode logits, a sampled reply has no probabilities")
        if self.length_full >= self.length_zero:
            raise ValueError(f"length_zero {self.length_zero}: expected more than length_full {self.length_full}")
        if self.group_size < 2:
            raise ValueError(f"group_size {self.group_size}: expected at least 2, for a caption to be compared with others")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low {self.clip_low}: expected 0 to 1, the ratio cannot fall below 0")

    def prompts_per_rank(self, num_ranks: int) -> int:
        """Whole groups per rank. Raises ValueError if they do not divide."""
        if self.prompts_per_step % num_ranks:
            raise ValueError(f"prompts_per_step {self.prompts_per_step} does not divide by {num_ranks} ranks")
        if num_ranks % self.replicas:
            raise ValueError(f"replicas {self.replicas}: expected a divisor of the {num_ranks} ranks")
        return self.prompts_per_step // num_ranks

    def check_resumes(self, saved: dict, contents: dict[str, str]) -> None:
        """Raises ValueError where a setting that changes the numbers, or what data and models hold,
        is not as it was when the run began. `saved`: its config.json; older ones have no contents.
        """
        for name, value in asdict(self).items():
            if name not in FREE_ON_RESUME and name in saved and saved[name] != value:
                raise ValueError(f"{name} {value!r}: expected {saved[name]!r} as the run to resume has it")
        for name, value in contents.items():
            if (begun := saved.get("contents", {}).get(name, value)) != value:
                what = "rows" if name == "data" else "weights"
                raise ValueError(f"{name} {getattr(self, name)}: expected the {what} that the run "
                                 f"to resume began with ({begun}), found others ({value})")


FREE_ON_RESUME = {
    "run_dir", "num_steps", "check", "resume", "save_every", "save_minutes", "keep_checkpoints", "export_every", "max_skipped",
    "max_failed_share", "replicas", "offload_reference", "timeout_minutes", "micro_batch_tokens", "rollout_tokens",
    "gradient_checkpointing", "save_dtype", "tensorboard",
}
"""Settings that a resumed run may change: they say how far and how, not what is computed."""


PAPER = TrainConfig()
PRESETS = {
    "paper": ("CapRL-3B as the paper trains it, the default. Other recipes: the first word.", PAPER),
    "caprl-3b": (
        "as the released CapRL-3B scripts [C1]; their doubled reward is left out, the division by the deviation undoes it",
        replace(
            PAPER, run_dir="runs/caprl-3b", num_questions=8, question_draw="independent", abstain=True, leave_one_out=True,
            kl_coef=0.0,
        ),
    ),
    "caprl-plus": (
        "as the CapRL++ release [C++]; steps: 3 passes over 75k images at 128 a step",
        replace(
            PAPER, run_dir="runs/caprl-plus", policy="Qwen/Qwen3-VL-4B-Instruct", verifier="Qwen/Qwen3-4B-Instruct-2507",
            num_questions=8, question_draw="independent", abstain=True, length_weight=0.2, leave_one_out=True,
            scale_by_std=False, kl_coef=0.0, learning_rate=1e-5, num_steps=1764,
        ),
    ),
    "toy": (
        "the tiny shipped models on the toy world, minutes on a CPU; every value ours",
        replace(
            PAPER, policy="data/toy/policy", verifier="data/toy/verifier", judge="data/toy/policy", data="toy:train:480",
            run_dir="runs/toy", prompts_per_step=12, max_new_tokens=96, verifier_mode="logits", verifier_max_new_tokens=1,
            kl_coef=0.01, num_steps=40, learning_rate=3e-4, warmup_steps=3, save_dtype="float32", audit_every=20,
            gradient_checkpointing=False,
        ),
    ),
}


def parse_train_config(arguments: list[str]) -> TrainConfig:
    """`[PRESET] --flag value ...`; without a preset, the paper's."""
    if not arguments or arguments[0] not in PRESETS:
        arguments = ["paper", *arguments]
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


def toy_config(**changes) -> TrainConfig:
    return replace(PRESETS["toy"][1], **changes)


def run_program(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs a program so that bad input (ValueError) and what the system refuses (OSError, as on a
    full disk) end it with one sentence and exit code 2, and Ctrl-C with one and 130. A letter that
    the console cannot show is printed as its number.

    CAPRL_TRACEBACK=1 shows where it was raised. A process that is a rank does not return.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    # Its new name, `cache`, is unknown to transformers before 5.24; remove once that is required.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    try:
        try:
            main(arguments)
        except (OSError, ValueError) as error:
            if os.environ.get("CAPRL_TRACEBACK"):
                raise
            if isinstance(error, BrokenPipeError):  # what is buffered would be an error at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            reason = disk_sentence(error) if isinstance(error, OSError) else error
            print(f"error: {reason}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("\nstopped by Ctrl-C", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        if dist.is_initialized():
            _leave_ranks(error)
        raise
    if dist.is_initialized():
        _leave_ranks(SystemExit(0))


def _leave_ranks(error: BaseException) -> None:
    """Ends this process at once, with the code that `error` would have ended it with.

    Threads of gloo outlive the interpreter where anything (a mesh, a DTensor, a group) still holds
    a process group, and now and then abort the process while it leaves: "terminate called without
    an active exception" (pytorch issue 190489; pull request 179291 destroyed the groups at exit,
    which does not always help, and was given up). So the interpreter is never taken down.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # one that is passed on late changes nothing
        signal.signal(number, signal.SIG_IGN)
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    atexit._run_exitfuncs()  # what the interpreter would have done: open logs, temporary files
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a closed pipe
            stream.flush()
    os._exit(error.code or 0 if isinstance(error, SystemExit) else 1)
