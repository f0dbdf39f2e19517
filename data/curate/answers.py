"""A vision-language model's answers to questions with options, with the image and without it."""

from collections.abc import Sequence

import torch

from data.examples import Example
from grpo.policy import Policy
from reward.branches import branch_states
from reward.caprl import Answer, Asked, PromptWriter, choose_letter, letter_logits

SEEING = """\
Answer a question about this image. Reply with the letter of one option.

Question:"""
BLIND = """\
Answer a question about an image that you cannot see. Choose the option that is likeliest to be \
right. Reply with the letter of one option.

Question:"""


def answer_by_options(model: Policy, writer: PromptWriter, example: Example, with_image: bool,
                      asked: Sequence[Asked], batch_size: int) -> list[Answer]:
    """The likeliest offered letter after "The answer is", with all options' probabilities. The
    image and what comes before the question are run once for all questions."""
    image, instruction = (example.image, SEEING) if with_image else (None, BLIND)
    rows = list(map(writer.question_ids, asked))
    branches = branch_states(model, image, instruction, rows, batch_size)
    last = torch.stack([states[-1] for states in branches])  # (questions, H)
    logits = letter_logits(model.model, last, writer.letter_ids).cpu()
    return [choose_letter(row[: len(question.options)]) for row, question in zip(logits, asked)]
