"""The reward of CapRL (arXiv 2509.22647, section 3.2), top to bottom: how useful is a caption to someone who cannot see
the image?

A text-only verifier answers multiple-choice questions about the image from the caption alone; the share it answers
rightly, its accuracy, is the reward, unless terms for length or repetition are asked for. The sections of this file
are in the order of the work, and `caption_rewards` runs them all:

    1. what is asked     stream_names, ask, shuffle_options
    2. the prompt        PromptWriter
    3. the verifier      Verifier: one choice for each question
    4. the answer        parse_choice, for verifiers that reply in words
    5. the reward        the mean over the questions

Three things are kept apart that are easily mixed up: wrong or abstained (0); a reply that cannot be read (0, and counted as
unparsed); a question that could not be scored, its prompt too long or its logits not finite (left out of the mean, and
counted as failed).

The records of a run can be scored again by another verifier:

    python -m reward.caprl replay runs/toy/rollouts/step_000039.jsonl --verifier Qwen/Qwen2.5-7B-Instruct
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from data.examples import SIGNS, Example, Question, find_choice, fold_choice, fold_text
from grpo.policy import chat_text, eos_ids, load_model, load_tokenizer, loading, unnamed_ids
from grpo.rollout import draw_tokens

LETTERS = "ABCDEFGHIJ"
ABSTAIN = "The caption does not say"

INSTRUCTION = """\
Answer a question about an image that you cannot see. All that you know about the image is its caption. \
Choose the option that the caption supports, even where another one seems more likely. \
Use no outside knowledge: what the caption does not say, you do not know. \
Reply with the letter of one option."""

CAPTION_START, CAPTION_END = "<Caption Start>", "<Caption End>"
ANSWER_START = "The answer is"
"""The verifier's turn is begun with these words, so that its next token is the letter."""

WORKED_EXAMPLES = f"""\
Caption: {CAPTION_START} A brown dog sleeps on an old sofa next to a window. {CAPTION_END}
Question: What is the dog doing?
A) eating
B) sleeping
C) running
D) barking
{ANSWER_START} B

Caption: {CAPTION_START} Two children play with a kite on a beach. {CAPTION_END}
Question: How many children are there?
A) six
B) nine
C) eight
D) two
{ANSWER_START} D"""
"""Two, with unlike letters, and each with as many options as questions mostly have."""

ABSTAIN_EXAMPLES = f"""\
Caption: {CAPTION_START} A brown dog sleeps on an old sofa next to a window. {CAPTION_END}
Question: What is the dog doing?
A) eating
B) running
C) {ABSTAIN}
D) sleeping
E) barking
{ANSWER_START} D

Caption: {CAPTION_START} Two children play with a kite on a beach. {CAPTION_END}
Question: What is written on the kite?
A) wind
B) {ABSTAIN}
C) hello
D) summer
E) north
{ANSWER_START} B"""
"""In place of these where abstaining is offered: once it is wrong, once right."""


@dataclass(frozen=True)
class RewardConfig:
    """How a caption is measured. A training run has the same settings under the same names, with their sources, in
    grpo/config.py."""

    num_questions: int = 4
    """N, questions per caption; 0 for as many as the image has."""
    question_draw: Literal["paired", "independent"] = "paired"
    """Paired: captions with one key get the same questions under the same shuffles, drawn without replacement while
    they last. Independent: each caption draws for itself, with replacement (the released code)."""
    num_shuffles: int = 1
    """Each drawn question is asked so many times, shuffled anew; the mean is over all askings."""
    abstain: bool = False
    """Offer the abstain option beside the choices."""
    soft: bool = False
    """A question earns the right option's probability, not 1 or 0; needs a verifier in mode "logits"."""
    length_weight: float = 0.0
    """Weight of `length_reward`, added to the accuracy."""
    length_full: int = 2048
    """Tokens up to which the length reward is 1."""
    length_zero: int = 3072
    """Tokens from which it is 0."""
    repetition_weight: float = 0.0
    """Weight of `repetition`, taken off."""


# ------------------------------------------------------------------------------------- 1. what each caption is asked


@dataclass(frozen=True)
class Asked:
    """A question as the verifier sees it: options shuffled, the right one known by its place, never by its text."""

    question: str
    options: tuple[str, ...]
    gold: int
    """Place of the right option in `options`."""
    source: int
    """Place of the question among the image's questions, for the records."""
    abstain: int | None = None
    """Place of the abstain option, where one is offered; never the gold."""


def stream_names(keys: Sequence[str], config: RewardConfig) -> tuple[list[str], list[str]]:
    """For each caption, the seed of its questions and that of the verifier's replies.

    Captions with one key are siblings, the G captions of an image: ["a", "a"] gives questions ["a", "a"] if paired and
    ["a:0", "a:1"] if independent, and replies ["a:0", "a:1"]. The number counts siblings, not rows of the batch: any split
    over ranks that keeps siblings together draws the same. A key names seed, step and image, so that a step draws anew.
    """
    seen: dict[str, int] = {}
    apart = []
    for key in keys:
        seen[key] = seen.get(key, -1) + 1
        apart.append(f"{key}:{seen[key]}")
    return (apart if config.question_draw == "independent" else list(keys)), apart


def ask(questions: Sequence[Question], config: RewardConfig, name: str) -> list[Asked]:
    """N of the image's questions, each under `num_shuffles` shuffles; the same `name` gives the same draw.

    Paired draws are without replacement while the questions last, then from the whole set again, so that how often
    two questions are asked differs by one at most. Raises ValueError if there are none.
    """
    if not questions:
        raise ValueError("expected at least one question on the image, found none")
    rng = random.Random(f"{name}:questions")  # from a text: the same in every process
    number = config.num_questions or len(questions)
    if config.question_draw == "independent":
        places = rng.choices(range(len(questions)), k=number)
    else:
        places = []
        while len(places) < number:
            places += rng.sample(range(len(questions)), len(questions))
    return [
        shuffle_options(questions[place], place, rng, config.abstain)
        for place in places[:number] for _ in range(config.num_shuffles)
    ]


def shuffle_options(question: Question, source: int, rng: random.Random, abstain: bool = False) -> Asked:
    """Options that mean others by their place ("All of the above") stay last. All options stay in
    their places where such a one stands further up, or where one means others by their letters
    ("Both A and B"). Where any stays, the abstain option comes last."""
    if len(question.choices) + abstain > len(LETTERS):
        beside = " beside the abstain option" if abstain else ""
        raise ValueError(f"expected at most {len(LETTERS) - abstain} choices{beside}: {question.question!r}")
    texts = [*question.choices, ABSTAIN]
    num_free = num_choices = len(question.choices)
    while means_places(texts[num_free - 1]):
        num_free -= 1
    if any(means_places(text) or means_letters(text, num_choices) for text in texts[:num_free]):
        num_free = 0
    num_free += abstain and num_free == num_choices
    order = list(range(num_free))  # the place after the choices is that of the abstain option
    rng.shuffle(order)
    order += range(num_free, num_choices + abstain)
    return Asked(
        question.question,
        tuple(texts[place] for place in order),
        gold=order.index(question.answer_index),
        source=source,
        abstain=order.index(len(question.choices)) if abstain else None,
    )


def means_places(text: str) -> bool:
    """"All of the above", "the first two options", "以上都是"; not "above the table"."""
    all_of_the = r"\b(?:the|all|none|any|both|either|neither|each|some) (?:of )?"
    above = r"(?:above|below|following|preceding|previous)(?! the\b)\b"
    first_option = r"\b(?:first|second|third|last|previous) (?:\w+ )?(?:option|choice|answer)s?\b"
    option_above = r"\b(?:option|choice|answer)s? above\b"
    pattern = f"{all_of_the}{above}|{first_option}|{option_above}|以上|以下|上述|下述"
    return bool(re.search(pattern, fold_text(text)))


def means_letters(text: str, num_choices: int) -> bool:
    """"Both A and B", "A and C only", "AB都对": letters of choices, with words or signs that join
    them; not a letter alone, nor "Plan A"."""
    folded, last = fold_choice(text), LETTERS[num_choices - 1].lower()
    letters = rf"(?<![a-z])[a-{last}]+(?![a-z])"
    words = (r"\b(?:and|or|nor|both|neither|either|only|all|not|but|except|of|the|same|as|is|are|"
             r"correct|true|right|wrong|(?:option|answer|choice)s?)\b|[和与或及都均皆对错是正确只有选项]")
    is_joined = re.fullmatch(rf"(?:{letters}|{words}|[\s,&/+()\u3001])+", folded)
    return bool(is_joined and re.search(letters, folded) and not re.fullmatch(r"[a-j]+\W*", folded))


# ------------------------------------------------------------------------------------------------------- 2. the prompt


class PromptWriter:
    """Token ids of a prompt in three parts: the head (the same for all), the caption, the question.

    Each part is tokenized by itself, and caption and question with special tokens read as plain text, so that
    no caption can change the tokens around it. What it says, it says: whether the verifier falls for a caption that goes on
    like a prompt is measured (tests/test_reward.py), not prevented.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, abstain: bool = False, task: str = "",
                 answer_start: str = ANSWER_START):
        """task: instruction and worked examples, where the question has no options and is answered in words."""
        task = task or f"{INSTRUCTION}\n\n{ABSTAIN_EXAMPLES if abstain else WORKED_EXAMPLES}"
        # The space before caption and question comes with them: tokenizers join it to the word that follows.
        content = f"{task}\n\nCaption: {CAPTION_START}[CAPTION] {CAPTION_END}\nQuestion:[QUESTION]"
        text = chat_text(tokenizer, content) if tokenizer.chat_template else content + "\n"
        if text.count("[CAPTION]") != 1 or text.count("[QUESTION]") != 1:
            raise ValueError("expected the verifier's chat template to show the user's text once, unchanged")
        head, rest = text.split("[CAPTION]")
        middle, tail = rest.split("[QUESTION]")
        self.tokenizer = tokenizer
        added = [re.escape(token) for token in tokenizer.get_added_vocab() if len(token) > 1]
        self.added_tokens = re.compile(f"(?={'|'.join(added) or '(?!)'})")  # also where two overlap
        begin = [] if tokenizer.chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.head_ids, self.middle_ids = begin + self._template_ids(head), self._template_ids(middle)
        self.tail_ids = self._template_ids(tail + answer_start)
        letters = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in LETTERS]
        if any(len(ids) != 1 for ids in letters):
            raise ValueError("expected the verifier's tokenizer to write each of the letters ' A' to ' J' as one token")
        self.letter_ids = [ids[0] for ids in letters]

    def _template_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _plain_ids(self, text: str) -> list[int]:
        """Added tokens, special or not, are cut in two before the tokenizer sees them: so they stay text."""
        cuts = [match.start() + 1 for match in self.added_tokens.finditer(text)]
        parts = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
        return [i for part in parts for i in self.tokenizer.encode(part, add_special_tokens=False)]

    def caption_ids(self, caption: str) -> list[int]:
        """The caption and what separates it from the question. Block markers inside it lose their brackets."""
        marker = re.compile(r"<\s*(caption\s+(?:start|end))\s*>", re.IGNORECASE)
        while marker.search(caption):  # what is left of "< <Caption End> >" is another one
            caption = marker.sub(r"\1", caption)
        return self._plain_ids(" " + caption.strip()) + self.middle_ids

    def question_ids(self, asked: Asked) -> list[int]:
        lines = [f" {asked.question}", *(f"{letter}) {text}" for letter, text in zip(LETTERS, asked.options))]
        return self._plain_ids("\n".join(lines)) + self.tail_ids


# ------------------------------------------------------------------------------------------------------ 3. the verifier


@dataclass(frozen=True)
class Answer:
    """The verifier's answer to one question. `chosen` is a place in `options`; None if the reply cannot be read, or if
    `failure` is set."""

    chosen: int | None
    probs: tuple[float, ...] = ()
    """Softmax over the offered letters (mode "logits")."""
    reply: str = ""
    """What the verifier wrote (mode "sample")."""
    failure: str = ""
    """Why the question could not be scored; empty when it could."""


AskVerifier = Callable[[Sequence[str], Sequence[Sequence[Asked]], Sequence[str]], list[list[Answer]]]
"""(captions, questions for each, the name of each one's random stream) -> answers for each. `Verifier` is one; a test
passes a function."""


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, L) int64 each; the padding's id is 0, and masked."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def prefill_(model: PreTrainedModel, rows: list[list[int]], parents: list[int], cache: DynamicCache, seen: Tensor):
    """Run B rows of token ids; row i continues the cached row parents[i] of P, so that a shared past is computed once.

    seen: (P, T) int64, 1 on the T cached tokens that count. The cache is changed in place, from P rows to B. Returns
    hidden states (B, L, H), the cache and `seen` for the B rows. Rows are padded on the left, so the last state is at
    -1; padding is masked and takes no position.
    """
    ids, mask = pad_left(rows, seen.device)
    index = torch.tensor(parents, device=seen.device)
    if seen.shape[1]:  # not every cache can do nothing
        cache.batch_select_indices(index)
    seen = torch.cat([seen[index], mask], dim=1)  # (B, T + L)
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model.base_model(
        input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state, cache, seen


def prefill_captions(model: PreTrainedModel, head: list[int], captions: list[list[int]]):
    """Hidden states (B, L, H), cache and mask of B captions, each after the head, which is run once."""
    _, cache, seen = prefill_(model, [head], [0], *_empty_past(model))
    return prefill_(model, captions, [0] * len(captions), cache, seen)


def _empty_past(model: PreTrainedModel) -> tuple[DynamicCache, Tensor]:
    cache = DynamicCache(config=model.config)
    return cache, torch.ones(1, 0, dtype=torch.long, device=model.device)


def question_rows(model: PreTrainedModel, head: list[int], captions: list[list[int]],
                  questions: list[list[list[int]]]):
    """For each (caption, question) the token ids that are still to be run and its place in the past;
    cache and mask of that past: `prefill_`'s arguments. Head, caption and question are token ids.

    Head and captions are run once and shared, if every layer sees all that came before. A window counts
    places, padding between caption and question among them, and a recurrent state has read that
    padding: there the rows are whole, each padded in front only.
    """
    rows = [row for group in questions for row in group]
    parents = [i for i, group in enumerate(questions) for _ in group]
    cache, seen = _empty_past(model)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        whole = [head + captions[i] + row for i, row in zip(parents, rows)]
        return whole, [0] * len(rows), cache, seen
    _, cache, seen = prefill_captions(model, head, captions)
    return rows, parents, cache, seen


def option_logits(model: PreTrainedModel, head: list[int], captions: list[list[int]], questions: list[list[list[int]]],
                  letter_ids: list[int]) -> Tensor:
    """Logits of the letters at the answer's position, one row per (caption, question): (sum of
    questions, letters)."""
    hidden, _, _ = prefill_(model, *question_rows(model, head, captions, questions))
    # The letters' rows of the head only: a few products in place of a vocabulary of 150,000.
    # In float32, where letters of like logits do not tie: a tie would always go to the first one.
    lm_head = model.get_output_embeddings()
    logits = F.linear(hidden[:, -1].float(), lm_head.weight[letter_ids].float())
    return logits if lm_head.bias is None else logits + lm_head.bias[letter_ids].float()


class Verifier:
    """A causal language model that answers from captions. What shares a batch with a caption does not change its answers.

    mode "logits": the offered letter of highest probability at the answer's position; no sampling noise, no parsing.
    mode "sample": a reply of at most `max_new_tokens` tokens at `temperature`, read by `parse_choice` (the paper's way).
    At most `token_budget` tokens are in the cache at a time, but always one caption with its questions.
    With a `task` of its own (see `PromptWriter`), questions without options are answered in words, in mode "sample".
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mode: str = "logits",
                 temperature: float = 0.6, max_new_tokens: int = 10, token_budget: int = 262_144, task: str = "",
                 answer_start: str = ANSWER_START):
        if mode not in ("logits", "sample"):
            raise ValueError(f"expected verifier mode 'logits' or 'sample', got {mode!r}")
        if not temperature > 0:
            raise ValueError(f"expected a verifier temperature above 0, got {temperature}")
        self.model, self.tokenizer, self.mode = model, tokenizer, mode
        self.temperature, self.max_new_tokens, self.token_budget = temperature, max_new_tokens, token_budget
        self.writers = {abstain: PromptWriter(tokenizer, abstain, task, answer_start) for abstain in (False, True)}
        text = model.config.get_text_config()
        self.context = getattr(text, "max_position_embeddings", None) or math.inf  # Bloom has none
        self.eos_ids, self.forbidden_ids = eos_ids(model, tokenizer), unnamed_ids(model, tokenizer)

    def prompt_tokens(self, examples: Sequence[Example]) -> int:
        """Tokens of the longest prompt beside the caption: head, question and options."""
        questions = [question for example in examples for question in example.questions]
        asked = [shuffle_options(q, 0, random.Random(0), abstain=len(q.choices) < len(LETTERS)) for q in questions]
        writer = self.writers[True]
        return len(writer.head_ids) + len(writer.caption_ids("")) + max(len(writer.question_ids(one)) for one in asked)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], asked: Sequence[Sequence[Asked]], names: Sequence[str]) -> list[list[Answer]]:
        """Answers to each caption's questions. `names[i]` is of the random stream of the replies to caption i.

        All questions of a call offer the abstain option or none does. A caption whose longest prompt does not fit into
        the verifier's context fails on all its questions; so does a question whose logits are not finite, alone.
        """
        offered = {one.abstain is not None for group in asked for one in group}
        assert len(offered) <= 1, "expected the abstain option on all questions of a call or on none"
        writer = self.writers[True in offered]
        caption_ids = [writer.caption_ids(caption) for caption in captions]
        question_ids = [[writer.question_ids(one) for one in group] for group in asked]
        reply = self.max_new_tokens if self.mode == "sample" else 0
        room = self.context - len(writer.head_ids) - reply
        lengths = [len(caption) + max(map(len, group)) for caption, group in zip(caption_ids, question_ids, strict=True)]
        fits = sorted((i for i, length in enumerate(lengths) if length <= room), key=lambda i: lengths[i])
        rows, beside = [len(group) for group in asked], len(writer.head_ids) + reply
        reason = "caption and question have {} tokens, the verifier has room for {}"
        answers = [
            [Answer(None, failure=reason.format(length, room)) for _ in group] for group, length in zip(asked, lengths)
        ]
        answer = self._answer_by_logits if self.mode == "logits" else self._answer_by_reply
        for batch in _batches(fits, rows, [length + beside for length in lengths], self.token_budget):  # of like lengths
            found = answer(
                writer, [caption_ids[i] for i in batch], [question_ids[i] for i in batch], [asked[i] for i in batch],
                [names[i] for i in batch],
            )
            for i, group in zip(batch, found, strict=True):
                answers[i] = group
        return answers

    def _answer_by_logits(self, writer: PromptWriter, caption_ids: list[list[int]], question_ids: list[list[list[int]]],
                          asked: list[Sequence[Asked]], names: list[str]) -> list[list[Answer]]:
        rows = iter(option_logits(self.model, writer.head_ids, caption_ids, question_ids, writer.letter_ids).cpu())
        return [[choose_letter(next(rows)[: len(one.options)]) for one in group] for group in asked]

    def _answer_by_reply(self, writer: PromptWriter, caption_ids: list[list[int]], question_ids: list[list[list[int]]],
                         asked: list[Sequence[Asked]], names: list[str]) -> list[list[Answer]]:
        rows, parents, cache, seen = question_rows(
            self.model, writer.head_ids, caption_ids, question_ids
        )
        parents = torch.tensor(parents, device=seen.device)
        ids, mask = pad_left(rows, seen.device)  # (B, L)
        past = seen.new_zeros(len(ids), seen.shape[1])  # generate skips as many ids as the cache holds
        if past.shape[1]:
            cache.batch_select_indices(parents)
            for number, layer in enumerate(cache.layers):  # one at a time: never the whole cache twice
                cache.layers[number] = RoomyLayer(layer, ids.shape[1] + self.max_new_tokens)
            del layer  # or its keys and values would stay until all is written
        sampler = RowSampler(
            [f"{name}:{place}:reply" for name, group in zip(names, question_ids) for place in range(len(group))],
            self.temperature, self.max_new_tokens, self.forbidden_ids,
        )
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens,  # the sampler has drawn already
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
        )
        # generate fills in from the model's own what another config leaves open.
        before, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out = self.model.generate(
                input_ids=torch.cat([past, ids], dim=1),
                attention_mask=torch.cat([seen[parents], mask], dim=1),
                past_key_values=cache if past.shape[1] else None, logits_processor=[sampler],
                generation_config=config,
            )
        finally:
            self.model.generation_config = before
        replies = self.tokenizer.batch_decode(out[:, past.shape[1] + ids.shape[1] :], skip_special_tokens=True)
        rows = iter(zip(replies, sampler.is_broken.tolist(), strict=True))
        return [[_read(*next(rows), one) for one in group] for group in asked]


class RoomyLayer(DynamicLayer):
    """A cache layer with room for more tokens, which are written in place; DynamicLayer copies all that it holds for each.

    Its rows stay as they are: it is for `generate` without beams.
    """

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.roomy = [F.pad(part, (0, 0, 0, room)) for part in (layer.keys, layer.values)]  # (B, heads, T + room, D) each
        self.keys, self.values = (part[:, :, : layer.keys.shape[2]] for part in self.roomy)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        assert stop <= self.roomy[0].shape[2], f"expected at most {self.roomy[0].shape[2]} tokens, got {stop}"
        for part, new in zip(self.roomy, (key_states, value_states)):
            part[:, :, start:stop] = new
        self.keys, self.values = (part[:, :, :stop] for part in self.roomy)
        return self.keys, self.values


class RowSampler(LogitsProcessor):
    """Sampling inside `generate` with a random stream per row: a reply does not depend on the rows beside it."""

    def __init__(self, names: list[str], temperature: float, max_new_tokens: int,
                 forbidden_ids: Sequence[int] = ()):
        self.temperature, self.step = temperature, 0
        self.forbidden = torch.tensor(forbidden_ids, dtype=torch.long)
        streams = [random.Random(name) for name in names]
        self.uniform = torch.tensor([[stream.random() for _ in range(max_new_tokens)] for stream in streams]).double()  # (B, L)
        self.is_broken = torch.zeros(len(names), dtype=torch.bool)
        """Rows whose logits were not finite at some token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # In place where it can be: at a large vocabulary fresh memory costs as much as the arithmetic.
        self.forbidden = self.forbidden.to(scores.device)
        scores[:, self.forbidden] = -torch.inf
        probs = scores.div_(self.temperature).softmax(-1, dtype=torch.float32)  # (B, V)
        is_broken = probs[:, 0].isnan()  # as is all of the row then
        token = draw_tokens(probs.nan_to_num_(1.0), self.uniform[:, self.step].to(probs.device))
        self.is_broken |= is_broken.cpu()
        self.step += 1
        # generate takes the arg-max, for some models after a log-softmax, which an infinity would turn into nan.
        return scores.scatter_(1, token[:, None], torch.finfo(scores.dtype).max)


def _batches(items: list[int], rows: list[int], lengths: list[int], budget: int):
    """Splits `items`, in order, into runs whose rows, padded to the longest, take at most `budget` tokens; or one item."""
    batch: list[int] = []
    for item in items:
        grown = [*batch, item]
        if batch and sum(rows[i] for i in grown) * max(lengths[i] for i in grown) > budget:
            yield batch
            grown = [item]
        batch = grown
    if batch:
        yield batch


NOT_FINITE = "the model's logits are not finite"


def choose_letter(logits: Tensor) -> Answer:
    """The likeliest of the offered letters; logits: (number of options,)."""
    if not logits.isfinite().all():
        return Answer(None, failure=NOT_FINITE)
    return Answer(int(logits.argmax()), probs=tuple(logits.softmax(-1).tolist()))


def _read(reply: str, is_broken: bool, asked: Asked) -> Answer:
    return Answer(None, failure=NOT_FINITE) if is_broken else Answer(parse_choice(reply, asked.options), reply=reply)


def load_verifier(path: str, device: torch.device, dtype: torch.dtype = torch.float32, **settings) -> Verifier:
    """A frozen verifier from a local folder or a hub name; `settings` go to `Verifier`. Raises ValueError if unusable."""
    with loading(path, "verifier"):
        tokenizer = load_tokenizer(path)
        model = load_model(AutoModelForCausalLM, path, dtype).to(device).eval()
        verifier = Verifier(model.requires_grad_(False), tokenizer, **settings)
        check_rows(model, verifier.writers[False])
    return verifier


@torch.no_grad()
def check_rows(model: PreTrainedModel, writer: PromptWriter) -> None:
    """Raises ValueError if two short rows, run as `option_logits` runs them, end in other hidden
    states than each alone: such a model would answer one caption by what stands beside it."""
    head = writer.head_ids[-8:]
    captions = [writer.caption_ids(""), writer.caption_ids("A red square. A blue star.")]
    questions = [[writer.tail_ids], [writer.middle_ids + writer.tail_ids]]
    name, wanted = type(model).__name__, "expected layers that padding and a cache do not disturb"
    try:
        hidden, _, _ = prefill_(model, *question_rows(model, head, captions, questions))
        whole = [torch.tensor([head + caption + row]) for caption, [row] in zip(captions, questions)]
        outputs = [model.base_model(ids.to(model.device), use_cache=False) for ids in whole]
        alone = [output.last_hidden_state[0, -1].float() for output in outputs]
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"{wanted}, {name} fails with them: {error}") from None
    for row, states in zip(hidden[:, -1].float(), alone):
        error = (row - states).norm() / states.norm()
        if error > torch.finfo(model.dtype).eps ** 0.5:  # far above rounding
            raise ValueError(f"{wanted}, {name}'s states come out {error:.1g} apart")


# ----------------------------------------------------------------------------------------------- 4. reading the answer


def parse_choice(reply: str, choices: Sequence[str]) -> int | None:
    """Place of the choice that `reply` names, or None. Case, width and style of letters and signs
    do not matter (`fold_text`).

    Quotes, stars, "The answer is", "Option", "I think" lead to the answer and are passed over. Then
    1. if a choice's text begins the reply, it is that choice: of several the longest, and up to the
       end of a word or number ("20" is no "2"). Letters within that text ("Point B") are no labels.
       A text of one letter has to be the whole reply.
    2. Else a letter counts where it is a label: first in the reply or after "answer is" or
       "option", and there in brackets, at the end of its clause, or before "because" or "is right".
    3. None if anything else is named too: another label in whatever clause, another choice's text
       right after it (or its last words: "B. Obama" for "Barack Obama"), or what "and", "or" and
       "not" add.
    """
    said = reply.rpartition("</think>")[2]
    said = re.sub(r"(?s)<think>.*|<\|[^<>]*\|>|</?answer>", "", said).translate(SIGNS)
    while (begun := _begun_by(said, choices))[0] is None and (lead := _LEAD.match(said)):
        said = said[lead.end() :]
    place, rest = begun
    named = list(_NAMED.finditer(rest))
    letters = {LETTERS.lower().index(match["letter"]) for match in named}
    if place is None:
        labels = [match for match in named if match["first"] is not None]
        if not labels or len(letters) > 1 or re.search(r"\bnot\W+[a-j]\b(?! \w)", rest):
            return None
        place, rest = letters.pop(), rest[labels[0].end() :]
    rivals = letters.intersection(range(len(choices))) - {place}
    if place >= len(choices) or rivals or _GOES_ON.match(rest):
        return None
    texts = [fold_choice(choice) for choice in choices]
    clause = fold_choice(_NEXT_CLAUSE.match(rest)[1])
    also = {i for i, text in enumerate(texts) if clause and f" {text}".endswith(f" {clause}")}
    if begun[0] is None and place not in also:  # "B", where another choice's text is "B"
        also |= {i for i, text in enumerate(texts) if text == LETTERS[place].lower()} - {place}
    return place if place in also or not also else None


def _begun_by(said: str, choices: Sequence[str]) -> tuple[int | None, str]:
    """Place of the choice whose text begins `said`, perhaps after its letter ("B green"), or None;
    and the rest, folded."""
    texts = [fold_choice(choice) for choice in choices]
    folded = re.sub(r"[^\S\n]+", " ", fold_text(said)).strip(" ")
    if (place := find_choice(said, choices)) is not None:
        return place, folded if len(texts[place]) == 1 else ""  # "B" may be another one's label
    spelled = [*texts, *(f"{letter} {text}" for letter, text in zip(LETTERS.lower(), texts))]
    begins = [t for t in spelled if folded.startswith(t) and _TEXT_END.match(folded, len(t))]
    longest = max(begins, key=len, default="")
    if spelled.count(longest) != 1 or re.fullmatch("[a-j]? ?", longest):
        return None, folded
    return spelled.index(longest) % len(choices), folded[len(longest) :]


# All but the first are of folded text. \u3001: comma of Chinese lists; \u2044: bar of a fraction.
_LEAD = re.compile(
    r"""[\s:,]+|[*_"'`(\[#>]+|(?:so|thus|therefore)\b|"""
    r"(?:(?:the|my) )?(?:(?:correct|right|best|final) )?"
    r"(?:answer|option|choice)\b(?: (?:is|would be)\b)?|is\b|i (?:think|choose|pick|say)\b|"
    r"i(?:'d| would) (?:say|choose|pick)\b|答案[是为]?|选[项择]?",
    re.IGNORECASE,
)
_TEXT_END = re.compile(
    r"""(?!\w|(?<=\d)\s?[%‰°'"/\u2044^\d~\u2013-])"""
    r"""(?=$|[\s;!?\u3001\u2014]|\.(?![a-z0-9])|[,:](?!\d)|["'*`)\]](?!\w)|\([a-j]\))"""
)
_LABEL_END = (
    r"\s*$|\s*[\n,;!\u3001]|\.(?!\w\b|\s\w\.)|:(?!\d)| [-\u2013\u2014] | (?:because|since|as)\b|"
    r" is (?:the )?(?:right|correct|best|answer)\b"
)
_CLAUSE_START = (
    r"[,.;:!?\n\u3001]\s*(?:(?:but|so|and|or|then|no|wait)\s+)*| (?:and|or|but|so) |"
    r" [-\u2013\u2014] |(?<!\w)(?=[(\[])"
)
_NAMED = re.compile(
    r"(?:(?P<first>^|\b(?:answer|option|choice)(?: is)?:? ?|"
    r"答案[是为]?:? ?|(?<!不)选[项择]? ?)|"
    rf"""{_CLAUSE_START})["'*_`$(\[]*(?P<letter>[a-j])(?: (?P=letter)\b)*["'*_`$]*"""
    rf"(?:[)\]]|(?={_LABEL_END}))"
)
_GOES_ON = re.compile(
    r"""["'*_`)\]]*\s*(?:[&+/]|(?:and|or|nor)\b|"""
    r"(?:is|are|was|were|does|do)(?:n't| (?:not|wrong|incorrect|false))\b)"
)
_NEXT_CLAUSE = re.compile(
    r"""(?:[\s,:;"'*`)\]\u3001]|\.(?!\d)|[-\u2013\u2014]\s)*"""
    r"((?:(?! because )[^.,:;!?\n\u3001]|[.,:](?=\d))*)"
)


# ------------------------------------------------------------------------------------------------------- 5. the reward


def length_reward(num_tokens: int, l1: int, l2: int) -> float:
    """1 up to `l1` tokens, falling in a straight line to 0 at `l2`, 0 beyond (CapRL++, arXiv 2606.09393)."""
    if l1 >= l2:
        raise ValueError(f"expected the length reward to end later than it begins to fall, got {l1} and {l2}")
    return min(1.0, max(0.0, (l2 - num_tokens) / (l2 - l1)))


def repetition(caption: str, n: int = 4) -> float:
    """Share of the caption's n-grams of words that are repeats, 0 to 1 (0 below n words). A Chinese or Japanese character is
    a word."""
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", caption.casefold())
    grams = list(zip(*(words[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Rewards:
    """`rewards`: (B,) float32, NaN where none of a caption's questions could be scored: GRPO leaves such a caption out.

    `parts`: (B,) float32 each, what the reward is the sum of, weights applied. `records`: for each caption, each
    question as asked with its answer. `stats`: see `answer_stats`.
    """

    rewards: Tensor
    parts: dict[str, Tensor]
    records: list[list[dict]]
    stats: dict[str, float]


def caption_rewards(captions: Sequence[str], examples: Sequence[Example], keys: Sequence[str], lengths: Sequence[int],
                    verifier: AskVerifier, config: RewardConfig) -> Rewards:
    """R(caption) = mean over its N questions, each under `num_shuffles` shuffles, of [verifier's choice == gold] (paper,
    equation 2), in [0, 1], and whatever terms for length and repetition `config` adds to it.

    Caption i, of lengths[i] tokens of the policy, is of the image of examples[i]; captions with equal `keys` are
    siblings, see `stream_names`. What could not be scored is in the records with its reason.
    """
    question_names, reply_names = stream_names(keys, config)
    asked = [ask(example.questions, config, name) for example, name in zip(examples, question_names, strict=True)]
    answers = verifier(captions, asked, reply_names)
    records = [
        [answer_record(one, answer, config.soft) for one, answer in zip(group, given, strict=True)]
        for group, given in zip(asked, answers, strict=True)
    ]
    parts = {"accuracy": torch.tensor([_mean([r["score"] for r in record if not r["failure"]]) for record in records])}
    if config.length_weight:
        fitting = [length_reward(length, config.length_full, config.length_zero) for length in lengths]
        parts["length"] = config.length_weight * torch.tensor(fitting)
    if config.repetition_weight:
        parts["repetition"] = -config.repetition_weight * torch.tensor([repetition(caption) for caption in captions])
    return Rewards(sum(parts.values()), parts, records, answer_stats(records))


def answer_record(asked: Asked, answer: Answer, soft: bool) -> dict:
    """A question as asked and answered; `score` is what it earned, None where it could not be scored."""
    if soft and not answer.probs and not answer.failure:
        raise ValueError('soft: expected a verifier that gives probabilities (mode "logits"), got one that replies')
    correct = None if answer.failure else answer.chosen == asked.gold
    score = correct if correct is None else answer.probs[asked.gold] if soft else float(correct)
    return asdict(asked) | {
        "chosen": answer.chosen, "correct": correct, "score": score, "probs": [round(p, 4) for p in answer.probs],
        "reply": answer.reply, "failure": answer.failure,
    }


def answer_stats(records: Sequence[Sequence[dict]]) -> dict[str, float]:
    """Over all questions of all captions: `failed_share` of them; of those that could be scored, `accuracy` (always by the
    choice, also where the reward is soft), `unparsed_share` and `abstain_share`."""
    rows = [row for record in records for row in record]
    scored = [row for row in rows if not row["failure"]]
    return {
        "accuracy": _mean([row["correct"] for row in scored]),
        "unparsed_share": _mean([row["chosen"] is None for row in scored]),
        "abstain_share": _mean([row["abstain"] is not None and row["chosen"] == row["abstain"] for row in scored]),
        "failed_share": _mean([bool(row["failure"]) for row in rows]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    import sys

    from grpo.config import run_program
    from reward.audit import main

    run_program(main, sys.argv[1:])
