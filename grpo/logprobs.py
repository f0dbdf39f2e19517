"""Log-probabilities of given completions. The image and its prompt run through the model once per
group.

All groups lie end to end in a row without padding:
[prompt | completion 1 | ... | completion G | prompt | ...]. Every completion sees its prompt and
itself, and its positions continue from the prompt. So the result is that of separate rows.
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

from grpo.policy import image_inputs, send
from grpo.rollout import Rollouts, temper_logits_

HEAD_ROWS = {"cpu": 512, "cuda": 2048}
"""Positions whose logits are in memory at a time, by device: in float32 0.3 and 1.2 GB at a
vocabulary of 152k. Fewer products and sums are faster on a GPU, less memory is on a CPU."""
SOFTMAX_ROWS = {"cpu": 32, "cuda": 256}
"""Positions whose probabilities are in memory at a time: 0.02 and 0.16 GB. A GPU waits for the host
where kernels are small."""


@dataclass(frozen=True)
class PackedGroups:
    """P groups in a row of S tokens, with N completion tokens in the order of the mask."""

    input_ids: Tensor  # (1, S) int64
    position_ids: Tensor  # (3, 1, S) int64
    segments: list[list[int]]  # per group: numbers of tokens of its prompt and its completions here
    sources: Tensor  # (N,) int64: place in the row of the token before each completion token
    places: Tensor  # (N,) int64: where each completion token lies in the (B, L) of the rollouts


def pack_groups(rollouts: Rollouts) -> PackedGroups:
    """The row of all groups. A completion's last token is not in it: it predicts nothing. All but
    the tokens is known on the host, which never waits for the device here."""
    device, group_size = rollouts.tokens.device, rollouts.group_size
    width, lengths, prompt_ids = rollouts.tokens.shape[1], rollouts.lengths.tolist(), []
    origins, positions, sources, places, segments, end = [], [], [], [], [], 0
    begin = sum(len(prompt.input_ids) for prompt in rollouts.prompts)  # of the completions' tokens
    for number, prompt in enumerate(rollouts.prompts):
        rows = range(number * group_size, (number + 1) * group_size)
        origins.append(torch.arange(len(prompt.input_ids)) + sum(map(len, prompt_ids)))
        prompt_ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        end += len(prompt.input_ids)
        last_of_prompt = end - 1
        for row in rows:
            fed, own = lengths[row] - 1, row * width + torch.arange(lengths[row])
            origins.append(begin + own[:fed])
            places.append(own)
            positions.append((prompt.next_position + torch.arange(fed)).expand(3, -1))
            sources += [torch.tensor([last_of_prompt]), torch.arange(end, end + fed)]
            end += fed
        segments.append([len(prompt.input_ids), *(lengths[row] - 1 for row in rows)])
    ids = torch.cat([send(torch.cat(prompt_ids), device), rollouts.tokens.flatten()])
    return PackedGroups(
        ids[send(torch.cat(origins), device)][None],
        send(torch.cat(positions, dim=1)[:, None], device), segments,
        send(torch.cat(sources), device), send(torch.cat(places), device),
    )


GROUP_ATTENTION = "group"


def group_attention(module, query: Tensor, key: Tensor, value: Tensor,
                    attention_mask: Tensor | None, scaling: float,
                    segments: list[list[int]] | None = None, **kwargs):
    """Attention of packed groups: prompts see themselves, each completion its prompt and itself.

    query (1, heads, S, D), key and value (1, K, S, D); `segments` as in PackedGroups. Returns
    (1, S, heads, D). A mask over the whole row would need P * G times the products. On a GPU in
    half precision it is one call, elsewhere two a group. Without `segments` it is transformers' own
    SDPA.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)

    # here: the same result by one call on a GPU, which a reader of training need not meet
    from grpo.flash import can_flash, flash_groups

    if can_flash(query, key, value) and scaling == query.shape[-1] ** -0.5:
        return flash_groups(query, key, value, tuple(map(tuple, segments))), None

    lengths = [length for segment in segments for length in segment]
    queries = query[0].transpose(0, 1).split(lengths)  # each (n, heads, D)
    keys, values = (part[0].transpose(0, 1).split(lengths) for part in (key, value))
    size, out = len(segments[0]), []
    for start in range(0, len(lengths), size):
        group = slice(start, start + size)
        (q, *own_q), (k, *own_k), (v, *own_v) = queries[group], keys[group], values[group]
        out.append(_attend(q[None], k[None], v[None], scaling)[0])
        if any(map(len, own_q)):
            padded_q = pad_sequence(own_q, batch_first=True)
            padded = _attend(padded_q, _behind(k, own_k), _behind(v, own_v), scaling)
            # Attention is causal: the padding on the right changes no token before it.
            out += [row[: len(completion)] for row, completion in zip(padded, own_q)]
    return torch.cat(out)[None], None


def _behind(prompt: Tensor, completions: Sequence[Tensor]) -> Tensor:
    """(T, K, D) and G of up to (L, K, D) -> (G, T + L, K, D), padded on the right."""
    prompts = prompt.expand(len(completions), -1, -1, -1)
    return torch.cat([prompts, pad_sequence(completions, batch_first=True)], dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(rows, n, heads, D) for the last n tokens of rows (rows, m, K, D)."""
    states = (part.transpose(1, 2) for part in (query, key, value))
    # The bias only names its mask. Flash attention, on a GPU, never builds it; a CPU does.
    bias = causal_lower_right(query.shape[1], key.shape[1])
    out = F.scaled_dot_product_attention(*states, bias, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


AttentionInterface.register(GROUP_ATTENTION, group_attention)
AttentionMaskInterface.register(GROUP_ATTENTION, sdpa_mask)


class CompletionScorer(nn.Module):
    """The model in training: rollouts in, log-probabilities out.

    It is a module because FSDP2 gathers weights around a module's forward. All that training does
    with the model's weights happens inside this forward.
    """

    def __init__(self, model: PreTrainedModel, forbidden_ids: Sequence[int],
                 temperature: float = 1.0):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.forbidden = torch.tensor(tuple(forbidden_ids), dtype=torch.long)  # (F,) on the host
        # Forwards without `segments`, such as the sampler's, still use SDPA.
        model.set_attn_implementation({"text_config": GROUP_ATTENTION})

    def forward(self, rollouts: Rollouts, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
        """Log-probabilities (natural log) and entropies (nats) of the distribution that is sampled.
        (B, L) float32 each, 0 beyond each completion's length. Only the log-probabilities carry
        gradient. Entropies are for the log. They take time, and are 0 without `with_entropy`."""
        packed, device = pack_groups(rollouts), rollouts.tokens.device
        hidden = self.model.model(
            **image_inputs(self.model, packed.input_ids, rollouts.prompts),
            # transformers makes no mask of its own if it is given one with 4 dimensions.
            attention_mask=torch.empty(1, 1, 1, 0, device=device),
            segments=packed.segments, position_ids=packed.position_ids, use_cache=False,
        ).last_hidden_state  # (1, S, H)
        hidden = hidden[0, packed.sources]  # (N, H)
        logprobs, entropies = HeadLogprobs.apply(
            hidden, self.model.lm_head.weight, rollouts.tokens.flatten()[packed.places],
            self.temperature, send(self.forbidden, device), with_entropy,
        )  # (N,) each
        width = rollouts.tokens.shape[1]
        places = packed.places // width, packed.places % width
        empty = torch.zeros(rollouts.tokens.shape, device=device)  # no view: FSDP2 warns of those
        return empty.index_put(places, logprobs), empty.index_put(places, entropies)


class HeadLogprobs(torch.autograd.Function):
    """log p(target) and entropy at N positions, HEAD_ROWS at a time: no (N, V) tensor exists.

    hidden (N, H), weight (V, H), targets (N,), forbidden (F,) -> (N,), (N,) float32. The backward
    pass computes the logits again, which is cheaper than keeping them. Entropies carry no gradient.
    Tensors (rows, V) are changed in place: at a large vocabulary new memory costs as much as the
    arithmetic.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, forbidden, with_entropy=True):
        device = hidden.device.type
        rows, few_rows = HEAD_ROWS[device], SOFTMAX_ROWS[device]
        logprobs, entropies, norms = torch.zeros(3, len(hidden), device=hidden.device)
        memory = hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _product(hidden[part], weight, memory)  # (rows, V)
            logits = temper_logits_(logits, temperature, forbidden)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1)
            tensors = (logits, norms[part], entropies[part])
            for few, norm, entropy in zip(*(tensor.split(few_rows) for tensor in tensors)):
                highest = few.amax(-1, keepdim=True)
                exps = (few - highest).exp_()  # norm and entropy share them
                total = exps.sum(-1)
                torch.add(highest[:, 0], total.log(), out=norm)
                if with_entropy:  # norm - the mean logit
                    few[:, forbidden] = 0.0  # 0 * -inf would be nan
                    torch.sub(norm, exps.mul_(few).sum(-1) / total, out=entropy)
        logprobs -= norms
        ctx.save_for_backward(hidden, weight, targets, norms, forbidden)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, norms, forbidden = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        is_trained = ctx.needs_input_grad[1]  # not where only adapters are
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if is_trained else None
        grad = grad[:, None] / ctx.temperature
        rows = HEAD_ROWS[hidden.device.type]
        memory = hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _product(hidden[part], weight, memory)  # (rows, V)
            logits = temper_logits_(logits, ctx.temperature, forbidden)
            # d log p(target) / d logits = onehot(target) - p
            grad_logits = logits.sub_(norms[part, None]).exp_().mul_(-grad[part])
            grad_logits.scatter_add_(-1, targets[part, None], grad[part])
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if not is_trained:
                continue
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[part])
            elif weight.is_cuda:  # summed in float32 by the product itself
                torch.addmm(grad_weight, grad_logits.T, hidden[part], out_dtype=torch.float32,
                            out=grad_weight)
            else:
                grad_weight += grad_logits.T @ hidden[part]
        grad_weight = grad_weight.to(weight.dtype) if is_trained else None
        return grad_hidden, grad_weight, None, None, None, None


def _product(hidden: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
    """hidden (n, H) @ weight (V, H) transposed: (n, V) float32, in the first n rows of `memory`."""
    out = memory[: len(hidden)]
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    return out.copy_(hidden @ weight.T)
