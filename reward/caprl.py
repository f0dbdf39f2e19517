"""The reward of CapRL (arXiv 2509.22647, section 3.2): how much does a caption tell someone who
cannot see the image?

A text-only verifier answers multiple-choice questions about the image from the caption alone. The
reward is its accuracy: the share of questions that it answers rightly. Terms for how a caption is
written (reward/style.py) are added only where asked for. The sections are in the order of the work:

    1. what is asked     stream_names, ask, shuffle_options
    2. the prompt        PromptWriter
    3. the answer        Answer: a letter chosen, or a reply read (data/replies.py: parse_choice)
    4. the mean          caption_rewards, which runs all of this, and the records
    5. the verifier      Verifier, load_verifier: captions and questions in, answers out
    6. the mechanics     caches shared by the questions of a caption, sampling, batches

Three results are easily mixed up and kept apart:

    wrong, or abstained      scores 0
    unparsed                 the reply cannot be read: scores 0, and is counted
    failed                   the prompt is too long or the logits are not finite: left out of the
                             mean, and counted

Another verifier can score the records of a run again:

    python -m reward.caprl replay runs/toy/rollouts/step_000039.jsonl --verifier FOLDER
"""

import copy
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

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

from data.choices import LETTERS, means_letters, means_places
from data.examples import Example, Question
from grpo.config import RewardConfig
from grpo.policy import chat_text, eos_ids, unnamed_ids
from grpo.rollout import draw_tokens, temper_logits_

ABSTAIN = "The caption does not say"


# --------------------------------------------------------------------------- 1. what is asked


@dataclass(frozen=True)
class Asked:
    """A question as the verifier sees it, with its options shuffled."""

    question: str
    options: tuple[str, ...]
    gold: int
    """Place of the right option in `options`. It is known by its place, never by its text."""
    source: int
    """Place of the question among the image's questions, for the records."""
    abstain: int | None = None
    """Place of the abstain option, where one is offered; never the gold."""


def stream_names(keys: Sequence[str], config: RewardConfig) -> tuple[list[str], list[str]]:
    """For each caption, the name of the random stream of its questions, and of its replies.

    Captions with equal keys are siblings: the G captions of an image. ["a", "a"] gives replies
    ["a:0", "a:1"]. Its questions are ["a", "a"] if paired, ["a:0", "a:1"] if independent.
    The number counts siblings, not rows of the batch. So any split over ranks that keeps siblings
    together draws the same. A key names seed, step and image, so that each step draws anew.
    """
    seen: dict[str, int] = {}
    apart = []
    for key in keys:
        seen[key] = seen.get(key, -1) + 1
        apart.append(f"{key}:{seen[key]}")
    return (apart if config.question_draw == "independent" else list(keys)), apart


def ask(questions: Sequence[Question], config: RewardConfig, name: str) -> list[Asked]:
    """N of the image's questions, each under `num_shuffles` shuffles; once as it is for 0.

    The same `name` gives the same draw. Paired draws are without replacement until all questions
    were drawn, then from the whole set again. Raises ValueError if there are no questions.
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
    shuffling = rng if config.num_shuffles else None
    return [
        shuffle_options(questions[place], place, shuffling, config.abstain)
        for place in places[:number] for _ in range(max(1, config.num_shuffles))
    ]


def shuffle_options(question: Question, source: int, rng: random.Random | None,
                    abstain: bool = False) -> Asked:
    """The question with its options in random places, the abstain option among them if asked for.

    Options that mean others by their place ("All of the above") stay last. All options stay in
    their places without `rng`, or if such an option stands further up, or one means others by their
    letters ("Both A and B"). Where any option stays, the abstain option comes last. Raises
    ValueError for more options than there are letters.
    """
    if len(question.choices) + abstain > len(LETTERS):
        most = f"{len(LETTERS) - abstain} choices{' beside the abstain option' * abstain}"
        raise ValueError(f"expected at most {most}: {question.question!r}")
    texts = [*question.choices, ABSTAIN]
    num_free = num_choices = len(question.choices)
    while means_places(texts[num_free - 1]):
        num_free -= 1
    if any(means_places(text) or means_letters(text, num_choices) for text in texts[:num_free]):
        num_free = 0
    num_free += abstain and num_free == num_choices
    order = list(range(num_free))  # the place after the choices is that of the abstain option
    if rng:
        rng.shuffle(order)
    order += range(num_free, num_choices + abstain)
    return Asked(
        question.question,
        tuple(texts[place] for place in order),
        gold=order.index(question.answer_index),
        source=source,
        abstain=order.index(num_choices) if abstain else None,
    )


# ------------------------------------------------------------------------------ 2. the prompt


ANSWER_INSTRUCTION = """\
Answer a question about an image that you cannot see. All that you know about the image \
is its caption. \
Choose the option that the caption supports, even where another one seems more likely. \
Use no outside knowledge: what the caption does not say, you do not know. \
Reply with the letter of one option."""

CAPTION_START, CAPTION_END = "<Caption Start>", "<Caption End>"
ANSWER_START = "The answer is"
"""The verifier's turn begins with these words, so that its next token is the letter."""

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
"""Two, with different answers, and each with as many options as most questions have."""

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
"""Take the place of WORKED_EXAMPLES where abstaining is offered: once wrong, once right."""

CAPTION_AND_QUESTION = f"Caption: {CAPTION_START} [CAPTION] {CAPTION_END}\nQuestion: [QUESTION]"
"""The end of the prompt. Caption and question take the places of the words in brackets."""


class PromptWriter:
    """Token ids of a prompt in three parts: the head (the same for all), the caption, the question.

    Each part is tokenized by itself. Special tokens inside caption and question are read as plain
    text. So no caption can change the tokens around it. A caption can still imitate the prompt in
    words. That is not prevented but measured (tests/test_reward.py).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, abstain: bool = False,
                 prompt_text: str = "", answer_start: str = ANSWER_START):
        """prompt_text: the user's turn with [CAPTION] and then [QUESTION], once each; empty for the
        reward's own. Raises ValueError for a chat template or tokenizer that cannot be used."""
        examples = ABSTAIN_EXAMPLES if abstain else WORKED_EXAMPLES
        content = prompt_text or f"{ANSWER_INSTRUCTION}\n\n{examples}\n\n{CAPTION_AND_QUESTION}"
        text = chat_text(tokenizer, content) if tokenizer.chat_template else content + "\n"
        if text.count("[CAPTION]") != 1 or text.count("[QUESTION]") != 1:
            raise ValueError("expected the verifier's chat template to show the user's text once, "
                             "unchanged")
        # Tokenizers join a space to the word that follows. So the spaces before caption and
        # question are tokenized with them. If a space alone is between the two, it stays there: an
        # empty caption needs a token.
        head, self.caption_space, rest = re.split(r"( ?)\[CAPTION\]", text)
        middle, self.question_space, tail = re.split(r"(?s)((?<=.) |)\[QUESTION\]", rest)
        self.tokenizer = tokenizer
        added = [re.escape(token) for token in tokenizer.get_added_vocab() if len(token) > 1]
        # A look-ahead, so that two overlapping tokens are both found.
        self.added_tokens = re.compile(f"(?={'|'.join(added) or '(?!)'})")
        has_bos = not tokenizer.chat_template and tokenizer.bos_token_id is not None
        begin = [tokenizer.bos_token_id] if has_bos else []
        self.head_ids = begin + self.template_ids(head)
        self.middle_ids = self.template_ids(middle)
        self.tail_ids = self.template_ids(tail + answer_start)
        letters = [self.template_ids(f" {letter}") for letter in LETTERS]
        if any(len(ids) != 1 for ids in letters):
            raise ValueError("expected the verifier's tokenizer to write each of the letters ' A' "
                             "to ' J' as one token")
        self.letter_ids = [ids[0] for ids in letters]

    def template_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def plain_ids(self, text: str) -> list[int]:
        """Cuts every added token in two before the tokenizer sees it, so that it stays text."""
        cuts = [match.start() + 1 for match in self.added_tokens.finditer(text)]
        parts = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
        return [token for part in parts for token in self.template_ids(part)]

    def caption_ids(self, caption: str) -> list[int]:
        """The caption and what separates it from the question. The markers of its start and end
        lose their brackets where they stand inside it."""
        marker = re.compile(r"<\s*(caption\s+(?:start|end))\s*>", re.IGNORECASE)
        while marker.search(caption):  # "< <Caption End> >" leaves another marker behind
            caption = marker.sub(r"\1", caption)
        return self.plain_ids(self.caption_space + caption.strip()) + self.middle_ids

    def question_ids(self, asked: Asked) -> list[int]:
        """Question, options under their letters, and the start of the verifier's turn."""
        options = [f"{letter}) {text}" for letter, text in zip(LETTERS, asked.options)]
        text = "\n".join([self.question_space + asked.question, *options])
        return self.plain_ids(text) + self.tail_ids


# ------------------------------------------------------------------------------- 3. the answer


@dataclass(frozen=True)
class Answer:
    """The verifier's answer to one question."""

    chosen: int | None
    """Place in `options`; None if the reply cannot be read, or if `failure` is set."""
    probs: tuple[float, ...] = ()
    """Softmax over the offered letters (mode "logits")."""
    reply: str = ""
    """What the verifier wrote (mode "sample")."""
    failure: str = ""
    """Why the question could not be scored; empty when it could."""


AskVerifier = Callable[[Sequence[str], Sequence[Sequence[Asked]], Sequence[str]],
                       list[list[Answer]]]
"""(captions, each caption's questions, each caption's random stream) -> each caption's answers.
The class `Verifier` below is one; a test passes a function."""

NOT_FINITE = "the model's logits are not finite"


def choose_letter(logits: Tensor) -> Answer:
    """The likeliest of the offered letters; logits: (number of options,)."""
    if not logits.isfinite().all():
        return Answer(None, failure=NOT_FINITE)
    return Answer(int(logits.argmax()), probs=tuple(logits.softmax(-1).tolist()))


def read_reply(reply: str, is_broken: bool, asked: Asked) -> Answer:
    """The choice that the reply names. is_broken: logits were not finite at one of its tokens."""
    if is_broken:
        return Answer(None, failure=NOT_FINITE)
    from data.replies import parse_choice  # here: letters by their logits need no reading

    return Answer(parse_choice(reply, asked.options), reply=reply)


# --------------------------------------------------------------------------------- 4. the mean


@dataclass(frozen=True)
class Rewards:
    """What the B captions of a step earned, and why."""

    rewards: Tensor
    """(B,) float32; NaN, which GRPO leaves out, where no question of a caption could be scored."""
    parts: dict[str, Tensor]
    """(B,) float32 each: what the reward is the sum of, weights applied."""
    records: list[list[dict]]
    """For each caption, each question as asked with its answer."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each part; 1 where none is named."""
    claims: list[list[dict]] | None = None
    """For each caption, each claim as judged (reward/claims.py). None where none is judged."""

    @property
    def stats(self) -> dict[str, float]:
        """`answer_stats` and, where claims are judged, the share that could not be."""
        failed = [bool(claim["failure"]) for record in self.claims or [] for claim in record]
        judged = {} if self.claims is None else {"failed_claims": mean(failed)}
        return answer_stats(self.records) | judged


def caption_rewards(captions: Sequence[str], examples: Sequence[Example], keys: Sequence[str],
                    lengths: Sequence[int], verifier: AskVerifier,
                    config: RewardConfig) -> Rewards:
    """R(caption) = mean of [verifier's choice == gold] (paper, equation 2), in [0, 1], over N
    questions, each under `num_shuffles` shuffles; plus the weighted terms of reward/style.py.

    Caption i is of the image of examples[i] and has lengths[i] tokens of the policy. Captions with
    equal `keys` are siblings, see `stream_names`. Records say why something could not be scored.
    """
    question_names, reply_names = stream_names(keys, config)
    asked = [
        ask(example.questions, config, name)
        for example, name in zip(examples, question_names, strict=True)
    ]
    answers = verifier(captions, asked, reply_names)
    records = []
    for group, given in zip(asked, answers, strict=True):
        pairs = zip(group, given, strict=True)
        records.append([answer_record(question, answer, config.soft) for question, answer in pairs])
    parts = {"accuracy": torch.tensor([mean_score(record) for record in records])}
    weights = {}
    if config.has_other_parts:
        from reward.style import style_parts  # here: the paper's reward is the accuracy alone

        others, weights = style_parts(captions, lengths, config)
        parts |= others
    return Rewards(sum(parts.values()), parts, records, weights)


def answer_record(asked: Asked, answer: Answer, soft: bool) -> dict:
    """A question as asked and answered; `score` is what it earned, None where it failed."""
    if soft and not answer.probs and not answer.failure:
        raise ValueError('soft: expected a verifier that gives probabilities (mode "logits"), got '
                         "one that replies")
    correct = None if answer.failure else answer.chosen == asked.gold
    score = correct if correct is None else answer.probs[asked.gold] if soft else float(correct)
    return asdict(asked) | {
        "chosen": answer.chosen, "correct": correct, "score": score,
        "probs": [round(p, 4) for p in answer.probs],
        "reply": answer.reply, "failure": answer.failure,
    }


def answer_stats(records: Sequence[Sequence[dict]]) -> dict[str, float]:
    """Shares over all questions of all captions: `failed_share`. Over those that could be scored:
    `accuracy`, `unparsed_share` and `abstain_share`. The accuracy counts choices, also where the
    reward is soft. Ratings, which have no right option, have the first share only."""
    rows = [row for record in records for row in record]
    failed_share = {"failed_share": mean([bool(row["failure"]) for row in rows])}
    if rows and all(row["gold"] is None for row in rows):
        return failed_share
    scored = [row for row in rows if not row["failure"]]
    abstained = [row["abstain"] is not None and row["chosen"] == row["abstain"] for row in scored]
    return {
        "accuracy": mean([row["correct"] for row in scored]),
        "unparsed_share": mean([row["chosen"] is None for row in scored]),
        "abstain_share": mean(abstained),
    } | failed_share


def mean_score(record: Sequence[dict]) -> float:
    """Mean score over a caption's questions, or claims, that could be scored; NaN without one."""
    return mean([row["score"] for row in record if not row["failure"]])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# ---------------------------------------------------------------------------- 5. the verifier


class Verifier:
    """A causal language model that answers questions from captions. The captions that share a
    batch do not change each other's answers. Its weights must stay as they are.

    mode "logits": the likeliest of the offered letters. Nothing is sampled and nothing is parsed.
    mode "sample": a reply of at most `max_new_tokens` tokens at `temperature`, which
    `parse_choice` reads (the paper's way).
    token_budget: most tokens in the cache at a time, beside what `pad_left` and `make_room_` add.
    One caption with its questions always runs.
    prompt_text: see `PromptWriter`. Questions without options are answered in words, in mode
    "sample".
    """

    writer = PromptWriter

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                 mode: str = "logits", temperature: float = 0.6, max_new_tokens: int = 10,
                 token_budget: int = 262_144, prompt_text: str = "",
                 answer_start: str = ANSWER_START):
        if mode not in ("logits", "sample"):
            raise ValueError(f"expected verifier mode 'logits' or 'sample', got {mode!r}")
        if not temperature > 0:
            raise ValueError(f"expected a verifier temperature above 0, got {temperature}")
        self.model, self.tokenizer, self.mode = model, tokenizer, mode
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.token_budget = token_budget
        self.head_caches: dict[tuple[int, ...], tuple[DynamicCache, Tensor]] = {}  # by token ids
        self.writers = {abstain: self.writer(tokenizer, abstain, prompt_text, answer_start)
                        for abstain in (False, True)}
        self._prepare_()

    def _prepare_(self) -> None:
        # here: what they do is transformers' own, faster
        from grpo.fused import fuse_norms_
        from reward.attention import join_rows_, share_heads_

        share_heads_(self.model)
        fuse_norms_(self.model)
        join_rows_(self.model)
        text = self.model.config.get_text_config()
        self.context = getattr(text, "max_position_embeddings", None) or math.inf  # Bloom has none
        rope = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):
            # Beyond this length their angles depend on the longest row beside a row.
            original = getattr(text, "original_max_position_embeddings", None)
            self.context = rope.get("original_max_position_embeddings") or original or self.context
        self.eos_ids = eos_ids(self.model, self.tokenizer)
        self.forbidden_ids = unnamed_ids(self.model, self.tokenizer)
        pad_id = self.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(  # of the checkpoint's nothing else counts
            do_sample=False,  # the sampler has drawn already
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=self.tokenizer.eos_token_id if pad_id is None else pad_id,
        )

    def under(self, **settings) -> "Verifier":
        """The same model under other settings."""
        return type(self)(self.model, self.tokenizer, **settings)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], asked: Sequence[Sequence[Asked]],
                 names: Sequence[str]) -> list[list[Answer]]:
        """Answers to each caption's questions. names[i]: random stream of the replies to caption i.

        All questions of a call offer the abstain option or none does. A question fails, and no
        other of its caption, if its prompt does not fit into the verifier's context, or if its
        logits are not finite.
        """
        offered = {question.abstain is not None for group in asked for question in group}
        assert len(offered) < 2, "expected the abstain option on all questions of a call or on none"
        writer = self.writers[True in offered]
        caption_ids = [writer.caption_ids(caption) for caption in captions]
        question_ids = [list(map(writer.question_ids, group)) for group in asked]
        beside = len(writer.head_ids) + (self.max_new_tokens if self.mode == "sample" else 0)
        room = self.context - beside
        answers, fits, sizes = [], [], []  # fits: of each caption, places of questions with room
        for caption, group in zip(caption_ids, question_ids, strict=True):
            lengths = [len(caption) + len(question) for question in group]
            answers.append([Answer(None, failure=f"caption and question have {length} tokens, the "
                                   f"verifier has room for {room}") for length in lengths])
            fits.append([place for place, length in enumerate(lengths) if length <= room])
            sizes.append(beside + max((lengths[place] for place in fits[-1]), default=0))
        order = sorted((i for i, places in enumerate(fits) if places), key=sizes.__getitem__)
        # Rows of like lengths share a batch: less padding.
        for batch in token_batches(order, list(map(len, fits)), sizes, self.token_budget):
            places = [(i, place) for i in batch for place in fits[i]]
            kept = [[question_ids[i][place] for place in fits[i]] for i in batch]
            ids = [caption_ids[i] for i in batch], kept
            questions = [asked[i][place] for i, place in places]
            streams = [f"{names[i]}:{place}:reply" for i, place in places]
            row_answers = self._answers(writer, *ids, questions, streams)
            for (i, place), answer in zip(places, row_answers, strict=True):
                answers[i][place] = answer
        return answers

    def _answers(self, writer: PromptWriter, caption_ids: list[list[int]],
                 question_ids: list[list[list[int]]], questions: list[Asked],
                 streams: list[str]) -> list[Answer]:
        """One answer for each question of the batch."""
        head = tuple(writer.head_ids)
        if head not in self.head_caches:  # each is run once: the weights are frozen
            self.head_caches[head] = run_head(self.model, writer.head_ids)
        rows = question_rows_(self.model, writer.head_ids, caption_ids, question_ids,
                              copy.deepcopy(self.head_caches[head]))
        if self.mode == "logits":
            hidden, _, _ = run_rows_(self.model, *rows)
            logits = letter_logits(self.model, hidden[:, -1], writer.letter_ids).cpu()
            offered = [row[: len(question.options)] for row, question in zip(logits, questions)]
            return list(map(choose_letter, offered))
        sampler = RowSampler(streams, self.temperature, self.max_new_tokens, self.forbidden_ids,
                             self.model.device)
        replies = self._generate(*rows, sampler)
        broken = sampler.is_broken.tolist()
        return [read_reply(*row) for row in zip(replies, broken, questions, strict=True)]

    def _generate(self, rows: list[list[int]], parents: list[int], cache: DynamicCache,
                  seen: Tensor, sampler: "RowSampler") -> list[str]:
        """The text that follows each of the rows; all but the sampler as for `run_rows_`."""
        index = torch.tensor(parents, device=seen.device)
        ids, mask = pad_left(rows, seen.device)  # (B, L)
        past = seen.new_zeros(len(ids), seen.shape[1])  # generate skips ids that the cache holds
        if past.shape[1]:
            make_room_(self.model, cache, index, ids.shape[1] + self.max_new_tokens)
        out = self.model.generate(
            input_ids=torch.cat([past, ids], dim=1),
            attention_mask=torch.cat([seen[index], mask], dim=1),
            past_key_values=cache if past.shape[1] else None, logits_processor=[sampler],
            max_new_tokens=self.max_new_tokens,
        )
        new_ids = out[:, past.shape[1] + ids.shape[1] :]
        return self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)


def load_verifier(path: str, device: torch.device, dtype: torch.dtype = torch.float32,
                  name: str = "", **settings) -> Verifier:
    """A frozen verifier from a local folder or a hub name, or one called `name` at the address of a
    server; `settings` go to `Verifier`. Raises ValueError if it cannot be used."""
    if name or "://" in path:
        from reward.remote import load_remote  # here: for who has a server

        return load_remote(path, name, **settings)
    from grpo.pretrained import load_model, load_tokenizer, loading  # here: pages of their own
    from reward.check import check_rows

    with loading(path, "verifier"):
        tokenizer = load_tokenizer(path)
        model = load_model(AutoModelForCausalLM, path, dtype).to(device).eval()
        verifier = Verifier(model.requires_grad_(False), tokenizer, **settings)
        check_rows(model, verifier.writers[False])
    return verifier


# --------------------------------------------------------------------------- 6. the mechanics


def letter_logits(model: PreTrainedModel, hidden: Tensor, letter_ids: list[int]) -> Tensor:
    """Logits (rows, letters) of hidden states (rows, H), by the letters' rows of the head alone. In
    float32, where letters of like logits do not tie: a tie would always go to the first one."""
    lm_head, text = model.get_output_embeddings(), model.config.get_text_config()
    logits = F.linear(hidden.float(), lm_head.weight[letter_ids].float())
    if lm_head.bias is not None:
        logits = logits + lm_head.bias[letter_ids].float()
    logits = logits * (getattr(text, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(text, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(text, "final_logit_softcapping", None)  # Gemma
    return torch.tanh(logits / cap) * cap if cap else logits


def question_rows_(model: PreTrainedModel, head: list[int], captions: list[list[int]],
                   questions: list[list[list[int]]], head_cache: tuple[DynamicCache, Tensor]):
    """The arguments of `run_rows_` for each (caption, question): the token ids still to be run,
    their places in the cache, the cache and its mask. Head, captions, questions are token ids;
    `head_cache` is of `run_head`, and changed. Where `shares_prompts`, captions are run once."""
    rows = [row for group in questions for row in group]
    parents = [i for i, group in enumerate(questions) for _ in group]
    if not shares_prompts(head_cache[0]):
        whole = [head + captions[i] + row for i, row in zip(parents, rows)]
        return whole, [0] * len(rows), *head_cache
    _, cache, seen = run_rows_(model, captions, [0] * len(captions), *head_cache)
    return rows, parents, cache, seen


def run_head(model: PreTrainedModel, head: list[int]) -> tuple[DynamicCache, Tensor]:
    """A cache of one row, and its mask (1, T) int64, of the T tokens of the head, with which every
    prompt begins. T is 0 for a model whose rows cannot share the beginning of a prompt."""
    cache = DynamicCache(config=model.config)
    seen = torch.ones(1, 0, dtype=torch.long, device=model.device)
    if head and shares_prompts(cache):
        _, cache, seen = run_rows_(model, [head], [0], cache, seen)
    return cache, seen


def shares_prompts(cache: DynamicCache) -> bool:
    """Whether head and captions are run once and shared: if every layer sees all that came before.
    Padding between caption and question disturbs other layers: a window counts it among its places,
    and a recurrent state reads it. For them each row is the whole prompt, padded in front only. An
    empty cache tells it too."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def run_rows_(model: PreTrainedModel, rows: list[list[int]], parents: list[int],
              cache: DynamicCache, seen: Tensor) -> tuple[Tensor, DynamicCache, Tensor]:
    """Runs B rows of token ids. Row i continues row parents[i] of the P rows in the cache, so that
    a shared beginning is computed once.

    seen: (P, T) int64, 1 on the T cached tokens that count. Returns hidden states (B, L, H), the
    cache and `seen` for the B rows. The cache is changed in place, from P rows to B. Rows are
    padded on the left, so that the last state is at -1. Padding is masked and takes no position.
    """
    ids, mask = pad_left(rows, seen.device)
    index = torch.tensor(parents, device=seen.device)
    if seen.shape[1]:  # an empty cache of some models cannot select rows
        cache.batch_select_indices(index)
    seen = torch.cat([seen[index], mask], dim=1)  # (B, T + L)
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model.base_model(
        input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state, cache, seen


def repeats_shapes(device: torch.device) -> bool:
    """Whether rows are padded further, so that shapes repeat from batch to batch. A GPU's libraries
    may plan anew for each shape. On a CPU padding is only more work."""
    return device.type != "cpu"


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, L) int64 each; the padding's id is 0, and masked. Where shapes repeat
    L is a multiple of 16, from 512 on of 64 and so on."""
    width = max(map(len, rows))
    if repeats_shapes(device):
        width += -width % max(16, 2 ** (width.bit_length() - 4))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def make_room_(model: PreTrainedModel, cache: DynamicCache, rows: Tensor, num_tokens: int) -> None:
    """Replaces the cache's rows by `rows`, (B,) int64, with room for at least `num_tokens` more
    tokens. Layer by layer, so that two whole caches are never held. Where shapes repeat all of it
    is a multiple of 128."""
    if repeats_shapes(model.device):
        num_tokens += -(cache.get_seq_length() + num_tokens) % 128
    is_whole = model.config._attn_implementation == "shared_heads"  # others may mask by themselves
    for number, layer in enumerate(cache.layers):
        cache.layers[number] = RoomyLayer(layer, rows, num_tokens, is_whole)


class RoomyLayer(DynamicLayer):
    """Rows of a cache layer with room for more tokens, which are written in place. DynamicLayer
    copies all that it holds for each new token. The rows cannot be changed later: it is for
    `generate` without beams. is_whole: keys and values are given out with the room that is left,
    zeros, which transformers masks, so that their shape stays the same."""

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int, is_whole: bool = False):
        super().__init__()
        self.is_whole = is_whole
        self.lazy_initialization(layer.keys, layer.values)
        # (B, heads, T + room, D) each. Rows are chosen last, since most come several times.
        self.roomy = [F.pad(part, (0, 0, 0, room)).index_select(0, rows)
                      for part in (layer.keys, layer.values)]
        self.keys, self.values = (part[:, :, : layer.keys.shape[2]] for part in self.roomy)

    def update(self, key_states: Tensor, value_states: Tensor, *args,
               **kwargs) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        stop, most = start + key_states.shape[2], self.roomy[0].shape[2]
        assert stop <= most, f"expected at most {most} tokens, got {stop}"
        for part, new in zip(self.roomy, (key_states, value_states)):
            part[:, :, start:stop] = new
        self.keys, self.values = (part[:, :, :stop] for part in self.roomy)
        return tuple(self.roomy) if self.is_whole else (self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        filled, _ = super().get_mask_sizes(query_length)
        return (self.roomy[0].shape[2] if self.is_whole else filled), 0


class RowSampler(LogitsProcessor):
    """Sampling inside `generate`, a random stream for each row: no reply depends on other rows."""

    def __init__(self, streams: list[str], temperature: float, max_new_tokens: int,
                 forbidden_ids: Sequence[int], device: torch.device):
        self.temperature = temperature
        self.forbidden = torch.tensor(forbidden_ids, dtype=torch.long, device=device)
        sources = [random.Random(name) for name in streams]
        uniforms = [[rng.random() for _ in range(max_new_tokens)] for rng in sources]
        self.uniforms = iter(torch.tensor(uniforms, device=device).unbind(1))  # (B,) for each token
        self.is_broken = torch.zeros(len(streams), dtype=torch.bool, device=device)
        """Rows whose logits were not finite at some token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = temper_logits_(scores, self.temperature, self.forbidden).softmax(-1)  # (B, V)
        self.is_broken |= probs[:, 0].isnan()  # a row is NaN everywhere or nowhere
        token = draw_tokens(probs, next(self.uniforms))
        # generate takes the largest score, for some models after a log-softmax. The largest finite
        # number stands for the drawn token: an infinity would become NaN there.
        return scores.scatter_(1, token[:, None], torch.finfo(scores.dtype).max)


def token_batches(items: list[int], num_rows: list[int], lengths: list[int],
                  token_budget: int) -> Iterator[list[int]]:
    """Splits `items`, in order, into batches. The rows of a batch, all padded to the longest, take
    at most `token_budget` tokens, unless it is a single item. All but the last have 1, 2, 3, 4, 6,
    8, 12, 16, 24, ... items: shapes that repeat."""
    while items:
        rows = longest = count = 0
        for item in items:
            rows, longest = rows + num_rows[item], max(longest, lengths[item])
            if count and rows * longest > token_budget:
                count -= count % 2 ** max(0, count.bit_length() - 2)
                break
            count += 1
        yield items[:count]
        items = items[count:]


if __name__ == "__main__":
    from data.program import run_program
    from tools.audit import main

    run_program(main)
