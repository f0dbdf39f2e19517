"""Images into memory: the one place that opens them, and that names the file that does not open."""

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

from data.examples import ImageSource, StoredImage
from data.io import POINTER, is_pointer, short

FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga",),
}
"""The formats that are opened, by Pillow's names, and the endings of their files in folders.
Pillow knows more: some of them are no pictures, and EPS would start a program, Ghostscript."""
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

MAX_PIXELS = 100_000_000
"""An RGB picture of this size takes 400 MB in Pillow, and twice that while it is made. A larger one
is more often an attack than a picture. A few kB of PNG can hold a billion pixels."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

FEWER_PIXELS = {
    "WEBP": 50_000_000,
    "AVIF": 60_000_000,
    "JPEG2000": 30_000_000,
    "progressive JPEG": 75_000_000,
    "LAB": 40_000_000,
    "bmp_rle": 7_000_000,
    "ppm": 3_500_000,
    "ppm_plain": 2_500_000,
}
"""Most pixels of formats that take 10 to 26 bytes for each while they are decoded, or, as LAB, 70
ns. Or 0.4 to 1.7 µs, as the last three, which are decoders of Pillow in Python: of BMP in runs, of
PPM that is neither of 8 bits nor grey of 16, and of PPM in decimal digits. So no picture needs over
1 GB or 6 s."""

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side: the most that the image processors of Qwen's models accept."""

# A picture opens, or a sentence says why not. Pillow's own warnings would add a line for each.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def open_image(image: ImageSource) -> Image.Image:
    """The picture as 8-bit RGB, turned as its EXIF orientation says, on white where it is
    transparent. Of several frames it is the first. More than 8 bits become 8 as `tone_range` in
    data/tones.py says, CMYK becomes RGB by its colour profile.

    Raises ValueError, naming it, if it cannot be read, has too many pixels (MAX_PIXELS,
    FEWER_PIXELS) or is over MAX_ASPECT_RATIO.
    """
    opened = read_head(image)
    with decoding(image):
        tile = next(iter(getattr(opened, "tile", ())), None)  # how the file stores the pixels
        opened.load()
        if opened is not image:  # a picture in memory is the caller's: not changed
            # A picture with a broken EXIF block is still a picture.
            with suppress(ValueError), decoding(image):
                ImageOps.exif_transpose(opened, in_place=True)
        if opened.mode == "RGB" and not opened.has_transparency_data:
            return opened.convert("RGB")
        from data.tones import to_rgb  # here: most pictures are plain RGB and do not need it

        return to_rgb(opened, tile)


def image_size(image: ImageSource) -> tuple[int, int]:
    """Width and height in pixels before turning, from the file's head alone: a turned picture takes
    as many tokens. Raises as `open_image` does, for what the head can tell."""
    return read_head(image).size


def read_head(image: ImageSource) -> Image.Image:
    """Pillow's image, of which only the head has been read."""
    name, file = image_name(image), image
    if isinstance(image, StoredImage):
        try:
            file = BytesIO(image.read())
        except OSError as error:
            raise _unreadable(image, str(error)) from None
    with decoding(image):
        if isinstance(file, Path) and not file.is_file():
            raise FileNotFoundError  # a folder, or a pipe, which would be waited for
        opened = file if isinstance(file, Image.Image) else Image.open(file, formats=list(FORMATS))
        width, height = opened.size
    kind = "progressive JPEG" if "progressive" in opened.info else opened.format
    kind = "LAB" if opened.mode == "LAB" else kind
    decoder = next((tile[0] for tile in getattr(opened, "tile", ())), None)
    kind = decoder if decoder in FEWER_PIXELS else kind
    most = FEWER_PIXELS.get(kind, MAX_PIXELS)
    if width * height > most:
        pixels = f"pixels of {kind}" if kind in FEWER_PIXELS else "pixels"
        raise ValueError(f"{name}: expected at most {most} {pixels}, got {width} x {height}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        ratio = f"{MAX_ASPECT_RATIO} to 1"
        raise ValueError(f"{name}: expected sides of at most {ratio}, got {width} x {height}")
    return opened


@contextmanager
def decoding(image: ImageSource) -> Iterator[None]:
    """Turns whatever is raised inside into a ValueError: a sentence with the picture's name, the
    same in every run.

    Every Exception: no document says what a decoder may raise on a broken file, and releases of
    Pillow add to it. They raise RuntimeError, NotImplementedError, struct.error, MemoryError and
    more. A list would miss some, and one picture would end a run of a million.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{image_name(image)}: expected an image, found nothing") from None
    except UnidentifiedImageError:  # its text holds an address in memory
        is_left = isinstance(image, Path) and is_pointer(image)
        begins = f"it begins as none of {', '.join(FORMATS)}"
        raise _unreadable(image, f"found {POINTER}" if is_left else begins) from None
    except Exception as error:
        said = getattr(error, "strerror", None) or str(error)  # the first without the file's name
        said = re.sub(" at 0x[0-9a-f]+", "", said) or type(error).__name__
        raise _unreadable(image, said) from None


def _unreadable(image: ImageSource, said: str) -> ValueError:
    said = said.replace("\n", " ")
    return ValueError(f"{image_name(image)}: expected an image that Pillow can read ({said})")


def image_name(image: ImageSource) -> str:
    """How messages call the image: by its path, unless a picture in base64 stands there."""
    if isinstance(image, Path):
        name = printable(str(image))
        return name if len(name) < 1024 else short(name)
    return image.name if isinstance(image, StoredImage) else "an image in memory"


def printable(name: str) -> str:
    r"""The name as UTF-8, for rows and messages: other bytes are written like caf\xe9.png."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def image_bytes(image: ImageSource) -> bytes:
    """The bytes of the file; of an image in memory, of a PNG."""
    if isinstance(image, Image.Image):
        image.save(into := BytesIO(), "PNG")
        return into.getvalue()
    return image.read_bytes() if isinstance(image, Path) else image.read()


def picture_hash(image: ImageSource) -> str:
    """SHA-256 in 64 digits: of the file's bytes, or of the pixels of an image in memory. Raises
    ValueError or OSError where it cannot be read."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
    return hashlib.sha256(image_bytes(image)).hexdigest()


def image_path(root: Path, written: str) -> Path:
    """The file that a row means by `written`, below `root`.

    Raises ValueError for a path outside `root`, and where no file is. Links inside `root` are
    followed: the owner of the folder made them.
    """
    name = written.replace("\\", "/")
    absolute = name.startswith("/")
    path = Path(name) if absolute else root / name
    inside = path.is_relative_to(root.absolute()) if absolute else True
    parts = PurePosixPath(name).parts
    if not inside or ".." in parts or "\0" in name or (parts and parts[0].endswith(":")):
        raise ValueError(f"image {short(written)}: expected a path below {root}")
    if not os.path.isfile(path):  # Path's own raises for a name that is too long
        raise ValueError(f"image {image_name(path)}: expected a file, found nothing")
    return path
