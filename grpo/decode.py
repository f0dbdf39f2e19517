"""The text model one token at a time, by hand: what transformers' forward does for a row of length 1, without its overhead.

The G captions of an image share its prompt. Their common keys and values are kept once and read in one matrix product by
all G rows; only the captions' own are kept per row. Linear layers and head run on the rows that are still being
written, attention on whole groups.

On a GPU the step is recorded once as a CUDA graph and replayed, as its thousand small kernels take longer to launch than to
run. A recording has fixed addresses and sizes: all rows take part, room for captions doubles, and whoever drops groups does so
seldom. It is made again after every change of the cache.

H hidden size, D head size, K key-value heads, R query heads per key-value head, T longest prompt, A longest caption so far,
B = P * G rows of which n are still being written.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


class Decoder:
    """Groups of G rows, added after their prompt's prefill and dropped when they are done.

    For Qwen2.5-VL, Qwen3-VL and what has their layers. After the prompt all three M-RoPE positions advance together, so
    one number per row is enough. Weights are copied (queries, keys and values become one product): make a new decoder
    after every optimizer step.
    """

    def __init__(self, model: PreTrainedModel, group_size: int, max_new_tokens: int):
        check_layers(model)
        text = model.model.language_model
        config = text.config
        self.group_size, self.max_new_tokens, self.eps = group_size, max_new_tokens, config.rms_norm_eps
        self.num_kv = config.num_key_value_heads
        self.num_heads = config.num_attention_heads
        self.embed, self.norm, self.head = text.embed_tokens.weight, text.norm.weight, model.lm_head
        self.rotary = text.rotary_emb
        self.layers = [_Layer(layer) for layer in text.layers]
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer: keys (P, K, D, T), values (P, K, T, D)
        self.suffix: list[tuple[Tensor, Tensor]] = []  # per layer: keys and values (P, K, G, room, D)
        self.prefix_bias = torch.empty(0)  # (P, 1, 1, 1, T) 0 on prompt tokens, -inf on padding
        self.ages = torch.empty(0)  # (P,) caption tokens so far
        self.longest = 0  # the oldest group's age
        self.uses_graphs = self.embed.device.type == "cuda"
        self.recording: _Recording | None = None

    @property
    def num_groups(self) -> int:
        return len(self.ages)

    def add(self, cache: DynamicCache, mask: Tensor) -> None:
        """Groups after their prompts' prefill; mask: (P, T), 1 on prompt tokens, padding on the left."""
        self.recording = None
        bias = torch.zeros(mask.shape, device=mask.device)
        bias = bias.masked_fill(mask == 0, -torch.inf)[:, None, None, None]
        new = [(layer.keys.transpose(-1, -2), layer.values) for layer in cache.layers]
        if not self.num_groups:
            self.prefix, self.prefix_bias, self.ages = new, bias, mask.new_zeros(len(mask))
            empty = new[0][1].new_empty(len(mask), self.num_kv, self.group_size, 0, new[0][1].shape[-1])
            self.suffix = [(empty, empty) for _ in new]
            return
        for i, (keys, values) in enumerate(new):  # one layer at a time, as in _grow
            self.prefix[i] = _join_left(self.prefix[i][0], keys, dim=-1), _join_left(self.prefix[i][1], values, dim=-2)
            self.suffix[i] = tuple(torch.cat([part, part.new_zeros(len(mask), *part.shape[1:])]) for part in self.suffix[i])
        self.prefix_bias = _join_left(self.prefix_bias, bias, dim=-1, value=-torch.inf)
        self.ages = torch.cat([self.ages, self.ages.new_zeros(len(mask))])

    def keep(self, groups: Tensor) -> None:
        """Only these groups (indices) stay, in this order."""
        self.recording = None
        for i in range(len(self.layers)):  # one layer at a time, as in _grow
            self.prefix[i] = tuple(part[groups] for part in self.prefix[i])
            self.suffix[i] = tuple(part[groups] for part in self.suffix[i])
        self.prefix_bias, self.ages = self.prefix_bias[groups], self.ages[groups]
        self.longest = int(self.ages.max()) if len(groups) else 0

    def is_worth_dropping(self, num_done: int) -> bool:
        """Whether `keep` pays for so many groups: with graphs, half of them."""
        return not self.uses_graphs or num_done >= self.num_groups / 2

    def step(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Logits (n, V) after one more token of n rows. Each group advances by one, whichever of its rows are among them.

        tokens, positions: (n,). rows: (n,) places among the P * G rows.
        """
        self._grow(self.longest + 1)
        logits = self._replay(tokens, positions, rows) if self.uses_graphs else None
        if logits is None:
            logits = self._forward(tokens, positions, rows, self.ages, self.longest + 1)
        # A finished group that was not dropped stays within its room.
        self.ages = (self.ages + 1).clamp(max=self.max_new_tokens - 1)
        self.longest = min(self.longest + 1, self.max_new_tokens - 1)
        return logits

    def _replay(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor | None:
        """The step by its recording; None, and never again, where none can be made."""
        if self.recording is None:
            batch, room = self.num_groups * self.group_size, self.suffix[0][0].shape[3]
            inputs = tokens.new_zeros(batch), positions.new_zeros(batch), self.ages.clone()
            everyone = torch.arange(batch, device=rows.device)
            try:
                replay, logits = record(lambda: self._forward(*inputs[:2], everyone, inputs[2], room))
            except RuntimeError as error:
                warnings.warn(f"decoding without CUDA graphs, several times slower ({error})", stacklevel=2)
                self.uses_graphs = False
                return None
            self.recording = _Recording(*inputs, replay, logits)
        self.recording.tokens[rows], self.recording.positions[rows] = tokens, positions
        self.recording.ages.copy_(self.ages)
        self.recording.replay()
        return self.recording.logits[rows]

    def _forward(self, tokens: Tensor, positions: Tensor, rows: Tensor, ages: Tensor, longest: int) -> Tensor:
        """Logits (n, V). ages (P,); `longest` places of the captions' room are read."""
        shape = (self.num_groups, self.num_kv, self.group_size, self.num_heads // self.num_kv)  # P, K, G, R
        group, member = rows // self.group_size, rows % self.group_size
        written = ages[group]
        is_whole = len(rows) == self.num_groups * self.group_size  # rows ascend, so these are all of them in order
        late = torch.arange(longest, device=ages.device) > ages[:, None]  # (P, A): not written yet
        late = torch.zeros(late.shape, device=ages.device).masked_fill(late, -torch.inf)[:, None, None, None]
        bias = torch.cat([self.prefix_bias, late], dim=-1)  # (P, 1, 1, 1, T + A)
        width = self.prefix_bias.shape[-1]
        x = F.embedding(tokens, self.embed)  # (n, H)
        angle = positions[:, None].float() * self.rotary.inv_freq  # (n, D / 2)
        scaling = self.rotary.attention_scaling
        cos, sin = ((part * scaling).to(x.dtype)[:, None] for part in (angle.cos(), angle.sin()))
        for layer, (prefix_keys, prefix_values), (keys, values) in zip(self.layers, self.prefix, self.suffix):
            head_dim = keys.shape[-1]
            normed = F.rms_norm(x, x.shape[-1:], layer.norm1, self.eps)
            heads = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(x), -1, head_dim)  # (n, R * K + 2 * K, D)
            qk, v = heads[:, : -self.num_kv], heads[:, -self.num_kv :]
            if layer.q_norm is not None:
                q, k = qk.split([self.num_heads, self.num_kv], dim=1)
                q = F.rms_norm(q, (head_dim,), layer.q_norm, self.eps)
                qk = torch.cat([q, F.rms_norm(k, (head_dim,), layer.k_norm, self.eps)], dim=1)
            low, high = qk.chunk(2, dim=-1)
            qk = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
            keys[group, :, member, written], values[group, :, member, written] = qk[:, self.num_heads :], v
            q = qk[:, : self.num_heads]
            if not is_whole:
                q = x.new_zeros(shape[0] * shape[2], self.num_heads, head_dim).index_copy(0, rows, q)
            q = q.view(shape[0], shape[2], shape[1], shape[3], head_dim).transpose(1, 2).contiguous()  # (P, K, G, R, D)
            # On the prompt all queries of a group meet one set of keys, on the captions each row's its own.
            on_prompt = _scores(q.flatten(2, 3).flatten(0, 1), prefix_keys.flatten(0, 1)).view(*shape, -1)
            own_keys, own_values = (part.flatten(0, 2)[:, :longest] for part in (keys, values))  # (P * K * G, A, D)
            on_caption = _scores(q.flatten(0, 2), own_keys.transpose(1, 2)).view(*shape, -1)
            scores = torch.cat([on_prompt, on_caption], dim=-1)
            probs = torch.add(bias, scores, alpha=head_dim**-0.5).softmax(-1).to(x.dtype)  # (P, K, G, R, T + A)
            shared = probs[..., :width].flatten(2, 3) @ prefix_values  # (P, K, G * R, D)
            own = probs[..., width:].flatten(0, 2) @ own_values  # (P * K * G, R, D)
            out = (shared.view(q.shape) + own.view(q.shape)).transpose(1, 2).flatten(2, 4).flatten(0, 1)  # (B, R * K * D)
            x = x + F.linear(out if is_whole else out[rows], layer.out)
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer.norm2, self.eps), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return self.head(F.rms_norm(x, x.shape[-1:], self.norm, self.eps))

    def _grow(self, length: int) -> None:
        """Doubles the room for captions when it is used up, so that short ones never pay for `max_new_tokens`."""
        room = self.suffix[0][0].shape[3]
        if length > room:
            self.recording = None
            more = min(max(2 * room, 64), self.max_new_tokens) - room
            for i, pair in enumerate(self.suffix):  # one layer at a time: never the whole cache twice
                # With zeros: what is not written yet is read with probability 0, and 0 * nan would be nan.
                self.suffix[i] = tuple(F.pad(part, (0, 0, 0, more)) for part in pair)


class _Layer:
    """Weights of a transformer layer, those that read the same input stacked."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = torch.cat([projection.weight for projection in projections])
        self.qkv_bias = None if attention.q_proj.bias is None else torch.cat([projection.bias for projection in projections])
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None
        self.out, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])


LAYER_WEIGHTS = {
    f"{name}.weight" for name in (
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}
BIASES = {f"self_attn.{name}_proj.bias" for name in "qkv"}
HEAD_NORMS = {f"self_attn.{name}_norm.weight" for name in "qk"}


@torch.no_grad()
def check_layers(model: PreTrainedModel) -> None:
    """Raises ValueError, in one sentence, for a model of which `Decoder` would compute something else
    than its forward.

    It reads weights past the modules' own forward. So each layer has to have the weights that are read
    and no others (of experts, adapters, further norms), in modules that are just what they seem.
    """
    text, name = getattr(model.model, "language_model", None), type(model).__name__
    if not hasattr(text, "layers"):
        raise ValueError(f"expected a policy's text layers in model.language_model, found {name}")
    config = text.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = config.rope_parameters.get("rope_type")
    if kinds != {"full_attention"} or config.hidden_act != "silu" or rope != "default":
        found = f"{sorted(kinds)}, {config.hidden_act}, {rope}"
        what = "a policy with full attention, silu and default rope"
        raise ValueError(f"expected {what}, got {found}")
    norms = [text.norm]
    plain = [(text.embed_tokens, nn.Embedding, "the embedding")]
    plain.append((model.lm_head, nn.Linear, "the head"))
    for number, layer in enumerate(text.layers):
        weights, where = {key for key, _ in layer.named_parameters()}, f"layer {number} of {name}"
        wanted = LAYER_WEIGHTS.union(*(some for some in (BIASES, HEAD_NORMS) if weights & some))
        if weights != wanted:
            absent = [f"no {key}" for key in sorted(wanted - weights)[:1]]
            unread = [f"{key}, which is not read" for key in sorted(weights - wanted)[:1]]
            found = " but ".join(absent + unread)
            raise ValueError(f"expected layers of Qwen2.5-VL or Qwen3-VL, found in {where} {found}")
        for key in sorted(weights):
            module = layer.get_submodule(key.rpartition(".")[0])
            if "norm" in key:
                norms.append(module)
            else:
                plain.append((module, nn.Linear, f"{key} in {where}"))
        if layer.self_attn.scaling != layer.self_attn.head_dim**-0.5:
            width = layer.self_attn.head_dim
            raise ValueError(f"expected attention scaled by 1 / sqrt({width}), found {where}")
    for module, kind, place in plain:
        if type(module) is not kind:
            what = f"a plain {kind.__name__} for {place}"
            raise ValueError(f"expected {what}, found {type(module).__name__}")
    if model.lm_head.bias is not None:
        raise ValueError(f"expected a head without a bias, found one in {name}")
    for norm in norms:
        x = torch.linspace(-1, 1, len(norm.weight)).to(norm.weight)
        wanted = F.rms_norm(x, x.shape, norm.weight, config.rms_norm_eps)
        if not torch.allclose(norm(x), wanted, rtol=0.05, atol=1e-3):
            raise ValueError(f"expected plain RMS norms, found {type(norm).__name__} in {name}")


@dataclass(frozen=True)
class _Recording:
    """A step of all B rows with fixed addresses: what goes in, the replay, what comes out."""

    tokens: Tensor  # (B,)
    positions: Tensor  # (B,)
    ages: Tensor  # (P,)
    replay: Callable[[], None]
    logits: Tensor  # (B, V)


def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `function`: its replay, and the tensor in which the result then lies. RuntimeError where it fails."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # libraries choose their kernels and take their memory on the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products (rows, n, T) of (rows, n, D) and (rows, D, T), float32 whatever the weights are, as in the kernels that the
    trainer uses."""
    if queries.dtype != torch.float32 and queries.is_cuda:
        return torch.bmm(queries, keys, out_dtype=torch.float32)
    return torch.bmm(queries.float(), keys.float())


def _join_left(first: Tensor, second: Tensor, dim: int, value: float = 0.0) -> Tensor:
    """Both along dimension 0, the shorter one padded on the left of `dim` (-1 or -2)."""
    width = max(first.shape[dim], second.shape[dim])
    return torch.cat(
        [F.pad(part, (0, 0) * (-1 - dim) + (width - part.shape[dim], 0), value=value) for part in (first, second)]
    )
