"""The text model, a token at a time: what transformers' forward computes, without its overhead.

The G captions of an image share its prompt. The prompt's keys and values are kept once. All G rows
read them in one matrix product. The captions' own are kept per row. Linear layers and head run on
the rows that are still being written, attention runs on whole groups.

A GPU takes longer to launch the step's thousand small kernels than to run them. So there a layer's
small kernels are compiled into few, attention is two kernels of our own (grpo/attend.py), and the
step is recorded once as a CUDA graph and replayed (grpo/recording.py). A recording has fixed
addresses and sizes. So all rows take part, and after every change of the cache it is made again. To
keep changes rare, room for captions comes in few sizes, and groups should be dropped seldom.

Shape letters: H hidden size, D head size, K key-value heads, R query heads per key-value head. T
longest prompt, A longest caption so far, B = P * G rows; n of them are still being written.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from grpo.policy import send


class Decoder:
    """Groups of G rows, added after the forward of their prompt and dropped when they are done.

    For Qwen2.5-VL, Qwen3-VL and models with their layers. After the prompt all three M-RoPE
    positions advance together: a single number per row is enough. Queries, keys and values become
    one product, for which the model's weights are laid side by side in memory (`stack_`).
    """

    def __init__(self, model: PreTrainedModel, group_size: int, max_new_tokens: int):
        # here: where weights lie is a page apart
        from grpo.layers import LayerWeights, check_layers, compiled_step_, has_kernels, layer_step_

        check_layers(model, max_new_tokens=max_new_tokens)
        text = model.model.language_model
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.eps = text.config.rms_norm_eps
        self.embed, self.norm = text.embed_tokens.weight, text.norm.weight
        self.head = model.lm_head
        self.rotary = text.rotary_emb
        self.layers = [LayerWeights(layer, self.eps) for layer in text.layers]
        # Keys and values per layer: the prompts' (P, K, T, D), the captions' (P, K, G, room, D).
        self.prefix: list[tuple[Tensor, Tensor]] = []
        self.suffix: list[tuple[Tensor, Tensor]] = []
        self.padding = torch.empty(0)  # (P,) int64: tokens on the left of each prompt's
        self.ages: list[int] = []  # of each group: caption tokens so far
        self.device_ages = torch.empty(0)  # (P,) int64, the same for the device
        self.uses_graphs = self.embed.device.type == "cuda"
        self.layer_step_ = compiled_step_() if self.uses_graphs else layer_step_
        num_kv, heads = text.config.num_key_value_heads, text.config.num_attention_heads
        sizes = group_size, num_kv, heads // num_kv, text.layers[0].self_attn.head_dim
        self.uses_kernels = self.uses_graphs and has_kernels(
            sizes, self.embed.dtype, self.embed.device)
        self.recording = None  # a Recording of grpo/recording.py, when there is one

    @property
    def longest(self) -> int:
        """The oldest group's age."""
        return max(self.ages, default=0)

    def to_device(self, numbers: list) -> Tensor:
        """int64."""
        return send(torch.tensor(numbers, dtype=torch.long), self.embed.device)

    def room_for(self, length: int) -> int:
        """Tokens that the captions' cache has room for when the longest has this length. It doubles
        up to 512 and then grows by 256: short captions take little memory, and copies are few."""
        room = 256 if self.uses_kernels else 64  # kernels do not read what is not written yet
        while room < length:
            room += min(room, 256)
        return min(room, -(-self.max_new_tokens // 8) * 8)

    def prompt_room(self, length: int) -> int:
        """Tokens of the prompts' cache; a multiple of 8 on a GPU, for its fast kernels."""
        return -(-length // 8) * 8 if self.uses_graphs else length

    def tokens_of_group(self, prompt_length: int, length: int) -> int:
        """Tokens in the cache of a group when the longest caption of all has this length."""
        return self.prompt_room(prompt_length) + self.group_size * self.room_for(length)

    def add(self, cache: DynamicCache, mask: Tensor) -> None:
        """Adds groups. cache: of their prompts' forward, which this empties; mask: (P, T), 1 on
        prompt tokens, with padding on the left."""
        self.recording = None
        if not self.ages:
            self.prefix = [(layer.keys[:0], layer.values[:0]) for layer in cache.layers]
            like = cache.layers[0].values
            empty = like.new_empty(0, like.shape[1], self.group_size, 0, like.shape[-1])
            self.suffix = [(empty, empty) for _ in cache.layers]
            self.padding = self.to_device([])
        before = self.prefix[0][0].shape[2]
        for i, layer in enumerate(cache.layers):  # a layer at a time, as in _grow
            self.prefix[i] = tuple(map(self._join, self.prefix[i], (layer.keys, layer.values)))
            self.suffix[i] = tuple(
                torch.cat([part, part.new_zeros(len(mask), *part.shape[1:])])
                for part in self.suffix[i]
            )
            layer.keys = layer.values = None
        width = self.prefix[0][0].shape[2]
        self.padding = torch.cat([self.padding + width - before, width - mask.sum(1)])
        self.ages = self.ages + [0] * len(mask)
        self.device_ages = self.to_device(self.ages)

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        """Keys or values of prompts along dimension 0, padded on the left to the prompts' room."""
        width = self.prompt_room(max(first.shape[2], second.shape[2]))
        return torch.cat([F.pad(it, (0, 0, width - it.shape[2], 0)) for it in (first, second)])

    def keep(self, groups: list[int]) -> None:
        """Keeps only these groups, in this order, and no more room than the oldest needs."""
        self.recording = None
        self.ages = [self.ages[group] for group in groups]
        index, room = self.to_device(groups), self.room_for(self.longest)
        for i, pair in enumerate(self.suffix):  # a layer at a time, as in _grow
            self.suffix[i] = tuple(part[:, :, :, :room].index_select(0, index) for part in pair)
            self.prefix[i] = tuple(part.index_select(0, index) for part in self.prefix[i])
        self.padding, self.device_ages = self.padding[index], self.device_ages[index]

    def step(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Logits (n, V) float32 after the next token of n rows. Every group's age grows by 1,
        whichever of its rows are among them.

        tokens, positions: (n,) int64. rows: (n,) int64, ascending places among the P * G rows.
        """
        self._grow(self.longest + 1)
        logits = self._replay(tokens, positions, rows) if self.uses_graphs else None
        if logits is None:
            logits = self._forward(tokens, positions, rows, self.device_ages, self.longest + 1)
        # A finished group that is not dropped yet must not grow past its room.
        most = self.max_new_tokens - 1
        self.ages = [min(age + 1, most) for age in self.ages]
        self.device_ages = (self.device_ages + 1).clamp(max=most)
        return logits

    def _replay(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor | None:
        """The step's logits from its recording. None if none can be made: it is tried once."""
        from grpo.recording import Recording, record  # here: for GPUs alone

        if self.recording is None:
            batch, room = len(self.ages) * self.group_size, self.suffix[0][0].shape[3]
            inputs = (tokens.new_zeros(batch), positions.new_zeros(batch),
                      torch.arange(batch, device=rows.device), self.device_ages.clone())
            try:
                replay, logits = record(lambda: self._forward(*inputs, room))
            except RuntimeError as error:
                warnings.warn(f"decoding without CUDA graphs, several times slower ({error})",
                              stacklevel=2)
                self.uses_graphs = False
                return None
            self.recording = Recording(*inputs, replay, logits)
        self.recording.tokens[rows], self.recording.positions[rows] = tokens, positions
        self.recording.ages.copy_(self.device_ages)
        self.recording.replay()
        return self.recording.logits[rows]

    def _forward(self, tokens: Tensor, positions: Tensor, rows: Tensor, ages: Tensor,
                 width: int) -> Tensor:
        """Logits (n, V) float32. ages: (P,). width: places of the captions' room to read."""
        slots = ages[rows // self.group_size]
        has_all_rows = len(rows) == len(self.ages) * self.group_size  # kernels take no fewer
        unseen = self.padding if self.uses_kernels and has_all_rows else self._bias(ages, width)
        x = F.embedding(tokens, self.embed)  # (n, H)
        angle = positions[:, None].float() * self.rotary.inv_freq  # (n, D / 2)
        scaling = self.rotary.attention_scaling
        cos, sin = ((part * scaling).to(x.dtype)[:, None] for part in (angle.cos(), angle.sin()))
        for layer, prefix, suffix in zip(self.layers, self.prefix, self.suffix):
            x = self.layer_step_(x, layer, prefix, suffix, (cos, sin), unseen, rows, slots)
        return head_logits(self.head, F.rms_norm(x, x.shape[-1:], self.norm, self.eps))

    def _bias(self, ages: Tensor, width: int) -> Tensor:
        """(P, 1, 1, 1, T + A) float32: -inf on padding, and on what is not written yet."""
        before, after = (torch.arange(size, device=ages.device)
                         for size in (self.prefix[0][0].shape[2], width))
        is_unseen = torch.cat([before < self.padding[:, None], after > ages[:, None]], dim=1)
        bias = torch.zeros(is_unseen.shape, device=ages.device).masked_fill(is_unseen, -torch.inf)
        return bias[:, None, None, None]

    def _grow(self, length: int) -> None:
        """Makes more room for captions if they are to have this length."""
        room = self.suffix[0][0].shape[3]
        if length > room:
            self.recording = None
            more = self.room_for(length) - room
            for i, pair in enumerate(self.suffix):  # a layer at a time: never the whole cache twice
                # With zeros: unwritten places are read with probability 0, and 0 * nan is nan.
                self.suffix[i] = tuple(F.pad(part, (0, 0, 0, more)) for part in pair)


def head_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Logits (n, V) float32 of (n, H). On a GPU they are never in half precision, as in training:
    a logit of 16 to 32 would be rounded in bfloat16 by up to 1/16."""
    if hidden.is_cuda and hidden.dtype != torch.float32 and head.bias is None:
        return torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
    return head(hidden).float()
