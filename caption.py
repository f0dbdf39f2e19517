"""Captions of images in a folder, a JSONL list, parquet files or tar files: JSONL, a line an image.

    python caption.py --policy data/toy/policy --images some/folder --out captions
    torchrun --nproc-per-node 8 caption.py --policy runs/caprl-3b/final --images tars --out captions
    python caption.py --out captions --export llava   # when all is captioned: captions/llava.json
    python caption.py --check captions/llava.json --images some/folder

Any number of workers, on any machines that share the folder of `--out`, may run the same command.
Each takes shard after shard of the images by a lease (data/captions/leases.py). Where a worker has
died, another goes on. So a run can be killed at any time and started again. When one worker dies,
torchrun ends the others. With `--max-restarts 100` before caption.py it starts all again.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from data.captions.exports import check_captions, check_export, export_captions, own_files
from data.captions.leases import take_leases, write_shard
from data.captions.shards import NamedImage, contents_hash, plan_shards
from data.images import open_image
from data.io import agree_on, check_room, naming, text_hash
from data.program import run_program
from data.ranges import check_range
from grpo.captioning import Captioning, caption_batches, check_instruction
from grpo.distributed import compute_dtype, local_device
from grpo.policy import Policy
from grpo.pretrained import load_policy, model_hash


@dataclass(frozen=True)
class CaptionConfig(Captioning):
    """Settings of caption.py."""

    images: str = ""
    """An image, or a folder that is searched with its subfolders. Also a parquet file, a tar file
    (WebDataset's layout), or a folder of these. Also a JSONL file whose rows have `image` (or
    `image_path`) and may have `id`."""
    out: str = ""
    """The folder of captions. A program that was stopped goes on when it is run again."""
    policy: str = "runs/caprl/final"
    """The captioner, a local folder or a hub name. ADAPTER+BASE is an adapter on a base other than
    its adapter_config.json names."""
    seed: int = 0
    """A caption is a function of the seed and the image's id."""
    shard_size: int = 1024
    """Images of a shard, from a folder or a JSONL file. Otherwise a tar file or a row group of a
    parquet file is one."""
    lease_seconds: float = 120.0
    """A worker counts as dead if it has not touched its lease for this long. It must be more than
    the difference between the machines' clocks."""
    export: Literal["", "llava", "sharegpt", "captionqa", "capeval", "caparena", "capability",
                    "detailcaps"] = ""
    """Write the finished captions of `out` as one JSON file: LLaVA's format, LLaMA-Factory's with
    its dataset_info.json, or as a benchmark's own scorer reads them (docs/formats.md)."""
    reference: str = ""
    """CapArena-Auto's caparena_auto_600.json: its pairs are exported, for any judge."""
    check: str = ""
    """An exported file to check, row by row. If `images` names a folder, its pictures must be there
    too."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "shard_size", at_least=1)
        check_range(self, "lease_seconds", above=0)
        if not self.check and not self.out:
            raise ValueError("expected a folder in out, or a file to check")
        if not self.check and not self.images and not self.export:
            raise ValueError("expected images to caption, or an export of captions")
        if self.reference and self.export != "caparena":
            raise ValueError("reference: expected export caparena, which is made into pairs")


def caption(config: CaptionConfig) -> None:
    """One worker's run: it takes shard after shard until all are finished, by any worker."""
    device, out = local_device(), Path(config.out)
    check_room(out)
    shards = plan_shards(Path(config.images), config.shard_size)
    policy = load_policy(config.policy, device, compute_dtype(device))
    check_instruction(policy, config.instruction)
    about = dict(images=config.images, policy=config.policy, model=model_hash(policy),
                 instruction=config.instruction, temperature=config.temperature,
                 max_new_tokens=config.max_new_tokens, seed=config.seed, shards=len(shards),
                 rows=[shard.num_rows for shard in shards],
                 contents=contents_hash(shard.key for shard in shards))
    out.mkdir(parents=True, exist_ok=True)
    # Machines may see images and policy under different paths. Earlier versions wrote no `rows`.
    agree_on(out / "about.json", about, ("images", "policy", "rows"), called={"model": "policy"},
             made=own_files(out, "jsonl|part-[0-9]{4}"))
    worker, num_workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    totals, started = Counter(), time.perf_counter()
    with tqdm(desc="captions", unit="shard", total=len(shards), disable=worker != 0,
              initial=len(own_files(out, "jsonl"))) as bar:
        for lease in take_leases(out, len(shards), worker, num_workers, config.lease_seconds):
            if lease:  # else it has waited for other workers
                batches = partial(shard_rows, policy, about["model"], config)
                for rows in write_shard(lease, shards[lease.number], batches):
                    totals.update(images=len(rows), unreadable=sum("error" in row for row in rows),
                                  tokens=sum(row.get("tokens", 0) for row in rows))
                    bar.set_postfix_str(speed(totals, started))
            bar.update(len(own_files(out, "jsonl")) - bar.n)
        bar.update(len(shards) - bar.n)
    print(f"{out}: {len(shards)} shards finished; this worker captioned {totals['images']} images, "
          f"{totals['unreadable']} of them unreadable; {speed(totals, started)}", flush=True)
    check_captions(out)


def shard_rows(policy: Policy, model: str, config: CaptionConfig,
               images: list[NamedImage]) -> Iterator[list[dict]]:
    """Rows of the images, batch by batch."""
    prompt, waiting = text_hash(config.instruction), iter(images)
    pictures = ((id, partial(open_image, image)) for id, _, image in images)
    for batch in caption_batches(policy, pictures, config, config.seed):
        yield [{"id": id, "image": name} | row | {"model": model, "prompt": prompt}
               for (id, name, _), (row,) in zip(islice(waiting, len(batch)), batch, strict=True)]


def speed(totals: Counter, started: float) -> str:
    seconds = time.perf_counter() - started
    return f"{totals['images'] / seconds:.1f} images/s, {totals['tokens'] / seconds:.0f} tokens/s"


def main(arguments: list[str]) -> None:
    config = tyro.cli(CaptionConfig, args=arguments)
    if config.check:
        num_rows = check_export(Path(config.check), Path(config.images) if config.images else None)
        print(f"{config.check}: {num_rows} rows, all as expected")
        return
    with naming(Path(config.out)):
        if config.images:
            caption(config)
        if config.export in ("llava", "sharegpt"):
            export_captions(Path(config.out), config.export)
        elif config.export:
            from data.captions.judges import export_for_judge  # here: for who has such a judge

            export_for_judge(Path(config.out), config.export, config.reference)


if __name__ == "__main__":
    run_program(main)
