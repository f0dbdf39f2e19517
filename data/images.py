"""Images into memory: one place that opens them, so that one sentence names the file that does not open."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def open_image(image: Path | Image.Image) -> Image.Image:
    """The picture as RGB, turned the way its EXIF orientation says. Raises ValueError if it cannot be read."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with _readable(image), Image.open(image) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: expected an image, found nothing") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises SyntaxError on a broken PNG
        raise ValueError(f"{path}: expected an image that Pillow can read ({error})") from None


def image_size(image: Path | Image.Image) -> tuple[int, int]:
    """Width and height in pixels, before turning, from the file's head alone. Raises ValueError if it cannot be read."""
    if isinstance(image, Image.Image):
        return image.size
    with _readable(image), Image.open(image) as opened:
        return opened.size


def list_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted by path. Raises ValueError where there is none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
    return paths
