import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import Forked, run_as_program

import caption
import evaluate
import train
from data.curate import __main__ as curate
from data.program import run_program
from grpo.config import RewardConfig, TrainConfig
from grpo.recipes import PRESETS, change, parse_train_config, toy_config
from tools import audit


def test_plain_train_is_the_paper():
    assert parse_train_config([]) == TrainConfig() == parse_train_config(["paper"])
    assert parse_train_config(["--group-size", "4"]).group_size == 4
    assert parse_train_config(["toy", "--seed", "3"]) == toy_config(seed=3)


def test_the_papers_settings():
    paper = PRESETS["paper"][1]
    assert (paper.policy, paper.verifier) == ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct")
    assert (paper.reward_config.num_questions, paper.group_size, paper.verifier_mode) == (4, 8, "sample")
    assert paper.kl_coef > 0 and paper.scale_by_std and not paper.leave_one_out


def test_the_releases_settings():
    """CapRL-3B's and CapRL++'s published scripts, where they differ from the paper."""
    old, plus = PRESETS["caprl-3b"][1], PRESETS["caprl-plus"][1]
    for config in (old, plus):
        asked = config.reward_config
        assert (asked.num_questions, asked.question_draw, config.verifier_temperature) == (8, "independent", 0.6)
        assert asked.abstain and config.leave_one_out and config.kl_coef == 0 and config.group_size == 8
    assert (old.scale_by_std, old.learning_rate, old.reward_config.length_weight) == (True, 1e-6, 0)
    assert (plus.scale_by_std, plus.learning_rate) == (False, 1e-5)
    length = plus.reward_config
    assert (length.length_weight, length.length_full, length.length_zero) == (0.2, 2048, 3072)
    paper, true = (PRESETS[name][1].flat() for name in ("paper", "caprl-true"))
    assert {name: (paper[name], true[name]) for name in paper if paper[name] != true[name]} == {
        "run_dir": ("runs/caprl", "runs/caprl-true"), "correctness_weight": (0.0, 0.5), "praise_weight": (0.0, 0.5)}


def test_the_table_of_recipes_is_that_of_the_presets():
    lines = Path("docs/recipes.md").read_text().splitlines()
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    names = [cell.strip(" `") for cell in next(line for line in lines if line.startswith("| setting")).split("|")[2:-1]]
    assert names[:5] == list(PRESETS)
    written = {cells[0]: cells[1:6] for cells in table}
    settings = [config.flat() for _, config in PRESETS.values()]
    for name in settings[0]:
        values = [str(config[name]) for config in settings]
        if len(set(values)) > 1 or name in written:
            assert written[name] == values, name


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
        ({"learning_rate": float("inf")}, "learning_rate inf: expected 0 or more, not infinity"),
        ({"num_steps": 10**20}, "num_steps 100000000000000000000: expected 1 to 2147483647"),
        ({"num_steps": 10**400}, "num_steps 10000.*0: expected 1 to 2147483647"),
        ({"learning_rate": 1e300}, r"learning_rate 1e\+300: expected 0 to 3.4e\+38"),
        ({"timeout_minutes": 1e30}, r"timeout_minutes 1e\+30: expected more than 0, at most 525600"),
        ({"timeout_minutes": 0.0}, "timeout_minutes 0.0: expected more than 0, at most 525600"),
        ({"temperature": float("inf")}, "temperature inf: expected more than 0, not infinity"),
        ({"clip_low": 1.5}, "clip_low 1.5: expected 0 to 1"),
        ({"soft": True}, "soft: expected verifier_mode logits, a sampled reply has no probabilities"),
        ({"num_shuffles": -1}, "num_shuffles -1: expected 0 or more"),
        ({"length_weight": -1.0}, "length_weight -1.0: expected 0 or more"),
        ({"length_full": 3072}, r"expected length_low <= length_full < length_zero, got \(0, 3072, 3072\)"),
        ({"reward": "judge", "length_weight": 0.2}, "reward judge: expected neither soft nor abstain nor weights"),
        ({"max_failed_share": 1.5}, "max_failed_share 1.5: expected 0 to 1"),
        ({"probe_images": 1}, "probe_images 1: expected at least 2"),
        ({"run_dir": ""}, "run_dir: expected a folder, got an empty text"),
        ({"clip_high": -0.2}, "clip_high -0.2: expected 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps -1: expected 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay -0.1: expected 0 or more"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens 0: expected at least 1"),
        ({"rollout_tokens": 0}, "rollout_tokens 0: expected at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints 0: expected at least 1"),
        ({"save_every": -1}, "save_every -1: expected 0 or more"),
        ({"save_minutes": -1.0}, "save_minutes -1.0: expected 0 or more"),
        ({"export_every": -5}, "export_every -5: expected 0 or more"),
        ({"max_skipped": 0}, "max_skipped 0: expected at least 1"),
        ({"replicas": 0}, "replicas 0: expected at least 1"),
        ({"reward": "judge", "soft": True, "verifier_mode": "logits"}, "reward judge: expected neither soft nor abstain"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        change(TrainConfig(), **changes)


def test_groups_are_not_split_over_ranks():
    assert TrainConfig(prompts_per_step=12).prompts_per_rank(4) == 3
    with pytest.raises(ValueError, match="prompts_per_step 12 does not divide by 8 ranks"):
        TrainConfig(prompts_per_step=12).prompts_per_rank(8)
    with pytest.raises(ValueError, match="replicas 3: expected a divisor of the 4 ranks"):
        TrainConfig(prompts_per_step=12, replicas=3).prompts_per_rank(4)


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        (train, "toy --data none.jsonl", "none.jsonl: expected a file or a folder of files with questions, found nothing"),
        (train, "toy --data=", "expected a file or a folder of files with questions, got an empty text"),
        (train, "toy --verifier=", "expected a verifier's folder or a hub name, got an empty text"),
        (train, "toy --policy tests", "tests: expected a model folder with *.safetensors, found no weights"),
        (train, "toy --verifier tests", "tests: expected a model folder with *.safetensors, found no weights"),
        (train, "toy --policy BROKEN", "BROKEN/model.safetensors: expected weights, found Git LFS"),
        (train, "toy --verifier BROKEN", "BROKEN/model.safetensors: expected weights, found Git LFS"),
        (train, "toy --policy data/toy/verifier", "data/toy/verifier: expected a policy's folder or a hub name ("),
        (train, "toy --data BADGOLD", "BADGOLD line 1: id 'a', question 0: answer_index 7 outside 2 choices"),
        (train, "toy --data BADIMAGE --prompts-per-step 1", "IMAGE: expected an image that Pillow can read"),
        (train, "toy --run-dir README.md", "README.md: expected a run folder, found a file"),
        (train, "toy --policy no/such/folder", "no/such/folder: expected a model's folder or a hub name, found no such folder"),
        (evaluate, "prism --policy data/toy/policy --data toy:heldout:2 --verifier data/toy/verifer",
         "data/toy/verifer: expected a model's folder or a hub name, found no such folder"),
        (train, "toy --policy some/model", "some/model: expected a policy's folder or a hub name ("),
        (train, "toy --verifier some/model", "some/model: expected a verifier's folder or a hub name ("),
        (train, "toy --prompts-per-step 500", "prompts_per_step 500: expected at most the 480 images there are"),
        (train, "toy --run-dir FULL", "FULL: expected a new or empty run folder, found a run in it"),
        (evaluate, "prism --data toy:heldout:2 --captions none.jsonl", "none.jsonl: expected a file, found nothing"),
        (evaluate, "prism --data toy:held:2 --captions x", "expected toy:train:NUM or toy:heldout:NUM with NUM at least 1"),
        (train, "toy --abstain --data TEN", "abstain: expected at most 9 choices beside it, id 'a' has 10"),
        (train, "toy --offload-reference", "offload_reference: expected GPUs, there is nothing to offload from"),
        (train, "toy --replicas 2", "replicas 2: expected a divisor of the 1 ranks"),
        (train, "toy --max-new-tokens 4097", "max_new_tokens 4097: expected at most the 4096 positions of the policy"),
        (train, "toy --verifier-mode sample --verifier-max-new-tokens 4000",
         "verifier_max_new_tokens 4000: expected less than the 3922 tokens that the verifier has beside its instruct"),
        (train, "toy --check --max-new-tokens 4097", "max_new_tokens 4097: expected at most the 4096 positions of the"),
        (train, "toy --resume --run-dir FULL", "FULL/config.json: expected the settings of a run ("),
        (train, "toy --check --data none.jsonl", "none.jsonl: expected a file or a folder of files with questions, found"),
        (train, "toy --check --prompts-per-step 500", "prompts_per_step 500: expected at most the 480 images there are"),
        (audit, "replay none.jsonl --verifier data/toy/verifier", "none.jsonl: expected a file, found nothing"),
        (audit, "audit tests", "tests: expected a run folder with rollouts/step_*.jsonl, found none"),
        (audit, "replay BADGOLD --verifier data/toy/verifier", "BADGOLD line 1: expected the key 'caption', got"),
        (curate, "images --images= --out x", "images: expected a path, got an empty text"),
        (curate, "filter --data BADGOLD --model data/toy/looker --out=", "out: expected a path, got an empty text"),
        (caption, "--images EMPTY --out x.jsonl --policy data/toy/policy", "EMPTY: expected images, "),
        (caption, "--images none --out x --policy data/toy/policy", "none: expected a folder or a file of images, found"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(program, arguments, message, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/config.json").touch()
    (tmp_path / "empty").mkdir()
    shutil.copytree("data/toy/policy", tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "image").write_text("no image")
    for name, answer, choices in (("badgold", 7, "xy"), ("badimage", 1, "xy"), ("ten", 1, "abcdefghij")):
        question = {"question": "What?", "choices": list(choices), "answer_index": answer}
        (tmp_path / name).write_text(json.dumps({"id": "a", "image": "image", "questions": [question]}))
    for name in ("FULL", "EMPTY", "BROKEN", "BADGOLD", "BADIMAGE", "IMAGE", "TEN"):
        arguments, message = (text.replace(name, str(tmp_path / name.lower())) for text in (arguments, message))
    arguments = (
        arguments
        if "--run-dir" in arguments or program is not train
        else f"{arguments} --run-dir {tmp_path / 'run'}"
    )
    with pytest.raises(SystemExit) as stop:
        run_program(program.main, arguments.split())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith(f"error: {message}")
    # Where a run had begun, other settings would be refused as another run's.
    assert (tmp_path / "run/config.json").exists() == ("badimage" in arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train.py toy --group-size 1", "group_size 1: expected at least 2"),
        ("train.py toy --group-sise 4", "--group-sise"),
        ("evaluate.py prism --data toy:heldout:1", "expected captioners in policy or captions, got"),
    ],
)
def test_bad_flags_end_with_exit_code_2_and_no_traceback(arguments, message, tmp_path):
    child = Forked(tmp_path / "said.txt", run_as_program, arguments.split())
    child.start()
    said = " ".join(child.said().replace("│", " ").split())
    assert child.exitcode == 2 and message in said and "Traceback" not in said


@pytest.mark.parametrize(
    "words, message",
    [
        ("papper", "papper: expected a flag, or as the first word one of the presets paper, caprl-3b, caprl-plus, "
         "caprl-true, toy; "
                   "the nearest is paper"),
        ("caprl3b --num-steps 3", "; the nearest is caprl-3b"),
        ("--num-steps 3 caprl_plus", "; the nearest is caprl-plus"),
        ("qa.jsonl", "qa.jsonl: expected a flag, or as the first word one of the presets paper"),
        ("--num-steps 3 toy", "toy: expected a preset as the first word, before all flags"),
        ("--no-check toy", "toy: expected a preset as the first word"),
        ("--num-steps=3 toy", "toy: expected a preset as the first word"),
        ("toy --resume paper", "paper: expected a preset as the first word"),
    ],
)
def test_a_preset_that_is_misspelt_or_late_is_named(words, message):
    with pytest.raises(ValueError) as error:
        parse_train_config(words.split())
    assert message in str(error.value)


def test_a_value_that_is_called_like_a_preset_is_none():
    assert parse_train_config(["--data", "toy", "--run-dir", "paper"]).run_dir == "paper"
    assert parse_train_config(["toy", "--policy", "paper", "--resume"]).policy == "paper"


def test_every_setting_of_the_reward_reaches_it():
    config = toy_config(
        num_questions=7, question_draw="independent", num_shuffles=3, abstain=True, soft=True, length_weight=0.5, length_low=4,
        length_full=9, length_zero=11, repetition_weight=0.1, praise_weight=0.2, correctness_weight=0.3, checker="a",
        checker_mode="likelihood",
    )
    want = RewardConfig(7, "independent", 3, True, True, 0.5, 4, 9, 11, 0.1, 0.2, 0.3, "a", "likelihood")
    assert config.reward_config == want
    assert all(getattr(config.reward_config, field.name) != field.default for field in fields(RewardConfig))
