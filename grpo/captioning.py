"""Images in, captions out, batch by batch. Some are opened while others are captioned."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from PIL import Image

from data.io import ahead
from grpo.policy import CAPTION_INSTRUCTION, Policy, Prompt
from grpo.rollout import sample_rollouts

PIXEL_BYTES = 1 << 31
"""Pixel values in memory at a time; a batch ends when it has more."""

OpenImage = Callable[[], Image.Image]
"""Raises ValueError, with the reason, for an image that cannot be opened."""


def caption_batches(policy: Policy, images: Iterable[tuple[str, OpenImage]], *,
                    num_captions: int = 1, instruction: str = CAPTION_INSTRUCTION,
                    temperature: float, max_new_tokens: int, seed: int, batch_size: int = 256,
                    rollout_tokens: int = 524_288, loaders: int = 4) -> Iterator[list[list[dict]]]:
    """For each batch of images, in their order: the rows of each image.

    images: (name, open). The random streams of an image depend on the seed and its name only. So no
    batch, no thread and no budget changes a caption.

    An image has `num_captions` rows with `caption`, `tokens` and `finish_reason`: "stop", or
    "length" where it was cut off. One that could not be opened has one row, with the `error`.
    Raises ValueError for an instruction that cannot be used, which is no fault of the images.
    """

    def caption(batch: list[tuple[str, Prompt | str]]) -> list[list[dict]]:
        opened = [(name, prompt) for name, prompt in batch if isinstance(prompt, Prompt)]
        prompts = [prompt for _, prompt in opened]
        keys = [f"{seed}:{name}:caption:{k}" for name, _ in opened for k in range(num_captions)]
        rows = _caption_rows(policy, prompts, keys, max_new_tokens, temperature, rollout_tokens)
        return [
            [{"error": prompt}] if isinstance(prompt, str) else list(islice(rows, num_captions))
            for _, prompt in batch
        ]

    policy.prompt(Image.new("RGB", (56, 56)), instruction)
    batch, size = [], 0
    for name, prompt in _load_ahead(policy, images, instruction, loaders):
        batch.append((name, prompt))
        size += prompt.pixel_values.nbytes if isinstance(prompt, Prompt) else 0
        if len(batch) == batch_size or size > PIXEL_BYTES:
            yield caption(batch)
            batch, size = [], 0
    if batch:
        yield caption(batch)


def _caption_rows(policy: Policy, prompts: list[Prompt], keys: list[str], max_new_tokens: int,
                  temperature: float, rollout_tokens: int) -> Iterator[dict]:
    """A row for each key, those of a prompt adjacent."""
    if not prompts:
        return
    rollouts = sample_rollouts(policy, prompts, keys, max_new_tokens, temperature, rollout_tokens)
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
