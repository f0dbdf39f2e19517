"""The baseline that the paper compares with (section 4.3, Table 3). A vision-language judge sees
image and caption and rates the caption from 1 to 5. `judge_rewards` takes the place of
`caption_rewards` (`train.py --reward judge`).

The rating is the expected value over the probabilities of the five digits, so that close captions
get different ratings. The judge runs the image once for each caption, not once for each group.
"""

import math
from collections.abc import Sequence

import torch

from data.examples import Example
from data.images import open_image
from grpo.batch import count_together
from grpo.policy import Policy
from grpo.rollout import read_prompts
from reward.caprl import Rewards

RATINGS = ("1", "2", "3", "4", "5")

RATING_INSTRUCTION = """\
Rate how well the caption below describes the image. A good caption is right in everything that it \
says, and says everything that matters.
1: wrong or empty. 2: poor. 3: fair. 4: good. 5: complete and right.
Reply with one number.

Caption: """

RATING_START = "Rating: "
"""The judge's turn begins with these words, so that its next token is the digit."""


@torch.no_grad()
def judge_rewards(captions: Sequence[str], examples: Sequence[Example], keys: Sequence[str],
                  lengths: Sequence[int], judge: Policy, batch_size: int = 8) -> Rewards:
    """(expected rating - 1) / 4, in [0, 1]; NaN where the judge's logits are not finite.

    `keys` and `lengths` are not used: nothing is drawn. Raises ValueError if the judge's tokenizer
    does not write a digit as one token.
    """
    digit_ids = [judge.tokenizer.encode(rating, add_special_tokens=False) for rating in RATINGS]
    if any(len(ids) != 1 for ids in digit_ids):
        raise ValueError("expected the judge's tokenizer to write each of the digits '1' to '5' as "
                         "one token")
    digit_ids = [ids[0] for ids in digit_ids]
    logits = []
    for start in range(0, len(captions), batch_size):
        batch = slice(start, start + batch_size)
        prompts = [
            judge.prompt(open_image(example.image),
                         RATING_INSTRUCTION + as_plain_text(caption, judge), RATING_START)
            for caption, example in zip(captions[batch], examples[batch])
        ]
        while prompts:
            num = count_together([len(prompt.input_ids) for prompt in prompts])
            logits.append(read_prompts(judge, prompts[:num])[0][:, digit_ids].cpu())  # (b, 5)
            prompts = prompts[num:]
    probs = torch.cat(logits).softmax(-1)  # (B, 5)
    rewards = (probs @ torch.arange(5.0)) / 4  # (B,)
    records = [[rating_record(*row)] for row in zip(rewards.tolist(), probs.tolist())]
    return Rewards(rewards, {"judge": rewards}, records)


def rating_record(reward: float, probs: list[float]) -> dict:
    """The rating as a record of `caption_rewards`: one question, without a right option."""
    failure = "the judge's logits are not finite" if math.isnan(reward) else ""
    return {
        "question": "rating", "options": RATINGS, "gold": None, "source": 0, "abstain": None,
        "chosen": None, "correct": None, "score": None if failure else reward,
        "probs": [round(p, 4) for p in probs], "reply": "", "failure": failure,
    }


def as_plain_text(caption: str, judge: Policy) -> str:
    """The caption without the brackets of special tokens, which the chat template would take for
    real ones."""
    tokens = [token for token in judge.tokenizer.get_added_vocab() if token.strip("<|>") != token]
    while present := [token for token in tokens if token in caption]:  # a cut may make another
        for token in present:
            caption = caption.replace(token, token.strip("<|>"))
    return caption
