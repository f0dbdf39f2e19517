"""Log-probabilities of given completions, with the image and its prompt run through the model once per group.

All groups lie end to end in one row without padding, [prompt | completion 1 | ... | completion G | prompt | ...]. Every
completion sees its prompt and itself, and its positions continue from the prompt, so the row gives exactly what separate
rows would.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.policy import image_inputs
from grpo.rollout import Rollouts, temper_logits_

HEAD_ROWS = 512
"""Positions whose logits exist at one time: at a vocabulary of 152k this is 0.3 GB in float32."""
SOFTMAX_ROWS = 32
"""Of these, positions whose probabilities exist at one time."""


@dataclass(frozen=True)
class PackedGroups:
    """P groups in one row of S tokens. N completion tokens in all, in the order of the mask."""

    input_ids: Tensor  # (1, S) int64
    position_ids: Tensor  # (3, 1, S) int64
    segments: list[list[int]]  # of each group: tokens of its prompt, then of each completion
    sources: Tensor  # (N,) place in the row of the token before each completion token
    targets: Tensor  # (N,) the completion tokens


def pack_groups(rollouts: Rollouts) -> PackedGroups:
    """The last token of a completion is predicted but predicts nothing: it is not fed."""
    device, size = rollouts.tokens.device, rollouts.group_size
    lengths = rollouts.lengths.tolist()
    ids, positions, sources, segments, end = [], [], [], [], 0
    for number, prompt in enumerate(rollouts.prompts):
        rows = range(number * size, (number + 1) * size)
        ids.append(prompt.input_ids.to(device))
        positions.append(prompt.position_ids)
        end += len(prompt.input_ids)
        last_of_prompt = end - 1
        for row in rows:
            fed = lengths[row] - 1
            ids.append(rollouts.tokens[row, :fed])
            positions.append((prompt.next_position + torch.arange(fed)).expand(3, -1))
            sources += [torch.tensor([last_of_prompt]), torch.arange(end, end + fed)]
            end += fed
        segments.append([len(prompt.input_ids), *(lengths[row] - 1 for row in rows)])
    return PackedGroups(
        torch.cat(ids)[None], torch.cat(positions, dim=1)[:, None].to(device), segments, torch.cat(sources).to(device),
        rollouts.tokens[rollouts.completion_mask],
    )


GROUP_ATTENTION = "group"


def group_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
                    segments: list[list[int]] | None = None, **kwargs):
    """Attention of packed groups: prompts to themselves, then each completion to its prompt and itself, and nothing else.

    query (1, heads, S, D), key and value (1, K, S, D); `segments` as in PackedGroups. Returns (1, S, heads, D). A mask over
    the whole row would do the same with P * G times the products. Without `segments` it is transformers' own SDPA.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    lengths = [length for segment in segments for length in segment]
    size, out = len(segments[0]), []
    queries, keys, values = (part[0].transpose(0, 1).split(lengths) for part in (query, key, value))  # (n, heads, D) each
    for at in range(0, len(lengths), size):
        (q, *own_q), (k, *own_k), (v, *own_v) = (parts[at : at + size] for parts in (queries, keys, values))
        out.append(_attend(q[None], k[None], v[None], scaling)[0])
        if any(map(len, own_q)):
            own = _attend(pad_sequence(own_q, batch_first=True), _behind(k, own_k), _behind(v, own_v), scaling)
            # What stands behind a shorter completion was seen by nobody before it.
            out += [row[: len(one)] for row, one in zip(own, own_q)]
    return torch.cat(out)[None], None


def _behind(prompt: Tensor, completions: Sequence[Tensor]) -> Tensor:
    """(T, K, D) and G of up to (L, K, D) -> (G, T + L, K, D), padded on the right."""
    return torch.cat([prompt.expand(len(completions), -1, -1, -1), pad_sequence(completions, batch_first=True)], dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(rows, n, heads, D) for the last n tokens of rows (rows, m, K, D)."""
    states = (part.transpose(1, 2) for part in (query, key, value))
    # Not a mask but the name of one: on a GPU flash attention has it built in, on a CPU it is written out.
    bias = causal_lower_right(query.shape[1], key.shape[1])
    return F.scaled_dot_product_attention(*states, bias, scale=scaling, enable_gqa=True).transpose(1, 2)


AttentionInterface.register(GROUP_ATTENTION, group_attention)
AttentionMaskInterface.register(GROUP_ATTENTION, sdpa_mask)


class CompletionScorer(nn.Module):
    """The model as the trainer sees it: rollouts in, log-probabilities out.

    A module of its own because FSDP2 gathers weights around a module's forward: everything that touches the
    model's weights in training happens inside this one.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, forbidden_ids: Sequence[int], temperature: float = 1.0):
        super().__init__()
        self.model, self.pad_id, self.forbidden_ids, self.temperature = model, pad_id, tuple(forbidden_ids), temperature
        model.set_attn_implementation({"text_config": GROUP_ATTENTION})  # to everyone else it is SDPA, see there

    def forward(self, rollouts: Rollouts, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
        """Logprobs (natural log) and entropies (nats) of the distribution sampled from: (B, L) float32 each.

        0 beyond each completion's length. Gradients flow through the logprobs; entropies are for logging, and cost half of
        the head at a large vocabulary: 0 without `with_entropy`.
        """
        packed, device = pack_groups(rollouts), rollouts.tokens.device
        with image_inputs(self.model, rollouts.prompts) as images:
            hidden = self.model.model(
                input_ids=packed.input_ids,
                attention_mask=torch.empty(1, 1, 1, 0, device=device),  # of four dimensions, so that transformers makes none
                segments=packed.segments,
                position_ids=packed.position_ids,
                use_cache=False,
                **images,
            ).last_hidden_state  # (1, S, H)
        hidden = hidden[0, packed.sources]  # (N, H)
        logprobs, entropies = HeadLogprobs.apply(
            hidden, self.model.lm_head.weight, packed.targets, self.temperature, self.forbidden_ids, HEAD_ROWS, with_entropy
        )
        mask = rollouts.completion_mask
        empty = torch.zeros(mask.shape, device=device)
        return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropies)


class HeadLogprobs(torch.autograd.Function):
    """log p(target) and entropy at N positions, `rows` of them at a time, so that no (N, V) tensor ever exists.

    hidden (N, H), weight (V, H), targets (N,) -> (N,), (N,) float32. The backward pass computes the logits again
    (cheaper than keeping them); entropies carry no gradient. What is done to (rows, V) is done in place: at a large
    vocabulary fresh memory costs as much as the arithmetic.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, forbidden_ids, rows, with_entropy=True):
        logprobs, entropies, norms = torch.zeros(3, len(hidden), device=hidden.device)
        memory = hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=torch.float32)
        forbidden = torch.tensor(forbidden_ids, dtype=torch.long, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = temper_logits_(_product(hidden[part], weight, memory), temperature, forbidden)  # (rows, V)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1)
            # A few rows at a time, so that there is never a second (rows, V).
            for few, norm, entropy in zip(*(each.split(SOFTMAX_ROWS) for each in (logits, norms[part], entropies[part]))):
                torch.logsumexp(few, -1, out=norm)
                if with_entropy:
                    probs = (few - norm[:, None]).exp_()
                    few[:, forbidden] = 0.0  # 0 * -inf would be nan
                    torch.sub(norm, probs.mul_(few).sum(-1), out=entropy)
        logprobs -= norms
        ctx.save_for_backward(hidden, weight, targets, norms, forbidden)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, norms, forbidden = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        grad = grad[:, None] / ctx.temperature
        memory = hidden.new_empty(min(ctx.rows, len(hidden)), len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = temper_logits_(_product(hidden[part], weight, memory), ctx.temperature, forbidden)  # (rows, V)
            # d log p(target) / d logits = onehot(target) - p
            grad_logits = logits.sub_(norms[part, None]).exp_().mul_(-grad[part])
            grad_logits = grad_logits.scatter_add_(-1, targets[part, None], grad[part]).to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[part])
            else:  # the product in the dtype that the hardware is fast in, the sum over chunks in float32
                grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _product(hidden: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
    """hidden (n, H) times weight (V, H), transposed: (n, V) float32, in the first n rows of `memory`."""
    out = memory[: len(hidden)]
    return torch.mm(hidden, weight.T, out=out) if hidden.dtype == torch.float32 else out.copy_(hidden @ weight.T)
