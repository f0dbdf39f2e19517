"""Ranks: start them, shard a model over them, add numbers up. With one process all of it is a no-op."""

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.logprobs import CompletionScorer


def init_distributed() -> torch.device:
    """Joins the ranks that torchrun started (nccl on GPUs, gloo on CPUs); returns this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= (found := torch.cuda.device_count()):
            raise ValueError(f"rank {local_rank} of this node: expected as many GPUs as ranks, found {found}")
        torch.cuda.set_device(device)
    is_launched = "WORLD_SIZE" in os.environ
    if not dist.is_initialized() and (is_launched or device.type == "cuda"):
        # Without torchrun one GPU is a mesh of one, for the same bfloat16 compute on float32 masters.
        single = {} if is_launched else dict(rank=0, world_size=1, store=dist.HashStore())
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30), **single)
        atexit.register(dist.destroy_process_group)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args: Any, **kwargs: Any) -> None:
    if rank() == 0:
        print(*args, flush=True, **kwargs)


def sum_across_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value added up over the ranks, in float64. Every rank must call this with the same keys."""
    if world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def gather_rows(rows: list[Any]) -> list[Any]:
    """All ranks' rows in rank order, on every rank."""
    if world_size() == 1:
        return list(rows)
    gathered: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def shard(scorer: CompletionScorer, device: torch.device) -> CompletionScorer:
    """FSDP2 over all ranks: each transformer block of text and vision by itself, the rest with the root.

    On GPUs the masters stay float32 while compute runs in bfloat16 and gradients are summed in float32. A single CPU
    process is left as it is. Never the head by itself: where it is tied to the embedding it must stay one parameter.
    """
    if world_size() == 1 and device.type == "cpu":
        return scorer
    mesh = init_device_mesh(device.type, (world_size(),))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Inputs are not cast: the vision tower hands its blocks float32 angles, and so the sampler's copy takes them too.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    inner = scorer.model.model
    for block in [*inner.language_model.layers, *inner.visual.blocks]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    return fully_shard(scorer, mesh=mesh, mp_policy=precision)


@torch.no_grad()
def copy_weights_(scorer: nn.Module, model: PreTrainedModel) -> None:
    """The trainer's weights into `model`, the sampler's unsharded copy. Every rank must call this."""
    target = dict(model.named_parameters())
    for name, parameter in scorer.model.named_parameters():
        whole = parameter.to(target[name].dtype)  # cast before gathering: half the traffic in bfloat16
        target[name].copy_(whole.full_tensor() if isinstance(whole, DTensor) else whole)
