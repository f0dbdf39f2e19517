"""A run's numbers for wandb, trackio or another module. What it raises then ends no run."""

import inspect
from importlib import import_module
from pathlib import Path

from data.io import text_hash
from grpo.config import TrainConfig
from grpo.distributed import print0


def open_trackers(config: TrainConfig) -> list:
    """What is called with each step's numbers, as the settings ask for it. Raises ValueError for a
    module that cannot be used."""
    trackers = [Tracker(config.tracker)] if config.tracker else []
    if config.tensorboard:
        from tools.tensorboard import TensorBoard  # here: it takes seconds to load

        trackers.append(TensorBoard())
    return trackers


class Tracker:
    def __init__(self, name: str):  # raises ValueError where there is no such module
        try:
            self.module = import_module(name)
            _ = self.module.init, self.module.log, self.module.finish
        except Exception as error:
            raise ValueError(f"tracker {name}: expected init, log and finish ({error})") from None

    def begin(self, run_dir: Path, settings: dict, first_step: int) -> None:
        id = text_hash((run_dir / "starts.jsonl").read_text(encoding="utf-8").partition("\n")[0])
        self._call(self.module.init, project="caprl", name=f"{run_dir.resolve().name}-{id[:6]}",
                   id=id, resume="allow", config=settings)  # goes on by id (wandb) or name

    def __call__(self, step: int, numbers: dict[str, float], captions: list[dict]) -> None:
        if captions and hasattr(self.module, "Table"):
            data = [[row["id"], row["reward"], row["caption"]] for row in captions[:16]]
            table = self._call(self.module.Table, columns=["id", "reward", "caption"], data=data)
            numbers = numbers | ({"captions": table} if table else {})
        self._call(self.module.log, numbers, step=step)

    def finish(self, kind: type | None, *_) -> None:  # as ExitStack.push has it
        self._call(self.module.finish, exit_code=int(kind is not None))

    def _call(self, function, *values, **options) -> object:  # with the options that it knows
        try:
            known = inspect.signature(function).parameters.keys() & options
            return function(*values, **{key: options[key] for key in known})
        except Exception as error:  # of whatever kind: the run is worth more
            print0(f"tracker {self.module.__name__}: {error!r}; the run goes on")
