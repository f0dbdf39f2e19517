"""The vision tower without waits: one attention call a layer, and lengths that the host knows.

The tower's attention sees windows, 64 in an image of 896 pixels, and in some layers whole images.
transformers calls it once for each window, whose length it asks the GPU for in every layer. Here
the sizes of the images stay on the host, and all windows are one call. Patches are a product.

S patches of all images in a row, W windows, D head size.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from grpo.flash import can_flash, flash_varlen
from grpo.policy import send

WINDOW_ATTENTION = "flash_windows"
"""An attention with "flash" in its name is handed all windows together by transformers."""


def prepare_vision_(model: PreTrainedModel) -> PreTrainedModel:
    """The same Qwen2.5-VL or Qwen3-VL, whose tower now computes what it did, but faster. Weights,
    their names and the config stay."""
    tower = model.model.visual
    config = copy.copy(tower.config)
    config._attn_implementation = WINDOW_ATTENTION
    for block in tower.blocks:
        block.attn.config = config
    if type(tower.patch_embed.proj) is nn.Conv3d:
        tower.patch_embed.proj.__class__ = PatchProduct
    if _read_grid not in tower._forward_pre_hooks.values():
        tower.register_forward_pre_hook(_read_grid, with_kwargs=True)
    return model


class PatchProduct(nn.Conv3d):
    """A convolution over one patch at a time, as the matrix product that it is. cuDNN's Conv3d in
    bfloat16 is slow in several releases, and missing in some."""

    def forward(self, patches: Tensor) -> Tensor:
        """(S, channels, frames, height, width), each a whole kernel -> (S, hidden)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def _read_grid(tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Before the tower's forward: what it would read off the images' grid, (P, 3), on the GPU and
    wait for. It takes these by name."""
    grid, size = kwargs["grid_thw"].cpu(), tower.spatial_merge_size
    bounds = {"cu_seqlens": get_vision_cu_seqlens(grid)}
    places = {"position_ids": get_vision_position_ids(grid, size)}
    if hasattr(tower, "window_size"):  # Qwen2.5-VL
        places["window_index"], bounds["cu_window_seqlens"] = get_vision_window_index(
            grid, size, tower.window_size, tower.patch_size
        )
    if hasattr(tower, "num_grid_per_side"):  # Qwen3-VL
        places["interp_indices"], places["interp_weights"] = (
            get_vision_interpolation_indices_and_weights(
                grid, tower.num_grid_per_side, tower.interpolation_mode,
                tower.interpolation_align_corners, size,
            )
        )
    places = {name: send(part, args[0].device) for name, part in places.items()}
    return args, kwargs | {"grid_thw": grid} | bounds | places


def window_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                     attention_mask: None, scaling: float, cu_seq_lens_q: Tensor,
                     **kwargs) -> tuple[Tensor, None]:
    """Attention of each patch to all patches of its window.

    query, key, value (1, heads, S, D); cu_seq_lens_q (W + 1,) int32: where windows begin, and S; it
    should be on the host. Returns (1, S, heads, D). On a GPU in half precision this is one call of
    flash attention, if `scaling` is 1 / sqrt(D). Elsewhere it is one call for each length.
    """
    states = [part[0].transpose(0, 1) for part in (query, key, value)]  # (S, heads, D)
    lengths = [end - start for start, end in pairwise(cu_seq_lens_q.tolist())]
    if can_flash(query, key, value) and scaling == query.shape[-1] ** -0.5:
        return flash_varlen(*states, lengths, lengths)[None], None

    places = defaultdict(list)  # by length
    for place, length in enumerate(lengths):
        places[length].append(place)
    windows = [part.split(lengths) for part in states]
    out: dict[int, Tensor] = {}
    for same in places.values():
        batch = (_stack(part, same) for part in windows)
        attended = F.scaled_dot_product_attention(*batch, scale=scaling).transpose(1, 2)
        out |= zip(same, attended)
    return torch.cat([out[place] for place in range(len(lengths))])[None], None


def _stack(windows: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """Those of the windows (length, heads, D) as one batch (n, heads, length, D)."""
    return torch.stack([windows[place] for place in places]).transpose(1, 2)


AttentionInterface.register(WINDOW_ATTENTION, window_attention)
