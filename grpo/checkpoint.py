"""Checkpoints, from which a run goes on bit for bit.

    RUN/checkpoints/step_000050/    shards of weights and moments (torch.distributed.checkpoint);
                                    any number of ranks can read them; metadata.crc32 is the
                                    checksum of their list
    RUN/checkpoints/latest          a link to the newest checkpoint, which is always whole
"""

import io
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from data.io import check_room, free_at, without_links
from grpo.distributed import all_or_none, control_group, rank, world_size

METADATA_CRC = "metadata.crc32"
"""The file with the checksum of `.metadata`, torch's list of tensors and their places."""


def training_state(scorer: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a step changes, by name: trained weights and the optimizer's state, AdamW's moments.
    It is read into these tensors too, so they must be there before the first step
    (`init_moments_`).

    Random draws and the learning rate are functions of the step: no checkpoint needs them.
    """
    state = {}
    for name, parameter in scorer.named_parameters():
        if parameter.requires_grad:
            state |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
            state[f"weight.{name}"] = parameter.detach()
    return state


def make_room(run_dir: Path, state: dict[str, Tensor]) -> None:
    """Deletes checkpoints that a killed run left unfinished. Raises ValueError if there is no room
    for a checkpoint: then the run does not begin."""
    for stale in run_dir.glob("checkpoints/step_*.unfinished"):
        shutil.rmtree(stale)
    check_room(run_dir, sum(tensor.nbytes for tensor in state.values()))


def save_checkpoint(run_dir: Path, num_steps: int, state: dict[str, Tensor], keep: int) -> None:
    """Saves the state after `num_steps` steps and deletes all but the newest `keep` checkpoints.
    Every rank must call this.

    The checkpoint is written under another name and renamed when it is whole. So a run that is
    killed at any moment still has the checkpoint before. Raises ValueError if the disk refuses it,
    and then leaves nothing of it.
    """
    folder = run_dir / "checkpoints"
    name = f"step_{num_steps:06d}"
    unfinished = folder / f"{name}.unfinished"
    with all_or_none("checkpoint"):
        try:
            with _dcp_errors():
                dcp.save(state, checkpoint_id=unfinished, process_group=control_group())
        except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
            room = free_at(folder)
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ValueError(f"{folder / name}: could not be written ({last_line(error)}; {room}); "
                             "--resume goes on from the checkpoint before it") from None
    with all_or_none("checkpoint"):  # no rank goes on before the checkpoint is in place
        if rank() == 0:
            (unfinished / METADATA_CRC).write_text(metadata_crc(unfinished))
            os.sync()  # before the rename: a power cut must not leave a named but empty checkpoint
            shutil.rmtree(folder / name, ignore_errors=True)
            unfinished.rename(folder / name)
            link, latest = folder / "latest.unfinished", folder / "latest"
            link.unlink(missing_ok=True)
            if latest.is_dir() and not latest.is_symlink():  # copied with what it led to
                shutil.rmtree(latest)
            with without_links():
                link.symlink_to(name)
            if link.is_symlink():
                link.rename(latest)
            # Later ones are there if the link was set back by hand. They are not newer.
            saved = [path for path in sorted(folder.glob("step_??????")) if path.name <= name]
            for old in saved[:-keep]:
                shutil.rmtree(old)


def latest_checkpoint(run_dir: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint and its number of steps; None if there is none. Raises ValueError
    if it is not whole. `latest` is a link to it. Where there is none, as on a file system without
    links or after some ways to copy a folder, it is the one of most steps."""
    link = run_dir / "checkpoints/latest"
    if link.is_symlink():
        folder = link.parent / link.readlink()
    elif saved := sorted(link.parent.glob("step_??????")):
        folder = saved[-1]
    else:
        return None
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{link}: expected a whole checkpoint, found none at {folder}")
    num_steps = folder.name.removeprefix("step_")
    if not num_steps.isdecimal():
        raise ValueError(f"{link}: expected a checkpoint called step_ and its number of steps, "
                         f"found {folder.name}")
    return folder, int(num_steps)


def load_checkpoint_(folder: Path, state: dict[str, Tensor]) -> None:
    """Fills `state` in place. The number of ranks may differ from that at saving. Raises ValueError
    if the checkpoint is damaged, or has other tensors than `state`, OSError (ValueError on the
    other ranks) if a file cannot be read. Every rank must call this."""
    with all_or_none("checkpoint"):
        verify_checksums(folder)
    try:
        with _dcp_errors():
            dcp.load(state, checkpoint_id=folder, process_group=control_group())
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: expected a checkpoint of this policy that can be read "
                         f"({last_line(error)})") from None
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if unread := sorted(saved.keys() - state.keys()):  # torch passes over these without a word
        raise ValueError(f"{folder}: expected only what this run has a place for, found also "
                         f"{unread[0]} (1 of {len(unread)}; `init_moments_` in grpo/update.py "
                         "makes the places of the optimizer's state)")


def verify_checksums(folder: Path) -> None:
    """Raises ValueError if a tensor of the checkpoint, or their list, is not what was saved. Raises
    OSError if a file cannot be read. torch writes each tensor as a ZIP archive with checksums
    (CRC-32), but never reads them. Each rank looks at its share."""
    path, what = folder / ".metadata", "the list of tensors"
    saved = folder / METADATA_CRC
    try:
        # Checkpoints from before this file have none: then only their tensors are compared.
        if saved.is_file() and saved.read_text() != metadata_crc(folder):
            raise ValueError(f"its checksum is not that of {METADATA_CRC}")
        places = list(dcp.FileSystemReader(folder).read_metadata().storage_data.items())
        for index, place in places[rank() :: world_size()]:
            path, what = folder / place.relative_path, index.fqn
            with path.open("rb") as file:
                file.seek(place.offset)
                archive = io.BytesIO(file.read(place.length))
            if damaged := zipfile.ZipFile(archive).testzip():
                raise ValueError(f"another checksum of {damaged}")
    except OSError:
        raise
    except Exception as error:  # what pickle and zipfile meet in damaged bytes has many kinds
        raise ValueError(f"{path}: expected {what} as it was saved, found other bytes "
                         f"({last_line(error)})") from None


def metadata_crc(folder: Path) -> str:
    """CRC-32 of the folder's `.metadata`, as 8 hexadecimal digits."""
    return f"{zlib.crc32((folder / '.metadata').read_bytes()):08x}"


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Silences torch's warning that only a single process saves or loads. torch wraps what stops a
    rank, such as Ctrl-C, in a CheckpointException. Here it is raised as it was."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        try:
            yield
        except dcp.api.CheckpointException as error:
            for reason, _ in error.failures.values():
                if isinstance(reason, KeyboardInterrupt | SystemExit):
                    raise reason from None
            raise


def last_line(error: BaseException) -> str:
    """The error's last line. In torch's messages each rank's traceback comes before it."""
    lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
