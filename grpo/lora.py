"""Low-rank adapters (LoRA, arXiv 2106.09685): y = W x + (alpha / R) B A x.

The base W is frozen, in bfloat16 on a GPU. Only A (R, in) and B (out, R) are trained, in float32. A
is drawn, B is zero, so the first policy is the loaded one. One model in memory is sampler, trainer
and reference: the reference is the model with its adapters off. Files are PEFT's:

    FOLDER/adapter_config.json, FOLDER/adapter_model.safetensors
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.config import LoraConfig

PREFIX = "base_model.model."
"""PEFT's, before the name of a module."""


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. Loaded layers become one in place: neither the names nor the
    memory of the base's weights change."""

    lora_a: nn.Parameter  # (R, in) float32
    lora_b: nn.Parameter  # (out, R) float32
    scale: float  # alpha / R
    is_on: bool

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.is_on:
            return out
        inner = F.linear(x, self.lora_a.to(x.dtype))  # (..., R)
        return out + self.scale * F.linear(inner, self.lora_b.to(x.dtype))


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with an adapter, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLinear)}


def add_adapters_(model: PreTrainedModel, config: LoraConfig, freeze: str, seed: int) -> None:
    """Freezes the model and gives an adapter to each linear layer that `config` and `freeze` name.
    A layer's A is a function of the seed and the layer's name.

    A is normal with deviation 1 / sqrt(in). Raises ValueError if no layer is named, or one that
    cannot have an adapter.
    """
    frozen = {"none": "(?!)", "vision": r"model\.visual\.(?!.*merger)",
              "vision+merger": r"model\.visual"}
    model.requires_grad_(False)
    try:
        pattern = re.compile(rf"(?:.*\.)?(?:{config.lora_targets})")
    except re.error as error:
        raise ValueError(f"lora_targets {config.lora_targets!r}: expected a regular expression "
                         f"({error})") from None
    layers = {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
        and not re.match(frozen[freeze], name)
    }
    if not layers:
        raise ValueError(f"lora_targets {config.lora_targets!r}: expected the names of linear "
                         "layers that are trained, found none of this policy's")
    for name, module in layers.items():
        if type(module) is not nn.Linear or module is model.get_output_embeddings():
            raise ValueError(f"lora_targets {config.lora_targets!r}: expected plain linear layers "
                             f"below the head, {name} is a {type(module).__name__}")
        stream = random.Random(f"{seed}:{name}:lora").getrandbits(63)
        generator = torch.Generator().manual_seed(stream)
        down = torch.randn(config.lora_rank, module.in_features, generator=generator)
        up = torch.zeros(module.out_features, config.lora_rank)
        attach_(module, down / module.in_features**0.5, up, config.lora_alpha / config.lora_rank)


def attach_(layer: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
    """Makes the layer a `LoraLinear`."""
    layer.__class__, layer.scale, layer.is_on = LoraLinear, scale, True
    layer.lora_a = nn.Parameter(lora_a.to(layer.weight.device))
    layer.lora_b = nn.Parameter(lora_b.to(layer.weight.device))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that was loaded, bit for bit."""
    layers = adapters(model).values()
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def stack_adapters(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor] | None:
    """The adapters of n layers that read the same input as one, in the layers' dtype: A (n R, in)
    and, scaled, B (out, n R), block by block. None if no layer has one."""
    if not any(isinstance(layer, LoraLinear) for layer in layers):
        return None
    weight, downs, ups = layers[0].weight, [], []
    for layer in layers:
        has_one = isinstance(layer, LoraLinear)
        downs.append(layer.lora_a if has_one else weight.new_zeros(0, layer.in_features))
        ups.append(layer.scale * layer.lora_b if has_one
                   else weight.new_zeros(layer.out_features, 0))
    return torch.cat(downs).to(weight.dtype), torch.block_diag(*ups).to(weight.dtype)


@torch.no_grad()
def merge_adapters_(model: nn.Module) -> None:
    """Adds the adapters to the base's weights, in float32, and takes them off."""
    for layer in adapters(model).values():
        change = layer.scale * (layer.lora_b.float() @ layer.lora_a.float())
        layer.weight.data = (layer.weight.float() + change).to(layer.weight.dtype)
        del layer.lora_a, layer.lora_b, layer.scale, layer.is_on
        layer.__class__ = nn.Linear


# ------------------------------------------------------------------------------------- PEFT's files


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the adapters, float32, as PEFT reads them. Their base is what the model was loaded
    from."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    rank = len(first.lora_a)
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": model.name_or_path, "r": rank,
        "lora_alpha": first.scale * rank, "target_modules": sorted(layers), "bias": "none",
        "lora_dropout": 0.0, "fan_in_fan_out": False, "inference_mode": True, "task_type": None,
    }
    folder.mkdir(parents=True)
    content = json.dumps(settings, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    weights = {}
    for name, layer in layers.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        weights[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read_settings(folder: Path) -> dict:
    """Of the adapter in the folder. Raises ValueError if it is more than y = W x + s B A x."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False,
             "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    for name in ("r", "lora_alpha"):
        if not settings.get(name):
            raise ValueError(f"expected an adapter's {name} in adapter_config.json, found none")
    for name, value in plain.items():
        if (settings.get(name) or value) != value:
            raise ValueError(f"expected an adapter with {name} {value!r}, found {settings[name]!r}")
    return settings


def load_adapter_(model: PreTrainedModel, folder: Path) -> None:
    """Merges an adapter into the model. Raises ValueError if it is of another base."""
    settings, modules = read_settings(folder), dict(model.named_modules())
    root = settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
        names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in keys}
        if not names:
            raise ValueError("expected weights in adapter_model.safetensors, found none")
        for name in sorted(names):
            try:
                down, up = (file.get_tensor(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
                shape, ranks = (len(up), down.shape[1]), {len(down), up.shape[1]}
                wanted = tuple(modules[name].weight.shape)
            except (KeyError, AttributeError, SafetensorError) as error:
                raise ValueError(f"expected an adapter of this base, found {name} "
                                 f"({error})") from None
            if ranks != {settings["r"]}:
                raise ValueError(f"expected rank {settings['r']} as in adapter_config.json, found "
                                 f"{name} with {sorted(ranks)}")
            if shape != wanted or type(modules[name]) is not nn.Linear:
                raise ValueError(f"expected an adapter of this base, found {name} of {shape} for "
                                 f"{wanted}")
            attach_(modules[name], down, up, settings["lora_alpha"] / root)
    merge_adapters_(model)
