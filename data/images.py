"""Images into memory: one place that opens them, so that one sentence names the file that does not open."""

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

MAX_PIXELS = 100_000_000
"""As RGB that is 300 MB. A larger one is more often an attack (a few kB of PNG can hold a billion pixels) than a picture."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

MAX_ASPECT_RATIO = 200
"""Longer over shorter side; what the image processors of Qwen's models accept."""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, ArithmeticError, LookupError, struct.error, zlib.error,
          MemoryError, Image.DecompressionBombError)
"""What Pillow's decoders raise on broken files, each their own: SyntaxError for PNG, struct.error for EXIF and TIFF, ..."""


@dataclass(frozen=True)
class StoredImage:
    """A picture inside a larger file (a row of a parquet file, a member of a tar file), read when it is needed."""

    name: str
    """How messages and records call it: "train-00000.parquet row 17"."""
    read: Callable[[], bytes]


ImageSource = Path | StoredImage | Image.Image
"""A file, a picture inside one, or one in memory."""


def open_image(image: ImageSource) -> Image.Image:
    """The picture as 8-bit RGB: turned the way its EXIF orientation says, on white where it is transparent, the first one where
    it moves. Raises ValueError, naming it, if it cannot be read, has over MAX_PIXELS or is over MAX_ASPECT_RATIO."""
    opened = _open(image)
    try:
        opened.load()
        if opened is not image:  # one in memory is the caller's
            with suppress(*BROKEN):  # a picture with a broken EXIF block is still a picture
                ImageOps.exif_transpose(opened, in_place=True)
        return _to_rgb(opened)
    except BROKEN as error:
        raise _unreadable(image, error) from None


def image_size(image: ImageSource) -> tuple[int, int]:
    """Width and height in pixels, before turning, from the file's head alone: a turned picture takes as many tokens. Raises as
    `open_image` does, for what the head can tell."""
    return _open(image).size


def _open(image: ImageSource) -> Image.Image:
    """Pillow's image, of which only the head has been read."""
    if isinstance(image, StoredImage):
        try:
            data = image.read()
        except OSError as error:
            raise _unreadable(image, error) from None
    elif isinstance(image, Path):
        data = image
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(BytesIO(data) if isinstance(data, bytes) else data)
        width, height = opened.size
    except FileNotFoundError:
        raise ValueError(f"{image_name(image)}: expected an image, found nothing") from None
    except BROKEN as error:
        raise _unreadable(image, error) from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image_name(image)}: expected at most {MAX_PIXELS} pixels, got {width} x {height}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{image_name(image)}: expected sides of at most {MAX_ASPECT_RATIO} to 1, got {width} x {height}")
    return opened


def _unreadable(image: ImageSource, error: BaseException) -> ValueError:
    said = str(error).replace("\n", " ") or type(error).__name__
    return ValueError(f"{image_name(image)}: expected an image that Pillow can read ({said})")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut off at 255: a white picture
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # no common white: from its own darkest to its brightest
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        low, span = values.min(), np.ptp(values) or 1.0
        return Image.fromarray(((values - low) / span * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def image_name(image: ImageSource) -> str:
    """How a message calls it."""
    return str(image) if isinstance(image, Path) else image.name if isinstance(image, StoredImage) else "an image in memory"


def image_bytes(image: ImageSource) -> bytes:
    """The file as it is; of an image in memory, a PNG."""
    if isinstance(image, Image.Image):
        image.save(into := BytesIO(), "PNG")
        return into.getvalue()
    return image.read_bytes() if isinstance(image, Path) else image.read()


def list_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted by path. Raises ValueError where there is none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
    return paths


def image_path(root: Path, written: str) -> Path:
    """The file that a row means by `written`, below `root`.

    Raises ValueError for one that names a place outside `root`, and where no file is. Links inside `root` are followed:
    whoever made them decided so.
    """
    name = written.replace("\\", "/")
    absolute = name.startswith("/")
    path = Path(name) if absolute else root / name
    inside = path.is_relative_to(root.absolute()) if absolute else True
    parts = PurePosixPath(name).parts
    if not inside or ".." in parts or "\0" in name or (parts and parts[0].endswith(":")):
        raise ValueError(f"image {written!r}: expected a path below {root}")
    try:
        found = path.is_file()
    except OSError:  # a name too long for the system
        found = False
    if not found:
        raise ValueError(f"image {path}: expected a file, found nothing")
    return path
