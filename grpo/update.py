"""The update: optimizer steps on a batch of rollouts. Micro-batches do not change the result."""

import math
from collections.abc import Callable
from itertools import pairwise

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
    """Freezes what is not trained, and turns on gradient checkpointing. Raises ValueError if the
    policy has dropout, which checkpointing would draw in train mode."""
    if config.freeze != "none" and not config.lora.lora_rank:  # all but adapters is frozen then
        trained = ("merger.", "deepstack_merger_list.") if config.freeze == "vision" else ()
        for name, parameter in model.model.visual.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
    if config.gradient_checkpointing:
        dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
        if dropout:
            raise ValueError("gradient_checkpointing: expected a policy without dropout, got "
                             f"attention_dropout {dropout}")
        # Nothing random is computed again, so no state of a random stream is kept.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={
            "use_reentrant": False, "preserve_rng_state": False})


def init_moments_(optimizer: torch.optim.AdamW) -> None:
    """Makes the state that AdamW would make at its first step. So a checkpoint has the same entries
    before and after that step. Another optimizer has other entries: they are made here, too."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0, device=device),
                "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter),
            }


def warm_up_(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """Sets the step's learning rate: it rises linearly for `warmup_steps`, then it is constant."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = rate


def micro_batches(rollouts: Rollouts, token_budget: int) -> list[tuple[int, int]]:
    """(start, stop) of each micro-batch's prompts: as few micro-batches as keep their packed groups
    within `token_budget`.

    Their number is the same on all ranks, since FSDP2 gathers weights once for each. If a single
    group is over the budget, every micro-batch is a single group.
    """
    captions = rollouts.lengths.view(-1, rollouts.group_size).sum(1).tolist()
    sizes = [len(prompt.input_ids) + length for prompt, length in zip(rollouts.prompts, captions)]
    for count in range(1, len(sizes) + 1):
        # consecutive parts, of which none has over one group more than another
        parts = list(pairwise(len(sizes) * place // count for place in range(count + 1)))
        is_too_large = max(sum(sizes[start:stop]) for start, stop in parts) > token_budget
        if not any(gather_rows([is_too_large])):
            break
    return parts


def update_policy(scorer: CompletionScorer,
                  reference: Callable[..., tuple[Tensor, Tensor]] | None,
                  optimizer: torch.optim.Optimizer, rollouts: Rollouts, advantages: Tensor,
                  valid: Tensor, config: TrainConfig) -> dict[str, float]:
    """`inner_epochs` optimizer steps on one batch of rollouts; returns diagnostics over all ranks.

    Means over tokens are weighted as in the loss, and NaN if no caption of the step has a reward.
    They are of the first inner epoch, whose policy is the one that sampled. But `ratio`,
    `clip_share` and `grad_norm` are of the last, where the policy has moved furthest.

    advantages: (B,) float32. valid: (B,) bool, False on captions without a reward, which count
    nowhere. Nor do truncated captions with `config.mask_truncated`.
    """
    if config.mask_truncated:
        valid = valid & ~rollouts.truncated
    mask = rollouts.completion_mask & valid[:, None]  # (B, L)
    # The whole step has one denominator, counted first: no split into parts changes the gradient.
    count = sum_across_ranks({
        "tokens": mask.sum().item(), "sequences": valid.sum().item(),
        "teaching": (valid & (advantages != 0)).sum().item(),
    })
    weights = token_weights(mask, config.reduction, count["tokens"], count["sequences"],
                            config.max_new_tokens)  # (B, L)
    parts = micro_batches(rollouts, config.micro_batch_tokens)
    ref_logprobs: dict[int, Tensor] = {}
    old_logprobs: dict[int, Tensor] = {}
    totals: dict[str, Tensor] = {}  # float64
    num_skipped, last_epoch = 0, config.inner_epochs - 1
    scorer.train(config.gradient_checkpointing)  # transformers checkpoints in train mode only
    for epoch in range(config.inner_epochs):
        # Sums stay on the device: the host goes on to the next micro-batch and does not wait.
        loss_sum = advantages.new_zeros((), dtype=torch.float64)
        for start, stop in parts:
            part = rollouts.groups(start, stop)
            rows = slice(start * config.group_size, stop * config.group_size)
            if reference is not None and epoch == 0:
                with torch.no_grad():
                    ref_logprobs[start], _ = reference(part, with_entropy=False)
            logprobs, entropies = scorer(part)  # (b, L)
            own = logprobs.detach()
            if epoch == 0:  # the policy is still the one that sampled
                old_logprobs[start] = part.logprobs if config.sampler_logprobs else own
            loss, stats = policy_loss(
                logprobs, old_logprobs[start], advantages[rows], weights[rows], config.clip_low,
                config.clip_high, ref_logprobs.get(start), config.kl_coef, config.ratio,
            )
            loss_sum += loss.detach()
            # Gradients are averaged over ranks, but the weights' denominator is global already.
            (loss * world_size()).backward()
            stats |= {
                "weight": weights[rows].sum(),
                "loss": loss.detach(),
                "entropy": (weights[rows] * entropies).sum(),
                "sampler_gap": (weights[rows] * (own - part.logprobs).abs()).sum(),
            }
            for key, value in stats.items():
                if epoch == (last_epoch if key in ("ratio", "clip_share") else 0):
                    totals[key] = totals.get(key, 0.0) + value.double()
        if config.lora.lora_rank:
            from grpo.lora import average_gradients_  # here: for who has adapters

            average_gradients_(scorer.parameters())
        norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # All ranks decide together: a single NaN would spread to every weight.
        total = sum_across_ranks({"norm and loss": norm.item() + loss_sum.item()})
        if math.isfinite(total["norm and loss"]):
            optimizer.step()
        else:
            num_skipped += 1
        optimizer.zero_grad()
    scorer.eval()
    totals = sum_across_ranks({key: value.item() for key, value in totals.items()})
    # Below 1 with the reduction "constant"; 0 if no caption has a reward.
    weight = totals.pop("weight") or math.nan
    means = {key: value / weight for key, value in totals.items()}
    means["loss"] *= weight  # the loss is a sum, not a mean
    return means | {"grad_norm": norm.item(), "skipped": num_skipped,
                    "teaching_captions": count["teaching"]}
