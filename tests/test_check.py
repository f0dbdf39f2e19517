"""`train.py --check`: each thing that would go wrong later is wrong here."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import keys

from data.examples import load_examples
from data.images import open_image
from data.toy.export import ExportConfig, export
from grpo.config import RewardConfig
from grpo.logprobs import CompletionScorer
from grpo.pretrained import load_policy
from grpo.recipes import toy_config
from grpo.rollout import sample_rollouts
from grpo.run import load_run
from reward.caprl import Answer
from reward.step import load_reward
from tools import check as preflight
from tools.audit import gold_probe
from tools.check import (
    Finding,
    check,
    check_disk,
    check_held_out,
    check_lengths,
    check_memory,
    check_policy,
    check_sampling,
    check_templates,
    check_verifier,
    format_findings,
    pixel_setting,
)
from tools.memory import status


def test_the_toy_run_passes(tmp_path, capsys):
    check(toy_config(data="toy:train:24", run_dir=str(tmp_path / "run"), eval_data="0.2", eval_images=2, eval_every=30,
                     correctness_weight=0.5, checker_mode="likelihood"))
    said = capsys.readouterr().out
    assert "WRONG" not in said and not (tmp_path / "run").exists()
    for row in ("ranks", "data", "sampling", "templates", "tokens", "memory", "time", "policy", "verifier", "disk", "held out"):
        assert f"ok     {row}" in said
    assert "24 images with 7 to 14 questions" in said and "on-policy ratio 1.0000" in said
    weights = dict(re.findall(r"(verifier|checker)'s weights ([\d.]+) GiB", said))
    assert float(weights["checker"]) > 0 and set(weights) == {"verifier", "checker"}


@pytest.mark.parametrize("num_steps, evaluations", [(10, 3), (11, 4), (15, 4), (16, 5)])
def test_evaluations_are_counted_with_that_of_the_first_policy_and_the_last(num_steps, evaluations):
    pictures = [SimpleNamespace(items=[0] * count) for count in (2, 1, 4)]
    config = toy_config(num_steps=num_steps, eval_data="0.2", eval_every=5, eval_samples=2)
    facts = check_held_out(SimpleNamespace(benchmark=SimpleNamespace(pictures=pictures)), config).facts
    assert facts.startswith(f"{evaluations} evaluations on 3 images; each has 6 captions and 14 answers")


def test_a_run_of_one_image_passes(tmp_path, capsys):
    check(toy_config(data="toy:train:1", run_dir=str(tmp_path / "run"), prompts_per_step=1, group_size=2, max_new_tokens=16,
                     num_steps=2))
    assert "WRONG" not in capsys.readouterr().out


def test_rows_and_images_that_cannot_be_used_are_counted_and_named(tmp_path, capsys):
    export(ExportConfig(tmp_path / "set", num=14))
    path = tmp_path / "set/examples.jsonl"
    lines = path.read_text().splitlines()
    broken = json.loads(lines[3])
    broken["questions"][0]["answer_index"] = 9
    path.write_text("\n".join([*lines[:3], json.dumps(broken), *lines[4:]]) + "\n")
    (tmp_path / "set/images/train-000005.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        check(
            toy_config(
                data=str(path), run_dir=str(tmp_path / "run"), prompts_per_step=4, group_size=2, probe_images=2
            )
        )
    said = capsys.readouterr().out
    assert stop.value.code == 2 and "WRONG  data" in said and "1 rows and 1 images cannot be used" in said
    assert "examples.jsonl line 4: id 'train-000003', question 0: answer_index 9 outside" in said
    assert "train-000005.png: expected an image that Pillow can read" in said


def test_too_few_sound_rows_for_a_step_are_said_with_what_is_wrong_with_the_others(tmp_path, capsys):
    export(ExportConfig(tmp_path / "set", num=4))
    (tmp_path / "set/images/train-000002.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        check(toy_config(data=str(tmp_path / "set/examples.jsonl"), run_dir=str(tmp_path / "run"), prompts_per_step=4))
    said = capsys.readouterr().out
    assert stop.value.code == 2 and "0 rows and 1 images cannot be used" in said
    assert "train-000002.png: expected" in said


def test_findings_read_as_a_table():
    table = format_findings([Finding("a", "x"), Finding("long", "y", "mend it")])
    assert table.splitlines() == ["ok     a     x", "WRONG  long  y", "             mend it"]


def test_lengths_that_do_not_fit(policy):
    config = toy_config(max_new_tokens=100)
    assert policy.model.config.text_config.max_position_embeddings >= 300
    room = policy.model.config.text_config.max_position_embeddings
    fine = check_lengths(policy, [16, 64, 20], 20, 100, config)
    assert not fine.problem and "images 16 to 64, median 20, at most" in fine.facts and "text 20" in fine.facts
    assert (
        f"take {room + 1} positions, the policy has {room}"
        in check_lengths(policy, [room - 119], 20, 100, config).problem
    )
    assert not check_lengths(policy, [room - 120], 20, 100, config).problem
    assert "captions of 99 tokens" in check_lengths(policy, [16], 20, 99, config).problem


@pytest.mark.parametrize("own, processor, setting", [
    ({}, {}, "longest_edge in preprocessor_config.json"),
    ({"max_pixels": 9, "size": {"longest_edge": 9}}, {}, "max_pixels in preprocessor_config.json"),
    ({"max_pixels": None, "size": {}}, {}, "longest_edge in preprocessor_config.json"),
    ({"max_pixels": 9}, {"processor_class": "x"}, "max_pixels in preprocessor_config.json"),
    ({"max_pixels": 9}, {"image_processor": {"size": {}}}, "longest_edge in processor_config.json"),
])
def test_the_setting_that_changes_an_images_tokens_is_named(policy, own, processor, setting):
    files = {"preprocessor_config.json": own, "processor_config.json": processor}
    policy = replace(policy, files={name: json.dumps(content).encode() for name, content in files.items()})
    problem = check_lengths(policy, [9999], 20, None, toy_config()).problem
    assert problem.endswith(f"lower --max-new-tokens, or {setting}")


@pytest.mark.parametrize("change, setting", [
    ({"max_pixels": 6272}, "max_pixels in preprocessor_config.json"),
    ({"size": {"longest_edge": 6272, "shortest_edge": 3136}}, "longest_edge in preprocessor_config.json"),
])
def test_the_setting_that_is_named_changes_something(tmp_path, change, setting):
    shutil.copytree("data/toy/policy", tmp_path / "policy")
    path = tmp_path / "policy/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    policy = load_policy(str(tmp_path / "policy"), torch.device("cpu"))
    assert policy.image_processor.size["longest_edge"] == 6272 and pixel_setting(policy) == setting


def test_a_template_that_opens_think_is_named(tmp_path, capsys):
    assert not check_templates({"policy": "<think>\n\n</think>\n\n", "verifier": "</think> The answer is"}).problem
    assert (
        "verifier: it opens <think>"
        in check_templates({"policy": "a", "verifier": "<think>\n The answer is"}).problem
    )
    shutil.copytree("data/toy/policy", tmp_path / "policy")
    template = tmp_path / "policy/chat_template.jinja"
    template.write_text(template.read_text().rstrip() + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
    with pytest.raises(SystemExit) as stop:
        check(toy_config(policy=str(tmp_path / "policy"), data="toy:train:12", run_dir=str(tmp_path / "run"), max_new_tokens=8))
    said = capsys.readouterr().out
    assert stop.value.code == 2 and "WRONG  templates" in said and "policy: it opens <think>" in said


def test_memory_and_disk(tmp_path, monkeypatch):
    assert not check_memory({"weights": 60, "peak": 92}, 100).problem
    assert "--gradient-checkpointing" in check_memory({"weights": 60, "peak": 93}, 100).problem
    settings = dict(keep_checkpoints=2, num_steps=100, export_every=25, save_dtype="bfloat16")
    config = toy_config(**settings)
    # three checkpoints of 12 bytes a trained weight; after steps 25, 50, 75 and 100 an export, the last is final/, and one
    # being written, of 2 a weight
    needed = 400 * 3 * 12 + 1000 * 5 * 2
    usage = type("Usage", (), {"free": needed + 1})()
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    assert not check_disk(tmp_path / "not/yet", 1000, 400, config).problem
    assert check_disk(tmp_path, 1000, 400, toy_config(**settings, eval_data="toy:heldout:3")).problem  # best/ is one more
    with pytest.raises(ValueError, match="^/proc/run: "):  # told first
        check(toy_config(run_dir="/proc/run"))
    usage.free = needed
    assert "--keep-checkpoints" in check_disk(tmp_path, 1000, 400, config).problem


def longest(config):
    """Findings of the longest step, and the run that it was tried on."""
    device = torch.device("cpu")
    run, examples = load_run(config, device), load_examples(config.data)
    prompt = run.sampler.prompt(open_image(examples[0].image))
    found = preflight.check_longest_step(run, load_reward(config, device), examples, prompt, 16, config)
    return found, run


def state_of(run):
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*run.scorer.parameters(), *moments)]


def test_the_longest_step_is_measured_and_changes_no_weight(monkeypatch):
    """Two micro-batches of the three that a rank has, with the reference; neither weights nor moments move."""
    config = toy_config(data="toy:train:6", prompts_per_step=3, group_size=4, max_new_tokens=24, micro_batch_tokens=1)
    begun, seen = [], []
    update = preflight.update_policy

    def watched(scorer, reference, optimizer, rollouts, *rest):
        begun.extend(state_of(run_of[0]))
        seen.append((len(rollouts.prompts), rollouts.tokens.shape, reference is not None))
        result = update(scorer, reference, optimizer, rollouts, *rest)
        assert result["skipped"] == 0 and all(parameter.grad is None for parameter in scorer.parameters())
        return result

    run_of = []
    weights_held = preflight.weights_held
    monkeypatch.setattr(preflight, "weights_held", lambda run, others: run_of.append(run) or weights_held(run, others))
    monkeypatch.setattr(preflight, "update_policy", watched)
    (memory, seconds), run = longest(config)
    # the longest captions, then those of the trial: this rank's three prompts
    assert seen[0] == (2, (8, 24), True) and seen[1][0] == 3 and len(seen) == 2 and not memory.problem
    assert re.match(r"[\d.]+ to [\d.]+ s a step \(rollout .*, reward .*, update .*\), 40 steps in", seconds.facts)
    assert all(map(torch.equal, begun, state_of(run)))
    size = 4 * sum(parameter.numel() for parameter in run.scorer.parameters()) / 2**30
    assert f"masters and moments {3 * size:.2f} GiB" in memory.facts and f"reference {size:.2f} GiB" in memory.facts


def test_the_images_of_a_step_are_part_of_the_peak(monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "step_images", lambda *args: asked.append(args[2:]) or 500 << 30)
    for freeze in ("none", "vision+merger"):
        config = toy_config(data="toy:train:6", prompts_per_step=1, group_size=2, max_new_tokens=8, freeze=freeze)
        (memory, _), _ = longest(config)
        peak = re.match(r"peak ([\d.]+) GiB of", memory.facts)
        assert "images 500.00 GiB" in memory.facts and float(peak[1]) > 500 and memory.problem.startswith("too much")
    assert asked == [(1, 4, 16, False, False), (1, 4, 16, False, True)]  # the second has features


def test_hours_of_a_run_by_hand(monkeypatch):
    """36 to 72 s a step here, 54 to 108 on the slower rank, 100 steps: 1.5 to 3 hours."""
    others = iter([54.0, 108.0])  # the sums of the other rank
    monkeypatch.setattr(preflight, "gather_rows", lambda rows: [*rows, next(others)])
    drawn = SimpleNamespace(lengths=torch.tensor([10, 30]), truncated=torch.tensor([False, True]))
    finding = preflight.check_time(
        {"rollout": 20.0, "reward": 6.0, "update": 10.0}, {"rollout": 40.0, "reward": 12.0, "update": 20.0}, drawn,
        toy_config(num_steps=100, max_new_tokens=64))
    assert finding.facts.startswith(
        "54.0 to 108.0 s a step (rollout 20.0 to 40.0, reward 6.0 to 12.0, update 10.0 to 20.0), 100 steps in "
        "1.50 to 3.00 hours: with captions of 20 tokens as in the trial, 50% of them cut off, and with 64 as allowed")
    assert not finding.problem


def test_a_step_that_does_not_fit_is_said_and_not_killed(monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda device: status("VmRSS") + (64 << 20))
    config = toy_config(data="toy:train:12", max_new_tokens=200)
    (memory,), _ = longest(config)
    assert "does not fit into" in memory.facts and "too much: --gradient-checkpointing" in memory.problem
    assert torch.ones(1 << 26).sum() == 1 << 26  # the limit is gone
    with monkeypatch.context() as patched:
        patched.setattr(preflight, "reward_step", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert "(MemoryError)" in longest(config)[0][0].facts  # Python's own has no text
    monkeypatch.setattr(preflight, "world_size", lambda: 2)  # the other rank waits in a collective: this one ends both
    with pytest.raises(ValueError, match=r"rank 0: the longest step does not fit into .* GiB \(.*\): --gradient-checkp"):
        longest(config)


def test_a_policy_that_samples_from_another_distribution(policy, prompts):
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    rollouts = sample_rollouts(policy, prompts[:2], keys(2, 2), 10)
    assert not check_policy(rollouts, scorer, policy.forbidden_ids).problem
    assert not check_sampling(policy, toy_config()).problem
    hot = sample_rollouts(policy, prompts[:2], keys(2, 2), 10, temperature=3.0)
    assert "not one policy" in check_policy(hot, scorer, policy.forbidden_ids).problem
    assert "image markers" in check_policy(rollouts, scorer, [rollouts.tokens[0, 0].item()]).problem
    clash = replace(policy, forbidden_ids=policy.eos_ids)
    assert "an EOS id is an image marker too" in check_sampling(clash, toy_config()).problem


def test_a_verifier_is_asked_what_it_is_told():
    examples = load_examples("toy:train:6")

    def reads(captions, asked, names):
        """The option that the caption names last, the first one where it names none."""
        return [[Answer(max(range(len(q.options)), key=lambda i: caption.rfind(f" {q.options[i]}."))) for q in group]
                for caption, group in zip(captions, asked)]

    scores = gold_probe(examples, reads, RewardConfig())
    assert scores["gold_caption"] == 1 and abs(scores["no_caption"] - scores["chance"]) < 0.2
    assert scores["chance"] == pytest.approx(
        sum(1 / len(q.choices) for e in examples for q in e.questions) / sum(len(e.questions) for e in examples)
    )
    assert not check_verifier(scores | {"no_caption": 0.25, "chance": 0.25}).problem

    def knows(captions, asked, names):
        return [[Answer(q.gold) for q in group] for group in asked]

    # a caption makes no difference
    assert "told" in check_verifier(gold_probe(examples, knows, RewardConfig())).problem
    fails = {"gold_caption": 0.9, "no_caption": 0.3, "chance": 0.25, "failed_share": 0.1, "unparsed_share": 0,
             "questions_per_second": 5, "failure": "503 busy"}
    assert "10% could not be scored, as: 503 busy" in check_verifier(fails).problem
    assert "; 5 questions a second" in check_verifier(fails).facts and scores["questions_per_second"] > 0
    assert "keep those that need the image" in check_verifier(fails | {"no_caption": 0.45, "failed_share": 0}).problem

    def busy(captions, asked, names):
        return [[Answer(None, failure="503 busy")] * len(group) for group in asked]

    # what was not measured is not called a verifier that cannot read
    assert check_verifier(gold_probe(examples, busy, RewardConfig())).problem == "100% could not be scored, as: 503 busy"
