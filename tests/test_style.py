"""Length, repetition, and sentences that say nothing of the picture."""

import random
import signal
from dataclasses import dataclass, fields, replace

import pytest
import torch

from grpo.advantage import group_advantages, part_advantages
from grpo.config import RewardConfig
from grpo.recipes import toy_config
from reward.caprl import Rewards
from reward.step import compare_siblings
from reward.style import empty_kinds, empty_share, length_reward, repetition, sentences, style_parts, words
from tools.budgets import count_words, cut_caption, with_budgets

PRAISE = """\
This description provides a comprehensive account of the chart.
This detailed description captures every element of the scene.
The description is comprehensive and leaves nothing out.
This caption accurately conveys the mood of the photograph.
The above description covers all visible elements.
The following caption describes the image in detail.
Here is a detailed description of the image:
Here's a comprehensive summary of the chart:
Below is a thorough breakdown of the infographic.
Certainly! The picture shows a cat.
Sure, here is what the chart shows.
I hope this helps!
Let me know if you need more information.
This summary of the image offers a complete overview of its contents.
Overall, this detailed overview ensures that no aspect is missed.
Every detail is captured with precision.
No details have been omitted.
This comprehensive, precise description allows the reader to picture the scene.
The caption provides a clear and complete picture of the data.
In summary, the description above covers everything in the image.
This is a comprehensive and detailed description of the image.
The description above is thorough.
This caption is both comprehensive and accurate.
This caption thoroughly and accurately describes the image.
This response provides a thorough description of the image.
This detailed analysis ensures a complete understanding of the chart.
I've provided a detailed description of the image above.
I have included all relevant details.
Nothing has been left out.
If you have any questions, feel free to ask.
This detailed caption communicates the contents of the infographic.
My description covers the whole image.
Hope this description helps!
In conclusion, this description paints a vivid picture of the scene.
This rich description helps the reader imagine the image.
This is my detailed description of the image.
The description provided is comprehensive.
Every element has been described in detail.
This detailed narrative captures the essence of the scene."""
HEDGE = """\
The man is possibly a teacher.
The building may be a church.
The sign might indicate a shop.
The woman appears to be smiling.
The dog seems to be asleep.
It is unclear what the text says.
Perhaps the photograph was taken in winter.
The bars likely stand for sales.
The dogs' owner may be one of the boys' friends.
The vehicle could be a delivery van.
The cloudy sky is bright, suggesting that it is noon.
He is presumably the owner.
Maybe the dog is asleep.
It is possible that he is her father.
It is difficult to say whether it rains.
It looks as if it were night.
The room is arguably a kitchen.
The shadows are long, indicating that it is evening.
The woman is most likely a nurse."""
SOBER = """\
The chart was published in May 2020.
The caption below the figure says that sales rose by 5%.
A description on the label reads "contains nuts".
The headline reads "This description provides a comprehensive account".
The sign says "You may be next" in red letters.
A banner with the word "Perhaps" hangs above the door.
The account balance is $5,300.
The table gives a summary of each year's revenue.
The sun appears in the upper left corner.
The might of the army is shown by forty tanks.
The blue bar is the highest, at 72.
There are three people, two of them in coats.
The line rises from 10 in 1990 to 45 in 2000.
A red circle is left of the green square.
The text at the bottom names the source as Eurostat.
The figure compares five countries by area.
A summary box at the right lists four causes.
The analysis covers the years 2001 to 2009.
A can of soup stands on the shelf.
The menu has a full breakfast for $9.
The clear bottle is half full.
The title of the book is "A Complete History of Rome".
The overview map is in the corner.
The will of the deceased lies on the desk.
The description panel is left of the painting.
The person in the middle holds a sign with an arrow.
The letter is signed by J. R. Smith.
The price is approx. 40 dollars.
The rich red of the curtain fills the left half.
This account has 1,204 followers and 310 posts.
This summary is followed by a list of references.
This overview covers five regions, each with its own colour.
The text bubble says: I hope this helps!
The chat window shows a reply: Let me know if you need anything.
The form asks that you feel free to leave the field blank.
The table's footnote says that figures may be rounded.
The chart is titled "Comprehensive Income" and spans 2018 to 2022.
The dashboard has a sidebar with the items Overview, Account and Settings.
The page has a full description of the ingredients under the heading.
The painting depicts a full moon over a calm sea.
Every detail of the armour is engraved in silver.
Two details of the painting are enlarged in circles.
A church tower may be clearly seen behind the trees.
The price could be found on the label.
A tree appears to the left of the house.
The arrow appears to its right.
He looks to the left.
My Account is the last item of the menu.
The year is hard to read.
With the door closed it is not possible that light enters.
Women are more likely than men to vote.
People under 30 are twice as likely to rent.
Of likely voters 52% are in favour.
A sign indicating a pedestrian crossing stands at the corner.
A red arrow indicating that traffic turns left is on the road.
This is a meme with a caption in white letters.
This is a photograph with the caption below.
The elements of the periodic table are in 18 columns."""


@pytest.mark.parametrize(("kind", "text"), [("praise", PRAISE), ("hedge", HEDGE), ("", SOBER)])
def test_116_sentences(kind, text):
    lines = text.splitlines()
    got = {line: empty_kinds(line) for line in lines}
    if kind == "praise":  # what follows the greeting is sober
        assert got.pop("Certainly! The picture shows a cat.") == ["praise", ""]
    assert got == {line: [kind] for line in got}
    assert len(PRAISE.splitlines()) + len(HEDGE.splitlines()) == len(SOBER.splitlines()) == 58


def test_sentences_of_lists_headings_and_abbreviations():
    caption = """# A street
**Left:** Mr. Smith, e.g. as in Fig. 3, holds 2.5 kg of apples. He smiles!
- a red car (No. 7)
- 3 trees
1. A "STOP." sign, seen at 5 p.m. by J. Doe. Is it lit? Yes...

图中有两只猫。左边的是黑色的！"""  # noqa: RUF001
    assert sentences("\u090f\u0915\u0964 \u0926\u094b\u0964") == ["\u090f\u0915\u0964", "\u0926\u094b\u0964"]  # Hindi
    assert sentences(caption) == [
        "A street", "Left: Mr. Smith, e.g. as in Fig. 3, holds 2.5 kg of apples.", "He smiles!",
        "a red car (No. 7)", "3 trees", 'A "STOP." sign, seen at 5 p.m. by J. Doe.', "Is it lit?",
        "Yes...", "图中有两只猫。", "左边的是黑色的！"]  # noqa: RUF001
    assert sentences("- [ ] a cat\n- [x] a cat\n◦ a cat\n  ▪ a cat\n→ a cat") == ["a cat"] * 5
    assert sentences("") == sentences(" \n--\n. ") == [] and sentences("no stop") == ["no stop"]


def test_a_stop_after_a_title_an_initial_or_before_a_number_ends_nothing():
    """Geometry and weather: "C." before "The" was read as an initial, and so was the "C." of "5°C."."""
    for want in (["Mt. Fuji is at 5°C.", "Night falls."], ["Lt. Col. J. A. Smith sits.", "Sgt. A. Hall stands, est. 1985."],
                 ["The right angle is at C.", "The side AB is on p. 5 of Vol. 2."], ["Made in the U.S.", "It opens Dec. 25."]):
        assert sentences(" ".join(want)) == want


def test_a_quotation_is_not_cut():
    """Its sentences were claims of the caption's, or praise."""
    for want in (['The sign reads "Stop. Look! Listen..." in red.', "It is 5\" wide."],
                 ["A meme: “Sure. Perhaps. Yes.”", "It is old."],
                 ['"I can. Let me know if it helps." is written on the 55" screen.', 'The end says "Bye."'],
                 ['The mark " stands alone.', "It is red."], ["一块牌子:“停。看！”", "很红。"],  # noqa: RUF001
                 ["牌子:「停。看！」", "很红。"]):  # noqa: RUF001
        assert sentences(" ".join(want)) == want and empty_kinds(" ".join(want)) == [""] * 2
    assert empty_kinds('The 55" screen is perhaps on, below a "sign".') == ["hedge"]


def test_what_was_said_before_is_a_repeat():
    caption = "A red car stands here. There is a tree. A red car stands here. A red car stands. "
    caption += "A red car stands there. There is."
    assert empty_kinds(caption) == ["", "", "repeat", "repeat", "", ""]  # two words were never said alone
    assert empty_kinds("Red.\nBlue.\nRed.") == ["", "", "repeat"]
    assert empty_share(caption) == pytest.approx(2 / 6) and empty_share("") == 0


@pytest.mark.parametrize("text", ["." * 100_000, "?!" * 100_000, "Mr. " * 50_000, "A. B " * 50_000, "“a " * 50_000])
def test_work_grows_with_the_length_of_a_caption_only(text):
    """It grew with the square: minutes for each of these. The alarm ends the test there."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    try:
        assert empty_share(f"It is {text}.") == 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_length_reward_hand_computed():
    assert [length_reward(n, 0, 2048, 3072) for n in (0, 2048, 2560, 3072, 9999)] == [1, 1, 0.5, 0, 0]
    assert [length_reward(n, 100, 200, 300) for n in (0, 25, 100, 200, 250, 300)] == [0, 0.25, 1, 1, 0.5, 0]
    with pytest.raises(ValueError, match=r"expected length_low <= length_full < length_zero, got \(3000, 2048, 3072\)"):
        RewardConfig(length_low=3000)
    RewardConfig(length_low=2048)  # only one length has all of it


def test_repetition_hand_computed():
    assert repetition("") == repetition("a b c") == repetition("a b c d e f") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("the " * 103) == pytest.approx(99 / 100)
    assert repetition("Red car. red CAR, red car") == pytest.approx(1 / 3) and repetition("图图图图图") == 0.5


@pytest.mark.parametrize("text, want", [
    ("यह हिन्दी है", ["यह", "हिन्दी", "है"]), ("มีสุนัข แมว", ["มีสุนัข", "แมว"]), ("كِتَاب", ["كِتَاب"]),
    ("Cafe\u0301 fume\u0301e", ["caf\u00e9", "fum\u00e9e"]), ("wor\u00add", ["word"]),
    ("ឆ្កែ\u200bឆ្មា", ["ឆ្កែ", "ឆ្មា"]),
])
def test_vowel_signs_and_accents_do_not_part_a_word(text, want):
    """\"हिन्दी\" were three words of a letter, so that other words with these letters were repeats."""
    assert words(text) == want


def test_only_what_has_a_weight_is_a_part():
    captions, lengths = ["A cat. Perhaps a dog.", "a a a a a"], [50, 250]
    assert style_parts(captions, lengths, RewardConfig()) == ({}, {})
    config = RewardConfig(length_weight=0.5, length_low=100, length_full=200, length_zero=300,
                          repetition_weight=2.0, praise_weight=0.1)
    parts, weights = style_parts(captions, lengths, config)
    assert weights == {"length": 0.5, "repetition": 2.0, "praise": 0.1}
    assert {key: part.tolist() for key, part in parts.items()} == {
        "length": [0.25, 0.25], "repetition": [0, -1.0], "praise": [pytest.approx(-0.05), 0]}


def test_every_weight_is_a_part_one_that_a_fork_adds_too():
    @dataclass(frozen=True)
    class Forked(RewardConfig):
        color_weight: float = 0.0

    weights = [field.name for field in fields(Forked) if field.name.endswith("_weight")]
    assert len(weights) == 5 and not Forked().has_other_parts
    assert all(replace(Forked(), **{name: 0.5}).has_other_parts for name in weights)


# ------------------------------------------------------------------------- parts compared apart

ACCURACY, LENGTH = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.2, 0.0, 0.2, 0.0])


def test_equal_sums_of_unlike_parts_hand_computed():
    """Two captions earn 1 and 1 in two ways: the sum is flat, the parts are not."""
    result = Rewards(torch.ones(2), {"accuracy": torch.tensor([0.0, 1.0]), "length": torch.tensor([1.0, 0.0])}, [],
                     {"length": 0.5})
    config = toy_config(group_size=2)
    assert compare_siblings(result, config).tolist() == [0, 0]
    apart = compare_siblings(result, toy_config(group_size=2, normalize_parts=True))
    # accuracy: -+0.5 / sqrt(0.5) = -+0.7071; length without its weight: 2 and 0, +-1 / sqrt(2), times 0.5
    assert apart.tolist() == pytest.approx([-0.7071 + 0.3536, 0.7071 - 0.3536], abs=2e-4)


def test_parts_brute_force():
    generator = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(12, generator=generator) for name in ("accuracy", "length", "praise")}
    weights, rewards = {"length": 0.2, "praise": 3.0}, sum(parts.values())
    rewards[5] = torch.nan
    got = part_advantages(parts, weights, rewards, 4, True, True)
    for start in range(0, 12, 4):
        rows = [row for row in range(start, start + 4) if row != 5]
        for row in range(start, start + 4):
            want = 0.0
            for name, part in parts.items():
                weight = weights.get(name, 1.0)
                values = [part[i].item() / weight for i in rows]
                mean = sum(values) / len(values)
                std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
                if row != 5:
                    others = (sum(values) - part[row].item() / weight) / (len(values) - 1)
                    want += weight * (part[row].item() / weight - others) / (std + 1e-4)
            assert got[row].item() == pytest.approx(want, abs=1e-5)


def test_one_part_and_no_division_are_the_sum():
    rewards = torch.tensor([0.0, 0.25, 0.5, 0.0])
    assert torch.equal(part_advantages({"accuracy": rewards}, {}, rewards, 2), group_advantages(rewards, 2))
    parts = {"accuracy": rewards, "length": torch.tensor([0.1, 0.0, 0.0, 0.3])}
    total = sum(parts.values())
    apart = part_advantages(parts, {"length": 0.5}, total, 2, False, False)
    assert torch.allclose(apart, group_advantages(total, 2, False, False))


# ------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(("caption", "num_words", "cut"), [
    ("A red car. It stands.", 5, "A red car. It stands."),
    ("A red car. It stands.", 4, "A red car."),
    ("A red car. It stands.", 3, "A red car."),
    ("A red car. It stands.", 2, "A red"),  # the first sentence is longer: its first words
    ("**Top.** Seen by Dr. Who at 3.5 m. End", 5, "**Top.**"),
    ("**Top.** Seen by Dr. Who at 3.5 m. End", 8, "**Top.** Seen by Dr. Who at 3.5 m."),
    ("# Parts\n\n1. a cup\n2. a pot", 5, "# Parts\n\n1. a cup"),
    ("# Parts\n\n1. a cup\n2. a pot", 6, "# Parts\n\n1. a cup"),
    ("一只猫。两只狗、站着。", 8, "一只猫。两只狗、站着。"),
    ("一只猫。两只狗、站着。", 7, "一只猫。"),
    ("一只猫 sits。Two dogs.", 4, "一只猫 sits。"),
    ("", 1, ""), ("Word", 1, "Word"),
])
def test_a_caption_is_cut_after_a_sentence(caption, num_words, cut):
    assert cut_caption(caption, num_words) == cut


def test_a_cut_caption_is_the_longest_beginning_of_whole_sentences():
    """Among all its beginnings, tried one by one, on texts of random pieces."""
    rng = random.Random(0)
    pieces = ("A dog", " runs", ".", ". ", "! ", "\n", "\n- ", " Dr. ", "e.g. ", "**", "3. ", " No. 5", "猫。", '"Hi." ')
    for _ in range(150):
        caption = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 16)))
        whole, num_words = sentences(caption), rng.randint(1, 12)
        cut = cut_caption(caption, num_words)
        assert caption.startswith(cut) and count_words(cut) <= num_words
        if count_words(caption) <= num_words:
            assert cut == caption
            continue
        told = [sentences(caption[:end]) for end in range(len(caption)) if count_words(caption[:end]) <= num_words]
        best = max((len(part) for part in told if part == whole[: len(part)]), default=0)
        assert sentences(cut) == whole[:best] if best else count_words(cut) == num_words


def test_budgets_of_a_captioner_that_could_not_open_an_image():
    rows = [{"caption": "A dog. A cat.", "tokens": 6, "finish_reason": "stop"}]
    failed = [{"error": "cannot be opened"}]
    assert with_budgets({"ours": [rows, failed]}, [2, 9]) == {
        "ours": [rows, failed],
        "ours, 2 words": [[{"caption": "A dog."}], failed],  # how many tokens that has was not counted
        "ours, 9 words": [rows, failed],
    }
