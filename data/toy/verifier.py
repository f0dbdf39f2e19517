"""The toy verifier: a Qwen2 of about one million parameters that reads captions and nothing else.

It is trained through the function that uses it (`reward.caprl.prefill`): same prompt, same cache layout. Asked for option
letters alone it stays near the guess rate for thousands of steps, so each step on the way is taught too, and the
probes that teach it are thrown away: a value in the caption has to know its subject, the question mark has to know the
value that is asked for, and an option has to know whether it is that value.
"""

import random
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from data.examples import Question
from data.toy.fit import INITIALIZER_RANGE, fit
from data.toy.world import COMMON_KNOWLEDGE, DOMAINS, Fact, Scene, make_scene, write_caption, write_question, write_sentence
from reward.caprl import LETTERS, PromptWriter, prefill, shuffle_options

RECALL_STEPS = 800
"""Steps at the start without options, on captions that only state who has which color, size, place or value: what is hard
is to tell the subjects apart, and few facts at a time teach it fastest."""
BARE_PROMPT = 0.75
"""Share of the steps in which the instruction is mostly left out: it costs time and teaches little."""


def build_verifier(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=INITIALIZER_RANGE,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )


def perturb(facts: tuple[Fact, ...], share: float, rng: random.Random) -> list[Fact]:
    """Facts with about `share` of the values replaced: what a mistaken caption claims."""
    return [
        replace(fact, value=rng.choice([v for v in DOMAINS[fact.attribute] if v not in (fact.value, fact.subject)]))
        if rng.random() < share else fact
        for fact in facts
    ]


def binding_claims(scene: Scene, rng: random.Random) -> list[Fact]:
    """Some of the facts in which only the subject tells which value is meant, often of a single attribute."""
    facts = [fact for fact in scene.facts if fact.subject and fact.attribute in ("color", "size", "place", "value")]
    if rng.random() < 0.6:
        attribute = rng.choice(facts).attribute
        facts = [fact for fact in facts if fact.attribute == attribute]
    kept = rng.sample(range(len(facts)), min(len(facts), rng.choice((2, 3, 4, 6, 12))))
    return [facts[i] for i in sorted(kept)]


def any_claims(scene: Scene, rng: random.Random) -> tuple[str, list[Fact]]:
    """A caption of any quality and the facts that it claims: dense, sparse, mistaken, disordered, empty or junk."""
    claims = perturb(scene.facts, rng.choice((0, 0, 0.1, 0.3)), rng)
    kept = rng.choice((1.0, 1.0, 0.8, 0.5, 0.25, 0.0))
    claims = [fact for fact in claims if rng.random() < kept]
    kind = rng.random()
    if kind < 0.05:  # words in no order, or one word again and again
        words = [v for values in DOMAINS.values() for v in values] + ["The answer is", *LETTERS[:5], "."]
        drawn = rng.choices(words, k=rng.randint(1, 30)) if kind < 0.03 else [rng.choice(words)] * rng.randint(1, 60)
        return " ".join(drawn), []
    if kind < 0.08:  # a question's own words, an answer by letter
        asked = write_question(scene, rng.choice(scene.facts), rng).question
        return f"{asked} The answer is {rng.choice(LETTERS[:5])}.", []
    if kind < 0.2:
        rng.shuffle(claims)
    return write_caption(scene.family, claims), claims


@dataclass
class Lesson:
    """A caption and questions on it, each in two parts: up to the question mark, and the options up to the answer.

    Targets are counted from the end of a part, since rows are padded on the left.
    """

    caption: list[int]
    subjects: list[tuple[int, int]]  # (place of a value in the caption, its subject's token)
    questions: list[list[int]] = field(default_factory=list)
    options: list[list[int]] = field(default_factory=list)
    asked: list[int | None] = field(default_factory=list)  # the token of each question's subject
    recall: list[dict[int, float]] = field(default_factory=list)  # the next token after the question mark, if any
    letters: list[dict[int, float]] = field(default_factory=list)  # the next token after "The answer is"
    is_right: list[list[tuple[int, float]]] = field(default_factory=list)  # (place of an option's last token, 1 if it is right)


def make_lesson(writer: PromptWriter, scene: Scene, is_first: bool, abstain: bool, rng: random.Random) -> Lesson:
    if is_first:
        claims = about = binding_claims(scene, rng)
        caption = write_caption(scene.family, claims)
    else:
        caption, claims = any_claims(scene, rng)
        about = rng.sample(scene.facts, min(7, len(scene.facts)))
    first = lambda text: writer.tokenizer.encode(f" {text}", add_special_tokens=False)[0]  # noqa: E731
    lesson = Lesson(writer.caption_ids(caption), [])
    end = len(writer.middle_ids)
    for fact in reversed(claims):
        if fact.subject:
            lesson.subjects.append((-end - 2, first(fact.subject)))  # the value stands before the full stop
        end += len(writer.tokenizer.encode(" " + write_sentence(scene.family, fact), add_special_tokens=False))
    claimed = {(fact.subject, fact.attribute): fact.value for fact in claims}
    pairs = [(write_question(scene, fact, rng), fact.subject, claimed.get((fact.subject, fact.attribute))) for fact in about]
    if not is_first and rng.random() < 0.3:
        text, choices, answer_index = rng.choice(COMMON_KNOWLEDGE)
        pairs.append((Question(text, choices, answer_index), "", choices[answer_index]))
    for question, subject, value in pairs:
        asked = shuffle_options(question, 0, rng, abstain)
        ids, offered = writer.question_ids(asked), writer.letter_ids[: len(asked.options)]
        cut = len(writer.question_ids(replace(asked, options=()))) - len(writer.tail_ids)
        lesson.questions.append(ids[:cut])
        lesson.options.append(ids[cut:])
        lesson.asked.append(first(subject) if subject else None)
        lesson.recall.append({} if value is None else {first(value): 1.0})
        right = asked.options.index(value) if value in asked.options else asked.abstain
        # Where the caption does not say and abstaining is not offered, every option alike: guessing stays at chance.
        lesson.letters.append(dict.fromkeys(offered, 1 / len(offered)) if right is None else {offered[right]: 1.0})
        ends = [len(writer.question_ids(replace(asked, options=asked.options[: n + 1]))) for n in range(len(offered))]
        tail = len(writer.tail_ids)
        lesson.is_right.append([(end - tail - 1 - len(ids), float(n == right)) for n, end in enumerate(ends)])
    return lesson


class Pupil(nn.Module):
    """The model and the probes of its lessons."""

    def __init__(self, model: Qwen2ForCausalLM):
        super().__init__()
        self.model = model
        self.subject_probe = nn.Linear(model.config.hidden_size, model.config.vocab_size)
        self.asked_probe = nn.Linear(model.config.hidden_size, model.config.vocab_size)
        self.right_probe = nn.Linear(model.config.hidden_size, 1)

    def forward(self, head: list[int], lessons: list[Lesson], with_options: bool) -> tuple[Tensor, dict[str, float]]:
        """The sum of the lessons' mean losses, and the shares of values recalled and letters chosen rightly."""
        model, cache = self.model, DynamicCache(config=self.model.config)
        _, cache, seen = prefill(model, [head], [0], cache, torch.ones(1, 0, dtype=torch.long))
        hidden, cache, seen = prefill(model, [lesson.caption for lesson in lessons], [0] * len(lessons), cache, seen)
        places = [(row, place, token) for row, lesson in enumerate(lessons) for place, token in lesson.subjects]
        rows, at, tokens = torch.tensor(places).T
        loss = F.cross_entropy(self.subject_probe(hidden[rows, at]), tokens)
        parents = [row for row, lesson in enumerate(lessons) for _ in lesson.questions]
        questions = [ids for lesson in lessons for ids in lesson.questions]
        hidden, cache, seen = prefill(model, questions, parents, cache, seen)
        asked = [(row, token) for row, token in enumerate(a for lesson in lessons for a in lesson.asked) if token is not None]
        rows, tokens = torch.tensor(asked).T
        loss = loss + F.cross_entropy(self.asked_probe(hidden[rows, -1]), tokens)
        recall_loss, recall = _loss(model.lm_head(hidden[:, -1]), [target for lesson in lessons for target in lesson.recall])
        if not with_options:
            return loss + recall_loss, {"recall": recall}
        options = [ids for lesson in lessons for ids in lesson.options]
        hidden, _, _ = prefill(model, options, list(range(len(options))), cache, seen)
        letter_loss, letters = _loss(model.lm_head(hidden[:, -1]), [target for lesson in lessons for target in lesson.letters])
        marks = [mark for lesson in lessons for mark in lesson.is_right]
        rows = torch.tensor([row for row, group in enumerate(marks) for _ in group])
        at = torch.tensor([place for group in marks for place, _ in group])
        is_right = torch.tensor([value for group in marks for _, value in group])
        right_loss = F.binary_cross_entropy_with_logits(self.right_probe(hidden[rows, at])[:, 0], is_right)
        return loss + recall_loss + right_loss + letter_loss, {"recall": recall, "letters": letters, "marks": right_loss.item()}


def _loss(logits: Tensor, targets: list[dict[int, float]]) -> tuple[Tensor, float]:
    """Mean cross-entropy with soft targets, and the share answered rightly where one token is right."""
    probs = torch.zeros_like(logits)
    for row, target in enumerate(targets):
        for token, probability in target.items():
            probs[row, token] = probability
    certain = probs.amax(-1) == 1
    right = (logits.argmax(-1) == probs.argmax(-1))[certain].float().mean().item()
    return -(probs * logits.log_softmax(-1)).sum() / len(targets), right


def train_verifier(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int, captions: int = 20) -> Qwen2ForCausalLM:
    pupil = Pupil(build_verifier(tokenizer, seed))
    writers = {abstain: PromptWriter(tokenizer, abstain) for abstain in (False, True)}

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"verifier:{seed}:{step}")
        is_first = step < min(RECALL_STEPS, steps // 2)
        abstain = not is_first and rng.random() < 0.4
        writer = writers[abstain]
        is_bare = step < BARE_PROMPT * steps and rng.random() < 0.95
        scenes = [make_scene("train", rng.randrange(10**6)) for _ in range(captions)]
        lessons = [make_lesson(writer, scene, is_first, abstain, rng) for scene in scenes]
        return pupil(writer.head_ids[-8:] if is_bare else writer.head_ids, lessons, with_options=not is_first)

    fit(pupil, loss_at, steps, "verifier")
    return pupil.model
