"""Memory of a rank: what its models hold, and what a trial takes at its peak. Sampling the longest
captions cannot be tried in minutes, so it is computed by hand."""

import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.batch import count_together
from grpo.config import TrainConfig
from grpo.distributed import world_size
from grpo.run import Run


def status(field: str) -> int:
    """Bytes in a field of /proc/self/status: VmRSS is held now, VmHWM was at the peak."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", text)[1])


def available_memory(device: torch.device) -> int:
    """Bytes that this rank can have. Of its GPU it is what other processes leave. Of the host it is
    its share of what is free now and of what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    return free * 1024 // world_size() + status("VmRSS")


def held(device: torch.device) -> int:
    """Bytes that this process holds."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status("VmRSS")


def measure(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds that `work` takes, and the most bytes that this process holds meanwhile."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # where the system refuses, the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter() - started, torch.cuda.max_memory_allocated(device)
    return time.perf_counter() - started, status("VmHWM")


@contextmanager
def limited(size: int | None) -> Iterator[None]:
    """Inside, an allocation of the host's memory fails if this process would hold more than `size`
    bytes; None for no limit. Without a limit the system would kill it, and no message would say
    why.

    Raises MemoryError for whatever torch raises then, and where a GPU's memory is full.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if size is not None:
        limit = status("VmData") + max(0, size - status("VmRSS"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    except RuntimeError as error:
        if "allocate" in str(error):
            raise MemoryError(str(error)) from None
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def weights_held(run: Run, others: dict[str, nn.Module | None]) -> dict[str, int]:
    """Bytes on the run's device by part. others: models beside the run's, by name."""
    sampler = run.sampler.model if run.scorer.model is not run.sampler.model else None
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    parts = {"sampler's weights": _parameters(sampler),
             "masters and moments": [*_parameters(run.scorer), *moments],
             "reference": _parameters(run.reference)}  # with adapters it is the trained model
    parts |= {name: _parameters(model) for name, model in others.items()}
    return {name: _bytes_on(run.device, tensors) for name, tensors in parts.items()}


def _parameters(module: object) -> list[Tensor]:
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def _bytes_on(device: torch.device, tensors: Iterable[Tensor]) -> int:
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in own if tensor.device.type == device.type)


# ------------------------------------------------------------------------------------- by hand


def rollout_bytes(policy: PreTrainedModel, config: TrainConfig, num_ranks: int, width: int,
                  prompt_tokens: int, image_tokens: int) -> int:
    """Bytes of sampling the longest captions, beside the weights. It is the larger of two: a
    forward of prompts beside a cache, and decoding with a full cache. Decoding has logits of as
    many rows as the cache holds while captions are short.

    width: bytes of a number. prompt_tokens: T, of the longest prompt, of which image_tokens are the
    image's. The model may be on the meta device.
    """
    text, prompts = policy.config.get_text_config(), config.prompts_per_step // num_ranks
    vision = policy.config.vision_config
    group_tokens = prompt_tokens + config.group_size * config.max_new_tokens
    groups = min(prompts, max(1, config.rollout_tokens // group_tokens))
    tokens = min(prompts * group_tokens, max(config.rollout_tokens, group_tokens))
    cache = tokens * cache_bytes(policy, width)
    # 64: the first room where the kernels of grpo/attend.py do not run. Where they do it is 256.
    shortest = prompt_tokens + config.group_size * min(64, config.max_new_tokens)
    rows = min(prompts, max(1, config.rollout_tokens // shortest)) * config.group_size
    # The last step's probabilities and logits in float32. On a GPU, in half precision, a CUDA graph
    # has logits in its memory, too.
    logits = rows * text.vocab_size * (4 + 4 + (0 if width == 4 else 4))
    # A layer's keys and values once more, in float32 and while they grow, and the scores.
    attention = 2 * cache // text.num_hidden_layers * 4 // width
    num_places = prompt_tokens + config.max_new_tokens
    attention += 3 * 4 * groups * config.group_size * text.num_attention_heads * num_places
    language = prompt_tokens * (6 * text.hidden_size + 3 * text.intermediate_size)
    tower = 4 * image_tokens * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    together = count_together([prompt_tokens] * prompts)
    forward = together * width * (language + tower)
    forward += 3 * pixel_bytes(policy, together * image_tokens)
    return cache + max(logits + attention, forward)


def step_images(policy: PreTrainedModel, config: TrainConfig, num_ranks: int, width: int,
                image_tokens: int, is_gpu: bool, has_features: bool) -> int:
    """Bytes of a step's images, which are held from its rollout to its update: pixels, or a frozen
    tower's features in their place. On a CPU the pixels stay in any case, and those of the next
    step are beside them.

    width, image_tokens: as in `rollout_bytes`.
    """
    tokens = config.prompts_per_step // num_ranks * image_tokens
    features = has_features * tokens * policy.config.get_text_config().hidden_size * width
    pixels = pixel_bytes(policy, tokens) * width // 4
    return 2 * pixels + features if not is_gpu else features or pixels


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cache_bytes(model: PreTrainedModel, width: int) -> int:
    """Bytes of keys and values, per token. 0 for a model without attention, whose states do not
    grow."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 0)
    return 2 * width * text.num_hidden_layers * heads * head_dim(text) if heads else 0


def head_dim(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def pixel_bytes(policy: PreTrainedModel, image_tokens: int) -> int:
    """In float32."""
    vision = policy.config.vision_config
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    return 4 * image_tokens * vision.spatial_merge_size**2 * patch
