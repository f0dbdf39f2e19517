"""Flash attention of sequences of unlike lengths, packed end to end, in one call.

S query tokens and Z key tokens of all sequences, K key-value heads, D head size.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from grpo.policy import send


def can_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes these: on a GPU, in half precision, D a multiple of 8.
    query: (1, heads, S, D); key and value: (1, K, S, D)."""
    is_grouped = query.shape[1] != key.shape[1]
    params = SDPAParams(query, key, value, None, 0.0, False, is_grouped)
    return can_use_flash_attention(params) and query.shape[-1] % 8 == 0


def flash_varlen(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int],
                 key_lengths: Sequence[int], causal: bool = False) -> Tensor:
    """Attention within each sequence, scaled by 1 / sqrt(D): (S, heads, D).

    query (S, heads, D), key and value (Z, K, D). lengths, key_lengths: tokens of each sequence,
    which sum up to S and Z; none is 0. With `causal` the queries are the last of its tokens.
    """
    starts, key_starts = (_cu_seqlens(tuple(part), query.device) for part in (lengths, key_lengths))
    longest, longest_keys = max(lengths), max(key_lengths)
    return _varlen_attention()(query, key, value, starts, key_starts, longest, longest_keys, causal)


@cache
def _varlen_attention() -> Callable[..., Tensor]:
    """(query, key, value, starts, starts of keys, longest, longest of keys, causal) ->
    (S, heads, D): flash-attn's where it is installed, else torch's own."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.13 wants it where heads share keys; 2.11 has no such argument.
        known = inspect.signature(varlen_attn).parameters
        options = {"enable_gqa": True} if "enable_gqa" in known else {}
        return lambda *args: varlen_attn(
            *args[:-1], window_size=(-1, 0 if args[-1] else -1), **options)
    return lambda *args: flash_attn_varlen_func(*args[:-1], causal=args[-1])


@lru_cache(maxsize=8)
def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each sequence begins, and the end of the last. All layers of a
    pass have the same few."""
    return send(torch.tensor((0, *lengths)).cumsum(0).to(torch.int32), device)


def flash_groups(query: Tensor, key: Tensor, value: Tensor,
                 segments: tuple[tuple[int, ...], ...]) -> Tensor:
    """Attention of packed groups, see `grpo.logprobs.group_attention`, as one call. Each
    completion's keys and values lie behind a copy of its prompt's."""
    places, lengths, key_lengths = _key_places(segments, query.device)
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    key, value = (RepeatedTokens.apply(part, places) for part in (key, value))
    return flash_varlen(query, key, value, lengths, key_lengths, causal=True)[None]


@lru_cache(maxsize=2)
def _key_places(segments: tuple[tuple[int, ...], ...],
                device: torch.device) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """For every prompt and completion that has tokens: where its keys lie in the packed groups,
    (Z,) int64, its number of queries, its number of keys. All layers of a pass have the same."""
    places, lengths, key_lengths, end = [], [], [], 0
    for prompt, *completions in segments:
        prompt_places = torch.arange(end, end + prompt)
        for number, length in enumerate([prompt, *completions]):
            own = torch.arange(end, end + length)
            end += length
            if length:
                places.append(torch.cat([prompt_places, own]) if number else own)
                lengths.append(length)
                key_lengths.append(len(places[-1]))
    return send(torch.cat(places), device), tuple(lengths), tuple(key_lengths)


class RepeatedTokens(torch.autograd.Function):
    """states[places]: (S, K, D) and (Z,) int64 -> (Z, K, D). The backward pass sums the gradients
    of a token's copies in float32, since bfloat16 loses small terms."""

    @staticmethod
    def forward(ctx, states, places):
        ctx.save_for_backward(places)
        ctx.num_tokens = len(states)
        return states[places]

    @staticmethod
    def backward(ctx, grad):
        [places] = ctx.saved_tensors
        total = grad.new_zeros(ctx.num_tokens, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, places, grad.float()).to(grad.dtype), None
