"""The reward of CapRL (arXiv 2509.22647, section 3.2), top to bottom: how useful is a caption to someone who cannot see
the image?

A text-only verifier answers multiple-choice questions about the image from the caption alone; the share it answers
rightly is the reward. The order of this file is the order of the work: draw questions and shuffle their options, write
the prompt, ask the verifier, read its answer, take the mean. `caption_rewards` at the end of that path calls them all.

Three things are kept apart that are easily mixed up: a wrong answer (0), a reply that cannot be read (0, and counted),
and a question that could not be scored at all (left out of the mean, and counted).
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data.examples import Question

LETTERS = "ABCDEFGHIJ"
ABSTAIN = "The caption does not say"

INSTRUCTION = """\
Answer a question about an image that you cannot see. All that you know about the image is its caption. \
Choose the option that the caption supports, even where another one seems more likely. \
Use no outside knowledge: what the caption does not say, you do not know. \
Reply with the letter of one option."""

WORKED_EXAMPLE = """\
Caption: <Caption Start> A brown dog sleeps on an old sofa next to a window. <Caption End>
Question: What is the dog doing?
A) eating
B) sleeping
C) running
D) barking
The answer is B"""

ABSTAIN_EXAMPLE = f"""\
Caption: <Caption Start> Two children play with a kite on a beach. <Caption End>
Question: What is written on the kite?
A) wind
B) {ABSTAIN}
C) hello
D) summer
The answer is B"""

SECOND_EXAMPLE = """\
Caption: <Caption Start> Two children play with a kite on a beach. <Caption End>
Question: How many children are there?
A) six
B) nine
C) eight
D) two
The answer is D"""

CAPTION_START, CAPTION_END = "<Caption Start>", "<Caption End>"
ANSWER_START = "The answer is"
"""The verifier's turn is begun with these words, so that its next token is the letter."""


# ------------------------------------------------------------------------------------- 1. what each caption is asked


@dataclass(frozen=True)
class Asked:
    """A question as the verifier sees it: options shuffled, the right one known by its place, never by its text."""

    question: str
    options: tuple[str, ...]
    gold: int
    """Place of the right option in `options`."""
    source: int
    """Place of the question among the image's questions."""
    abstain: int | None = None
    """Place of the abstain option, where one is offered; never the gold."""


def ask(questions: Sequence[Question], num_questions: int, key: str, abstain: bool = False) -> list[Asked]:
    """`num_questions` of the image's questions with shuffled options: a function of `key` alone.

    Drawn without replacement while they last; more than there are repeats the whole set in a new order. Captions that
    share a key are asked the same, in the same words and under the same letters (the published code redraws for
    each caption, so that part of the spread within a group is luck).
    """
    rng = random.Random(f"{key}:questions")
    places: list[int] = []
    while len(places) < num_questions:
        places += rng.sample(range(len(questions)), len(questions))
    return [shuffle_options(questions[place], place, rng, abstain) for place in places[:num_questions]]


def shuffle_options(question: Question, source: int, rng: random.Random, abstain: bool = False) -> Asked:
    if len(question.choices) + abstain > len(LETTERS):
        raise ValueError(f"expected at most {len(LETTERS) - 1} choices beside the abstain option: {question.question!r}")
    order = list(range(len(question.choices) + abstain))  # the last place, if there is one more, is the abstain option
    rng.shuffle(order)
    texts = [*question.choices, ABSTAIN]
    return Asked(
        question.question,
        tuple(texts[place] for place in order),
        gold=order.index(question.answer_index),
        source=source,
        abstain=order.index(len(question.choices)) if abstain else None,
    )


# ------------------------------------------------------------------------------------------------------- 2. the prompt


class PromptWriter:
    """Token ids of a prompt in three parts: the head (the same for all), the caption, the question.

    Each part is tokenized by itself, and caption and question with special tokens read as plain text, so that
    no caption can change the tokens around it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, abstain: bool = False):
        examples = f"{WORKED_EXAMPLE}\n\n{ABSTAIN_EXAMPLE if abstain else SECOND_EXAMPLE}"
        content = f"{INSTRUCTION}\n\n{examples}\n\nCaption: {CAPTION_START}[CAPTION] {CAPTION_END}\nQuestion:[QUESTION]"
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = content + "\n"
        if text.count("[CAPTION]") != 1 or text.count("[QUESTION]") != 1:
            raise ValueError("expected the verifier's chat template to show the user's text once, unchanged")
        head, rest = text.split("[CAPTION]")
        middle, tail = rest.split("[QUESTION]")
        self.tokenizer = tokenizer
        self.head_ids, self.middle_ids = self._template_ids(head), self._template_ids(middle)
        self.tail_ids = self._template_ids(tail + ANSWER_START)
        self.letter_ids = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
        if any(len(ids) != 1 for ids in self.letter_ids):
            raise ValueError("expected the verifier's tokenizer to write each of the letters ' A' to ' J' as one token")
        self.letter_ids = [ids[0] for ids in self.letter_ids]

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def caption_ids(self, caption: str) -> list[int]:
        """The caption and what separates it from the question. Block markers inside it lose their brackets."""
        for marker in (CAPTION_START, CAPTION_END):
            caption = re.sub(re.escape(marker), marker.strip("<>"), caption, flags=re.IGNORECASE)
        return self._plain_ids(" " + caption.strip()) + self.middle_ids

    def question_ids(self, asked: Asked) -> list[int]:
        lines = [f" {asked.question}", *(f"{letter}) {text}" for letter, text in zip(LETTERS, asked.options))]
        return self._plain_ids("\n".join(lines)) + self.tail_ids


# ------------------------------------------------------------------------------------------------------ 3. the verifier


@dataclass(frozen=True)
class Answer:
    """The verifier's answer to one question. `chosen` is a place in `options`; None is a reply that cannot be read."""

    chosen: int | None
    probs: tuple[float, ...] = ()
    """Probability of each option (mode "logits")."""
    reply: str = ""
    """What the verifier wrote (mode "sample")."""
    failure: str = ""
    """Why the question could not be scored; empty when it could."""


AskVerifier = Callable[[Sequence[str], Sequence[Sequence[Asked]], Sequence[str]], list[list[Answer]]]
"""(captions, questions for each, a key for each) -> answers for each. `Verifier` is one; a test passes a function."""


def prefill_(model: PreTrainedModel, rows: list[list[int]], parents: list[int], cache, seen: Tensor):
    """Run `rows`, each continuing the cached row `parents[i]`; the shared past is computed once, not once per row.

    Changes `cache`, which goes from P rows to B.
    seen: (P, T) 1 on the cached tokens that count. Returns hidden states (B, L, H), the cache and `seen` for the B rows.
    Rows are padded on the left, so the last state is at -1; padding is masked and takes no position.
    """
    device, width = seen.device, max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)  # (B, L)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    index = torch.tensor(parents, device=device)
    cache.batch_select_indices(index)
    seen = torch.cat([seen[index], mask], dim=1)  # (B, T + L)
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -width:]
    out = model.base_model(
        input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state, cache, seen


def option_logits(model: PreTrainedModel, head: list[int], captions: list[list[int]], questions: list[list[list[int]]],
                  letter_ids: list[int]) -> Tensor:
    """Logits of the letters at the answer's position, one row per (caption, question): (sum of questions, letters).

    Head, caption and question are token ids. The head is run once, each caption once, then each question.
    """
    _, cache, seen = prefill_captions(model, head, captions)
    rows = [row for group in questions for row in group]
    hidden, _, _ = prefill_(model, rows, [i for i, group in enumerate(questions) for _ in group], cache, seen)
    return F.linear(hidden[:, -1], model.get_output_embeddings().weight[letter_ids]).float()


def prefill_captions(model: PreTrainedModel, head: list[int], captions: list[list[int]]):
    """Hidden states (B, L, H), cache and mask of B captions, each after the head, which is run once."""
    cache = DynamicCache(config=model.config)
    seen = torch.ones(1, 0, dtype=torch.long, device=model.device)
    _, cache, seen = prefill_(model, [head], [0], cache, seen)
    return prefill_(model, captions, [0] * len(captions), cache, seen)


class Verifier:
    """A causal language model that answers from captions. Its scores do not depend on what shares a batch with them.

    mode "logits": the offered letter of highest probability at the answer's position; no sampling noise, no parsing.
    mode "sample": a reply of at most `max_new_tokens` tokens at `temperature`, read by `parse_choice` (the paper's way).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mode: str = "logits",
                 temperature: float = 0.6, max_new_tokens: int = 10,
                 token_budget: int = 262_144):
        if mode not in ("logits", "sample"):
            raise ValueError(f"expected verifier mode 'logits' or 'sample', got {mode!r}")
        self.model, self.tokenizer, self.mode = model, tokenizer, mode
        self.temperature, self.max_new_tokens, self.token_budget = temperature, max_new_tokens, token_budget
        self.writers = {abstain: PromptWriter(tokenizer, abstain) for abstain in (False, True)}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], asked: Sequence[Sequence[Asked]], keys: Sequence[str]) -> list[list[Answer]]:
        self.writer = self.writers[any(one.abstain is not None for group in asked for one in group)]
        caption_ids = [self.writer.caption_ids(caption) for caption in captions]
        question_ids = [[self.writer.question_ids(one) for one in group] for group in asked]
        answers: list[list[Answer]] = [[] for _ in captions]
        room = self.model.config.max_position_embeddings - len(self.writer.head_ids) - self.max_new_tokens
        fits = []
        for i, (caption, questions) in enumerate(zip(caption_ids, question_ids)):
            length = len(caption) + max(map(len, questions), default=0)
            if length > room:
                reason = f"caption and question have {length} tokens, the verifier has room for {room}"
                answers[i] = [Answer(None, failure=reason) for _ in questions]
            elif questions:
                fits.append(i)
        fits.sort(key=lambda i: len(caption_ids[i]))  # rows of one length waste no padding
        head = len(self.writer.head_ids)
        cached = [  # tokens in the cache once a caption is expanded over its questions
            len(q) * (head + len(c) + max(map(len, q), default=0)) for c, q in zip(caption_ids, question_ids)
        ]
        for batch in _batches(fits, cached, self.token_budget):
            part = [caption_ids[i] for i in batch], [question_ids[i] for i in batch], [asked[i] for i in batch]
            score = self._score if self.mode == "logits" else self._reply
            for i, answer in zip(batch, score(*part, [keys[i] for i in batch])):
                answers[i] = answer
        return answers

    def _score(self, captions, questions, asked, keys) -> list[list[Answer]]:
        logits = option_logits(self.model, self.writer.head_ids, captions, questions, self.writer.letter_ids).cpu()
        rows = iter(logits)
        return [[_choose(next(rows)[: len(one.options)]) for one in group] for group in asked]

    def _reply(self, captions, questions, asked, keys) -> list[list[Answer]]:
        _, cache, seen = prefill_captions(self.model, self.writer.head_ids, captions)
        parents = torch.tensor([i for i, group in enumerate(questions) for _ in group], device=seen.device)
        cache.batch_select_indices(parents)
        rows = [row for group in questions for row in group]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=seen.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=seen.device)
        past = seen.new_full((len(rows), seen.shape[1]), pad)  # generate skips as many ids as the cache holds
        draws = [f"{key}:{place}:reply" for key, group in zip(keys, questions) for place in range(len(group))]
        out = self.model.generate(
            input_ids=torch.cat([past, ids], dim=1),
            attention_mask=torch.cat([seen[parents], mask], dim=1),
            past_key_values=cache,
            logits_processor=[RowSampler(draws, self.temperature, self.max_new_tokens)],
            do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=self.max_new_tokens, pad_token_id=pad,
        )
        replies = iter(self.tokenizer.batch_decode(out[:, seen.shape[1] + width :], skip_special_tokens=True))
        return [
            [Answer(parse_choice(reply, one.options), reply=reply) for one, reply in zip(group, replies)] for group in asked
        ]


class RowSampler(LogitsProcessor):
    """Sampling inside `generate` with a random stream per row: a reply does not depend on the rows beside it."""

    def __init__(self, draws: list[str], temperature: float, max_new_tokens: int):
        self.temperature, self.step = temperature, 0
        streams = [torch.Generator().manual_seed(random.Random(draw).getrandbits(63)) for draw in draws]
        self.uniform = torch.stack([torch.rand(max_new_tokens, generator=stream) for stream in streams])  # (B, L)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cdf = (scores.double() / self.temperature).softmax(-1).cumsum(-1)  # float64: CUDA's float32 cumsum may fall
        threshold = self.uniform[:, self.step, None].to(cdf.device) * cdf[:, -1:]
        token = torch.searchsorted(cdf, threshold, right=True)
        self.step += 1
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)  # generate takes the arg-max of this


def _batches(items: list[int], tokens: list[int], budget: int):
    """Consecutive runs of `items`, sorted by length, whose number times the last one's tokens stays within `budget`."""
    batch: list[int] = []
    for item in items:
        if batch and (len(batch) + 1) * tokens[item] > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _choose(logits: Tensor) -> Answer:
    if not logits.isfinite().all():
        return Answer(None, failure="the verifier's logits are not finite")
    return Answer(int(logits.argmax()), probs=tuple(logits.softmax(-1).tolist()))


# ----------------------------------------------------------------------------------------------- 4. reading the answer


def parse_choice(reply: str, choices: Sequence[str]) -> int | None:
    """Place of the choice that `reply` names: exactly one offered letter, or the text of exactly one choice.

    None for everything else: no letter, two letters, a letter that is not offered, a letter whose text is another
    choice's. Words do not count as letters ("Based on", "Can not answer", "A man", "I think").
    """
    text = re.sub(r"^(?:the\s+)?answer(?:\s+is|:)", "", reply.strip().strip("*").strip(), flags=re.IGNORECASE)
    text = text.strip(" \t\n*_\"'`")
    texts = [_fold(choice) for choice in choices]
    if texts.count(_fold(text)) == 1:
        return texts.index(_fold(text))
    text = re.sub(r"^\(?[a-j](?=[).:]|$)", lambda match: match[0].upper(), text)  # "b", "(b) green"
    # A lone capital is a letter, but for the words "A" and "I" in front of another word ("A man", but "A because").
    lone = r"(?<![A-Za-z'])(?![AI] +(?!is\b|because\b|since\b|as\b)[a-z])([A-J])(?![A-Za-z'])"
    found = list(re.finditer(lone, text))
    if len({match[1] for match in found}) != 1 or found[0][1] not in LETTERS[: len(choices)]:
        return None
    chosen = LETTERS.index(found[0][1])
    rest = _fold(text[found[0].end() :])
    return None if rest in texts and texts.index(rest) != chosen else chosen


def _fold(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" .,:;!()*\"'`").casefold()


# ------------------------------------------------------------------------------------------------------- 5. the reward


@dataclass(frozen=True)
class Rewards:
    """`rewards`: (B,) float32 in [0, 1], NaN where none of a caption's questions could be scored.

    `records`: for each caption, each question as asked with its answer. `stats`:
    `failed_share` of all questions, the other shares of those that could be scored.
    """

    rewards: Tensor
    records: list[list[dict]]
    stats: dict[str, float]


def caption_rewards(captions: Sequence[str], questions: Sequence[Sequence[Question]], keys: Sequence[str],
                    verifier: AskVerifier, num_questions: int, abstain: bool = False,
                    max_failed_share: float = 0.1) -> Rewards:
    """R(caption) = mean over N questions of [verifier's choice == gold] (paper, equation 2).

    questions[i] are those of caption i's image; captions with equal `keys` are asked the same questions under the same
    shuffles. Raises RuntimeError with the reasons if more than `max_failed_share` of the questions could not be scored.
    """
    asked = [ask(group, num_questions, key, abstain) for group, key in zip(questions, keys, strict=True)]
    rows = [f"{key}:{place}" for place, key in enumerate(keys)]  # replies are drawn apart, questions are not
    answers = verifier(captions, asked, rows)
    records = [[_record(one, answer) for one, answer in zip(*pair, strict=True)] for pair in zip(asked, answers, strict=True)]
    rewards = torch.tensor([_mean([r["correct"] for r in record if not r["failure"]]) for record in records])
    return Rewards(rewards.float(), records, _stats(records, max_failed_share))


def _record(asked: Asked, answer: Answer) -> dict:
    return {
        "question": asked.question, "options": list(asked.options), "gold": asked.gold, "abstain": asked.abstain,
        "source": asked.source, "chosen": answer.chosen, "correct": float(answer.chosen == asked.gold),
        "probs": [round(p, 4) for p in answer.probs], "reply": answer.reply, "failure": answer.failure,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _stats(records: list[list[dict]], max_failed_share: float) -> dict[str, float]:
    rows = [row for record in records for row in record]
    failed = [row["failure"] for row in rows if row["failure"]]
    if len(failed) > max_failed_share * len(rows):
        reasons = "; ".join(sorted(set(failed))[:3])
        raise RuntimeError(f"{len(failed)} of {len(rows)} questions could not be scored ({reasons})")
    scored = [row for row in rows if not row["failure"]]
    return {
        "accuracy": _mean([row["correct"] for row in scored]),
        "unparsed_share": _mean([float(row["chosen"] is None) for row in scored]),
        "abstain_share": _mean([float(row["abstain"] is not None and row["chosen"] == row["abstain"]) for row in scored]),
        "failed_share": len(failed) / max(len(rows), 1),
    }


# ------------------------------------------------------------------------------------------------- loading the verifier


def load_verifier(path: str, device: torch.device, dtype: torch.dtype = torch.float32, **settings) -> Verifier:
    """A frozen verifier from a local folder or a hub name; `settings` go to `Verifier`. Raises ValueError if unusable."""
    if Path(path).is_dir():
        for pattern, what in (("*.safetensors", "weights"), ("tokenizer*.json", "tokenizer")):
            if not list(Path(path).glob(pattern)):
                raise ValueError(f"{path}: expected a model folder with {pattern}, found no {what}")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:  # transformers raises ValueError for another kind of model
        raise ValueError(f"{path}: expected a verifier's folder or a hub name ({str(error).splitlines()[0][:200]})") from None
    return Verifier(model.to(device).eval().requires_grad_(False), tokenizer, **settings)
