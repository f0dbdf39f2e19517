"""Images in, captions out, batch by batch. Some are opened while others are captioned."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from PIL import Image

from data.io import ahead, check_text
from data.ranges import check_range
from grpo.policy import CAPTION_INSTRUCTION, Policy, Prompt
from grpo.rollout import sample_rollouts

PIXEL_BYTES = 1 << 31
"""Pixel values in memory at a time; a batch ends when it has more."""

OpenImage = Callable[[], Image.Image]
"""Raises ValueError, with the reason, for an image that cannot be opened."""


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """How captions are written."""

    instruction: str = CAPTION_INSTRUCTION
    """What the captioner is told."""
    temperature: float = 1.0
    """Temperature of captioning; 0 takes the most likely token."""
    max_new_tokens: int = 4096
    """Longest caption in tokens."""
    batch_size: int = 256
    """Images in memory at a time, at most. Their captions are written when all of them have one.
    Any value gives the same captions."""
    rollout_tokens: int = 524_288
    """Tokens that the sampler's cache has room for; finished captions give room to waiting ones."""
    loaders: int = 4
    """Threads that open and resize images while others are captioned."""

    def __post_init__(self):
        check_range(self, "max_new_tokens batch_size rollout_tokens loaders", at_least=1)
        check_range(self, "temperature", at_least=0)


def check_instruction(policy: Policy, instruction: str) -> None:
    """Raises ValueError for an instruction that cannot be used, as one with an image's token."""
    check_text("instruction", instruction)
    policy.prompt(Image.new("RGB", (56, 56)), instruction)


def caption_batches(policy: Policy, images: Iterable[tuple[str, OpenImage]], settings: Captioning,
                    seed: int, num_captions: int = 1) -> Iterator[list[list[dict]]]:
    """For each batch of images, in their order: the rows of each image.

    images: (name, open). The random streams of an image depend on the seed and its name only. So no
    batch, no thread and no budget changes a caption.

    An image has `num_captions` rows with `caption`, `tokens` and `finish_reason`: "stop", or
    "length" where it was cut off. One that could not be opened has one row, with the `error`.
    Raises ValueError for an instruction that cannot be used, which is no fault of the images.
    """

    def caption(batch: list[tuple[str, Prompt | str]]) -> list[list[dict]]:
        opened = [(name, prompt) for name, prompt in batch if isinstance(prompt, Prompt)]
        keys = [f"{seed}:{name}:caption:{k}" for name, _ in opened for k in range(num_captions)]
        rows = _caption_rows(policy, [prompt for _, prompt in opened], keys, settings)
        return [
            [{"error": prompt}] if isinstance(prompt, str) else list(islice(rows, num_captions))
            for _, prompt in batch
        ]

    check_instruction(policy, settings.instruction)
    batch, size = [], 0
    for name, prompt in _load_ahead(policy, images, settings.instruction, settings.loaders):
        batch.append((name, prompt))
        size += prompt.pixel_values.nbytes if isinstance(prompt, Prompt) else 0
        if len(batch) == settings.batch_size or size > PIXEL_BYTES:
            yield caption(batch)
            batch, size = [], 0
    if batch:
        yield caption(batch)


def _caption_rows(policy: Policy, prompts: list[Prompt], keys: list[str],
                  settings: Captioning) -> Iterator[dict]:
    """A row for each key, those of a prompt adjacent. Nothing is run until one is asked for."""
    rollouts = sample_rollouts(policy, prompts, keys, settings.max_new_tokens,
                               settings.temperature, settings.rollout_tokens)
    columns = (rollouts.captions, rollouts.lengths.tolist(), rollouts.truncated.tolist())
    for text, num_tokens, is_cut in zip(*columns):
        reason = "length" if is_cut else "stop"
        yield {"caption": text, "tokens": num_tokens, "finish_reason": reason}


def _load_ahead(policy: Policy, images: Iterable[tuple[str, OpenImage]], instruction: str,
                threads: int) -> Iterator[tuple[str, Prompt | str]]:
    """(name, prompt, or why there is none) in order; a few are made before they are asked for."""

    def load(image: tuple[str, OpenImage]) -> tuple[str, Prompt | str]:
        name, open_image = image
        try:
            return name, policy.prompt(open_image(), instruction)
        except ValueError as error:
            return name, str(error)

    return ahead(load, images, num_ahead=2 * threads, threads=threads)
