"""README and docs say what is true: their commands are taken by the programs, those that can run here run, forks work."""

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
from torch.distributed.run import parse_args

from data.images import IMAGE_SUFFIXES

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
LAUNCHED = [path for path in sorted(REPO.rglob("*.py")) if not {".venv", "tests", "runs"} & set(path.relative_to(REPO).parts)]

SMALLEST = {
    "train.py": "--num-steps 1 --data toy:train:4 --prompts-per-step 2 --group-size 2 --probe-images 2 --max-new-tokens 40",
    "caption.py": "--max-new-tokens 20",
    "evaluate.py prism": "--data toy:heldout:2 --num-captions 1 --max-new-tokens 40",
    "data.toy.export": "--num 2",
    "tools.report": "",
    "reward.caprl audit": "",
    "reward.caprl replay": "--verifier data/toy/verifier",
}
"""How each program runs in a second: flags after which nothing else changes."""
NOT_RUN = {
    "torchrun": "needs several GPUs", "bench/": "takes minutes", "data.toy.build": "takes an hour", "venv": "needs a network",
    "data.toy.writer": "takes half an hour", "runs/writer": "needs what data.toy.writer makes",
    "runs/loose": "needs what it writes and data.curate keeps",
    "runs/demo/": "needs what the demo makes", "captions oracle": "needs a file of captions",
    "data.toy.demo": "takes minutes; test_programs.py runs it small", "make": "makes an environment, or runs all tests",
}
"""What is only read, with the reason; the flags must be the program's all the same."""
FORKED = "--reward recall"
HUB = re.compile(r"Qwen/|\bqa\.jsonl|caprl|CapRL")
"""Models and data of the hub, and what was made of them."""
OF_ONES_OWN = re.compile(
    r"(?<![\w/-])(?:RUN_DIR|[A-Z]*DIR|FOLDER|RECORDS|NAME|HOST|N|OTHER\w*|SOURCE|IMAGES|photos|some/folder|part_0\.jsonl)(?![\w-])"
)


def commands_of_page(path: Path) -> list[str]:
    """Lines of code blocks and code in sentences that call a program."""
    found, text = [], re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))  # commands over two lines
    is_command = re.compile(r"(?:\S+=\S+ )*(?:python3?|torchrun|make|\.venv/bin/\w+) ")
    for line in text.splitlines():
        code = [line.strip()] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        found += [one.split("  #")[0].strip() for one in code if is_command.match(one)]
    fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found + [line for block in fenced for line in block.splitlines() if is_command.match(line)]


def commands_of_module(path: Path) -> list[str]:
    docstring = re.match(r'\s*"""(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL)
    lines = re.sub(r"\\\\\n\s*", "", docstring[1]).splitlines() if docstring else []
    return [line.split("  #")[0].strip() for line in lines if re.match(r"    (?:python|torchrun) ", line)]


def written() -> list[tuple[str, str]]:
    """(file, command), each command once."""
    found = [(path, commands_of_page(path)) for path in PAGES] + [(path, commands_of_module(path)) for path in LAUNCHED]
    first = {command: str(path.relative_to(REPO)) for path, commands in reversed(found) for command in reversed(commands)}
    return [(place, command) for path in [str(path.relative_to(REPO)) for path, _ in found]
            for command, place in reversed(first.items()) if place == path]


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
    return next((key for key in SMALLEST if key == program or key == " ".join([program, *arguments[:1]])), "")


def reason_not_to_run(command: str) -> str:
    if reason := next((reason for word, reason in NOT_RUN.items() if re.search(rf"(?:^|[\s-]){re.escape(word)}", command)), ""):
        return reason
    if command.endswith("--help"):
        return ""
    if FORKED in command:
        return "of a fork; test_the_forks_of_the_docs_work runs it"
    program, arguments = program_of(shlex.split(command))
    if HUB.search(" ".join(arguments)) or (program == "train.py" and arguments[:1] != ["toy"]):
        return "needs models or data of the hub"
    return "has a name of one's own in it" if OF_ONES_OWN.search(command) else ""


def is_mention(arguments: list[str]) -> bool:
    """`python -m reward.caprl replay` in a sentence names a program and shows no call of it."""
    return not arguments or (len(arguments) == 1 and re.fullmatch(r"[a-z]+", arguments[0]) is not None)


def test_pages_and_programs_have_commands():
    found = [command for _, command in written()]
    assert len(found) == len(set(found)) > 30
    assert {"python train.py toy --run-dir runs/toy", "make demo", "python -m tools.report runs/toy runs/other"} <= set(found)
    assert len([command for command in found if not reason_not_to_run(command)]) >= 10


@pytest.mark.parametrize("place, command", [one for one in written() if FORKED not in one[1]])
def test_programs_take_the_flags_of_every_command(place, command, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    words = shlex.split(command.split(" > ")[0])
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[1:3] == ["-m", "venv"]:
        return
    if words[1] == "-c":
        exec(compile(words[2], place, "exec"), {})
        return
    for owner, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict"), (tyro.extras, "overridable_config_cli")):
        monkeypatch.setattr(owner, name, partial(parse_only, getattr(owner, name)))
    program, arguments = program_of(words)
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
    for place, command in written():
        if place.endswith(".py") or reason_not_to_run(command) or command.startswith("python -c") or command.endswith("--help"):
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


# ------------------------------------------------------------------------------------------------------------------- forks


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (REPO / "docs/fork.md").read_text(encoding="utf-8"), re.DOTALL)


def change(root: Path, diff: str) -> None:
    """Replaces what stands in each hunk; it must stand in the file once."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, hunks = part.split("\n", 1)
        text = (root / name).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
            old, new = ("".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in f" {sign}") for sign in "-+")
            assert text.count(old) == 1, f"docs/fork.md: {name} has {text.count(old)} times\n{old}"
            text = text.replace(old, new)
        (root / name).write_text(text, encoding="utf-8")


HAND = """
import json, sys, torch
from PIL import Image
from data.examples import Example, Question
from grpo.advantage import rank_advantages
from data.program import run_program
from reward.recall import recall_rewards
import train

example = Example("a", Image.new("RGB", (4, 4)), tuple(Question("What?", (a, "no"), 0) for a in ("Red", "star", "left", "two")))
result = recall_rewards(["A red STAR.", "", "two left red stars"], [example] * 3, ["k"] * 3, [1, 1, 1])
assert result.rewards.tolist() == [0.5, 0.0, 1.0] and result.stats["failed_share"] == 0
nan = float("nan")
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
    (tmp_path / "data").symlink_to(REPO / "data")
    reward, advantage = blocks("python")
    assert len(reward.split("def recall_rewards")[1].splitlines()) <= 20
    (tmp_path / "reward/recall.py").write_text(reward)
    with (tmp_path / "grpo/advantage.py").open("a") as file:
        file.write(f"\n\n{advantage}")
    for diff in blocks("diff"):
        change(tmp_path, diff)
    [command] = [one for one in commands_of_page(REPO / "docs/fork.md") if FORKED in one]
    arguments = shlex.split(command)[2:] + shlex.split(SMALLEST["train.py"]) + ["--group-size", "3"]
    result = subprocess.run([sys.executable, "-c", HAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


def test_every_ending_of_a_picture_is_documented():
    table = (REPO / "docs/formats.md").read_text(encoding="utf-8").partition("### Pictures")[2].partition("###")[0]
    assert set(re.findall(r"`(\.[a-z0-9]+)`", table)) == IMAGE_SUFFIXES
