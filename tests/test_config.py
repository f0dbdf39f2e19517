import subprocess
import sys

import pytest

from grpo.config import PRESETS, TrainConfig, parse_train_config, toy_config


def test_plain_train_is_the_paper():
    assert parse_train_config([]) == TrainConfig() == parse_train_config(["paper"])
    assert parse_train_config(["--group-size", "4"]).group_size == 4
    assert parse_train_config(["toy", "--seed", "3"]) == toy_config(seed=3)


def test_the_papers_settings():
    paper = PRESETS["paper"][1]
    assert (paper.policy, paper.verifier) == ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct")
    assert (paper.num_questions, paper.group_size, paper.verifier_mode) == (4, 8, "sample")
    assert paper.kl_coef > 0 and paper.scale_by_std and not paper.leave_one_out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_size": 1}, "group_size 1: expected at least 2"),
        ({"prompts_per_step": 0}, "prompts_per_step 0: expected at least 1"),
        ({"num_questions": 0}, "num_questions 0: expected at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens -1: expected at least 1"),
        ({"inner_epochs": 0}, "inner_epochs 0: expected at least 1"),
        ({"num_steps": 0}, "num_steps 0: expected at least 1"),
        ({"temperature": 0.0}, "temperature 0.0: expected more than 0"),
        ({"verifier_temperature": -1.0}, "verifier_temperature -1.0: expected more than 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm 0.0: expected more than 0"),
        ({"kl_coef": -0.1}, "kl_coef -0.1: expected 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate nan: expected 0 or more"),
        ({"clip_low": 1.5}, "clip_low 1.5: expected 0 to 1"),
        ({"clip_high": -0.2}, "clip_high -0.2: expected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_groups_are_not_split_over_ranks():
    assert TrainConfig(prompts_per_step=12).prompts_per_rank(4) == 3
    with pytest.raises(ValueError, match="prompts_per_step 12 does not divide by 8 ranks"):
        TrainConfig(prompts_per_step=12).prompts_per_rank(8)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train.py toy --group-size 1", "error: group_size 1: expected at least 2"),
        ("train.py toy --data none.jsonl", "error: none.jsonl: expected a JSONL file, found nothing"),
        ("train.py toy --policy tests", "error: tests: expected a model folder with *.safetensors, found no weights"),
        ("train.py toy --verifier tests", "error: tests: expected a model folder with *.safetensors, found no weights"),
        ("train.py toy --policy some/model", "error: some/model: expected a policy's folder or a hub name ("),
        ("train.py toy --prompts-per-step 500", "error: prompts_per_step 500: expected at most the 480 images there are"),
        ("train.py toy --run-dir data/toy/policy", "error: data/toy/policy: expected a new or empty run folder"),
        ("evaluate.py prism --data toy:heldout:1", "error: expected either policy or captions, got neither"),
        ("evaluate.py prism --data toy:heldout:2 --captions none.jsonl", "error: none.jsonl: expected a JSONL file"),
        ("caption.py --images tests --out /tmp/x.jsonl --policy data/toy/policy", "error: tests: expected images"),
        ("caption.py --images none --out /tmp/x.jsonl --policy data/toy/policy", "error: none: expected a JSONL file"),
        ("-m data.toy.export . --num 0", "error: num 0: expected at least 1"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(arguments, message):
    result = run(*arguments.split())
    assert result.returncode == 2 and "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(message)


def test_a_misspelt_flag_is_refused():
    result = run("train.py", "toy", "--group-sise", "4")
    assert result.returncode == 2 and "--group-sise" in result.stderr + result.stdout
