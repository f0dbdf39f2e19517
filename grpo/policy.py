"""The captioner: a Hugging Face vision-language model, its prompts, and its special token ids.

Tokenizer and image processor are loaded one by one, and image tokens are repeated here. The
Qwen2.5-VL *processor* of transformers would do both, but needs torchvision, for videos.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

CAPTION_INSTRUCTION = "Please describe this image in detail."
"""The paper's captioning prompt (section 3.1; also in every row of CapRL-QA-75K)."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, by pinned memory: else the host waits for the device's work before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Prompt:
    """An image and the instruction: T tokens, the image's among them, and N patches of D values."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (3, T) int64: time, height and width of M-RoPE
    pixel_values: Tensor  # (N, D) float32, or as `on` has left them; (0, D) beside `features`
    grid: Tensor  # (1, 3) int64: patches in time, height and width
    features: Tensor | None = None  # (image tokens, H): a frozen vision tower's output, if known

    @property
    def next_position(self) -> int:
        """Position of the first completion token. An image counts as max(height, width) positions,
        not as its number of tokens."""
        return int(self.position_ids.max()) + 1

    def on(self, model: PreTrainedModel) -> "Prompt":
        """With its pixels on the model's device, in its dtype: sent once for all that read them."""
        return replace(self, pixel_values=send(self.pixel_values.to(model.dtype), model.device))


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


@torch.no_grad()
def encode_images(policy: Policy, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with their features in place of pixels, for a vision tower that no step changes.
    Qwen3-VL's come back as they are: its tower feeds several layers, so it runs in every pass."""
    inner = policy.model.model
    if hasattr(inner.visual, "deepstack_merger_list"):
        return list(prompts)
    encoded = []
    for prompt in prompts:
        pixels = prompt.pixel_values.to(policy.model.device)
        features = inner.get_image_features(pixels, prompt.grid).pooler_output[0]
        encoded.append(replace(prompt, pixel_values=pixels[:0].clone(), features=features))
    return encoded


def image_inputs(model: PreTrainedModel, input_ids: Tensor,
                 prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Tokens and images of a forward of `model`. input_ids: (rows, n) int64 on its device, with the
    image tokens of these prompts in their order. Raises ValueError if these are not as many as the
    images' features.

    Qwen2.5-VL gets embeddings (rows, n, H) in which the images' features are in their places. If
    all features are known, its tower does not run. transformers puts them there, too, but its
    backward pass waits for the device. For Qwen3-VL it is left to transformers, since that tower
    feeds several layers.
    """
    inner, known = model.model, [prompt.features for prompt in prompts]
    pixels = torch.cat([prompt.pixel_values for prompt in prompts]).to(model.device)
    grid = torch.cat([prompt.grid for prompt in prompts])  # on the host
    if hasattr(inner.visual, "deepstack_merger_list"):
        return {"input_ids": input_ids, "pixel_values": pixels, "image_grid_thw": grid}
    if any(features is None for features in known):
        known = inner.get_image_features(pixels, grid).pooler_output
    features = torch.cat(list(known))
    image_id = model.config.image_token_id
    num_tokens = sum(int((prompt.input_ids == image_id).sum()) for prompt in prompts)
    if num_tokens != len(features):
        raise ValueError(f"expected {num_tokens} features of images, one for each image token, "
                         f"found {len(features)}")
    embeds = inner.get_input_embeddings()(input_ids)
    # The places of image tokens come first, in their order.
    order = (input_ids.flatten() != image_id).int().argsort(stable=True)
    rows = embeds.flatten(0, 1).index_copy(0, order[: len(features)], features.to(embeds))
    return {"inputs_embeds": rows.view_as(embeds)}


def chat_text(tokenizer: PreTrainedTokenizerBase, content: str | list[dict[str, str]]) -> str:
    """The text of a user's turn up to the answer. Raises ValueError without a chat template."""
    if not tokenizer.chat_template:
        places = "chat_template.jinja, chat_template.json or tokenizer_config.json"
        raise ValueError(f"expected a chat template in {places}, found none")
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        from grpo.template_date import FIXED_DATE  # here: few templates tell the date

        template = FIXED_DATE + template
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
