"""Presets of train.py, one per recipe, and its command line.

grpo/config.py says what [C1] and [C++] are. docs/recipes.md shows the presets side by side.
"""

from dataclasses import fields, replace

import tyro

from grpo.config import TrainConfig


def change(config: TrainConfig, **changes) -> TrainConfig:
    """The settings with some changed, by their flags' names."""
    parts = {}
    for part in ("reward_config", "lora", "held_out"):
        settings = getattr(config, part)
        names = {field.name for field in fields(settings)} & changes.keys()
        parts[part] = replace(settings, **{name: changes.pop(name) for name in names})
    return replace(config, **parts, **changes)


PAPER = TrainConfig()
PRESETS = {
    "paper": (
        "CapRL-3B as the paper trains it, the default. Other recipes: the first word.", PAPER,
    ),
    "caprl-3b": (
        "as the released CapRL-3B scripts [C1]; their doubled reward is left out, the division by "
        "the deviation undoes it",
        change(
            PAPER, run_dir="runs/caprl-3b", num_questions=8, question_draw="independent",
            abstain=True, leave_one_out=True, kl_coef=0.0,
        ),
    ),
    "caprl-plus": (
        "as the CapRL++ release [C++]; steps: 3 passes over 75k images at 128 a step",
        change(
            PAPER, run_dir="runs/caprl-plus", policy="Qwen/Qwen3-VL-4B-Instruct",
            verifier="Qwen/Qwen3-4B-Instruct-2507", num_questions=8, question_draw="independent",
            abstain=True, length_weight=0.2, leave_one_out=True, scale_by_std=False, kl_coef=0.0,
            learning_rate=1e-5, num_steps=1764,
        ),
    ),
    "caprl-true": (
        "as the paper, rewarded also for claims that hold and not for empty sentences; evidence: "
        "docs/paper.md",
        change(PAPER, run_dir="runs/caprl-true", correctness_weight=0.5, praise_weight=0.5),
    ),
    "toy": (
        "the tiny shipped models on the toy world, minutes on a CPU; every value ours",
        change(
            PAPER, policy="data/toy/policy", verifier="data/toy/verifier", judge="data/toy/looker",
            checker="data/toy/looker", data="toy:train:480", run_dir="runs/toy",
            prompts_per_step=12, max_new_tokens=96,
            verifier_mode="logits", verifier_max_new_tokens=1, kl_coef=0.01, num_steps=40,
            learning_rate=3e-4, warmup_steps=3, save_dtype="float32", audit_every=20,
            gradient_checkpointing=False,
        ),
    ),
}


def parse_train_config(arguments: list[str]) -> TrainConfig:
    """`[PRESET] --flag value ...`; without a preset, the paper's."""
    has_preset = bool(arguments) and arguments[0] in PRESETS
    if not has_preset or PRESETS.keys() & arguments[1:]:
        from data.advice import misplaced_word  # here: most runs name their preset first

        switches = [name for name, value in PAPER.flat().items() if isinstance(value, bool)]
        if sentence := misplaced_word(arguments, PRESETS, switches):
            raise ValueError(sentence)
    arguments = arguments if has_preset else ["paper", *arguments]
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


def toy_config(**changes) -> TrainConfig:
    return change(PRESETS["toy"][1], **changes)
