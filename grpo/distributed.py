"""Ranks: start them, deal work to them, shard a model over them, add numbers up. With one process all of it is a no-op."""

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
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from grpo.disk import disk_sentence
from grpo.logprobs import CompletionScorer

_control: dist.ProcessGroup | None = None
"""For numbers, rows and waiting, on the host: gloo, which can tell who is late."""


def init_distributed(timeout_minutes: float = 30) -> torch.device:
    """Joins the ranks that torchrun started (nccl on GPUs, gloo on CPUs); returns this rank's
    device. They leave by `run_program` in grpo/config.py."""
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
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **single)
        global _control
        _control = dist.new_group(backend="gloo", timeout=timeout)
    return device


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
    """Each value added up over the ranks, in float64. Every rank must call this with the same keys."""
    if world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, group=_control)
    return dict(zip(values, total.tolist()))


def gather_rows(rows: list[Any]) -> list[Any]:
    """All ranks' rows in rank order, on every rank."""
    if world_size() == 1:
        return list(rows)
    gathered: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, rows, group=_control)
    return [row for part in gathered for row in part]


@contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """A ValueError or OSError inside, on whichever ranks, ends this on all of them: none waits for one that has left. A rank
    raises its own OSError, which may get a name yet; all else is a ValueError."""
    own: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        own = error
    reasons = gather_rows([disk_sentence(own) if isinstance(own, OSError) else str(own)] if own else [])
    if isinstance(own, OSError):
        raise own
    if reasons:
        raise ValueError(reasons[0] if world_size() == 1 else f"{what}: {reasons[0]}")


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Places of the items of each rank, in order: as many for each, the largest dealt first, to whoever has least so far.

    The number of items divides by that of ranks.
    """
    share = len(sizes) // num_ranks
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        open_ranks = [one for one in dealt if len(one) < share]
        min(open_ranks, key=lambda one: sum(sizes[i] for i in one)).append(place)
    return [sorted(one) for one in dealt]


class Phases:
    """Seconds that this rank works in each phase of a step, and that it then waits for the slowest rank."""

    def __init__(self, device: torch.device, timeout_minutes: float):
        self.device, self.timeout = device, timedelta(minutes=timeout_minutes)
        self.work: dict[str, float] = {}
        self.idle: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Raises TimeoutError, naming the phase and the ranks, if some rank does not come to the end of it in time."""
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
                raise TimeoutError(f"rank {rank()}, phase {name}: not all ranks came to its end ({error})") from None
        self.work[name] = self.work.get(name, 0.0) + ended - started
        self.idle[name] = self.idle.get(name, 0.0) + time.perf_counter() - ended

    def take(self) -> dict[str, float]:
        """Since the last call: mean seconds of work over ranks, `seconds_*`, and `idle_share`, the share of all ranks' time
        that was spent waiting."""
        totals = sum_across_ranks({f"seconds_{name}": value for name, value in self.work.items()}
                                  | {"idle": sum(self.idle.values())})
        self.work, self.idle = {}, {}
        idle, work = totals.pop("idle"), sum(totals.values())
        return {key: value / world_size() for key, value in totals.items()} | {"idle_share": idle / (idle + work)}


def shard(scorer: CompletionScorer, device: torch.device, replicas: int = 1, offload: bool = False) -> CompletionScorer:
    """FSDP2: each transformer block of text and vision by itself, the rest with the root.

    Over all ranks, or (HSDP) over each of `replicas` equal runs of neighbouring ranks, which then add their gradients up.
    On GPUs the masters stay float32 while compute runs in bfloat16 and gradients are summed in float32; `offload` keeps
    the shards in the host's memory. A single CPU process is left as it is. Never the head by itself: where it is tied to the
    embedding it must stay one parameter.
    """
    if world_size() == 1 and device.type == "cpu":
        return scorer
    if world_size() % replicas:
        raise ValueError(f"replicas {replicas}: expected a divisor of the {world_size()} ranks")
    shape = (world_size(),) if replicas == 1 else (replicas, world_size() // replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = dict(
        mesh=mesh,
        # Inputs are not cast: the vision tower hands its blocks float32 angles, and so the sampler's copy takes them too.
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
    )
    inner = scorer.model.model
    for block in [*inner.language_model.layers, *inner.visual.blocks]:
        fully_shard(block, **settings)
    return fully_shard(scorer, **settings)


def empty_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """One like `model` in `dtype`, in eval mode and without memory, to be sharded and filled by `fill_`."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(copy.deepcopy(model.config), dtype=dtype).eval()


@torch.no_grad()
def fill_(scorer: CompletionScorer, model: PreTrainedModel, device: torch.device, offload: bool = False) -> None:
    """Gives the sharded, empty model of `scorer` the weights of `model`, which every rank has whole: each rank takes its own
    part, parameter by parameter, so that the float32 masters are nowhere whole and nothing is sent."""
    scorer.to_empty(device="cpu" if offload else device)
    scorer.model.tie_weights()  # to_empty has made two of what is one parameter
    source = dict(model.named_parameters())
    for name, parameter in scorer.model.named_parameters():
        whole = source[name].detach().to(parameter.device)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    for module, other in zip(scorer.model.modules(), model.modules(), strict=True):
        for name, buffer in other.named_buffers(recurse=False):  # rotary frequencies: in no checkpoint
            setattr(module, name, buffer.to(device, copy=True))


def cast_weights_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies stay float32, in which positions of thousands are told apart."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def copy_weights_(scorer: CompletionScorer, model: PreTrainedModel) -> None:
    """The trainer's weights into `model`, the sampler's unsharded copy: gathered block by block, in the dtype of the compute.
    Every rank must call this."""
    target = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for prefix, module in scorer.named_modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without a backward pass the root is whole still, with what may be old weights
            module.unshard()
            for name, parameter in module.named_parameters(prefix):
                if not isinstance(parameter, DTensor):  # blocks inside this one are not gathered with it
                    target[name].copy_(parameter)
            module.reshard()
