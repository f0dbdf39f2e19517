"""The toy verifier: a Qwen2 of about 1.4 million parameters that reads captions and nothing else.

It is trained through the function that uses it (`reward.caprl.run_rows_`): same prompt, same cache
layout. Asked for option letters at once it stays near the guess rate for thousands of steps. So it
first learns two easier things side by side. One is to recall what a caption says: "What color is
the star?" and, at the question mark, " red". The other is to find the letter of an option that is
named outright ("Which option is red?"). From there it is not far to questions on short captions.
Probes teach each step of the way and are thrown away afterwards. At a value in the caption they ask
for its subject, at the question mark for the subject and the value asked for. At an option they ask
whether it is that value.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from data.choices import LETTERS
from data.examples import Question
from data.toy.fit import INITIALIZER_RANGE, fit
from data.toy.world import (
    COMMON_KNOWLEDGE,
    DOMAINS,
    Fact,
    Scene,
    make_scene,
    perturb,
    write_caption,
    write_question,
    write_sentence,
)
from reward.caprl import PromptWriter, run_head, run_rows_, shuffle_options

RECALL_ENOUGH, FEW_ENOUGH = 0.96, 0.97
"""The next stage begins at these shares of values recalled and letters found. The stages are
questions on few facts, then captions of every kind. When this is depends on the seed, and a stage
that begins too early teaches nothing."""
WHOLE_STEPS, BARE_UNTIL = 0.7, 0.5
"""Steps of the last stage, as a share of what the others may take. The second number is the share
of them in which the instruction is mostly left out, as it is before. It costs time and teaches
little."""
LONG_SHARE = 0.3
"""Share of the last steps that have a caption of up to 2,000 tokens of junk too. However long junk
is, there is nothing in it to answer from. At 0.05 the verifier guessed on such captions, where it
should abstain."""


def build_verifier(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096,
            tie_word_embeddings=True, initializer_range=INITIALIZER_RANGE,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def few_claims(scene: Scene, rng: random.Random) -> list[Fact]:
    """A few of the facts. Often they are those in which only the subject tells which value is
    meant: that is the hard part."""
    facts = list(scene.facts)
    if rng.random() < 0.7:
        facts = [fact for fact in facts
                 if fact.subject and fact.attribute in ("color", "size", "place", "value")]
        if rng.random() < 0.6:
            attribute = rng.choice(facts).attribute
            facts = [fact for fact in facts if fact.attribute == attribute]
    kept = rng.sample(range(len(facts)), min(len(facts), rng.choice((2, 3, 4, 6, 14))))
    return [facts[i] for i in sorted(kept)]


def any_claims(scene: Scene, rng: random.Random) -> tuple[str, list[Fact]]:
    """A caption of any quality and the facts that it claims: dense, sparse, mistaken, disordered,
    empty or junk."""
    claims = perturb(scene.facts, rng.choice((0, 0, 0.1, 0.3)), rng)
    kept = rng.choice((1.0, 1.0, 0.8, 0.5, 0.25, 0.0))
    claims = [fact for fact in claims if rng.random() < kept]
    kind = rng.random()
    if kind < 0.05:  # words in no order, or one word again and again
        words = [word for values in DOMAINS.values() for word in values]
        words += ["The answer is", *LETTERS[:5], "."]
        if kind < 0.03:
            return " ".join(rng.choices(words, k=rng.randint(1, 30))), []
        return " ".join([rng.choice(words)] * rng.randint(1, 60)), []
    if kind < 0.08:  # a question's own words, an answer by letter
        asked = write_question(scene, rng.choice(scene.facts), rng).question
        return f"{asked} The answer is {rng.choice(LETTERS[:5])}.", []
    if kind < 0.2:
        rng.shuffle(claims)
    return write_caption(scene.family, claims), claims


@dataclass
class Lesson:
    """A caption and questions on it. Each question has two parts: up to the question mark, and the
    options up to the answer.

    Places are counted from the end of a part, since rows are padded on the left.
    """

    caption: list[int]
    # (place of a value in the caption, its subject's token)
    subjects: list[tuple[int, int]] = field(default_factory=list)
    questions: list[list[int]] = field(default_factory=list)
    asked: list[int | None] = field(default_factory=list)  # the token of each question's subject
    # probabilities of what follows the question mark
    recall: list[dict[int, float]] = field(default_factory=list)
    options: list[list[int]] = field(default_factory=list)  # empty in a lesson on recall alone
    # probabilities of what follows "The answer is"
    letters: list[dict[int, float]] = field(default_factory=list)
    # (place of an option's last token, 1 if it is right)
    is_right: list[list[tuple[int, float]]] = field(default_factory=list)


class Teacher:
    """Writes lessons for one kind of prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, abstain: bool):
        self.tokenizer, self.abstain = tokenizer, abstain
        self.writer = PromptWriter(tokenizer, abstain)

    def first_id(self, text: str) -> int:
        return self.tokenizer.encode(f" {text}", add_special_tokens=False)[0]

    def caption_lesson(self, family: str, caption: str, claims: Sequence[Fact]) -> Lesson:
        lesson, end = Lesson(self.writer.caption_ids(caption)), len(self.writer.middle_ids)
        for fact in reversed(claims):
            if fact.subject:
                # a value stands before the full stop
                lesson.subjects.append((-end - 2, self.first_id(fact.subject)))
            end += len(self.tokenizer.encode(" " + write_sentence(family, fact),
                                             add_special_tokens=False))
        return lesson

    def add_question(self, lesson: Lesson, question: Question, subject: str, value: str | None,
                     with_options: bool, rng: random.Random) -> None:
        """`value` is what the caption says, or None."""
        asked = shuffle_options(question, 0, rng, self.abstain)
        ids, tail = self.writer.question_ids(asked), len(self.writer.tail_ids)
        ends = [len(self.writer.question_ids(replace(asked, options=asked.options[:n])))
                for n in range(len(asked.options) + 1)]
        cut = ends[0] - tail
        lesson.questions.append(ids[:cut])
        lesson.asked.append(self.first_id(subject) if subject else None)
        lesson.recall.append({} if value is None else {self.first_id(value): 1.0})
        if with_options:
            offered = self.writer.letter_ids[: len(asked.options)]
            right = asked.options.index(value) if value in asked.options else asked.abstain
            lesson.options.append(ids[cut:])
            # Where the caption does not say and abstaining is not offered, all options are equally
            # likely: guessing stays at chance.
            lesson.letters.append(dict.fromkeys(offered, 1 / len(offered))
                                  if right is None else {offered[right]: 1.0})
            lesson.is_right.append([(end - tail - 1 - len(ids), float(n == right))
                                    for n, end in enumerate(ends[1:])])

    def few_lesson(self, scene: Scene, with_options: bool, rng: random.Random) -> Lesson:
        claims = few_claims(scene, rng)
        lesson = self.caption_lesson(scene.family, write_caption(scene.family, claims), claims)
        for fact in claims:
            self.add_question(lesson, write_question(scene, fact, rng), fact.subject, fact.value,
                              with_options, rng)
        return lesson

    def letter_lesson(self, num_questions: int, rng: random.Random) -> Lesson:
        lesson = self.caption_lesson("", "", ())
        for _ in range(num_questions):
            domain = rng.choice(list(DOMAINS.values()))
            choices = rng.sample(domain, min(len(domain), rng.choice((2, 3, 4, 4))))
            self.add_question(lesson, Question(f"Which option is {choices[0]}?", tuple(choices), 0),
                              "", choices[0], True, rng)
        return lesson

    def whole_lesson(self, scene: Scene, num_questions: int, rng: random.Random) -> Lesson:
        caption, claims = any_claims(scene, rng)
        claimed = {(fact.subject, fact.attribute): fact.value for fact in claims}
        lesson = self.caption_lesson(scene.family, caption, claims)
        for fact in rng.sample(scene.facts, min(num_questions, len(scene.facts))):
            value = claimed.get((fact.subject, fact.attribute))
            self.add_question(lesson, write_question(scene, fact, rng), fact.subject, value, True,
                              rng)
        if rng.random() < 0.3:
            text, choices, answer_index = rng.choice(COMMON_KNOWLEDGE)
            self.add_question(lesson, Question(text, choices, answer_index), "",
                              choices[answer_index], True, rng)
        return lesson

    def long_lesson(self, scene: Scene, rng: random.Random) -> Lesson:
        words = [value for values in DOMAINS.values() for value in values]
        number = rng.randint(60, 2000)
        words = rng.choices(words, k=number) if rng.random() < 0.3 else [rng.choice(words)] * number
        lesson = self.caption_lesson(scene.family, " ".join(words), ())
        for fact in scene.facts:
            self.add_question(lesson, write_question(scene, fact, rng), fact.subject, None, True,
                              rng)
        return lesson


class Pupil(nn.Module):
    """The model and the probes of its lessons."""

    def __init__(self, model: Qwen2ForCausalLM):
        super().__init__()
        self.model = model
        self.subject_probe = nn.Linear(model.config.hidden_size, model.config.vocab_size)
        self.asked_probe = nn.Linear(model.config.hidden_size, model.config.vocab_size)
        self.right_probe = nn.Linear(model.config.hidden_size, 1)

    def forward(self, head: list[int], lessons: list[Lesson]) -> tuple[Tensor, dict[str, float]]:
        """The sum of the mean losses, and the shares of values recalled and letters chosen
        rightly."""
        model = self.model
        captions = [lesson.caption for lesson in lessons]
        hidden, cache, seen = run_rows_(model, captions, [0] * len(captions),
                                        *run_head(model, head))
        rows, at, tokens = _columns([(row, *subject) for row, lesson in enumerate(lessons)
                                     for subject in lesson.subjects], 3)
        loss = F.cross_entropy(self.subject_probe(hidden[rows, at]), tokens,
                               reduction="sum") / max(len(tokens), 1)

        parents = [row for row, lesson in enumerate(lessons) for _ in lesson.questions]
        hidden, cache, seen = run_rows_(model,
                                        [ids for lesson in lessons for ids in lesson.questions],
                                        parents, cache, seen)
        asked = [(row, token)
                 for row, token in enumerate(a for lesson in lessons for a in lesson.asked)
                 if token is not None]
        rows, tokens = _columns(asked, 2)
        loss = loss + F.cross_entropy(self.asked_probe(hidden[rows, -1]), tokens,
                                      reduction="sum") / max(len(tokens), 1)
        recall_loss, recall = _loss(model.lm_head(hidden[:, -1]),
                                    [target for lesson in lessons for target in lesson.recall])

        with_options = [row for row, lesson in enumerate(ls for ls in lessons for _ in ls.questions)
                        if lesson.options]
        if not with_options:
            return loss + recall_loss, {"recall": recall}
        hidden, _, _ = run_rows_(model, [ids for lesson in lessons for ids in lesson.options],
                                 with_options, cache, seen)
        marks = [(row, *m)
                 for row, group in enumerate(g for lesson in lessons for g in lesson.is_right)
                 for m in group]
        rows, at, is_right = _columns(marks, 3)
        logits = self.right_probe(hidden[rows.long(), at.long()])[:, 0]
        right_loss = F.binary_cross_entropy_with_logits(logits, is_right)
        letter_loss, letters = _loss(model.lm_head(hidden[:, -1]),
                                     [target for lesson in lessons for target in lesson.letters])
        return loss + recall_loss + right_loss + letter_loss, {"recall": recall, "letters": letters}


def _columns(rows: list[tuple], width: int) -> Tensor:
    return torch.tensor(rows).T if rows else torch.zeros(width, 0, dtype=torch.long)


def _loss(logits: Tensor, targets: list[dict[int, float]]) -> tuple[Tensor, float]:
    """Mean cross-entropy with soft targets, and the share answered rightly where one token is
    right."""
    probs = torch.zeros_like(logits)
    for row, target in enumerate(targets):
        for token, probability in target.items():
            probs[row, token] = probability
    certain = probs.amax(-1) == 1
    right = (logits.argmax(-1) == probs.argmax(-1))[certain].float().mean().item()
    return -(probs * logits.log_softmax(-1)).sum() / len(targets), right


def train_verifier(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> Qwen2ForCausalLM:
    """At most `steps` steps for each of the first two stages."""
    pupil = Pupil(build_verifier(tokenizer, seed))
    teachers = {abstain: Teacher(tokenizer, abstain) for abstain in (False, True)}

    def draw_lesson(name: str, abstain_share: float, bare_share: float):
        rng = random.Random(f"verifier:{seed}:{name}")
        teacher = teachers[rng.random() < abstain_share]
        head = teacher.writer.head_ids[-8 if rng.random() < bare_share else 0 :]
        return rng, teacher, head, [make_scene("train", rng.randrange(10**6)) for _ in range(14)]

    def few_at(step: int, name: str, with_options: bool) -> tuple[Tensor, dict[str, float]]:
        rng, teacher, head, scenes = draw_lesson(f"{name}:{step}", 0.0, 0.95)
        return pupil(head,
                     [*(teacher.few_lesson(scene, with_options, rng) for scene in scenes),
                      teacher.letter_lesson(40, rng)])

    def whole_at(step: int) -> tuple[Tensor, dict[str, float]]:
        is_bare = step < BARE_UNTIL * whole_steps
        rng, teacher, head, scenes = draw_lesson(f"whole:{step}", 0.5, 0.95 if is_bare else 0.0)
        lessons = [*(teacher.whole_lesson(scene, 6, rng) for scene in scenes),
                   teacher.letter_lesson(10, rng)]
        loss, shown = pupil(head, lessons)
        # by itself: beside the others it would pad them all
        if not is_bare and rng.random() < LONG_SHARE:
            loss = loss + pupil(head, [teacher.long_lesson(scenes[0], rng)])[0]
        return loss, shown

    whole_steps = round(WHOLE_STEPS * steps)
    recall_at = partial(few_at, name="recall", with_options=False)
    letters_at = partial(few_at, name="letters", with_options=True)
    fit(pupil, recall_at, steps, "recall", warmup_share=0.02, decay_share=0.1, enough=RECALL_ENOUGH)
    fit(pupil, letters_at, steps, "few facts", warmup_share=0.02, decay_share=0.1, rate=1.4e-3,
        enough=FEW_ENOUGH)
    fit(pupil, whole_at, whole_steps, "captions", warmup_share=0.02, decay_share=1.0, rate=1e-3)
    return pupil.model
