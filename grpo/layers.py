"""The text layers that grpo/decode.py computes, those of Qwen2.5-VL and Qwen3-VL: a check that they
are these, and their weights as it reads them."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.lora import LoraLinear, stack_adapters

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
def check_layers(model: PreTrainedModel) -> None:
    """Raises ValueError for a model for which `Decoder` would compute something else than its
    forward.

    `Decoder` reads weights without calling the modules' forward. So each layer must have the
    weights that are read. It must have no others: no experts, no adapters, no further norms. Their
    modules must be plain.
    """
    text, name = getattr(model.model, "language_model", None), type(model).__name__
    if not hasattr(text, "layers"):
        raise ValueError(f"expected a policy's text layers in model.language_model, found {name}")
    config = text.config
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
        x = torch.linspace(-1, 1, len(norm.weight)).to(norm.weight)
        normed = F.rms_norm(x, x.shape, norm.weight, config.rms_norm_eps)
        if not torch.allclose(norm(x), normed, rtol=0.05, atol=1e-3):
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

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm1, self.norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = StackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None
        self.out, self.down = StackedLinear(attention.o_proj), StackedLinear(mlp.down_proj)
        self.gate_up = StackedLinear(mlp.gate_proj, mlp.up_proj)
