"""A model sharded over ranks with FSDP2, and its weights copied in and out."""

import copy

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from grpo.distributed import compute_dtype, world_size
from grpo.logprobs import CompletionScorer


def rank_mesh(device: torch.device, replicas: int = 1) -> DeviceMesh:
    """All ranks, over which weights are sharded. With `replicas` over 1 (HSDP), neighbouring ranks
    form that many equal groups. Each group shards the whole model, and gradients are summed over
    the groups."""
    shape = (world_size(),) if replicas == 1 else (replicas, world_size() // replicas)
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def shard(scorer: CompletionScorer, mesh: DeviceMesh, offload: bool = False) -> CompletionScorer:
    """Shards with FSDP2: each transformer block of text and vision by itself, the rest with the
    root. The head is in the root: if tied to the embedding, the two must stay one parameter.

    On GPUs the master weights are float32, compute is bfloat16 and gradients are summed in float32.
    `offload` keeps the shards in the host's memory. The root stays gathered from its forward to its
    backward pass. A frozen model has no such pass, so its root is given back.
    """
    is_frozen = not any(parameter.requires_grad for parameter in scorer.parameters())
    settings = dict(
        mesh=mesh,
        # Inputs keep their dtype: the vision tower gives its blocks float32 angles, as it does in
        # the sampler's copy.
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype(torch.device(mesh.device_type)),
                                       reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
    )
    inner = scorer.model.model
    for block in [*inner.language_model.layers, *inner.visual.blocks]:
        fully_shard(block, **settings)
    return fully_shard(scorer, **settings, reshard_after_forward=is_frozen or None)


def empty_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model like `model` in `dtype`, in eval mode and without memory: shard it, then `fill_`."""
    # here: a reader of training need not meet it
    from grpo.fused import fuse_
    from grpo.vision import prepare_vision_

    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    fuse_(empty, model)
    return prepare_vision_(empty)


@torch.no_grad()
def fill_(scorer: CompletionScorer, model: PreTrainedModel, device: torch.device,
          offload: bool = False) -> None:
    """Copies the weights of `model`, which every rank has whole, into the sharded and empty model
    of `scorer`. Each rank takes its own part, one parameter at a time. So no rank holds all float32
    weights, and nothing is sent."""
    scorer.to_empty(device="cpu" if offload else device)
    scorer.model.tie_weights()  # to_empty makes two of a tied parameter in some releases of torch
    source = dict(model.named_parameters())
    for name, parameter in scorer.model.named_parameters():
        whole = source[name].detach().to(parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    for module, source_module in zip(scorer.model.modules(), model.modules(), strict=True):
        # Buffers, such as rotary frequencies, are in no checkpoint.
        for name, buffer in source_module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device, copy=True))


def cast_weights_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts parameters only. Rotary frequencies stay float32: bfloat16 cannot tell positions of
    thousands apart."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def copy_weights_(scorer: CompletionScorer, model: PreTrainedModel) -> None:
    """Copies the trainer's weights into `model`, the sampler's unsharded copy, block by block and
    in the compute dtype. Every rank must call this."""
    target = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for prefix, module in scorer.named_modules():
        if isinstance(module, FSDPModule):
            # After a forward without a backward pass the root is still gathered, perhaps with old
            # weights.
            module.reshard()
            module.unshard()
            for name, parameter in module.named_parameters(prefix):
                if not isinstance(parameter, DTensor):  # inner blocks are not gathered with it
                    target[name].copy_(parameter)
            module.reshard()
