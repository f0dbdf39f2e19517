"""What bench/paper.py measures: the cells of each study, the orders that are expected of them, and
what is made for them first."""

from collections.abc import Callable
from dataclasses import dataclass, field

from data.examples import Question
from data.toy.world import COMMON_KNOWLEDGE

UNTRAINED = "untrained"
"""In place of a cell's flags, or before them: its policy is evaluated as it is."""
TRAINING = "train.py toy"
FROM_CAPTIONS = ("--data toy:heldout:{num_images} --verifier data/toy/verifier "
                 "--num-captions {num_captions} --max-new-tokens 96 --cache ''")
"""Flags of evaluations from captions."""


@dataclass(frozen=True)
class Study:
    """Flags may name {seed}, {checker}, {checker_mode}, {num_images}, {num_captions}, {sets},
    {caprl} and PRODUCTS; those of `program` also {folder}."""

    cells: dict[str, str]
    """Name of the cell -> flags of its program."""
    orders: tuple[str, ...]
    """"column: a > b > c": a is expected to have more than b, and b more than c."""
    program: str = TRAINING
    """What makes the policy of a cell."""
    smoke: str = ""
    """Flags of `program` with --smoke, where it is not training."""
    evaluation: str = f"prism {FROM_CAPTIONS}"
    """Program of evaluate.py, with flags."""
    has_noise: bool = False
    """Whether the noise of each cell's reward is measured, by bench/reward_noise.py."""
    paper: dict[str, float] = field(default_factory=dict)
    """Cell -> the paper's mean accuracy in percent, over benchmarks that docs/paper.md names."""


JUDGED = "--checker {checker} --checker-mode {checker_mode}"
CORRECT = f"{JUDGED} --correctness-weight"

STUDIES = {
    "true": Study(
        evaluation=f"claims {FROM_CAPTIONS} {JUDGED}",
        cells={
            "start": UNTRAINED, "accuracy alone": "", "correctness 0.5": f"{CORRECT} 0.5",
            "correctness 2": f"{CORRECT} 2",
            "correctness 0.5, apart": f"{CORRECT} 0.5 --normalize-parts",
            "correctness 2, apart": f"{CORRECT} 2 --normalize-parts",
            "caprl-true": f"{CORRECT} 0.5 --praise-weight 0.5",
            "one question": "--data {sets}/one",
            "one question, correctness 0.5": f"--data {{sets}}/one {CORRECT} 0.5",
            "one question, correctness 2, apart":
                f"--data {{sets}}/one {CORRECT} 2 --normalize-parts",
            "praising start": f"{UNTRAINED} --policy {{praising}}",
            "praising": "--policy {praising}",
            "praising, penalty 0.5": "--policy {praising} --praise-weight 0.5",
        },
        orders=(
            "Prism: correctness 0.5 > accuracy alone > start", "Prism: caprl-true > accuracy alone",
            "exact precision: caprl-true > accuracy alone",
            "Prism: correctness 2, apart > correctness 2 > accuracy alone",
            "exact precision: correctness 2 > correctness 0.5 > accuracy alone > start",
            "exact precision: correctness 0.5, apart > correctness 0.5",
            "exact precision: correctness 2, apart > correctness 2",
            "exact precision: one question, correctness 0.5 > one question",
            "exact precision: one question, correctness 2, apart > one question",
            "exact precision: accuracy alone > one question > start",
            "Prism: one question, correctness 0.5 > one question",
            "empty: praising start > praising > praising, penalty 0.5",
            "Prism: praising, penalty 0.5 > praising",
        ),
    ),
    "captioners": Study(
        cells={
            "start": UNTRAINED, "SFT": f"{UNTRAINED} --policy {{dense}}",
            "judge": "--reward judge --judge {checker}",
            "judge that likes short": "--reward judge --judge {short_judge}",
            "judge that likes long": "--reward judge --judge {long_judge}",
            "CapRL": "", "SFT, then CapRL": "--policy {dense}",
        },
        orders=("Prism: CapRL > judge > start", "Prism: CapRL > SFT > start",
                "Prism: SFT, then CapRL > SFT", "exact precision: SFT, then CapRL > SFT",
                "Prism: CapRL > judge that likes long", "Prism: CapRL > judge that likes short",
                "words: judge that likes long > judge > judge that likes short",
                "exact precision: CapRL > start"),
        paper={"start": 39.9, "judge": 42.5, "CapRL": 48.3},
    ),
    "sampling": Study(
        cells={
            "start": UNTRAINED, "N = 1": "--num-questions 1", "N = 2": "--num-questions 2",
            "N = 4": "", "N = 8": "--num-questions 8",
            "N = 1, independent": "--num-questions 1 --question-draw independent",
            "N = 4, independent": "--question-draw independent",
            "N = 4, independent, sampled": "--question-draw independent --verifier-mode sample",
            "N = 4, two shuffles": "--num-shuffles 2", "N = 4, unshuffled": "--num-shuffles 0",
        },
        orders=(
            "Prism: N = 8 > N = 4 > N = 2 > N = 1 > start", "Prism: N = 4 > N = 1",
            "area: N = 8 > N = 4 > N = 2 > N = 1", "area: N = 4 > N = 1",
            "Prism: N = 4 > N = 4, independent > N = 4, independent, sampled",
            "Prism: N = 1 > N = 1, independent",
            "Prism: N = 4, two shuffles > N = 4 > N = 4, unshuffled",
            "noise: N = 1 > N = 2 > N = 4 > N = 8", "noise: N = 4, independent > N = 4",
        ),
        has_noise=True,
        paper={"start": 40.6, "N = 1": 47.3, "N = 2": 47.6, "N = 4": 48.4, "N = 8": 48.3},
    ),
    "questions": Study(
        cells={
            "start": UNTRAINED, "one": "--data {sets}/one", "two": "--data {sets}/two",
            "three": "--data {sets}/three", "all": "", "two, six unneeded": "--data {sets}/leaking",
            "filtered": "--data {filtered}/examples.jsonl",
        },
        orders=("Prism: all > three > two > one > start", "Prism: all > one",
                "area: all > three > two > one", "Prism: two > two, six unneeded",
                "area: two > two, six unneeded", "Prism: filtered > two, six unneeded",
                "area: filtered > two, six unneeded"),
        paper={"start": 40.6, "one": 48.0, "two": 48.5, "three": 48.5, "two, six unneeded": 47.4,
               "filtered": 48.5},
    ),
    "verifier": Study(
        cells={"letters": "", "probabilities": "--soft",
               "replies, T 0.6": "--verifier-mode sample",
               "replies, T 2": "--verifier-mode sample --verifier-temperature 2",
               "half-trained": "--verifier {half}/verifier"},
        orders=("Prism: letters > half-trained",
                "Prism: probabilities > letters > replies, T 0.6 > replies, T 2",
                "area: probabilities > letters > replies, T 0.6 > replies, T 2",
                "noise: replies, T 2 > replies, T 0.6 > letters > probabilities"),
        has_noise=True,
    ),
    "data": Study(
        program="-m data.toy.pretrain {folder} --seed {seed}",
        evaluation="direct --data chartqa:{sets}/heldout/questions.jsonl",
        smoke="--images 4 --steps 2 --batch 2 --tune-steps 2",
        cells={
            "none": "--steps 1",  # the tuning alone, but for one step
            "start": "--captions {of_start}", "SFT": "--captions {of_dense}",
            "CapRL": "--captions {of_caprl}", "facts": "",
            "CapRL, half": "--captions {of_caprl} --images 720",
            "CapRL, a quarter": "--captions {of_caprl} --images 360",
        },
        orders=("looking: CapRL > start > none", "looking: facts > CapRL > SFT",
                "looking: CapRL > CapRL, half > CapRL, a quarter"),
    ),
    "groups": Study(
        cells={
            "G = 2": "--group-size 2 --prompts-per-step 48",
            "G = 4": "--group-size 4 --prompts-per-step 24", "G = 8": "",
            "G = 16": "--group-size 16 --prompts-per-step 6",
            "no KL": "--kl-coef 0", "KL 0.1": "--kl-coef 0.1", "KL 0.4": "--kl-coef 0.4",
        },
        orders=("Prism: G = 16 > G = 8 > G = 4 > G = 2", "area: G = 16 > G = 8 > G = 4 > G = 2",
                "Prism: no KL > G = 8 > KL 0.1 > KL 0.4"),
    ),
}
"""A cell without flags is the toy preset: N = 4, G = 8, KL 0.01, all questions, letters."""

UNNEEDED = [Question(*parts, needs_image=False) for parts in COMMON_KNOWLEDGE]
SETS: dict[str, tuple[int, Callable[[list[Question]], list[Question]]]] = {
    "one": (480, lambda asked: asked[:1]), "two": (480, lambda asked: asked[:2]),
    "three": (480, lambda asked: asked[:3]), "leaking": (480, lambda asked: asked[:2] + UNNEEDED),
    "many": (1440, lambda asked: asked),
}
"""{sets}: sets of toy images with some of their questions, in random order. name -> (number of
images, choice of questions). Trainings take 480, as the toy preset does; "many" is captioned."""


@dataclass(frozen=True)
class Product:
    """What a program makes before the cells that name it."""

    command: str
    """{folder}, {seed}, and what flags of a study may name."""
    file: str = "config.json"
    """Of the folder, the last that is written."""
    smoke: str = "--steps 2 --batch 2"


CAPTION_MANY = ("caption.py --images {sets}/many/examples.jsonl --shard-size 1440 --out {folder} "
            "--max-new-tokens 96 --seed {seed} --policy")
"""What captions {sets}/many, for pretraining."""
PRODUCTS = {
    "praising": Product(
        "-m data.toy.captioner {folder} --captions praising --steps 100 --batch 16"),
    "dense": Product("-m data.toy.captioner {folder} --captions dense --seed {seed}"),
    "short_judge": Product("-m data.toy.flawed_judge {folder} --likes short --looker {checker}"),
    "long_judge": Product("-m data.toy.flawed_judge {folder} --likes long --looker {checker}"),
    "filtered": Product(
        "-m data.curate filter --data {sets}/leaking --out {folder} --model {checker} "
        "--max-without-image 4",
        "report.md", "--tries 1 --min-with-image 0 --max-without-image 1 --max-prior 99"),
    "half": Product(
        "-m data.toy.build --models verifier --verifier-steps 700 --num-images 30 --folder "
        "{folder}", "verifier/tokenizer.json", "--smoke"),
    "of_start": Product(f"{CAPTION_MANY} data/toy/policy", "shard-000000.jsonl", ""),
    "of_dense": Product(f"{CAPTION_MANY} {{dense}}", "shard-000000.jsonl", ""),
    "of_caprl": Product(f"{CAPTION_MANY} {{caprl}}", "shard-000000.jsonl", ""),
}
"""{NAME}: the folder of a product. {caprl} is the final policy of `train.py toy`."""

ALWAYS = "--audit-every 0 --save-every 10 --eval-data toy:heldout:40 --eval-every 10"
NOISE_SMOKE = "--images 1 --group-size 2 --draws 2"
SMOKE = "--num-steps 2 --prompts-per-step 2 --group-size 2 --eval-images 1 --eval-every 2"
