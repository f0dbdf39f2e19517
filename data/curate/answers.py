"""A vision-language model's answers to questions with options, with the image and without it."""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from data.examples import Example
from data.images import ImageSource, open_image
from grpo.policy import Policy, chat_text
from reward.caprl import Answer, Asked, PromptWriter, choose_letter, letter_logits, pad_left

SEEING = """\
Answer a question about this image. Reply with the letter of one option.

Question:"""
BLIND = """\
Answer a question about an image that you cannot see. Choose the option that is likeliest to be \
right. Reply with the letter of one option.

Question:"""


@torch.no_grad()
def answer_by_options(model: Policy, writer: PromptWriter, example: Example, with_image: bool,
                      asked: Sequence[Asked], batch_size: int) -> list[Answer]:
    """The likeliest offered letter after "The answer is", with all options' probabilities.

    The image and what comes before the question are run once for all questions.
    """
    ids, positions, pixels = _head(model, example.image if with_image else None)
    device = model.model.device
    head = DynamicCache(config=model.model.config.get_text_config())
    run = partial(model.model.model, use_cache=True)
    run(
        input_ids=ids[None].to(device), attention_mask=torch.ones_like(ids)[None].to(device),
        position_ids=positions[:, None].to(device), past_key_values=head,
        **{name: tensor.to(device) for name, tensor in pixels.items()},
    )
    answers = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        tokens, mask = pad_left(list(map(writer.question_ids, batch)), device)  # (B, L)
        cache = copy.deepcopy(head)
        cache.batch_select_indices(torch.zeros(len(tokens), dtype=torch.long, device=device))
        # Text goes on after the image: (3, B, L)
        places = (int(positions.max()) + mask.cumsum(1)).expand(3, -1, -1)
        seen = torch.cat([mask.new_ones(len(tokens), len(ids)), mask], dim=1)
        hidden = run(input_ids=tokens, attention_mask=seen, position_ids=places,
                     past_key_values=cache).last_hidden_state
        logits = letter_logits(model.model, hidden[:, -1], writer.letter_ids).cpu()  # (B, letters)
        offered = [row[: len(question.options)] for row, question in zip(logits, batch)]
        answers += map(choose_letter, offered)
    return answers


def _head(model: Policy, image: ImageSource | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The prompt up to the question, with the image or without it: token ids (T,), positions (3, T)
    and pixels."""
    instruction = BLIND if image is None else SEEING
    text = chat_text(model.tokenizer, [{"type": "text", "text": instruction}])
    tail = model.tokenizer.encode(text.split(instruction)[1], add_special_tokens=False)
    if image is None:
        ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))
        positions, pixels = torch.arange(len(ids)).expand(3, -1), {}
    else:
        prompt = model.prompt(open_image(image), instruction)
        ids, positions = prompt.input_ids, prompt.position_ids
        pixels = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid}
    if ids[-len(tail) :].tolist() != tail:
        raise ValueError("expected the chat template to end the user's turn with a special token")
    return ids[: -len(tail)], positions[:, : -len(tail)], pixels
