"""Captions per second, ours beside plain transformers `generate` in batches; and a run under fire.

    python bench/caption.py                  # throughput, toy policy, mixed lengths
    python bench/caption.py --kill 10 --images 10000 --workers 2    # under fire

Throughput: both engines get the same images, opened from files, and the same instruction, greedy or
sampled at temperature 1. Both have the same room in the cache. `--rollout-tokens` is prompt and
caption tokens of all rows that are written at a time. A plain batch holds as many rows as fit and
goes on until its longest caption is done. Ours puts a waiting image in the place of a finished
caption. Engines take turns, one thread each. Seconds are the process's own CPU clock, so other work
on the machine counts little.

Under fire: workers caption the images greedily. One of them, drawn at random, is killed (SIGKILL)
at a random moment and started again, so many times. Then the rows are compared with those of an
undisturbed run.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from data.images import open_image
from data.toy.world import draw, make_scene
from grpo.captioning import Captioning, caption_batches
from grpo.policy import Policy
from grpo.pretrained import load_policy


@dataclass(frozen=True)
class BenchConfig:
    """Sizes of the measurement."""

    policy: str = "data/toy/policy"
    images: int = 256
    rollout_tokens: int = 4096
    """Room in the cache; at the toy's 96 new tokens and about 60 prompt tokens, some 26 rows."""
    max_new_tokens: int = 96
    temperature: float = 1.0
    end: float = 1.0
    """What the logit of the end is multiplied by: below 1, captions are longer and their lengths
    differ more."""
    repeats: int = 3
    kill: int = 0
    """Kills; 0 measures throughput instead."""
    workers: int = 2
    seed: int = 0


def draw_images(folder: Path, number: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{index:06d}.png" for index in range(number)]
    for index, path in enumerate(tqdm(paths, desc="images", leave=False)):
        draw(make_scene("heldout", index)).save(path)
    return paths


@torch.no_grad()
def plain(policy: Policy, paths: list[Path], config: BenchConfig) -> list[int]:
    """Tokens of each caption: batches, in the order of the files, padded on the left, through
    `generate`."""
    longest = max(len(policy.prompt(open_image(path)).input_ids) for path in paths[:30])
    rows = max(1, config.rollout_tokens // (longest + config.max_new_tokens))
    sampling = dict(do_sample=False)
    if config.temperature:
        sampling = dict(do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0)
    lengths = []
    for start in range(0, len(paths), rows):
        prompts = [policy.prompt(open_image(path)) for path in paths[start : start + rows]]
        width = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt.input_ids) :] = prompt.input_ids
            mask[row, -len(prompt.input_ids) :] = 1
        out = policy.model.generate(
            input_ids=ids, attention_mask=mask,
            pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]),
            image_grid_thw=torch.cat([prompt.grid for prompt in prompts]),
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
            max_new_tokens=config.max_new_tokens,
            repetition_penalty=1.0, eos_token_id=list(policy.eos_ids), pad_token_id=policy.pad_id,
            **sampling,
        )[:, width:]
        for row in out.tolist():
            ends = [place for place, token in enumerate(row) if token in policy.eos_ids]
            lengths.append(ends[0] + 1 if ends else len(row))
        policy.tokenizer.batch_decode(out, skip_special_tokens=True)
    return lengths


def ours(policy: Policy, paths: list[Path], config: BenchConfig) -> list[int]:
    settings = Captioning(temperature=config.temperature, max_new_tokens=config.max_new_tokens,
                          rollout_tokens=config.rollout_tokens, loaders=1)
    images = [(path.name, partial(open_image, path)) for path in paths]
    batches = caption_batches(policy, images, settings, config.seed)
    return [row["tokens"] for batch in batches for (row,) in batch]


def throughput(config: BenchConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    policy = load_policy(config.policy, torch.device("cpu"))
    # not the embedding's, where they are tied
    policy.model.lm_head.weight.data = policy.model.lm_head.weight.data.clone()
    policy.model.lm_head.weight.data[list(policy.eos_ids)] *= config.end
    paths = draw_images(folder / "images", config.images)
    seconds: dict[str, list[float]] = {"plain generate": [], "ours": []}
    tokens = {}
    for _ in tqdm(range(config.repeats), desc="repeats", leave=False):
        for name, engine in (("plain generate", plain), ("ours", ours)):
            started = time.process_time()
            tokens[name] = engine(policy, paths, config)
            seconds[name].append(time.process_time() - started)
    for name, lengths in tokens.items():
        quantiles = statistics.quantiles(lengths, n=10)
        print(f"{name}: {len(lengths)} captions of {statistics.mean(lengths):.1f} tokens, "
              "tenth to ninth tenth "
              f"{quantiles[0]:.0f} to {quantiles[-1]:.0f}, longest {max(lengths)}")
    print("\n| engine | seconds | images/s | tokens/s | ratio |\n"
          "| --- | ---: | ---: | ---: | ---: |")
    base = statistics.median(seconds["plain generate"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} | {config.images / median:.1f} | "
              f"{sum(tokens[name]) / median:.0f} | "
              f"{base / median:.2f} |")


def start_worker(config: BenchConfig, images: Path, out: Path, worker: int) -> subprocess.Popen:
    arguments = [
        "--policy", config.policy, "--images", images, "--out", out, "--max-new-tokens",
        config.max_new_tokens, "--temperature",
        0, "--shard-size", max(1, config.images // 20), "--batch-size", 64, "--lease-seconds", 10,
        "--seed", config.seed,
    ]
    environment = os.environ | {"RANK": str(worker), "WORLD_SIZE": str(config.workers)}
    return subprocess.Popen([sys.executable, "caption.py", *map(str, arguments)], env=environment,
                            stderr=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parent.parent)


def num_lines(out: Path) -> int:
    """Rows that are written, of finished and unfinished shards."""
    best: dict[str, int] = {}
    for path in out.glob("shard-*"):
        if "lease" not in path.name:
            try:
                lines = path.read_bytes().count(b"\n")
            except FileNotFoundError:  # finished in this moment
                continue
            best[path.name[:12]] = max(best.get(path.name[:12], 0), lines)
    return sum(best.values())


def read_rows(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("shard-*.jsonl"))
            for line in path.read_text().splitlines()]  # read_log passes over what was cut off


def under_fire(config: BenchConfig, folder: Path) -> None:
    draw_images(folder / "images", config.images)
    started = time.perf_counter()
    if start_worker(config, folder / "images", folder / "calm", 0).wait():
        raise ValueError("expected the undisturbed run to end well, it did not")
    calm_seconds = time.perf_counter() - started
    rng, started = random.Random(config.seed), time.perf_counter()
    # in rows written
    moments = sorted(rng.sample(range(1, config.images - config.images // 20), config.kill))
    out = folder / "fire"
    workers = [start_worker(config, folder / "images", out, worker)
               for worker in range(config.workers)]
    for moment in tqdm(moments, desc="kills", leave=False):
        while num_lines(out) < moment:
            time.sleep(0.2)
        victim = rng.randrange(config.workers)
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = start_worker(config, folder / "images", out, victim)
    codes = [worker.wait() for worker in workers]
    seconds = time.perf_counter() - started
    rows, calm = read_rows(out), read_rows(folder / "calm")
    differing = sum(row != other for row, other in zip(rows, calm, strict=True))
    print(f"{config.images} images, {config.workers} workers, {config.kill} SIGKILLs after "
          f"{moments} rows: "
          f"{len({row['id'] for row in rows})} distinct rows of {len(rows)}, "
          f"{differing} unlike the undisturbed run's; exit codes {codes}; {calm_seconds:.0f} s "
          f"undisturbed by one worker, {seconds:.0f} s under fire")


def main(config: BenchConfig) -> None:
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        (under_fire if config.kill else throughput)(config, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
