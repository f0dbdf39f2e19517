"""The text layers as grpo/decode.py and a GPU compute them."""

import copy

import pytest
import torch
from conftest import keys
from torch import nn
from torch._dynamo import exc as dynamo
from transformers import GemmaConfig, GemmaForCausalLM

import grpo.layers
from data.toy.world import draw, make_scene
from grpo.decode import Decoder
from grpo.distributed import empty_model
from grpo.layers import compiled_step, fuse_norms_, plain_norms
from grpo.rollout import sample_rollouts


def test_fused_norms_change_neither_logits_nor_gradients_nor_names(policy, prompts):
    own, fused = policy.model, copy.deepcopy(policy.model)
    for norm in (module for name, module in fused.named_modules() if name.endswith("norm")):
        with torch.no_grad():
            norm.weight.add_(torch.linspace(-0.5, 0.5, len(norm.weight)))
    own.load_state_dict(fused.state_dict())
    norms = plain_norms(fused)
    layers = own.config.text_config.num_hidden_layers
    assert {eps for eps in norms.values()} == {own.config.text_config.rms_norm_eps, 1e-6}
    assert len([name for name in norms if "language_model" in name]) == 2 * layers + 1
    fuse_norms_(fused, norms)
    assert sum(type(module) is nn.RMSNorm for module in fused.modules()) == len(norms) > 2 * layers + 1
    assert list(fused.state_dict()) == list(own.state_dict()) and plain_norms(fused) == norms
    results = []
    for model in (own, fused):
        logits = model(input_ids=prompts[0].input_ids[None, -9:]).logits
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.model.language_model.parameters())])
    for want, got in zip(*results):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    empty = empty_model(own, torch.bfloat16)  # for training: no numbers to try its norms with
    fuse_norms_(empty, norms)
    assert sum(type(module) is nn.RMSNorm for module in empty.modules()) == len(norms)


def test_norms_that_are_not_plain_stay(policy):
    """Gemma's adds 1 to its weight, however large that is. A norm in another data type returns its own."""
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    with torch.no_grad():
        gemma.model.norm.weight.fill_(40)
    assert plain_norms(gemma) == {}
    norm = policy.model.model.language_model.norm.float()
    norms = plain_norms(policy.model.to(torch.bfloat16))
    assert "model.language_model.norm" in norms
    norm.float()
    assert plain_norms(policy.model) == {name: eps for name, eps in norms.items() if name != "model.language_model.norm"}


class Recording(Decoder):
    def __init__(self, *args):
        super().__init__(*args)
        self.uses_graphs, self.layer_step = True, compiled_step()


@pytest.fixture
def recordings(monkeypatch):
    """Graphs are made as on a GPU: a replay computes again."""

    def run_now(function):
        result = function()
        return lambda: result.copy_(function()), result

    monkeypatch.setattr("grpo.rollout.Decoder", Recording)
    monkeypatch.setattr("grpo.decode.record", run_now)
    compiled_step.cache_clear()
    yield
    compiled_step.cache_clear()


def test_a_compiled_layer_is_compiled_once_and_draws_the_same(policy, recordings, monkeypatch):
    """Three groups, then four, other prompts, and room that grows from 64 to 72: one compilation, which has no break."""
    compiled, original = [], torch.compile

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr("torch.compile", lambda function, **options: original(function, backend=count, **options))
    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(4)]
    more = sample_rollouts(policy, prompts, keys(4, 2), 5)
    got = sample_rollouts(policy, prompts[1:], keys(3, 2), 70)
    assert len(compiled) == 1 and len(more.captions) == 8
    with monkeypatch.context() as patch:
        patch.setattr("grpo.rollout.Decoder", Decoder)
        want = sample_rollouts(policy, prompts[1:], keys(3, 2), 70)
    assert torch.equal(got.tokens, want.tokens) and torch.allclose(got.logprobs, want.logprobs, atol=1e-5)


@pytest.mark.parametrize("error", [dynamo.InternalTorchDynamoError("no compiler found"),
                                   dynamo.FailOnRecompileLimitHit("no compiler found")])
def test_decoding_goes_on_without_a_compiled_layer_and_says_so_once(policy, prompts, recordings, monkeypatch, recwarn, error):
    tries = []

    def fail(*args):
        tries.append(args)
        raise error

    monkeypatch.setattr(grpo.layers.torch, "compile", lambda function, **options: fail)
    sample_rollouts(policy, prompts, keys(4, 2), 6)
    got = sample_rollouts(policy, prompts, keys(4, 2), 6)  # which does not try again
    assert len(tries) == 1 and [str(warning.message) for warning in recwarn if "compile" in str(warning.message)] == [
        "decoding by layers that are not compiled, slower (no compiler found)"
    ]
    monkeypatch.setattr("grpo.rollout.Decoder", Decoder)
    assert torch.equal(got.tokens, sample_rollouts(policy, prompts, keys(4, 2), 6).tokens)


def test_memory_that_is_short_is_not_the_compilers_fault(policy, prompts, recordings, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(grpo.layers.torch, "compile", lambda function, **options: fail)
    with pytest.warns(UserWarning, match="without CUDA graphs"), pytest.raises(torch.OutOfMemoryError):
        sample_rollouts(policy, prompts, keys(4, 2), 6)
