"""The settings of a run in words: what differs from the nearest preset. And hashes of the data and
models that they only name."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from torch import nn

from data.examples import Example
from data.io import text_hash
from data.rows import read_manifest
from grpo.config import TrainConfig
from grpo.distributed import check_alike, print0, world_size
from grpo.policy import Policy
from grpo.pretrained import weights_hash
from grpo.recipes import PRESETS
from grpo.run import Run
from reward.caprl import Verifier
from reward.step import Reward
from tools.check import check_sampling


def nearest_preset(settings: dict[str, Any]) -> tuple[str, dict[str, tuple]]:
    """The preset that the settings differ least from, and setting -> (here, there) where they
    do."""
    changes = {}
    for name, (_, preset) in PRESETS.items():
        there = preset.flat()
        changes[name] = {key: (value, there[key]) for key, value in settings.items()
                         if key in there and there[key] != value}
    name = min(changes, key=lambda name: len(changes[name]))
    return name, changes[name]


def describe_run(run: Run, num_images: int, config: TrainConfig) -> None:
    """Prints the settings, how many rows are left out, and how captions are sampled."""
    preset, changes = nearest_preset(config.flat())
    changed = "".join(f", {name} {value!r}" for name, (value, _) in changes.items())
    print0(f"{num_images} images, {world_size()} rank(s) on {run.device.type}, settings of "
           f"{preset}{changed}")
    refused = read_manifest(config.data)
    if refused:
        print0(f"{len(refused)} rows and questions of {config.data} are left out, as its manifest "
               "lists")
    print0(f"sampling: {check_sampling(run.sampler, config).facts}")


def examples_hash(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits of the ids and questions, in order. All draws depend on these."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, *map(astuple, example.questions)]).encode())
    return digest.hexdigest()[:16]


def verifier_hash(verifier: Verifier) -> str:
    """Two hashes: of its weights, of tokenizer and chat template. Of a server's model no more than
    the name is known."""
    model, tokenizer = verifier.model, verifier.tokenizer
    words = f"{tokenizer.chat_template} {sorted(tokenizer.get_vocab().items())}"
    weights = weights_hash(model) if isinstance(model, nn.Module) else model.name
    return f"{weights} {text_hash(words)}"


def check_verifiers(verifier: Verifier) -> None:
    """Raises ValueError, on all ranks, if one has another verifier. Every rank must call this."""
    if world_size() > 1:
        check_alike({"verifier": verifier_hash(verifier)})


def run_contents(examples: Sequence[Example], policy: Policy, reward: Reward) -> dict[str, str]:
    """Hashes of the data and of each model, which the settings only name. A model has two: of its
    weights, and of what is around them (AROUND in grpo/run_dir.py). To be called before the first
    step."""
    contents = {"data": f"{len(examples)} images, {examples_hash(examples)}"}
    for name, model in ({"policy": policy} | reward.image_models).items():
        files = text_hash(str(sorted(model.files.items())))
        contents[name] = f"{weights_hash(model.model)} {files}"
    if reward.verifier:
        contents["verifier"] = verifier_hash(reward.verifier)
    return contents
