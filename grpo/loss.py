"""The clipped GRPO objective with a KL penalty, as a loss.

DeepSeekMath (arXiv 2402.03300) equation 3.
"""

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Limit of a log ratio. exp(20) is 5e8: no healthy ratio reaches it, and it is not inf. Beyond the
limit the gradient is 0."""

Reduction = Literal["token", "sequence", "constant"]
RatioOf = Literal["token", "sequence"]


def token_weights(mask: Tensor, reduction: Reduction, num_tokens: float, num_sequences: float,
                  max_length: int) -> Tensor:
    """The weight of each token in the loss, (B, L) float32. It is a share of the whole step, so a
    split into micro-batches does not change it.

    mask: (B, L) bool, True on the tokens that count. `num_tokens` and `num_sequences` are the
    step's valid tokens and sequences over all micro-batches and ranks. If both are 0, so is every
    weight. The sum of the step's weights is 1, but less with "constant".
        token      1 / num_tokens: long captions count for more (DAPO, arXiv 2503.14476,
                   section 3.3)
        sequence   1 / (length * num_sequences): all captions count alike (DeepSeekMath, equation 3)
        constant   1 / (max_length * num_sequences): a caption's length does not enter (Dr. GRPO,
                   arXiv 2503.20783)
    """
    weights = mask.float()
    if reduction == "token":
        return weights / max(num_tokens, 1)
    lengths = weights.sum(1, keepdim=True).clamp(min=1) if reduction == "sequence" else max_length
    return weights / (lengths * max(num_sequences, 1))


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor,
                clip_low: float, clip_high: float, ref_logprobs: Tensor | None = None,
                kl_coef: float = 0.0,
                ratio_of: RatioOf = "token") -> tuple[Tensor, dict[str, Tensor]]:
    """-sum of weights * (min(ratio * A, clipped * A) - kl_coef * KL), where clipped is
    clip(ratio, 1 - clip_low, 1 + clip_high). The ratio is policy / old policy
        token      of each token (DeepSeekMath, equation 3)
        sequence   of the caption, to the power 1 / length: the geometric mean of its tokens' ratios
                   (GSPO, arXiv 2507.18071, section 4.1)

    logprobs, old_logprobs, ref_logprobs: (B, L) float32, natural log. They are of the current
    policy, of the policy at the start of the step, and of the frozen reference. Only the first
    carries gradient. advantages: (B,). weights: (B, L), from `token_weights`; where they are 0, no
    value counts.

    Returns the loss and diagnostics, all scalars. Diagnostics are weighted already. Their sum over
    micro-batches and ranks, divided by the sum of the weights, is the step's mean.
    """
    is_counted = weights > 0  # (B, L)
    log_ratio = torch.where(is_counted, logprobs - old_logprobs, 0.0)  # (B, L)
    if ratio_of == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / is_counted.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantage = advantages[:, None]  # (B, 1)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    per_token = -torch.minimum(unclipped, clipped)
    stats = {"ratio": ratio, "clip_share": (clipped < unclipped).float()}
    if ref_logprobs is not None:
        kl = kl_to_reference(torch.where(is_counted, logprobs, 0.0),
                             torch.where(is_counted, ref_logprobs, 0.0))
        per_token = per_token + kl_coef * kl
        stats["kl"] = kl
    sums = {key: (weights * value.detach()).sum() for key, value in stats.items()}
    return (weights * per_token).sum(), sums


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) per token by the k3 estimator: r - log r - 1 with
    r = reference / policy. It is unbiased and never negative.

    DeepSeekMath equation 4; http://joschu.net/blog/kl-approx.html. As a loss its expected gradient
    is that of KL(reference || policy), because the sampled tokens are taken as given.
    """
    log_r = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_r.exp() - log_r - 1
