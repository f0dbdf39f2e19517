"""Supervised training shared by the two toy models."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

INITIALIZER_RANGE = 0.08
"""Standard deviation of the initial weights, about 1 / sqrt(width). At transformers' 0.02 attention starts out so even that
models of this size take several times as long to find out what to attend to."""


def fit(model: torch.nn.Module, loss_at: Callable[[int], tuple[Tensor, dict[str, float]]], steps: int, label: str) -> None:
    """`steps` steps on `loss_at(step)`, which returns the loss and what the bar shows beside it. Ends in eval mode.

    The rate rises over 50 steps, stays, and falls to 1% over the last half.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, min(50, steps // 20))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0, 2 * (1 - step / steps) + 0.01)
    )
    bar = tqdm(range(steps), desc=label, unit="step", mininterval=5)
    for step in bar:
        loss, shown = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix({"loss": f"{loss.item():.3f}"} | {key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)
    model.eval()
