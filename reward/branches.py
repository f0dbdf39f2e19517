"""Texts that go on from one prompt, with an image or without it: questions on it, claims about it.
The image and the prompt are run once for all of them."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from data.examples import ImageSource
from data.images import open_image
from grpo.policy import Policy, chat_text
from reward.caprl import pad_left

CACHE_TOKENS = 1 << 17
"""Tokens in the cache at a time, unless a row alone has more: the image is in it once for each row.
With 3 billion parameters in bfloat16 5 GB; 32 rows of an image of 16,000 tokens would take 19."""


def turn_end(model: Policy) -> str:
    """What the chat template writes after the user's text, up to the answer."""
    return chat_text(model.tokenizer, [{"type": "text", "text": "[TEXT]"}]).split("[TEXT]")[1]


@torch.no_grad()
def branch_states(model: Policy, image: ImageSource | None, instruction: str,
                  rows: Sequence[list[int]], batch_size: int) -> Iterator[Tensor]:
    """Of each row of token ids, the hidden states of its tokens: (its length, H).

    A row goes on where the user's turn has the image, if there is one, and the instruction. It ends
    that turn itself, see `turn_end`. batch_size: rows that are run at a time, at most.
    """
    ids, positions, pixels = _head(model, image, instruction)
    device = model.model.device
    head = DynamicCache(config=model.model.config.get_text_config())
    model.model.model(
        input_ids=ids[None].to(device), attention_mask=torch.ones_like(ids)[None].to(device),
        position_ids=positions[:, None].to(device), past_key_values=head, use_cache=True,
        **{name: tensor.to(device) for name, tensor in pixels.items()},
    )
    batch_size = max(1, min(batch_size, CACHE_TOKENS // len(ids)))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        tokens, mask = pad_left(batch, device)  # (B, L)
        cache = copy.deepcopy(head)
        cache.batch_select_indices(torch.zeros(len(tokens), dtype=torch.long, device=device))
        # Text goes on after the image: (3, B, L)
        places = (int(positions.max()) + mask.cumsum(1)).expand(3, -1, -1)
        seen = torch.cat([mask.new_ones(len(tokens), len(ids)), mask], dim=1)
        hidden = model.model.model(input_ids=tokens, attention_mask=seen, position_ids=places,
                                   past_key_values=cache, use_cache=True).last_hidden_state
        for row, states in zip(batch, hidden):
            yield states[-len(row) :]


def _head(model: Policy, image: ImageSource | None,
          instruction: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The user's turn up to the end of the instruction, with the image or without it: token ids
    (T,), positions (3, T) and pixels."""
    tail = model.tokenizer.encode(turn_end(model), add_special_tokens=False)
    if image is None:
        text = chat_text(model.tokenizer, [{"type": "text", "text": instruction}])
        ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))
        positions, pixels = torch.arange(len(ids)).expand(3, -1), {}
    else:
        prompt = model.prompt(open_image(image), instruction)
        ids, positions = prompt.input_ids, prompt.position_ids
        pixels = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid}
    if ids[-len(tail) :].tolist() != tail:
        raise ValueError("expected the chat template to end the user's turn with a special token")
    return ids[: -len(tail)], positions[:, : -len(tail)], pixels
