"""The exported policy opens elsewhere to the same model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import full_disk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from grpo.export import export_policy
from grpo.pretrained import load_policy


def test_the_saved_policy_opens_in_transformers_with_the_same_logits(policy, prompts, tmp_path):
    export_policy(policy, tmp_path / "final", torch.float32)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    prompt = prompts[0]
    batch = dict(
        input_ids=prompt.input_ids[None], attention_mask=torch.ones_like(prompt.input_ids)[None],
        pixel_values=prompt.pixel_values, image_grid_thw=prompt.grid,
        mm_token_type_ids=(prompt.input_ids == policy.model.config.image_token_id).int()[None],
    )
    for name, saved in policy.model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], saved), name
    # transformers embeds patches by a convolution, ours by a product: sums in another order, off by
    # 7e-5 in logits of up to 4.
    assert torch.allclose(opened(**batch).logits, policy.model(**batch).logits, atol=3e-4)
    again = load_policy(str(tmp_path / "final"), torch.device("cpu"))
    assert again.eos_ids == policy.eos_ids and again.forbidden_ids == policy.forbidden_ids
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template


TEXT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def flat_checkpoint(folder: Path, is_tied: bool) -> None:
    """The toy policy in the layout in which Qwen2.5-VL is published: text settings at the top level,
    names of before transformers 5, the chat template in chat_template.json. The one inside tokenizer_config.json takes
    text alone."""
    source = Path("data/toy/policy")
    shutil.copytree(source, folder)
    config, tokenizer, processor = (
        json.loads((source / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config", "preprocessor_config")
    )
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope, _ = text.pop("rope_parameters"), vision.pop("rope_parameters")
    vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": 14}
    vision.pop("model_type")
    config |= text | {
        "model_type": "qwen2_5_vl", "torch_dtype": config.pop("dtype"), "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": is_tied, "vision_config": vision, "transformers_version": "4.41.2",
    }
    sizes = processor.pop("size")
    processor |= {"min_pixels": sizes["shortest_edge"], "max_pixels": sizes["longest_edge"]}
    template = {"chat_template": (folder / "chat_template.jinja").read_text()}
    tokenizer |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEXT_TEMPLATE,
                  "additional_special_tokens": tokenizer.pop("extra_special_tokens")}
    (folder / "chat_template.jinja").unlink()
    for name, content in (("config", config), ("tokenizer_config", tokenizer), ("preprocessor_config", processor),
                          ("chat_template", template)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    if not is_tied:
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["nested", "flat, tied", "flat, untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_has_its_sources_files_and_opens_to_the_same_model(layout, dtype, tmp_path, prompts):
    """Tried by hand with transformers 4.57.6 and torch 2.13 on these folders: the logits of 4.57.6
    and of 5.24 are equal to the last bit, the head tied or not as it was. Before, 4.57 did not know
    the tokenizer's class, took rope_theta for 1,000,000 and drew a random head."""
    source = tmp_path / "source"
    if layout == "nested":
        shutil.copytree("data/toy/policy", source)
    else:
        flat_checkpoint(source, is_tied=layout == "flat, tied")
    first = load_policy(str(source), torch.device("cpu"), dtype)
    export_policy(first, tmp_path / "once", dtype)
    export_policy(load_policy(str(tmp_path / "once"), torch.device("cpu"), dtype), tmp_path / "twice", dtype)
    name = str(dtype).removeprefix("torch.")
    umask = os.umask(0)
    os.umask(umask)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        names = {path.name for path in source.iterdir()} | {"chat_template.jinja"}  # also for tokenizers alone
        assert {path.name for path in folder.iterdir()} == names
        assert PreTrainedTokenizerFast.from_pretrained(folder).chat_template == first.tokenizer.chat_template
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
        for file in ("tokenizer.json", "preprocessor_config.json"):
            assert (folder / file).read_bytes() == (source / file).read_bytes()
        config = json.loads((folder / "config.json").read_text())
        before = json.loads((source / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        if layout == "nested":
            assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == name
            text = config["text_config"]
            assert text["rope_theta"] == 10_000 and text["tie_word_embeddings"] and config["tie_word_embeddings"]
            assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [8, 12, 12]}
            assert text["rope_parameters"] == before["text_config"]["rope_parameters"]
            assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
            assert "<|im_start|>" in tokenizer["additional_special_tokens"]
        else:
            assert config["vision_config"].pop("torch_dtype") == name
            assert config == before | {"torch_dtype": name}
            assert (folder / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    prompt = prompts[0]
    batch = dict(
        input_ids=prompt.input_ids[None], attention_mask=torch.ones_like(prompt.input_ids)[None],
        pixel_values=prompt.pixel_values.to(dtype), image_grid_thw=prompt.grid,
        mm_token_type_ids=(prompt.input_ids == first.model.config.image_token_id).int()[None],
    )
    again = load_policy(str(tmp_path / "twice"), torch.device("cpu"), "auto")
    assert again.model.dtype == dtype
    head, embedding = again.model.lm_head.weight, again.model.get_input_embeddings().weight
    assert (head is embedding) == (layout != "flat, untied")
    assert torch.equal(again.model(**batch).logits, first.model(**batch).logits)
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert again.tokenizer.all_special_ids == first.tokenizer.all_special_ids


def test_a_template_among_the_processors_settings_is_exported_for_tokenizers_too(tmp_path):
    source = shutil.copytree("data/toy/policy", tmp_path / "source")
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    (source / "processor_config.json").write_text(json.dumps({"chat_template": template}))
    policy = load_policy(str(source), torch.device("cpu"))
    export_policy(policy, tmp_path / "final", torch.float32)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "final").chat_template == template


def test_an_export_of_a_source_without_a_tokenizers_config_or_with_rope_theta_elsewhere(tmp_path):
    """transformers 5 also reads a rope_theta that stands beside rope_parameters. Tried by hand: 4.57.6 opens the export
    with the same angles, 1 and 5000 ** (-2 / 64) first."""
    source = shutil.copytree("data/toy/policy", tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    del rope["rope_theta"]
    config["text_config"]["rope_theta"] = 5000.0
    (source / "config.json").write_text(json.dumps(config))
    first = load_policy(str(source), torch.device("cpu"))
    export_policy(first, tmp_path / "final", torch.float32)
    assert {path.name for path in (tmp_path / "final").iterdir()} == {path.name for path in source.iterdir()}
    text = json.loads((tmp_path / "final/config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_parameters"], text["rope_scaling"]) == (5000.0, rope, rope)
    again = load_policy(str(tmp_path / "final"), torch.device("cpu"))
    for policy in (first, again):
        angles = policy.model.model.language_model.rotary_emb.inv_freq
        assert angles[:2].tolist() == pytest.approx([1, 5000 ** (-2 / 64)])
    assert again.eos_ids == first.eos_ids and again.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_an_export_that_the_disk_does_not_take_leaves_the_one_before(policy, tmp_path):
    export_policy(policy, tmp_path / "final", torch.float32)
    with full_disk(), pytest.raises(ValueError, match=r"final: could not be written \(.*; .* free at "):
        export_policy(policy, tmp_path / "final", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    load_policy(str(tmp_path / "final"), torch.device("cpu"))


def test_an_export_is_on_the_disk_before_it_has_its_name(policy, tmp_path, monkeypatch):
    """After a power cut best/ had its name and empty files, and the next start did not write it again."""
    seen = []
    monkeypatch.setattr("os.sync", lambda: seen.append([path.name for path in tmp_path.iterdir()]))
    export_policy(policy, tmp_path / "best", torch.float32, about={"step": 1})
    assert seen == [["best.unfinished"]] and [path.name for path in tmp_path.iterdir()] == ["best"]
