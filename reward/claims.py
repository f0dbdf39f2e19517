"""Is it true what a caption says? The part `correctness` of the reward, for who gives it a weight.

A caption is cut into claims, and a vision-language model, the checker, judges each against the
image. The part is the mean of the claims' probabilities. It says nothing of what a caption leaves
out: a single safe claim earns all of it. So it stands beside the accuracy, which asks for more.

Another model that judges, or another rule of what a claim is, goes here: `Checker`, `claims_of`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from data.choices import fold_choice
from data.examples import Example, ImageSource
from grpo.config import TrainConfig
from grpo.distributed import compute_dtype
from grpo.logprobs import HeadLogprobs
from grpo.policy import CAPTION_INSTRUCTION, Policy
from grpo.pretrained import load_policy
from reward.branches import branch_states, turn_end
from reward.caprl import ANSWER_START, NOT_FINITE, PromptWriter, Rewards, letter_logits, mean_score
from reward.style import empty_kinds, sentences

CLAIM_INSTRUCTION = "Is this statement about the image true? Reply with yes or no.\n\nStatement:"
YES_NO = (" yes", " no")
"""What may follow `ANSWER_START` in mode "yes". The first token of each is read."""


def claims_of(caption: str) -> list[str]:
    """The caption's claims, in order: its sentences, each once.

    A claim is a sentence as `sentences` cuts it. The items of a list are sentences, and so is a
    heading: what nobody checks would be the place for guesses. Two are the same if they are but for
    case and the sign at the end. Praise (`empty_kinds`) is of the caption, not of the image: no
    image can tell whether it holds, so it is no claim. A hedge is one.
    """
    claims: dict[str, str] = {}
    for sentence, kind in zip(sentences(caption), empty_kinds(caption), strict=True):
        if kind != "praise":
            claims.setdefault(fold_choice(sentence), sentence)
    return list(claims.values())


class Checker:
    """A vision-language model that judges claims about an image.

    mode "yes": P(yes) / (P(yes) + P(no)) of the next token, when it is asked whether the claim is
    true. For models that can judge.

    mode "likelihood": p(claim | image) / (p(claim | image) + p(claim | no image)), the claim being
    the model's own reply to the captioning instruction. At even odds this is the probability that
    the claim was written of this image and not of any. A claim that the image does not bear on has
    0.5. The two are probabilities of the whole claim, not of a mean word: one false word makes a
    long claim as unlikely as a short one. But words that do fit weigh against it: a claim that says
    several things is judged less surely than short ones.
    """

    def __init__(self, policy: Policy, mode: str = "yes", batch_size: int = 32):
        """batch_size: claims that are run at a time. Raises ValueError, in mode "yes", if yes and
        no begin with the same token."""
        self.policy, self.mode, self.batch_size = policy, mode, batch_size
        self.writer = PromptWriter(policy.tokenizer)
        self.turn_end = turn_end(policy)
        self.answer_ids = [self.writer.template_ids(answer)[0] for answer in YES_NO]
        if mode == "yes" and len(set(self.answer_ids)) == 1:
            raise ValueError(f"expected the checker's tokenizer to begin {YES_NO[0]!r} and "
                             f"{YES_NO[1]!r} with two tokens, got one; checker_mode likelihood "
                             "needs neither")

    @torch.no_grad()
    def __call__(self, image: ImageSource, claims: Sequence[str]) -> list[float]:
        """The probability that each claim holds, in [0, 1]; NaN where logits are not finite. Image
        and instruction are run once for all claims, which do not change each other's results."""
        if not claims:
            return []
        if self.mode == "yes":
            odds = self._log_odds_of_yes(image, claims)
        else:
            odds = self._log_likelihoods(image, claims) - self._log_likelihoods(None, claims)
        return odds.where(odds.isfinite(), torch.nan).sigmoid().tolist()

    def _log_odds_of_yes(self, image: ImageSource, claims: Sequence[str]) -> Tensor:
        """(claims,) float32: ln P(yes) - ln P(no). Not finite where a logit is not."""
        tail = self.writer.template_ids(self.turn_end + ANSWER_START)
        # The space is tokenized with the word that follows.
        rows = [self.writer.plain_ids(f" {claim}") + tail for claim in claims]
        branches = branch_states(self.policy, image, CLAIM_INSTRUCTION, rows, self.batch_size)
        last = torch.stack([states[-1] for states in branches])  # (claims, H)
        yes, no = letter_logits(self.policy.model, last, self.answer_ids).cpu().unbind(1)
        return yes - no

    def _log_likelihoods(self, image: ImageSource | None, claims: Sequence[str]) -> Tensor:
        """(claims,) float32: ln p of each claim as the reply, nats, summed over its tokens."""
        model, start = self.policy.model, self.writer.template_ids(self.turn_end)
        replies = [self.writer.plain_ids(claim) for claim in claims]
        rows = [start + reply for reply in replies]
        branches = branch_states(self.policy, image, CAPTION_INSTRUCTION, rows, self.batch_size)
        # The state of the token before each of the reply's tokens.
        before = torch.cat([states[len(start) - 1 : -1] for states in branches])  # (N, H)
        targets = torch.tensor([token for reply in replies for token in reply],
                               device=before.device)  # (N,)
        logprobs, _ = HeadLogprobs.apply(
            before, model.lm_head.weight, targets, 1.0,
            torch.tensor(self.policy.forbidden_ids, dtype=torch.long, device=before.device), False,
        )
        parts = logprobs.cpu().split(list(map(len, replies)))
        return torch.stack([part.sum() for part in parts])


def with_correctness(score: Callable[..., Rewards], config: TrainConfig,
                     device: torch.device) -> tuple[Callable[..., Rewards], Policy]:
    """A reward function with the part `correctness`, as the settings say, and its checker."""
    settings = config.reward_config
    checker = load_checker(settings.checker or config.policy, settings.checker_mode, device)
    weight = settings.correctness_weight
    return partial(add_correctness, score=score, checker=checker, weight=weight), checker.policy


def load_checker(path: str, mode: str, device: torch.device) -> Checker:
    """A frozen checker. Raises ValueError if the model cannot be used."""
    policy = load_policy(path, device, compute_dtype(device), writes=False)
    policy.model.requires_grad_(False)
    return Checker(policy, mode)


def judge_claims(captions: Sequence[str], images: Sequence[ImageSource], keys: Sequence[str],
                 checker: Callable[[ImageSource, Sequence[str]], list[float]]) -> list[list[dict]]:
    """For each caption, each claim with its `score`, the probability that it holds; None where it
    could not be judged (`failure`).

    Captions with equal `keys` are of one image. It is read once for all their claims, and a claim
    of several siblings is judged once.
    """
    claims, records = list(map(claims_of, captions)), [[] for _ in captions]
    for key in dict.fromkeys(keys):
        siblings = [place for place, other in enumerate(keys) if other == key]
        texts = list(dict.fromkeys(claim for place in siblings for claim in claims[place]))
        probs = dict(zip(texts, checker(images[siblings[0]], texts), strict=True))
        for place in siblings:
            records[place] = [claim_record(claim, probs[claim]) for claim in claims[place]]
    return records


def claim_record(claim: str, prob: float) -> dict:
    is_judged = math.isfinite(prob)
    return {"claim": claim, "score": prob if is_judged else None,
            "failure": "" if is_judged else NOT_FINITE}


def add_correctness(captions: Sequence[str], examples: Sequence[Example], keys: Sequence[str],
                    lengths: Sequence[int], score: Callable[..., Rewards],
                    checker: Callable[[ImageSource, Sequence[str]], list[float]],
                    weight: float) -> Rewards:
    """What `score` gives, and as one more part weight * the mean over the claims that could be
    judged. A caption without claims earns 0 for it: nothing was said. If none of its claims could
    be judged, its reward is NaN."""
    result = score(captions, examples, keys, lengths)
    claims = judge_claims(captions, [example.image for example in examples], keys, checker)
    earned = torch.tensor([mean_score(record) if record else 0.0 for record in claims])
    part = weight * earned  # (B,)
    return replace(
        result, rewards=result.rewards + part, parts=result.parts | {"correctness": part},
        weights=result.weights | {"correctness": weight}, claims=claims,
    )
