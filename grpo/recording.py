"""A decoding step as a CUDA graph: recorded once, and replayed without the host's launches.

Shape letters are those of grpo/decode.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """A step of all B rows with fixed addresses: inputs, replay and output. A replay reads the
    memory of every tensor that the recording read, and does not keep it. These are kept here, the
    others by the decoder, which drops the recording before it replaces one."""

    tokens: Tensor  # (B,)
    positions: Tensor  # (B,)
    rows: Tensor  # (B,) int64: 0 to B - 1
    ages: Tensor  # (P,)
    replay: Callable[[], None]
    logits: Tensor  # (B, V) float32


@lru_cache(maxsize=1)
def _warm_up_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one: cuBLAS keeps 32 MiB for each that it has met (H100)


def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records `function` as a CUDA graph. Returns its replay, and the tensor that a replay fills.
    Raises RuntimeError if it cannot be recorded."""
    stream = _warm_up_stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            function()  # on the first call libraries choose kernels and allocate memory
    finally:  # also if it has failed on its way: then the caller writes to the same cache
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, which open images or watch the run, may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result
