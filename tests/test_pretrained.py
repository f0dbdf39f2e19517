"""Checkpoints as they are loaded: what fits, and what is refused in one sentence."""

import copy
import json
import logging
import re
import shutil

import pytest
import torch
import transformers as hf
from conftest import keys
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.toy.world import toy_examples
from grpo.config import RewardConfig
from grpo.pretrained import load_policy, make_policy
from grpo.rollout import sample_rollouts
from reward.caprl import caption_rewards, load_verifier

CPU = torch.device("cpu")
LOAD = {"policy": load_policy, "verifier": load_verifier}


@pytest.fixture
def copy_of(tmp_path):
    """A function: a copy of a shipped model, its weights and files changed."""

    def make(kind, change=lambda weights: weights, **config):
        folder = tmp_path / kind
        shutil.copytree(f"data/toy/{kind}", folder, dirs_exist_ok=True)
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        nested = settings.get("text_config", settings)
        nested |= config
        settings |= {key: config[key] for key in config if key in settings}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


def without(part):
    return lambda weights: {key: weight for key, weight in weights.items() if part not in key}


def beside(*new):
    return lambda weights: weights | {key: torch.ones(2, 2) for key in new}


UNUSABLE = {
    "no merger": (
        "policy", without("visual.merger"), {},
        "5 weights of Qwen2_5_VL.* missing: model.visual.merger.ln_q.weight, ",
    ),
    "no MLP": (
        "verifier", without("layers.3.mlp"), {},
        "3 weights of Qwen2For.* missing: model.layers.3.mlp.down_proj.weight, ",
    ),
    "no norm": (
        "verifier", without("model.norm"), {}, "1 weights of Qwen2For.* missing: model.norm.weight",
    ),
    "no head": (
        "policy", without("head"), {"tie_word_embeddings": False}, "missing: lm_head.weight",
    ),
    "shapes": (
        "policy", without("head"), {"vocab_size": 900},
        r"another shape: .*embed_tokens.weight \[751, 128\] for \[900, 128\]",
    ),
    "verifier's shapes": (
        "verifier", without("head"), {"intermediate_size": 400},
        r"18 weights .*another shape: .*\[128, 384\] for",
    ),
    "an adapter's weights": (
        "policy", beside("model.layers.0.mlp.up_proj.lora_A.weight"), {}, "no place for: .*lora_A",
    ),
    "a bias left out": (
        "verifier", beside("model.layers.1.self_attn.o_proj.bias"), {},
        "no place for: .*1.self_attn.o_proj.bias",
    ),
    "a layer left out": (
        "verifier", without("head"), {"num_hidden_layers": 5, "layer_types": None},
        r"no place for: model\.layers\.5\.",
    ),
}


@pytest.mark.parametrize("kind, change, config, message", UNUSABLE.values(), ids=UNUSABLE)
def test_a_weight_that_is_random_or_left_out_is_refused_with_its_name(copy_of, kind, change, config, message, caplog):
    """In one sentence, without transformers' table of the same weights before it."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with pytest.raises(ValueError, match=message) as caught:
        LOAD[kind](str(copy_of(kind, change, **config)), CPU)
    logger.removeHandler(caplog.handler)
    assert "\n" not in str(caught.value) and caplog.text == ""


@pytest.mark.parametrize("kind", ["policy", "verifier"])
def test_weights_of_other_modules_may_be_there(copy_of, kind):
    """A reward head, draft layers, the vision tower beside a text-only model, rotary buffers of old versions."""
    new = beside("v_head.weight", "mtp.layers.0.weight", "vision_tower.proj.weight",
                 "model.layers.0.self_attn.rotary_emb.inv_freq")
    LOAD[kind](str(copy_of(kind, new)), CPU)


@pytest.mark.parametrize(("kind", "message"), [
    ("policy", r"expected an adapter's base_model_name_or_path in adapter_config.json, found None"),
    ("verifier", r"expected a whole model, found an adapter \(adapter_config.json\): merge it"),
])
def test_half_an_adapter_is_refused(copy_of, kind, message):
    """The base's weights beside an adapter that would not be applied."""
    folder = copy_of(kind)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    with pytest.raises(ValueError, match=message):
        LOAD[kind](str(folder), CPU)


def test_the_shipped_models_write_and_earn_what_they_did():
    """Greedy captions and their rewards, as before checkpoints were looked at when loaded."""
    policy, verifier = load_policy("data/toy/policy", CPU), load_verifier("data/toy/verifier", CPU)
    examples = toy_examples("toy:heldout:3")
    prompts = [policy.prompt(example.image) for example in examples]
    captions = sample_rollouts(policy, prompts, keys(3, 1), 24, temperature=0).captions
    assert captions == [
        "The scene has four objects. The star is pink. The star is medium. The star is left. The triangle is",
        "The chart has four bars. The first bar is blue. The first bar is ten. The second bar is purple.",
        "This is a card. The title is park. The number is thirteen. The card is green. The frame is red",
    ]
    result = caption_rewards(captions, examples, ["a", "b", "c"], [24] * 3, verifier, RewardConfig())
    assert result.rewards.tolist() == [0.75, 0.5, 0.5]


MARKS = dict(image_token_id=749, video_token_id=750, vision_start_token_id=746, vision_end_token_id=747)
TEXT = dict(vocab_size=751, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
QWEN_VISION = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=16, spatial_merge_size=2,
                   temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=256, deepstack_visual_indexes=[0, 1])


def qwen3_vl(**text):
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3], mrope_interleaved=True)
    text = TEXT | {"rope_parameters": rope, "eos_token_id": 737, "pad_token_id": 738} | text
    return dict(text_config=text, vision_config=QWEN_VISION, **MARKS)


def qwen3_vl_moe():
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(**qwen3_vl(**experts)))


def qwen3_5():
    linear = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16,
                  linear_value_head_dim=16, num_hidden_layers=4)
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=TEXT | linear, vision_config=vision, **MARKS)
    )


def llama():
    return {"model_type": "llama", **TEXT}


OTHERS = {
    "Qwen3-VL-MoE": (qwen3_vl_moe, "found in layer 0 of Qwen3VLMoe.* no mlp.down_proj.weight but mlp.experts"),
    "Qwen3.5": (qwen3_5, "linear_attention"),
    "InternVL": (lambda: hf.InternVLForConditionalGeneration(hf.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=VISION | dict(image_size=[28, 28], patch_size=[14, 14]))), "without "),
    "Gemma 3": (lambda: hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1, image_token_index=742)), "without "),
    "LFM2-VL": (lambda: hf.Lfm2VlForConditionalGeneration(hf.Lfm2VlConfig(
        text_config={"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"]},
        vision_config={"model_type": "siglip2_vision_model", **VISION, "num_patches": 16},
        image_token_id=742)), "without "),
    "SmolVLM": (lambda: hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(
        text_config=llama(), vision_config=VISION, image_token_id=742)), "without "),
    "LLaVA": (lambda: hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        text_config=llama(), image_token_index=742,
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32})), "without "),
    "GLM-4V": (lambda: hf.Glm4vForConditionalGeneration(hf.Glm4vConfig(
        text_config=TEXT | {"rope_parameters": dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])},
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2,
                           out_hidden_size=64, patch_size=14, image_size=28),
        image_token_id=742, video_token_id=743)), "without "),
}


def test_an_image_processor_of_another_model_is_refused(policy, tokenizer):
    """Its images would have another number of tokens than the tower has features."""
    for name, number, found in (("merge_size", 4, "(4, 14, 2)"), ("patch_size", 16, "(2, 16, 2)"),
                                ("temporal_patch_size", 1, "(2, 14, 1)")):
        other = copy.deepcopy(policy.image_processor)
        setattr(other, name, number)
        message = ("expected an image processor with the model's merge_size, patch_size, temporal_patch_size, (2, 14, 2), "
                   f"found {found}")
        with pytest.raises(ValueError, match=re.escape(message)):
            make_policy(policy.model, tokenizer, other)


@pytest.mark.parametrize("make, message", OTHERS.values(), ids=OTHERS)
def test_models_of_another_layout_are_refused_when_they_are_loaded(policy, tokenizer, make, message):
    with pytest.raises(ValueError, match=f"expected .*{message}") as caught:
        make_policy(make(), tokenizer, policy.image_processor)
    assert "\n" not in str(caught.value)


def test_a_judge_may_have_layers_that_are_not_decoded(tokenizer):
    """Qwen3-VL-MoE rates: it is run as a whole, by its own forward."""
    processor = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 224 * 224})
    assert make_policy(qwen3_vl_moe().eval(), tokenizer, processor, writes=False)


def test_a_judge_is_loaded_without_a_look_at_what_is_decoded(monkeypatch):
    def refuse(model):
        raise ValueError("these layers are not decoded")

    monkeypatch.setattr("grpo.layers.check_layers", refuse)
    assert load_policy("data/toy/policy", CPU, writes=False)
    with pytest.raises(ValueError, match="these layers are not decoded"):
        load_policy("data/toy/policy", CPU)


class Halved(nn.Linear):
    """As LoRA's and quantised layers are: a Linear whose forward is not its weight."""

    def forward(self, x):
        return super().forward(x) / 2


class Shifted(nn.Module):
    """Gemma's norm."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


def replaced(name, kind):
    def change(model):
        part, _, last = f"model.language_model.{name}".rpartition(".")
        setattr(model.get_submodule(part), last, kind(model.get_submodule(f"{part}.{last}")))

    return change


def scale(model):
    model.model.language_model.layers[1].self_attn.scaling = 1.0


def halved(old):
    return Halved(old.in_features, old.out_features, bias=old.bias is not None)


def with_bias(old):
    return nn.Linear(old.in_features, old.out_features)


def scaled(old):
    return type("Scaled", (nn.Embedding,), {})(*old.weight.shape)


CHANGES = {
    "a projection": (
        replaced("layers.2.self_attn.v_proj", halved),
        "plain Linear for self_attn.v_proj.* in layer 2 of Qwen2_5.*, found Halved",
    ),
    "an MLP": (
        replaced("layers.0.mlp.down_proj", halved),
        "plain Linear for mlp.down_proj.weight in layer 0 .*, found Halved",
    ),
    "a wrapped projection": (
        replaced("layers.1.mlp.up_proj", nn.Sequential),
        "layer 1 of .* no mlp.up_proj.weight but mlp.up_proj.0.weight",
    ),
    "a bias that is not read": (replaced("layers.1.self_attn.o_proj", with_bias), "o_proj.bias"),
    "a norm": (replaced("layers.3.input_layernorm", Shifted), "plain RMS norms, found Shifted"),
    "the last norm": (replaced("norm", Shifted), "plain RMS norms, found Shifted"),
    "the embedding": (replaced("embed_tokens", scaled), "the embedding, found Scaled"),
    "the scale": (scale, "scaled by 1 / sqrt"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_layers_that_are_more_than_their_weights_are_refused(policy, change, message):
    """Decoding reads weights past the modules' forward."""
    change(policy.model)
    with pytest.raises(ValueError, match=f"expected .*{message}"):
        make_policy(policy.model, policy.tokenizer, policy.image_processor)


@pytest.mark.parametrize("part, change, message", [
    ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}},
     r"a mrope_section that adds up to 32, half of what is turned of a head, found \[4, 4, 4\]"),
    ("vision_config", {"num_heads": 3}, "a num_heads that divides the tower's width, 128, found 3"),
    ("", {"video_token_id": 151656}, "a config.video_token_id below 751, the rows of the vocabulary, found 151656"),
    ("", {"vision_start_token_id": -1}, "a config.vision_start_token_id below 751"),
])
def test_settings_that_do_not_fit_the_weights_are_named(copy_of, part, change, message):
    path = copy_of("policy") / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{path.parent}: expected .*expected {message}"):
        load_policy(str(path.parent), CPU)


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize(("setting", "value", "message"), [
    ("hidden_size", "128", "field 'hidden_size': .*expected int, got str"), ("num_hidden_layers", 99, r"\(99\) must be equal"),
])
def test_settings_of_another_type_are_named_with_what_was_found(copy_of, kind, setting, value, message):
    """The reason stands in the second line of transformers' message, which was cut off."""
    folder = copy_of(kind, **{setting: value})
    with pytest.raises(ValueError, match=f"^{folder}: expected a {kind}'s folder or a hub name .*{message}"):
        LOAD[kind](str(folder), CPU)


@pytest.mark.parametrize("name, what", [("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")])
def test_pointers_of_git_lfs_are_named(copy_of, name, what):
    """What a clone without LFS leaves in place of large files."""
    path = copy_of("policy") / name
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 7031673\n")
    with pytest.raises(ValueError, match=f"^{path}: expected {what}, found Git LFS's pointer to it: run git lfs pull"):
        load_policy(str(path.parent), CPU)
    path.unlink()
    with pytest.raises(ValueError, match=f"expected a model folder with .*, found no {what}"):
        load_policy(str(path.parent), CPU)


def test_weights_that_the_index_does_not_name_are_not_looked_at(copy_of):
    """Mistral's releases have the same weights once more, in one file."""
    folder = copy_of("policy")
    keys_of = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys_of, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    load_policy(str(folder), CPU)


def test_a_policys_template_is_its_processors_and_a_verifiers_its_tokenizers(copy_of):
    """Qwen2.5-VL's tokenizer_config.json has the template of Qwen2.5, which takes text alone."""
    for_text = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}\nA:"
    for kind in LOAD:
        folder = copy_of(kind)
        own = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": for_text}))
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": own}))
        assert LOAD[kind](str(folder), CPU).tokenizer.chat_template == (own if kind == "policy" else for_text)


def test_a_policy_whose_only_template_takes_text_is_refused(copy_of):
    folder = copy_of("policy")
    (folder / "chat_template.jinja").write_text("{{ 'A' + messages[0].content }}")
    with pytest.raises(ValueError, match=r"expected a chat template for images, found one for text \(can only conc"):
        load_policy(str(folder), CPU)


@pytest.mark.parametrize("kind", ["policy", "verifier"])
def test_a_template_in_chat_template_json_alone_is_read(copy_of, kind):
    folder = copy_of(kind)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    loaded = LOAD[kind](str(folder), CPU)
    assert loaded.tokenizer.chat_template == template


def test_a_policy_without_a_template_is_refused_before_its_weights_are_read(copy_of):
    folder = copy_of("policy")
    (folder / "chat_template.jinja").unlink()
    (folder / "model.safetensors").write_bytes(b"nobody reads this")
    with pytest.raises(ValueError, match="expected a chat template in chat_template.jinja, .* found none"):
        load_policy(str(folder), CPU)


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", "{% for part in messages[0].content %}<image>{% endfor %}"])
def test_a_template_that_shows_no_image_is_refused_when_loaded(copy_of, template):
    folder = copy_of("policy")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="expected one image placeholder in the chat template's prompt, got 0"):
        load_policy(str(folder), CPU)


@pytest.mark.parametrize("kind, file, settings", [
    ("verifier", "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}),
    ("policy", "preprocessor_config.json", {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.P"}}),
])
def test_code_of_a_checkpoint_is_not_run_and_nobody_is_asked(copy_of, kind, file, settings, monkeypatch):
    """transformers asked "run the custom code? [y/N]" in a terminal, on each rank, for 15 seconds."""
    folder = copy_of(kind)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    with pytest.raises(ValueError, match=rf"expected a {kind}'s folder .*contains custom code"):
        LOAD[kind](str(folder), CPU)


def test_a_head_that_is_stored_apart_is_untied_whatever_the_config_says(copy_of):
    """A copy made from the config, as each rank makes it, would tie it and train another model."""

    def apart(weights):
        embedding = next(weight for key, weight in weights.items() if "embed_tokens" in key)
        return weights | {"lm_head.weight": embedding + 0.5}

    model = load_policy(str(copy_of("policy", apart, tie_word_embeddings=True)), CPU).model
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings
    assert not model.config.get_text_config().tie_word_embeddings


def test_an_end_that_the_head_has_no_row_for_is_none(copy_of):
    folder = copy_of("policy")
    settings = json.loads((folder / "generation_config.json").read_text())
    ends = load_policy(str(folder), CPU).eos_ids
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [*ends, -1, 99999]}))
    assert load_policy(str(folder), CPU).eos_ids == ends


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_no_floating_point_numbers_are_refused(copy_of, kind, dtype, name):
    """transformers would take the whole numbers of a quantized model for weights."""
    def quantized(weights):
        key = next(key for key in weights if key.endswith("q_proj.weight"))
        return weights | {key: weights[key].to(dtype)}

    folder = copy_of(kind, quantized)
    with pytest.raises(ValueError, match=rf"model.safetensors: expected .*q_proj.weight in one of .*BF16, found {name}"):
        LOAD[kind](str(folder), torch.device("cpu"))


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_weights_that_hold_no_numbers_are_refused(copy_of, kind, value):
    """A download that ended early can leave a file of the right size with zeros at its end."""
    def damaged(weights):
        key = next(key for key in weights if key.endswith("3.mlp.down_proj.weight"))
        weights[key][0 if value else slice(None)] = value
        return weights

    folder = copy_of(kind, damaged)
    with pytest.raises(ValueError, match=f"{folder}: expected finite numbers in .*3.mlp.down_proj.weight, and not only zeros"):
        LOAD[kind](str(folder), CPU)


@pytest.mark.parametrize("kind", LOAD)
def test_a_bias_of_zeros_is_a_bias(copy_of, kind):
    def flat(weights):
        return {key: weight * 0 if key.endswith("bias") else weight for key, weight in weights.items()}

    LOAD[kind](str(copy_of(kind, flat)), CPU)


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_settings_that_are_cut_off_are_named(copy_of, kind, name):
    """transformers passes over generation_config.json, and the policy would lose one of its ends."""
    path = copy_of(kind) / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"^{path}: expected a model's settings"):
        LOAD[kind](str(path.parent), CPU)


def test_a_verifier_whose_states_overflow_is_refused(copy_of):
    def broken(weights):
        return {key: weight * 1e30 if "model.norm" in key else weight for key, weight in weights.items()}

    with pytest.raises(ValueError, match="come out nan apart"):
        load_verifier(str(copy_of("verifier", broken)), CPU)
