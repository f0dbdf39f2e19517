"""The benches run, at their tiniest: what they print is a measurement, not a test."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import claims, gpu
from bench.drafts import DraftConfig, count_steps
from bench.drafts import main as drafts
from bench.gpu import training_work
from bench.step import StepConfig, measure
from reward.claims import claims_of


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


def test_claims_are_timed_beside_answers(capsys):
    claims.main(claims.ClaimsCost(hidden=64, layers=1, sizes=(56,), prompts=1, group_size=2, tokens=40, repeats=1))
    said = capsys.readouterr().out
    assert "2 captions of 40 tokens, 4 claims and 4 questions each" in said
    assert re.findall(r"^\| (\w+, \w+) \| [\d.]+ \|$", said, re.MULTILINE) == [
        "accuracy, sample", "accuracy, logits", "correctness, yes", "correctness, likelihood"]
    own, shared = (claims.make_captions(claims.ClaimsCost(shared=shared, prompts=1)) for shared in (False, True))
    assert [len(claims_of(caption)) for caption in own + shared] == [4] * 16 and len(set(own)) == 8 and len(set(shared)) == 1


def test_gpu_runs_small_on_a_cpu():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "bench/gpu.py", "--smoke"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"decoding: \d+ tokens/s, \d+% of the \d+ that bandwidth allows", done.stdout)
    assert re.search(r"forward \+ backward: [\d.]+ TFLOP/s, \d+% of the product's", done.stdout)
    stages = re.findall(r"^## (\w+): at most \d+ s$", done.stdout, re.MULTILINE)
    assert stages == [function.__name__ for function in gpu.STAGES]
    refused = subprocess.run([sys.executable, "bench/gpu.py"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 1 and "expected a GPU, found none" in refused.stderr


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
