"""The update: optimizer steps on a batch of rollouts, in micro-batches that no number depends on."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.config import TrainConfig
from grpo.distributed import gather_rows, sum_across_ranks, world_size
from grpo.logprobs import CompletionScorer
from grpo.loss import policy_loss, token_weights
from grpo.rollout import Rollouts


def prepare_training_(model: PreTrainedModel, config: TrainConfig) -> None:
    """Freezes what is not to be trained, and turns on checkpointing."""
    if config.freeze != "none":
        for name, parameter in model.model.visual.named_parameters():
            parameter.requires_grad_(config.freeze == "vision" and name.startswith(("merger.", "deepstack_merger_list.")))
    if config.gradient_checkpointing:
        if dropout := getattr(model.config.get_text_config(), "attention_dropout", 0.0):
            raise ValueError(f"gradient_checkpointing: expected a policy without dropout, got attention_dropout {dropout}")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def micro_batches(rollouts: Rollouts, token_budget: int) -> list[tuple[int, int]]:
    """Prompts `start` to `stop` of each micro-batch: as few as fit their packed groups into the budget.

    The number is the same on all ranks, since FSDP2 gathers weights once for each; one group over the budget makes every
    micro-batch a single group.
    """
    sizes = group_sizes(rollouts)

    def is_too_large(count: int) -> bool:
        return max(sum(part) for part in split_evenly(sizes, count)) > token_budget

    count = 1
    while count < len(sizes) and any(gather_rows([is_too_large(count)])):
        count += 1
    ends = [0, *accumulate(len(part) for part in split_evenly(sizes, count))]
    return list(pairwise(ends))


def group_sizes(rollouts: Rollouts) -> list[int]:
    """Tokens of each packed group: the prompt once, every caption."""
    captions = rollouts.lengths.view(-1, rollouts.group_size).sum(1).tolist()
    return [len(prompt.input_ids) + length for prompt, length in zip(rollouts.prompts, captions)]


def split_evenly(items: Sequence[int], count: int) -> list[Sequence[int]]:
    """`count` runs of neighbours whose lengths differ by one at most."""
    ends = [len(items) * place // count for place in range(count + 1)]
    return [items[start:stop] for start, stop in pairwise(ends)]


def update_policy(scorer: CompletionScorer, reference: CompletionScorer | None, optimizer: torch.optim.Optimizer,
                  rollouts: Rollouts, advantages: Tensor, valid: Tensor, config: TrainConfig) -> dict[str, float]:
    """`inner_epochs` optimizer steps on one batch of rollouts; returns diagnostics over all ranks.

    Token means are weighted as in the loss, NaN where no caption of the step has a reward. They are of the first inner epoch,
    when the policy is still the one that sampled, except `ratio`, `clip_share` and `grad_norm`, which are of the last: as far
    as the policy has moved away.

    advantages: (B,) float32. valid: (B,) bool, False on captions without a reward, which count nowhere.
    """
    mask = rollouts.completion_mask & valid[:, None]  # (B, L)
    # One denominator for the whole step, counted before the first micro-batch: no split changes the gradient.
    count = sum_across_ranks({"tokens": mask.sum().item(), "sequences": valid.sum().item()})
    weights = token_weights(mask, config.reduction, count["tokens"], count["sequences"], config.max_new_tokens)  # (B, L)
    parts = micro_batches(rollouts, config.micro_batch_tokens)
    ref_logprobs: dict[int, Tensor] = {}
    old_logprobs: dict[int, Tensor] = {}
    totals: dict[str, float] = {}
    num_skipped = 0
    loss_sum = 0.0
    scorer.train(config.gradient_checkpointing)  # in transformers it is on in train mode only
    for epoch in range(config.inner_epochs):
        for start, stop in parts:
            part = rollouts.groups(start, stop)
            rows = slice(start * config.group_size, stop * config.group_size)
            if reference is not None and epoch == 0:
                with torch.no_grad():
                    ref_logprobs[start], _ = reference(part, with_entropy=False)
            logprobs, entropies = scorer(part)  # (b, L)
            if epoch == 0:  # the policy is still the one that sampled: these are the old log-probabilities from here on
                old_logprobs[start] = part.logprobs if config.sampler_logprobs else logprobs.detach()
            loss, stats = policy_loss(
                logprobs, old_logprobs[start], advantages[rows], weights[rows], config.clip_low, config.clip_high,
                ref_logprobs.get(start), config.kl_coef,
            )
            loss_sum += loss.item()
            (loss * world_size()).backward()  # FSDP2 averages gradients over ranks; the denominator is global already
            if epoch == 0:
                stats |= {
                    "weight": weights[rows].sum(),
                    "loss": loss.detach(),
                    "entropy": (weights[rows] * entropies).sum(),
                    "sampler_gap": (weights[rows] * (logprobs.detach() - part.logprobs).abs()).sum(),
                }
            else:
                stats.pop("kl", None)
            if epoch + 1 < config.inner_epochs:
                del stats["ratio"], stats["clip_share"]
            for key, value in stats.items():
                totals[key] = totals.get(key, 0.0) + value.item()
        norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Agreed on by all ranks; one NaN would otherwise overwrite every weight.
        if math.isfinite(sum_across_ranks({"": norm.item() + loss_sum})[""]):
            optimizer.step()
        else:
            num_skipped += 1
        optimizer.zero_grad()
    scorer.eval()
    totals = sum_across_ranks(totals)
    weight = totals.pop("weight") or math.nan  # below 1 with the constant reduction; 0 where no caption has a reward
    means = {key: value / weight for key, value in totals.items()}
    means["loss"] *= weight  # a sum: the weights are in it
    return means | {"grad_norm": norm.item(), "skipped": num_skipped}
