"""Two gloo ranks on one CPU against one process: same gradients, same captions, and nothing hangs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from grpo.config import toy_config
from grpo.distributed import copy_weights_, gather_rows, init_distributed, rank, shard, sum_across_ranks, world_size
from grpo.logprobs import CompletionScorer
from grpo.policy import load_policy
from grpo.rollout import sample_rollouts
from train import update_policy

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


def step_on_rank(out: Path) -> None:
    """What each rank runs: one SGD step on its share of the batch; rank 0 saves metrics, gradient and sampler."""
    torch.set_num_threads(1)
    device = init_distributed()
    sampler, trained = (load_policy("data/toy/policy", device) for _ in range(2))
    score = dict(pad_id=sampler.pad_id, forbidden_ids=sampler.forbidden_ids)
    scorer = shard(CompletionScorer(trained.model, **score), device)
    reference = shard(CompletionScorer(load_policy("data/toy/policy", device).model.requires_grad_(False), **score), device)
    rollouts, advantages, valid = whole_batch(sampler)
    share = PROMPTS // world_size()
    rows = slice(rank() * share * GROUP, (rank() + 1) * share * GROUP)
    mine = rollouts.groups(rank() * share, (rank() + 1) * share)
    before = {name: p.detach().clone() for name, p in sampler.model.named_parameters()}
    metrics = update_policy(
        scorer, reference, torch.optim.SGD(scorer.parameters(), lr=0.1), mine, advantages[rows], valid[rows],
        toy_config(group_size=GROUP, max_grad_norm=0.5, micro_batch_tokens=1),
    )
    copy_weights_(scorer, sampler.model)
    change = {name: p.detach() - before[name] for name, p in sampler.model.named_parameters()}
    logprobs, _ = scorer(mine)
    with torch.no_grad():
        sampled, _ = CompletionScorer(sampler.model, **score)(mine)
    gap = sum_across_ranks({"gap": (logprobs - sampled).abs().max().item()}, device)["gap"]
    sharded = any(isinstance(p, DTensor) for p in scorer.parameters())
    ranks = gather_rows([rank()])
    if rank() == 0:
        torch.save({"metrics": metrics, "change": change, "gap": gap, "sharded": sharded, "ranks": ranks}, out)


def torchrun(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}  # two threads a rank would fight for cores
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for num_ranks in (1, 2):
        torchrun(num_ranks, __file__, str(folder / f"{num_ranks}.pt"))
    return [torch.load(folder / f"{num_ranks}.pt") for num_ranks in (1, 2)]


def test_two_ranks_take_the_step_of_one(one_and_two):
    one, two = one_and_two
    assert two["sharded"] and two["ranks"] == [0, 1]
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    for name, change in one["change"].items():
        assert change.abs().max() > 0, name
        assert torch.allclose(two["change"][name], change, rtol=1e-3, atol=2e-8 + 1e-3 * change.abs().max().item()), name


def test_the_new_weights_reach_the_sampler(one_and_two):
    assert all(result["gap"] < 1e-5 for result in one_and_two)


def test_a_run_on_two_ranks_is_the_run_on_one(tmp_path):
    """Every caption is drawn as its image's, whichever rank it is on: nothing shared, nothing lost.

    train.py under torchrun, on 7 images that do not divide: it ends, with the same captions, rewards and losses."""
    settings = ["--data", "toy:train:7", "--num-steps", "2", "--prompts-per-step", "4", "--group-size", "3"]
    for num_ranks in (1, 2):
        torchrun(num_ranks, "train.py", "toy", *settings, "--run-dir", str(tmp_path / str(num_ranks)))
    one, two = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("1", "2"))
    for a, b in zip(one, two, strict=True):
        del a["seconds"], b["seconds"]
        assert b == pytest.approx(a, abs=2e-3)
    first = [(tmp_path / n / "rollouts/step_000000.jsonl").read_text().splitlines() for n in ("1", "2")]
    rows = [[(row["id"], row["caption"], row["reward"]) for row in map(json.loads, lines)] for lines in first]
    assert rows[0] == rows[1]
    load_policy(str(tmp_path / "2/final"), torch.device("cpu"))


if __name__ == "__main__":
    step_on_rank(Path(sys.argv[1]))
