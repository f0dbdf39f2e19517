"""Flash attention of rows of unlike lengths, end to end, in one call."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from grpo.policy import send


def can_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the call can be made: on a GPU, in half precision. (1, heads, S, D) and twice
    (1, K, S, D)."""
    is_grouped = query.shape[1] != key.shape[1]
    params = SDPAParams(query, key, value, None, 0.0, False, is_grouped)
    return can_use_flash_attention(params) and query.shape[-1] % 8 == 0


def flash_rows(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int],
               key_lengths: Sequence[int], causal: bool = False) -> Tensor:
    """Attention of rows that lie end to end, scaled by 1 / sqrt(D): (S, heads, D).

    query (S, heads, D), key and value (Z, K, D). lengths, key_lengths: tokens of each row, which
    sum up to S and Z; none is 0. With `causal` a row's queries are the last of its tokens.
    """
    ends, key_ends = (_ends(tuple(part), query.device) for part in (lengths, key_lengths))
    longest, longest_keys = max(lengths), max(key_lengths)
    return _attention()(query, key, value, ends, key_ends, longest, longest_keys, causal)


@cache
def _attention() -> Callable[..., Tensor]:
    """(query, key, value, ends, ends of keys, longest, longest of keys, causal) -> (S, heads, D):
    flash-attn's where it is installed, else torch's own."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        # newer releases of torch ask for it where heads share keys
        names = {"enable_gqa"} & inspect.signature(varlen_attn).parameters.keys()
        return lambda *args: varlen_attn(
            *args[:-1], window_size=(-1, 0 if args[-1] else -1), **dict.fromkeys(names, True))
    return lambda *args: flash_attn_varlen_func(*args[:-1], causal=args[-1])


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(rows + 1,) int32. All layers of a pass have the same few."""
    return send(torch.tensor((0, *lengths)).cumsum(0).to(torch.int32), device)


def flash_groups(query: Tensor, key: Tensor, value: Tensor,
                 segments: tuple[tuple[int, ...], ...]) -> Tensor:
    """Attention of packed groups, see `grpo.logprobs.group_attention`, as one call. Each
    completion's keys and values lie behind a copy of its prompt's."""
    places, lengths, key_lengths = _key_places(segments, query.device)
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    key, value = (RepeatedTokens.apply(part, places) for part in (key, value))
    return flash_rows(query, key, value, lengths, key_lengths, causal=True)[None]


@lru_cache(maxsize=2)
def _key_places(segments: tuple[tuple[int, ...], ...],
                device: torch.device) -> tuple[Tensor, list[int], list[int]]:
    """Of all prompts and completions with tokens: places (Z,) of their keys in the row, numbers of
    queries, numbers of keys. All layers of a pass have the same."""
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
    return send(torch.cat(places), device), lengths, key_lengths


class RepeatedTokens(torch.autograd.Function):
    """Rows of (S, K, D) at places (Z,). The gradients of a row's copies are summed in float32."""

    @staticmethod
    def forward(ctx, states, places):
        ctx.save_for_backward(places)
        ctx.number = len(states)
        return states[places]

    @staticmethod
    def backward(ctx, grad):
        [places] = ctx.saved_tensors
        total = grad.new_zeros(ctx.number, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, places, grad.float()).to(grad.dtype), None
