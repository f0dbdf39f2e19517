"""The vision tower: what transformers' own computes, in one attention call a layer and a length, without waiting for a GPU."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from grpo.fused import GatedMLP
from grpo.lora import LoraLinear
from grpo.sharding import empty_model
from grpo.vision import WINDOW_ATTENTION, PatchProduct, prepare_vision_, window_attention

TEXT = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1)
VISION = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
              temporal_patch_size=2, out_hidden_size=32, initializer_range=0.3)
GRID = torch.tensor([[1, 18, 10], [1, 8, 12], [1, 16, 16]])
"""Patches of three images in time, height and width. Windows are 8 x 8: the first has two of 64, two of 8 x 2, one of 2 x 8 and
one of 2 x 2; the second one of 64 and one of 8 x 4; the third four of 64."""
WINDOWS = [64, 16, 64, 16, 16, 4, 64, 32, 64, 64, 64, 64]
IMAGES = [180, 96, 256]


def qwen2_5_vl():
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = VISION | dict(window_size=32, fullatt_block_indexes=[1, 3])
    text = TEXT | dict(rope_parameters=rope)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen3_vl():
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3], mrope_interleaved=True)
    vision = VISION | dict(num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    text = TEXT | dict(head_dim=16, rope_parameters=rope)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


LAYERS = {qwen2_5_vl: [WINDOWS, IMAGES, WINDOWS, IMAGES], qwen3_vl: [IMAGES] * 4}
"""Lengths that each layer attends in."""


@pytest.fixture(params=LAYERS, ids=lambda make: make.__name__)
def make(request):
    return request.param


@pytest.fixture
def models(make):
    """transformers' own and ours, with the same random weights."""
    torch.manual_seed(0)
    own = make().eval()
    with torch.no_grad():
        for parameter in own.model.visual.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))  # biases are not zero, nor norms one
    ours = copy.deepcopy(own)
    prepare_vision_(ours)
    return own, ours


@pytest.fixture
def pixels():
    return torch.randn(int(GRID.prod(1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))


def features(model, pixels, grid=GRID):
    """All that the tower gives the text model: (tokens, layers, hidden)."""
    out = model.model.get_image_features(pixels, grid)
    layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    return torch.stack([layer if isinstance(layer, torch.Tensor) else torch.cat(layer) for layer in layers], dim=1)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        return sum(count for name, count in self.counts.items() if name.startswith("_scaled_dot_product"))


def test_window_attention_is_its_definition():
    """Windows of 2, 1, 3 and 2 patches: lengths that come back, one window alone."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 8, 4)
    ends = torch.tensor([0, 2, 3, 6, 8], dtype=torch.int32)
    out, weights = window_attention(None, query, key, value, None, scaling=0.3, cu_seq_lens_q=ends)
    assert out.shape == (1, 8, 2, 4) and weights is None
    owners = [0, 0, 1, 2, 2, 2, 3, 3]
    for head in range(2):
        for i in range(8):
            seen = [j for j in range(8) if owners[j] == owners[i]]
            probs = (0.3 * key[0, head, seen] @ query[0, head, i]).softmax(0)
            assert torch.allclose(out[0, i, head], probs @ value[0, head, seen], atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_tower_is_transformers_own(models, pixels, checkpointed):
    """Values and all gradients, to float32's rounding, with and without checkpointing."""
    results = []
    for model in models:
        if checkpointed:
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = features(model, pixels)
        out.square().sum().backward()
        results.append({"out": out.detach()} | {name: p.grad for name, p in model.model.visual.named_parameters()})
    own, ours = results
    assert own["out"].std() > 0.1
    for name, want in own.items():
        assert torch.allclose(ours[name], want, rtol=1e-4, atol=1e-5 * want.abs().max().item()), name


def test_a_frozen_tower_hands_gradients_to_its_merger(models, pixels):
    grads = []
    for model in models:
        for name, parameter in model.model.visual.named_parameters():
            parameter.requires_grad_(name.startswith("merger."))
        features(model, pixels)[:, 0].square().sum().backward()
        grads.append([p.grad for p in model.model.visual.merger.parameters()])
        assert model.model.visual.patch_embed.proj.weight.grad is None
    for got, want in zip(*reversed(grads)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_one_call_for_a_layer_and_a_length(make, models, pixels):
    """transformers calls once for each window, 12 in a layer here; ours once for each length, 4 or 3."""
    calls = []
    for model in models:
        with torch.no_grad(), Calls() as mode:
            features(model, pixels)
        calls.append(mode.attention)
        assert mode.counts["convolution"] == (0 if model is models[1] else 1)
    assert calls == [sum(map(len, LAYERS[make])), sum(len(set(lengths)) for lengths in LAYERS[make])]
    square, alike = torch.tensor([[1, 16, 16]] * 3), torch.randn(3 * 256, 96)
    with torch.no_grad(), Calls() as mode:
        features(models[1], alike, square)
    assert mode.attention == 4  # layers


def test_flash_attn_is_called_once_a_layer(make, models, pixels, flash_calls):
    own, ours = (features(model, pixels) for model in models)
    assert flash_calls == [(lengths, lengths, False) for lengths in LAYERS[make]]
    assert torch.allclose(ours, own, rtol=1e-4, atol=1e-5 * own.abs().max().item())
    own.square().sum().backward()
    ours.square().sum().backward()
    for (name, want), got in zip(models[0].model.visual.named_parameters(), models[1].model.visual.parameters()):
        assert torch.allclose(got.grad, want.grad, rtol=1e-4, atol=1e-5 * want.grad.abs().max().item()), name


@pytest.mark.parametrize("with_flash", [False, True])
def test_nothing_waits_for_the_device(models, pixels, monkeypatch, with_flash):
    """On the meta device no number can be read, only shapes are known, and tensors of the host do not mix in. transformers' own
    tower asks for the lengths in every layer."""
    if with_flash:
        monkeypatch.setattr("grpo.flash.can_use_flash_attention", lambda params: True)
        monkeypatch.setattr("grpo.flash._varlen_attention", lambda: lambda q, k, v, ends, *_: torch.empty_like(q + ends.sum()))
    own, ours = (model.to("meta") for model in models)
    assert features(ours, pixels.to("meta")).shape[0] == sum(IMAGES) // 4
    with pytest.raises(Exception, match="meta"):
        features(own, pixels.to("meta"), GRID.to("meta"))


def test_a_patch_is_a_product():
    """Conv3d's values and gradients, for one kernel a patch; in bfloat16 to its rounding."""
    torch.manual_seed(0)
    single, half = (torch.float32, 1e-4, 1e-5), (torch.bfloat16, 0.1, 1e-2)
    for bias, (dtype, atol, rtol) in ((False, single), (True, single), (True, half)):
        own = nn.Conv3d(3, 16, (2, 4, 4), stride=(2, 4, 4), bias=bias).to(dtype)
        ours = copy.deepcopy(own)
        ours.__class__ = PatchProduct
        results = []
        for module in (own, ours):
            patches = torch.randn(7, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            out = module(patches).view(-1, 16)
            out.square().sum().backward()
            results.append([out, patches.grad, *(p.grad for p in module.parameters())])
        for got, want in zip(*results):
            assert got.shape == want.shape and torch.allclose(got, want, atol=atol, rtol=rtol)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, inner, wide", [(torch.bfloat16, 20, 24), (torch.float32, 18, 20), (torch.float32, 20, 20)])
def test_the_products_of_the_towers_mlp_have_aligned_sides(bias, dtype, inner, wide):
    """Qwen2.5-VL's inner width of 3,420 has 6,840 bytes, no multiple of 16. Values and gradients are those of its own. Layers
    with an adapter are called as they are."""
    torch.manual_seed(0)
    widths, results = [], []
    own = nn.Module()
    own.gate_proj, own.up_proj = nn.Linear(16, inner, bias), nn.Linear(16, inner, bias)
    own.down_proj = nn.Linear(inner, 16, bias)
    own.to(dtype).act_fn = lambda x: widths.append(x.shape[1]) or nn.functional.silu(x)
    ours = copy.deepcopy(own)
    ours.__class__ = GatedMLP
    for module in (own, ours):
        x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = module(x) if module is ours else own.down_proj(own.act_fn(own.gate_proj(x)) * own.up_proj(x))
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters())])
    for want, got in zip(*results):
        assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    ours.up_proj.__class__ = LoraLinear
    ours.up_proj.is_on = False
    assert torch.allclose(ours(x), results[0][0], rtol=1e-2, atol=1e-6) and widths == [inner, wide, inner]


def test_what_is_saved_and_the_text_model_stay(models, tmp_path):
    """No name of ours in config.json, the same weights; transformers opens the folder with its own tower."""
    own, ours = models
    prepare_vision_(ours)  # a second time changes nothing
    assert len(ours.model.visual._forward_pre_hooks) == 1
    assert ours.config.to_dict() == own.config.to_dict() and list(ours.state_dict()) == list(own.state_dict())
    for config in (ours.config, ours.config.text_config, ours.config.vision_config):
        assert config._attn_implementation == "sdpa"
    for name, model in (("own", own), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    texts = [(tmp_path / name / "config.json").read_text() for name in ("own", "ours")]
    assert texts[0] == texts[1] and "flash" not in texts[0]
    opened = type(own).from_pretrained(tmp_path / "ours")
    assert type(opened.model.visual.patch_embed.proj) is nn.Conv3d
    assert opened.config.vision_config._attn_implementation == "sdpa"


def test_a_copy_for_training_and_a_deep_copy_have_the_same_tower(models, pixels):
    ours = models[1]
    empty = empty_model(ours, torch.bfloat16)
    for model in (copy.deepcopy(ours), empty):
        tower = model.model.visual
        assert type(tower.patch_embed.proj) is PatchProduct and len(tower._forward_pre_hooks) == 1
        assert {block.attn.config._attn_implementation for block in tower.blocks} == {WINDOW_ATTENTION}
        assert tower.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    assert features(empty, pixels.to("meta")).dtype == torch.bfloat16
