"""A procedural image world small enough for a CPU: every fact of every image is known.

Three families stand for the paper's natural images, charts and documents: `shapes` (a scene),
`bars` (a chart) and `cards` (a printed card). A scene is a list of facts (subject, attribute,
value). Image, captions and questions all come from that list. So a caption's truth can be checked
word by word. Everything is a function of (split, index).
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from data.examples import Example, Question

COLORS = {
    "red": (214, 39, 40), "blue": (31, 87, 200), "green": (34, 150, 60), "yellow": (245, 205, 30),
    "purple": (140, 60, 170), "orange": (250, 130, 20), "pink": (250, 150, 200),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = {"small": 9, "medium": 13, "large": 18}  # half widths in pixels
PLACES = {"left": (0.2, 0.5), "right": (0.8, 0.5), "high": (0.5, 0.2), "low": (0.5, 0.8),
          "central": (0.5, 0.5)}
ORDINALS = ("first", "second", "third", "fourth")
COUNTS = ("two", "three", "four", "five")
HEIGHTS = {"ten": 10, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60,
           "seventy": 70, "eighty": 80}
TITLES = ("sale", "open", "exit", "menu", "taxi", "park", "news", "milk", "gold", "jazz", "zoo",
          "bank")
NUMBERS = {
    "six": 6, "eight": 8, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15,
    "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "ninety": 90,
}
"""Said as words and drawn as digits. Qwen's tokenizers cut digits apart, so a word is one token and
a number is not."""

DOMAINS = {
    "color": tuple(COLORS), "size": tuple(SIZES), "place": tuple(PLACES), "shape": SHAPES,
    "left of": SHAPES, "above": SHAPES, "count": COUNTS, "value": tuple(HEIGHTS),
    "tallest": ORDINALS, "shortest": ORDINALS, "title": TITLES, "number": tuple(NUMBERS),
}
"""attribute -> every value it can take"""

FAMILIES = ("shapes", "bars", "cards")

COMMON_KNOWLEDGE = (
    ("How many sides does a triangle have?", ("two", "three", "four", "five"), 1),
    ("How many sides does a square have?", ("two", "three", "four", "five"), 2),
    ("Which of these is a color?", ("jazz", "blue", "first", "square"), 1),
    ("Which of these is a shape?", ("circle", "taxi", "pink", "third"), 0),
    ("Which of these is a size?", ("zoo", "left", "medium", "menu"), 2),
    ("Which number is the largest?", ("ten", "twenty", "thirty", "eighty"), 3),
)
"""Questions that need no image: planted for the question filter to find, never used for rewards."""


@dataclass(frozen=True)
class Fact:
    """`subject` is what a caption calls it ("circle", "first bar", "title"), or "" for the image as
    a whole."""

    subject: str
    attribute: str
    value: str


@dataclass(frozen=True)
class Scene:
    id: str
    family: str
    facts: tuple[Fact, ...]


def make_scene(split: str, index: int) -> Scene:
    """The scene number `index` of a split; families take turns."""
    family = FAMILIES[index % len(FAMILIES)]
    rng = random.Random(f"toy:{split}:{index}")
    facts = {"shapes": _shape_facts, "bars": _bar_facts, "cards": _card_facts}[family](rng)
    return Scene(f"{split}-{index:06d}", family, tuple(facts))


def perturb(facts: tuple[Fact, ...], share: float, rng: random.Random) -> list[Fact]:
    """Facts with about `share` of the values replaced: what a mistaken caption claims."""
    return [
        replace(fact, value=rng.choice(other_values(fact))) if rng.random() < share else fact
        for fact in facts
    ]


def other_values(fact: Fact) -> list[str]:
    """The values that the fact does not have and could have: nothing is above itself."""
    return [value for value in DOMAINS[fact.attribute] if value not in (fact.value, fact.subject)]


def _shape_facts(rng: random.Random) -> list[Fact]:
    count = rng.randint(2, 4)
    names = rng.sample(SHAPES, count)
    # captions list objects from left to right
    places = sorted(rng.sample(list(PLACES), count), key=list(PLACES).index)
    facts = [Fact("", "count", COUNTS[count - 2])]
    for name, color, place in zip(names, rng.sample(list(COLORS), count), places):
        facts += [Fact(name, "color", color), Fact(name, "size", rng.choice(list(SIZES))),
                  Fact(name, "place", place)]
    # only where exactly one object lies on that side, so that the answer is the only right one
    relations = []
    for axis, relation in enumerate(("left of", "above")):
        for name, place in zip(names, places):
            before = [n for n, p in zip(names, places) if PLACES[p][axis] < PLACES[place][axis]]
            if len(before) == 1:
                relations.append(Fact(name, relation, before[0]))
    return facts + ([rng.choice(relations)] if relations else [])


def _bar_facts(rng: random.Random) -> list[Fact]:
    count = rng.randint(3, 4)
    values = rng.sample(list(HEIGHTS), count)
    facts = [Fact("", "count", COUNTS[count - 2])]
    for ordinal, color, value in zip(ORDINALS, rng.sample(list(COLORS), count), values):
        facts += [Fact(f"{ordinal} bar", "color", color), Fact(f"{ordinal} bar", "value", value)]
    by_height = sorted(range(count), key=lambda i: HEIGHTS[values[i]])
    return facts + [Fact("", "tallest", ORDINALS[by_height[-1]]),
                    Fact("", "shortest", ORDINALS[by_height[0]])]


def _card_facts(rng: random.Random) -> list[Fact]:
    card, frame, stamp = rng.sample(list(COLORS), 3)
    return [
        Fact("", "title", rng.choice(TITLES)), Fact("", "number", rng.choice(list(NUMBERS))),
        Fact("card", "color", card), Fact("frame", "color", frame),
        Fact("stamp", "shape", rng.choice(SHAPES)), Fact("stamp", "color", stamp),
        Fact("stamp", "place", rng.choice(("left", "right", "central"))),
    ]


# ----------------------------------------------------------------------------------------- captions


def write_sentence(family: str, fact: Fact) -> str:
    """Names the subject before the value."""
    if fact.attribute == "count":
        what, things = ("chart", "bars") if family == "bars" else ("scene", "objects")
        return f"The {what} has {fact.value} {things}."
    if fact.attribute in ("left of", "above"):
        return f"{fact.attribute.capitalize()} the {fact.subject} is the {fact.value}."
    if fact.attribute in ("tallest", "shortest"):
        return f"The {fact.attribute} bar is the {fact.value}."
    article = "a " if fact.attribute == "shape" else ""
    return f"The {fact.subject or fact.attribute} is {article}{fact.value}."


def write_caption(family: str, facts: Iterable[Fact]) -> str:
    """One sentence per fact, in order."""
    return " ".join(["This is a card."] * (family == "cards")
                    + [write_sentence(family, fact) for fact in facts])


def _alternatives(words: Iterable[str]) -> str:
    return "(?:" + "|".join(words) + ")"


_SENTENCE = re.compile(
    _alternatives(
        [
            f"The scene has {_alternatives(COUNTS)} objects",
            f"The chart has {_alternatives(COUNTS)} bars",
            "This is a card", f"The title is {_alternatives(TITLES)}",
            f"The number is {_alternatives(NUMBERS)}",
            f"The (?:tallest|shortest) bar is the {_alternatives(ORDINALS)}",
            f"(?:Left of|Above) the {_alternatives(SHAPES)} is the {_alternatives(SHAPES)}",
            f"The {_alternatives(SHAPES)} is {_alternatives([*COLORS, *SIZES, *PLACES])}",
            f"The {_alternatives(ORDINALS)} bar is {_alternatives([*COLORS, *HEIGHTS])}",
            f"The (?:card|frame) is {_alternatives(COLORS)}",
            f"The stamp is (?:a {_alternatives(SHAPES)}|{_alternatives([*COLORS, *PLACES])})",
        ]
    )
)


def is_well_formed(caption: str) -> bool:
    """Every sentence is one that this world's grammar can write (true or not), and there is at
    least one."""
    sentences = caption.split(". ")
    return caption.endswith(".") and all(_SENTENCE.fullmatch(s.removesuffix("."))
                                         for s in sentences)


# ---------------------------------------------------------------------------------------- questions


def write_question(scene: Scene, fact: Fact, rng: random.Random) -> Question:
    """Asks for `fact`. Distractors are other values of the same image first, then any value of the
    attribute. So a letter cannot be guessed from what the caption mentions."""
    text = {
        "color": f"What color is the {fact.subject}?",
        "size": f"What size is the {fact.subject}?",
        "place": f"Where is the {fact.subject}?",
        "shape": f"What shape is the {fact.subject}?",
        "left of": f"Which shape is left of the {fact.subject}?",
        "above": f"Which shape is above the {fact.subject}?",
        "count": f"How many {'bars' if scene.family == 'bars' else 'objects'} are there?",
        "value": f"What is the value of the {fact.subject}?",
        "tallest": "Which bar is the tallest?",
        "shortest": "Which bar is the shortest?",
        "title": "What is the title?",
        "number": "What is the number?",
    }[fact.attribute]
    nearby = {f.value for f in scene.facts} | {f.subject for f in scene.facts}
    others = other_values(fact)
    rng.shuffle(others)
    others.sort(key=lambda value: value not in nearby)
    choices = [fact.value, *others[:3]]
    rng.shuffle(choices)
    return Question(text, tuple(choices), choices.index(fact.value), kind=fact.attribute)


def scene_questions(scene: Scene) -> tuple[Question, ...]:
    """A question on every fact, and one that needs no image."""
    rng = random.Random(f"{scene.id}:questions")
    text, choices, answer_index = rng.choice(COMMON_KNOWLEDGE)
    free = Question(text, choices, answer_index, kind="common knowledge", needs_image=False)
    return (*(write_question(scene, fact, rng) for fact in scene.facts), free)


# ------------------------------------------------------------------------------------------ drawing


def draw(scene: Scene) -> Image.Image:
    """RGB, 112 to 168 pixels a side, in multiples of 28: one image token for every 28 x 28
    pixels."""
    rng = random.Random(f"{scene.id}:pixels")
    gray = rng.randint(215, 255)
    width, height = {"shapes": rng.choice([(112, 112), (140, 140)]), "bars": (140, 112),
                     "cards": (168, 112)}[scene.family]
    image = Image.new("RGB", (width, height), (gray, gray, gray))
    canvas = ImageDraw.Draw(image)
    told: dict[str, dict[str, str]] = {}
    for fact in scene.facts:
        told.setdefault(fact.subject, {})[fact.attribute] = fact.value
    if scene.family == "shapes":
        for name, look in told.items():
            if "color" in look:
                x, y = (round(part * side) + rng.randint(-3, 3)
                        for part, side in zip(PLACES[look["place"]], (width, height)))
                _draw_shape(canvas, name, x, y, SIZES[look["size"]] * width // 112,
                            _tint(look["color"], rng))
    elif scene.family == "bars":
        canvas.line([(6, 4), (6, 104), (134, 104)], fill=(60, 60, 60), width=2)
        bars = [look for subject, look in told.items() if subject.endswith("bar")]
        pitch = 124 // len(bars)
        for place, look in enumerate(bars):
            left = 12 + place * pitch + rng.randint(-2, 2)
            top = 104 - round(HEIGHTS[look["value"]] * 1.2)
            canvas.rectangle([left, top, left + pitch - 10, 103], fill=_tint(look["color"], rng))
    else:
        canvas.rectangle([0, 0, width - 1, height - 1], fill=_tint(told["frame"]["color"], rng))
        card = _tint(told["card"]["color"], rng)
        canvas.rectangle([9, 9, width - 10, height - 10], fill=card)
        ink = (255, 255, 255) if sum(card) < 330 else (0, 0, 0)
        jitter = rng.randint(-2, 2)
        canvas.text((18 + jitter, 12), told[""]["title"].upper(), fill=ink,
                    font=ImageFont.load_default(30))
        canvas.text((110 + jitter, 12), str(NUMBERS[told[""]["number"]]), fill=ink,
                    font=ImageFont.load_default(30))
        x = {"left": 36, "central": 84, "right": 132}[told["stamp"]["place"]] + rng.randint(-3, 3)
        canvas.rectangle([x - 20, 56, x + 20, 98], fill=(245, 245, 245))
        _draw_shape(canvas, told["stamp"]["shape"], x, 77, 15, _tint(told["stamp"]["color"], rng))
    return image


def _tint(color: str, rng: random.Random) -> tuple[int, int, int]:
    return tuple(max(0, min(255, channel + rng.randint(-10, 10))) for channel in COLORS[color])


def _draw_shape(canvas: ImageDraw.ImageDraw, name: str, x: int, y: int, r: int,
                fill: tuple[int, int, int]) -> None:
    """`name` centered on (x, y), about 2r wide, with a thin dark outline so that no color melts
    into the ground."""
    outline = (90, 90, 90)
    if name == "circle":
        canvas.ellipse([x - r, y - r, x + r, y + r], fill=fill, outline=outline)
        return
    third = r // 3
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -r), (r, r), (-r, r)],
        "diamond": [(0, -r), (2 * third, 0), (0, r), (-2 * third, 0)],
        "cross": [(-third, -r), (third, -r), (third, -third), (r, -third), (r, third),
                  (third, third), (third, r), (-third, r), (-third, third), (-r, third),
                  (-r, -third), (-third, -third)],
        "star": [(0, -r), (third - 1, -third), (r, -third), (third, third - 2), (2 * third, r),
                 (0, third), (-2 * third, r), (-third, third - 2), (-r, -third),
                 (1 - third, -third)],
    }[name]
    canvas.polygon([(x + dx, y + dy) for dx, dy in corners], fill=fill, outline=outline)


# ------------------------------------------------------------------------------------------ loading


def toy_example(scene: Scene, with_common_knowledge: bool = False) -> Example:
    questions = tuple(q for q in scene_questions(scene) if q.needs_image or with_common_knowledge)
    return Example(scene.id, draw(scene), questions, scene.family)


def toy_examples(source: str) -> list[Example]:
    """Examples of "toy:SPLIT:NUM", with the questions that need the image only, as a filtered data
    set would have."""
    match = re.fullmatch(r"toy:(train|heldout):([1-9]\d*)", source)
    if not match:
        raise ValueError("expected toy:train:NUM or toy:heldout:NUM with NUM at least 1, "
                         f"got {source!r}")
    return [toy_example(make_scene(match[1], index)) for index in range(int(match[2]))]
