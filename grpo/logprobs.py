"""Log-probabilities of given completions, with the image and its prompt run through the model once per group.

A group is one packed row, [prompt | completion 1 | ... | completion G]. Every completion sees the prompt and itself, and
its positions continue from the prompt, so the row gives exactly what G separate rows would.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.rollout import Rollouts, temper_logits

HEAD_ROWS = 1024
"""Positions whose logits exist at one time: at a vocabulary of 152k this is 0.6 GB in float32."""


@dataclass(frozen=True)
class PackedGroups:
    """P groups, one row each of S tokens, padded on the right. N completion tokens in all, in the order of the mask."""

    input_ids: Tensor  # (P, S) int64
    position_ids: Tensor  # (3, P, S) int64
    segments: Tensor  # (P, S) int64: 0 prompt, k for completion k, -1 padding
    sources: Tensor  # (N,) place in the flattened (P * S) of the token before each completion token
    targets: Tensor  # (N,) the completion tokens


def pack_groups(rollouts: Rollouts, pad_id: int) -> PackedGroups:
    rows, positions, segments, sources = [], [], [], []
    group_size = rollouts.group_size
    for p, prompt in enumerate(rollouts.prompts):
        group = slice(p * group_size, (p + 1) * group_size)
        ids, place, segment = [prompt.input_ids], [prompt.position_ids], [torch.zeros_like(prompt.input_ids)]
        source, end = [], len(prompt.input_ids)
        for k, (tokens, length) in enumerate(zip(rollouts.tokens[group].cpu(), rollouts.lengths[group].tolist()), start=1):
            fed = length - 1  # the last token is predicted but predicts nothing
            ids.append(tokens[:fed])
            place.append((torch.arange(fed) + prompt.next_position).expand(3, -1))
            segment.append(torch.full((fed,), k))
            source += [len(prompt.input_ids) - 1, *range(end, end + fed)]
            end += fed
        rows.append(torch.cat(ids)), positions.append(torch.cat(place, 1).T)
        segments.append(torch.cat(segment)), sources.append(torch.tensor(source))
    pad = nn.utils.rnn.pad_sequence
    input_ids = pad(rows, batch_first=True, padding_value=pad_id)
    device, width = rollouts.tokens.device, input_ids.shape[1]
    return PackedGroups(
        input_ids.to(device),
        pad(positions, batch_first=True).permute(2, 0, 1).to(device),
        pad(segments, batch_first=True, padding_value=-1).to(device),
        torch.cat([source + p * width for p, source in enumerate(sources)]).to(device),
        rollouts.tokens[rollouts.completion_mask],
    )


def group_mask(segments: Tensor) -> Tensor:
    """(P, 1, S, S) bool: a token sees what came before it in its own segment and in the prompt."""
    own = segments[:, :, None] == segments[:, None, :]
    prompt = segments[:, None, :] == 0
    return ((own | prompt) & torch.ones_like(own[0]).tril()).unsqueeze(1)


class CompletionScorer(nn.Module):
    """The model as the trainer sees it: rollouts in, log-probabilities out.

    A module of its own because FSDP2 gathers weights around a module's forward: everything that touches the
    model's weights in training happens inside this one.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, forbidden_ids: Sequence[int], temperature: float = 1.0):
        super().__init__()
        self.model, self.pad_id, self.forbidden_ids, self.temperature = model, pad_id, tuple(forbidden_ids), temperature

    def forward(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Logprobs (natural log) and entropies (nats) of the distribution sampled from: (B, L) float32 each.

        0 beyond each completion's length. Gradients flow through the logprobs; entropies are for logging.
        """
        packed, device = pack_groups(rollouts, self.pad_id), rollouts.tokens.device
        hidden = self.model.model(
            input_ids=packed.input_ids,
            attention_mask=group_mask(packed.segments),
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
