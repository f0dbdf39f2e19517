"""Attention of a verifier whose query heads share key heads, without copies of keys and values, and
its mask; its head as one product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from grpo.decode import head_logits


def share_heads_(model: PreTrainedModel) -> None:
    """Has a model that uses transformers' "sdpa" attend by `shared_heads`. SDPA cannot cap scores.
    A model that does (Gemma 2) attends by "eager"; transformers 5.17 takes SDPA for it, and leaves
    the cap out."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("shared_heads")


def join_rows_(model: PreTrainedModel) -> None:
    """Makes lm_head one product for all rows, on a GPU with float32 results. transformers gives it
    a slice, (B, 1, H). Where weights have no gradients, torch multiplies a slice row by row, and
    reads a vocabulary of 152k B times."""
    lm_head = model.get_output_embeddings()
    if type(lm_head) is nn.Linear:
        lm_head.__class__ = JoinedHead


class JoinedHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        rows = hidden.flatten(0, -2)
        # The cases that head_logits multiplies by itself. In others it would call this again.
        is_rounded = rows.is_cuda and rows.dtype != torch.float32 and self.bias is None
        logits = head_logits(self, rows) if is_rounded else super().forward(rows)
        return logits.view(*hidden.shape[:-1], -1)


def shared_heads(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                 attention_mask: Tensor | None, **settings) -> tuple[Tensor, None]:
    """transformers' "sdpa" without its copies where R query heads share a key head and a mask is
    given: there it repeats keys and values R times, in every layer, for each token.

    query: (B, K * R, L, D); key, value: (B, K, T, D); mask: (B, 1, L, T). Returns (B, L, K * R, D).
    For a single token the R query heads of a key head become R queries of one head. For more, each
    key head becomes a row of its own, which its R query heads see through a stride of 0. PyTorch's
    own `enable_gqa` needs no copy on a CPU. On a GPU it writes out all scores if there is a mask.
    """
    attention_mask = getattr(attention_mask, "as_bias", attention_mask)
    (rows, heads, length, _), key_heads = query.shape, key.shape[1]
    has_bias = settings.get("position_bias") is not None
    if attention_mask is None or key_heads == heads or attention_mask.shape[1] > 1 or has_bias:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if length == 1:
        query = query.reshape(rows, key_heads, heads // key_heads, -1)
    else:
        query = query.reshape(rows * key_heads, heads // key_heads, length, -1)
        key, value = (
            part.flatten(0, 1)[:, None].expand(-1, query.shape[1], -1, -1) for part in (key, value)
        )
        attention_mask = attention_mask.repeat_interleave(key_heads, 0)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask,
                                         scale=settings.get("scaling"))
    return out.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


def cached_mask(**settings) -> Tensor | None:
    """transformers' mask for "sdpa", (B, 1, L, T) bool, of L new tokens and T places of the cache.
    Behind a cache it is one comparison, and nobody asks whether there is padding: the host would
    wait for that. Places without a token (of a `RoomyLayer` in reward/caprl.py) are masked.

    Its attribute `as_bias` is the same as numbers that are added to the scores. Without it SDPA
    makes them in every layer. A model that changes the mask loses it, and gets the bool one.
    """
    past, length, width = (settings[name] for name in ("q_offset", "q_length", "kv_length"))
    seen = settings["attention_mask"]  # (B, past + L), 1 on tokens that are not padding
    if seen is None and width > past + length:  # transformers has left a mask of ones out
        seen = torch.ones(settings["batch_size"], past + length, device=settings["device"])
    is_plain = settings["mask_function"] is causal_mask_function and not settings.get("use_vmap")
    if seen is None or not past or not is_plain or settings["kv_offset"]:
        return sdpa_mask(**settings)
    place = torch.arange(width, device=seen.device)
    seen = F.pad(seen, (0, width - seen.shape[1])).bool()[:, None, None]
    mask = seen & (place <= place[past : past + length, None])
    # Not -inf: where all of a row is masked, softmax would be NaN.
    lowest = torch.finfo(settings["dtype"]).min
    mask.as_bias = torch.zeros_like(mask, dtype=settings["dtype"]).masked_fill(~mask, lowest)
    return mask


AttentionInterface.register("shared_heads", shared_heads)
AttentionMaskInterface.register("shared_heads", cached_mask)
