"""Norms, angles and gates as one kernel each, where transformers has several. Angles and gates
are compiled, on a GPU only."""

import copy
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation


def fuse_(model: PreTrainedModel, source: PreTrainedModel | None = None) -> None:
    """Makes a policy's norms one kernel each, on a GPU its angles and gates too. Weights and their
    names stay. `source`: as for `fuse_norms_`."""
    fuse_norms_(model, source)
    if is_on_gpu(source or model):
        fuse_angles_(model)
        for block in [*model.model.language_model.layers, *model.model.visual.blocks]:
            if hasattr(block.mlp, "gate_proj"):  # not the tower of Qwen3-VL
                block.mlp.__class__ = GatedMLP


def compiled(function: Callable, changing: Callable[..., list[tuple[Tensor, list[int]]]],
             name: str) -> Callable:
    """`function` by torch.compile, which joins its small kernels into few. It is compiled once for
    all sizes that change in a run: `changing` has its arguments, and names those tensors and their
    dimensions. Where it cannot be compiled, one warning says so, and it runs as it is."""
    run = torch.compile(function, fullgraph=True)
    from torch._dynamo import config, exc, maybe_mark_dynamic  # here: to import it takes seconds

    # torch's own is 8. Each size of 1, each kind of layer and each grad mode takes one.
    config.recompile_limit = max(config.recompile_limit, 64)
    failed = False

    def call(*args, **options):
        nonlocal failed
        if failed or options:
            return function(*args, **options)
        for tensor, places in changing(*args):
            maybe_mark_dynamic(tensor, places)
        try:
            return run(*args)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"{name} not compiled, slower ({reason})", stacklevel=3)
            failed = True
        return function(*args)

    return call


ANGLES = {"apply_rotary_pos_emb": ([0, 2], [0, 2], [0, 1], [0, 1]),
          "apply_rotary_pos_emb_vision": ([0], [0], [0], [0])}
"""Names in transformers. For queries, keys, cosines and sines the dimensions that change in a run:
the text's (rows, heads, tokens, D) and (rows, tokens, D), the tower's (patches, heads, D) and
(patches, D)."""


def fuse_angles_(model: PreTrainedModel) -> None:
    """Compiles the functions of the model's module in transformers that turn queries and keys."""
    module = sys.modules[type(model).__module__]
    for name, places in ANGLES.items():
        function = getattr(module, name, None)
        if function is not None and not hasattr(function, "is_fused"):
            turn = compiled(function, lambda *args, places=places: list(zip(args, places)),
                            f"{name} is")
            turn.is_fused = True
            setattr(module, name, turn)


@cache
def _gated() -> Callable[[Tensor, Tensor], Tensor]:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    return compiled(gated, lambda *args: [(part, list(range(part.ndim - 1))) for part in args],
                    "gates are")


class GatedMLP(nn.Module):
    """An MLP with a gate: its gate is one kernel, and its products have sides that are multiples of
    16 bytes, which are fast. The inner width of Qwen2.5-VL's tower is 3,420, so it is 3,424 here,
    and the last 4 are 0. Products with adapters stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        padding = -gate.out_features % (16 // x.itemsize)
        if not padding or any(type(layer) is not nn.Linear for layer in (gate, up, down)):
            return down(self.inner(gate(x), up(x)))
        wide_gate, wide_up = (
            F.linear(x, F.pad(layer.weight, (0, 0, 0, padding)),
                     None if layer.bias is None else F.pad(layer.bias, (0, padding)))
            for layer in (gate, up)
        )
        inner = self.inner(wide_gate, wide_up)  # (..., inner width and the padding)
        return F.linear(inner, F.pad(down.weight, (0, padding)), down.bias)

    def inner(self, gate: Tensor, up: Tensor) -> Tensor:
        """(..., inner width) each -> (..., inner width)."""
        is_silu = isinstance(self.act_fn, (nn.SiLU, SiLUActivation))
        return _gated()(gate, up) if is_silu else self.act_fn(gate) * up


@torch.no_grad()
def is_plain_norm(norm: nn.Module, eps: float) -> bool:
    """Whether the norm is F.rms_norm with this eps; Gemma's adds 1 to its weight. Tried on a copy
    with small weights: beside large ones that 1 would not show."""
    trial = copy.deepcopy(norm).float()
    trial.weight.copy_(torch.linspace(0.5, 1.5, len(trial.weight)))
    x = torch.linspace(-1, 1, len(trial.weight)).to(trial.weight)
    return torch.allclose(trial(x), F.rms_norm(x, x.shape, trial.weight, eps), rtol=1e-3, atol=1e-5)


def fuse_norms_(model: PreTrainedModel, source: PreTrainedModel | None = None) -> None:
    """Makes its plain RMS norms `nn.RMSNorm`. Weights and names stay. `source`: the model of which
    `model` is a copy without memory, where no norm can be tried."""
    for name, eps in plain_norms(source or model).items():
        norm = model.get_submodule(name)
        fused = nn.RMSNorm(norm.weight.shape, eps, device="meta").train(norm.training)
        fused.weight = norm.weight
        model.set_submodule(name, fused)


def plain_norms(model: PreTrainedModel) -> dict[str, float]:
    """Name -> eps of every RMS norm that F.rms_norm computes alike. Norms whose weight has another
    data type than the model are left out, since they return theirs."""
    norms = {}
    for name, norm in model.named_modules():
        weights = [(key, weight.dtype) for key, weight in norm.named_parameters()]
        if type(norm).__name__.endswith("RMSNorm") and weights == [("weight", model.dtype)]:
            eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
            if is_plain_norm(norm, eps):
                norms[name] = eps
    return norms


def is_on_gpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"
