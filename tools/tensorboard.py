"""The numbers of a run for TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from tools.thumbnails import thumbnail_file
from tools.tracker import finite

NUM_GROUPS = 2
"""Groups whose image and captions are written, whenever the audit looks at the probe set and at the
first step."""


class TensorBoard:
    """Writes RUN/tensorboard. Steps from `first_step` on, which a killed run may have written, are
    hidden by what is written now."""

    def __init__(self, run_dir: Path, first_step: int):
        self.run_dir = run_dir
        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=first_step)

    def __call__(self, step: int, logs: dict[str, dict], rollouts: list[dict]) -> None:
        """The step's numbers, and now and then a few groups: image, captions and rewards. What was
        not measured is left out."""
        for key, value in finite(logs).items():
            self.writer.add_scalar(key, value, step)
        if step == 0 or "probe_accuracy" in logs.get("audit", ()):
            ids = list(dict.fromkeys(row["id"] for row in rollouts))[:NUM_GROUPS]
            for place, id in enumerate(ids):
                group = [row for row in rollouts if row["id"] == id]
                self._write_group(place, id, group, step)
        self.writer.flush()

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
