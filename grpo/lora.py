"""Low-rank adapters (LoRA, arXiv 2106.09685): y = W x + (alpha / R) B A x.

The base W is frozen, in bfloat16 on a GPU. Only A (R, in) and B (out, R) are trained, in float32. A
is drawn, B is zero, so the first policy is the loaded one. One model in memory is sampler, trainer
and reference: the reference is the model with its adapters off. Files are PEFT's:

    FOLDER/adapter_config.json, FOLDER/adapter_model.safetensors
"""

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.config import LoraConfig
from grpo.distributed import world_size


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

    def merged(self, dtype: torch.dtype) -> Tensor:
        """W + s B A, (out, in). It is rounded to bfloat16 by `round_by_chance`: the number nearest
        to it is W again where the adapter adds less than half a step. Of 20 steps of training at
        1e-6 a twentieth would be left."""
        whole = self.weight.float() + self.scale * (self.lora_b.float() @ self.lora_a.float())
        return round_by_chance(whole) if dtype == torch.bfloat16 else whole.to(dtype)


def round_by_chance(numbers: Tensor) -> Tensor:
    """Float32 numbers in bfloat16, rounded up or down by chance, so that sums are right: 1/4 of a
    step becomes a step in 1 of 4 places. The draws are the same on all machines."""
    draws = torch.randint(1 << 16, numbers.shape, dtype=torch.int32,
                          generator=torch.Generator().manual_seed(0))
    bits = numbers.view(torch.int32) + draws.to(numbers.device)  # bfloat16 is the upper half
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()


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
        if pattern.fullmatch(name) and not re.match(frozen[freeze], name)
        and getattr(getattr(module, "weight", None), "ndim", 0) > 1  # a norm's has one dimension
    }
    if not layers:
        raise ValueError(f"lora_targets {config.lora_targets!r}: expected the names of linear "
                         "layers that are trained, found none of this policy's (a regular "
                         "expression, such as q_proj|v_proj)")
    for name, module in layers.items():
        if type(module) is not nn.Linear or module is model.get_output_embeddings():
            raise ValueError(f"lora_targets {config.lora_targets!r}: expected plain linear layers "
                             f"below the head, found {name} ({type(module).__name__})")
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


def average_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of adapters over ranks: each rank has them whole. FSDP2 averages those
    of sharded parameters itself. Every rank must call this."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() == 1 or not gradients:
        return
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(whole)
    parts = whole.div_(world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def merge_adapters_(model: nn.Module) -> None:
    """Adds the adapters to the base's weights and takes them off."""
    for layer in adapters(model).values():
        layer.weight.data = layer.merged(layer.weight.dtype)
        del layer.lora_a, layer.lora_b, layer.scale, layer.is_on
        layer.__class__ = nn.Linear


# ------------------------------------------------------------------------------------- PEFT's files

PREFIX = "base_model.model."
"""Before the name of a module."""
NO_MATTER = (
    "peft_type r lora_alpha use_rslora base_model_name_or_path target_modules exclude_modules "
    "layers_to_transform layers_pattern eva_config lora_dropout inference_mode task_type "
    "auto_mapping peft_version runtime_config megatron_core qalora_group_size"
)
"""PEFT's settings that are read here, or change nothing once A and B are trained."""
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
"""Others that may be on, with these values. Other ways to draw the first A and B change W too."""


def sizes_of(model: PreTrainedModel) -> dict[str, int]:
    """What an adapter's base must have, beside the layers of the adapter."""
    text = model.config.get_text_config()
    return {"num_hidden_layers": text.num_hidden_layers, "vocab_size": text.vocab_size}


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
        "auto_mapping": sizes_of(model) | {  # PEFT reads these two
            "base_model_class": type(model).__name__, "parent_library": type(model).__module__,
        },
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
    path = folder / "adapter_config.json"
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected an adapter's settings in {path.name} ({error})") from None
    if settings.get("peft_type") != "LORA":
        raise ValueError("expected an adapter with peft_type 'LORA', found "
                         f"{settings.get('peft_type')!r}")
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"expected an adapter's {name}, more than 0, in adapter_config.json, "
                             f"found {value!r}")
    for name in sorted(settings.keys() - NO_MATTER.split()):
        if settings[name] and settings[name] not in PLAIN.get(name, ()):
            raise ValueError(f"expected an adapter without {name} {settings[name]!r}: only "
                             "y = W x + s B A x is computed here")
    return settings


def load_adapter_(model: PreTrainedModel, folder: Path) -> None:
    """Merges an adapter into the model. Raises ValueError if it is of another base, or has more
    than A and B of linear layers."""
    settings, modules = read_settings(folder), dict(model.named_modules())
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    sizes = sizes_of(model)
    said = {key: value for key, value in (settings.get("auto_mapping") or {}).items()
            if key in sizes}
    if said and said != sizes:
        raise ValueError(f"expected an adapter of this base ({sizes}), found one of another "
                         f"({said})")
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"expected weights in adapter_model.safetensors ({error})") from None
    if not weights:
        raise ValueError("expected weights in adapter_model.safetensors, found none")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise ValueError(f"expected an adapter of lora_A and lora_B only, found {key}")
        # Their names in transformers before 4.52.
        name = re.sub(r"^model\.(?!language_model|visual)", "model.language_model.", match[1])
        pairs.setdefault(re.sub(r"^visual\.", "model.visual.", name), {})[match[2]] = value
    for name in sorted(pairs.keys() | target_layers(modules, settings)):
        layer, pair = modules.get(name), pairs.get(name, {})
        if type(layer) is not nn.Linear or layer.weight is model.get_input_embeddings().weight:
            raise ValueError(f"expected an adapter of this base, found {name}, which is no linear "
                             "layer of it with weights of its own")
        wanted = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
        shapes = {part: tuple(value.shape) for part, value in sorted(pair.items())}
        if shapes != wanted:
            raise ValueError(f"expected an adapter of this base and rank {rank}, with {wanted} for "
                             f"{name}, found {shapes or 'none'}")
        is_finite = all(value.is_floating_point() and value.float().isfinite().all()
                        for value in pair.values())
        if not is_finite or not pair["A"].float().any():  # only B may be zero, before training
            raise ValueError(f"expected finite numbers for {name}, and not only zeros in A, found "
                             "others")
        attach_(layer, pair["A"], pair["B"], scale)
    merge_adapters_(model)


def target_layers(modules: dict[str, nn.Module], settings: dict) -> set[str]:
    """The linear layers that an adapter must have weights for, as far as its settings name them."""
    targets = settings.get("target_modules")
    is_part = settings.get("layers_to_transform") or settings.get("exclude_modules")
    if isinstance(targets, str) or is_part:  # a regular expression may name any part of a model
        return set()
    ends = tuple(f".{target}" for target in targets or ())
    return {name for name, module in modules.items()
            if isinstance(module, nn.Linear) and f".{name}".endswith(ends)}
