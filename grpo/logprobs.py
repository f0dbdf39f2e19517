"""Log-probabilities of given completions, with the image and its prompt run through the model once per group.

A group is one packed row, [prompt | completion 1 | ... | completion G]. Every completion sees the prompt and itself, and
its positions continue from the prompt, so the row gives exactly what G separate rows would.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.rollout import Rollouts, temper_logits

HEAD_ROWS = 1024
"""Positions whose logits exist at one time: at a vocabulary of 152k this is 0.6 GB in float32."""


@dataclass(frozen=True)
class PackedGroups:
    """P groups, one row each of S tokens, padded on the right. N completion tokens in all, in the order of the mask.

    T is the longest prompt, L the most tokens of a completion that are fed.
    """

    input_ids: Tensor  # (P, S) int64
    position_ids: Tensor  # (3, P, S) int64
    places: Tensor  # (P, G * L) int64: where in its row each completion's tokens stand; S on padding
    mask: Tensor  # (P * G, 1, L, T + L) bool: what a completion's token sees of its prompt and of its own completion
    sources: Tensor  # (N,) place in the flattened (P * S) of the token before each completion token
    targets: Tensor  # (N,) the completion tokens


def pack_groups(rollouts: Rollouts, pad_id: int) -> PackedGroups:
    """The last token of a completion is predicted but predicts nothing: it is not fed."""
    device, group_size = rollouts.tokens.device, rollouts.group_size
    fed = (rollouts.lengths - 1).view(-1, group_size)  # (P, G)
    prompt_lengths = torch.tensor([len(prompt.input_ids) for prompt in rollouts.prompts], device=device)  # (P,)
    width = int((prompt_lengths + fed.sum(1)).max())
    longest, longest_prompt = max(1, int(fed.max())), int(prompt_lengths.max())
    starts = prompt_lengths[:, None] + fed.cumsum(1) - fed  # (P, G) where each completion begins
    offsets = torch.arange(longest, device=device)
    is_fed = offsets < fed[:, :, None]  # (P, G, L)
    places = torch.where(is_fed, starts[:, :, None] + offsets, width).flatten(1)  # (P, G * L)

    input_ids = torch.full((len(fed), width + 1), pad_id, device=device)  # one more place, where padding is written
    position_ids = torch.zeros(3, len(fed), width + 1, dtype=torch.long, device=device)
    tokens = F.pad(rollouts.tokens, (0, max(0, longest - rollouts.tokens.shape[1])))[:, :longest]
    input_ids.scatter_(1, places, tokens.reshape(len(fed), -1))
    nexts = torch.tensor([prompt.next_position for prompt in rollouts.prompts], device=device)
    positions = (nexts[:, None] + offsets.repeat(group_size)).expand(3, -1, -1)
    position_ids.scatter_(2, places.expand(3, -1, -1), positions)
    for row, prompt in enumerate(rollouts.prompts):
        input_ids[row, : len(prompt.input_ids)] = prompt.input_ids.to(device)
        position_ids[:, row, : len(prompt.input_ids)] = prompt.position_ids.to(device)

    sees_prompt = torch.arange(longest_prompt, device=device) < prompt_lengths[:, None]  # (P, T)
    sees_prompt = sees_prompt.repeat_interleave(group_size, 0)[:, None].expand(-1, longest, -1)
    sees_own = torch.ones(longest, longest, dtype=torch.bool, device=device).tril().expand(len(sees_prompt), -1, -1)
    # The token before a completion's first is the prompt's last, before the others the one that was fed.
    before = torch.cat([(prompt_lengths - 1)[:, None, None].expand(-1, group_size, 1), places.view(*fed.shape, -1)], dim=2)
    before = before + torch.arange(len(fed), device=device)[:, None, None] * width
    predicts = torch.cat([torch.ones_like(is_fed[..., :1]), is_fed], dim=2)
    return PackedGroups(
        input_ids[:, :width], position_ids[:, :, :width], places, torch.cat([sees_prompt, sees_own], dim=2)[:, None],
        before[predicts], rollouts.tokens[rollouts.completion_mask],
    )


GROUP_ATTENTION = "group"


def group_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
                    places: Tensor | None = None, **kwargs):
    """Attention of packed groups: prompts to themselves, then each completion to its prompt and itself, and nothing else.

    query (P, heads, S, D), key and value (P, K, S, D); `places` and `attention_mask` as in PackedGroups. Returns
    (P, S, heads, D). A mask over the whole row would do the same with G times the products. Without `places` it is
    transformers' own SDPA.
    """
    if places is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    num_groups, num_heads, width, head_dim = query.shape
    rows, _, longest, seen = attention_mask.shape
    group_size, prompt = rows // num_groups, slice(0, seen - longest)

    def completions(states: Tensor) -> Tensor:  # (P, heads, S, D) -> (P * G, heads, L, D)
        index = places.clamp(max=width - 1)[:, None, :, None].expand(-1, states.shape[1], -1, head_dim)
        return states.gather(2, index).unflatten(2, (group_size, longest)).transpose(1, 2).flatten(0, 1)

    def heads(states: Tensor) -> Tensor:
        return states.repeat_interleave(num_heads // states.shape[1], dim=1)

    def prompt_and_own(states: Tensor) -> Tensor:  # (P * G, heads, T + L, D)
        return heads(torch.cat([states[:, :, prompt].repeat_interleave(group_size, 0), completions(states)], dim=2))

    # What stands behind a shorter prompt takes part here too; its output is written over below.
    on_prompt = F.scaled_dot_product_attention(
        query[:, :, prompt], heads(key[:, :, prompt]), heads(value[:, :, prompt]), is_causal=True, scale=scaling
    )
    own = F.scaled_dot_product_attention(
        completions(query), prompt_and_own(key), prompt_and_own(value), attn_mask=attention_mask, scale=scaling
    )
    own = own.unflatten(0, (num_groups, group_size)).transpose(1, 2).flatten(2, 3)  # (P, heads, G * L, D)
    out = F.pad(on_prompt, (0, 0, 0, width + 1 - on_prompt.shape[2]))  # the last place takes the padding
    out = out.scatter(2, places[:, None, :, None].expand(-1, num_heads, -1, head_dim), own)
    return out[:, :, :width].transpose(1, 2), None


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

    def forward(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Logprobs (natural log) and entropies (nats) of the distribution sampled from: (B, L) float32 each.

        0 beyond each completion's length. Gradients flow through the logprobs; entropies are for logging.
        """
        packed, device = pack_groups(rollouts, self.pad_id), rollouts.tokens.device
        hidden = self.model.model(
            input_ids=packed.input_ids,
            attention_mask=packed.mask,
            places=packed.places,
            position_ids=packed.position_ids,
            pixel_values=torch.cat([prompt.pixel_values for prompt in rollouts.prompts]).to(device),
            image_grid_thw=torch.cat([prompt.grid for prompt in rollouts.prompts]).to(device),
            use_cache=False,
        ).last_hidden_state  # (P, S, H)
        hidden = hidden.flatten(0, 1)[packed.sources]  # (N, H)
        logprobs, entropies = HeadLogprobs.apply(
            hidden, self.model.lm_head.weight, packed.targets, self.temperature, self.forbidden_ids, HEAD_ROWS
        )
        mask = rollouts.completion_mask
        empty = torch.zeros(mask.shape, device=device)
        return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropies)


class HeadLogprobs(torch.autograd.Function):
    """log p(target) and entropy at N positions, `rows` of them at a time, so that no (N, V) tensor ever exists.

    hidden (N, H), weight (V, H), targets (N,) -> (N,), (N,) float32. The backward pass computes the logits again
    (cheaper than keeping them); entropies carry no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, forbidden_ids, rows):
        logprobs, entropies = torch.empty(2, len(hidden), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logp = temper_logits(hidden[part] @ weight.T, temperature, forbidden_ids).log_softmax(-1)  # (rows, V)
            logprobs[part] = logp.gather(-1, targets[part, None]).squeeze(-1)
            entropies[part] = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)  # 0 * -inf is nan
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.forbidden_ids, ctx.rows = temperature, forbidden_ids, rows
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            probs = temper_logits(hidden[part] @ weight.T, ctx.temperature, ctx.forbidden_ids).softmax(-1)  # (rows, V)
            # d log p(target) / d logits = onehot(target) - p
            grad_logits = probs.neg_().scatter_add_(-1, targets[part, None], torch.ones_like(probs[:, :1]))
            grad_logits *= grad[part, None] / ctx.temperature
            grad_hidden[part] = grad_logits.to(weight.dtype) @ weight
            grad_weight.addmm_(grad_logits.T, hidden[part].float())
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
