"""What a training step leaves beside its numbers: rows, their audit, thumbnails."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.examples import Example
from grpo.config import TrainConfig
from grpo.distributed import all_or_none, gather_rows, rank
from grpo.run import Run
from grpo.run_dir import check_writer
from reward.step import Reward
from tools.audit import audit_step
from tools.thumbnails import SHOWN_GROUPS, keep_thumbnail


def gather_records(run_dir: Path, run: Run, reward: Reward, examples: Sequence[Example],
                   batch: Sequence[Example], rows: list[dict], step: int,
                   config: TrainConfig) -> tuple[list[dict], dict]:
    """All ranks' rows in the order of the batch, and on rank 0 their audit. Keeps thumbnails.
    Raises ValueError, on all ranks, if an image of the batch was on no rank or on two."""
    rows, audit = gather_rows(rows), {}
    with all_or_none("records"):
        if rank() == 0:
            check_writer(run_dir)
            order = {example.id: place for place, example in enumerate(batch)}
            num_captions = Counter(row["id"] for row in rows)
            for id in order:  # `deal` goes by the sizes that each rank sees
                if num_captions[id] != config.group_size:
                    raise ValueError(
                        f"step {step}: expected {config.group_size} captions of {id}, found "
                        f"{num_captions[id]}: a rank has pictures of other sizes than rank 0")
            rows.sort(key=lambda row: order[row["id"]])  # as on one rank
            probes = examples[: config.probe_images]
            audit = audit_step(rows, step, run.sampler, reward.verifier, probes, config)
            for example in batch[:SHOWN_GROUPS]:
                keep_thumbnail(run_dir, example.id, example.image)
    return rows, audit
