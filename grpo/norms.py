"""RMS norms as one kernel each, where transformers has six. On a GPU only: a CPU gains nothing, and
its results would change in their last digits."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def is_plain_norm(norm: nn.Module, eps: float) -> bool:
    """Whether the norm is F.rms_norm with this eps; Gemma's adds 1 to its weight. Tried on a copy
    with small weights: beside large ones that 1 would not show."""
    trial = copy.deepcopy(norm).float()
    trial.weight.copy_(torch.linspace(0.5, 1.5, len(trial.weight)))
    x = torch.linspace(-1, 1, len(trial.weight)).to(trial.weight)
    return torch.allclose(trial(x), F.rms_norm(x, x.shape, trial.weight, eps), rtol=1e-3, atol=1e-5)


def fuse_norms_(model: PreTrainedModel, source: PreTrainedModel | None = None) -> None:
    """Makes its plain RMS norms `nn.RMSNorm`, on a GPU. Weights and names stay. `source`: the model
    of which `model` is a copy without memory, where no norm can be tried."""
    source = source or model
    if not is_on_gpu(source):
        return
    for name, eps in plain_norms(source).items():
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
