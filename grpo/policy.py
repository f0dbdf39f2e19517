"""The captioner: a Hugging Face vision-language model, its prompts, and its special token ids.

Tokenizer and image processor are loaded one by one, and image tokens are repeated here.
transformers' Qwen2.5-VL *processor* would need torchvision, for videos.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from operator import attrgetter
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

# From its module: `transformers.AutoImageProcessor` of 5.17 needs torchvision for any backend.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file, find_adapter_config_file

from data.io import text_hash

CAPTION_INSTRUCTION = "Please describe this image in detail."
"""The paper's captioning prompt (section 3.1; also in every row of CapRL-QA-75K)."""

SOURCE_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)
"""Files that a checkpoint may have beside weights and generation_config.json."""

TEMPLATE_DATE = date(2025, 1, 1)
"""The date for chat templates that ask for today's. So a run that is resumed tomorrow has the same
prompts. Ours."""

_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdDeFHIjmMpSuwxXyYzZ" for flag in ("", "-")]
_FIXED_DATE = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f"|replace({part!r}, {TEMPLATE_DATE.strftime(part)!r})" for part in _DIRECTIVES)
    + " }}{%- endmacro %}\n"
)
"""Put before a template, this macro replaces transformers' function of the same name."""


@dataclass(frozen=True)
class Prompt:
    """An image and the instruction: T tokens, the image's among them, and N patches of D values."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (3, T) int64: time, height and width of M-RoPE
    pixel_values: Tensor  # (N, D) float32
    grid: Tensor  # (1, 3) int64: patches in time, height and width
    features: Tensor | None = None  # (image tokens, H): a frozen vision tower's output, if known

    @property
    def next_position(self) -> int:
        """Position of the first completion token. An image counts as max(height, width) positions,
        not as its number of tokens."""
        return int(self.position_ids.max()) + 1


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, image processor and special ids. Of the checkpoint's
    generation_config only the ids of EOS and pad are used."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    eos_ids: tuple[int, ...]
    pad_id: int
    forbidden_ids: tuple[int, ...]
    """Image, video and vision markers, and ids without a token, since vocabularies are padded. They
    are never sampled, and every softmax leaves them out."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """`SOURCE_FILES` of the checkpoint, unchanged: an export writes them again."""

    def prompt(self, image: Image.Image, instruction: str = CAPTION_INSTRUCTION,
               answer_start: str = "") -> Prompt:
        """The prompt up to the answer, or up to the end of its given first words. Raises ValueError
        for an image that the processor refuses, such as one with a side ratio over 200, and for an
        instruction that contains an image placeholder."""
        pixels = self.image_processor(images=[image], return_tensors="pt")
        grid = pixels["image_grid_thw"]  # (1, 3)
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        text = chat_text(self.tokenizer, content)
        ids = self.tokenizer.encode(text + answer_start, add_special_tokens=False)
        image_id = self.model.config.image_token_id
        if ids.count(image_id) != 1:
            raise ValueError("expected one image placeholder in the chat template's prompt, got "
                             f"{ids.count(image_id)}")
        place = ids.index(image_id)
        num_tokens = int(grid.prod()) // self.image_processor.merge_size**2
        input_ids = torch.tensor(ids[:place] + [image_id] * num_tokens + ids[place + 1 :])
        position_ids, _ = self.model.model.get_rope_index(
            input_ids[None], mm_token_type_ids=(input_ids == image_id).int()[None],
            image_grid_thw=grid,
        )
        return Prompt(input_ids, position_ids[:, 0], pixels["pixel_values"], grid)

    def image_tokens(self, width: int, height: int) -> int:
        """Number of tokens of an image; width and height in pixels."""
        num_patches = self.image_processor.get_number_of_image_patches(height, width)
        return num_patches // self.image_processor.merge_size**2

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def names(self, ids: Sequence[int]) -> str:
        """Ids with their tokens, for messages; ids without a token are counted."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        named = [f"{i} {token}" for i, token in zip(ids, tokens) if token is not None]
        unnamed = [f"{tokens.count(None)} ids without a token"] if None in tokens else []
        return ", ".join(named + unnamed)


@torch.no_grad()
def encode_images(policy: Policy, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with their features, for a vision tower that no step changes. Qwen3-VL's prompts
    come back without: its tower feeds several layers, and so it runs in every pass."""
    inner = policy.model.model
    if hasattr(inner.visual, "deepstack_merger_list"):
        return list(prompts)
    device = policy.model.device
    encoded = []
    for prompt in prompts:
        pixels, grid = prompt.pixel_values.to(device), prompt.grid.to(device)
        features = inner.get_image_features(pixels, grid).pooler_output[0]
        encoded.append(replace(prompt, features=features))
    return encoded


@contextmanager
def image_inputs(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Iterator[dict[str, Tensor]]:
    """The image arguments of a forward over these prompts, which must run inside.

    If all features are known, the vision tower does not run. For this the method that returns its
    output is replaced: older transformers have no argument for known features.
    """
    inner, known = model.model, [prompt.features for prompt in prompts]
    is_known = all(features is not None for features in known)
    if is_known:
        inner.get_image_features = lambda *_, **__: BaseModelOutputWithPooling(pooler_output=known)
    try:
        yield {
            "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]).to(model.device),
            "image_grid_thw": torch.cat([prompt.grid for prompt in prompts]).to(model.device),
        }
    finally:
        if is_known:
            del inner.get_image_features


def load_policy(path: str, device: torch.device,
                dtype: torch.dtype | Literal["auto"] = torch.float32,
                writes: bool = True) -> Policy:
    """A policy from a local folder or a hub name, in `dtype` or, with "auto", as it was saved.
    Raises ValueError if it cannot be used. `writes`: see `make_policy`.

    The model is in eval mode, also when it is trained: dropout would move a step's first ratio away
    from 1.
    """
    with loading(path, "policy"):
        tokenizer = load_tokenizer(path)
        chat_text(tokenizer, [{"type": "image"}])
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        model = load_model(AutoModelForImageTextToText, path, dtype)
        # The local folder, or this machine's copy of the hub's.
        folder = Path(cached_file(path, "config.json")).parent
        names = [name for name in SOURCE_FILES if (folder / name).is_file()]
        files = {name: (folder / name).read_bytes() for name in names}
        policy = make_policy(model.to(device).eval(), tokenizer, image_processor, writes)
        return replace(policy, files=files)


@contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Any error of loading a checkpoint inside becomes a ValueError of one sentence."""
    check_model_path(path)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors, jinja and hub have their own classes
        reason = (str(error) or type(error).__name__).splitlines()[0][:400]
        raise ValueError(f"{path}: expected a {what}'s folder or a hub name ({reason})") from None


def check_model_path(path: str) -> None:
    """Raises ValueError for a folder that lacks part of a model, and for a path that is neither a
    folder nor like a hub name."""
    if Path(path).is_dir():
        for pattern, what in (("*.safetensors", "weights"), ("tokenizer*.json", "tokenizer")):
            if not list(Path(path).glob(pattern)):
                raise ValueError(f"{path}: expected a model folder with {pattern}, found no {what}")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ValueError(f"{path}: expected a model's folder or a hub name, found no such folder")


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """tokenizer.json as it was saved, with the chat template from any file that has it.

    For a Qwen2 model, AutoTokenizer would replace tokenizer.json's word splitting by Qwen2's own. A
    checkpoint trained with another splitting would then read other tokens.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if not tokenizer.chat_template:  # only processors read chat_template.json
        tokenizer.chat_template = ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
    return tokenizer


def load_model(auto_class: type, path: str,
               dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """The model of a local folder or a hub name.

    Raises ValueError if the checkpoint lacks a weight, which would then be random. Raises it too if
    a weight of the model's own modules has no place, as of an adapter or an additional layer.
    Weights of other modules, such as a vision tower, may be there.
    """
    if find_adapter_config_file(path):
        raise ValueError("expected a whole model, found an adapter (adapter_config.json): merge it "
                         "into its base")
    model, report = auto_class.from_pretrained(
        path, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
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


def chat_text(tokenizer: PreTrainedTokenizerBase, content: str | list[dict[str, str]]) -> str:
    """The text of a user's turn up to the answer. Raises ValueError without a chat template."""
    if not tokenizer.chat_template:
        places = "chat_template.jinja, chat_template.json or tokenizer_config.json"
        raise ValueError(f"expected a chat template in {places}, found none")
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False,
        add_generation_prompt=True,
    )


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a text, from generation_config and from the tokenizer. In many checkpoints
    neither file has all of them. Ids that the head has no row for are left out."""
    num_rows = len(model.get_output_embeddings().weight)
    settings = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    lists = [ids if isinstance(ids, list) else [ids] for ids in settings if ids is not None]
    return tuple(sorted(i for i in set().union(*lists) if 0 <= i < num_rows))


def unnamed_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids for which the head has a row and the tokenizer has no token."""
    rows = range(len(model.get_output_embeddings().weight))
    return tuple(sorted(set(rows).difference(tokenizer.get_vocab().values())))


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
    for owner, name in [*parts, (image_processor, "merge_size"), (image_processor, "patch_size")]:
        try:
            attrgetter(name)(owner)
        except AttributeError:
            raise ValueError("expected the layout of Qwen2.5-VL or Qwen3-VL, found "
                             f"{type(owner).__name__} without {name}") from None
    if writes:
        from grpo.layers import check_layers  # here: a reader of training need not meet it

        check_layers(model)
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
    template, image processor."""
    config = policy.model.config.to_dict()
    config.pop("transformers_version", None)
    template = policy.tokenizer.chat_template
    parts = [config, policy.image_processor.to_dict(), template, policy.eos_ids]
    settings = json.dumps(parts, sort_keys=True, default=str)
    tokenizer = policy.tokenizer.backend_tokenizer.to_str()
    return text_hash(f"{settings}{tokenizer}{policy.model.dtype} {weights_hash(policy.model)}")
