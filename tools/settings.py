"""The settings of a run in words: what differs from the nearest preset."""

from typing import Any

from data.rows import read_manifest
from grpo.config import PRESETS, TrainConfig
from grpo.distributed import print0, world_size
from grpo.run import Run
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
