"""Small copies of pictures, for the report page."""

import hashlib
import re
from io import BytesIO
from pathlib import Path

from data.examples import ImageSource
from data.images import open_image
from data.io import write_whole

SHOWN_GROUPS = 16
"""Groups of a step, the first of it, that have thumbnails and captions on the report page."""

THUMBNAIL_SIZE = 256
"""Longest side in pixels; about 8 kB as WebP."""


def thumbnail_file(source: Path, id: str) -> Path:
    """Path of the thumbnail of the image `id`. A run folder has them in thumbnails/, an
    evaluation's NAME.jsonl has them beside it in NAME.thumbnails/.

    An id may be any text: its plain characters make the name, its hash makes the name unique.
    """
    is_evaluation = source.suffix == ".jsonl"
    folder = source.with_suffix(".thumbnails") if is_evaluation else source / "thumbnails"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", id)[:60]
    digest = hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return folder / f"{plain}-{digest}.webp"


def keep_thumbnail(source: Path, id: str, image: ImageSource) -> None:
    """Writes the thumbnail of the image `id`, unless it is there. source: a run's folder or an
    evaluation's file."""
    path = thumbnail_file(source, id)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture, file = open_image(image), BytesIO()
        picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        picture.save(file, format="WEBP", quality=80)
        write_whole(path, file.getvalue())
