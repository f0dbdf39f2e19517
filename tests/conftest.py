"""Tiny models for the tests: random weights, wide enough apart that every choice is decisive."""

import errno
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from types import ModuleType

os.environ["OMP_NUM_THREADS"] = "1"  # in the processes of the tests too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["no_proxy"] = "localhost"  # a browser's driver is asked here, whatever proxy the machine has
os.environ.pop("WORLD_SIZE", None)  # a scheduler's: a run would wait for its ranks
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tolerances are those of float32 on a CPU
os.environ["TRITON_INTERPRET"] = "1"  # before grpo.attend is imported: its kernels run on a CPU

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

import grpo.flash
from data.toy.captioner import build_policy
from data.toy.verifier import build_verifier
from data.toy.world import draw, make_scene
from grpo.decode import Decoder
from grpo.policy import Policy, Prompt
from grpo.recipes import toy_config
from grpo.rollout import Rollouts, sample_rollouts
from train import train

torch.set_num_threads(1)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "train", "evaluate", "tools.check", "tools.held_out", "tools.report.page", "reward.resample", "data.toy.captioner",
    "data.toy.verifier", "torch.distributed.checkpoint", "torch.distributed.run", "pytest",
])
"""What takes seconds to import, once for all processes that the tests start."""


class Forked(ForkServerProcess):
    """A function in a process of its own, forked from one that has imported everything and computed nothing, so that
    forks of it are safe. `exitcode` is -N where signal N ended it."""

    def __init__(self, out: Path, function: Callable, *arguments, **environment: str):
        super().__init__(target=function, args=arguments, daemon=True)
        self.out, self.environment = out, environment

    def run(self) -> None:
        os.environ |= self.environment
        torch.set_num_threads(1)
        for number in (1, 2):
            os.dup2(os.open(self.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        super().run()

    def poll(self) -> int | None:
        """As of a Popen."""
        return self.exitcode

    returncode = property(poll)

    def said(self) -> str:
        """All that it and the other ranks have printed, after its end."""
        self.join(300)
        return self.out.read_text()


def run_as_program(words: Sequence[str]) -> None:
    """python WORDS: a file, or a module after -m."""
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def all_ranks(folder: Path, num_ranks: int, function: Callable, *arguments) -> str:
    """What the ranks of a run have printed, started as torchrun starts them. All of them must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(num_ranks)}
    ranks = [Forked(folder / "said.txt", function, *arguments, RANK=str(number), LOCAL_RANK=str(number), **place)
             for number in range(num_ranks)]
    for process in ranks:
        process.start()
    said = [process.said() for process in ranks][-1]
    assert {process.exitcode for process in ranks} == {0}, said[-3000:]
    return said


def shallow(model: str, folder: Path, num_layers: int = 1) -> str:
    """A shipped model without its upper layers, those of its vision tower too: what happens around it is tested faster
    so."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": num_layers, "layer_types": text["layer_types"][:num_layers]}
    if "vision_config" in config:
        config["vision_config"] |= {"depth": num_layers, "fullatt_block_indexes": [num_layers - 1]}
    file.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    layers = {name: int((re.findall(r"(?:layers|blocks)\.(\d+)\.", name) or [0])[0]) for name in weights}
    kept = {name: weight for name, weight in weights.items() if layers[name] < num_layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained("data/toy/policy")


def widen(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights give near-uniform logits; these give different ones for different images and histories."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture
def policy(tokenizer) -> Policy:
    policy = build_policy(tokenizer, seed=0)
    widen(policy.model)
    return policy


@pytest.fixture
def no_links(monkeypatch) -> None:
    """A file system that has no links, such as exFAT's or a cloud's bucket."""

    def refuse(source, path, *args, **kwargs):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source), None, str(path))

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("os.symlink", refuse)


@pytest.fixture
def verifier_model(tokenizer):
    return widen(build_verifier(tokenizer, seed=0))


@pytest.fixture
def prompts(policy) -> list[Prompt]:
    """Four prompts whose images have three different sizes."""
    return [policy.prompt(draw(make_scene("train", index))) for index in range(4)]


def end_often(policy: Policy, below: float = 1.5) -> None:
    """Rows end at different times: EOS gets a logit so far below the others' sum. 1.5 is about one token in five, 3 one
    in twenty."""

    def raise_eos(module, args, output):
        output[..., policy.eos_ids[0]] = output.logsumexp(-1) - below
        return output

    policy.model.lm_head.register_forward_hook(raise_eos)


@contextmanager
def full_disk():
    """Inside, files of more than a MiB are refused, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def keys(num_prompts: int, group_size: int) -> list[str]:
    return [f"{p}:{g}" for p in range(num_prompts) for g in range(group_size)]


@pytest.fixture
def batch(policy, prompts) -> tuple[Rollouts, torch.Tensor, torch.Tensor]:
    """Two captions of each prompt, their advantages, and which of them have a reward."""
    rollouts = sample_rollouts(policy, prompts, keys(4, 2), 10)
    advantages = torch.tensor([1.0, -1, 0.5, -0.5, 2, 0, -1, 1])
    valid = torch.tensor([True] * 7 + [False])
    return rollouts, advantages, valid


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A real run of two steps with every part of the reward, as train.py leaves it; tests read it
    and change nothing."""
    run_dir = tmp_path_factory.mktemp("tiny") / "run"
    train(toy_config(
        run_dir=str(run_dir), data="toy:train:8", num_steps=2, prompts_per_step=4, group_size=4, probe_images=2, audit_every=1,
        num_shuffles=2, abstain=True, length_weight=0.1, length_full=20, length_zero=60, repetition_weight=0.1,
        tensorboard=True,
    ))
    return run_dir


def run_now(function):
    """Stands for a CUDA graph: a replay computes again from the same inputs into the same result."""
    result = function()
    return lambda: result.copy_(function()), result


class RecordingDecoder(Decoder):
    """On a CPU as on a GPU, where `grpo.recording.record` is replaced, but not compiled and without kernels."""

    def __init__(self, *args):
        super().__init__(*args)
        self.uses_graphs = True


class Waits(TorchDispatchMode):
    """Operators that make the host wait for a GPU: a value read, or a mask whose number of ones is a shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if re.match("_local_scalar_dense|nonzero|masked_select|_?unique", name) or any(
            index is not None and index.dtype == torch.bool for index in indices
        ):
            self.seen.append(name)
        return function(*args, **kwargs or {})


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False):
    """A stand-in with the signature of flash-attn: its definition, row by row. It notes lengths and masks."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.device == q.device
    lengths, key_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths), max(key_lengths)) and min(lengths) > 0 and dropout_p == 0
    assert (sum(lengths), sum(key_lengths)) == (len(q), len(k))
    flash_attn_varlen_func.calls.append((lengths, key_lengths, causal))
    shared, out = q.shape[1] // k.shape[1], []
    for queries, keys, values in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths)):
        keys, values = (part.repeat_interleave(shared, 1) for part in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", queries, keys) * (softmax_scale or q.shape[-1] ** -0.5)
        if causal:
            seen = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
            scores = scores.masked_fill(~seen, -torch.inf)
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), values))
    return torch.cat(out)


@pytest.fixture
def flash_calls(monkeypatch):
    """(lengths of queries, of keys, whether causal) of each call of flash-attn, which is there as on a GPU."""
    flash_attn_varlen_func.calls = []
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("grpo.flash.can_use_flash_attention", lambda params: True)
    grpo.flash._varlen_attention.cache_clear()
    yield flash_attn_varlen_func.calls
    grpo.flash._varlen_attention.cache_clear()
