"""Two and four gloo ranks on one CPU against one process: same gradients, same captions, and nothing hangs."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import all_ranks, shallow
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data.images
import evaluate
import grpo.checkpoint
import grpo.run
import grpo.run_dir
import tools.prism
import train
from data.io import naming
from data.jsonl import read_log
from data.program import run_program
from grpo import sharding
from grpo.config import LoraConfig
from grpo.distributed import (
    Phases,
    all_or_none,
    deal,
    gather_rows,
    init_distributed,
    local_device,
    print0,
    rank,
    sum_across_ranks,
    world_size,
)
from grpo.logprobs import CompletionScorer
from grpo.lora import adapters, add_adapters_, save_adapter
from grpo.pretrained import load_policy, weights_hash
from grpo.recipes import toy_config
from grpo.rollout import sample_rollouts
from grpo.run import load_run
from grpo.sharding import copy_weights_
from grpo.update import update_policy
from tools.check import check_policy

PROMPTS, GROUP = 4, 3


def whole_batch(policy):
    """Rollouts of different lengths, advantages and one caption without a reward: the same on every rank."""
    from data.toy.world import draw, make_scene

    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(PROMPTS)]
    keys = [f"{p}:{g}" for p in range(PROMPTS) for g in range(GROUP)]
    rollouts = sample_rollouts(policy, prompts, keys, 64)
    advantages = torch.randn(PROMPTS * GROUP, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(PROMPTS * GROUP, dtype=torch.bool)
    valid[4] = False
    return rollouts, advantages, valid


def step_on_rank(out: Path, policy: str, replicas: int, freeze: str) -> None:
    """What each rank does: one SGD step on its share of the batch; rank 0 saves metrics, gradient and sampler."""
    device = init_distributed()
    config = toy_config(policy=policy, group_size=GROUP, max_grad_norm=0.5, micro_batch_tokens=1, replicas=replicas,
                        freeze=freeze)
    meshes, make = [], sharding.init_device_mesh
    sharding.init_device_mesh = lambda *args, **kwargs: meshes.append(make(*args, **kwargs)) or meshes[-1]
    run = load_run(config, device)
    sampler, scorer = run.sampler, run.scorer
    rollouts, advantages, valid = whole_batch(sampler)
    share = PROMPTS // world_size()
    rows = slice(rank() * share * GROUP, (rank() + 1) * share * GROUP)
    mine = rollouts.groups(rank() * share, (rank() + 1) * share)
    before = {name: p.detach().clone() for name, p in sampler.model.named_parameters()}
    weights = weights_hash(sampler.model)
    metrics = update_policy(
        scorer, run.reference, torch.optim.SGD(scorer.parameters(), lr=0.1), mine, advantages[rows], valid[rows], config
    )
    copy_weights_(scorer, sampler.model)
    change = {name: p.detach() - before[name] for name, p in sampler.model.named_parameters()}
    logprobs, _ = scorer(mine)
    with torch.no_grad():
        sampled, _ = CompletionScorer(sampler.model, sampler.forbidden_ids)(mine)
    gap = sum_across_ranks({"gap": (logprobs - sampled).abs().max().item()})["gap"]
    check_policy(mine, scorer, sampler.forbidden_ids)
    # after a forward alone too
    sharded = all(isinstance(p, DTensor) for model in (scorer, run.reference) for p in model.parameters())
    ranks = gather_rows([rank()])
    if rank() == 0:
        torch.save({"metrics": metrics, "change": change, "gap": gap, "sharded": sharded, "ranks": ranks,
                    "meshes": len(meshes), "weights": weights}, out)


RANKS = {
    "one": (1, 1, "none"), "two": (2, 1, "none"), "four": (4, 1, "none"), "two times two": (4, 2, "none"),
    "one, frozen": (1, 1, "vision"), "two, frozen": (2, 1, "vision"),
    "one, of an adapter": (1, 1, "none"), "two, of an adapter": (2, 1, "none"),
}
"""Ranks; replicas, groups of ranks over each of which the weights are sharded; what is not trained."""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    policy = shallow("data/toy/policy", folder / "policy", num_layers=2)
    adapted = load_policy(policy, torch.device("cpu"), "auto").model
    assert adapted.dtype == torch.bfloat16  # a sum with an adapter is rounded in it
    add_adapters_(adapted, LoraConfig(lora_rank=2), "none", seed=0)
    for layer in adapters(adapted).values():
        layer.lora_b.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    save_adapter(adapted, folder / "adapter")
    for name, (num_ranks, *kind) in RANKS.items():
        path = str(folder / "adapter") if "adapter" in name else policy
        all_ranks(folder, num_ranks, step_on_rank, folder / f"{name}.pt", path, *kind)
    return {name: torch.load(folder / f"{name}.pt") for name in RANKS}


@pytest.mark.parametrize("name", ["two", "four", "two times two"])
def test_ranks_take_the_step_of_one(steps, name):
    one, more = steps["one"], steps[name]
    assert more["sharded"] and more["meshes"] == 1 and more["ranks"] == list(range(RANKS[name][0]))
    assert more["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    for key, change in one["change"].items():
        assert change.abs().max() > 0, key
        assert torch.allclose(more["change"][key], change, rtol=1e-3, atol=2e-8 + 1e-3 * change.abs().max().item()), key


def test_ranks_begin_with_the_weights_of_one(steps):
    """An adapter is merged into its base: the sum must not be rounded on some numbers of ranks only."""
    one, two = steps["one, of an adapter"], steps["two, of an adapter"]
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert two["weights"] == one["weights"]


def test_ranks_leave_the_frozen_tower_alone(steps):
    """A block with frozen weights has nothing to reduce; the merger behind it still takes the step of one rank."""
    one, two = steps["one, frozen"], steps["two, frozen"]
    assert two["sharded"] and two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    for key, change in one["change"].items():
        is_frozen = "visual" in key and "visual.merger" not in key
        assert (change.abs().max() == 0) == is_frozen and (not is_frozen or (two["change"][key] == 0).all()), key
        assert torch.allclose(two["change"][key], change, rtol=1e-3, atol=2e-8 + 1e-3 * change.abs().max().item()), key


def test_the_new_weights_reach_the_sampler(steps):
    assert all(result["gap"] < 1e-5 for result in steps.values())


def test_images_are_dealt_evenly_and_all_of_them():
    assert deal([5, 1, 1, 5], 2) == [[0, 1], [2, 3]]  # by hand: 5 to each, then 1 to each
    assert deal([9, 1, 2, 3, 4, 1], 2) == [[0, 1, 5], [2, 3, 4]]  # 9 and 4; 3 and 2 to the second, which is full then
    rng = random.Random(0)
    for num_ranks in (1, 2, 4, 8):
        sizes = [rng.randint(16, 1280) for _ in range(64)]
        dealt = deal(sizes, num_ranks)
        assert sorted(place for one in dealt for place in one) == list(range(64))
        assert {len(one) for one in dealt} == {64 // num_ranks}
        sums = [sum(sizes[place] for place in one) for one in dealt]
        assert max(sums) <= 1.05 * sum(sizes) / num_ranks


def test_a_run_on_two_ranks_is_the_run_on_one(tmp_path):
    """Every caption is drawn as its image's, whichever rank it is on: nothing shared, nothing lost.

    train.py, on 7 images that do not divide: it ends, with the same captions, rewards and losses."""
    settings = ["toy", "--data", "toy:train:7", "--num-steps", "2", "--prompts-per-step", "4", "--group-size", "3",
                "--eval-data", "toy:heldout:5", "--eval-images", "3", "--eval-samples", "2", "--max-new-tokens", "64",
                "--audit-every", "0", "--correctness-weight", "0.5", "--checker-mode", "likelihood"]
    for name in ("policy", "verifier"):
        settings += [f"--{name}", shallow(f"data/toy/{name}", tmp_path / name)]
    for num_ranks in (1, 2):
        all_ranks(tmp_path, num_ranks, run_program, train.main, [*settings, "--run-dir", str(tmp_path / str(num_ranks))])
    one, two = (read_log(tmp_path / n / "metrics.jsonl") for n in ("1", "2"))
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=2e-3)
    first = [(tmp_path / n / "rollouts/step_000000.jsonl").read_text().splitlines() for n in ("1", "2")]
    rows = [[(row["id"], row["caption"], row["reward"], row["claims"]) for row in map(json.loads, lines)] for lines in first]
    assert rows[0] == rows[1]
    evaluations = [(tmp_path / n / "eval.jsonl").read_text().splitlines() for n in ("1", "2")]
    assert evaluations[0][0] == evaluations[1][0]  # of the same policy: to the last digit
    last = [json.loads(lines[-1]) for lines in evaluations]
    assert last[0]["step"] == 2 and last[1] == pytest.approx(last[0], abs=0.05)
    load_policy(str(tmp_path / "2/final"), torch.device("cpu"))

    # and what two ranks began one can end: the same images, and nearly the same numbers
    for run_dir in ("1", "2"):
        again = [*settings, "--run-dir", str(tmp_path / run_dir), "--resume", "--num-steps", "4"]
        all_ranks(tmp_path, 1, run_program, train.main, again)
    one, two = (read_log(tmp_path / n / "metrics.jsonl") for n in ("1", "2"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert b == pytest.approx(a, abs=1e-2)
    for step in (2, 3):
        files = [(tmp_path / n / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines() for n in ("1", "2")]
        ids = [[json.loads(line)["id"] for line in lines] for lines in files]
        assert ids[0] == ids[1]


def test_programs_that_share_work_wait_a_week_for_each_other(monkeypatch):
    """A rank's share of an evaluation may take hours longer than another's. Training waits as its setting says."""
    waits = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("grpo.distributed._control", None)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *args, timeout, **kwargs: waits.append(timeout))
    init_distributed()
    assert waits == [timedelta(days=7)] * 2
    init_distributed(3)
    assert waits[2:] == [timedelta(minutes=3)] * 2


@pytest.mark.parametrize("ranks, restarts, keeps_store, is_fit", [
    ("2", "2", "True", False), ("2", "2", "False", True), ("2", "0", "True", True), ("1", "2", "True", True)])
def test_restarts_by_torchrun_are_refused_where_they_could_not_succeed(monkeypatch, ranks, restarts, keeps_store, is_fit):
    """Its new ranks found the addresses of the ended ones in its store: most restarts failed. A single rank needs none."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)  # it joins nobody
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", keeps_store)
    with nullcontext() if is_fit else pytest.raises(ValueError, match="expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        init_distributed()


def leave_early(phase: str) -> None:
    """What each rank does: rank 1 never comes to the end of the phase, or fails at it."""
    device = init_distributed()
    phases = Phases(device, timeout_minutes=0.05)
    try:
        if phase == "error":
            with all_or_none("images"):
                if rank() == 1:
                    raise ValueError("b.png: expected an image")
        if phase == "disk":
            with all_or_none("log"), naming(Path("runs/x")):
                if rank() == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
        if phase == "gone":
            if rank() == 1:
                os._exit(0)  # as a signal ends it
            gather_rows([rank()])
        with phases(phase, alone=phase in ("rollout", "verifier")):
            if rank() == 1 and phase == "verifier":
                raise ValueError("no answer to any question")
            if rank() == 1:
                time.sleep(8)
    except (OSError, ValueError) as error:
        print(f"rank {rank()} says: {error}", flush=True)
    os._exit(0)


def run_unlike(folder: Path, settings: dict) -> None:
    """What each rank does: it begins runs in which rank 1 has something else, and then a good one, in which rank 1 is
    slow. That goes on where rank 1 does not see the checkpoint yet, and has the run folder at another path."""
    def begin(what: str, **changes) -> None:
        try:
            train.train(toy_config(**settings | {"run_dir": str(folder / "run")} | changes))
        except ValueError as error:
            print(f"rank {rank()}, {what}: {error}", flush=True)

    init_distributed()
    is_other = rank() == 1
    begin("command", **{"seed": 1} if is_other else {})
    begin("length", **{"num_steps": 2} if is_other else {})
    begin("weights", policy=str(folder / ("other" if is_other else "policy")))
    begin("rows", data=f"toy:train:{9 if is_other else 8}")
    grpo.run_dir.SEEN_S = 0.1
    begin("folder", run_dir=str(folder / f"run {rank()}"))
    size_of, sample = data.images.image_size, grpo.run.sample_rollouts
    if is_other:
        data.images.image_size = lambda image: (336 - size_of(image)[0], 112)
    begin("pictures", run_dir=str(folder / "pictures"))
    data.images.image_size = size_of
    if is_other:
        grpo.run.sample_rollouts = lambda *args: time.sleep(1) or sample(*args)
    begin("good", micro_batch_tokens=[1, 10**6][rank()])
    if is_other:
        grpo.checkpoint.latest_checkpoint = lambda run_dir: None
    os.chdir(folder / ["", "policy"][rank()])
    begin("late", resume=True, num_steps=2, run_dir=os.path.relpath(folder / "run"))
    os._exit(0)


def strengthen(file: Path) -> None:
    """Half as much again of every weight."""
    save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


def test_ranks_that_differ_do_not_train_together(tmp_path):
    """Two nodes with a policy each made one of both, and said nothing."""
    settings = {name: shallow(f"data/toy/{name}", tmp_path / name) for name in ("policy", "verifier")}
    shutil.copytree(settings["policy"], tmp_path / "other")
    strengthen(tmp_path / "other/model.safetensors")
    settings |= dict(data="toy:train:8", num_steps=1, prompts_per_step=4, group_size=2, max_new_tokens=8, audit_every=0)
    said = all_ranks(tmp_path, 2, run_unlike, tmp_path, settings)
    for number in (0, 1):
        for what, sentence in {
            "command": "seed: expected the same on all ranks, rank 0 has 0, rank 1 has 1",
            "length": "num_steps: expected the same on all ranks, rank 0 has 1, rank 1 has 2",
            "weights": r"policy: expected the same on all ranks, rank 0 has '\w+ (\w+)', rank 1 has '\w+ \1'",
            "rows": "data: expected the same on all ranks, rank 0 has '8 images, .*', rank 1 has '9 images, .*'",
            "folder": "run folder: .*/run 1: expected a folder that all ranks share, rank 1 on .* does not see writer.json",
            "pictures": "records: step 0: expected 2 captions of train-00000., found [04]: a rank has pictures of other sizes",
        }.items():
            assert re.search(f"rank {number}, {what}: {sentence}", said), said
    assert not re.search("rank ., (good|late)", said), said
    assert not (tmp_path / "run 1").exists() and not (tmp_path / "pictures/checkpoints").exists()
    first, second = read_log(tmp_path / "run/timing.jsonl")
    assert min(first["idle_share"], second["idle_share"]) > 0.15  # rank 0 has waited for the captions of rank 1
    assert [row["step"] for row in read_log(tmp_path / "run/starts.jsonl")] == [0, 1]


def evaluate_unlike(folder: Path) -> None:
    """What each rank does: it evaluates, while rank 1 has other models, questions or captions, and while rank 1 fails."""
    def measure(what: str, **changes) -> None:
        settings = dict(policy=(str(folder / "policy"),), data=("toy:heldout:3",))
        if not what.startswith("looking"):
            settings |= dict(verifier=str(folder / "verifier"), num_captions=1, cache="", max_new_tokens=8)
        kind = {"checker": evaluate.ClaimsConfig, "looking": evaluate.DirectConfig}.get(what.split()[0], evaluate.PrismConfig)
        try:
            _, rows = evaluate.run(kind(**settings | changes))
            print(f"rank {rank()}, {what}: {[len(group) for group in rows.values()]}", flush=True)
        except ValueError as error:
            print(f"rank {rank()}, {what}: {error}", flush=True)

    init_distributed()
    other = ["", "other "][rank()]
    shutil.copytree("data/toy/policy", folder / f"copy {rank()}")
    measure("paths", policy=(str(folder / f"copy {rank()}"),))
    measure("policy", policy=(str(folder / f"{other}policy"),))
    measure("verifier", verifier=str(folder / f"{other}verifier"))
    measure("checker", checker=str(folder / f"{other}policy"), checker_mode="likelihood")
    measure("data", data=(f"toy:heldout:{3 + rank()}",))
    file = folder / f"captions {rank()}.jsonl"
    ids = [picture.id for picture in evaluate.load_benchmarks(["toy:heldout:3"])[0].pictures]
    file.write_text("".join(json.dumps({"id": id, "caption": f"A {other}star."}) + "\n" for id in ids))
    measure("captions", policy=(), captions=(str(file),))
    if rank() == 1:
        def ask_all(*args):
            raise ValueError("no answer to any question")

        tools.prism.ask_all = tools.prism._look = ask_all
    measure("answers")
    measure("looking")
    measure("looking apart", policy=(str(folder / f"{other}policy"),))
    measure("looking elsewhere", data=(f"toy:heldout:{3 + rank()}",))
    os._exit(0)


def test_ranks_that_differ_do_not_evaluate_together(tmp_path):
    """An evaluation on two nodes was of two policies, under the name of one."""
    for name in ("policy", "verifier"):
        shallow(f"data/toy/{name}", tmp_path / name)
        shutil.copytree(tmp_path / name, tmp_path / f"other {name}")
        strengthen(tmp_path / f"other {name}/model.safetensors")
    said = all_ranks(tmp_path, 2, evaluate_unlike, tmp_path)
    for number in (0, 1):
        assert f"rank {number}, paths: [3]" in said, said
        for what, name in {"policy": "captioner 1", "verifier": "verifier", "checker": "checker", "data": "benchmarks",
                           "captions": "captions of captioner 1", "looking apart": "policy",
                           "looking elsewhere": "benchmark"}.items():
            assert re.search(f"rank {number}, {what}: {name}: expected the same on all ranks, rank 0 has .*, rank 1 has ", said)
        for what in ("answers", "looking"):
            assert f"rank {number}, {what}: answers: no answer to any question" in said


@pytest.mark.parametrize("phase", ["reward", "rollout"])
def test_a_rank_that_does_not_come_is_named(tmp_path, phase):
    said = all_ranks(tmp_path, 2, leave_early, phase)
    assert re.search(rf"rank 0 says: rank 0, phase {phase}: not all ranks came to its end \(.*Ranks 1 failed", said)


def test_a_rank_that_has_left_is_told_in_a_sentence(tmp_path):
    said = all_ranks(tmp_path, 2, leave_early, "gone")
    assert "rank 0 says: rank 0 waited for a rank that did not come (" in said


def test_what_fails_in_a_phase_of_one_rank_alone_ends_all_of_them(tmp_path):
    said = all_ranks(tmp_path, 2, leave_early, "verifier")
    assert all(f"rank {number} says: verifier: no answer to any question" in said for number in (0, 1))


def test_what_one_rank_cannot_read_ends_all_of_them(tmp_path):
    said = all_ranks(tmp_path, 2, leave_early, "error")
    assert all(f"rank {number} says: images: b.png: expected an image" in said for number in (0, 1))


def test_torchruns_report_ends_with_the_sentence():
    """It has thirty lines of its own, below what the ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "train.py", "toy", "--data", "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    *_, last, rule = done.stderr.splitlines()
    assert done.returncode == 1 and set(rule) == {"="}
    assert last.startswith("  traceback : error: none.jsonl: expected a file or a folder of files with questions")


def test_what_one_ranks_disk_refuses_ends_all_of_them(tmp_path):
    said = all_ranks(tmp_path, 2, leave_early, "disk")
    assert "rank 0 says: [Errno 28] No space left on device: 'runs/x'" in said
    assert re.search(r"rank 1 says: log: runs/x: No space left on device \(.* free at .*\)", said)


def test_what_is_said_stands_above_a_progress_bar(capsys):
    """It stood at the end of the bar's line."""
    bar = tqdm(total=2, file=sys.stdout)
    print0("the images that teach nothing")
    first, *_ = capsys.readouterr().out.split("\n")
    assert first.rpartition("\r")[2] == "the images that teach nothing"
    bar.close()


def test_times_and_waiting_add_up():
    phases = Phases(torch.device("cpu"), 1)
    for name, seconds in (("a", 0.02), ("b", 0.01), ("a", 0.02)):
        with phases(name):
            time.sleep(seconds)
    taken = phases.take()
    assert taken["seconds_a"] >= 0.04 and taken["seconds_b"] >= 0.01 and taken["idle_share"] < 0.05
    with pytest.raises(RuntimeError) as caught, phases("reward"):
        raise RuntimeError("out of memory")
    assert caught.value.__notes__ == ["rank 0, phase reward"]
    failed = ValueError("no answer")
    with pytest.raises(ValueError, match="^no answer$") as caught, phases("reward", alone=True):
        raise failed
    assert caught.value.__cause__ is failed  # CAPRL_TRACEBACK=1 shows where it was raised


def test_ranks_end_with_the_code_that_they_should():
    """A good end, two kinds of sentence, and a stop that is signalled twice: two ranks of train.py
    each, where a rank that takes its interpreter down is aborted, as gloo's threads abort one of
    fifty."""
    done = subprocess.run(
        [sys.executable, "bench/exits.py", "--ends", "4", "--brittle"], capture_output=True,
        text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[:-1] == [
        "good: expected 0, got {0: 2}", "a setting: expected 2, got {2: 2}",
        "a picture: expected 2, got {2: 2}", "a stop: expected 143, got {143: 2}",
    ]


ENDS = {"pass": 0, "raise SystemExit": 0, "raise SystemExit(143)": 143, "1 / 0": 1,
        "raise ValueError('bad row')": 2, "raise KeyboardInterrupt": 130}
"""How a program ends -> its exit code."""

LEAVE = """
import atexit, os, sys
import torch.distributed as dist
from data.program import run_program

class Brittle:
    def __del__(self):
        os.abort()

def main(arguments):
    if is_rank:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        sys.modules["brittle"] = Brittle()
    atexit.register(print, "log closed", end=" ")
    exec(arguments[0])

for is_rank in (True, False):
    for end in sys.argv[1:]:
        if not (child := os.fork()):
            run_program(main, [end])
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_rank_leaves_as_a_single_process_does():
    """Its logs are closed, its words are out, its code is that of the error: leaving at once loses
    nothing."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVE, *ENDS], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.splitlines() == [f"log closed {code}" for code in ENDS.values()] * 2
    for said in ("error: bad row", "ZeroDivisionError: division by zero", "stopped by Ctrl-C"):
        assert done.stderr.count(said) == 2, done.stderr[-3000:]


def test_attention_never_asks_cudnn(monkeypatch):
    """cuDNN makes a plan for each shape, for tenths of a second."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert local_device() == torch.device("cuda", 0) and not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
