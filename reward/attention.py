"""Attention of a verifier whose query heads share key heads, without copies of keys and values."""

from types import SimpleNamespace

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def share_heads_(model: PreTrainedModel) -> None:
    """Has a model that uses transformers' "sdpa" attend by `shared_heads`."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("shared_heads")


def shared_heads(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                 attention_mask: Tensor | None, **settings) -> tuple[Tensor, None]:
    """transformers' "sdpa" without its copies where R query heads share a key head and a mask is
    given: there it repeats keys and values R times, in every layer, for each token.

    query: (B, K * R, L, D); key, value: (B, K, T, D); mask: (B, 1, L, T). Returns (B, L, K * R, D).
    Each key head becomes a row of its own, which its R query heads see through a stride of 0.
    PyTorch's own `enable_gqa` needs no copy on a CPU. On a GPU it writes out all scores if there is
    a mask.
    """
    (rows, heads, length, _), key_heads = query.shape, key.shape[1]
    has_bias = settings.get("position_bias") is not None
    if attention_mask is None or key_heads == heads or attention_mask.shape[1] > 1 or has_bias:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    query = query.reshape(rows * key_heads, heads // key_heads, length, -1)
    if length == 1:  # the query heads of a key head become the queries of one head: one product
        query = query.transpose(1, 2)
    key, value = (
        part.flatten(0, 1)[:, None].expand(-1, query.shape[1], -1, -1) for part in (key, value)
    )
    mask = attention_mask.repeat_interleave(key_heads, 0)
    plain = SimpleNamespace()  # a module that shares no heads
    out, _ = sdpa_attention_forward(plain, query, key, value, mask, **settings)
    out = out.reshape(rows, key_heads, length, heads // key_heads, -1).transpose(1, 2)
    return out.reshape(rows, length, heads, -1), None


def room_mask(*args, **settings) -> Tensor | None:
    """transformers' mask for "sdpa". It leaves the mask out where no token is padding. But a cache
    with room (`RoomyLayer` in reward/caprl.py) has places without a token, which must be masked."""
    if settings["kv_length"] > settings["q_offset"] + settings["q_length"]:
        settings["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **settings)


AttentionInterface.register("shared_heads", shared_heads)
AttentionMaskInterface.register("shared_heads", room_mask)
