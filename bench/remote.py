"""Questions a second of a verifier behind HTTP, beside the same verifier in this process.

    python bench/remote.py

The server is bench/serve.py, a process with one thread. It runs waiting questions in one batch, and
reads each prompt whole. In this process a caption's questions share what is read before them.
Prints the median over interleaved repeats and the ratio to this process.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reward.remote
from data.toy.world import make_scene, scene_questions, write_caption
from grpo.config import RewardConfig
from reward.caprl import ask, load_verifier


@dataclass(frozen=True)
class BenchConfig:
    """Sizes of the measurement."""

    verifier: str = "data/toy/verifier"
    captions: int = 24
    questions: int = 4
    in_flight: tuple[int, ...] = (1, 8, 64)
    repeats: int = 3


def main(config: BenchConfig) -> None:
    torch.set_num_threads(1)
    scenes = [make_scene("train", index) for index in range(config.captions)]
    settings = RewardConfig(num_questions=config.questions)
    asked = [ask(scene_questions(scene), settings, scene.id) for scene in scenes]
    captions = [write_caption(scene.family, scene.facts) for scene in scenes]
    names = [scene.id for scene in scenes]
    command = [sys.executable, "bench/serve.py", config.verifier, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        there = load_verifier(server.stdout.readline().strip(), torch.device("cpu"))
        here = load_verifier(config.verifier, torch.device("cpu"))
        seconds: dict[int, list[float]] = {number: [] for number in (0, *config.in_flight)}
        for _ in range(config.repeats):
            for number, times in seconds.items():  # interleaved: other work meets all alike
                reward.remote.IN_FLIGHT = number
                started = time.perf_counter()
                answers = (there if number else here)(captions, asked, names)
                times.append(time.perf_counter() - started)
                assert not any(answer.failure for group in answers for answer in group)
    finally:
        server.kill()
    speeds = {number: config.captions * config.questions / statistics.median(times)
              for number, times in seconds.items()}
    print(f"{config.captions} captions, {config.questions} questions on each\n"
          "| verifier | questions a second | ratio |\n| --- | ---: | ---: |")
    for number, speed in speeds.items():
        name = f"behind HTTP, {number} in flight" if number else "in this process"
        print(f"| {name} | {speed:.1f} | {speed / speeds[0]:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
