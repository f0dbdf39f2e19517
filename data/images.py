"""Images into memory: one place that opens them, so that one sentence names the file that does not open."""

import hashlib
import logging
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

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
"""What is opened, by Pillow's names, and the endings by which pictures are looked for in folders.
Pillow knows more: some of it is no pictures, and EPS would start another program, Ghostscript."""
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

MAX_PIXELS = 100_000_000
"""In Pillow an RGB picture of these is 400 MB, and twice that while it is made. A larger one is
more often an attack (a few kB of PNG can hold a billion pixels) than a picture."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

FEWER_PIXELS = {
    "WEBP": 50_000_000,
    "AVIF": 60_000_000,
    "JPEG2000": 30_000_000,
    "progressive JPEG": 75_000_000,
}
"""Of formats whose decoders hold 10 to 26 bytes for each pixel, so that none needs over 1 GB."""

MAX_ASPECT_RATIO = 200
"""Longer over shorter side; what the image processors of Qwen's models accept."""

STRIP_PIXELS = 1 << 20
"""Pixels that are converted at a time: no step of it needs the memory of a whole picture."""

# A picture opens, or a sentence says why not. What else Pillow says would be a line for each one.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class StoredImage:
    """A picture inside a larger file (a row of a parquet file, a member of a tar file), read when it is needed."""

    name: str
    """How messages and records call it: "train-00000.parquet row 17"."""
    read: Callable[[], bytes]


ImageSource = Path | StoredImage | Image.Image
"""A file, a picture inside one, or one in memory."""


def open_image(image: ImageSource) -> Image.Image:
    """The picture as 8-bit RGB: turned the way its EXIF orientation says, on white where it shows
    nothing, the first one where it moves; of more than 8 bits as `_tone_range` says; CMYK by its
    colour profile.

    Raises ValueError, naming it, if it cannot be read, has too many pixels (MAX_PIXELS,
    FEWER_PIXELS) or is over MAX_ASPECT_RATIO.
    """
    opened = _open(image)
    with _decoding(image):
        tile = next(iter(getattr(opened, "tile", ())), None)  # how the file has the pixels
        opened.load()
        box = (0, 0, *opened.size)
        if tile and opened.format == "GIF":
            box = tile.extents  # Pillow fills the canvas around it with any colour
        if tile and opened.format == "PNG" and tile.args in TRNS_SCALE:
            _scale_transparency_(opened.info, TRNS_SCALE[tile.args])
        if opened is not image:  # one in memory is the caller's
            # A picture with a broken EXIF block is still a picture.
            with suppress(ValueError), _decoding(image):
                ImageOps.exif_transpose(opened, in_place=True)
        return _to_rgb(opened, box)


def image_size(image: ImageSource) -> tuple[int, int]:
    """Width and height in pixels, before turning, from the file's head alone: a turned picture takes as many tokens. Raises as
    `open_image` does, for what the head can tell."""
    return _open(image).size


def seen_otherwise(image: ImageSource) -> str:
    """Why a program that only calls Pillow's `convert("RGB")`, as trainers do, sees another picture
    than `open_image` gives: "turned by EXIF", "other tones", "transparent"; or empty. From the
    file's head alone. Raises as `image_size` does."""
    opened = _open(image)
    with _decoding(image):
        if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return "turned by EXIF"
        if opened.mode[0] in "IF" or opened.mode in ("CMYK", "LAB"):
            return "other tones"
        return "transparent" if opened.has_transparency_data else ""


def _open(image: ImageSource) -> Image.Image:
    """Pillow's image, of which only the head has been read."""
    name, file = image_name(image), image
    if isinstance(image, StoredImage):
        try:
            file = BytesIO(image.read())
        except OSError as error:
            raise _unreadable(image, str(error)) from None
    with _decoding(image):
        if isinstance(file, Path) and not file.is_file():
            raise FileNotFoundError  # a folder, or a pipe, which would be waited for
        opened = file if isinstance(file, Image.Image) else Image.open(file, formats=list(FORMATS))
        width, height = opened.size
    kind = "progressive JPEG" if "progressive" in opened.info else opened.format
    if width * height > (most := FEWER_PIXELS.get(kind, MAX_PIXELS)):
        pixels = f"pixels of {kind}" if kind in FEWER_PIXELS else "pixels"
        raise ValueError(f"{name}: expected at most {most} {pixels}, got {width} x {height}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        ratio = f"{MAX_ASPECT_RATIO} to 1"
        raise ValueError(f"{name}: expected sides of at most {ratio}, got {width} x {height}")
    return opened


@contextmanager
def _decoding(image: ImageSource) -> Iterator[None]:
    """Makes whatever is raised inside one sentence with the picture's name, the same in every run.

    The one place that catches every Exception. What a decoder raises on a broken file is promised
    nowhere (RuntimeError, NotImplementedError, struct.error, MemoryError, ...), and each release of
    Pillow adds to it. From a list of them one is always missing, and it ends a run of a million.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{image_name(image)}: expected an image, found nothing") from None
    except UnidentifiedImageError:  # its text has the address of a buffer
        raise _unreadable(image, f"it begins as none of {', '.join(FORMATS)}") from None
    except Exception as error:
        said = re.sub(" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__
        raise _unreadable(image, said) from None


def _unreadable(image: ImageSource, said: str) -> ValueError:
    said = said.replace("\n", " ")
    return ValueError(f"{image_name(image)}: expected an image that Pillow can read ({said})")


TRNS_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""What Pillow has multiplied a PNG's pixels by, from their form in the file to 8 bits, but not the
colour that is written as transparent."""


def _scale_transparency_(info: dict, scale: float) -> None:
    color = info.get("transparency")
    if isinstance(color, int):
        info["transparency"] = int(color * scale)
    elif isinstance(color, tuple):
        info["transparency"] = tuple(int(value * scale) for value in color)


def _to_rgb(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """What `image` shows within `box`, on white."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.convert("RGB")
    convert, rgb = _converter(image), Image.new("RGB", image.size, "white")
    left, top, right, bottom = box
    rows = max(1, STRIP_PIXELS // max(1, right - left))
    for start in range(top, bottom, rows):
        strip = (left, start, right, min(start + rows, bottom))
        piece = convert(image.crop(strip))
        rgb.paste(piece, strip, piece if piece.mode == "RGBA" else None)
    return rgb


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """From a strip of `image` to 8 bits of grey, RGB or RGBA."""
    if image.mode[0] in "IF":
        return _tones(image)
    if image.mode in ("CMYK", "LAB"):
        profile = ImageCms.createProfile("LAB")
        if image.mode == "CMYK":
            profile = BytesIO(image.info.get("icc_profile") or b"")
        with suppress(ImageCms.PyCMSError):  # without a profile of CMYK, by Pillow's formula
            screen = ImageCms.createProfile("sRGB")
            to_rgb = ImageCms.buildTransform(profile, screen, image.mode, "RGB")
            return lambda strip: ImageCms.applyTransform(strip, to_rgb)
    if image.mode == "La":  # Pillow would leave its transparency out
        return lambda strip: strip.convert("LA").convert("RGBA")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.format in ("BMP", "TGA") and image.mode == "RGBA":
        # 32 bits for 24 bits of colour: most programs leave the rest at 0 everywhere.
        mode = "RGBA" if image.getchannel("A").getbbox() else "RGB"
    return lambda strip: strip.convert(mode)


def _tones(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """From a strip of `image`, of more than 8 bits, to 8 bits of grey."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    transparent = image.info.get("transparency")  # a PNG's
    low, high = _tone_range(image, tags, transparent)
    # Half the time of float64, and exact to 0.02 of a tone where the range is no sliver far from 0.
    is_wide = max(abs(low), abs(high)) < 1000 * (high - low)
    dtype = np.float32 if image.mode == "F" or is_wide else np.float64

    def convert(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        tones = np.clip(values.astype(dtype, copy=False), low, high)
        tones -= low
        tones *= 255 / (high - low)
        np.nan_to_num(tones, copy=False)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            tones = 255 - tones  # white is 0: Pillow turns pictures of 8 bits only
        if transparent is not None:
            tones[values == transparent] = 255
        return Image.fromarray(tones.round(out=tones).astype(np.uint8))

    return convert


GDAL_NODATA, MAX_SAMPLE_VALUE = 42113, 281
"""TIFF tags that Pillow has no names for."""


def _tone_range(image: Image.Image, tags: Mapping, transparent: int | None) -> tuple[float, float]:
    """The values of `image` that become black and white.

    Whole numbers from 0 to 65535: 0, and the most that the bits can hold. The bits are those that
    a TIFF declares, if fewer than 16; else those in use: 1 (a mask), or an even number, as cameras
    and scanners have 10, 12 or 14. So a dark picture stays dark.
    Other numbers have no common white: from their own darkest to their brightest, without what
    stands for no value: not finite, beyond 1e30, GDAL's nodata, or far from all the others.
    """
    step = max(1, math.isqrt(image.width * image.height // STRIP_PIXELS))
    size = (-(-image.width // step), -(-image.height // step))
    values = np.asarray(image.resize(size, Image.Resampling.NEAREST)).astype(np.float64)
    values = values[np.isfinite(values) & (np.abs(values) < 1e30) & (values != transparent)]
    with suppress(ValueError):
        nodata = float(str(tags.get(GDAL_NODATA)).strip(" \0"))
        values = values[~np.isclose(values, nodata)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high < 1 << 16:
        bits = int(np.max(tags.get(TiffImagePlugin.BITSPERSAMPLE, 16)))
        declared = int(np.max(tags.get(MAX_SAMPLE_VALUE, 0))) or (1 << bits) - 1
        if high <= declared < (1 << 16) - 1:
            return 0.0, float(declared)
        used = int(high).bit_length()
        return 0.0, float((1 << max(1, used + used % 2 * (used > 1))) - 1)
    inner = values[(values > low) & (values < high)]
    if inner.size and (span := np.ptp(inner)):
        if low < 0 and inner.min() - low > span:  # -9999 below heights from 0 to 4000
            low = float(inner.min())
        if high - inner.max() > 10 * span:
            high = float(inner.max())
    first, last = np.percentile(values[(values >= low) & (values <= high)], (1, 99))
    if last > first:  # a few hot pixels shall not make the rest black
        low, high = max(low, 2 * first - last), min(high, 2 * last - first)
    return low, high if high > low else low + 1


def image_name(image: ImageSource) -> str:
    """How a message calls it."""
    if isinstance(image, Path):
        return printable(str(image))
    return image.name if isinstance(image, StoredImage) else "an image in memory"


def printable(name: str) -> str:
    r"""`name`, what of it is not UTF-8 written like caf\xe9.png: rows and messages are UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def image_bytes(image: ImageSource) -> bytes:
    """The file as it is; of an image in memory, a PNG."""
    if isinstance(image, Image.Image):
        image.save(into := BytesIO(), "PNG")
        return into.getvalue()
    return image.read_bytes() if isinstance(image, Path) else image.read()


def picture_hash(image: ImageSource) -> str:
    """What makes it this picture and no other: SHA-256 of the file's bytes, of one in memory of its pixels, in 64 digits.
    Raises ValueError or OSError where it cannot be read."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
    return hashlib.sha256(image_bytes(image)).hexdigest()


def list_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, as `list_files` finds them. Raises ValueError for none."""
    paths = list_files(folder, IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
    return paths


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files below `folder` with one of these endings, in capitals or not, sorted by path.

    Hidden folders are searched too, and linked ones: each folder once, as itself where it is below
    `folder`. What is left out is counted by its ending on stderr: nothing is left out in silence.
    Raises ValueError for a folder that cannot be read.
    """
    paths: list[Path] = []
    left_out, odd_name = Counter(), ""
    waiting, links, seen = [folder], [], set()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        try:
            if (key := ((stat := here.stat()).st_dev, stat.st_ino)) in seen:
                continue
            seen.add(key)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            said = f"expected a folder that can be read ({error.strerror})"
            raise ValueError(f"{printable(str(here))}: {said}") from None
        for entry in entries:
            path, is_link = here / entry.name, entry.is_symlink()
            target = path if is_link else entry  # an entry raises where a link leads to itself
            if target.is_dir():
                (links if is_link else waiting).append(path)
            elif entry.name.startswith("._"):
                left_out["._* of macOS"] += 1
            elif not (target.is_file() or (is_link and not path.exists())):
                left_out["neither file nor folder"] += 1
            elif path.suffix.lower() not in suffixes:
                left_out[printable(path.suffix.lower()) or "without ending"] += 1
            elif printable(name := path.relative_to(folder).as_posix()) != name:
                odd_name = odd_name or f"not named in UTF-8 like {printable(name)}"
                left_out[odd_name] += 1
            else:  # a link that leads nowhere too: it is named when it is opened
                paths.append(path)
    if os.environ.get("RANK", "0") == "0":  # each of torchrun's workers lists the same
        print_left_out(folder, left_out)
    return sorted(paths)


def print_left_out(source: Path, left_out: Counter) -> None:
    """One line on stderr, unless nothing was left out."""
    if left_out:
        counts = [f"{number} {kind}" for kind, number in left_out.most_common(12)]
        counts += ["..."] if len(left_out) > len(counts) else []
        print(f"{printable(str(source))}: left out: {', '.join(counts)}", file=sys.stderr)


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
