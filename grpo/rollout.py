"""Sampling: G captions per image, with the image and its prompt run through the model once per group."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo.policy import Policy, Prompt


@dataclass(frozen=True)
class Rollouts:
    """B = P * G completions of P prompts, the G of one prompt adjacent; L is the longest one's length."""

    prompts: list[Prompt]
    tokens: Tensor  # (B, L) int64; pad beyond each length
    lengths: Tensor  # (B,) int64; the EOS that ends a completion is counted
    logprobs: Tensor  # (B, L) float32, under the sampling distribution; 0 beyond each length
    truncated: Tensor  # (B,) bool: reached max_new_tokens without an EOS
    captions: list[str]

    @property
    def group_size(self) -> int:
        return len(self.tokens) // len(self.prompts)

    @property
    def completion_mask(self) -> Tensor:
        """(B, L) bool, True on completion tokens, the EOS included. From lengths, never from token ids: pad may be EOS."""
        return torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def groups(self, start: int, stop: int) -> "Rollouts":
        """The rollouts of prompts `start` to `stop`."""
        rows = slice(start * self.group_size, stop * self.group_size)
        return Rollouts(
            self.prompts[start:stop], self.tokens[rows], self.lengths[rows], self.logprobs[rows], self.truncated[rows],
            self.captions[rows],
        )


def join_rollouts(parts: Sequence[Rollouts], pad_id: int) -> Rollouts:
    """Rollouts sampled in several goes as one, padded to the longest."""
    width = max(part.tokens.shape[1] for part in parts)

    def widen(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    return Rollouts(
        [prompt for part in parts for prompt in part.prompts],
        torch.cat([widen(part.tokens, pad_id) for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([widen(part.logprobs, 0.0) for part in parts]),
        torch.cat([part.truncated for part in parts]),
        [caption for part in parts for caption in part.captions],
    )


def temper_logits(logits: Tensor, temperature: float, forbidden_ids: Sequence[int]) -> Tensor:
    """(..., V) float32 logits of the distribution that is sampled and scored: tempered, forbidden ids at -inf."""
    logits = logits.float() / temperature
    logits[..., list(forbidden_ids)] = -torch.inf
    return logits


def draw_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) token ids from (B, V) probabilities by inverse CDF, one uniform number in [0, 1) per row.

    A row's draw depends on its own number only, so neither batch-mates nor their number change it. (On CPU this is also
    many times faster than torch.multinomial at a vocabulary of 152k.)
    """
    # In float64: CUDA's float32 cumsum can fall by a rounding error, and an impossible token would own the gap.
    cdf = probs.double().cumsum(-1)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(-1)


@torch.no_grad()
def sample_rollouts(policy: Policy, prompts: Sequence[Prompt], keys: Sequence[str], max_new_tokens: int,
                    temperature: float = 1.0) -> Rollouts:
    """len(keys) / len(prompts) completions of each prompt. `keys[b]` names the random stream of completion b.

    temperature 0 takes the most likely token. A completion ends with the first of the policy's EOS ids, which belongs
    to it, or after `max_new_tokens`. Finished rows leave the batch.
    """
    model, device = policy.model, policy.model.device
    group_size, rest = divmod(len(keys), len(prompts))
    assert rest == 0, f"{len(keys)} keys for {len(prompts)} prompts"
    batch = len(keys)
    tokens = torch.full((batch, max_new_tokens), policy.pad_id, device=device)  # (B, L)
    logprobs = torch.zeros(batch, max_new_tokens, device=device)  # (B, L)
    lengths = torch.full((batch,), max_new_tokens, device=device)
    truncated = torch.ones(batch, dtype=torch.bool, device=device)
    streams = [torch.Generator().manual_seed(random.Random(key).getrandbits(63)) for key in keys]
    uniforms = torch.stack([torch.rand(max_new_tokens, generator=stream) for stream in streams]).to(device)  # (B, L)
    eos_ids = torch.tensor(policy.eos_ids, device=device)

    logits, cache, mask, positions = prefill(policy, prompts)
    cache.batch_repeat_interleave(group_size)
    logits, mask = logits.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)  # (B, V), (B, T)
    positions = positions.repeat_interleave(group_size)  # (B,)
    rows = torch.arange(batch, device=device)  # which completion each row of the shrinking batch is
    for step in range(max_new_tokens):
        logits = temper_logits(logits, temperature or 1.0, policy.forbidden_ids)
        logprob = logits.log_softmax(-1)
        token = draw_tokens(logprob.exp(), uniforms[rows, step]) if temperature else logits.argmax(-1)
        tokens[rows, step] = token
        logprobs[rows, step] = logprob.gather(-1, token[:, None]).squeeze(-1)
        ended = torch.isin(token, eos_ids)
        lengths[rows[ended]], truncated[rows[ended]] = step + 1, False
        if ended.any():
            keep = (~ended).nonzero().squeeze(-1)
            rows, token, mask, positions = rows[keep], token[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        if not len(rows) or step + 1 == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        # Positions are given outright: left to itself the model would reuse the rope_deltas of an earlier batch.
        out = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=positions.view(1, -1, 1).expand(3, -1, -1),
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )
        logits, positions = out.logits[:, -1], positions + 1

    longest = int(lengths.max())
    captions = [policy.decode(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist())]
    return Rollouts(list(prompts), tokens[:, :longest], lengths, logprobs[:, :longest], truncated, captions)


def prefill(policy: Policy, prompts: Sequence[Prompt]):
    """One forward over the P prompts, padded on the left: logits (P, V), KV cache, mask (P, T), next positions (P,)."""
    device, width = policy.model.device, max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), policy.pad_id)  # (P, T)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    position_ids = torch.zeros(3, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt.input_ids) :] = prompt.input_ids
        mask[row, -len(prompt.input_ids) :] = 1
        position_ids[:, row, -len(prompt.input_ids) :] = prompt.position_ids
    cache = DynamicCache(config=policy.model.config.get_text_config())
    mask = mask.to(device)
    out = policy.model(
        input_ids=ids.to(device), attention_mask=mask, position_ids=position_ids.to(device),
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]).to(device),
        image_grid_thw=torch.cat([prompt.grid for prompt in prompts]).to(device),
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    )
    return out.logits[:, -1], cache, mask, torch.tensor([p.next_position for p in prompts], device=device)
