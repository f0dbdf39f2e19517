"""README and docs say what is true: their commands are taken by the programs, those that can run
here run, forks work."""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial, wraps
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
import tyro
from PIL import Image
from torch.distributed.run import parse_args

from data.examples import load_examples
from data.images import IMAGE_SUFFIXES
from data.toy.export import ExportConfig, export

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
NO_PROGRAMS = {".venv", "tests", "runs"}
PROGRAMS = [path for path in sorted(REPO.rglob("*.py")) if not NO_PROGRAMS & set(path.relative_to(REPO).parts)]

SMALLEST = {
    "train.py": "--num-steps 1 --data toy:train:4 --prompts-per-step 2 --group-size 2 --probe-images 2 --max-new-tokens 40 "
                "--eval-images 1",
    "caption.py": "--max-new-tokens 20",
    "evaluate.py prism": "--data toy:heldout:2 --num-captions 1 --max-new-tokens 40",
    "data.toy.export": "--num 2",
    "tools.report": "",
    "reward.caprl audit": "",
    "reward.caprl replay": "--verifier data/toy/verifier",
}
"""How each program runs in a second: flags after which nothing else changes."""
NOT_RUN = {
    " torchrun ": "needs several GPUs",
    " make ": "makes an environment, or runs all tests",
    " -m venv ": "needs a network",
    " bench/": "takes minutes",
    " data.toy.build ": "takes an hour",
    " data.toy.demo ": "takes minutes; test_programs.py runs it small",
    " data.toy.writer ": "takes half an hour",
    " data.toy.captioner ": "takes minutes",
    " runs/writer": "needs what data.toy.writer makes",
    " runs/loose": "needs what data.curate keeps of it",
    " runs/demo/": "needs what the demo makes",
    " oracle=": "needs a file of captions",
}
"""Words of a command that is only read, with the reason. Its flags must be the program's all the same."""
FORKED = ("--reward recall", "runs/priced")
OF_THE_HUB = ("Qwen/", "qa.jsonl", "caprl", "CapRL")
"""Models and data of the hub, and what was made of them."""
OF_THE_READER = {"photos", "some/folder", "part_0.jsonl"}
IN_CAPITALS = re.compile(r"[A-Z_]+(?:\.[a-z]+)?")
"""RUN_DIR or NAME.jsonl: it stands for a name of the reader's own."""
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python3?|torchrun|make|\.venv/bin/\w+) ")
"""A command begins with one of these programs, perhaps after variables."""
CODE = re.compile(r"`([^`]+)`")
"""Code inside a sentence."""
CONTINUED = re.compile(r"\\\n\s*")
"""The end of a line that goes on in the next one."""


def commands_in(text: str) -> list[str]:
    """Lines of code blocks, and code in sentences, that call a program. What follows two blanks and
    a # is a comment."""
    commands, is_fenced = [], False
    for line in CONTINUED.sub("", text).splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        is_code = is_fenced or line.startswith("    ")
        pieces = [line.strip()] if is_code else CODE.findall(line)
        commands += [piece.split("  #")[0].strip() for piece in pieces if COMMAND.match(piece)]
    return commands


def written() -> list[tuple[str, str]]:
    """(file, command), of pages and of the blocks in programs' docstrings, each command where it stands first."""
    places: dict[str, str] = {}
    for path in [*PAGES, *PROGRAMS]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            lines = (ast.get_docstring(ast.parse(text), clean=False) or "").splitlines()
            text = "\n".join(line for line in lines if line.startswith("    "))
        for command in commands_in(text):
            places.setdefault(command, str(path.relative_to(REPO)))
    return [(place, command) for command, place in places.items()]


class Parsed(BaseException):
    """The program has taken its arguments; no program catches this."""


def parse_only(original: Callable, what: Any, *args, **kwargs):
    """tyro's function up to where the program would begin, which for tyro.cli(main) is inside it."""
    if isfunction(what):
        @wraps(what)
        def what(*_, **__):
            raise Parsed
    original(what, *args, **kwargs)
    raise Parsed


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """("evaluate.py", ["prism", ...]) or ("data.toy.export", [...])"""
    if words[0] == "torchrun":
        given = parse_args(words[1:])
        return given.training_script, given.training_script_args
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def run(program: str, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if program.endswith(".py"):
        monkeypatch.syspath_prepend(str((REPO / program).parent))
        runpy.run_path(str(REPO / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def key_of(program: str, arguments: list[str]) -> str:
    return next((key for key in SMALLEST if key in (program, " ".join([program, *arguments[:1]]))), "")


def reason_not_to_run(command: str) -> str:
    """Empty for a command that can run here."""
    for words, reason in NOT_RUN.items():
        if words in f" {command} ":
            return reason
    if command.endswith("--help"):
        return ""
    if any(words in command for words in FORKED):
        return "of a fork; test_the_forks_of_the_docs_work runs it"
    program, arguments = program_of(shlex.split(command))
    is_of_the_hub = any(name in " ".join(arguments) for name in OF_THE_HUB)
    if is_of_the_hub or (program == "train.py" and arguments[:1] != ["toy"]):
        return "needs models or data of the hub"
    has_own_name = any(word in OF_THE_READER or IN_CAPITALS.fullmatch(word) for word in arguments)
    return "has a name of one's own in it" if has_own_name else ""


def is_mention(arguments: list[str]) -> bool:
    """`python -m reward.caprl replay` in a sentence names a program and shows no call of it."""
    return not arguments or (len(arguments) == 1 and arguments[0].isalpha() and arguments[0].islower())


def written_for(kind: str) -> list[tuple[str, str]]:
    """The commands of a kind: "make", "environment", "fork" or "program"."""
    chosen = []
    for place, command in written():
        words = command.split()
        if words[0] == "make":
            own_kind = "make"
        elif words[1:3] == ["-m", "venv"]:
            own_kind = "environment"
        else:
            own_kind = "fork" if any(words in command for words in FORKED) else "program"
        if own_kind == kind:
            chosen.append((place, command))
    return chosen


def test_pages_and_programs_have_commands():
    commands = [command for _, command in written()]
    assert len(commands) == len(set(commands)) > 30
    some = {"python train.py toy --run-dir runs/toy", "make demo", "python -m tools.report runs/toy runs/other"}
    assert some <= set(commands)
    assert len([command for command in commands if not reason_not_to_run(command)]) >= 10


def test_commands_are_found_in_blocks_in_sentences_and_over_two_lines():
    page = """\
Run `python a.py` or `make b`, not `c.py`.

    python d.py --flag \\
        value  # a comment
    echo e

```bash
torchrun f.py
```
"""
    assert commands_in(page) == ["python a.py", "make b", "python d.py --flag value", "torchrun f.py"]


@pytest.mark.parametrize("place, command", written_for("make"))
def test_targets_of_make_are_in_the_makefile(place, command):
    targets = [line.split(":")[0] for line in (REPO / "Makefile").read_text().splitlines() if line[:1].isalpha()]
    assert set(command.split()[1:]) <= set(targets)


def test_make_installs_into_the_environment_of_its_own_folder():
    """The scripts in .venv/bin begin with the path that the folder had when they were made."""
    assert set(re.findall(r"\t\$\(BIN\)/(\w+)", (REPO / "Makefile").read_text())) == {"python", "ruff"}  # ruff is no script


@pytest.mark.parametrize("place, command", written_for("program"))
def test_programs_take_the_flags_of_every_command(place, command, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    for owner, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict"), (tyro.extras, "overridable_config_cli")):
        monkeypatch.setattr(owner, name, partial(parse_only, getattr(owner, name)))
    program, arguments = program_of(shlex.split(command))
    arguments = [{"NAME": "toy", "N": "0"}.get(word, word) for word in arguments]
    shows_help = is_mention(arguments) and program != "train.py"
    with pytest.raises(SystemExit if shows_help or "--help" in arguments else Parsed) as stop:
        run(program, [*arguments, "--help"] if shows_help else arguments, monkeypatch)
    said = capsys.readouterr()
    assert stop.type is Parsed or stop.value.code == 0, said.err


def test_commands_run_at_their_smallest_setting_in_the_order_of_the_pages(tmp_path, monkeypatch, capsys):
    """As a reader would run them, README first, in an empty folder beside the shipped models."""
    (tmp_path / "data").symlink_to(REPO / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPO))
    done = []
    for place, command in written_for("program"):
        if place.endswith(".py") or reason_not_to_run(command) or command.endswith("--help"):
            continue
        program, arguments = program_of(shlex.split(command))
        if is_mention(arguments):
            continue
        key = key_of(program, arguments)
        assert key, f"{place}: `{command}`: say in SMALLEST how it runs small, or in NOT_RUN why it does not run"
        run(program, [*arguments, *SMALLEST[key].split()], monkeypatch)
        done.append(program)
    assert {"train.py", "data.toy.export", "caption.py", "evaluate.py"} <= set(done)
    assert (tmp_path / "runs/toy/report.html").exists() and (tmp_path / "runs/prism.html").exists()
    assert (tmp_path / "runs/captions/shard-000000.jsonl").read_text().count("\n") == 2


def test_the_lines_of_python_in_the_readme_run(tiny_run, tmp_path, monkeypatch, capsys):
    """Ten plain lines of transformers write the very caption that ours do, and a caption is scored."""
    (tmp_path / "runs/toy").mkdir(parents=True)
    (tmp_path / "data").symlink_to(REPO / "data")
    (tmp_path / "runs/toy/final").symlink_to(tiny_run / "final")
    monkeypatch.chdir(tmp_path)
    export(ExportConfig(Path("runs/images"), num=1, split="heldout"))
    plain, *ours = (part.split("```")[0] for part in (REPO / "README.md").read_text("utf-8").split("```python\n")[1:])
    assert plain.count("\n") == 10 and not re.search("^(from|import) (data|grpo|reward)", plain, re.MULTILINE)
    assert len(ours) == 2 and all(block.count("\n") < 10 for block in ours)
    names = {}
    capsys.readouterr()
    for block in (plain, *ours):
        exec(block, names)
    plain_caption, our_caption, reward = capsys.readouterr().out.splitlines()
    assert plain_caption == our_caption and len(our_caption.split()) > 5 and reward == "tensor([1.])"


def test_the_lines_of_python_on_a_table_of_questions_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "photos/a.png")
    table = "image,question,a,b,c,d,answer\na.png,How many?,two,three,,,B\na.png,Which color?,red,blue,green,pink,C\n"
    (tmp_path / "questions.csv").write_text(table, encoding="utf-8-sig")
    exec((REPO / "docs/data.md").read_text("utf-8").split("```python\n")[1].split("```")[0], {})
    [example] = load_examples("photos")
    assert example.id == "a.png" and [len(question.choices) for question in example.questions] == [2, 4]
    assert [question.choices[question.answer_index] for question in example.questions] == ["three", "green"]


LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
"""(path, heading) of a link to a file of ours."""


def anchors(page: Path) -> set[str]:
    """What links call the page's headings."""
    headings = re.findall(r"^#+ (.+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for path, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not heading or heading in anchors(target), (path, heading)


def test_commands_of_the_hub_have_flags_that_it_knows():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = set(re.findall(r"hf (download|upload) ([^`\n#]*)", text))
    assert {name for name, _ in commands} == {"download", "upload"}
    for name, words in commands:
        said = subprocess.run([Path(sys.executable).with_name("hf"), name, "--help"], capture_output=True, text=True).stdout
        assert set(re.findall(r"--[a-z-]+", words)) <= set(re.findall(r"--[a-z-]+", said))


def test_every_file_has_a_phrase():
    text = (REPO / "docs/files.md").read_text(encoding="utf-8")
    files = [path for folder in ("grpo", "reward", "tools", "data") for path in sorted((REPO / folder).glob("*.py"))]
    assert [path.name for path in files if path.name not in text] == []


# -------------------------------------------------------------------------------------------- forks


FILE = re.compile(r"^--- ", re.MULTILINE)
"""Before the name of each file in a diff."""
HUNK = re.compile(r"^@@\n", re.MULTILINE)
"""Between two changes of one file."""


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind in docs/fork.md."""
    page = (REPO / "docs/fork.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in page.split(f"```{kind}\n")[1:]]


def side(hunk: str, sign: str) -> str:
    """The text of a change before it ("-") or after it ("+")."""
    return "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in f" {sign}")


def change(root: Path, diff: str) -> None:
    """Replaces what stands in each hunk; it must stand in the file once, unless its new text does."""
    for part in FILE.split(diff)[1:]:
        name, hunks = part.split("\n", 1)
        text = (root / name).read_text(encoding="utf-8")
        for hunk in HUNK.split(hunks):
            old, new = side(hunk, "-"), side(hunk, "+")
            if new in text:  # applied by a reader
                continue
            assert text.count(old) == 1, f"docs/fork.md: {name} has {text.count(old)} times\n{old}"
            text = text.replace(old, new)
        (root / name).write_text(text, encoding="utf-8")


HAND = """
import json, sys, torch
from PIL import Image
from data.examples import Example, Question
from grpo.advantage import rank_advantages
from data.program import run_program
from grpo.recipes import toy_config
from reward.priced import priced_rewards
from reward.recall import recall_rewards
from reward.step import load_reward
import train

example = Example("a", Image.new("RGB", (4, 4)), tuple(Question("What?", (a, "no"), 0) for a in ("Red", "star", "left", "two")))
result = recall_rewards(["A red STAR.", "", "two left red stars"], [example] * 3, ["k"] * 3, [1, 1, 1])
assert result.rewards.tolist() == [0.5, 0.0, 1.0] and result.stats["failed_share"] == 0
nan = float("nan")
priced = load_reward(toy_config(), torch.device("cpu")).score(["Red.", "A red star."], [example] * 2, ["k"] * 2, [1, 3])
assert torch.allclose(priced.parts["words"], torch.tensor([-0.002, -0.006]))  # one word, three words
assert torch.equal(priced.rewards, priced.parts["accuracy"] + priced.parts["words"])
assert priced.weights == {"words": 0.002}
got = rank_advantages(torch.tensor([0.0, 0.5, 1.0, 0.5, 0.3, nan, 0.3, 0.9]), 4)
want = torch.tensor([-1, 0, 1, 0, -1 / 3, 0, -1 / 3, 2 / 3])  # beats less beaten, of three siblings
assert torch.allclose(got, want), got
run_program(train.main, sys.argv[1:])
rows = [json.loads(line) for line in open("runs/recall/rollouts/step_000000.jsonl")]
assert all(row["parts"] == {"recall": row["reward"]} for row in rows)
groups = torch.tensor([row["reward"] for row in rows])
assert torch.allclose(torch.tensor([row["advantage"] for row in rows]), rank_advantages(groups, 3))
assert "reward_recall" in open("runs/recall/metrics.jsonl").read()
assert "reward and its parts" in open("runs/recall/report.html").read()
"""


def test_the_forks_of_the_docs_work(tmp_path):
    for name in ("grpo", "reward", "tools"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "train.py", tmp_path)
    for name in ("data", "docs"):
        (tmp_path / name).symlink_to(REPO / name)
    priced, recall, advantage = blocks("python")
    assert len(recall.split("def recall_rewards")[1].splitlines()) <= 20
    assert max(map(len, f"{priced}{recall}{advantage}".splitlines())) <= 100  # as `make lint` wants it
    for _ in range(2):  # the second time as where a reader has applied the page: nothing changes
        (tmp_path / "reward/priced.py").write_text(priced)
        (tmp_path / "reward/recall.py").write_text(recall)
        with (tmp_path / "grpo/advantage.py").open("a") as file:
            file.write(f"\n\n{advantage}")
        for diff in blocks("diff"):
            change(tmp_path, diff)
    [_, (_, command)] = written_for("fork")  # the second asks no model
    arguments = shlex.split(command)[2:] + shlex.split(SMALLEST["train.py"]) + ["--group-size", "3"]
    result = subprocess.run(
        [sys.executable, "-c", HAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]


ENDING = re.compile(r"`(\.[a-z0-9]+)`")


def test_every_ending_of_a_picture_is_documented():
    table = (REPO / "docs/formats.md").read_text(encoding="utf-8").partition("### Pictures")[2].partition("###")[0]
    assert set(ENDING.findall(table)) == IMAGE_SUFFIXES
