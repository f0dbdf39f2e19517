"""Sampling: G captions per image. The image and its prompt run through the model once per group."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo.decode import Decoder, head_logits
from grpo.policy import Policy, Prompt, image_inputs, send


@dataclass(frozen=True)
class Rollouts:
    """B = P * G completions of P prompts, the G of a prompt adjacent. No length is over L."""

    prompts: list[Prompt]
    tokens: Tensor  # (B, L) int64; what is beyond each length is never read
    lengths: Tensor  # (B,) int64, on the host; the EOS that ends a completion is counted
    logprobs: Tensor  # (B, L) float32, under the sampling distribution; 0 beyond each length
    truncated: Tensor  # (B,) bool: reached max_new_tokens without an EOS
    captions: list[str]

    @property
    def group_size(self) -> int:
        return len(self.tokens) // len(self.prompts)

    @property
    def completion_mask(self) -> Tensor:
        """(B, L) bool, True on completion tokens, the EOS included. It is made from lengths, never
        from token ids: the pad may be an EOS."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return places < send(self.lengths, self.tokens.device)[:, None]

    def groups(self, start: int, stop: int) -> "Rollouts":
        """The rollouts of prompts `start` to `stop`."""
        rows = slice(start * self.group_size, stop * self.group_size)
        return Rollouts(
            self.prompts[start:stop], self.tokens[rows], self.lengths[rows], self.logprobs[rows],
            self.truncated[rows], self.captions[rows],
        )


def temper_logits_(logits: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """Makes (..., V) float32 logits those of the distribution that is sampled and scored. They are
    divided by the temperature, and -inf at the forbidden ids, (F,) int64."""
    if temperature != 1:
        logits /= temperature
    return logits.index_fill_(-1, forbidden, -torch.inf)


DRAW_BLOCK = 512
"""Tokens of a block: about the square root of a vocabulary of 152k."""


def draw_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) token ids from (B, V) probabilities by inverse CDF, with a uniform number in [0, 1) per
    row. A token of probability 0 is never drawn.

    A row's draw depends on its own number only, not on other rows. (Only float32 sums that a GPU
    rounds in another order may differ.) First the block of `DRAW_BLOCK` tokens is drawn, then the
    token in it. So a vocabulary of 152k is read once.
    """
    width = min(DRAW_BLOCK, probs.shape[1])
    whole = probs.shape[1] // width * width
    blocks = probs[:, :whole].unflatten(1, (-1, width)).sum(-1)
    rest = probs[:, whole:].sum(-1, keepdim=True)
    # In float64: CUDA's float32 cumsum can fall by a rounding error. For a number in that gap a
    # token of probability 0 would be drawn.
    ends = torch.cat([blocks, rest], dim=1).double().cumsum(-1)  # (B, blocks)
    target = uniforms[:, None].double() * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.cat([torch.zeros_like(target), ends], dim=1).gather(1, block)
    places = block * width + torch.arange(width, device=probs.device)  # (B, width)
    inside = probs.gather(1, places.clamp(max=probs.shape[1] - 1)).double()
    cdf = inside.masked_fill(places >= probs.shape[1], 0.0).cumsum(-1)
    # The block's sum in another order differs by a rounding error. It must not lead past the last
    # token with a probability.
    within = torch.minimum(target - before, cdf[:, -1:] * (1 - 1e-12))
    token = torch.searchsorted(cdf, within, right=True).squeeze(-1) + block.squeeze(-1) * width
    return token.clamp(max=probs.shape[1] - 1)  # NaN leads past the end: the caller looks for it


@torch.no_grad()
def sample_rollouts(policy: Policy, prompts: Sequence[Prompt], keys: Sequence[str],
                    max_new_tokens: int, temperature: float = 1.0,
                    token_budget: int = 1 << 19) -> Rollouts:
    """len(keys) / len(prompts) completions of each prompt. `keys[b]` names the random stream of
    completion b. Temperature 0 takes the most likely token.

    A completion ends with the first of the policy's EOS ids, which belongs to it, or after
    `max_new_tokens`. A group of ended rows makes room for the next waiting prompt. The cache holds
    at most `token_budget` tokens, but always a group; a budget changes what is drawn by rounding
    alone. Raises ValueError if the policy's logits are not finite.
    """
    from grpo.batch import Batch  # here: which groups have room is a page of its own

    device = policy.model.device
    group_size, rest = divmod(len(keys), len(prompts))
    assert rest == 0, f"{len(keys)} keys for {len(prompts)} prompts"
    decoder = Decoder(policy.model, group_size, max_new_tokens)  # first: it refuses too many tokens
    tokens = torch.full((len(keys), max_new_tokens), policy.pad_id, device=device)  # (B, L)
    logprobs = torch.zeros(len(keys), max_new_tokens, device=device)  # (B, L)
    lengths, truncated = [0] * len(keys), [False] * len(keys)
    streams = [torch.Generator().manual_seed(random.Random(key).getrandbits(63)) for key in keys]
    draws = [torch.rand(max_new_tokens, generator=stream) for stream in streams]
    uniforms = torch.stack(draws).to(device)  # (B, L)
    eos_ids = torch.tensor(policy.eos_ids, device=device)
    forbidden = torch.tensor(policy.forbidden_ids, dtype=torch.long, device=device)

    batch = Batch(decoder, prompts, token_budget)
    logits = torch.empty(0, policy.model.lm_head.weight.shape[0], device=device)  # (n, V)
    while batch.waiting or batch.live:
        while new := batch.next_prompts():
            new_logits, cache, mask = read_prompts(policy, [prompts[i] for i in new])
            batch.add(new, cache, mask)
            logits = torch.cat([logits, new_logits.repeat_interleave(group_size, 0)])

        rows, _, ages, _ = batch.where  # (n,) each
        logits = temper_logits_(logits, temperature or 1.0, forbidden)
        probs = logits.softmax(-1)  # (n, V)
        is_broken = probs[:, 0].isnan()  # a NaN in a row makes the whole row NaN
        token = draw_tokens(probs, uniforms[rows, ages]) if temperature else logits.argmax(-1)
        tokens[rows, ages] = token
        logprobs[rows, ages] = probs.gather(-1, token[:, None]).squeeze(-1).log()
        del probs  # as large as the next step's logits
        ends = torch.isin(token, eos_ids)
        is_last = ages + 1 == max_new_tokens
        # The only wait for the device in a step: whatever else decides is known on the host.
        ends, stops, broken = torch.stack([ends, ends | is_last, is_broken]).tolist()
        if any(broken):
            raise ValueError("the policy's logits are not finite")
        for i, row, length in batch.stopped(stops):
            lengths[row], truncated[row] = length, not ends[i]
        kept, set_back = batch.drop(stops)
        for number in set_back:
            group = slice(number * group_size, (number + 1) * group_size)
            tokens[group], logprobs[group] = policy.pad_id, 0.0
        if kept is not None:
            token = token[kept]
        _, places, _, positions = batch.where
        logits = decoder.step(token, positions, places) if batch.live else logits[:0]
        batch.where[2:] += 1

    longest = max(lengths)
    captions = [policy.decode(row[:length]) for row, length in zip(tokens.tolist(), lengths)]
    return Rollouts(
        list(prompts), tokens[:, :longest], torch.tensor(lengths),
        logprobs[:, :longest], torch.tensor(truncated, device=device), captions,
    )


def read_prompts(policy: Policy, prompts: Sequence[Prompt]) -> tuple[Tensor, DynamicCache, Tensor]:
    """A forward over the P prompts, padded on the left. Returns the next token's logits (P, V)
    float32, the KV cache and the mask (P, T) int64."""
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
    hidden = policy.model.model(
        **image_inputs(policy.model, ids.to(device), prompts), attention_mask=mask,
        position_ids=position_ids.to(device), past_key_values=cache, use_cache=True,
    ).last_hidden_state  # (P, T, H)
    # One product for all rows. torch would multiply the slice of `logits_to_keep` row by row.
    return head_logits(policy.model.lm_head, hidden[:, -1]), cache, mask
