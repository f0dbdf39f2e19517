"""A run's numbers for an experiment tracker: wandb, trackio, or another module with `init`, `log`
and `finish`."""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from data.io import text_hash
from data.jsonl import read_log
from grpo.config import TrainConfig
from grpo.distributed import rank

NUM_CAPTIONS = 16
"""Captions of the table at the first step and at each probe."""


def load_trackers(stack: ExitStack, run_dir: Path, first_step: int, config: TrainConfig) -> list:
    """Functions of (step, {log: numbers}, rollouts) to call after each step. Rank 0 has them."""
    trackers = []
    if config.tensorboard and rank() == 0:
        from tools.tensorboard import TensorBoard  # here: most runs do not need it

        trackers.append(TensorBoard(run_dir, first_step))
    module = tracker_module(config.tracker) if rank() == 0 else None
    if module:
        trackers.append(stack.enter_context(Tracker(module, run_dir, config.flat())))
    return trackers


def tracker_module(name: str) -> ModuleType | None:
    """None for no name. Raises ValueError for a module that is missing or is no tracker."""
    if not name:
        return None
    try:
        module = import_module(name)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"tracker {name}: expected an installed module ({error})") from None
    for function in ("init", "log", "finish"):
        if not hasattr(module, function):
            raise ValueError(f"tracker {name}: expected a module with init, log and finish, found "
                             f"no {function}")
    return module


def finite(logs: dict[str, dict]) -> dict[str, float]:
    """{"metrics": {"reward": 0.5}} as {"metrics/reward": 0.5}, without lists and what was not
    measured."""
    return {f"{log}/{key}": value for log, row in logs.items() for key, value in row.items()
            if isinstance(value, int | float) and math.isfinite(value)}


class Tracker(AbstractContextManager):
    """The run's settings, its numbers and some captions. A resumed run goes on as the same run
    where the module knows runs by id or by name. What the module raises, as without a network, is
    told once and ends no run."""

    def __init__(self, module: ModuleType, run_dir: Path, settings: dict):
        self.module, self.has_failed = module, False
        id = text_hash(str(read_log(run_dir / "starts.jsonl")[:1]))  # of this run's first start
        self._call(self.module.init, project="caprl", name=f"{run_dir.resolve().name}-{id[:6]}",
                   id=id, resume="allow", config=settings)

    def __call__(self, step: int, logs: dict[str, dict], rollouts: list[dict]) -> None:
        numbers, columns = finite(logs), ["id", "reward", "caption"]
        is_shown = rollouts and (step == 0 or "probe_accuracy" in logs["audit"])
        if is_shown and hasattr(self.module, "Table"):
            data = [list(map(row.get, columns)) for row in rollouts[:NUM_CAPTIONS]]
            table = self._call(self.module.Table, columns=columns, data=data)
            numbers |= {} if table is None else {"captions": table}
        self._call(self.module.log, numbers, step=step)

    def __exit__(self, kind: type | None, *error) -> None:
        self._call(self.module.finish, exit_code=int(kind is not None))

    def _call(self, function: Callable, *values, **options) -> object:
        """With those of the options that the function takes. None where it raises."""
        try:
            taken = inspect.signature(function).parameters
            if not any(option.kind is option.VAR_KEYWORD for option in taken.values()):
                options = {name: value for name, value in options.items() if name in taken}
            return function(*values, **options)
        except Exception as error:  # of whatever kind: the run is worth more
            if not self.has_failed:
                tqdm.write(f"tracker {self.module.__name__}: {type(error).__name__}: {error}; the "
                           "run goes on, further errors are not told")
            self.has_failed = True
