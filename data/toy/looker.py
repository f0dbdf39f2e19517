"""The toy looker: a Qwen2.5-VL of about three million parameters that looks at an image. It answers
questions, judges claims and rates captions.

It is grown from the shipped policy, with four more layers. First its vision tower learns to tell
words and numbers apart, which the policy's does not. Then it learns to look things up: at a
question mark the value that is asked for, at a claim's value whether it holds. Then it learns to
give the letter of an option that the question names outright. That needs no image, so a step is
short. Then it answers from images by letters, and last it learns all that programs ask of it:
`data.curate filter` (with the image and without), `evaluate.py direct`, the part `correctness`
(reward/claims.py), the judge (reward/judge.py).

Probes teach each step of the way and are thrown away afterwards. The image's tokens tell what is
drawn where they are. At a question mark and at a claim's value the states tell the subject, and
there the true value. Without them it takes several times as long to learn which object is meant.
The targets at question marks, options and claims are asked for before the last layers (EARLY). So
what compares them and what answers comes after.
"""

import copy
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration

from data.choices import LETTERS
from data.curate.answers import BLIND, SEEING
from data.examples import Question
from data.io import write_whole
from data.toy.captioner import SHARPNESS, draw_scenes, sharpen_
from data.toy.fit import fit
from data.toy.world import (
    COMMON_KNOWLEDGE,
    DOMAINS,
    FAMILIES,
    HEIGHTS,
    ORDINALS,
    PLACES,
    SHAPES,
    SIZES,
    Fact,
    Scene,
    draw,
    other_values,
    write_question,
    write_sentence,
)
from grpo.logprobs import CompletionScorer, pack_groups
from grpo.policy import Policy, Prompt, chat_text, image_inputs
from grpo.pretrained import make_policy
from grpo.rollout import Rollouts
from reward.caprl import ANSWER_START, shuffle_options
from reward.claims import CLAIM_INSTRUCTION
from reward.judge import RATING_INSTRUCTION, RATING_START, RATINGS
from tools.prism import LETTER_FORM

NUM_LAYERS = 8
"""Layers of the language model; the policy has 4. The added ones begin as doing nothing."""
EARLY = {"value": 2, "true value": 2, "subject": 2, "truth": 1, "recall": 1}
"""Kinds of target that are taught so many layers before the last. The value that is asked for is
told at the question mark. Options are compared with it, and it is recalled where the answer begins.
Then the answer takes the letter of the option that fits. Each needs a layer of its own after what
it reads. With all kinds at the last layer, letters came to 0.36 to 0.45 only (docs/results.md)."""
LOOKUPS = ("question",) * 5 + ("statement",) * 5
NAMES = ("named",) * 8 + ("question",)  # one with an image: looking is not forgotten
LETTERING = (("filter",) * 5 + ("named",) * 2
             + ("direct", "direct", "blind", "claim", "claim", "claim", "rating"))
ANSWERS = ("filter", "filter", "direct", "direct", "blind") + ("claim",) * 6 + ("rating",) * 3
"""Forms of the turns in a step of the last four stages, an image each."""
TURNS = {LOOKUPS: 12, NAMES: 6, LETTERING: 6, ANSWERS: 6}
"""Turns on an image."""
SIGHTS = 32
"""Images in a step that teaches the vision tower alone."""
ENOUGH = 0.96
"""The next stage begins at this share of words told, of values told and claims judged rightly."""

# ------------------------------------------------------------------------------------------- turns

Target = dict[str, float]
"""Probabilities of the texts that may follow; of a truth, that it holds."""


@dataclass
class Turn:
    """What a user says, the answer's given start, and what is taught on them."""

    text: str
    answer_start: str = ""
    answer: Target = field(default_factory=dict)  # what follows; empty if nothing is answered
    kind: str = ""  # of the answer
    marks: list[tuple[int, str, Target]] = field(default_factory=list)
    """(end of a token in `text`, kind, target)"""


def subject_mark(end: int, fact: Fact) -> list[tuple[int, str, Target]]:
    return [(end, "subject", {f" {fact.subject}": 1.0})] if fact.subject else []


def lookup_turn(scene: Scene, fact: Fact, rng: random.Random) -> Turn:
    text = f"{SEEING} {write_question(scene, fact, rng).question}"
    mark = (len(text), "value", {f" {fact.value}": 1.0})
    return Turn(text + "\n", marks=[mark, *subject_mark(len(text), fact)])


def question_turn(question: Question, value: str | None, form: str, rng: random.Random) -> Turn:
    """`form`: "filter", "blind" or "direct". value: what is right; None if that cannot be known.
    Then all options are equally likely."""
    asked = shuffle_options(question, 0, rng)
    start = {"filter": f"{SEEING} ", "blind": f"{BLIND} ", "direct": ""}[form]
    options = [f"{letter}) {text}" for letter, text in zip(LETTERS, asked.options)]
    letters = [f" {letter}" for letter in LETTERS[: len(options)]]
    end, marks = len(start) + len(question.question), []
    if value is None:
        answer = dict.fromkeys(letters, 1 / len(letters))
    else:
        answer = {letters[asked.gold]: 1.0}
        marks.append((end, "value", {f" {value}": 1.0}))
        for letter, option, text in zip(letters, options, asked.options):
            end += 1 + len(option)
            marks += [(end, "truth", {"": float(text == value)}), (end, "subject", {letter: 1.0})]
    lines = [question.question, *options] + [LETTER_FORM] * (form == "direct")
    kind = "guess" if value is None else "letter"
    return Turn(start + "\n".join(lines), ANSWER_START, answer, kind, marks)


def any_claim(scene: Scene, rng: random.Random) -> tuple[Fact, str | None]:
    """A claim, half of the time a true one, and the true value; None where the subject is not in
    the scene."""
    fact, kind = rng.choice(scene.facts), rng.random()
    if kind < 0.5:
        return fact, fact.value
    if kind < 0.6 and fact.subject and scene.family != "cards":
        there = {other.subject for other in scene.facts}
        names = SHAPES if scene.family == "shapes" else [f"{name} bar" for name in ORDINALS]
        absent = [name for name in names if name not in (*there, fact.value)]
        if absent:
            return replace(fact, subject=rng.choice(absent)), None
    return replace(fact, value=wrong_value(scene, fact, rng)), fact.value


def wrong_value(scene: Scene, fact: Fact, rng: random.Random) -> str:
    """Often that of another thing in the image."""
    wrong = other_values(fact)
    near = [other.value for other in scene.facts
            if other.attribute == fact.attribute and other.value in wrong]
    return rng.choice(near if near and rng.random() < 0.5 else wrong)


def claim_marks(sentence: str, start: int, claim: Fact, value: str | None) -> list:
    """At the claimed value, in a sentence that begins at `start`."""
    end = start + sentence.rindex(claim.value) + len(claim.value)
    marks = [(end, "truth", {"": float(claim.value == value)}), *subject_mark(end, claim)]
    return marks + ([(end, "true value", {f" {value}": 1.0})] if value else [])


def claim_turn(scene: Scene, rng: random.Random) -> Turn:
    claim, value = any_claim(scene, rng)
    sentence, start = write_sentence(scene.family, claim), f"{CLAIM_INSTRUCTION} "
    return Turn(start + sentence, ANSWER_START,
                {" yes" if claim.value == value else " no": 1.0}, "claim",
                claim_marks(sentence, len(start), claim, value))


def fair_rating(num_right: int, num_wrong: int, num_facts: int) -> float:
    """1 to 5: what is said rightly, as a share of all facts and of what is said wrongly."""
    return 1 + 4 * num_right / (num_facts + num_wrong)


def any_caption(scene: Scene, rng: random.Random) -> tuple[str, list, float]:
    """A caption of any length with any share of mistakes, its marks and its fair rating."""
    share, wrong_share = rng.choice((0.0, 0.2, 0.4, 0.7, 1.0)), rng.choice((0.0, 0.0, 0.2, 0.5, 1))
    facts = [fact for fact in scene.facts if rng.random() < share]
    text, marks, num_wrong = "This is a card. " * (scene.family == "cards"), [], 0
    for fact in facts:
        is_wrong = rng.random() < wrong_share
        claim = replace(fact, value=wrong_value(scene, fact, rng)) if is_wrong else fact
        sentence = write_sentence(scene.family, claim)
        marks += claim_marks(sentence, len(text), claim, fact.value)
        text, num_wrong = f"{text}{sentence} ", num_wrong + is_wrong
    return text.strip(), marks, fair_rating(len(facts) - num_wrong, num_wrong, len(scene.facts))


def rating_turn(caption: str, marks: list, rating: float) -> Turn:
    """A caption with its marks and the rating that is taught, 1 to 5."""
    low, start = min(int(rating), 4), len(RATING_INSTRUCTION)
    answer = {RATINGS[low - 1]: low + 1 - rating, RATINGS[low]: rating - low}
    marks = [(start + end, *taught) for end, *taught in marks]
    return Turn(RATING_INSTRUCTION + caption, RATING_START, answer, "rating", marks)


def turns_of(scene: Scene, form: str, num: int, rng: random.Random) -> list[Turn]:
    """`num` turns of one form on a scene."""
    if form == "rating":
        return [rating_turn(*any_caption(scene, rng)) for _ in range(num)]
    if form == "named":  # letters are found sooner where the value needs no looking
        drawn = [tuple(rng.sample(values, rng.choice((2, 3, min(4, len(values))))))
                 for values in rng.choices(list(DOMAINS.values()), k=num)]
        return [question_turn(Question(f"Which option is {choices[0]}?", choices, 0), choices[0],
                              "filter", rng) for choices in drawn]
    if form in ("claim", "statement"):
        claims = [claim_turn(scene, rng) for _ in range(num)]
        return claims if form == "claim" else [replace(claim, answer={}) for claim in claims]
    facts = (rng.sample(scene.facts, len(scene.facts)) * num)[:num]
    if form == "question":
        return [lookup_turn(scene, fact, rng) for fact in facts]
    asked = [(write_question(scene, fact, rng), None if form == "blind" else fact.value)
             for fact in facts]
    if rng.random() < 0.3:
        text, choices, place = rng.choice(COMMON_KNOWLEDGE)
        asked[0] = Question(text, choices, place), choices[place]
    return [question_turn(question, value, form, rng) for question, value in asked]


# ------------------------------------------------------------------------------------------ lessons


@dataclass
class Lesson:
    """Turns on an image, or on none: the prompt that they share, and the rest of each."""

    scene: Scene | None
    prompt: Prompt
    rests: list[list[int]]
    marks: list[list[tuple[int, str, Target]]]  # (place of a token in the rest, kind, target)


def write_lesson(policy: Policy, scene: Scene | None, turns: Sequence[Turn]) -> Lesson:
    tokenizer, rows, marks = policy.tokenizer, [], []
    image = [{"type": "image"}] * (scene is not None)
    for turn in turns:
        text = chat_text(tokenizer, [*image, {"type": "text", "text": turn.text}])
        start, text = text.rindex(turn.text), text + turn.answer_start
        likeliest = max(turn.answer, key=turn.answer.get, default="")
        encoded = tokenizer(text + likeliest, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        places = [(bisect_left(ends, start + end), *taught) for end, *taught in turn.marks]
        row = encoded["input_ids"]
        if turn.answer:
            last = bisect_left(ends, len(text))  # before the answer
            if turn.kind == "letter":
                places += [(last, "recall", value) for _, kind, value in turn.marks
                           if kind == "value"]
            places += [(last, turn.kind, turn.answer),
                       (len(row) - 1, "end", {tokenizer.eos_token: 1.0})]
        else:  # cut after the last mark
            row = row[: max(places)[0] + 1]
        rows.append([*row, tokenizer.eos_token_id])
        marks.append(places)
    differ = (n for n, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1)
    num = min(next(differ, len(rows[0])), *(place for places in marks for place, *_ in places))
    rests = [row[num:] for row in rows]
    marks = [[(place - num, *taught) for place, *taught in places] for places in marks]
    if scene is None:
        vision = policy.model.config.vision_config
        num_values = 3 * vision.temporal_patch_size * vision.patch_size**2
        prompt = Prompt(torch.tensor(rows[0][:num]), torch.arange(num).expand(3, -1),
                        torch.zeros(0, num_values), torch.zeros(0, 3, dtype=torch.long),
                        torch.zeros(0, policy.model.config.text_config.hidden_size))
        return Lesson(None, prompt, rests, marks)
    prompt = policy.prompt(draw(scene), turns[0].text)
    num += int((prompt.input_ids == policy.model.config.image_token_id).sum()) - 1
    prompt = replace(prompt, input_ids=prompt.input_ids[:num],
                     position_ids=prompt.position_ids[:, :num])
    return Lesson(scene, prompt, rests, marks)


def sights(scene: Scene, columns: int, width: int) -> list[tuple[int, list[str]]]:
    """Image tokens (28 x 28 pixels, row by row, `columns` in a row of `width` pixels), each with
    the words for what is drawn there. `draw` moves things by up to 3 pixels, which does not
    matter."""
    told: dict[str, dict[str, str]] = {}
    for fact in scene.facts:
        if fact.attribute in ("title", "number"):
            told[fact.attribute] = {fact.attribute: fact.value}
        elif fact.attribute in ("color", "size", "place", "shape", "value"):
            told.setdefault(fact.subject, {})[fact.attribute] = fact.value
    seen: dict[int, list[str]] = {}
    for number, (subject, look) in enumerate(told.items()):
        if scene.family == "shapes":
            x, y = (part * width for part in PLACES[look["place"]])
            r = 0.3 * SIZES[look["size"]] * width / 112  # its middle, whatever the shape
            left, top, right, bottom = x - r, y - r, x + r, y + r
        elif scene.family == "bars":
            pitch = 124 // len(told)
            left, top = 12 + number * pitch, 104 - HEIGHTS[look["value"]] * 1.2
            right, bottom = left + pitch - 10, 104
        elif subject == "stamp":
            x = {"left": 36, "central": 84, "right": 132}[look["place"]]
            left, top, right, bottom = x - 4, 73, x + 4, 81
        elif subject in ("title", "number"):
            left, right = {"title": (18, 100), "number": (110, 150)}[subject]
            top, bottom = 14, 40
        else:
            continue
        for row in range(int(top / 28), int((bottom - 1) / 28) + 1):
            for column in range(int(left / 28), int((right - 1) / 28) + 1):
                words = [subject.split()[0], *look.values()]
                seen.setdefault(row * columns + column, []).extend(words)
    return list(seen.items())


class Pupil(nn.Module):
    """The model and the probes of its lessons."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy, self.model = policy, policy.model
        CompletionScorer(policy.model, ())  # it sets the attention of packed groups
        size, num_words = policy.model.config.text_config.hidden_size, len(policy.tokenizer)
        self.probes = nn.ModuleDict({
            "truth": nn.Linear(size, 1), "true value": nn.Linear(size, num_words),
            "subject": nn.Linear(size, num_words), "sight": nn.Linear(size, num_words),
        })

    def forward(self, lessons: Sequence[Lesson]) -> tuple[Tensor, dict[str, float]]:
        """The sum of the kinds' mean losses, and of each kind the share that was right."""
        inner, looked = self.model.model, [n for n, lesson in enumerate(lessons) if lesson.scene]
        prompts = [lesson.prompt for lesson in lessons]
        pixels, grid = (torch.cat([getattr(prompts[n], name) for n in looked])
                        for name in ("pixel_values", "grid"))
        features = inner.get_image_features(pixels, grid).pooler_output
        for n, feature in zip(looked, features):
            prompts[n] = replace(prompts[n], features=feature)
        rows = [torch.tensor(rest) for lesson in lessons for rest in lesson.rests]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = pad_sequence(rows, batch_first=True)
        # Packing reads prompts, tokens and lengths alone. What sampling tells is not there.
        packed = pack_groups(Rollouts(prompts, tokens, lengths, tokens, tokens, [""] * len(rows)))
        outputs = inner(
            **image_inputs(self.model, packed.input_ids, prompts),
            attention_mask=torch.empty(1, 1, 1, 0), segments=packed.segments,
            position_ids=packed.position_ids, use_cache=False, output_hidden_states=True,
        )
        # (N, H) before each token of the rests, by how many layers are still to come
        hidden = {0: outputs.last_hidden_state[0, packed.sources]}
        for num in set(EARLY.values()):
            states = outputs.hidden_states[-1 - num][0, packed.sources]
            hidden[num] = inner.language_model.norm(states)
        taught = self.sight_lessons([lessons[n].scene for n in looked], features, grid)
        starts = (lengths.cumsum(0) - lengths).tolist()
        groups = [marks for lesson in lessons for marks in lesson.marks]
        for start, marks in zip(starts, groups, strict=True):
            for place, kind, target in marks:
                state = hidden[EARLY.get(kind, 0)][start + place + 1]
                taught.setdefault(kind, []).append((state, target))
        results = {kind: self.loss(kind, marks) for kind, marks in taught.items()}
        return (sum(loss for loss, _ in results.values()),
                {kind: right for kind, (_, right) in results.items()})

    def sight_lessons(self, scenes: Sequence[Scene], features: Sequence[Tensor],
                      grid: Tensor) -> dict[str, list[tuple[Tensor, Target]]]:
        """By kind, states of image tokens with their targets."""
        taught: dict[str, list] = {}
        for scene, feature, (_, _, patches) in zip(scenes, features, grid.tolist(), strict=True):
            columns = patches // 2
            for place, words in sights(scene, columns, 28 * columns):
                state = F.layer_norm(feature[place], feature[place].shape)
                target = {f" {word}": words.count(word) / len(words) for word in words}
                taught.setdefault(f"sight of {scene.family}", []).append((state, target))
        return taught

    def loss(self, kind: str, marks: list[tuple[Tensor, Target]]) -> tuple[Tensor, float]:
        """The mean loss, and the share of the texts taught that are the likeliest."""
        states, name = torch.stack([state for state, _ in marks]), kind.split(" of ")[0]
        logits = (dict(self.probes).get(name) or self.model.lm_head)(states)
        if kind == "truth":
            target = torch.tensor([probs[""] for _, probs in marks])
            right = ((logits[:, 0] > 0) == (target > 0.5)).float().mean().item()
            return F.binary_cross_entropy_with_logits(logits[:, 0], target), right
        target = torch.zeros_like(logits)
        for row, (_, probs) in enumerate(marks):
            for text, probability in probs.items():
                first, *_ = self.policy.tokenizer.encode(text, add_special_tokens=False)
                target[row, first] += probability
        num = (target > 0).sum(-1, keepdim=True)
        is_likely = logits.argsort(-1, descending=True).argsort(-1) < num
        right = ((is_likely & (target > 0)).sum(-1, keepdim=True) / num).mean().item()
        return -(target * logits.log_softmax(-1)).sum() / len(marks), right


# ----------------------------------------------------------------------------------------- training


def grow(policy: Policy, seed: int) -> Policy:
    """The policy with NUM_LAYERS layers, as it was before it was sharpened."""
    torch.manual_seed(seed)
    config = copy.deepcopy(policy.model.config)
    config.text_config.num_hidden_layers = NUM_LAYERS
    config.text_config.layer_types = ["full_attention"] * NUM_LAYERS
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = policy.model.generation_config
    model.load_state_dict(policy.model.state_dict(), strict=False)
    added = model.model.language_model.layers[policy.model.config.text_config.num_hidden_layers :]
    with torch.no_grad():
        for layer in added:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    looker = make_policy(model, policy.tokenizer, policy.image_processor, writes=False)
    sharpen_(looker, 1 / SHARPNESS)
    return looker


def train_looker(policy: Policy, steps: int, seed: int, folder: Path) -> Policy:
    """At most `steps` steps for each of the first three stages, half as many for the last two. The
    weights after each are kept in `folder`: there a training that was stopped goes on with its next
    stage."""
    looker = grow(policy, seed)
    pupil = Pupil(looker)

    def sight_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"looker:{seed}:sights:{step}")
        scenes = draw_scenes(rng, SIGHTS)
        images = looker.image_processor(images=list(map(draw, scenes)), return_tensors="pt")
        features = looker.model.model.get_image_features(**images).pooler_output
        taught = pupil.sight_lessons(scenes, features, images["image_grid_thw"])
        results = {kind: pupil.loss(kind, marks) for kind, marks in taught.items()}
        return (sum(loss for loss, _ in results.values()),
                {kind: right for kind, (_, right) in results.items()})

    def turn_loss(stage: str, forms: tuple[str, ...],
                  shown: Sequence[str]) -> Callable[[int], tuple[Tensor, dict[str, float]]]:
        def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
            rng, lessons = random.Random(f"looker:{seed}:{stage}:{step}"), []
            scenes = draw_scenes(rng, len(forms), shares=[1] * len(FAMILIES))
            for form, scene in zip(forms, scenes):
                turns = turns_of(scene, form, TURNS[forms], rng)
                has_image = form not in ("blind", "named")
                lessons.append(write_lesson(looker, scene if has_image else None, turns))
            loss, right = pupil(lessons)
            return loss, {kind: right[kind] for kind in shown}
        return loss_at

    def stage(name: str, loss_at: Callable[[int], tuple[Tensor, dict[str, float]]], steps: int,
              **settings: float) -> None:
        file = folder / f"{name}.safetensors"
        if file.exists():
            try:
                pupil.load_state_dict(load_file(file))
            except (RuntimeError, SafetensorError):
                raise ValueError(f"{file}: expected weights of this looker, found others; delete "
                                 "it to make that stage again") from None
            return
        fit(pupil, loss_at, steps, name, warmup_share=0.02, **settings)
        folder.mkdir(parents=True, exist_ok=True)
        # Copies: safetensors keeps no two names of one tensor, such as the tied embedding.
        write_whole(file, save({key: part.clone() for key, part in pupil.state_dict().items()}))

    stage("sights", sight_loss, steps, decay_share=0.1, rate=1e-3, enough=ENOUGH)
    stage("lookups", turn_loss("lookups", LOOKUPS, ("value", "truth")), steps,
          decay_share=0.1, rate=1.5e-3, enough=ENOUGH)
    told = ("value", "truth", "recall", "letter", "claim")
    stage("names", turn_loss("names", NAMES, ("recall", "letter")), steps,
          decay_share=0.1, rate=1e-3, enough=ENOUGH)
    stage("letters", turn_loss("letters", LETTERING, told), max(1, steps // 2),
          decay_share=0.6, rate=1e-3)
    stage("answers", turn_loss("answers", ANSWERS, told), max(1, steps // 2),
          decay_share=0.6, rate=8e-4)
    return looker
