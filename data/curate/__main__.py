"""Training sets out of images: images chosen, questions written on them, questions filtered.

Three commands, in this order:

    python -m data.curate images   --images photos --out chosen
    python -m data.curate generate --images chosen/examples.jsonl \\
        --model Qwen/Qwen2.5-VL-7B-Instruct --out written
    python -m data.curate filter   --data written/examples.jsonl \\
        --model Qwen/Qwen2.5-VL-7B-Instruct --out set
    python train.py --data set/examples.jsonl

Each runs under torchrun too (`torchrun --nproc-per-node 8 -m data.curate ...`). Each may be stopped
in any way and started again, see data/curate/work.py.
"""

from pathlib import Path

import tyro

from data.curate.filter import FilterConfig, filter_questions
from data.curate.generate import GenerateConfig, generate
from data.curate.images import ImagesConfig, choose_images
from data.export import check_not_source
from data.io import check_room, naming
from data.program import run_program

COMMANDS = {
    "images": (ImagesConfig, choose_images),
    "generate": (GenerateConfig, generate),
    "filter": (FilterConfig, filter_questions),
}


def main(arguments: list[str]) -> None:
    configs = {name: config for name, (config, _) in COMMANDS.items()}
    config = tyro.extras.subcommand_cli_from_dict(configs, args=arguments)
    for name in ("images", "data", "out"):  # pathlib takes an empty one for the working directory
        if getattr(config, name, None) == "":
            raise ValueError(f"{name}: expected a path, got an empty text")
    with naming(Path(config.out)):
        check_room(Path(config.out))
        is_filter = isinstance(config, FilterConfig)
        check_not_source(Path(config.out), config.data if is_filter else config.images)
        dict(COMMANDS.values())[type(config)](config)


if __name__ == "__main__":
    run_program(main)
