"""Are captions true? `evaluate.py claims`: each claim judged against the picture, beside Prism.

A row of `tools/prism.py` gets `claims`, as the reward's checker judges them (reward/claims.py). Of
toy pictures the truth is known: there each claim also has `is_true` (null: it says nothing that
could be), and the caption its `recall`, the share of the scene's facts that it says.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from data.benchmarks.benchmark import Benchmark
from data.toy.facts import is_true, scene_of, told_share
from grpo.distributed import all_or_none, gather_rows, local_device, rank, world_size
from grpo.pretrained import check_models, find_model, load_image_processor, loading
from reward.claims import Checker, claim_record, claims_of, judge_claims, load_checker
from tools.budgets import count_words
from tools.stats import bootstrap_interval, by_image, markdown, mean, question_means
from tools.tables import Rows, Tables

HOLDS = 0.5
"""A claim above this probability counts as held for true."""

DIGITS = {"Prism": 3, "precision": 3, "exact precision": 3, "exact recall": 3, "checker right": 3,
          "claims": 1, "words": 1}
"""What the tables tell, with the digits of it. Prism: accuracy of the verifier. precision: share of
the claims that the checker holds for true; exact precision: that are true, of those that could be.
checker right: share of the latter that the checker judges as the facts do. Per caption: exact
recall, claims, words."""


@dataclass(frozen=True)
class CheckerConfig:
    """Who judges the claims of captions."""

    checker: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """The vision-language model that judges each claim, a local folder or a hub name."""
    checker_mode: Literal["yes", "likelihood"] = "yes"
    """Ask whether the claim is true, or take how much likelier it is with the image than without
    (reward/claims.py)."""


def judged_rows(config: CheckerConfig, benchmarks: Sequence[Benchmark],
                pairs: Iterable[tuple[str, str, list[dict]]]) -> Iterator[
                    tuple[str, str, list[dict]]]:
    """(benchmark, captioner, rows) of each pair, the rows with their claims. The checker is loaded
    when the first captions are there."""
    by_name, checker = {benchmark.name: benchmark for benchmark in benchmarks}, None
    with all_or_none("models"):  # now, not when captions have been written
        base, adapters = find_model(config.checker)
        with loading(base, "checker", adapters):
            load_image_processor(base)
    for name, captioner, rows in pairs:
        if not checker:
            with all_or_none("checker"):
                checker = load_checker(config.checker, config.checker_mode, local_device())
            check_models("checker", checker.policy)
        yield name, captioner, with_claims(by_name[name], rows, checker)


def with_claims(benchmark: Benchmark, rows: Sequence[dict], checker: Checker) -> list[dict]:
    """The rows with their claims. Each rank judges its share of the pictures and returns all rows.
    If a picture cannot be opened that is the failure of all claims about it."""
    groups, images = by_image(rows), {picture.id: picture.image for picture in benchmark.pictures}
    judged = []
    for id in tqdm(list(groups)[rank() :: world_size()], desc="claims", unit="picture", leave=None,
                   disable=rank() != 0):
        captions = [row["caption"] for row in groups[id]]
        size = len(captions)
        try:
            records = judge_claims(captions, [images[id]] * size, [id] * size, checker)
        except ValueError as error:
            records = [[claim_record(claim, math.nan) | {"failure": str(error)}
                        for claim in claims_of(caption)] for caption in captions]
        judged.append((id, records))
    left = {id: iter(records) for id, records in gather_rows(judged)}
    rows = [row | {"claims": next(left[row["id"]])} for row in rows]
    is_toy = benchmark.name.startswith("toy:")
    return [row | exact(row) if is_toy and "error" not in row else row for row in rows]


def exact(row: dict) -> dict:
    """`claims` with `is_true`, and `recall`, of a caption of a toy picture."""
    scene = scene_of(row["id"])
    claims = [claim | {"is_true": is_true(claim["claim"], scene)} for claim in row["claims"]]
    said = [claim["claim"] for claim in claims if claim["is_true"]]
    return {"claims": claims, "recall": told_share(said, scene)}


# ----------------------------------------------------------------------------------------- tables


def image_values(rows: Sequence[dict]) -> dict[str, dict[str, list[float]]]:
    """Key of `DIGITS` -> image -> its values. An image without one has not been measured."""
    prism = {id: list(scores.values()) for id, scores in question_means(rows).items()}
    values: dict[str, dict[str, list[float]]] = {key: {} for key in DIGITS} | {"Prism": prism}
    for row in rows:
        if "error" in row:
            continue
        judged = [claim for claim in row["claims"] if not claim["failure"]]
        known = [claim for claim in row["claims"] if claim.get("is_true") is not None]
        both = [claim for claim in known if not claim["failure"]]
        for key, given in {
            "precision": [claim["score"] > HOLDS for claim in judged],
            "exact precision": [claim["is_true"] for claim in known],
            "exact recall": [row["recall"]] if "recall" in row else [],
            "checker right": [(claim["score"] > HOLDS) == claim["is_true"] for claim in both],
            "claims": [len(row["claims"])], "words": [count_words(row["caption"])],
        }.items():
            if given:
                values[key].setdefault(row["id"], []).extend(given)
    return values


def summarize_claims(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Key of `DIGITS` -> mean, low and high: its bootstrap 95% interval over images."""
    return {key: _summary(groups.values()) for key, groups in image_values(rows).items()}


def claim_differences(rows: Sequence[dict], others: Sequence[dict]) -> dict[str, dict[str, float]]:
    """As `summarize_claims`, of each image's mean of `others` less that of `rows`. Images that one
    of them has no value of are left out."""
    first, second = image_values(rows), image_values(others)
    return {
        key: _summary([[mean(second[key][id]) - mean(given)] for id, given in groups.items()
                       if id in second[key]])
        for key, groups in first.items()
    }


def _summary(groups: Collection[Sequence[float]]) -> dict[str, float]:
    low, high = bootstrap_interval(groups)
    return {"mean": mean([value for group in groups for value in group]), "low": low, "high": high}


def add_claims(rows: Rows, tables: Tables) -> str:
    """Two tables as Markdown: each captioner, and its differences to the benchmark's first one. The
    numbers of the first go into `tables`, under "claims". Nothing where no claims were judged."""
    summaries, differences, first = {}, {}, {}
    if not any("claims" in row for group in rows.values() for row in group):
        return ""
    for (benchmark, captioner), group in rows.items():
        summaries[benchmark, captioner] = summarize_claims(group)
        tables[benchmark, captioner]["all"]["claims"] = summaries[benchmark, captioner]
        base = first.setdefault(benchmark, captioner)
        if base != captioner:
            name = benchmark, f"{captioner}, less {base}"
            differences[name] = claim_differences(rows[benchmark, base], group)
    parts = ["", "Claims, each with its 95% interval over images:", _table(summaries, "")]
    if differences:
        parts += ["Paired, each image's mean:", _table(differences, "+")]
    return "\n\n".join(parts)


def _table(summaries: dict[tuple[str, str], dict[str, dict[str, float]]], sign: str) -> str:
    """Columns that nothing was measured of are left out."""
    shown = [key for key in DIGITS
             if not all(math.isnan(summary[key]["mean"]) for summary in summaries.values())]

    def cell(numbers: dict[str, float], digits: int) -> str:
        middle, low, high = (f"{number:{sign}.{digits}f}" for number in numbers.values())
        return "" if math.isnan(numbers["mean"]) else f"{middle} ({low} to {high})"

    header = " | ".join(["benchmark", "captioner", *(f"{key}:" for key in shown)])
    return markdown(header, ([*names, *(cell(summary[key], DIGITS[key]) for key in shown)]
                             for names, summary in summaries.items()))
