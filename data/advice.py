"""What input is, where it is not what a program takes, and the next step to take. Imported only
where something is wrong."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path

from data.formats import data_files
from data.images import IMAGE_SUFFIXES
from data.io import nearest

HUB_SET = re.compile(
    r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?(datasets/)?([\w.-]+/[\w.-]+)(/.*)?"
)
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".tsv", ".csv", ".tar", ".zip")
PUBLISHED = {"caprl-qa-75k": "internlm/CapRL-QA-75K"}
"""Sets that these pages call by their last name alone."""
KINDS = {
    "a chat (LLaVA, ShareGPT)": {"conversations", "conversation"},
    "a chat (OpenAI)": {"messages"},
    "a caption": {"caption", "captions", "caption_0", "recaption", "description", "text"},
    "a question outside a list": {"question"},
    "boxes or captions (COCO)": {"annotations"},
}
"""What a row is that has one of these keys and no questions. The first that fits counts."""
QUESTIONS = ("training needs multiple-choice questions on each image, docs/data.md says how they "
             "are written")
LINES = "one object a line: `jq -c '.[]' FILE.json > FILE.jsonl` makes lines of a list"


def nothing_there(path: str | Path, expected: str) -> str:
    """The sentence on a path where nothing is: how a data set of the hub is downloaded, or the name
    that is nearest to it."""
    path, there = str(path), nearest(Path(path))
    if there == Path(path):
        return f"{path}: expected {expected}, found neither file nor folder"
    sentence = f"{path}: expected {expected}, found nothing"
    missing = Path(path).absolute().parts[len(there.absolute().parts)]
    names = {name.lower(): name for name in os.listdir(there)} if there.is_dir() else {}
    close = difflib.get_close_matches(missing.lower(), names, n=1, cutoff=0.8)
    hub_name = PUBLISHED.get(Path(path).name.lower(), "")
    match = HUB_SET.fullmatch(path)
    is_set = match and (match[1] or not match[3]) and not path.lower().endswith(FILE_ENDINGS)
    if is_set and there.absolute() == Path.cwd():  # else it is below a folder that is there
        hub_name = hub_name or match[2]
    folder = hub_name.rpartition("/")[2]
    if hub_name and Path(folder).is_dir():
        sentence += f"; the folder {folder} is there: give that"
    elif hub_name:
        sentence += (f"; data sets are not downloaded here: `hf download {hub_name} --repo-type "
                     f"dataset --local-dir {folder}` fetches one of the hub, then give {folder}")
    elif path.startswith("~"):
        sentence += "; the shell did not replace ~: write the whole path"
    elif close:
        sentence += f"; {there} has {names[close[0]]!r}"
    elif missing != Path(path).name:
        sentence += f"; {there} has no {missing!r}"
    return sentence


def no_files(folder: Path, num_pictures: int) -> str:
    """The sentence on a folder without parquet and JSONL files."""
    sentence = f"{folder}: expected *.parquet or *.jsonl in the folder, found"
    if num_pictures:
        return f"{sentence} {num_pictures} pictures and no questions; {QUESTIONS}"
    files = list(islice((file for file in folder.rglob("*") if file.is_file()), 10_000))
    if not files:
        return f"{sentence} none"
    lists = [file for file in files if file.suffix.lower() == ".json"]
    endings = Counter(file.suffix.lower() or "without ending" for file in files)
    counts = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(5))
    said = _no_lines(lists[0]) if lists else ""
    return said or f"{sentence} {counts}; {QUESTIONS}"


def row_kind(keys: Collection[str], file: Path) -> str:
    """What a row without questions is, by the keys that it or its parquet file has."""
    if file.is_file() and file.open("rb").read(4) == b"PAR1":  # only some columns were read
        from data.parquet import parquet_columns  # here: other files need no pyarrow

        keys = parquet_columns(file)
    kind = next((kind for kind, names in KINDS.items() if names & set(keys)), "")
    return f"{kind} without questions, {sorted(keys)}; {QUESTIONS}" if kind else str(sorted(keys))


def no_sound_row(source: str, refused: Sequence[str]) -> str:
    """The sentence on a set of which no row can be used.

    refused: the sentence of each row.
    """
    if not refused:
        return f"{source}: expected at least one image with questions, found none"
    said = f"{refused[0]} (1 of {len(refused)}, and no row can be used)"
    return _no_lines(data_files(source)[0]) or said


def _no_lines(file: Path) -> str:
    """The sentence on a file that is neither parquet nor JSONL; empty where it may be JSONL."""
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    if head.startswith(b"PAR1"):
        return ""
    ending = file.suffix.lower()
    sentence = f"{file}: expected parquet or JSONL with questions, found"
    if ending in IMAGE_SUFFIXES:
        return f"{sentence} a picture; {QUESTIONS}"
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    first, is_ended, _ = text.partition("\n")
    if first.startswith("[") or (first.startswith("{") and is_ended and first.rstrip()[-1] != "}"):
        keys = re.findall(r'"(\w+)"\s*:', text[:4096])
        kind = next((f" of {kind}" for kind, names in KINDS.items() if names & set(keys)), "")
        is_set = "questions" in keys or "choices" in keys
        step = LINES if is_set or not kind else QUESTIONS
        return f"{sentence} JSON{'' if is_set else kind} in a list or over several lines; {step}"
    if not text.startswith("{") and (b"\0" in head or ending in FILE_ENDINGS[3:] + (".txt", ".md")):
        return f"{sentence} a {ending or 'binary'} file; docs/formats.md says what is read"
    return ""


def misplaced_word(arguments: list[str], presets: Collection[str], switches: Iterable[str]) -> str:
    """The sentence on a word among a program's arguments that is no preset, or stands too late;
    empty where there is none.

    switches: names of the flags that take no value.
    """
    for place, (before, word) in enumerate(pairwise(["", *arguments])):
        flag = before.removeprefix("--").removeprefix("no-").replace("-", "_")
        is_value = before.startswith("-") and "=" not in before and flag not in switches
        if word.startswith("-") or is_value or (place == 0 and word in presets):
            continue
        if word in presets:
            return f"{word}: expected a preset as the first word, before all flags"
        close = difflib.get_close_matches(word, presets, n=1)
        return (f"{word}: expected a flag, or as the first word one of the presets "
                f"{', '.join(presets)}{f'; the nearest is {close[0]}' if close else ''}")
    return ""
