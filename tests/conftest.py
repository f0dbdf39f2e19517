"""Tiny models for the tests: random weights, wide enough apart that every choice is decisive."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tolerances are those of float32 on a CPU

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.toy.captioner import build_policy
from data.toy.verifier import build_verifier
from data.toy.world import draw, make_scene
from grpo.config import toy_config
from grpo.policy import Policy, Prompt
from grpo.rollout import Rollouts, sample_rollouts
from train import train

torch.set_num_threads(1)


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
def verifier_model(tokenizer):
    return widen(build_verifier(tokenizer, seed=0))


@pytest.fixture
def prompts(policy) -> list[Prompt]:
    """Four prompts whose images have three different sizes."""
    return [policy.prompt(draw(make_scene("train", index))) for index in range(4)]


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
