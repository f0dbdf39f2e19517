"""The trained policy as a Hugging Face folder, which opens with from_pretrained.

    RUN/export/step_000100/         the policy after 100 steps
    RUN/best/                       that of the best evaluation, whose line is its step.json
    RUN/final/                      the policy after the last step
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from data.io import free_at
from grpo.checkpoint import last_line
from grpo.lora import adapters, save_adapter
from grpo.policy import Policy


def export_policy(policy: Policy, folder: Path, dtype: torch.dtype, temperature: float = 1.0,
                  max_new_tokens: int = 4096, about: dict | None = None) -> None:
    """Writes weights in `dtype` (safetensors, 5 GB a file). Configuration, tokenizer and processor
    files are the source's own; a tokenizer finds its processor's chat template too. With
    transformers 4.57 and 5 the folder opens as the same model, without our code. Raises ValueError,
    and leaves nothing, if the disk refuses it.

    Adapters are merged. They are also written by themselves, to FOLDER/adapter, as PEFT reads them.

    Its generation_config samples as training did, whatever the initial checkpoint's said. So a
    server that reads it writes the captions that were rewarded. about: goes to its step.json.
    """
    model, layers = policy.model, adapters(policy.model)
    before, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=True, temperature=temperature, top_p=1.0, top_k=0, repetition_penalty=1.0,
        max_new_tokens=max_new_tokens, eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.pad_id,
    )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        weights = {}  # in the host's memory: beside a run's models a GPU may have no room
        for name, parameter in model.named_parameters():  # of two that are tied, the first
            owner, _, kind = name.rpartition(".")
            if kind not in ("lora_a", "lora_b"):
                is_changed = owner in layers and kind == "weight"
                value = layers[owner].merged(dtype) if is_changed else parameter
                weights[name] = value.detach().to("cpu", dtype)
        model.save_pretrained(unfinished, state_dict=weights, max_shard_size="5GB")
        if layers:
            save_adapter(model, unfinished / "adapter")
        if not policy.files:  # the policy was made in memory, not loaded from a checkpoint
            policy.tokenizer.save_pretrained(unfinished)
            policy.image_processor.save_pretrained(unfinished)
        for name, content in policy.files.items():
            (unfinished / name).write_bytes(content)
        if "chat_template.jinja" not in policy.files:  # tokenizers read only this
            template = policy.tokenizer.get_chat_template()
            (unfinished / "chat_template.jinja").write_text(template, encoding="utf-8")
        head = model.get_output_embeddings().weight
        _update_configs(unfinished, dtype, is_tied=head is model.get_input_embeddings().weight)
        if about:
            _write_json(unfinished / "step.json", about)
        for path in unfinished.rglob("*.*"):  # safetensors' files can be read by their owner only
            path.chmod(unfinished.stat().st_mode & 0o666)
        os.sync()  # as of a checkpoint: a power cut must not leave a name with empty files
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        room = free_at(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(f"{folder}: could not be written ({last_line(error)}; {room})") from None
    finally:
        model.generation_config = before


def _update_configs(folder: Path, dtype: torch.dtype, is_tied: bool) -> None:
    """Makes config.json state the dtype and the tying of these weights. Both JSON files also get
    the names that transformers 4.57 reads: rope_theta and rope_scaling, and the tokenizer's class.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    for part in (config, text, config["vision_config"]):
        part.pop("torch_dtype", None)
        part.pop("dtype", None)
        part[key] = str(dtype).removeprefix("torch.")
    for part in (config, text):
        part["tie_word_embeddings"] = is_tied
    rope = dict(text.get("rope_parameters") or {})
    if rope:
        if "rope_theta" in rope:  # elsewhere beside rope_parameters already
            text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
    _write_json(folder / "config.json", config)
    if not (folder / "tokenizer_config.json").is_file():
        return
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # the name in transformers 5
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        extra = tokenizer.pop("extra_special_tokens", [])
        if isinstance(extra, list):
            tokenizer["additional_special_tokens"] = extra
        _write_json(folder / "tokenizer_config.json", tokenizer)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
