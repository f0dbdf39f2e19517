"""Checkpoints as they come: opened, checked, and refused in one sentence where they do not fit."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file, find_adapter_config_file
from transformers.utils.hub import cached_files

from data.io import check_fetched, read_json, text_hash
from grpo.distributed import check_alike, world_size
from grpo.policy import Policy, chat_text, eos_ids, unnamed_ids
from grpo.vision import prepare_vision_

SOURCE_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)
"""Files that a checkpoint may have beside weights and generation_config.json."""

# transformers prints a table of the weights that do not fit. `load_model` has a sentence for them.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "LOAD REPORT" not in record.getMessage()
)


HUB_NAME = r"[\w.-]+(/[\w.-]+)?"


def load_policy(path: str, device: torch.device,
                dtype: torch.dtype | Literal["auto"] = torch.float32,
                writes: bool = True) -> Policy:
    """A policy from a local folder or a hub name, in `dtype` or, with "auto", as it was saved.
    Raises ValueError if it cannot be used. `writes`: see `make_policy`.

    An adapter, as PEFT saves them, is merged into its base: see `find_model`. Tokenizer, chat
    template and image processor are the base's.

    The model stays in eval mode, also in training. Dropout would move a step's first ratio away
    from 1.
    """
    base, adapters = find_model(path)
    with loading(base, "policy", adapters):
        tokenizer = load_tokenizer(base, sees=True)
        try:
            chat_text(tokenizer, [{"type": "image"}])
        except TypeError as error:  # it adds a string to this list
            raise ValueError("expected a chat template for images, found one for text "
                             f"({error})") from None
        image_processor = load_image_processor(base)
        model = load_model(AutoModelForImageTextToText, base, dtype)
        # In the local folder, or from the hub, which is asked once for all of them.
        places = cached_files(base, list(SOURCE_FILES), _raise_exceptions_for_missing_entries=False)
        files = {Path(place).name: Path(place).read_bytes() for place in places or ()}
        policy = make_policy(model.to(device).eval(), tokenizer, image_processor, writes)
    for adapter in reversed(adapters):
        from grpo.lora import load_adapter_  # here: for who has adapters

        with loading(adapter, "policy"):
            weights = Path(cached_file(adapter, "adapter_model.safetensors"))
            check_fetched(weights, "weights")
            load_adapter_(model, weights.parent)
    model.name_or_path = path  # the base of an adapter that is trained next
    return replace(policy, files=files)


def find_model(path: str) -> tuple[str, list[str]]:
    """The whole model that a path names and, the outermost first, the adapters that change it.

    The path of an adapter is ADAPTER or ADAPTER+BASE. Without BASE, it is what adapter_config.json
    names; a relative path is one from the working directory. A base may have adapters too. Raises
    ValueError if one of them is no folder of a model and not like a hub name.
    """
    adapters: list[str] = []
    while True:
        parts = path.split("+")  # a folder's name may have it too: the longest that is there counts
        names = ["+".join(parts[:end]) for end in range(len(parts), 0, -1)]
        name = next((name for name in names if Path(name).is_dir()), parts[0])
        is_known = Path(name).is_dir() or re.fullmatch(HUB_NAME, name)
        with loading(name if is_known else path, "model", tuple(adapters)):
            config = find_adapter_config_file(name) if is_known else None
            if not config:
                return path, adapters
            if name in adapters:
                raise ValueError("expected a base that is a whole model, found this adapter again")
            adapters.append(name)
            from grpo.lora import read_settings  # here: for who has adapters

            base = read_settings(Path(config).parent).get("base_model_name_or_path")
            path = path[len(name) + 1 :] or base
            if not path or not isinstance(path, str):
                raise ValueError("expected an adapter's base_model_name_or_path in "
                                 f"adapter_config.json, found {path}: {name}+BASE names it")


@contextmanager
def loading(path: str, what: str, adapters: Sequence[str] = ()) -> Iterator[None]:
    """Any error of loading a checkpoint inside becomes a ValueError of one sentence. adapters:
    those whose base it is."""
    if not path:  # pathlib takes it for the working directory
        raise ValueError(f"expected a {what}'s folder or a hub name, got an empty text")
    try:
        if not Path(path, "adapter_config.json").is_file():
            check_model_path(path)
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors, jinja and hub have their own classes
        said = re.sub(r":\s*\n\s*", ": ", str(error))  # a line that announces the next one
        reason = (said or type(error).__name__).splitlines()[0][:400]
        if not reason.startswith((f"{path}: ", f"{path}/")):
            reason = f"{path}: expected a {what}'s folder or a hub name ({reason})"
        if adapters:
            reason += f"; it is the base of {adapters[-1]}: {adapters[-1]}+BASE names another"
        raise ValueError(reason) from None


def check_model_path(path: str) -> None:
    """Raises ValueError for a folder that lacks part of a model or has settings that cannot be read
    (transformers passes over some). Raises it too for a path that is neither a folder nor like a
    hub name."""
    if Path(path).is_dir():
        for pattern, what in (("*.safetensors", "weights"), ("tokenizer.json", "tokenizer")):
            if not list(Path(path).glob(pattern)):
                raise ValueError(f"{path}: expected a model folder with {pattern}, found no {what}")
            for file in named_files(Path(path), pattern):
                check_fetched(file, what)
        for file in map(Path(path).joinpath, (*SOURCE_FILES, "generation_config.json")):
            if file.suffix == ".json" and file.is_file():
                read_json(file, "a model's settings", dict)
    elif not re.fullmatch(HUB_NAME, path):
        raise ValueError(f"{path}: expected a model's folder or a hub name, found no such folder")


def named_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a model's folder. Of weights those that the index names, where there is one: a
    release may have others beside them."""
    index = folder / "model.safetensors.index.json"
    if pattern != "*.safetensors" or not index.is_file():
        return sorted(folder.glob(pattern))
    names = read_json(index, "the index of a model's weights", dict).get("weight_map", {})
    return [folder / name for name in sorted(set(names.values())) if (folder / name).is_file()]


def load_tokenizer(path: str, sees: bool = False) -> PreTrainedTokenizerFast:
    """tokenizer.json as it was saved, with the chat template from any file that has it. `sees`: the
    model gets images. Its template is its processor's, where that has one: in Qwen2.5-VL the one in
    tokenizer_config.json is for text alone.

    For a Qwen2 model, AutoTokenizer would replace tokenizer.json's word splitting by Qwen2's own. A
    checkpoint trained with another splitting would then read other tokens.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if sees or not tokenizer.chat_template:  # only processors read chat_template.json
        of_processor = ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
        tokenizer.chat_template = of_processor or tokenizer.chat_template
    return tokenizer


def load_image_processor(path: str) -> BaseImageProcessor:
    """The image processor, without torchvision. As in `load_model`, no code of a checkpoint is run:
    by default transformers would ask at the keyboard."""
    return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)


def load_model(auto_class: type, path: str,
               dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """The model of a local folder or a hub name.

    Raises ValueError if the checkpoint lacks a weight, which would then be random. Raises it too if
    one of the checkpoint's weights has no place in the model's own modules, such as an adapter's,
    or holds no numbers. Weights of other modules, such as a vision tower, may be there.
    """
    if find_adapter_config_file(path):
        raise ValueError("expected a whole model, found an adapter (adapter_config.json): merge it "
                         "into its base")
    model, report = auto_class.from_pretrained(
        path, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
        output_loading_info=True, trust_remote_code=False,
    )
    if not hasattr(model.config, "quantization_config"):  # transformers reads what that says
        check_weights(Path(cached_file(path, "config.json")).parent, model)
    outer = ("", model.base_model_prefix)
    own = tuple(f"{name}." for name, _ in model.named_modules() if name not in outer)
    unused = [key for key in report["unexpected_keys"] if "lora_" in key or key.startswith(own)]
    shapes = [f"{key} {list(saved)} for {list(shape)}"
              for key, saved, shape in report["mismatched_keys"]]
    faults = {
        "missing": report["missing_keys"], "of another shape": shapes,
        "that it has no place for": unused,
    }
    for fault, keys in faults.items():
        if keys:
            first = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise ValueError(f"{len(keys)} weights of {type(model).__name__} {fault}: {first}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # Weights decide, not config.json: a copy made from the config would tie a head that is not.
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    return model


FLOATS = ("F64", "F32", "F16", "BF16")
"""Data types of weights, as safetensors calls them."""


def check_weights(folder: Path, model: PreTrainedModel) -> None:
    """Raises ValueError for weights that transformers loads though they are none: of another data
    type, not finite, or nothing but zeros, as in a file that was not written to its end."""
    for path in named_files(folder, "*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.offset_keys():
                dtype = weights.get_slice(name).get_dtype()
                if name.endswith("weight") and dtype not in FLOATS:
                    raise ValueError(f"{path}: expected {name} in one of {', '.join(FLOATS)}, "
                                     f"found {dtype}")
    for name, weight in model.named_parameters():
        if not weight.numel() or weight.element_size() == 1:  # float8 has no order in torch
            continue
        low, high = map(float, torch.aminmax(weight.detach()))
        is_finite = math.isfinite(low) and math.isfinite(high)
        is_matrix = weight.ndim > 1 and name.endswith(".weight")  # a bias may be zeros
        if not is_finite or (low == high == 0 and is_matrix):
            raise ValueError(f"{folder}: expected finite numbers in {name}, and not only zeros, "
                             f"found {low} to {high}")


LAYOUT = (
    "model.visual", "model.get_rope_index", "model.get_image_features", "config.image_token_id",
    "config.video_token_id", "config.vision_start_token_id", "config.vision_end_token_id",
)
"""Attributes of a policy's model that are used here, besides its text layers."""


def make_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                image_processor: BaseImageProcessor, writes: bool = True) -> Policy:
    """The policy of a model. `writes` False is for a judge, which only reads: grpo/decode.py need
    not support its text layers. Raises ValueError if the model's layout is not Qwen2.5-VL's or
    Qwen3-VL's."""
    parts = [(model, name) for name in LAYOUT]
    sizes = ("merge_size", "patch_size", "temporal_patch_size")
    for owner, name in [*parts, *((image_processor, name) for name in sizes)]:
        try:
            attrgetter(name)(owner)
        except AttributeError:
            raise ValueError("expected the layout of Qwen2.5-VL or Qwen3-VL, found "
                             f"{type(owner).__name__} without {name}") from None
    if writes:
        from grpo.layers import check_layers  # here: a reader of training need not meet it

        check_layers(model)
    tower = model.model.visual.config
    wanted = tower.spatial_merge_size, tower.patch_size, tower.temporal_patch_size
    found = tuple(getattr(image_processor, name) for name in sizes)
    if found != wanted:
        raise ValueError(f"expected an image processor with the model's {', '.join(sizes)}, "
                         f"{wanted}, found {found}")
    check_config(model)
    from grpo.fused import fuse_  # here, too

    fuse_(model)
    prepare_vision_(model)
    ends = eos_ids(model, tokenizer)
    if not ends:
        raise ValueError("expected an EOS id in the policy's generation_config or tokenizer, found "
                         "none")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    config, vocabulary = model.config, tokenizer.get_vocab()
    markers = {config.image_token_id, config.video_token_id, config.vision_start_token_id,
               config.vision_end_token_id}
    if "<|vision_pad|>" in vocabulary:
        markers.add(vocabulary["<|vision_pad|>"])
    forbidden = tuple(sorted(markers.union(unnamed_ids(model, tokenizer))))
    policy = Policy(model, tokenizer, image_processor, ends, pad_id, forbidden)
    policy.prompt(Image.new("RGB", (64, 64)))  # so that a wrong template or processor raises now
    return policy


def check_config(model: PreTrainedModel) -> None:
    """Raises ValueError for settings of config.json that do not fit the weights, where transformers
    fails only when the model runs: sections of angles, heads of the tower, ids of the markers."""
    text, tower = model.config.get_text_config(), model.model.visual
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = text.rope_parameters or {}
    wanted = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
    if sum(rope.get("mrope_section") or [wanted]) != wanted:
        raise ValueError(f"expected a mrope_section that adds up to {wanted}, half of what is "
                         f"turned of a head, found {rope['mrope_section']}")
    width, heads = tower.blocks[0].attn.qkv.in_features, tower.config.num_heads
    if width % heads:
        raise ValueError(f"expected a num_heads that divides the tower's width, {width}, found "
                         f"{heads}")
    rows = len(model.get_output_embeddings().weight)
    for name in LAYOUT:
        if name.startswith("config.") and not 0 <= (found := attrgetter(name)(model)) < rows:
            raise ValueError(f"expected a {name} below {rows}, the rows of the vocabulary, found "
                             f"{found}")


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits: a hash of the shapes and float32 values of all parameters. Neither
    dtype nor device changes it. It runs in threads (hashing releases the GIL): seconds for 15 GB.
    """

    def digest(parameter: Tensor) -> bytes:
        shape_and_values = hashlib.sha256(str(tuple(parameter.shape)).encode())
        shape_and_values.update(parameter.detach().cpu().float().flatten().numpy())
        return shape_and_values.digest()

    with ThreadPoolExecutor(8) as pool:
        digests = b"".join(pool.map(digest, model.parameters()))
    return hashlib.sha256(digests).hexdigest()[:16]


def model_hash(policy: Policy) -> str:
    """16 hexadecimal digits of all that makes the captioner: weights, shapes, tokenizer, chat
    template, image processor. Wherever it lies they are the same."""
    config = policy.model.config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    template = policy.tokenizer.chat_template
    parts = [config, policy.image_processor.to_dict(), template, policy.eos_ids]
    settings = json.dumps(parts, sort_keys=True, default=str)
    tokenizer = policy.tokenizer.backend_tokenizer.to_str()
    return text_hash(f"{settings}{tokenizer}{policy.model.dtype} {weights_hash(policy.model)}")


def check_models(name: str, policy: Policy) -> None:
    """Raises ValueError, on all ranks, if one has another captioner. Every rank must call this."""
    if world_size() > 1:
        check_alike({name: model_hash(policy)})
