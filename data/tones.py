"""Pictures that are not plain RGB, made so as a person sees them."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from data.examples import ImageSource
from data.images import decoding, read_head

STRIP_PIXELS = 1 << 20
"""Pixels that are converted at a time, so that no step needs memory for a whole picture more."""


def seen_otherwise(image: ImageSource) -> str:
    """Why trainers see another picture than `open_image` gives: "turned by EXIF", "other tones" or
    "transparent"; empty if they do not. Trainers only call Pillow's `convert("RGB")`. From the
    file's head alone. Raises as `image_size` does."""
    opened = read_head(image)
    with decoding(image):
        if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return "turned by EXIF"
        if opened.mode[0] in "IF" or opened.mode in ("CMYK", "LAB"):
            return "other tones"
        return "transparent" if opened.has_transparency_data else ""


TRNS_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""The factor by which Pillow scales a PNG's pixels to 8 bits, by their form in the file. It leaves
the colour that stands for transparent unscaled."""


def _scale_transparency_(info: dict, scale: float) -> None:
    color = info.get("transparency")
    if isinstance(color, int):
        info["transparency"] = int(color * scale)
    elif isinstance(color, tuple):
        info["transparency"] = tuple(int(value * scale) for value in color)


def to_rgb(image: Image.Image, tile: Any) -> Image.Image:
    """The image on white. tile: how its file stores the pixels, as Pillow says before they are
    read. None for an image in memory."""
    box = (0, 0, *image.size)
    if tile and image.format == "GIF":
        box = tile.extents  # around it Pillow fills the canvas with an arbitrary colour
    if tile and image.format == "PNG" and tile.args in TRNS_SCALE:
        _scale_transparency_(image.info, TRNS_SCALE[tile.args])
    convert, rgb = _converter(image), Image.new("RGB", image.size, "white")
    left, top, right, bottom = box
    rows = max(1, STRIP_PIXELS // max(1, right - left))
    for start in range(top, bottom, rows):
        strip = (left, start, right, min(start + rows, bottom))
        piece = convert(image.crop(strip))
        rgb.paste(piece, strip, piece if piece.mode == "RGBA" else None)
    return rgb


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that makes 8 bits of grey, RGB or RGBA from a strip of `image`."""
    if image.mode[0] in "IF":
        return _tones(image)
    if image.mode in ("CMYK", "LAB"):
        profile = ImageCms.createProfile("LAB")
        if image.mode == "CMYK":
            profile = BytesIO(image.info.get("icc_profile") or b"")
        with suppress(ImageCms.PyCMSError):  # without a CMYK profile: Pillow's formula, below
            screen = ImageCms.createProfile("sRGB")
            to_rgb = ImageCms.buildTransform(profile, screen, image.mode, "RGB")
            return lambda strip: ImageCms.applyTransform(strip, to_rgb)
    if image.mode == "La":  # Pillow's conversion to RGBA would drop its transparency
        return lambda strip: strip.convert("LA").convert("RGBA")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.format in ("BMP", "TGA") and image.mode == "RGBA":
        # 32 bits for 24 bits of colour: most programs leave the rest at 0 everywhere.
        mode = "RGBA" if image.getchannel("A").getbbox() else "RGB"
    return lambda strip: strip.convert(mode)


def _tones(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """A function that makes 8 bits of grey from a strip of `image`, which has more than 8."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    transparent = image.info.get("transparency")  # a PNG's
    low, high = tone_range(image, tags, transparent)
    # float32 takes half the time of float64. It is exact to 0.02 of a tone, unless the range is
    # narrow and far from 0.
    is_wide = max(abs(low), abs(high)) < 1000 * (high - low)
    dtype = np.float32 if image.mode == "F" or is_wide else np.float64

    def convert(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        tones = np.clip(values.astype(dtype, copy=False), low, high)
        tones -= low
        tones *= 255 / (high - low)
        np.nan_to_num(tones, copy=False)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            tones = 255 - tones  # 0 is white here: Pillow inverts pictures of 8 bits only
        if transparent is not None:
            tones[values == transparent] = 255
        return Image.fromarray(tones.round(out=tones).astype(np.uint8))

    return convert


GDAL_NODATA, MAX_SAMPLE_VALUE = 42113, 281
"""TIFF tags that Pillow has no names for."""


def tone_range(image: Image.Image, tags: Mapping, transparent: int | None) -> tuple[float, float]:
    """The values of `image` that become black and white.

    Whole numbers from 0 to 65535: black is 0, white the most that the bits can hold. So a dark
    picture stays dark. The bits are those that a TIFF declares, if fewer than 16. Else they are
    those in use: 1 (a mask), or an even number. Cameras and scanners have 10, 12 or 14. Other
    numbers have no common white. Their black and white are their darkest and brightest value. Some
    numbers stand for no value and do not count: not finite, beyond 1e30, GDAL's nodata, or far from
    all the others.
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
    span = np.ptp(inner) if inner.size else 0
    if span:
        if low < 0 and inner.min() - low > span:  # -9999 below heights from 0 to 4000
            low = float(inner.min())
        if high - inner.max() > 10 * span:
            high = float(inner.max())
    first, last = np.percentile(values[(values >= low) & (values <= high)], (1, 99))
    if last > first:  # a few very bright pixels shall not make the rest black
        low, high = max(low, 2 * first - last), min(high, 2 * last - first)
    return low, high if high > low else low + 1
