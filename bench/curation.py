"""How well the filters of data/curate/ find what is planted in the toy world.

    python bench/curation.py

Questions: the toy world's own, and faults planted among them. Those are questions that need no
image, wrong answers, questions that tell their answer, and repeats (the same question shuffled, or
in other words). The toy looker answers them, with the image and without it.

Images: drawn scenes, and others planted among them. Those are blank ones, thumbnails, exact copies,
and near copies (saved as JPEG, larger, or darker). Of a copy and its original one has to go, no
matter which: the two count once.

found      share of what was planted that was removed for that reason
removed    for any reason
precision  of what was removed for that reason, the share that was planted
"""

import contextlib
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import tyro
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.curate.filter import FilterConfig, filter_questions
from data.curate.images import ImagesConfig, choose_images
from data.examples import Example, Question
from data.export import write_examples
from data.jsonl import read_log
from data.toy.world import draw, make_scene, scene_questions

REMOVED_BY = {
    "needs no image": {"right without the image", "likely without the image"},
    "wrong answer": {"wrong with the image"},
    "tells its answer": {"tells its answer"},
    "repeated": {"repeated"},
    "blank": {"too simple"},
    "thumbnail": {"low resolution"},
    "exact copy": {"exact duplicate", "near duplicate"},
    "near copy": {"near duplicate", "exact duplicate"},
}


@dataclass(frozen=True)
class BenchConfig:
    """Sizes of the measurement."""

    images: int = 120
    model: str = "data/toy/looker"
    """The vision-language model that answers."""


def plant(question: Question, defect: str, rng: random.Random) -> Question:
    """The question with the defect."""
    right = question.choices[question.answer_index]
    if defect == "wrong answer":
        others = [place for place in range(len(question.choices)) if place != question.answer_index]
        return replace(question, answer_index=rng.choice(others))
    if defect == "tells its answer":
        return replace(question, question=f"It is {right}, as anyone can see. {question.question}")
    choices = rng.sample(question.choices, len(question.choices))
    text = rng.choice([question.question, f"In this picture: {question.question}",
                       question.question.rstrip("?") + " here?"])
    return replace(question, question=text, choices=tuple(choices),
                   answer_index=choices.index(right))


@dataclass
class Planted:
    """What is wrong with each item ("" with a sound one), and of which other one it is a copy."""

    defects: dict
    originals: dict


def planted_questions(num: int) -> tuple[list[Example], Planted]:
    """Examples, and what is planted by (id, place). A fifth of the questions get a defect."""
    examples, planted = [], Planted({}, {})
    for index in range(num):
        scene, rng = make_scene("heldout", index), random.Random(f"planted:{index}")
        questions: list[Question] = []

        def add(question: Question, defect: str, scene=scene, questions=questions) -> None:
            planted.defects[scene.id, len(questions)] = defect
            if defect == "repeated":
                planted.originals[scene.id, len(questions)] = (scene.id, len(questions) - 1)
            questions.append(question)

        for question in scene_questions(scene):
            defect = rng.choice(["wrong answer", "tells its answer",
                                 "repeated"]) if rng.random() < 0.2 else ""
            if not question.needs_image:
                add(question, "needs no image")
            elif defect == "repeated":
                add(question, "")
                add(plant(question, defect, rng), defect)
            else:
                add(plant(question, defect, rng) if defect else question, defect)
        examples.append(Example(scene.id, draw(scene), tuple(questions), scene.family))
    return examples, planted


def planted_images(folder: Path, num: int) -> Planted:
    """Writes scenes, and for every third one something planted."""
    folder.mkdir()
    planted = Planted({}, {})

    def save(image: Image.Image, name: str, defect: str, original: str = "") -> None:
        image.save(folder / name)
        planted.defects[name] = defect
        if original:
            planted.originals[name] = original

    for index in range(num):
        rng, image = random.Random(f"images:{index}"), draw(make_scene("heldout", index))
        name, other = f"{index:04d}.png", f"{index:04d}-planted.png"
        save(image, name, "")
        defect = rng.choice(["blank", "thumbnail", "exact copy", "near copy",
                             "near copy"]) if index % 3 == 0 else ""
        if defect == "blank":
            save(Image.new("RGB", image.size, rng.choice(["white", "black", "gray"])), other,
                 defect)
        elif defect == "thumbnail":
            new = draw(make_scene("heldout", num + index))
            save(new.resize((new.width // 3, new.height // 3)), other, defect)
        elif defect == "exact copy":
            save(image, other, defect, name)
        elif defect == "near copy":
            image.save(packed := BytesIO(), "JPEG", quality=70)
            larger = image.resize((image.width * 3 // 2, image.height * 3 // 2))
            darker = ImageEnhance.Brightness(image).enhance(0.8)
            save(rng.choice([Image.open(packed).convert("RGB"), larger, darker]), other, defect,
                 name)
    return planted


def table(fates: dict, planted: Planted) -> list[str]:
    """Rows by defect. Of a pair of copies, the one that was removed as a copy stands for the
    planted one."""
    fates = dict(fates)
    for copy, original in planted.originals.items():
        if fates[copy] == "kept" and fates[original] in REMOVED_BY[planted.defects[copy]]:
            fates[copy], fates[original] = fates[original], "kept"
    lines = ["| planted | number | found | removed | precision |",
             "| --- | ---: | ---: | ---: | ---: |"]
    for defect in dict.fromkeys(planted.defects.values()):
        of_defect = [fates[key] for key, kind in planted.defects.items() if kind == defect]
        removed = sum(fate != "kept" for fate in of_defect) / len(of_defect)
        if not defect:
            sound = f"| sound | {len(of_defect)} | | {removed:.3f} | |"
            continue
        reasons = REMOVED_BY[defect]
        alike = {kind for kind, names in REMOVED_BY.items() if names == reasons}
        taken = [planted.defects[key] in alike for key, fate in fates.items() if fate in reasons]
        precision = f"{sum(taken) / len(taken):.3f}" if taken else ""
        hits = sum(fate in reasons for fate in of_defect) / len(of_defect)
        lines.append(f"| {defect} | {len(of_defect)} | {hits:.3f} | {removed:.3f} | {precision} |")
    return [*lines, sound, ""]


RULES = {
    "published: 4 of 4 with the image, 0 of 4 without": {"max_prior": 99.0},
    "published, and the answer prior at most 1.5 times chance": {},
    "4 of 4 with the image, at most 2 of 4 without, and the prior": {"max_without_image": 2},
    "4 of 4 with the image, and the prior": {"max_without_image": 4},
}


def main(config: BenchConfig) -> None:
    examples, planted = planted_questions(config.images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examples(folder / "planted", examples)
        for rule, changes in RULES.items():
            out = folder / "filtered"  # questions are measured once, then decided on by each rule
            settings = FilterConfig(str(folder / "planted/examples.jsonl"), str(out), config.model,
                                    **changes)
            with contextlib.redirect_stdout(None):
                filter_questions(settings)
            verdicts = {(row["id"], place): verdict for row in read_log(out / "decisions.jsonl")
                        for place, verdict in enumerate(row["questions"])}
            fates = {key: verdict["fate"] for key, verdict in verdicts.items()}
            print("\n".join([f"{rule}:", "", *table(fates, planted)]), flush=True)
        free, sound = ([verdicts[key] for key, defect in planted.defects.items() if defect == kind]
                       for kind in ("needs no image", ""))
        for kind, group in (("that need no image", free), ("that are sound", sound)):
            passed = [verdict for verdict in group if verdict.get("without_image") == 0]
            leaning = sum(verdict.get("prior", 0) > 1.5 / 4 for verdict in group)
            print(f"of {len(group)} {kind}, {len(passed)} are answered wrongly 4 times of 4 "
                  f"without the image; of {leaning} the right option has more than 0.375")
        planted = planted_images(folder / "photos", config.images)
        with contextlib.redirect_stdout(None):
            choose_images(ImagesConfig(str(folder / "photos"), str(folder / "chosen")))
        decisions = read_log(folder / "chosen/decisions.jsonl")
        fates = {row["id"]: row["fate"] for row in decisions}
        print("\n".join(["", *table(fates, planted)]))


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
