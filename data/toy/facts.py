"""Sentences of the toy world read back to facts: what a caption says rightly, exactly."""

import re
from collections.abc import Iterator, Sequence
from itertools import product

from data.choices import fold_choice
from data.toy.world import (
    DOMAINS,
    FAMILIES,
    ORDINALS,
    PLACES,
    SHAPES,
    Fact,
    Scene,
    make_scene,
    write_sentence,
)

_BARS = tuple(f"{ordinal} bar" for ordinal in ORDINALS)
_SUBJECTS = {
    "shapes": {"count": ("",), "color": SHAPES, "size": SHAPES, "place": SHAPES, "left of": SHAPES,
               "above": SHAPES},
    "bars": {"count": ("",), "color": _BARS, "value": _BARS, "tallest": ("",), "shortest": ("",)},
    "cards": {"color": ("card", "frame", "stamp"), "shape": ("stamp",), "place": ("stamp",),
              "title": ("",), "number": ("",)},
}
"""family -> attribute -> the subjects that may have it"""


def _family_facts(family: str) -> Iterator[Fact]:
    for attribute, subjects in _SUBJECTS[family].items():
        for subject, value in product(subjects, DOMAINS[attribute]):
            yield Fact(subject, attribute, value)


FACTS = {fold_choice(write_sentence(family, fact)): (family, fact)
         for family in FAMILIES for fact in _family_facts(family)}
"""Every sentence of the world's grammar that says something of a scene, folded -> family, fact."""


def scene_of(id: str) -> Scene:
    """The scene of an example's id, as `make_scene` names it. Raises ValueError for another id."""
    match = re.fullmatch(r"(train|heldout)-(\d{6,})", id)
    if not match:
        raise ValueError(f"expected an id of the toy world, such as heldout-000012, got {id!r}")
    return make_scene(match[1], int(match[2]))


def is_true(sentence: str, scene: Scene) -> bool | None:
    """Whether the sentence is true of the scene. None where it says nothing that could be: "This is
    a card.", and whatever the world's grammar cannot write.

    A sentence about what is not there is false. Where one shape lies left of another or above it is
    true of all pairs, not only of the one that the scene's facts name.
    """
    if (known := FACTS.get(fold_choice(sentence))) is None:
        return None
    family, fact = known
    if family != scene.family:
        return False
    if fact.attribute not in ("left of", "above"):
        return fact in scene.facts
    places = {told.subject: PLACES[told.value] for told in scene.facts if told.attribute == "place"}
    axis = fact.attribute == "above"
    return ({fact.subject, fact.value} <= places.keys()
            and places[fact.value][axis] < places[fact.subject][axis])


def told_share(sentences: Sequence[str], scene: Scene) -> float:
    """Recall: the share of the scene's facts that the sentences say."""
    said = {FACTS[folded] for folded in map(fold_choice, sentences) if folded in FACTS}
    return sum((scene.family, fact) in said for fact in scene.facts) / len(scene.facts)
