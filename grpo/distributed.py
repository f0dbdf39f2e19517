"""Ranks: start them, deal work to them, shard a model over them, add numbers up. With one process
all of it does nothing."""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from data.io import disk_sentence
from grpo.logprobs import CompletionScorer

_control: dist.ProcessGroup | None = None
"""For numbers, rows and barriers, on the CPU: gloo, which can tell which rank is late."""


def local_device() -> torch.device:
    """This process's own GPU, made the current one, or the CPU. It joins nobody."""
    # torch prefers cuDNN's attention on some GPUs, which makes a slow plan for each new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= num_gpus:
        wanted = "expected as many GPUs as ranks"
        raise ValueError(f"rank {local_rank} of this node: {wanted}, found {num_gpus}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def init_distributed(timeout_minutes: float = 30) -> torch.device:
    """Joins the ranks that torchrun started (nccl on GPUs, gloo on CPUs); returns this rank's
    device. They leave by `run_program` in data/program.py."""
    device = local_device()
    is_launched = "WORLD_SIZE" in os.environ
    if not dist.is_initialized() and (is_launched or device.type == "cuda"):
        # Without torchrun a single GPU is a mesh of one rank: it too computes in bfloat16 on
        # float32 master weights.
        single = {} if is_launched else dict(rank=0, world_size=1, store=dist.HashStore())
        timeout = timedelta(minutes=timeout_minutes)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, **single)
        global _control
        _control = dist.new_group(backend="gloo", timeout=timeout)
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU, where shorter types are not faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def control_group() -> dist.ProcessGroup | None:
    return _control


def print0(*args: Any, **kwargs: Any) -> None:
    if rank() == 0:
        print(*args, flush=True, **kwargs)


def sum_across_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value's sum over the ranks, in float64. Every rank must call this with the same keys."""
    if world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, group=_control)
    return dict(zip(values, total.tolist()))


def gather_rows(rows: list[Any]) -> list[Any]:
    """All ranks' rows in rank order, on every rank. Every rank must call this."""
    if world_size() == 1:
        return list(rows)
    gathered: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, rows, group=_control)
    return [row for part in gathered for row in part]


@contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """A ValueError or OSError inside, on any rank, is raised on all ranks. So no rank waits for one
    that has left.

    A rank re-raises its own OSError, to which `naming` may add a path. All others get a ValueError.
    """
    own: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        own = error
    sentence = disk_sentence(own) if isinstance(own, OSError) else str(own)
    reasons = gather_rows([sentence] if own else [])
    if isinstance(own, OSError):
        raise own
    if reasons:
        raise ValueError(reasons[0] if world_size() == 1 else f"{what}: {reasons[0]}")


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Places of each rank's items, ascending. Every rank gets as many items; their number must
    divide by `num_ranks`. The largest is dealt first, each to the rank with the smallest sum."""
    share = len(sizes) // num_ranks
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        open_hands = [hand for hand in hands if len(hand) < share]
        min(open_hands, key=lambda hand: sum(sizes[i] for i in hand)).append(place)
    return [sorted(hand) for hand in hands]


class Phases:
    """Seconds that this rank works in each phase of a step. Also the seconds that it then waits for
    the slowest rank."""

    def __init__(self, device: torch.device, timeout_minutes: float):
        self.device, self.timeout = device, timedelta(minutes=timeout_minutes)
        self.work: dict[str, float] = {}
        self.idle: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Raises TimeoutError, with the phase and the ranks, if a rank does not end it in time."""
        started = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            error.add_note(f"rank {rank()}, phase {name}")
            raise
        ended = time.perf_counter()
        if world_size() > 1:
            try:
                dist.monitored_barrier(_control, timeout=self.timeout, wait_all_ranks=True)
            except RuntimeError as error:
                raise TimeoutError(f"rank {rank()}, phase {name}: not all ranks came to its end "
                                   f"({error})") from None
        self.work[name] = self.work.get(name, 0.0) + ended - started
        self.idle[name] = self.idle.get(name, 0.0) + time.perf_counter() - ended

    def take(self) -> dict[str, float]:
        """Numbers since the last call. `seconds_*`: seconds of work in a phase, mean over ranks.
        `idle_share`: the share of all ranks' time that was spent waiting."""
        seconds = {f"seconds_{name}": value for name, value in self.work.items()}
        totals = sum_across_ranks(seconds | {"idle": sum(self.idle.values())})
        self.work, self.idle = {}, {}
        idle, work = totals.pop("idle"), sum(totals.values())
        means = {key: value / world_size() for key, value in totals.items()}
        return means | {"idle_share": idle / (idle + work)}


def shard(scorer: CompletionScorer, device: torch.device, replicas: int = 1,
          offload: bool = False) -> CompletionScorer:
    """Shards with FSDP2: each transformer block of text and vision by itself, the rest with the
    root. The head is in the root: if tied to the embedding, the two must stay one parameter.

    Weights are sharded over all ranks. With `replicas` over 1 (HSDP), neighbouring ranks form that
    many equal groups. Each group shards the whole model, and gradients are summed over the groups.
    On GPUs the master weights are float32, compute is bfloat16 and gradients are summed in float32.
    `offload` keeps the shards in the host's memory. A single CPU process is left as it is.
    """
    if world_size() == 1 and device.type == "cpu":
        return scorer
    if world_size() % replicas:
        raise ValueError(f"replicas {replicas}: expected a divisor of the {world_size()} ranks")
    shape = (world_size(),) if replicas == 1 else (replicas, world_size() // replicas)
    names = ("replicate", "shard")[-len(shape) :]
    settings = dict(
        mesh=init_device_mesh(device.type, shape, mesh_dim_names=names),
        # Inputs keep their dtype: the vision tower gives its blocks float32 angles, as it does in
        # the sampler's copy.
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype(device),
                                       reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
    )
    inner = scorer.model.model
    for block in [*inner.language_model.layers, *inner.visual.blocks]:
        fully_shard(block, **settings)
    return fully_shard(scorer, **settings)


def empty_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model like `model` in `dtype`, in eval mode and without memory: shard it, then `fill_`."""
    # here: a reader of training need not meet it
    from grpo.norms import fuse_norms_
    from grpo.vision import prepare_vision_

    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    fuse_norms_(empty, model)
    return prepare_vision_(empty)


@torch.no_grad()
def fill_(scorer: CompletionScorer, model: PreTrainedModel, device: torch.device,
          offload: bool = False) -> None:
    """Copies the weights of `model`, which every rank has whole, into the sharded and empty model
    of `scorer`. Each rank takes its own part, one parameter at a time. So no rank holds all float32
    weights, and nothing is sent."""
    scorer.to_empty(device="cpu" if offload else device)
    scorer.model.tie_weights()  # to_empty has made two of each tied parameter
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


def average_gradients_(scorer: CompletionScorer) -> None:
    """Over ranks, of parameters that every rank has whole, such as adapters. FSDP2 has averaged
    those of sharded ones. Every rank must call this."""
    gradients = [parameter.grad for parameter in scorer.parameters()
                 if parameter.grad is not None and not isinstance(parameter, DTensor)]
    if world_size() == 1 or not gradients:
        return
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(whole)
    parts = whole.div_(world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


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
