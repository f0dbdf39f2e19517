"""The memory that a rank needs: what is estimated is what is used."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import keys
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from bench.estimate import estimate_memory
from grpo.logprobs import CompletionScorer
from grpo.lora import add_adapters_
from grpo.pretrained import load_policy
from grpo.recipes import toy_config
from grpo.rollout import sample_rollouts
from tools.memory import rollout_bytes, step_images


@pytest.mark.parametrize("changes", [
    {}, {"freeze": "vision"}, {"max_new_tokens": 48, "group_size": 4}, {"lora_rank": 8},
])
def test_what_autograd_keeps_is_what_is_estimated(changes):
    """The tensors that the forward pass of a micro-batch saves, added up, against the estimate
    without head and pixels."""
    from data.toy.world import draw, make_scene
    from grpo.update import prepare_training_

    config = toy_config(**dict(prompts_per_step=3, group_size=8, max_new_tokens=64, kl_coef=0.0) | changes)
    policy = load_policy("data/toy/policy", torch.device("cpu"))
    endless = replace(policy, forbidden_ids=(*policy.forbidden_ids, *policy.eos_ids))
    prompts = [policy.prompt(draw(make_scene("train", 3)))] * 3
    rollouts = sample_rollouts(endless, prompts, keys(3, config.group_size), config.max_new_tokens)
    if config.lora.lora_rank:
        add_adapters_(policy.model, config.lora, config.freeze, seed=0)
    prepare_training_(policy.model, config)
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in policy.model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs = scorer(rollouts)[0]
    assert logprobs.requires_grad  # and so all that was saved is still there
    image_tokens = int(prompts[0].grid.prod()) // 4
    estimate = estimate_memory(policy.model, None, config, 1, False, len(prompts[0].input_ids), image_tokens, 0)
    text = policy.model.config.text_config
    tokens = 3 * (len(prompts[0].input_ids) + config.group_size * config.max_new_tokens)
    rows = min(512, 3 * config.group_size * config.max_new_tokens)
    head, logits = 4 * text.vocab_size * text.hidden_size, 4 * rows * text.vocab_size
    head *= not config.lora.lora_rank  # it is not trained then
    pixels = 4 * 4 * 3 * 4 * image_tokens * 1176
    inside = tokens * 4 * (2 * text.intermediate_size + 4 * text.hidden_size)
    assert sum(kept.values()) == pytest.approx(estimate["phase update"] - head - max(logits, inside) - pixels, rel=0.1)


def test_adapters_that_are_there_are_counted_once(policy):
    config = toy_config(lora_rank=8)
    before = estimate_memory(policy.model, None, config, 1, False, 40, 20, 0)
    add_adapters_(policy.model, config.lora, config.freeze, seed=0)
    assert estimate_memory(policy.model, None, config, 1, False, 40, 20, 0) == before


@pytest.mark.parametrize("vocab_size, rows", [(500, 0), (50_000, 160)])
def test_one_token_more_in_the_vocabulary(policy, vocab_size, rows):
    """Its row of the head's gradient; of a large vocabulary, whose logits outweigh a layer's
    gradients, a column of them."""
    text = policy.model.config.text_config
    config, sizes = toy_config(prompts_per_step=1, group_size=4, max_new_tokens=40), []
    for text.vocab_size in (vocab_size, vocab_size + 1):
        sizes.append(estimate_memory(policy.model, None, config, 1, False, 40, 20, 0)["phase update"])
    assert sizes[1] - sizes[0] == 4 * (text.hidden_size + rows)


def test_a_verifier_that_replies_holds_logits_of_every_row(policy, verifier_model):
    """8 captions with 4 questions under 2 shuffles are 64 rows. Each has logits as they came, in
    float32 and as probabilities, and 10 tokens more in the cache of 2 layers; these 10 of a caption
    are in the activations too."""
    text = verifier_model.config
    settings = dict(prompts_per_step=2, group_size=4, num_questions=4, num_shuffles=2, max_new_tokens=40)
    sizes = [
        estimate_memory(policy.model, verifier_model, toy_config(**settings, **mode), 1, False, 40, 20, 100)["phase verifier"]
        for mode in ({}, {"verifier_mode": "sample", "verifier_max_new_tokens": 10})
    ]
    keys = 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    activations = 4 * (3 * text.intermediate_size + 6 * text.hidden_size)
    assert sizes[1] - sizes[0] == 64 * text.vocab_size * 12 + 64 * 10 * keys + 8 * 10 * activations


@pytest.mark.parametrize(("vocab_size", "width", "rollout_tokens", "expected"), [
    (100, 2, 500, 16_000 + 58_368 + 55_296), (10_000, 2, 500, 16_000 + 720_000 + 43_520),
    (10_000, 4, 500, 32_000 + 480_000 + 43_520), (10_000, 2, 10, 7_040 + 240_000 + 19_840),
    (10_000, 2, 10**6, 28_160 + 960_000 + 79_360)])
def test_sampling_by_hand(vocab_size, width, rollout_tokens, expected):
    """A group has 20 + 2 * 100 = 220 tokens, so 2 of a rank's 4 fit, and their cache has 500 tokens of 2 * 2 layers * 4
    numbers. While captions have 64 tokens, groups have 148: 3 fit, with 6 rows of logits. Attention: a layer's cache once
    more and while it grows, in float32, which is 32,000 bytes, and 3 scores of 4 bytes for 2 * 2 rows, 2 heads and 120
    places, 11,520. A forward of 4 prompts: 20 * (6 * 8 + 3 * 16) = 1,920 numbers of the text, 4 * 12 * (8 * 8 + 3 * 16) =
    5,376 of the tower, and three times the pixels: 4 bytes of 48 * 4 patches of 3 * 2 * 2 * 2. One group is held in any
    case, and never more than the prompts."""
    text = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=1, num_attention_heads=2, head_dim=4, hidden_size=8,
                           intermediate_size=16, vocab_size=vocab_size)
    vision = SimpleNamespace(hidden_size=8, intermediate_size=16, temporal_patch_size=2, patch_size=2, spatial_merge_size=2)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text, vision_config=vision))
    config = toy_config(prompts_per_step=8, group_size=2, max_new_tokens=100, rollout_tokens=rollout_tokens)
    assert rollout_bytes(model, config, 2, width, prompt_tokens=20, image_tokens=12) == expected


def test_images_of_a_step_by_hand(policy):
    """A token is of 4 patches, a patch of 2 x 3 x 14 x 14 numbers; its features are 128. 2 images a rank of 4, 8 of one."""
    config, token = toy_config(prompts_per_step=8), 4 * 2 * 3 * 14 * 14
    assert step_images(policy.model, config, 4, 2, 20, is_gpu=True, has_features=False) == 2 * 20 * token * 2
    assert step_images(policy.model, config, 4, 2, 20, is_gpu=True, has_features=True) == 2 * 20 * 128 * 2
    assert step_images(policy.model, config, 1, 4, 20, is_gpu=False, has_features=False) == 2 * 8 * 20 * token * 4
    assert step_images(policy.model, config, 1, 4, 20, is_gpu=False, has_features=True) == 8 * 20 * (2 * token + 128) * 4
    cases = ({}, token), ({"freeze": "vision"}, token), ({"freeze": "vision+merger"}, 128), ({"lora_rank": 4}, 128)
    for changes, numbers in cases:
        four = estimate_memory(policy.model, None, toy_config(prompts_per_step=8, **changes), 4, True, 40, 20, 100)
        assert four["images"] == 2 * 20 * numbers * 2


def test_static_memory_hand_computed(policy):
    """1 parameter of the sampler: 2 bytes; of the trainer: 12 over the ranks that share it, 4 more
    in the update, for its gradient; of the reference: 2 over them."""
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    visual = sum(parameter.numel() for parameter in policy.model.model.visual.parameters())
    config = toy_config(prompts_per_step=8)
    four = estimate_memory(policy.model, policy.model, config, 4, True, 40, 20, 100)
    assert four["sampler's weights"] == four["verifier's weights"] == 2 * size
    assert four["masters and moments"] == 12 * size // 4 and four["reference"] == 2 * size // 4
    assert four["peak"] == sum(four[part] for part in four if not part.startswith(("phase", "peak"))) + max(
        four[part] for part in four if part.startswith("phase")
    )
    hybrid = estimate_memory(
        policy.model, None, replace(config, replicas=2, offload_reference=True), 4, True, 40, 20, 0
    )
    assert hybrid["masters and moments"] == 12 * size // 2
    assert hybrid["reference"] == hybrid["verifier's weights"] == 0
    one, many = (
        estimate_memory(
            policy.model, None, replace(config, micro_batch_tokens=1, prompts_per_step=prompts), 4, True, 40, 20, 0
        )["phase update"] for prompts in (4, 8)
    )
    assert many - one == 4 * size // 4  # the second micro-batch of a rank finds the gradients of the first
    frozen = estimate_memory(policy.model, None, replace(config, freeze="vision+merger"), 1, False, 40, 20, 0)
    assert frozen["masters and moments"] == 12 * (size - visual) + 4 * visual and frozen["sampler's weights"] == 0


@pytest.mark.parametrize("make", [
    lambda: BloomForCausalLM(BloomConfig(vocab_size=751, hidden_size=64, n_layer=2, n_head=4)),
    lambda: MambaForCausalLM(MambaConfig(vocab_size=751, hidden_size=64, num_hidden_layers=2)),
])
def test_verifiers_that_lack_settings_of_llama_are_estimated(policy, make):
    """No longest context, no width of the MLP, no key-value heads, no heads at all."""
    config = toy_config(prompts_per_step=4, group_size=2, max_new_tokens=20)
    with_it, without = (
        estimate_memory(policy.model, verifier, config, 1, False, 40, 20, 100) for verifier in (make(), None)
    )
    assert with_it["phase verifier"] > without["phase verifier"] == 0
