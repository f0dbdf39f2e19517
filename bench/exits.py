"""How two gloo ranks end: exit codes of many runs that end well, with a sentence, or by a signal.

    python bench/exits.py --ends 300 --load 4      # beside four processes that only compute

Each end is a run of the toy preset on two ranks, forked from this process to save the imports. A
good end has code 0, bad input 2, a stop by SIGTERM 143. Sentences: a setting that no rank takes,
and a picture that one rank cannot open. A rank that gloo's threads bring down has -6 (SIGABRT).
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data.images
import grpo.sharding  # noqa: F401  as the next two: loaded before the forks
import tools.records
import tools.settings  # noqa: F401
import train
from data.program import run_program
from grpo.recipes import toy_config

TINY = dict(data="toy:train:4", num_steps=1, prompts_per_step=2, group_size=2, max_new_tokens=8,
            probe_images=2, audit_every=0, save_every=1)
KINDS = {
    "good": (0, {}),
    "a setting": (2, {"prompts_per_step": 3}),
    "a picture": (2, {}),
    "a stop": (128 + signal.SIGTERM, {"num_steps": 10_000, "save_every": 0}),
}
"""kind of end -> (exit code, settings)"""


@dataclass(frozen=True)
class ExitConfig:
    """Settings of the measurement."""

    ends: int = 300
    """Ends of two ranks, all kinds in turn."""
    load: int = 0
    """Processes beside them that only compute."""
    brittle: bool = False
    """Every rank that takes its interpreter down is aborted: one end tells what otherwise one of
    fifty does."""


class Brittle:
    """Stands for gloo's threads: who takes the interpreter down while they live may be aborted."""

    def __del__(self):
        os.abort()


def one_rank(number: int, kind: str, run_dir: Path, port: int, is_brittle: bool) -> None:
    """What a child process does; it ends in `run_program`, or by taking the interpreter down."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = os.open(run_dir.parent / f"rank-{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if is_brittle:
        sys.modules["brittle"] = Brittle()
    if kind == "a picture" and number == 1:
        def open_image(image):
            raise ValueError("no picture")

        data.images.open_image = open_image
    config = toy_config(run_dir=str(run_dir), **TINY | KINDS[kind][1])
    run_program(lambda _: train.train(config), [])
    sys.exit(0)


def end_ranks(kind: str, is_brittle: bool) -> tuple[list[int], str]:
    """Exit codes of both ranks, -N for those that signal N killed, and what they said."""
    folder = Path(tempfile.mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            one_rank(number, kind, folder / "run", port, is_brittle)
    if kind == "a stop":
        while not (metrics := folder / "run/metrics.jsonl").exists() or not metrics.stat().st_size:
            time.sleep(0.01)
        for delay in (0, 0.3):  # a scheduler's signal, and the same one passed on by torchrun
            time.sleep(delay)
            for child in children:
                os.kill(child, signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = "".join((folder / f"rank-{number}.txt").read_text() for number in range(2))
    shutil.rmtree(folder)
    return codes, said


def compute_for_ever() -> None:
    while True:
        pass


def measure(config: ExitConfig) -> dict[str, Counter]:
    """kind of end -> exit code of a rank -> how often."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    beside = [fork.Process(target=compute_for_ever, daemon=True) for _ in range(config.load)]
    for process in beside:
        process.start()
    counts = {kind: Counter() for kind in KINDS}
    for place in range(config.ends):
        kind = list(KINDS)[place % len(KINDS)]
        codes, said = end_ranks(kind, config.brittle)
        counts[kind].update(codes)
        if set(codes) != {KINDS[kind][0]}:
            print(f"{kind}: expected {KINDS[kind][0]}, got {codes}\n{said[-2000:]}", flush=True)
    for process in beside:
        process.kill()
    return counts


def main(config: ExitConfig) -> None:
    started = time.monotonic()
    for kind, counted in measure(config).items():
        print(f"{kind}: expected {KINDS[kind][0]}, got {dict(counted)}")
    print(f"{config.ends} ends of two ranks, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(ExitConfig))
