"""The captioner: a Hugging Face vision-language model, its prompts and the token ids that sampling has to know.

Tokenizer and image processor are loaded apart and image tokens expanded here: transformers' Qwen2.5-VL *processor*
needs torchvision for videos, which captions do not.
"""

import hashlib
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

# From its module: `transformers.AutoImageProcessor` of 5.17 wants torchvision before it looks which backend is asked for.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file, find_adapter_config_file

from grpo.decode import check_layers

INSTRUCTION = "Please describe this image in detail."
"""The paper's captioning prompt (section 3.1; also in every row of CapRL-QA-75K)."""

SOURCE_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)
"""What a checkpoint may have beside weights and generation_config.json."""

TEMPLATE_DATE = date(2025, 1, 1)
"""Today, to a chat template that asks for the date: a run that goes on tomorrow has the same prompts.
Ours."""

_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdDeFHIjmMpSuwxXyYzZ" for flag in ("", "-")]
_FIXED_DATE = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f"|replace({part!r}, {TEMPLATE_DATE.strftime(part)!r})" for part in _DIRECTIVES)
    + " }}{%- endmacro %}\n"
)
"""In front of a template, in place of the function that transformers gives it."""


@dataclass(frozen=True)
class Prompt:
    """One image and the instruction. T prompt tokens, the image's among them; N patches of D values."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (3, T) int64: time, height and width of M-RoPE
    pixel_values: Tensor  # (N, D) float32
    grid: Tensor  # (1, 3) int64: patches in time, height and width
    features: Tensor | None = None  # (image tokens, H): what a frozen vision tower makes of the pixels, once it is known

    @property
    def next_position(self) -> int:
        """Where the first completion token stands: an image takes up max(height, width) positions, not its tokens."""
        return int(self.position_ids.max()) + 1


@dataclass(frozen=True)
class Policy:
    """`model` and all that surrounds it. Of the checkpoint's generation_config only the ids of EOS and pad are used."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    eos_ids: tuple[int, ...]
    pad_id: int
    forbidden_ids: tuple[int, ...]
    """Image, video and vision markers, and ids without a token (vocabularies are padded): never
    sampled, and left out of the softmax everywhere alike."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """`SOURCE_FILES` of the checkpoint as they are: an export has them again."""

    def prompt(self, image: Image.Image, instruction: str = INSTRUCTION, answer_start: str = "") -> Prompt:
        """Up to the answer, of which the first words may be given. Raises ValueError for an image that the processor
        refuses (a side ratio over 200, for one) and for an instruction with an image placeholder in it."""
        pixels = self.image_processor(images=[image], return_tensors="pt")
        grid = pixels["image_grid_thw"]  # (1, 3)
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        text = chat_text(self.tokenizer, content)
        ids = self.tokenizer.encode(text + answer_start, add_special_tokens=False)
        image_id = self.model.config.image_token_id
        if ids.count(image_id) != 1:
            raise ValueError(f"expected one image placeholder in the chat template's prompt, got {ids.count(image_id)}")
        at, num_tokens = ids.index(image_id), int(grid.prod()) // self.image_processor.merge_size**2
        input_ids = torch.tensor(ids[:at] + [image_id] * num_tokens + ids[at + 1 :])
        position_ids, _ = self.model.model.get_rope_index(
            input_ids[None], mm_token_type_ids=(input_ids == image_id).int()[None], image_grid_thw=grid
        )
        return Prompt(input_ids, position_ids[:, 0], pixels["pixel_values"], grid)

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens that an image of so many pixels becomes."""
        return self.image_processor.get_number_of_image_patches(height, width) // self.image_processor.merge_size**2

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def names(self, ids: Sequence[int]) -> str:
        """Ids with their tokens, to be read; those without one are counted."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        named = [f"{i} {token}" for i, token in zip(ids, tokens) if token is not None]
        unnamed = [f"{tokens.count(None)} ids without a token"] if None in tokens else []
        return ", ".join(named + unnamed)


@torch.no_grad()
def encode_images(policy: Policy, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with their features, for a vision tower that no step changes. Qwen3-VL's, which feeds several layers, are
    left out: its tower runs in every pass."""
    inner = policy.model.model
    if hasattr(inner.visual, "deepstack_merger_list"):
        return list(prompts)
    device = policy.model.device
    found = [inner.get_image_features(p.pixel_values.to(device), p.grid.to(device)).pooler_output[0] for p in prompts]
    return [replace(prompt, features=features) for prompt, features in zip(prompts, found)]


@contextmanager
def image_inputs(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Iterator[dict[str, Tensor]]:
    """What a forward over these prompts, run inside, is given of their images. The tower is not run where features are
    known: transformers of all our versions ask this method for them, the older ones take no argument instead."""
    inner, known = model.model, [prompt.features for prompt in prompts]
    if is_known := all(features is not None for features in known):
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
                dtype: torch.dtype | Literal["auto"] = torch.float32, writes: bool = True) -> Policy:
    """A policy from a local folder or a hub name, in `dtype` or ("auto") as it was saved. Raises
    ValueError in one sentence if it is unusable. `writes`: see `make_policy`.

    In eval mode, where it stays even while it is trained: dropout would make the first ratio of a step differ from 1.
    """
    with loading(path, "policy"):
        tokenizer = load_tokenizer(path)
        chat_text(tokenizer, [{"type": "image"}])
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        model = load_model(AutoModelForImageTextToText, path, dtype)
        # The folder, or what of a hub repository is on this machine.
        folder = Path(cached_file(path, "config.json")).parent
        there = [name for name in SOURCE_FILES if (folder / name).is_file()]
        files = {name: (folder / name).read_bytes() for name in there}
        policy = make_policy(model.to(device).eval(), tokenizer, image_processor, writes)
        return replace(policy, files=files)


@contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Whatever is wrong with a checkpoint that is loaded inside becomes a ValueError in a sentence."""
    check_model_path(path)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of transformers, safetensors, jinja, huggingface_hub: each has its own
        reason = (str(error) or type(error).__name__).splitlines()[0][:400]
        raise ValueError(f"{path}: expected a {what}'s folder or a hub name ({reason})") from None


def check_model_path(path: str) -> None:
    """Raises ValueError for a folder that lacks part of a model, and for what is neither a folder nor like a hub name."""
    if Path(path).is_dir():
        for pattern, what in (("*.safetensors", "weights"), ("tokenizer*.json", "tokenizer")):
            if not list(Path(path).glob(pattern)):
                raise ValueError(f"{path}: expected a model folder with {pattern}, found no {what}")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ValueError(f"{path}: expected a model's folder or a hub name, found no such folder")


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """tokenizer.json as it was saved, with the chat template wherever the checkpoint has it.

    AutoTokenizer puts Qwen2's own word splitting in its place wherever the model is a Qwen2, which
    changes what a checkpoint trained with another one reads.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if not tokenizer.chat_template:  # only processors read chat_template.json
        tokenizer.chat_template = ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
    return tokenizer


def load_model(auto_class: type, path: str,
               dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """The model of a local folder or a hub name. Raises ValueError where a weight would be a random
    number, and where one that is for the model's own modules would be left out (of an adapter, or of
    a layer beyond config.json's). Weights of other modules may be there: a vision tower's."""
    if find_adapter_config_file(path):
        found = "an adapter (adapter_config.json): merge it into its base"
        raise ValueError(f"expected a whole model, found {found}")
    model, report = auto_class.from_pretrained(
        path, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    outer = ("", model.base_model_prefix)
    own = tuple(f"{name}." for name, _ in model.named_modules() if name not in outer)
    unused = [key for key in report["unexpected_keys"] if "lora_" in key or key.startswith(own)]
    shapes = [
        f"{key} {list(size)} for {list(wanted)}" for key, size, wanted in report["mismatched_keys"]
    ]
    faults = {
        "missing": report["missing_keys"], "of another shape": shapes,
        "that it has no place for": unused,
    }
    for fault, keys in faults.items():
        if keys:
            first = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise ValueError(f"{len(keys)} weights of {type(model).__name__} {fault}: {first}")
    return model


def chat_text(tokenizer: PreTrainedTokenizerBase, content: str | list[dict[str, str]]) -> str:
    """The text of a user's turn up to the answer. Raises ValueError if there is no chat template."""
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
    """Ids that end a text: generation_config's and the tokenizer's, as many checkpoints have one of
    their ends in one of the files only."""
    named = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    lists = [ids if isinstance(ids, list) else [ids] for ids in named if ids is not None]
    return tuple(sorted(set().union(*lists)))


def unnamed_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that the head has a row for and the tokenizer no token."""
    rows = range(len(model.get_output_embeddings().weight))
    return tuple(sorted(set(rows).difference(tokenizer.get_vocab().values())))


LAYOUT = (
    "model.visual", "model.get_rope_index", "model.get_image_features", "config.image_token_id",
    "config.video_token_id", "config.vision_start_token_id", "config.vision_end_token_id",
)
"""What a policy is asked for besides its text layers."""


def make_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                image_processor: BaseImageProcessor, writes: bool = True) -> Policy:
    """Raises ValueError for a model that is not laid out like Qwen2.5-VL and Qwen3-VL. One that only
    reads (a judge) may have text layers that grpo/decode.py does not compute: `writes` False."""
    parts = [(model, name) for name in LAYOUT]
    for owner, name in [*parts, (image_processor, "merge_size"), (image_processor, "patch_size")]:
        try:
            attrgetter(name)(owner)
        except AttributeError:
            lacking = f"{type(owner).__name__} without {name}"
            what = "the layout of Qwen2.5-VL or Qwen3-VL"
            raise ValueError(f"expected {what}, found {lacking}") from None
    if writes:
        check_layers(model)
    ends = eos_ids(model, tokenizer)
    if not ends:
        raise ValueError("expected an EOS id in the policy's generation_config or tokenizer, found none")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    config = model.config
    marks = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    marks |= {tokenizer.convert_tokens_to_ids(token) for token in ("<|vision_pad|>",) if token in tokenizer.get_vocab()}
    never = tuple(sorted(marks.union(unnamed_ids(model, tokenizer))))
    policy = Policy(model, tokenizer, image_processor, ends, pad_id, never)
    policy.prompt(Image.new("RGB", (64, 64)))  # a template or processor that does not fit: now
    return policy


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits of the shapes and values of all parameters, in whichever dtype and on
    whichever device they are. In threads, since hashing takes no GIL: seconds for 15 GB."""

    def digest(parameter: Tensor) -> bytes:
        found = hashlib.sha256(str(tuple(parameter.shape)).encode())
        found.update(parameter.detach().cpu().float().flatten().numpy())
        return found.digest()

    with ThreadPoolExecutor(8) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, model.parameters()))).hexdigest()[:16]
