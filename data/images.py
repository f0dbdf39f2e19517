"""Images into memory: one place that opens them, so that one sentence names the file that does not open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


@dataclass(frozen=True)
class StoredImage:
    """A picture inside a larger file (a row of a parquet file, a member of a tar file), read when it is needed."""

    name: str
    """How messages and records call it: "train-00000.parquet row 17"."""
    read: Callable[[], bytes]


ImageSource = Path | StoredImage | Image.Image
"""A file, a picture inside one, or one in memory."""


def open_image(image: ImageSource) -> Image.Image:
    """The picture as RGB, turned the way its EXIF orientation says. Raises ValueError if it cannot be read."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with _opened(image) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def image_size(image: ImageSource) -> tuple[int, int]:
    """Width and height in pixels, before turning, from the file's head alone. Raises ValueError if it cannot be read."""
    if isinstance(image, Image.Image):
        return image.size
    with _opened(image) as opened:
        return opened.size


@contextmanager
def _opened(image: Path | StoredImage) -> Iterator[Image.Image]:
    name = image.name if isinstance(image, StoredImage) else image
    try:
        with Image.open(BytesIO(image.read()) if isinstance(image, StoredImage) else image) as opened:
            yield opened
    except FileNotFoundError:
        raise ValueError(f"{name}: expected an image, found nothing") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises SyntaxError on a broken PNG
        raise ValueError(f"{name}: expected an image that Pillow can read ({error})") from None


def list_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted by path. Raises ValueError where there is none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
    return paths
