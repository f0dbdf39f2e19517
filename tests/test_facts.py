"""The toy world's sentences read back: what is true of a scene, and how much of it is said."""

import random

import pytest

from data.toy.facts import FACTS, is_true, scene_of, told_share
from data.toy.world import (
    PLACES,
    SHAPES,
    Fact,
    Scene,
    is_well_formed,
    make_scene,
    perturb,
    write_caption,
    write_sentence,
)
from reward.style import sentences

SHAPE_SCENE = Scene("train-000000", "shapes", (
    Fact("", "count", "three"), Fact("star", "color", "red"), Fact("star", "size", "small"), Fact("star", "place", "left"),
    Fact("circle", "color", "blue"), Fact("circle", "size", "large"), Fact("circle", "place", "low"),
    Fact("cross", "color", "pink"), Fact("cross", "size", "large"), Fact("cross", "place", "right"),
    Fact("circle", "left of", "star"),
))


@pytest.mark.parametrize("sentence, want", [
    ("The star is red.", True), ("the STAR is  red", True), ("The star is blue.", False), ("The star is left.", True),
    ("The square is red.", False),  # there is none
    ("The scene has three objects.", True), ("The scene has two objects.", False), ("The chart has three bars.", False),
    ("Left of the circle is the star.", True), ("Left of the cross is the circle.", True),  # not in the facts, and so
    ("Left of the star is the cross.", False), ("Left of the star is the star.", False),
    ("Left of the star is the square.", False),
    ("Above the circle is the star.", True), ("Above the cross is the star.", False),  # both at half height
    ("The title is sale.", False), ("The first bar is red.", False),
    ("This is a card.", None), ("There is something.", None), ("The star is the.", None), ("", None),
])
def test_what_is_true_by_hand(sentence, want):
    assert is_true(sentence, SHAPE_SCENE) is want


def test_recall_by_hand():
    assert told_share([], SHAPE_SCENE) == 0
    assert told_share(["The star is red.", "The star is RED", "The star is blue.", "Above the circle is the star.",
                       "The chart has three bars."], SHAPE_SCENE) == 1 / 11
    assert told_share(["The star is red.", "Left of the circle is the star."], SHAPE_SCENE) == 2 / 11


def test_each_scenes_own_caption_is_true_and_whole_and_a_mistaken_one_false():
    """Against the world: 300 scenes, their facts written and read back, and every value replaced."""
    for index in range(300):
        scene = scene_of(make_scene("heldout", index).id)
        assert scene == make_scene("heldout", index)
        said = [claim for claim in sentences(write_caption(scene.family, scene.facts)) if claim != "This is a card."]
        assert len(said) == len(scene.facts) and all(is_true(claim, scene) for claim in said) and told_share(said, scene) == 1
        mistaken = perturb(scene.facts, 1.0, random.Random(index))
        wrong = [fact for fact in mistaken if fact.attribute not in ("left of", "above")]
        assert not any(is_true(write_sentence(scene.family, fact), scene) for fact in wrong)


def test_relations_are_those_of_the_places():
    for index in range(0, 150, 3):
        scene = make_scene("train", index)
        place = {fact.subject: PLACES[fact.value] for fact in scene.facts if fact.attribute == "place"}
        for a in SHAPES:
            for b in SHAPES:
                is_left = a in place and b in place and place[b][0] < place[a][0]
                is_above = a in place and b in place and place[b][1] < place[a][1]
                assert is_true(f"Left of the {a} is the {b}.", scene) == is_left
                assert is_true(f"Above the {a} is the {b}.", scene) == is_above


def test_the_list_is_that_of_the_grammar():
    assert len(FACTS) == 4 + 6 * (8 + 3 + 5 + 6 + 6) + 4 + 4 * (8 + 8) + 4 + 4 + 3 * 8 + 6 + 5 + 12 + 12
    for folded in FACTS:
        assert is_well_formed(folded.capitalize() + ".")


def test_another_id_is_named():
    with pytest.raises(ValueError, match="^expected an id of the toy world, such as heldout-000012, got 'photo.png'"):
        scene_of("photo.png")
