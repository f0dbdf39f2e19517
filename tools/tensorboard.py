"""The numbers of a run for TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from tools.thumbnails import thumbnail_file

NUM_GROUPS = 2
"""Groups whose image and captions are written."""


class TensorBoard:
    """Writes RUN/tensorboard. Steps from `first_step` on, which a killed run may have written, are
    hidden by what is written now."""

    def begin(self, run_dir: Path, settings: dict, first_step: int) -> None:
        self.run_dir = run_dir
        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=first_step)

    def __call__(self, step: int, numbers: dict[str, float], rollouts: list[dict]) -> None:
        """The step's numbers, and a few groups of these rollouts: image, captions and rewards."""
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        for place, id in enumerate(list(dict.fromkeys(row["id"] for row in rollouts))[:NUM_GROUPS]):
            group = [row for row in rollouts if row["id"] == id]
            self._write_group(place, id, group, step)
        self.writer.flush()

    def finish(self, *_) -> None:
        self.writer.close()

    def _write_group(self, place: int, id: str, group: list[dict], step: int) -> None:
        file = thumbnail_file(self.run_dir, id)
        if file.exists():
            pixels = np.array(Image.open(file).convert("RGB"))
            self.writer.add_image(f"image/{place}", pixels, step, dataformats="HWC")
        # Indented by four: Markdown shows the words as they are, whatever the policy wrote.
        lines = [f"    {id}"]
        for row in group:
            lines.append(f"    reward {row['reward']:.2f}  {' '.join(row['caption'].split())}")
        self.writer.add_text(f"captions/{place}", "\n".join(lines), step)
