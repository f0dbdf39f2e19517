"""The benches run, at their tiniest: what they print is a measurement, not a test."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import tyro
from conftest import Forked, run_as_program

import evaluate
from bench import caption, claims, curation, gpu, loading, memory, paper, remote, reward_noise, verifier
from bench.drafts import DraftConfig, count_steps
from bench.drafts import main as drafts
from bench.figure import points_svg
from bench.gpu import training_work
from bench.paper import PaperConfig
from bench.step import StepConfig, measure
from bench.studies import STUDIES, Study
from caption import CaptionConfig
from data.curate.filter import FilterConfig
from data.jsonl import read_log
from data.toy.build import BuildConfig
from data.toy.captioner import TeachConfig
from data.toy.flawed_judge import JudgeConfig
from data.toy.pretrain import PretrainConfig
from data.toy.world import make_scene, perturb, toy_example, write_caption
from grpo.recipes import parse_train_config
from reward.claims import claims_of
from tools.stats import bootstrap_interval


def test_the_worker_of_step_takes_its_turns(tmp_path):
    """Ours alone, so that TRL need not be installed: a warm-up and one step, every phase measured."""
    config = StepConfig(vocab=1024, hidden=64, layers=1, verifier_hidden=64, verifier_layers=1, sizes=(56,), prompts=1,
                        group_size=2, tokens=8, questions=1, engines=("ours",), repeats=1)
    (first, second), = measure(config, tmp_path).values()
    assert all(
        second["seconds"][phase] > 0
        for phase in ("rollout", "verifier", "reference pass", "forward + backward")
    )
    assert second["seconds"]["whole step"] >= sum(second["seconds"].values()) / 2 and first["memory"]["rollout"] >= 0
    assert json.loads(json.dumps(second)) == second


def test_step_shows_the_log_of_a_worker_that_has_ended(tmp_path, monkeypatch):
    """As where TRL is not installed. It ended in a BrokenPipeError, and the log was lost."""
    start = subprocess.Popen

    def start_and_wait(command, **pipes):
        worker = start(["sh", "-c", "echo no TRL here >&2; exit 1"], **pipes)
        worker.wait()
        return worker

    monkeypatch.setattr("bench.step.save_models", lambda *arguments: None)
    monkeypatch.setattr(subprocess, "Popen", start_and_wait)
    with pytest.raises(RuntimeError, match="trl ended early:\nno TRL here"):
        measure(StepConfig(engines=("trl",)), tmp_path)


def test_claims_are_timed_beside_answers(capsys):
    claims.main(claims.ClaimsCost(hidden=64, layers=1, sizes=(56,), prompts=1, group_size=2, tokens=40, repeats=1))
    said = capsys.readouterr().out
    assert "2 captions of 40 tokens, 4 claims and 4 questions each" in said
    assert re.findall(r"^\| (\w+, \w+) \| [\d.]+ \|$", said, re.MULTILINE) == [
        "accuracy, sample", "accuracy, logits", "correctness, yes", "correctness, likelihood"]
    own, shared = (claims.make_captions(claims.ClaimsCost(shared=shared, prompts=1)) for shared in (False, True))
    assert [len(claims_of(caption)) for caption in own + shared] == [4] * 16 and len(set(own)) == 8 and len(set(shared)) == 1


def test_gpu_runs_small_on_a_cpu(monkeypatch):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "bench/gpu.py", "--smoke"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"decoding: \d+ tokens/s, \d+% of the \d+ that bandwidth allows", done.stdout)
    assert re.search(r"forward \+ backward: [\d.]+ TFLOP/s, \d+% of the product's", done.stdout)
    stages = re.findall(r"^## (\w+): at most \d+ s$", done.stdout, re.MULTILINE)
    assert stages == [function.__name__ for function in gpu.STAGES]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a GPU, found none"):
        gpu.main(gpu.GpuConfig())


def test_a_stage_that_fails_costs_only_itself(monkeypatch, capsys):
    """Stages in processes of their own: one ends with an error, one is stopped at its limit, and
    what comes after the budget is named."""
    def crash(config, device): ...
    def slow(config, device): ...
    def fine(config, device): ...
    def late(config, device): ...

    clock, limits = [0.0], {}

    def run(command, check, timeout):
        name = command[-1]
        limits[name], clock[0] = timeout, clock[0] + 30
        if name == "crash":
            raise subprocess.CalledProcessError(-11, command)
        if name == "slow":
            raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu, "STAGES", {crash: 20, slow: 50, fine: 90, late: 40})
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu.subprocess, "run", run)
    with pytest.raises(SystemExit, match="error: failed: crash, slow, late"):
        gpu.main(gpu.GpuConfig(budget_s=90))
    assert limits == {"crash": 20, "slow": 50, "fine": 30}  # 60 of 90 seconds are spent before it
    assert "## late FAILED: TimeoutError: the budget of 90 s is spent" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected stages of .*, found .'other'."):
        gpu.main(gpu.GpuConfig(stages=("other",)))


def test_a_failure_within_one_process_costs_only_its_stage(monkeypatch, capsys):
    def crash(config, device):
        raise RuntimeError("CUDA error")

    def fine(config, device):
        print("went on with", config.heads, "heads for", config.key_heads)

    monkeypatch.setattr(gpu, "STAGES", {crash: 20, fine: 20})
    with pytest.raises(SystemExit, match="error: failed: crash"):
        gpu.main(gpu.GpuConfig(smoke=True))
    said = capsys.readouterr().out
    assert "## crash FAILED: RuntimeError: CUDA error" in said
    assert "went on with 4 heads for 2" in said  # heads share keys there too


def test_work_of_a_pass_by_hand(policy, prompts):
    """Prompt of T tokens, captions of 3 and 1: each weight of a layer meets T + 4 tokens, the head
    4, the tower each patch."""
    inner, text = policy.model.model, policy.model.config.get_text_config()
    width = len(prompts[0].input_ids)
    linear = sum(p.numel() for p in inner.language_model.layers.parameters())
    tower = sum(p.numel() for p in inner.visual.parameters())
    want = (
        6 * linear * (width + 4)
        + 6 * text.vocab_size * text.hidden_size * 4
        + 6 * tower * len(prompts[0].pixel_values)
    )
    pairs = width * width / 2 + 3 * width + 9 / 2 + width + 1 / 2
    want += 12 * pairs * text.hidden_size * text.num_hidden_layers
    rollouts = SimpleNamespace(prompts=prompts[:1], lengths=torch.tensor([3, 1]))
    assert training_work(policy, rollouts) == pytest.approx(want)


@pytest.mark.parametrize("program, settings, row", [
    (caption, dict(images=2, repeats=1), r"\| ours \| [\d.]+ \| [\d.]+ \| \d+ \| [\d.]+ \|"),
    (curation, dict(images=3), r"\| sound \| 3 \| \| [\d.]+ \| \|"),
    (loading, dict(rows=120, samples=4), r"index +[\d.]+ s for 120 images, .*"),
    (remote, dict(captions=1, questions=1, in_flight=(2,), repeats=1), r"\| behind HTTP, 2 in flight \| [\d.]+ \| [\d.]+ \|"),
    (verifier, dict(width=128, layers=1, captions=1, sentences=2, repeats=1), r"\| 8 \| [\d.]+ s \|.*"),
])
def test_a_bench_runs_small(program, settings, row, capsys):
    program.main(program.BenchConfig(**settings))
    assert re.search(f"^{row}$", capsys.readouterr().out, re.MULTILINE)


def test_memory_is_estimated_and_measured_by_phase(tmp_path, monkeypatch, capsys):
    sizes = StepConfig(vocab=1024, hidden=64, layers=1, verifier_hidden=64, verifier_layers=1, sizes=(56,), prompts=1,
                       group_size=2, tokens=8, questions=1)
    monkeypatch.setattr(memory, "CASES", {"tiny": (sizes, {})})
    memory.prepare(sizes, tmp_path)
    memory.work("tiny", tmp_path)
    found = json.loads(capsys.readouterr().out.removeprefix("case "))
    assert found["measured"].keys() <= found["estimate"].keys() and len(found["measured"]) == 3
    assert found["estimate"]["peak"] > found["estimate"]["images"] > 0


def test_drafts_run_small(capsys):
    drafts(DraftConfig(num_images=1, group_size=2, max_new_tokens=8, draft_tokens=(1,), repeats=1))
    *_, none, one = capsys.readouterr().out.splitlines()
    assert none.startswith("| 0 | 8 | 1.00 |") and re.fullmatch(r"\| 1 \| [5-8] \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", one)


def test_steps_with_drafts_by_hand():
    """5, 6 and 5 come one by one; then 5 has been seen with 6, 5 behind it, and one token more is drawn."""
    assert count_steps([[5, 6, 5, 6, 5, 6]], num_draft_tokens=2, match=1) == 4
    # 6, 5 has not been seen when it ends the text
    assert count_steps([[5, 6, 5, 6, 5, 6]], num_draft_tokens=2, match=2) == 5
    assert count_steps([[5, 6, 5, 6, 5, 6]], num_draft_tokens=0, match=1) == 6
    assert count_steps([[1] * 7], num_draft_tokens=2, match=1) == 4  # 1, 2, 4, 7: the latest draft is not the longest
    # siblings in step know no more than each other
    assert count_steps([[1, 2, 3, 4]] * 2, num_draft_tokens=2, match=1) == 4
    assert count_steps([[1, 2, 3], [7, 8, 1, 2, 3]], num_draft_tokens=1, match=1) == 4  # 2 is drafted from the first


# -------------------------------------------------------------------------------------- bench/paper.py


@pytest.fixture
def forks(monkeypatch):
    """A study's programs are forks: they need not import torch again."""

    def begin(task):
        task.log.parent.mkdir(parents=True, exist_ok=True)
        process = Forked(task.log, run_as_program, task.arguments)
        process.start()
        return process

    monkeypatch.setattr(paper, "begin", begin)


def test_a_study_runs_small_and_is_not_made_again(tmp_path, capsys, monkeypatch, forks):
    """A start is taught, trained from and evaluated, by the programs themselves."""
    config = PaperConfig("true", seeds=(0,), cells=("praising",), folder=tmp_path, checker="data/toy/policy",
                         checker_mode="likelihood", smoke=True)
    paper.main(config)
    said = capsys.readouterr().out
    header, _, row = said.splitlines()
    assert [name.strip() for name in header.split("|")[1:-1]] == ["cell", *paper_values(0)]
    name, prism, area, *_ = (cell.strip() for cell in row.split("|")[1:-1])
    assert name == "praising" and re.fullmatch(r"[01]\.\d{3} \([01]\.\d{3} to [01]\.\d{3}\)", prism)
    assert re.fullmatch(r"[01]\.\d{3}", area)
    monkeypatch.setattr(paper, "begin", None)
    paper.main(config)
    assert capsys.readouterr().out == said


def test_a_study_with_a_program_of_its_own_runs_small(tmp_path, capsys, forks):
    """Captions by the start, a model pretrained on them, what it answers from images: three products, one column."""
    paper.main(PaperConfig("data", seeds=(0,), cells=("start", "facts"), folder=tmp_path, smoke=True))
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [name.strip() for name in header.split("|")[1:-1]] == ["cell", "looking"]
    assert [row.split("|")[1].strip() for row in rows] == ["start", "facts"]
    captions, = (tmp_path / "smoke").glob("of_start-*/shard-000000.jsonl")
    assert [row["id"] for row in read_log(captions)] == [f"train-{index:06d}" for index in range(4)]
    means = set()
    for path in (tmp_path / "smoke").glob("rows-*.jsonl"):
        scores = [question["score"] for row in read_log(path) for question in row["questions"]]
        means.add(f"{sum(scores) / len(scores):.3f}")
    assert {row.split("|")[2].split()[0] for row in rows} == means


def test_what_prism_leaves_out_is_known_from_the_facts(tmp_path):
    """The card 2 of the held-out images: two of its seven facts, one mistake, and praise."""
    scene = make_scene("heldout", 2)
    (wrong,) = perturb(scene.facts[3:4], 1.0, random.Random(0))
    caption = write_caption(scene.family, [*scene.facts[:2], wrong]) + " This is a full caption."
    asked = {"id": "q", "family": "cards", "score": 1.0, "correct": True, "unparsed": False, "abstain": None, "chosen": 0}
    row = {"id": scene.id, "caption": caption, "questions": [asked]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    values = paper.values_of([paper.Task(("evaluate.py", "prism"), tmp_path / "rows.json", tmp_path / "log")])
    values = {column: images.get(scene.id) for column, images in values.items()}
    assert values["Prism"] == [1.0] and values["exact precision"] == [True, True, False]
    assert values["exact recall"] == [2 / len(scene.facts)] and values["claims"] == [4]  # "This is a card." is one, of no truth
    assert values["empty"] == [1 / 5] and values["precision"] is None and values["area"] is None
    asked = [{"id": name, "family": "cards", "score": score} for name, score in (("p", 1.0), ("q", 0.0))]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": scene.id, "caption": "", "questions": asked}) + "\n")
    looked = paper.Task(("evaluate.py", "direct"), tmp_path / "rows.json", tmp_path / "log")
    assert paper.values_of([looked]) == {"looking": {scene.id: [1.0, 0.0]}}


def test_a_run_is_known_by_what_its_settings_mean():
    """The toy preset with or without its own values is one run; a seed, a flag or another start is another."""
    def run(study, cell, seed=0):
        training, evaluation = paper.plan(PaperConfig(study), cell, seed)[-2:]
        assert evaluation.needs[-1] == training and str(training.product) in evaluation.arguments
        return training.product.parent.name

    config = "data/toy/policy"
    studies = [("groups", "G = 8"), ("sampling", "N = 4"), ("questions", "all"), ("verifier", "letters")]
    assert len({run(*study) for study in studies}) == 1
    others = [run("groups", "G = 8"), run("groups", "G = 8", seed=1), run("groups", "G = 4"), run("groups", "KL 0.1")]
    assert len(set(others)) == 4
    judged = PaperConfig("true", checker=config, checker_mode="likelihood"), PaperConfig("true", checker=config)
    plans = [paper.plan(settings, "correctness 2", 0) for settings in judged]
    assert len({task.product for tasks in plans for task in tasks}) == 4


def test_every_cell_of_every_study_is_taken_by_the_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "write_sets", lambda folder, num_images: None)
    monkeypatch.setattr(paper, "write_questions", lambda folder, num_images: None)
    known = {"prism": evaluate.PrismConfig, "claims": evaluate.ClaimsConfig, "direct": evaluate.DirectConfig,
             "data.toy.captioner": TeachConfig, "data.toy.flawed_judge": JudgeConfig, "data.toy.pretrain": PretrainConfig,
             "data.toy.build": BuildConfig, "filter": FilterConfig, "caption.py": CaptionConfig,
             "bench/reward_noise.py": reward_noise.BenchConfig}
    seen = set()
    for name, study in STUDIES.items():
        config = PaperConfig(name, folder=tmp_path, checker="data/toy/policy")
        for cell in study.cells:
            for task in paper.plan(config, cell, 3):
                assert not any("{" in word for word in task.arguments)
                program, *flags = [word for word in task.arguments if word not in ("-m", "evaluate.py", "data.curate")]
                seen.add(program)
                settings = parse_train_config(flags) if program == "train.py" else tyro.cli(known[program], args=flags)
                if program == "bench/reward_noise.py":
                    parse_train_config(["toy", *split(settings.flags)])  # the same for all seeds
                    continue
                assert settings.seed == (0 if task.product.parent.name.startswith(FIXED) else 3)
        finals = {paper.plan(config, cell, seed)[-1].product for cell in study.cells for seed in (3, 4)}
        assert len(finals) == 2 * len(study.cells)  # no two cells are one run
        measured = {cell: [paper_values(0.5, "a") | {"looking": {"a": [0.5]}, "noise": {"a": [0.5]}}]
                    for cell in study.cells}
        rows = paper.report(study, measured).split("\n\n")[1].splitlines()[2:]
        assert len(rows) == sum(chain.count(">") for chain in study.orders)  # no order names a cell that is not there
        assert set(study.paper) <= set(study.cells)
    assert seen == {"train.py", *known}


FIXED = ("praising-", "short_judge-", "long_judge-", "filtered-", "half-", "verifier")
"""Products that all seeds share."""


def paper_values(value: float, *images: str) -> dict:
    return {column: {image: [value] for image in images}
            for column in ("Prism", "area", "precision", "exact precision", "exact recall", "checker right", "claims", "words",
                           "empty")}


def test_a_study_that_was_killed_goes_on(tmp_path):
    """Two of four products are there; what one program had half written is deleted; one that fails
    costs nothing that is done."""
    def task(name: str, code: str, *needs: paper.Task) -> paper.Task:
        path = tmp_path / name
        return paper.Task(("-c", f"open({str(tmp_path / 'made')!r}, 'a').write({name!r} + ' '); {code}; "
                                 f"open({str(path)!r}, 'x')"), path, tmp_path / f"{name}.log", needs)

    first, second = task("first", "pass"), task("second", "pass")
    third = task("rows-third.json", f"open({str(tmp_path / 'rows-third.jsonl')!r}, 'x')", first)
    fourth = task("fourth", "raise SystemExit('error: no room')", third, second)
    for name in ("first", "second", "rows-third.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="fourth.log: expected fourth, found exit code 1: error: no room"):
        paper.carry_out([fourth, third, second, first, first], jobs=2)
    assert (tmp_path / "made").read_text() == "rows-third.json fourth "
    paper.carry_out([task("fourth", "pass", third, second), third, second, first], jobs=2)
    assert (tmp_path / "made").read_text() == "rows-third.json fourth fourth "


def test_programs_that_run_are_ended_with_the_study(tmp_path):
    """With what they have started: the builder trains in a process of its own."""
    pids = tmp_path / "pids"
    child = "import time; time.sleep(600)"
    slow = (f"import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
            f"open({str(pids)!r} + '.new', 'w').write(f'{{os.getpid()}} {{child.pid}}'); "
            f"os.rename({str(pids)!r} + '.new', {str(pids)!r}); time.sleep(600)")
    bad = f"import os, time\nwhile not os.path.exists({str(pids)!r}): time.sleep(0.05)\nraise SystemExit(3)"
    tasks = [paper.Task(("-c", code), tmp_path / name, tmp_path / f"{name}.log")
             for name, code in (("slow", slow), ("bad", bad))]
    with pytest.raises(ValueError, match="bad.log: expected bad, found exit code 3"):
        paper.carry_out(tasks, jobs=2)
    for pid in map(int, pids.read_text().split()):
        for _ in range(100):  # the child of an ended process is taken over, then gone
            if not os.path.exists(f"/proc/{pid}") or " Z " in Path(f"/proc/{pid}/stat").read_text():
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {pid} runs on")


def test_what_is_under_way_is_not_there_yet(tmp_path):
    """A product that exists while its program still runs is not used; a need that nobody makes is told."""
    first, second = tmp_path / "first", tmp_path / "second"
    slow = paper.Task(("-c", f"import time; open({str(first)!r}, 'w'); time.sleep(1); open({str(first)!r}, 'w').write('x')"),
                      first, tmp_path / "first.log")
    copy = paper.Task(("-c", f"open({str(second)!r}, 'w').write(open({str(first)!r}).read())"), second, tmp_path / "second.log",
                      (slow,))
    paper.carry_out([slow, copy], jobs=2)
    assert second.read_text() == "x"
    lost = paper.Task((), tmp_path / "lost", tmp_path / "lost.log")
    with pytest.raises(AssertionError, match="some task makes what the others need"):
        paper.carry_out([paper.Task((), tmp_path / "third", tmp_path / "third.log", (lost,))], jobs=2)


def test_a_run_with_other_weights_is_another_run(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    config = PaperConfig("true", checker=str(tmp_path), folder=tmp_path)
    before = [task.product for cell in ("praising", "start") for task in paper.plan(config, cell, 0)]
    config = replace(config)  # it reads the weights once
    (tmp_path / "model.safetensors").write_bytes(b"two")
    after = [task.product for cell in ("praising", "start") for task in paper.plan(config, cell, 0)]
    assert len({*before, *after}) == len(before) + len(after)


def test_sets_by_their_images_and_questions(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(paper, "toy_examples",
                        lambda source: [toy_example(make_scene("train", 0))] * int(source.split(":")[2]))
    monkeypatch.setattr(paper, "write_examples", lambda folder, examples: made.update({folder.name: examples}))
    paper.write_sets(tmp_path, None)
    assert {name: len(rows) for name, rows in made.items()} == {
        "one": 480, "two": 480, "three": 480, "leaking": 480, "many": 1440}
    one, two, three, leaking, many = (made[name][0].questions for name in ("one", "two", "three", "leaking", "many"))
    assert one == two[:1] and two == three[:2] == leaking[:2] and many[:3] == three
    assert len(one) == 1 and len(leaking) == 8 and not any(question.needs_image for question in leaking[2:])
    assert set(many) == set(toy_example(make_scene("train", 0)).questions)


def test_noise_in_a_group_by_hand(tmp_path):
    """Two groups of two in two draws: what both captions of a group gain is no noise."""
    scores = np.array([[0.0, 1.0, 0.5, 0.5], [0.5, 1.5, 1.0, 0.0]])
    relative = reward_noise.relative_to_group(scores, 2)
    assert relative.tolist() == [[-0.5, 0.5, 0.0, 0.0], [-0.5, 0.5, 0.5, -0.5]]
    settings = reward_noise.BenchConfig(images=1, group_size=3, draws=3, flags="--num-questions 1", out=tmp_path / "noise.json")
    reward_noise.main(settings)
    noise = json.loads(settings.out.read_text())
    assert list(noise) == ["heldout-000000"] and len(noise["heldout-000000"]) == 3 and max(noise["heldout-000000"]) > 0
    number = len(toy_example(make_scene("heldout", 0)).questions)
    reward_noise.main(replace(settings, flags=f"--num-shuffles 0 --num-questions {number}"))
    # all questions, each as it is written: nothing is drawn
    assert json.loads(settings.out.read_text()) == {"heldout-000000": [0.0] * 3}
    settings.out.write_text(json.dumps(noise))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "heldout-000000", "caption": "", "questions": []}) + "\n")
    measured = paper.Task(("bench/reward_noise.py",), settings.out, tmp_path / "log")
    evaluated = paper.Task(("evaluate.py", "prism"), tmp_path / "rows.json", tmp_path / "log")
    assert paper.values_of([measured, evaluated])["noise"] == noise


def test_intervals_over_seeds_and_images_by_hand():
    """One image: seeds of 0.1, 0.2 and 0.3 deviate by 0.1, and t with 2 degrees is 4.303."""
    half = 4.303 * 0.1 / math.sqrt(3)
    seeds = [{"a": [0.1, 0.1]}, {"a": [0.2]}, {"a": [0.3]}]
    assert paper.over_seeds(seeds) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    # equal seeds: what is left is the bootstrap over images, of all their values
    images = {str(n): [float(n % 2)] for n in range(100)}
    low, high = bootstrap_interval(images.values())
    assert paper.over_seeds([images] * 3) == paper.over_seeds([images]) == (0.5, low, high)
    # both: the root of the squares. Seeds 0.5 and 0.7: deviation 0.2 / sqrt(2), t with 1 degree 12.706
    higher = {name: [value + 0.2 for value in values] for name, values in images.items()}
    across = 12.706 * 0.1
    want = (0.6, 0.6 - math.hypot(0.5 - low, across), 0.6 + math.hypot(high - 0.5, across))
    assert paper.over_seeds([images, higher]) == pytest.approx(want, abs=1e-9)
    assert all(map(math.isnan, paper.over_seeds([images, {}])))  # not measured: no zero
    middle, *ends = paper.over_seeds([{"all": [0.4]}])  # a single number
    assert middle == 0.4 and all(map(math.isnan, ends))
    assert [paper.verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (math.nan, math.nan))] == [
        "yes", "reversed", "open", ""]


def test_orders_are_of_paired_differences():
    """Images differ by far more than the cells. Of the same images the difference is sure."""
    study = Study({"a": "", "b": "", "c": ""}, ("Prism: a > b > c", "empty: c > a"),
                        paper={"a": 48.4, "b": 47.3})

    def seeds(shift: float) -> list[dict]:
        return [{column: {str(n): [n / 50 + shift + seed / 100] for n in range(50)} if column in ("Prism", "empty") else {}
                 for column in paper_values(0)} for seed in range(3)]

    measured = {"a": seeds(0.01), "b": seeds(0.0), "c": seeds(0.0)}
    measured["c"][2]["Prism"]["0"] = [0.5]  # one image of one seed
    cells, orders = paper.report(study, measured).split("\n\n")
    assert "| a | 48.4 | 0.510 (0." in cells and "area" not in cells
    _, _, first, second, third = orders.splitlines()
    assert first == "| a > b | Prism | +1.1 | +0.010 (+0.010 to +0.010) | yes |"
    assert second.startswith("| b > c | Prism |  | -0.003 (") and second.endswith("| open |")
    assert third == "| c > a | empty |  | -0.010 (-0.010 to -0.010) | reversed |"


def test_area_under_a_curve_by_hand():
    """0.5 to 0.7 over 10 steps, 0.7 to 0.8 over 30: (0.6 * 10 + 0.75 * 30) / 40."""
    curve = [{"step": step, "accuracy": value} for step, value in ((0, 0.5), (10, 0.7), (40, 0.8))]
    assert paper.area_under(curve) == pytest.approx((6 + 22.5) / 40)


def test_no_area_where_another_verifier_has_measured_it(tmp_path):
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"step": step, "accuracy": 0.5}) + "\n" for step in (0, 10)))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "train-000000", "caption": "", "questions": []}) + "\n")
    evaluation = paper.Task(("evaluate.py", "prism"), tmp_path / "rows.json", tmp_path / "log")
    runs = [paper.Task(("train.py", *flags), tmp_path / "final", tmp_path / "log") for flags in ((), ("--verifier", "x"))]
    areas = [paper.values_of([run, evaluation])["area"] for run in runs]
    assert areas == [{"all": [0.5]}, {}]


@pytest.mark.parametrize("settings, sentence", [
    (dict(seeds=()), "seeds: expected different ones, at least one, got \\(\\)"),
    (dict(seeds=(1, 1)), "seeds: expected different ones"),
    (dict(cells=("N = 3",)), "cells: expected some of .*, got .'N = 3'."),
    (dict(jobs=0), "jobs 0: expected at least 1"),
    (dict(study="true", checker="no/where"), "checker: expected the folder of a model, found none at no/where"),
])
def test_settings_of_a_study_are_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        paper.main(PaperConfig(**{"study": "sampling"} | settings))


def test_a_figure_by_hand():
    """Two rows, from 0.5 to 0.7 on 210 pixels: a mean of 0.6 is in the middle. What was not measured has no point."""
    seeds = {"start": [{"Prism": {"a": [0.5], "b": [0.5]}}], "a < b": [{"Prism": {"a": [0.7], "b": [0.7]}, "looking": {}}]}
    assert paper.intervals(seeds) == {"start": {"Prism": (0.5, 0.5, 0.5)}, "a < b": {"Prism": (0.7, 0.7, 0.7)}}
    svg = points_svg({"start": {"Prism": (0.5, 0.5, 0.6)}, "a < b": {"Prism": (0.6, 0.55, 0.7), "looking": (0.3, 0.2, 0.4)}})
    root = ElementTree.fromstring(svg)
    kind = "{http://www.w3.org/2000/svg}"
    assert [(point.get("cx"), point.get("cy")) for point in root.iter(f"{kind}circle")] == [
        ("250.0", "44"), ("355.0", "66"), ("605.0", "66")]
    assert [line.get("d") for line in root.iter(f"{kind}path")] == [
        "M250 78h210", "M250.0 44H355.0", "M302.5 66H460.0", "M500 78h210", "M500.0 66H710.0"]
    assert [text.text for text in root.iter(f"{kind}text")] == [
        "start", "a < b", "Prism", "0.50", "0.70", "looking", "0.20", "0.40"]
