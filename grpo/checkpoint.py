"""What a run keeps: checkpoints that it goes on from, bit for bit, and the trained policy as a Hugging Face folder.

    RUN/checkpoints/step_000050/    shards of weights and moments (torch.distributed.checkpoint), any number of ranks reads them
    RUN/checkpoints/latest          a link to the newest one; what it points to is always whole
    RUN/export/step_000100/         the policy after so many steps, opens with from_pretrained
    RUN/final/                      the trained policy
"""

import copy
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig

from grpo.disk import check_room, free_at
from grpo.distributed import all_or_none, control_group, rank
from grpo.policy import Policy

SAME_SIGNAL_S = 5.0
"""Seconds within which two signals are one."""


def init_moments_(optimizer: torch.optim.AdamW) -> None:
    """What AdamW makes at its first step, made now: a checkpoint has the same entries before and after it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zeros = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **dict(zip(("exp_avg", "exp_avg_sq"), zeros))}


def training_state(scorer: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """All that a step changes, by name. Random draws and the learning rate are functions of the step and need no place here."""
    state = {}
    for name, parameter in scorer.named_parameters():
        if parameter.requires_grad:
            state |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
            state[f"weight.{name}"] = parameter.detach()
    return state


def make_room(run_dir: Path, state: dict[str, Tensor]) -> None:
    """Clears what a run left that was killed while it saved. Raises ValueError if there is no room for a checkpoint: a run
    that cannot save even one is better not begun."""
    for stale in run_dir.glob("checkpoints/step_*.unfinished"):
        shutil.rmtree(stale)
    check_room(run_dir, sum(tensor.nbytes for tensor in state.values()))


def save_checkpoint(run_dir: Path, num_steps: int, state: dict[str, Tensor], keep: int) -> None:
    """Saves the state after `num_steps` steps and drops all but the newest `keep` checkpoints. Every rank must call this.

    Written under another name and renamed when it is whole: a run killed at any moment finds the one before. Raises
    ValueError, and leaves nothing of it, where the disk does not take it.
    """
    folder = run_dir / "checkpoints"
    name = f"step_{num_steps:06d}"
    unfinished = folder / f"{name}.unfinished"
    with all_or_none("checkpoint"):
        if rank() == 0:
            unfinished.mkdir(parents=True)
    with all_or_none("checkpoint"):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*single process.*")
                dcp.save(state, checkpoint_id=unfinished, process_group=control_group())
        except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
            room = free_at(folder)
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ValueError(f"{folder / name}: could not be written ({_reason(error)}; {room}); --resume goes on from the "
                             "checkpoint before it") from None
    with all_or_none("checkpoint"):  # nobody goes on before it is in place
        if rank() == 0:
            os.sync()  # on the disk before it gets its name: a power cut is a moment too
            shutil.rmtree(folder / name, ignore_errors=True)
            unfinished.rename(folder / name)
            link = folder / "latest.unfinished"
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            link.rename(folder / "latest")
            for old in sorted(folder.glob("step_??????"))[:-keep]:
                shutil.rmtree(old)


def latest_checkpoint(run_dir: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint and the number of steps behind it. Raises ValueError if the link leads nowhere."""
    link = run_dir / "checkpoints/latest"
    if not link.is_symlink():
        return None
    folder = link.parent / link.readlink()
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{link}: expected a whole checkpoint, found none at {folder}")
    return folder, int(folder.name.removeprefix("step_"))


def load_checkpoint_(folder: Path, state: dict[str, Tensor]) -> None:
    """Fills `state` in place; the number of ranks may be another than at saving. Raises ValueError if it does not fit."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")
            dcp.load(state, checkpoint_id=folder, process_group=control_group())
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: expected a checkpoint of this policy that can be read ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """The last line: before it torch's messages have a traceback for each rank."""
    return next((line.strip()[:200] for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


@contextmanager
def catch_stop_signals(step: Callable[[], int] = lambda: 0) -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGINT only fill the list, for the loop to see after its `step`; rank 0
    says so at once. A later one interrupts.

    What comes within seconds of the first is the same wish: a scheduler signals the ranks and torchrun, which passes it on.
    """
    caught: list[int] = []
    interrupts_from = math.inf
    says = rank() == 0

    def say(sentence: str) -> None:
        """Not by `print`, which a signal may have interrupted: it cannot be entered twice. On a
        terminal the progress bar's line is cleared; the bar comes again below."""
        if says:
            with suppress(OSError):
                clear = "\r\x1b[2K" if os.isatty(2) else "\n"
                os.write(2, f"{clear}{sentence}\n".encode())

    def note(number, frame):
        nonlocal interrupts_from
        if time.monotonic() > interrupts_from:
            say("stopping without saving; --resume goes on from the last checkpoint")
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if not caught:
            caught.append(number)
            interrupts_from = time.monotonic() + SAME_SIGNAL_S
            say(f"finishing step {step()}, then saving; again after {SAME_SIGNAL_S:.0f} s stops "
                "without saving")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    except SystemExit:
        before = {}  # on its way out: the same signal, passed on late, must not kill it
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export_policy(policy: Policy, folder: Path, dtype: torch.dtype, temperature: float = 1.0,
                  max_new_tokens: int = 4096) -> None:
    """Weights (safetensors, 5 GB a file) beside the source's own configuration, tokenizer and
    processor files. Opens with from_pretrained of transformers 4.57 and 5 as the same model, and
    needs nothing of ours.

    Its generation_config samples as training did, whatever the initial checkpoint's said: whoever opens the folder with a
    server that reads it gets the captions that were rewarded.
    """
    model = policy.model if policy.model.dtype == dtype else copy.deepcopy(policy.model).to(dtype)
    before, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=True, temperature=temperature, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=list(policy.eos_ids), pad_token_id=policy.pad_id,
    )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished, max_shard_size="5GB")
        if not policy.files:  # made here, from no checkpoint
            policy.tokenizer.save_pretrained(unfinished)
            policy.image_processor.save_pretrained(unfinished)
    except (OSError, SafetensorError) as error:
        room = free_at(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(f"{folder}: could not be written ({_reason(error)}; {room})") from None
    finally:
        model.generation_config = before
    for name, content in policy.files.items():
        (unfinished / name).write_bytes(content)
    head = model.get_output_embeddings().weight
    _describe_(unfinished, dtype, is_tied=head is model.get_input_embeddings().weight)
    for path in unfinished.iterdir():  # safetensors lets nobody else read what it writes
        path.chmod(unfinished.stat().st_mode & 0o666)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _describe_(folder: Path, dtype: torch.dtype, is_tied: bool) -> None:
    """Makes config.json say of the weights what is so, and both json files what transformers 4.57
    reads too: rope_theta and rope_scaling beside rope_parameters, names of before 5."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    for part in (config, text, config["vision_config"]):
        part.pop("torch_dtype", None)
        part.pop("dtype", None)
        part[key] = str(dtype).removeprefix("torch.")
    for part in (config, text):
        part["tie_word_embeddings"] = is_tied
    if rope := dict(text.get("rope_parameters") or {}):
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
    _write_json(folder / "config.json", config)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # as 5 calls it
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(extra := tokenizer.pop("extra_special_tokens", []), list):
            tokenizer["additional_special_tokens"] = extra
        _write_json(folder / "tokenizer_config.json", tokenizer)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
