"""The text layers that grpo/decode.py computes, those of Qwen2.5-VL and Qwen3-VL: a check that they
are these, their weights as it reads them, and a layer's step.

Shape letters are those of grpo/decode.py.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.fused import compiled, is_plain_norm
from grpo.lora import LoraLinear, stack_adapters

Pair = tuple[Tensor, Tensor]

LAYER_WEIGHTS = {
    f"{name}.weight" for name in (
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    )
}
BIASES = {f"self_attn.{name}_proj.bias" for name in "qkv"}
HEAD_NORMS = {f"self_attn.{name}_norm.weight" for name in "qk"}


@torch.no_grad()
def check_layers(model: PreTrainedModel, max_new_tokens: int = 0) -> None:
    """Raises ValueError for a model for which `Decoder` would compute something else than its
    forward.

    `Decoder` reads weights without calling the modules' forward. So each layer must have the
    weights that are read. It must have no others: no experts, no adapters, no further norms. Their
    modules must be plain. It must have positions for `max_new_tokens`; the prompt's are not
    counted here.
    """
    text, name = getattr(model.model, "language_model", None), type(model).__name__
    if not hasattr(text, "layers"):
        raise ValueError(f"expected a policy's text layers in model.language_model, found {name}")
    config = text.config
    if max_new_tokens > config.max_position_embeddings:
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected at most the "
                         f"{config.max_position_embeddings} positions of the policy")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = config.rope_parameters.get("rope_type")
    if kinds != {"full_attention"} or config.hidden_act != "silu" or rope != "default":
        raise ValueError("expected a policy with full attention, silu and default rope, got "
                         f"{sorted(kinds)}, {config.hidden_act}, {rope}")
    norms = [text.norm]
    plain = [(text.embed_tokens, nn.Embedding, "the embedding")]
    plain.append((model.lm_head, nn.Linear, "the head"))
    for number, layer in enumerate(text.layers):
        where = f"layer {number} of {name}"
        weights = {key for key, _ in layer.named_parameters() if "lora_" not in key}
        known = LAYER_WEIGHTS.union(*(group for group in (BIASES, HEAD_NORMS) if weights & group))
        if weights != known:
            absent = [f"no {key}" for key in sorted(known - weights)[:1]]
            unread = [f"{key}, which is not read" for key in sorted(weights - known)[:1]]
            raise ValueError(f"expected layers of Qwen2.5-VL or Qwen3-VL, found in {where} "
                             + " but ".join(absent + unread))
        for key in sorted(weights):
            module = layer.get_submodule(key.rpartition(".")[0])
            if "norm" in key:
                norms.append(module)
            else:
                plain.append((module, nn.Linear, f"{key} in {where}"))
        width = layer.self_attn.head_dim
        if layer.self_attn.scaling != width**-0.5:
            raise ValueError(f"expected attention scaled by 1 / sqrt({width}), found {where}")
    for module, kind, place in plain:
        if type(module) is not kind and not (kind is nn.Linear and type(module) is LoraLinear):
            raise ValueError(f"expected a plain {kind.__name__} for {place}, found "
                             + type(module).__name__)
    if model.lm_head.bias is not None:
        raise ValueError(f"expected a head without a bias, found one in {name}")
    for norm in norms:
        if not is_plain_norm(norm, config.rms_norm_eps):
            raise ValueError(f"expected plain RMS norms, found {type(norm).__name__} in {name}")


def stack_(linears: Sequence[nn.Linear]) -> Tensor:
    """The weights of linear layers as one tensor, of which they become parts. So there is no second
    copy in memory, and new values need no new stack. It is done once: weights that lie in a row are
    stacked already."""
    weights = [linear.weight for linear in linears]
    first, whole = weights[0], sum(weight.numel() for weight in weights)
    ends = accumulate((weight.numel() for weight in weights), initial=first.storage_offset())
    starts = [(weight.untyped_storage().data_ptr(), weight.storage_offset()) for weight in weights]
    if starts != [(first.untyped_storage().data_ptr(), end) for _, end in zip(weights, ends)]:
        stacked = torch.cat([weight.detach() for weight in weights])
        parts = stacked.split([len(weight) for weight in weights])
        for weight, part in zip(weights, parts):
            weight.data = part
    width = first.shape[1]
    return first.detach().as_strided((whole // width, width), (width, 1))


class StackedLinear:
    """Layers that read the same input, as one, with their adapters beside the weights: these are
    not merged, so that no second copy of the model is made."""

    def __init__(self, *layers: nn.Linear):
        self.weight, self.bias = stack_(layers), None  # (out, in)
        if layers[0].bias is not None:
            self.bias = torch.cat([layer.bias.detach() for layer in layers])
        self.adapter = stack_adapters(layers)

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.adapter is None:
            return out
        down, up = self.adapter
        return out + F.linear(F.linear(x, down), up)


class LayerWeights:
    """Weights of a transformer layer."""

    def __init__(self, layer, eps: float):
        attention, mlp = layer.self_attn, layer.mlp
        self.eps = eps
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = StackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None
        self.out, self.down = StackedLinear(attention.o_proj), StackedLinear(mlp.down_proj)
        self.gate_up = StackedLinear(mlp.gate_proj, mlp.up_proj)


def layer_step_(x: Tensor, layer: LayerWeights, prefix: Pair, suffix: Pair, angles: Pair,
                unseen: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """A layer for the next token of n rows: (n, H) -> (n, H), in the model's data type. Writes the
    token's keys and values into `suffix`.

    prefix: the prompts' keys and values, each (P, K, T, D). suffix: the captions', each
    (P, K, G, room, D), of which the first A places are read. angles: cosines and sines, each
    (n, 1, D / 2). rows: (n,) int64, ascending places among the P * G rows. slots: (n,) int64, the
    place in the suffix that each row writes. unseen: what is not to be seen, as a bias of the
    scores, (P, 1, 1, 1, T + A) float32. Or the padding of the prompts, (P,) int64: then the kernels
    of grpo/attend.py run, which take all rows.
    """
    keys, values = suffix
    _, num_kv, num_g, _, head_dim = keys.shape
    group, member = rows // num_g, rows % num_g
    heads = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.norm1, layer.eps))
    heads = heads.view(len(x), -1, head_dim)  # (n, R * K + 2 * K, D)
    qk, v = heads[:, :-num_kv], heads[:, -num_kv:]
    if layer.q_norm is not None:
        q = F.rms_norm(qk[:, :-num_kv], (head_dim,), layer.q_norm, layer.eps)
        k = F.rms_norm(qk[:, -num_kv:], (head_dim,), layer.k_norm, layer.eps)
        qk = torch.cat([q, k], dim=1)
    (cos, sin), (low, high) = angles, qk.chunk(2, dim=-1)
    qk = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    q = qk[:, :-num_kv]
    keys[group, :, member, slots] = qk[:, -num_kv:]
    values[group, :, member, slots] = v
    if unseen.ndim == 1:  # padding
        out = torch.ops.grpo.attend(q, *prefix, *suffix, unseen, slots)
    else:
        out = _attend(q, prefix, suffix, unseen, rows)
    x = x + layer.out(out.flatten(1))
    normed = F.rms_norm(x, x.shape[-1:], layer.norm2, layer.eps)
    gate, up = layer.gate_up(normed).chunk(2, dim=-1)
    return x + layer.down(F.silu(gate) * up)


def _attend(q: Tensor, prefix: Pair, suffix: Pair, bias: Tensor, rows: Tensor) -> Tensor:
    """Attention of n rows, (n, R * K, D) -> the same."""
    num_p, num_kv, num_g, _, head_dim = suffix[0].shape
    width = prefix[0].shape[2]
    longest = bias.shape[-1] - width
    has_all_rows = len(rows) == num_p * num_g  # then they are in order, since rows ascend
    if not has_all_rows:
        q = q.new_zeros(num_p * num_g, *q.shape[1:]).index_copy(0, rows, q)
    q = q.view(num_p, num_g, num_kv, -1, head_dim)
    q = q.transpose(1, 2).contiguous()  # (P, K, G, R, D)
    # A group's queries all read the prompt's keys; on captions each row reads its own.
    on_prompt = _scores(q.flatten(2, 3).flatten(0, 1), prefix[0].flatten(0, 1).transpose(1, 2))
    own_keys, own_values = (part.flatten(0, 2)[:, :longest] for part in suffix)  # (P * K * G, A, D)
    on_caption = _scores(q.flatten(0, 2), own_keys.transpose(1, 2))
    scores = [part.view(*q.shape[:4], -1) for part in (on_prompt, on_caption)]
    scores = torch.add(bias, torch.cat(scores, dim=-1), alpha=head_dim**-0.5)
    probs = scores.softmax(-1).to(q.dtype)  # (P, K, G, R, T + A)
    shared = probs[..., :width].flatten(2, 3) @ prefix[1]  # (P, K, G * R, D)
    own = probs[..., width:].flatten(0, 2) @ own_values  # (P * K * G, R, D)
    out = (shared.view(q.shape) + own.view(q.shape)).transpose(1, 2)
    out = out.flatten(2, 3).flatten(0, 1)  # (P * G, R * K, D)
    return out if has_all_rows else out[rows]


@cache
def has_kernels(sizes: tuple[int, int, int, int], dtype: torch.dtype,
                device: torch.device) -> bool:
    """Whether the kernels of grpo/attend.py run here. sizes: G, K, R, D. They are tried once; if
    they fail, one warning says so."""
    num_g, num_kv, shared, head_dim = sizes
    if head_dim < 16 or head_dim & (head_dim - 1):
        return False
    try:
        from grpo.attend import attend

        query = torch.zeros(num_g, num_kv * shared, head_dim, dtype=dtype, device=device)
        own = query.new_zeros(1, num_kv, num_g, 1, head_dim)
        places = torch.zeros(num_g, dtype=torch.long, device=device)
        attend(query, own[:, :, 0].contiguous(), own[:, :, 0].contiguous(), own, own, places[:1],
               places)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton has many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"decoding without kernels of its own, slower ({reason})", stacklevel=2)
        return False
    return True


@cache
def compiled_step_() -> Callable[..., Tensor]:
    """`layer_step_` as `compiled` makes it: anew for a single group, for a single caption of each,
    and for each kind of layer (with adapters, say)."""

    def changing(x, layer, prefix, suffix, angles, unseen, rows, slots):
        places = [(x, [0]), (unseen, [0] if unseen.ndim == 1 else [0, 4])]
        places += [(rows, [0]), (slots, [0])]
        places += [(part, [0, 2]) for part in prefix] + [(part, [0, 3]) for part in suffix]
        return places + [(part, [0]) for part in angles]

    return compiled(layer_step_, changing, "layers of the decoder are")


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products (rows, n, T) of (rows, n, D) and (rows, D, T). They are float32 for any dtype, as in
    the trainer's kernels."""
    if queries.dtype != torch.float32 and queries.is_cuda:
        return torch.bmm(queries, keys, out_dtype=torch.float32)
    return torch.bmm(queries.float(), keys.float())
