"""The text layers as grpo/decode.py and a GPU compute them: norms, angles, gates, and the compiled step."""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import RecordingDecoder, keys, run_now
from test_vision import qwen3_vl
from torch import nn
from torch._dynamo import exc as dynamo
from transformers import GemmaConfig, GemmaForCausalLM, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from data.toy.world import draw, make_scene
from grpo.decode import Decoder
from grpo.fused import ANGLES, GatedMLP, _gated, fuse_, plain_norms
from grpo.layers import compiled_step_, layer_step_
from grpo.pretrained import make_policy
from grpo.rollout import read_prompts, sample_rollouts
from grpo.sharding import empty_model
from reward.caprl import Verifier

OWN = {(module, name): getattr(module, name) for module in (modeling_qwen2_5_vl, modeling_qwen3_vl) for name in ANGLES}
"""Functions of transformers, which are replaced there on a GPU."""


@pytest.fixture
def on_gpu(monkeypatch):
    """What is compiled there runs by torch; its names are kept, one for each compilation."""
    names, original = [], torch.compile

    def compile_by_torch(function, **options):
        return original(function, backend=lambda graph, _: names.append(function.__name__) or graph, **options)

    monkeypatch.setattr("grpo.fused.is_on_gpu", lambda model: True)
    monkeypatch.setattr("torch.compile", compile_by_torch)
    for place, function in OWN.items():
        monkeypatch.setattr(*place, function)
    _gated.cache_clear()
    yield names
    _gated.cache_clear()


def num_fused(model: nn.Module) -> int:
    return sum(type(module) is nn.RMSNorm for module in model.modules())


def test_fused_norms_change_neither_logits_nor_gradients_nor_names(policy, prompts):
    own = Qwen2_5_VLForConditionalGeneration.from_pretrained("data/toy/policy", dtype=torch.float32)
    with torch.no_grad():
        for norm in map(own.get_submodule, plain_norms(own)):
            norm.weight.add_(torch.linspace(-0.5, 0.5, len(norm.weight)))
    fused = make_policy(copy.deepcopy(own), policy.tokenizer, policy.image_processor).model
    text, vision = own.config.text_config, own.config.vision_config
    norms = plain_norms(own)
    assert num_fused(fused) == len(norms) == 2 * text.num_hidden_layers + 1 + 2 * vision.depth + 1 and num_fused(own) == 0
    assert set(norms.values()) == {text.rms_norm_eps, 1e-6}  # the tower's is fixed
    assert list(fused.state_dict()) == list(own.state_dict()) and plain_norms(fused) == norms
    results = []
    for model in (own, fused):
        logits = model(input_ids=prompts[0].input_ids[None, -9:]).logits
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.model.language_model.parameters())])
    for want, got in zip(*results):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_angles_and_gates_are_compiled_once_for_all_sizes_and_change_nothing(policy, on_gpu):
    """One prompt or several, of any size: the values and gradients of transformers."""
    own = replace(policy, model=copy.deepcopy(policy.model))
    fused = make_policy(policy.model, policy.tokenizer, policy.image_processor)
    blocks = [*fused.model.model.language_model.layers, *fused.model.model.visual.blocks]
    assert {type(block.mlp) for block in blocks} == {GatedMLP}
    assert list(fused.model.state_dict()) == list(own.model.state_dict())

    def run(policy, prompts):
        policy.model.zero_grad()
        logits, _, _ = read_prompts(policy, prompts)
        logits.square().mean().backward()
        return [logits, *(p.grad for p in policy.model.parameters() if p.grad is not None)]

    scenes = [draw(make_scene("train", index)) for index in range(4)]
    sizes = (112, 112), (84, 140), (140, 56), (168, 84)
    prompts = [policy.prompt(scene.resize(size)) for scene, size in zip(scenes, sizes)]
    for batch in (prompts[:1], prompts[1:2], prompts[:2], prompts[1:], prompts):
        got = run(fused, batch)
        with pytest.MonkeyPatch.context() as patch:
            for place, function in OWN.items():
                patch.setattr(*place, function)
            want = run(own, batch)
        for one, other in zip(got, want, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())
    # of the text once more for several rows; gates of the tower and of the text have other dimensions
    assert Counter(on_gpu) == {"apply_rotary_pos_emb": 2, "apply_rotary_pos_emb_vision": 1, "gated": 3}


def test_a_second_model_compiles_no_function_again(policy, on_gpu):
    for _ in range(2):
        make_policy(copy.deepcopy(policy.model), policy.tokenizer, policy.image_processor)
        turns = [getattr(modeling_qwen2_5_vl, name) for name in ANGLES]
    make_policy(policy.model, policy.tokenizer, policy.image_processor)
    assert turns == [getattr(modeling_qwen2_5_vl, name) for name in ANGLES] and not set(turns) & set(OWN.values())
    q, k = torch.randn(2, 1, 2, 3, 8)
    cos, sin = torch.randn(2, 1, 3, 8)
    by_name = turns[0](q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for part, other in zip(by_name, turns[0](q, k, cos, sin)):
        assert torch.allclose(part.transpose(1, 2), other)


def test_qwen3_vl_has_its_own_tower_and_the_same_values(on_gpu):
    torch.manual_seed(0)
    own = qwen3_vl().eval()
    fused = copy.deepcopy(own)
    embeds, pixels = torch.randn(2, 5, 32), torch.randn(64, 96)
    places, grid = torch.arange(5).expand(3, 2, 5), torch.tensor([[1, 8, 8]])

    def run(model):
        text = model.model.language_model(inputs_embeds=embeds, position_ids=places).last_hidden_state
        image = model.model.visual(pixels, grid_thw=grid).pooler_output
        (text.square().mean() + image.square().mean()).backward()
        return [text, image, *(p.grad for p in model.parameters() if p.grad is not None)]

    want = run(own)
    fuse_(fused)
    got = run(fused)
    assert {type(layer.mlp) for layer in fused.model.language_model.layers} == {GatedMLP}
    assert GatedMLP not in {type(block.mlp) for block in fused.model.visual.blocks}
    assert set(on_gpu) == {*ANGLES, "gated"}
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())


def test_all_models_have_fused_norms(policy, verifier_model, tokenizer):
    """The copy for training has no numbers to try its norms with."""
    layers = verifier_model.config.num_hidden_layers
    assert num_fused(Verifier(verifier_model, tokenizer).model) == 2 * layers + 1
    assert num_fused(empty_model(policy.model, torch.bfloat16)) == len(plain_norms(policy.model)) > 0


def test_norms_that_are_not_plain_stay(policy):
    """Gemma's adds 1 to its weight, however large that is. A norm in another data type returns its own."""
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    with torch.no_grad():
        gemma.model.norm.weight.fill_(4000)
    assert plain_norms(gemma) == {}
    norms = plain_norms(policy.model.to(torch.bfloat16))
    assert "model.language_model.norm" in norms
    policy.model.model.language_model.norm.float()
    assert plain_norms(policy.model) == {name: eps for name, eps in norms.items() if name != "model.language_model.norm"}


class CompiledDecoder(RecordingDecoder):
    def __init__(self, *args):
        super().__init__(*args)
        self.layer_step_ = compiled_step_()


@pytest.fixture
def recordings(monkeypatch):
    monkeypatch.setattr("grpo.rollout.Decoder", CompiledDecoder)
    monkeypatch.setattr("grpo.recording.record", run_now)
    compiled_step_.cache_clear()
    yield
    compiled_step_.cache_clear()


def test_a_compiled_layer_is_compiled_once_and_draws_the_same(policy, recordings, monkeypatch):
    """Four groups, then three with room that grows from 64 to 72: one compilation, without a break."""
    compiled, original = [], torch.compile

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr("torch.compile", lambda function, **options: original(function, backend=count, **options))
    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(4)]
    more = sample_rollouts(policy, prompts, keys(4, 2), 5)
    got = sample_rollouts(policy, prompts[1:], keys(3, 2), 70)
    assert len(compiled) == 1 and len(more.captions) == 8 and torch._dynamo.config.recompile_limit >= 64
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

    monkeypatch.setattr("torch.compile", lambda function, **options: fail)
    sample_rollouts(policy, prompts, keys(4, 2), 6)
    got = sample_rollouts(policy, prompts, keys(4, 2), 6)  # which does not try again
    assert len(tries) == 1 and [str(warning.message) for warning in recwarn if "compile" in str(warning.message)] == [
        "layers of the decoder are not compiled, slower (no compiler found)"
    ]
    monkeypatch.setattr("grpo.rollout.Decoder", Decoder)
    assert torch.equal(got.tokens, sample_rollouts(policy, prompts, keys(4, 2), 6).tokens)


def test_memory_that_is_short_is_not_the_compilers_fault(policy, prompts, recordings, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("torch.compile", lambda function, **options: fail)
    with pytest.warns(UserWarning, match="without CUDA graphs"), pytest.raises(torch.OutOfMemoryError):
        sample_rollouts(policy, prompts, keys(4, 2), 6)


def test_a_decoder_compiles_on_a_gpu_only(policy, monkeypatch):
    decoder = Decoder(policy.model, 2, 8)
    assert decoder.layer_step_ is layer_step_ and not decoder.uses_kernels
    monkeypatch.setattr("grpo.layers.check_layers", lambda *_, **__: None)
    monkeypatch.setattr("grpo.layers.compiled_step_", lambda: math.inf)
    monkeypatch.setattr("grpo.layers.has_kernels", lambda *_: True)
    monkeypatch.setattr(policy.model.model.language_model.embed_tokens, "weight", OnGpu())
    decoder = Decoder(policy.model, 2, 8)
    assert decoder.layer_step_ == math.inf and decoder.uses_kernels


class OnGpu(nn.Parameter):
    """Claims to be on one."""

    device = torch.device("cuda")
