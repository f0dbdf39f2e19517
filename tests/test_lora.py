"""Adapters: by hand on a 2 x 2 layer, against W + s B A written out, in sampling, training, files and on two ranks."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import all_ranks, keys
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from data.jsonl import read_log
from data.program import run_program
from data.toy.captioner import build_policy
from grpo.config import LoraConfig
from grpo.export import export_policy
from grpo.logprobs import CompletionScorer
from grpo.lora import (
    PREFIX,
    LoraLinear,
    adapters,
    adapters_off,
    add_adapters_,
    attach_,
    load_adapter_,
    merge_adapters_,
    round_by_chance,
    save_adapter,
)
from grpo.pretrained import find_model, load_policy
from grpo.recipes import toy_config
from grpo.rollout import sample_rollouts
from grpo.run import load_run
from train import main

CPU = torch.device("cpu")


def with_adapters(policy, rank=4, **settings):
    """The policy with adapters that change what it says: B is drawn too."""
    add_adapters_(policy.model, LoraConfig(lora_rank=rank, lora_alpha=8.0, **settings), "none", seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters(policy.model).values():
        layer.lora_b.data = 0.2 * torch.randn(layer.lora_b.shape, generator=generator)
    return policy


def score(policy, rollouts):
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    return scorer, scorer(rollouts)[0]


def test_a_layer_by_hand():
    """W = [[1, 2], [3, 4]], A = [1, -1], B = [10, 20]^T, scale 0.5, x = [3, 1]: W x = [5, 13], A x = 2, s B A x = [10, 20]."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    attach_(layer, torch.tensor([[1.0, -1.0]]), torch.tensor([[10.0], [20.0]]), scale=0.5)
    x = torch.tensor([3.0, 1.0])
    assert layer(x).tolist() == [15.0, 33.0]
    with adapters_off(layer):
        assert layer(x).tolist() == [5.0, 13.0]
    merge_adapters_(layer)  # W + s B A = [[6, -3], [13, -6]]
    assert type(layer) is nn.Linear and layer.weight.tolist() == [[6.0, -3.0], [13.0, -6.0]]
    assert layer(x).tolist() == [15.0, 33.0]


def test_the_first_policy_is_the_loaded_one_and_adapters_off_are_it_bit_for_bit(policy, prompts):
    rollouts = sample_rollouts(policy, prompts, keys(4, 2), 12)
    _, before = score(policy, rollouts)
    add_adapters_(policy.model, LoraConfig(lora_rank=4), "none", seed=0)
    assert torch.equal(score(policy, rollouts)[1], before)  # B is zero
    for layer in adapters(policy.model).values():
        layer.lora_b.data.normal_()
    scorer, changed = score(policy, rollouts)
    assert (changed - before).abs().max() > 0.1
    with adapters_off(policy.model), torch.no_grad():
        assert torch.equal(scorer(rollouts)[0], before)
    assert torch.equal(scorer(rollouts)[0], changed)


def test_sampler_and_trainer_agree_and_so_do_merged_weights(policy, prompts):
    rollouts = sample_rollouts(with_adapters(policy), prompts, keys(4, 2), 24)
    _, logprobs = score(policy, rollouts)
    mask = rollouts.completion_mask
    assert (logprobs - rollouts.logprobs)[mask].abs().max() < 1e-4
    merged = copy.deepcopy(policy)
    merge_adapters_(merged.model)
    assert not adapters(merged.model)
    assert torch.allclose(score(merged, rollouts)[1], logprobs, atol=1e-4)
    plain = build_policy(policy.tokenizer, seed=0)  # and the adapters count
    assert (score(plain, rollouts)[1] - logprobs)[mask].abs().mean() > 0.01


def test_gradients_are_those_of_w_plus_b_a_written_out(policy, prompts):
    rollouts = sample_rollouts(with_adapters(policy), prompts[:2], keys(2, 2), 8)
    score(policy, rollouts)[1].sum().backward()
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.grad is not None]
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b"}
    whole = copy.deepcopy(policy)
    merge_adapters_(whole.model)
    whole.model.requires_grad_(True)
    score(whole, rollouts)[1].sum().backward()
    for name, layer in adapters(policy.model).items():  # dL/dA = s B^T dL/dW, dL/dB = s dL/dW A^T
        of_weight = whole.model.get_submodule(name).weight.grad
        for got, want in ((layer.lora_a.grad, layer.lora_b.T @ of_weight), (layer.lora_b.grad, of_weight @ layer.lora_a.T)):
            want = layer.scale * want.detach()
            assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item(), rtol=1e-3), name


def test_each_layer_has_a_draw_of_its_own_that_the_seed_names(policy):
    drawn = {}
    for seed in (0, 0, 1):
        model = copy.deepcopy(policy.model)
        add_adapters_(model, LoraConfig(lora_rank=4), "none", seed)
        drawn[seed, len(drawn)] = [layer.lora_a.detach().clone() for layer in adapters(model).values()]
    first, again, other = drawn.values()
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    alike = [a for a in first if a.shape == first[0].shape]
    assert len(alike) > 1 and len({tuple(a.flatten().tolist()) for a in alike}) == len(alike)
    assert torch.stack(alike).std().item() == pytest.approx(first[0].shape[1] ** -0.5, rel=0.1)


@pytest.mark.parametrize(("targets", "freeze", "count"), [
    (r"language_model\..*_proj", "none", 7), (r"[qv]_proj", "none", 2), (r"visual\..*", "vision", None),
    (r".*_proj", "none", 0),
])
def test_targets_and_freeze_name_the_layers(policy, targets, freeze, count):
    add_adapters_(policy.model, LoraConfig(lora_rank=2, lora_targets=targets), freeze, seed=0)
    names = list(adapters(policy.model))
    depth = policy.model.config.get_text_config().num_hidden_layers
    if count == 0:  # the tower's too
        towers = policy.model.config.vision_config.depth
        assert len(names) == 7 * depth + 3 * towers
    elif count:
        assert len(names) == count * depth and all("language_model.layers" in name for name in names)
    else:
        assert names and all("visual.merger" in name for name in names)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in names for part in "ab"}


@pytest.mark.parametrize(("settings", "freeze", "message"), [
    ({"lora_targets": "query"}, "none", r"lora_targets 'query': expected the names of linear layers that are trained"),
    ({"lora_targets": r"visual\..*"}, "vision+merger", r"expected the names of linear layers that are trained, found none"),
    ({"lora_targets": "lm_head"}, "none", r"expected plain linear layers below the head, found lm_head \(Linear\)"),
    ({"lora_targets": "q_proj|embed_tokens"}, "none", r"below the head, found .*embed_tokens \(Embedding"),
    ({"lora_targets": r"visual\..*"}, "none", r"expected plain linear layers below the head, found .*patch_embed.proj"),
    ({"lora_targets": "q_proj,v_proj"}, "none", r"found none of this policy's .*, such as q_proj\|v_proj"),
    ({"lora_targets": "input_layernorm"}, "none", r"expected the names of linear layers that are trained"),
    ({"lora_targets": "(q"}, "none", r"lora_targets '\(q': expected a regular expression"),
])
def test_targets_that_cannot_have_adapters_are_refused(policy, settings, freeze, message):
    with pytest.raises(ValueError, match=message):
        add_adapters_(policy.model, LoraConfig(lora_rank=2, **settings), freeze, seed=0)


@pytest.mark.parametrize(("settings", "message"), [
    ({"lora_rank": -1}, "lora_rank -1: expected 0 or more"), ({"lora_alpha": 0.0}, "lora_alpha 0.0: expected more than 0"),
    ({"lora_alpha": 8.0}, "lora_rank 0: expected 1 or more beside lora_alpha"),
    ({"lora_targets": "q_proj"}, "lora_rank 0: expected 1 or more"),
    ({"lora_alpha": math.inf}, "lora_alpha inf: expected more than 0, not infinity"),
    ({"lora_rank": 4, "replicas": 2}, "lora_rank: expected neither replicas nor offload_reference"),
])
def test_settings_of_adapters_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        toy_config(**settings)


def test_one_model_is_sampler_trainer_and_reference():
    run = load_run(toy_config(lora_rank=2), CPU)
    assert run.scorer.model is run.sampler.model and run.is_tower_frozen
    assert run.reference.__wrapped__ is run.scorer
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len(trained) == 2 * len(adapters(run.sampler.model)) and all(p.dtype == torch.float32 for p in trained)


def test_exports_open_as_a_whole_model_and_as_an_adapter(policy, prompts, tmp_path):
    export_policy(policy, tmp_path / "base", torch.float32)
    policy = with_adapters(load_policy(str(tmp_path / "base"), CPU))
    export_policy(policy, tmp_path / "final", torch.float32)
    rollouts = sample_rollouts(policy, prompts, keys(4, 1), 8)
    want = score(policy, rollouts)[1]
    for folder in ("final", "final/adapter"):
        find_model(str(tmp_path / folder))  # what evaluate.py asks first
        opened = load_policy(str(tmp_path / folder), CPU)
        assert not adapters(opened.model) and torch.allclose(score(opened, rollouts)[1], want, atol=1e-4)
    settings = json.loads((tmp_path / "final/adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8.0, "LORA")
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    with safe_open(tmp_path / "final/adapter/adapter_model.safetensors", "pt") as file:
        names = {f"base_model.model.{name}.lora_{part}.weight" for name in adapters(policy.model) for part in "AB"}
        assert set(file.keys()) == names
    assert all(type(layer) is LoraLinear for layer in adapters(policy.model).values())  # the run's own model goes on
    mode = (tmp_path / "final/adapter").stat().st_mode
    assert mode & 0o111, "the folder can be entered"


def test_a_float32_export_of_a_bfloat16_base_rounds_nothing_and_copies_no_model(policy, tmp_path, monkeypatch):
    """On a GPU the base is bfloat16, and there is no room for a second one."""
    policy = with_adapters(replace(policy, model=policy.model.bfloat16()))
    copied = lambda *_: pytest.fail("the model was copied")  # noqa: E731
    monkeypatch.setattr(type(policy.model), "__deepcopy__", copied, raising=False)
    for save_dtype in (torch.float32, torch.bfloat16):
        export_policy(policy, tmp_path / "final", save_dtype)
        opened = load_policy(str(tmp_path / "final"), CPU).model
        for name, layer in adapters(policy.model).items():
            whole, got = layer.weight.float() + layer.scale * layer.lora_b @ layer.lora_a, opened.get_submodule(name).weight
            steps = 2 ** -7 if save_dtype == torch.bfloat16 else 0  # at most one
            assert ((got - whole).abs() <= steps * torch.maximum(got.abs(), whole.abs())).all(), name
    assert policy.model.dtype == torch.bfloat16


def test_rounding_by_chance_hand_made():
    """From 1 on a step of bfloat16 is 1/128, from -0.5 on 1/256. A quarter above a number becomes the next in 1 of 4."""
    steps = torch.tensor([0.0, 0.25, 0.5, 0.99])
    for start, step in ((1.0, 1 / 128), (-0.5, -1 / 256)):
        rounded = round_by_chance((start + steps * step).repeat(4000, 1)).float()
        assert set(rounded.unique().tolist()) == {start, start + step}
        assert torch.allclose((rounded != start).float().mean(0), steps, atol=0.03)
        assert (rounded[:, 0] == start).all(), "what bfloat16 can write stays"


@torch.no_grad()
def test_an_adapter_below_half_a_step_of_the_base_is_not_lost(policy, tmp_path):
    """The nearest numbers of bfloat16 were W again in most places: of this adapter 2% were left, in exports and where one
    was loaded."""
    export_policy(policy, tmp_path / "base", torch.bfloat16)
    policy = load_policy(str(tmp_path / "base"), CPU, torch.bfloat16)
    base = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    policy = with_adapters(policy)
    for layer in adapters(policy.model).values():
        layer.lora_b.data *= 1e-4
    export_policy(policy, tmp_path / "final", torch.bfloat16)
    for folder in ("final", "final/adapter"):
        opened, along, length = load_policy(str(tmp_path / folder), CPU, torch.bfloat16).model, 0.0, 0.0
        for name, layer in adapters(policy.model).items():
            want = layer.scale * layer.lora_b @ layer.lora_a
            got = opened.get_submodule(name).weight.float() - base[f"{name}.weight"].float()
            along, length = along + (got * want).sum(), length + want.square().sum()
        assert along / length == pytest.approx(1, abs=0.1), folder


def test_peft_opens_the_adapter_to_the_same_logits(policy, prompts, tmp_path):
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(policy)
    save_adapter(with_adapters(policy).model, tmp_path / "adapter")
    rollouts = sample_rollouts(policy, prompts, keys(4, 1), 8)
    opened = peft.PeftModel.from_pretrained(base.model, tmp_path / "adapter").merge_and_unload()
    scorer = CompletionScorer(opened, policy.forbidden_ids)
    assert torch.allclose(scorer(rollouts)[0], score(policy, rollouts)[1], atol=1e-4)


@pytest.mark.parametrize(("change", "message"), [
    ({"bias": "all"}, "expected an adapter without bias 'all'"),
    ({"use_dora": True}, "expected an adapter without use_dora True"),
    ({"rank_pattern": {"q_proj": 8}}, "expected an adapter without rank_pattern {'q_proj': 8}"),
    ({"modules_to_save": ["lm_head"]}, r"expected an adapter without modules_to_save \['lm_head'\]"),
    ({"init_lora_weights": "pissa_niter_4"}, "expected an adapter without init_lora_weights 'pissa_niter_4'"),
    ({"something_new": {"a": 1}}, "expected an adapter without something_new {'a': 1}"),
    ({"peft_type": "IA3"}, "expected an adapter with peft_type 'LORA', found 'IA3'"),
    ({"r": -4}, "expected an adapter's r, more than 0, in adapter_config.json, found -4"),
    ({"r": "4"}, "expected an adapter's r, more than 0, in adapter_config.json, found '4'"),
    ({"lora_alpha": None}, "expected an adapter's lora_alpha, more than 0, in adapter_config.json, found None"),
    ({"base_model_name_or_path": 7}, "expected an adapter's base_model_name_or_path in .*, found 7: .*adapter.BASE"),
    ({"base_model_name_or_path": "runs/gone/base"},
     "^runs/gone/base: expected a model's folder or a hub name, found no such folder; it is the base of .*/adapter: "
     r".*/adapter\+BASE names another$"),
    ({"base_model_name_or_path": "some/model"}, r"^some/model: expected a policy's folder .*; it is the base of .*adapter"),
    ({"base_model_name_or_path": "ADAPTER"}, r"adapter: .*expected a base that is a whole model, found this adapter again"),
])
def test_an_adapter_that_is_more_or_whose_base_is_gone_is_refused(policy, tmp_path, change, message):
    save_adapter(with_adapters(policy).model, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    change = {key: str(tmp_path / "adapter") if value == "ADAPTER" else value for key, value in change.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_policy(str(tmp_path / "adapter"), CPU)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_file_of_weights_that_is_cut_off_is_refused(policy, tmp_path, size):
    export_policy(policy, tmp_path / "base", torch.float32)
    policy.model.name_or_path = str(tmp_path / "base")
    save_adapter(with_adapters(policy).model, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="adapter: expected .* \\(expected weights in adapter_model.safetensors"):
        load_policy(str(tmp_path / "adapter"), CPU)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"^{path}: expected weights, found Git LFS's pointer to it: run git lfs pull"):
        load_policy(str(tmp_path / "adapter"), CPU)
    for content in ("", "[1]", "{"):
        (tmp_path / "adapter/adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match="adapter: .* \\(expected an adapter's settings in adapter_config.json"):
            load_policy(str(tmp_path / "adapter"), CPU)


def test_a_base_is_what_the_adapter_names_or_the_path_says(policy, tmp_path, monkeypatch):
    """An adapter on an adapter on a base, moved to where its own base is not; a folder's name has a "+"."""
    monkeypatch.chdir(tmp_path)
    export_policy(policy, Path("c++/base"), torch.float32)
    for base, adapter in (("c++/base", "first"), ("first", "second+more")):
        policy = with_adapters(load_policy(base, CPU))
        assert policy.model.name_or_path == base
        save_adapter(policy.model, Path(adapter))
        merge_adapters_(policy.model)
    want = policy.model.state_dict()
    assert find_model("second+more") == ("c++/base", ["second+more", "first"])
    Path("c++").rename("d+")
    with pytest.raises(ValueError, match=r"^c\+\+/base: .*; it is the base of first: first\+BASE names another$"):
        load_policy("second+more", CPU)
    opened = load_policy("second+more+first+d+/base", CPU)
    for name, value in opened.model.state_dict().items():
        assert torch.equal(value, want[name]), name
    assert opened.model.name_or_path == "second+more+first+d+/base"  # for the next adapter
    with pytest.raises(ValueError, match=r"^d\+/base\+first: expected a model's folder or a hub name, found no such folder$"):
        load_policy("d+/base+first", CPU)


def test_an_adapter_of_another_base_is_refused(policy, tmp_path):
    save_adapter(with_adapters(policy).model, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    merge_adapters_(policy.model)
    base = copy.deepcopy(policy.model)
    name = next(key for key in weights if key.endswith("q_proj.lora_A.weight"))
    of_base = "expected an adapter of this base"
    more = {name.replace("q_proj", "kv_proj"): weights[name].clone()}
    for changed, message in (
        ({}, "expected weights in adapter_model.safetensors, found none"),
        (weights | {name: weights[name][:3]}, of_base + r" and rank 4, with .* for .*q_proj, found {'A': \(3, "),
        (weights | {name: torch.zeros(4, 3)}, of_base + r" and rank 4, with .* for .*q_proj, found {'A': \(4, 3\)"),
        ({key.replace("layers.1", "layers.9"): value for key, value in weights.items()}, r"layers.1.*, found none"),
        (weights | more, of_base + ", found .*kv_proj, which is no linear layer of it"),
        ({key: value for key, value in weights.items() if key != name}, of_base + " .*q_proj, found {'B'"),
        ({key: value for key, value in weights.items() if "q_proj" not in key}, of_base + " .*q_proj, found none"),
        (weights | {name.replace("_A", "_magnitude_vector"): torch.ones(4)}, "lora_A and lora_B only, found .*magnitude"),
        (weights | {name.replace("lora_A", "base_layer"): torch.ones(4)}, "lora_A and lora_B only, found .*base_layer"),
        (weights | {name.replace("A.weight", "B.bias"): torch.ones(4)}, "lora_A and lora_B only, found .*lora_B.bias"),
        (weights | {PREFIX + "lm_head.weight": torch.ones(4)}, "lora_A and lora_B only, found .*lm_head.weight"),
        (weights | {name: torch.full_like(weights[name], math.nan)}, "expected finite numbers for .*q_proj, .* found others"),
        (weights | {name: torch.zeros_like(weights[name])}, "for .*q_proj, and not only zeros in A, found others"),
        (weights | {name: torch.full_like(weights[name], math.inf).bfloat16()}, "expected finite numbers for .*q_proj"),
        (weights | {name: torch.ones_like(weights[name]).int()}, "expected finite numbers for .*q_proj"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_adapter_(copy.deepcopy(base), tmp_path / "adapter")
    save_file(weights, path)
    for size, value in (("num_hidden_layers", 3), ("vocab_size", 750)):
        settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        settings["auto_mapping"][size] = value
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"this base .*, found one of another .*'{size}': {value}"):
            load_adapter_(base, tmp_path / "adapter")


def test_an_adapter_of_a_head_that_is_the_embedding_too_is_refused(policy, tmp_path):
    """Merged, it would change the embedding."""
    model, rank = policy.model, 2
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "target_modules": "lm_head"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    shapes = {"A": (rank, head.in_features), "B": (head.out_features, rank)}
    save_file({f"{PREFIX}lm_head.lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()},
              tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="found lm_head, which is no linear layer of it with weights of its own"):
        load_adapter_(model, tmp_path)


def test_adapters_of_older_transformers_and_of_short_floats_are_merged(policy, prompts, tmp_path):
    """Before transformers 4.52 the text layers were model.layers, the vision tower was visual."""
    base = copy.deepcopy(policy)
    with_adapters(policy, lora_targets=r"q_proj|visual\.blocks\..*qkv")
    save_adapter(policy.model, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = {key.replace("model.language_model.", "model.").replace("model.model.visual", "model.visual"): value.bfloat16()
               for key, value in load_file(path).items()}
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in weights
    assert f"{PREFIX}visual.blocks.0.attn.qkv.lora_B.weight" in weights
    save_file(weights, path)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "qkv"]}))
    load_adapter_(base.model, tmp_path / "adapter")
    merge_adapters_(policy.model)
    for (name, value), other in zip(policy.model.named_parameters(), base.model.parameters(), strict=True):
        assert torch.allclose(value, other, atol=0.02), name


SETTINGS = [
    "toy", "--lora-rank", "4", "--data", "toy:train:8", "--prompts-per-step", "4", "--group-size", "2",
    "--max-new-tokens", "16", "--audit-every", "0",
]


def test_killed_and_resumed_is_the_same_run_and_checkpoints_are_small(tmp_path):
    main([*SETTINGS, "--num-steps", "3", "--run-dir", str(tmp_path / "whole")])
    main([*SETTINGS, "--num-steps", "2", "--run-dir", str(tmp_path / "parts")])
    main([*SETTINGS, "--num-steps", "3", "--run-dir", str(tmp_path / "parts"), "--resume"])
    for name in ("metrics.jsonl", "final/model.safetensors", "final/adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    saved = sum(path.stat().st_size for path in (tmp_path / "whole/checkpoints/step_000003").iterdir())
    whole = (tmp_path / "whole/final/model.safetensors").stat().st_size
    assert saved < whole / 3  # adapters and their moments


def test_two_ranks_train_as_one(tmp_path):
    for num_ranks in (1, 2):
        arguments = [*SETTINGS, "--num-steps", "2", "--run-dir", str(tmp_path / str(num_ranks))]
        all_ranks(tmp_path, num_ranks, run_program, main, arguments)
    rows = [read_log(tmp_path / f"{n}/metrics.jsonl") for n in (1, 2)]
    for one, two in zip(*rows, strict=True):
        for key in ("reward", "loss", "kl", "grad_norm", "entropy"):
            assert math.isclose(one[key], two[key], rel_tol=1e-3, abs_tol=1e-5), key
    opened = [load_policy(str(tmp_path / f"{n}/final"), CPU).model.state_dict() for n in (1, 2)]
    for name, value in opened[0].items():
        assert torch.allclose(value, opened[1][name], atol=1e-5), name
    base = load_policy("data/toy/policy", CPU).model.state_dict()
    assert any(not torch.equal(value, base[name]) for name, value in opened[0].items())


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2 / 4), (True, 2 / 2)])
def test_the_scale_of_an_adapter_hand_computed(policy, tmp_path, use_rslora, scale):
    """alpha 2, rank 4: alpha / R, or alpha / sqrt(R) of rank-stabilized adapters (arXiv 2312.03732)."""
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = policy.model.get_submodule(name)
    before = layer.weight.detach().clone()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": use_rslora, "target_modules": [name]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    up, down = torch.ones(layer.out_features, 4), torch.full((4, layer.in_features), 0.25)
    save_file({f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up},
              tmp_path / "adapter_model.safetensors")
    load_adapter_(policy.model, tmp_path)
    assert torch.allclose(layer.weight, before + scale)  # each number of B A is 4 * 0.25
