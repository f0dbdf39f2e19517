"""Supervised training shared by the toy models."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.io import check_room

INITIALIZER_RANGE = 0.08
"""Standard deviation of the initial weights, about 1 / sqrt(width). At transformers' 0.02 attention
starts out almost even. Then models of this size take several times as long to learn what to attend
to."""


def check_no_model(folder: Path) -> None:
    """Raises ValueError if a model is in the folder, or if nothing can be written there."""
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: expected a new folder, found a model in it")
    check_room(folder)


def fit(model: torch.nn.Module, loss_at: Callable[[int], tuple[Tensor, dict[str, float]]],
        steps: int, label: str,
        warmup_share: float, decay_share: float, rate: float = 2e-3,
        enough: float = math.inf) -> None:
    """`steps` steps on `loss_at(step)`, which returns the loss and what the bar shows beside it.
    Ends in eval mode.

    The rate rises over the first `warmup_share` of the steps and falls to 1% over the last
    `decay_share`. It ends early once the running means of all that is shown reach `enough`.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / max(1, warmup_share * steps), 1.0,
                         (1 - step / steps) / decay_share + 0.01)
    )
    means: dict[str, float] = {}
    bar = tqdm(range(steps), desc=label, unit="step", mininterval=5)
    for step in bar:
        loss, shown = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        means = {key: 0.97 * means.get(key, 0.0) + 0.03 * value for key, value in shown.items()}
        bar.set_postfix({"loss": f"{loss.item():.3f}"}
                        | {key: f"{value:.3f}" for key, value in means.items()}, refresh=False)
        if min(means.values(), default=0.0) >= enough:
            break
    model.eval()
