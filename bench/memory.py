"""Memory of a rank: the estimate of bench/estimate.py beside what a process needs, and the estimate
for the real models.

    python bench/memory.py           # small random models on this CPU: estimated and measured
    python bench/memory.py --real    # Qwen2.5-VL-3B with a 3B verifier on GPUs; nothing is loaded

Each case is a process of its own that takes one step of train.py with captions of full length. What
it held before its models were loaded is taken off.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

# Freed blocks of 64 KiB and more go back to the system at once: the process's size is then what it
# uses.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
               "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
               "MALLOC_ARENA_MAX": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bench.estimate import estimate_memory
from bench.step import StepConfig, make_examples, save_models
from data.examples import load_examples
from data.export import write_examples
from data.images import open_image
from data.toy.captioner import qwen_config
from data.toy.tokenizer import build_tokenizer
from grpo.config import TrainConfig
from grpo.recipes import PAPER, change, toy_config
from grpo.run import load_run, sample_step
from grpo.update import update_policy
from reward.step import load_reward
from tools.check import longest_prompt
from tools.memory import status
from tools.stats import markdown

CASES = {
    "default": (StepConfig(), {}),
    "long captions": (StepConfig(tokens=512), {}),
    "large image": (StepConfig(sizes=(896,), prompts=1), {}),
    "hidden 512, 8 layers": (StepConfig(hidden=512, layers=8, verifier_hidden=512,
                                        verifier_layers=8), {}),
    "the same, checkpointed": (
        StepConfig(hidden=512, layers=8, verifier_hidden=512, verifier_layers=8),
        {"gradient_checkpointing": True}
    ),
    "vocabulary 151,936": (StepConfig(vocab=151_936, tokens=64), {}),
    "the same, replies in words": (
        StepConfig(vocab=151_936, tokens=64),
        {"verifier_mode": "sample", "verifier_max_new_tokens": 10}
    ),
    "vision frozen": (StepConfig(sizes=(896,), prompts=1), {"freeze": "vision"}),
    "adapters": (StepConfig(), {"lora_rank": 16}),
    "adapters, hidden 512, 8 layers": (
        StepConfig(hidden=512, layers=8, verifier_hidden=512, verifier_layers=8), {"lora_rank": 64}
    ),
    "the same, checkpointed, large image": (
        StepConfig(hidden=512, layers=8, verifier_hidden=512, verifier_layers=8, sizes=(896,),
                   prompts=1),
        {"lora_rank": 64, "gradient_checkpointing": True}
    ),
    "adapters, vocabulary 151,936": (StepConfig(vocab=151_936, tokens=64), {"lora_rank": 64}),
}


def settings(case: str, folder: Path) -> TrainConfig:
    sizes, changes = CASES[case]
    return toy_config(
        policy=str(folder / "policy"), verifier=str(folder / "verifier"),
        data=str(folder / "examples.jsonl"),
        run_dir=str(folder / "run"), prompts_per_step=sizes.prompts, group_size=sizes.group_size,
        max_new_tokens=sizes.tokens,
        num_questions=sizes.questions, kl_coef=0.04, micro_batch_tokens=1 << 20, **changes,
    )


def _restart_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def work(case: str, folder: Path) -> None:
    """One step, in a process of its own; prints estimate and measurement."""
    torch.set_num_threads(1)
    config = settings(case, folder)
    # what the library allocates for itself
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    _restart_peak()
    before, measured = status("VmRSS"), {}
    device = torch.device("cpu")
    run, reward = load_run(config, device), load_reward(config, device)
    examples = load_examples(config.data)
    endless = replace(run.sampler, forbidden_ids=(*run.sampler.forbidden_ids, *run.sampler.eos_ids))
    run = replace(run, sampler=endless)
    # This step's, and those of the next one, which training opens meanwhile.
    steps = [[run.sampler.prompt(open_image(example.image)) for example in examples]
             for _ in range(2)]
    prompts = steps[0]
    prompt = max(prompts, key=lambda prompt: len(prompt.input_ids))
    estimate = estimate_memory(
        run.sampler.model, reward.verifier.model, config, 1, False, len(prompt.input_ids),
        len(prompt.pixel_values) // 4, longest_prompt(reward.verifier, examples),
    )
    for repeat in range(2):
        _restart_peak()
        rollouts = sample_step(run, examples, prompts, repeat, config)
        measured["phase rollout"] = status("VmHWM") - before
        _restart_peak()
        by_caption = [example for example in examples for _ in range(config.group_size)]
        captions = [" red" * config.max_new_tokens] * len(by_caption)
        reward.score(captions, by_caption, [example.id for example in by_caption],
                     [0] * len(by_caption))
        measured["phase verifier"] = status("VmHWM") - before
        _restart_peak()
        advantages = torch.randn(len(by_caption))
        valid = torch.ones(len(by_caption), dtype=torch.bool)
        update_policy(run.scorer, run.reference, run.optimizer, rollouts, advantages, valid, config)
        measured["phase update"] = status("VmHWM") - before
    print("case " + json.dumps({"estimate": estimate, "measured": measured}))


def prepare(sizes: StepConfig, folder: Path) -> None:
    """Models and data of a case."""
    save_models(sizes, folder)
    write_examples(folder, make_examples(sizes))


def measure() -> None:
    print("| case | phase | estimated, MiB | measured, MiB | ratio |\n"
          "| --- | --- | ---: | ---: | ---: |")
    for case, (sizes, _) in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            prepare(sizes, Path(name))
            done = subprocess.run([sys.executable, __file__, "--case", case, "--folder", name],
                                  capture_output=True, text=True)
        rows = [json.loads(line[5:]) for line in done.stdout.splitlines()
                if line.startswith("case ")]
        assert rows, done.stderr[-3000:]
        estimate, measured = rows[0]["estimate"], rows[0]["measured"]
        static = sum(size for part, size in estimate.items()
                     if not part.startswith(("phase", "peak")))
        for phase, size in measured.items():
            guess = static + estimate[phase]
            print(f"| {case} | {phase[6:]} | {guess / 2**20:.0f} | {size / 2**20:.0f} | "
                  f"{guess / size:.2f} |")
        guess, peak = estimate["peak"], max(measured.values())
        print(f"| {case} | **peak** | {guess / 2**20:.0f} | {peak / 2**20:.0f} | "
              f"{guess / peak:.2f} |", flush=True)


def estimate_real() -> None:
    """Qwen2.5-VL-3B and Qwen2.5-3B by their published shapes, an image of about a megapixel,
    captions of `max_new_tokens`."""
    text = dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008,
                num_hidden_layers=36, num_attention_heads=16,
                num_key_value_heads=2, max_position_embeddings=32_768)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                  fullatt_block_indexes=[7, 15, 23, 31])
    of_policy = qwen_config(build_tokenizer(), text, vision)
    image_tokens = 1280
    with torch.device("meta"):
        policy = Qwen2_5_VLForConditionalGeneration(of_policy)
        verifier = Qwen2ForCausalLM(Qwen2Config(**text, tie_word_embeddings=True))
    tables, names = [], []
    cases = ((8, 1024, True), (8, 4096, True), (8, 4096, False), (1, 1024, True), (1, 4096, True))
    for num_ranks, length, checkpointed in cases:
        config = replace(PAPER, max_new_tokens=length, gradient_checkpointing=checkpointed,
                         rollout_tokens=262_144)
        names.append(f"{num_ranks} GPU{'s' * (num_ranks > 1)}, {length:,} tokens"
                     f"{', not checkpointed' * (not checkpointed)}")
        tables.append(estimate_memory(policy, verifier, config, num_ranks, True, image_tokens + 30,
                                      image_tokens, 500))
    _print_columns(names, tables)
    tables, names = [], []
    for prompts, group_size, length in ((2, 8, 1024), (8, 8, 1024), (16, 8, 1024), (16, 8, 4096)):
        config = change(PAPER, lora_rank=64, prompts_per_step=prompts, group_size=group_size,
                        max_new_tokens=length, rollout_tokens=65_536, micro_batch_tokens=4096)
        names.append(f"{prompts} images x {group_size} captions, {length:,} tokens")
        tables.append(estimate_memory(policy, verifier, config, 1, True, image_tokens + 30,
                                      image_tokens, 500))
    print("\nOne GPU, adapters of rank 64:\n")
    _print_columns(names, tables)


def _print_columns(names: list[str], tables: list[dict[str, int]]) -> None:
    header = " | ".join(["GiB on each rank", *(f"{name}:" for name in names)])
    print(markdown(header, ([part, *(f"{table.get(part, 0) / 2**30:.1f}" for table in tables)]
                            for part in tables[0])))


def main(case: str = "", folder: str = "", real: bool = False) -> None:
    if case:
        work(case, Path(folder))
    elif real:
        estimate_real()
    else:
        measure()


if __name__ == "__main__":
    tyro.cli(main)
