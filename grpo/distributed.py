"""Ranks: start them, deal work to them, wait for them, add numbers up. One process needs none."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.io import disk_sentence

_control: dist.ProcessGroup | None = None
"""Gloo, on the CPU, for numbers, rows, barriers and checkpoints: it can tell which rank is late."""


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


def init_distributed(timeout_minutes: float = 7 * 24 * 60) -> torch.device:
    """Joins the ranks that torchrun started (nccl on GPUs, gloo on CPUs); returns this rank's
    device. They leave by `run_program` in data/program.py. A rank waits `timeout_minutes` for the
    others. It is a week by default: shares of work are equal in number, not in time. Raises
    ValueError if torchrun could not start the ranks again as it was told to."""
    device = local_device()
    is_launched = "WORLD_SIZE" in os.environ
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    has_others = int(os.environ.get("WORLD_SIZE", 1)) > 1  # a single rank looks for nobody
    if has_others and keeps_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ValueError(  # pytorch issue 135712
            "torchrun --max-restarts: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it, and "
            "--standalone or --rdzv-backend c10d; else new ranks look for the ended ones"
        )
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


def print0(text: str) -> None:
    """Prints on rank 0, above a progress bar."""
    if rank() == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


def sum_across_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value's sum over the ranks. Every rank must call this with the same keys."""
    rows = gather_rows([values])
    return {key: sum(row[key] for row in rows) for key in values}


def gather_rows(rows: list[Any]) -> list[Any]:
    """All ranks' rows in rank order, on every rank. Every rank must call this. Raises TimeoutError
    if a rank has left, as by a signal, or does not come in time."""
    if world_size() == 1:
        return list(rows)
    gathered: list[list[Any]] = [[] for _ in range(world_size())]
    try:
        dist.all_gather_object(gathered, rows, group=_control)
    except RuntimeError as error:
        raise TimeoutError(f"rank {rank()} waited for a rank that did not come ({error})") from None
    return [row for part in gathered for row in part]


def check_alike(values: dict[str, Any]) -> None:
    """Raises ValueError, on all ranks, if one has another value than rank 0: nodes that were
    started by different commands, or have other files at the same path. Every rank must call
    this."""
    first, *others = gather_rows([values])
    for number, own in enumerate(others, start=1):
        for name, value in first.items():
            if own.get(name) != value:
                raise ValueError(f"{name}: expected the same on all ranks, rank 0 has {value!r}, "
                                 f"rank {number} has {own.get(name)!r}")


@contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """A ValueError or OSError inside, on any rank, is raised on all ranks: no rank waits for one
    that has left. A rank's own OSError stays one, to which `naming` may add a path; the others get
    a ValueError."""
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
        raise ValueError(reasons[0] if world_size() == 1 else f"{what}: {reasons[0]}") from own


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
    """Seconds that this rank works in each phase of a step and then waits for the slowest rank."""

    def __init__(self, device: torch.device, timeout_minutes: float):
        self.device, self.timeout = device, timedelta(minutes=timeout_minutes)
        self.work: dict[str, float] = {}
        self.idle = 0.0

    @contextmanager
    def __call__(self, name: str, alone: bool = False) -> Iterator[None]:
        """Raises TimeoutError, with the phase and the ranks, if a rank does not end it in time.
        alone: no rank waits for another inside, and errors are raised as by `all_or_none`."""
        started, own = time.perf_counter(), None
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            error.add_note(f"rank {rank()}, phase {name}")
            if not (alone and isinstance(error, OSError | ValueError)):
                raise
            own = error
        ended = time.perf_counter()
        if world_size() > 1:
            try:
                dist.monitored_barrier(_control, timeout=self.timeout, wait_all_ranks=True)
            except RuntimeError as error:
                raise TimeoutError(f"rank {rank()}, phase {name}: not all ranks came to its end "
                                   f"({error})") from None
        self.work[name] = self.work.get(name, 0.0) + ended - started
        self.idle += time.perf_counter() - ended
        if alone:
            with all_or_none(name):
                if own:
                    raise own

    def take(self) -> dict[str, float]:
        """Numbers since the last call. `seconds_*`: seconds of work in a phase, mean over ranks.
        `idle_share`: the share of all ranks' time that was spent waiting."""
        seconds = {f"seconds_{name}": value for name, value in self.work.items()}
        totals = sum_across_ranks(seconds | {"idle": self.idle})
        self.work, self.idle = {}, 0.0
        idle, work = totals.pop("idle"), sum(totals.values())
        means = {key: value / world_size() for key, value in totals.items()}
        return means | {"idle_share": idle / (idle + work)}
