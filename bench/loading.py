"""How fast a published set is indexed and sampled: parquet with the schema of CapRL-QA-75K, written
for the purpose.

    python bench/loading.py                                        # 75,285 rows, small pictures
    python bench/loading.py --rows 2000 --side 420 --quality 95    # pictures of about 200 kB

Pictures are noise, each with bytes of its own. Indexing is `load_examples`: every row and question
is checked, no picture is read. Sampling opens pictures of the set in a shuffled order, as training
does. "decode alone" opens as many from memory; no reader can be faster. Seconds are CPU seconds of
all threads; the files are in the system's page cache.
"""

import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import parquet
from data.examples import StoredImage, load_examples
from data.images import open_image


@dataclass(frozen=True)
class BenchConfig:
    """Sizes of the measurement."""

    rows: int = 75_285
    side: int = 64
    """Side of the pictures, in pixels."""
    quality: int = 75
    """JPEG quality of the pictures."""
    questions: int = 3
    row_group: int = 100
    """Rows in a row group; the datasets library writes 100 where rows have pictures."""
    samples: int = 3000
    cache_mb: int = 16
    """Cache of row groups. It is so small that hardly a picture is found in it, as in a set far
    larger than the default of 256."""


def write_set(path: Path, config: BenchConfig) -> list[bytes]:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(50):
        noise = Image.fromarray(rng.integers(0, 256, (config.side, config.side, 3), dtype=np.uint8))
        noise.save(into := BytesIO(), "JPEG", quality=config.quality)
        pictures.append(into.getvalue())
    choices = ["A) red", "B) blue", "C) 绿", "D) white"]
    entry = {"question": "What color is the car on the left of the picture?", "choices": choices,
             "answer": "C"}
    prompt = [{"role": "user", "content": "<image> Please describe this image in detail."}]
    writer = None
    for start in range(0, config.rows, config.row_group):
        rows = [
            {"id": f"image-{i}",
             "image": {"bytes": pictures[i % len(pictures)] + i.to_bytes(4), "path": f"{i}.jpg"},
             "prompt": prompt, "data_source": "bench",
             "reward_model": {"ground_truth": [entry] * config.questions}}
            for i in range(start, min(start + config.row_group, config.rows))
        ]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=config.row_group)
    writer.close()
    return pictures


def main(config: BenchConfig) -> None:
    parquet.CACHE_BYTES = config.cache_mb << 20
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        pictures = write_set(path, config)
        size = sum(map(len, pictures)) / len(pictures)
        print(f"{config.rows} rows, pictures of {size / 1000:.1f} kB and {config.side} x "
              f"{config.side} pixels, "
              f"{path.stat().st_size / 1e9:.2f} GB in row groups of {config.row_group}")
        started = time.process_time()
        examples = load_examples(str(path))
        seconds = time.process_time() - started
        print(f"index      {seconds:8.1f} s for {len(examples)} images, "
              f"{len(examples) / seconds:.0f} rows/s; "
              f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
        memory = [StoredImage("", lambda data=data: data) for data in pictures]
        chosen = random.Random(0).choices(range(len(examples)), k=config.samples)
        for name, images in (("sampling", [examples[i].image for i in chosen]),
                             ("decode alone", [memory[i % len(memory)] for i in chosen])):
            started = time.process_time()
            for image in images:
                open_image(image)
            seconds = time.process_time() - started
            print(f"{name:13s}{len(images) / seconds:6.0f} images/s")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
