"""The clipped GRPO objective with a KL penalty, DeepSeekMath (arXiv 2402.03300) equation 3, as a loss."""

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) is 5e8: no honest ratio comes near, and one that does must not become inf. Beyond it the gradient is 0."""

Reduction = Literal["token", "sequence", "constant"]


def token_weights(mask: Tensor, reduction: Reduction, num_tokens: float, num_sequences: float, max_length: int) -> Tensor:
    """How much each token counts, (B, L) float32: a share of the whole step, whatever its split into micro-batches.

    mask: (B, L) bool, True on the tokens that count. `num_tokens` and `num_sequences` count the step's valid
    tokens and sequences over all micro-batches and ranks; both may be 0, and then every weight is.
        token      1 / num_tokens, 1 in all: long captions count for more (DAPO, arXiv 2503.14476, section 3.3)
        sequence   1 / (length * num_sequences), 1 in all: every caption counts alike (DeepSeekMath, equation 3)
        constant   1 / (max_length * num_sequences): no length enters (Dr. GRPO, arXiv 2503.20783); sums to less than 1
    """
    weights = mask.float()
    if reduction == "token":
        return weights / max(num_tokens, 1)
    lengths = weights.sum(1, keepdim=True).clamp(min=1) if reduction == "sequence" else max_length
    return weights / (lengths * max(num_sequences, 1))


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float,
                clip_high: float, ref_logprobs: Tensor | None = None, kl_coef: float = 0.0,
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum of weights * (min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) - kl_coef * KL).

    logprobs, old_logprobs, ref_logprobs: (B, L) float32, natural log, of the current policy, at the start of the step
    and of the frozen reference; only the first carries gradient. advantages: (B,). weights: (B, L), from
    `token_weights`; where they are 0 nothing counts, whatever stands there. Returns the loss (scalar) and diagnostics,
    each already weighted, so that sums over micro-batches and ranks, divided by the sum of the weights, are the step's means.
    """
    counts = weights > 0
    log_ratio = torch.where(counts, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (B, L)
    ratio = log_ratio.exp()
    advantage = advantages[:, None]  # (B, 1)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    per_token = -torch.minimum(unclipped, clipped)
    stats = {
        "ratio": ratio,
        "clip_share": (clipped < unclipped).float(),
    }
    if ref_logprobs is not None:
        kl = kl_to_reference(torch.where(counts, logprobs, 0.0), torch.where(counts, ref_logprobs, 0.0))
        per_token = per_token + kl_coef * kl
        stats["kl"] = kl
    return (weights * per_token).sum(), {key: (weights * value.detach()).sum() for key, value in stats.items()}


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) per token by the k3 estimator, r - log r - 1 with r = reference / policy: >= 0, unbiased.

    DeepSeekMath equation 4; http://joschu.net/blog/kl-approx.html. As a loss its expected gradient is that of
    KL(reference || policy): the sampled tokens are taken as given, as everywhere in the surrogate.
    """
    log_r = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_r.exp() - log_r - 1
