"""Opening pictures: whatever the file, RGB or one sentence that names it."""

import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, TiffImagePlugin

from data.examples import StoredImage
from data.folders import list_files, print_left_out
from data.images import FEWER_PIXELS, FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, image_path, image_size, open_image
from data.tones import seen_otherwise


def stored(image: Image.Image, format: str = "PNG", **options) -> StoredImage:
    image.save(into := BytesIO(), format, **options)
    return StoredImage("x", into.getvalue)


def pixel(image) -> tuple[int, int, int]:
    return open_image(image).getpixel((0, 0))


@pytest.mark.parametrize("mode, color", [("RGBA", (255, 0, 0, 9)), ("P", 3), ("L", 80), ("CMYK", (9, 9, 9, 9)), ("I;16", 999)])
def test_any_kind_of_picture_becomes_rgb(tmp_path, mode, color):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (30, 20), color).save(path)
    assert open_image(path).mode == "RGB" and open_image(path).size == (30, 20)


def test_what_is_transparent_is_white():
    assert pixel(stored(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(stored(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == (255, 0, 0)
    assert pixel(stored(Image.new("RGBA", (4, 4), (0, 0, 0, 51)))) == (204, 204, 204)  # 255 * (1 - 51 / 255)
    assert pixel(stored(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert pixel(stored(palette)) == (9, 8, 7) and pixel(stored(palette, transparency=1)) == (255, 255, 255)
    assert pixel(stored(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


def png(size: tuple[int, int], depth: int, color: int, row: bytes, transparent: bytes) -> StoredImage:
    """A PNG of one row, which Pillow itself does not write: few bits, or 16 of each colour."""
    head = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return StoredImage("x", lambda: b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_the_transparent_colour_of_a_png_is_meant_in_its_own_bits():
    two_bits = png((4, 1), 2, 0, bytes([0b00_01_10_11]), struct.pack(">H", 1))
    assert [open_image(two_bits).getpixel((x, 0))[0] for x in range(4)] == [0, 255, 170, 255]
    colors = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 255, 65535)
    deep = png((2, 1), 16, 2, colors, colors[:6])
    assert [open_image(deep).getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]
    gray = png((3, 1), 16, 0, struct.pack(">3H", 0, 7, 65535), struct.pack(">H", 7))
    assert [open_image(gray).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 255]


def tiff(values, dtype, **tags) -> StoredImage:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag.removeprefix("t"))] = value
    return stored(Image.fromarray(np.array([values], dtype=dtype)), "TIFF", tiffinfo=info)


HEIGHTS = [*range(0, 4001, 1000)]


@pytest.mark.parametrize(("image", "tones"), [
    # 16 bits: 256 * 100 + 7 is 99.6 of 255. 20000 uses 15 bits, and stays as dark as it is: 77.8
    (stored(Image.fromarray(np.array([[0, 256 * 100 + 7, 65535]], dtype=np.uint16))), [0, 100, 255]),
    (stored(Image.fromarray(np.array([[0, 20000]], dtype=np.uint16))), [0, 78]),
    # 12 bits in 16 and in 32, 1 bit in 16 (a mask), 8 in 16; 1000 of 4095 is 62.3
    (stored(Image.fromarray(np.array([[0, 1000, 4095]], dtype=np.uint16))), [0, 62, 255]),
    (tiff([0, 1000, 4095], "int32"), [0, 62, 255]),
    (tiff([0, 1000, 4095], ">u2"), [0, 62, 255]),
    (stored(Image.fromarray(np.array([[0, 1, 0]], dtype=np.uint16))), [0, 255, 0]),
    (tiff([0, 255], "uint16"), [0, 255]),
    (tiff([0, 0], "uint16"), [0, 0]),
    # dark, and declared to have 12 bits: 500 of 4095 is 31.1. White is zero: 255 - 62
    (tiff([0, 500], "uint16", t281=4095), [0, 31]),
    (tiff([0, 1000, 4095], "uint16", t262=0), [255, 193, 0]),
    # no common white
    (tiff([-1.0, 0.0, 1.0], "float32"), [0, 128, 255]),
    (tiff([-1000, 0, 3000], "int32"), [0, 64, 255]),
    (tiff([0, 100_000, 200_000], "int32"), [0, 128, 255]),
    (tiff([np.nan] * 2, "float32"), [0, 0]),
    # what stands for no value
    (tiff([-np.inf, 0, 1, 2, np.inf, np.nan], "float32"), [0, 0, 128, 255, 255, 0]),
    (tiff([-3.4028235e38, 0, 1, 2], "float32"), [0, 0, 128, 255]),
    (tiff([-9999, *HEIGHTS], "float32"), [0, 0, 64, 128, 191, 255]),
    (tiff([-9999, *HEIGHTS], "int32"), [0, 0, 64, 128, 191, 255]),
    (tiff([1e20, *HEIGHTS], "float32"), [255, 0, 64, 128, 191, 255]),
    (tiff([9000, *HEIGHTS], "float32", t42113="9000"), [255, 0, 64, 128, 191, 255]),
    (tiff([7e5, *range(150)], "float32"), [255, *(round(n * 255 / 149) for n in range(150))]),
])
def test_more_than_eight_bits_look_as_they_are_meant(image, tones):
    found = np.asarray(open_image(image))[0]
    assert found[:, 0].tolist() == tones and (found[:, :1] == found).all()


def test_padding_is_no_transparency():
    """32-bit BMP and TGA whose fourth byte is 0 everywhere; where it is not, it is meant."""
    for alpha, color in ((0, (200, 20, 10)), (255, (200, 20, 10)), (51, (244, 208, 206))):
        head = struct.pack("<IiiHHIIiiII4I", 56, 1, 1, 1, 32, 3, 4, 0, 0, 0, 0, 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        data = struct.pack("<2sIHHI", b"BM", 74, 0, 0, 70) + head + bytes([10, 20, 200, alpha])
        assert pixel(StoredImage("x", lambda data=data: data)) == color
        assert pixel(stored(Image.new("RGBA", (1, 1), (200, 20, 10, alpha)), "TGA")) == color


def test_a_canvas_that_the_first_frame_leaves_uncovered_is_white():
    data = bytearray(stored(Image.new("P", (2, 2), 1), "GIF").read())
    data[6:10] = struct.pack("<HH", 5, 4)  # the canvas: the frame stays at its left upper corner
    picture = open_image(StoredImage("x", lambda: bytes(data)))
    assert picture.size == (5, 4)
    white = np.asarray(picture).min(axis=2) == 255
    assert not white[:2, :2].any() and white[2:].all() and white[:, 2:].all()


def cmyk_profile() -> bytes:
    """An ICC profile, a table of two steps per ink: cyan is the grey of L* 50, black is black, the others are white."""
    ramp = bytes(range(256))
    table = b"".join(bytes([0 if n % 2 else 128 if n >= 8 else 255, 128, 128]) for n in range(16))
    matrix = struct.pack(">9i", *(65536 * one for one in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    tag = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    size = 128 + 16 + len(tag)
    head = struct.pack(">I4sI4s4s4s12s4s", size, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ", bytes(12), b"acsp")
    head = (head + bytes(28) + d50).ljust(128, b"\0")
    return head + struct.pack(">I4sII", 1, b"A2B0", 144, len(tag)) + tag


def test_cmyk_is_read_by_its_profile_and_lab_by_its_definition():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for format in ("JPEG", "TIFF"):
        gray = pixel(stored(cyan, format, icc_profile=cmyk_profile()))
        assert max(gray) - min(gray) <= 2 and 115 <= gray[0] <= 123  # L* 50 is 119 in sRGB
        for profile in (b"", b"none"):
            assert pixel(stored(cyan, format, icc_profile=profile)) == (0, 255, 255)
    lab = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (255, 128, 128)])
    assert min(pixel(stored(lab, "TIFF"))) > 250


@pytest.mark.parametrize("turn", range(1, 9))
def test_common_pictures_have_the_very_pixels_that_pillow_decodes(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    noise = Image.fromarray(np.random.default_rng(turn).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    for name in ("x.jpg", "x.png", "x.webp"):
        noise.save(tmp_path / name, exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB")
        assert (np.asarray(open_image(tmp_path / name)) == np.asarray(wanted)).all()
        assert seen_otherwise(tmp_path / name) == ("turned by EXIF" if turn > 1 else "")


def test_what_a_trainer_sees_otherwise_is_told_from_the_head():
    assert seen_otherwise(stored(Image.new("L", (4, 4)))) == ""
    assert seen_otherwise(stored(Image.new("LA", (4, 4)))) == "transparent"
    assert seen_otherwise(stored(Image.new("I;16", (4, 4)))) == "other tones"
    assert seen_otherwise(stored(Image.new("CMYK", (4, 4)), "JPEG")) == "other tones"


def test_of_a_moving_picture_the_first_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        red, _, blue = pixel(stored(frames[0], format, save_all=True, append_images=frames[1:]))
        assert red > 240 and blue < 15


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_orientation_is_applied_and_a_broken_one_is_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (20, 30)
    mine = Image.open(tmp_path / "x.jpg")  # in memory it is the caller's, who has turned it or not
    assert open_image(mine).size == mine.size == (30, 20)
    Image.new("RGB", (30, 20)).save(tmp_path / "y.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff no more")
    assert open_image(tmp_path / "y.jpg").size == (30, 20)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("RGB", (300, 200)).save(tmp_path / "whole.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "whole.jpg")
    for suffix, cut in (("png", 40), ("jpg", 400)):
        (tmp_path / f"cut.{suffix}").write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:-cut])
    for name in ("broken.png", "cut.png", "cut.jpg"):
        with pytest.raises(ValueError, match=f"{name}: expected an image that Pillow can read"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"none.png: expected an image, found nothing"):
        open_image(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_bytes_changed_anywhere_give_a_picture_or_a_sentence():
    """Pillow's decoders raise a dozen kinds of errors on broken files; none may get through. The
    sentence is the same in every run: no address of a buffer is in it."""
    rng, picture = np.random.default_rng(0), Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
    for format in FORMATS:
        whole = stored(picture, format).read()
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(len(data), size=4):
                data[place] = rng.integers(256)
            broken = bytes(data[: rng.integers(1, len(data) + 1)])
            try:
                assert open_image(StoredImage("it", lambda broken=broken: broken)).mode == "RGB"
            except ValueError as error:
                assert str(error).startswith("it: expected ") and "\n" not in str(error)
                assert " at 0x" not in str(error)


def test_whatever_a_decoder_raises_becomes_a_sentence(monkeypatch):
    whole = stored(Image.new("RGB", (4, 4)))
    for kind in (RuntimeError, NotImplementedError, KeyError, RecursionError, MemoryError, AssertionError):
        def load(self, kind=kind):
            raise kind("odd")

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        with pytest.raises(ValueError, match="x: expected an image that Pillow can read"):
            open_image(whole)


def test_only_the_listed_formats_are_opened_whatever_the_name(tmp_path, monkeypatch):
    """An EPS called .jpg would start Ghostscript; a DDS with odd flags raises NotImplementedError."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "dds.png", "DDS")
    for name in ("eps.jpg", "dds.png"):
        with pytest.raises(ValueError, match=f"{name}: expected an image that Pillow can read .it begins as none of PNG"):
            open_image(tmp_path / name)
    (tmp_path / "large.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031673\n")
    with pytest.raises(ValueError, match=r"large.png: expected an image .* \(found Git LFS's pointer to it: run git lfs pull"):
        open_image(tmp_path / "large.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # which has no end
    for name in ("folder.png", "pipe.png"):
        with pytest.raises(ValueError, match=f"{name}: expected an image, found nothing"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F", "CMYK", "RGB"])
def test_no_conversion_needs_more_than_two_pictures_in_memory(tmp_path, mode):
    """Of 9 million pixels, 4 bytes each in Pillow; 100 million, the most that are opened, then stay below 1 GB."""
    format = {"F": "TIFF", "CMYK": "JPEG"}.get(mode, "PNG")
    Image.new(mode, (3000, 3000)).save(tmp_path / "x", format, **({"compress_level": 1} if format == "PNG" else {}))
    code = """if True:
        import sys
        from pathlib import Path
        import data.tones
        from data.images import open_image
        def peak():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
        before = peak()
        open_image(Path(sys.argv[1]))
        print((peak() - before) * 1024)"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 3000 * 3000 * 8 + 40_000_000


def test_decoders_that_need_more_memory_get_fewer_pixels(monkeypatch):
    monkeypatch.setitem(FEWER_PIXELS, "progressive JPEG", 400)
    monkeypatch.setitem(FEWER_PIXELS, "WEBP", 400)
    assert open_image(stored(Image.new("RGB", (30, 20)), "JPEG")).size == (30, 20)
    for options in ({"format": "JPEG", "progressive": True}, {"format": "WEBP"}):
        with pytest.raises(ValueError, match="x: expected at most 400 pixels of .*, got 30 x 20"):
            open_image(stored(Image.new("RGB", (30, 20)), **options))
        assert open_image(stored(Image.new("RGB", (20, 20)), **options)).size == (20, 20)
    monkeypatch.setitem(FEWER_PIXELS, "LAB", 400)
    with pytest.raises(ValueError, match="x: expected at most 400 pixels of LAB, got 30 x 20"):
        open_image(stored(Image.new("LAB", (30, 20)), "TIFF"))


def test_pictures_that_pillow_decodes_in_python_get_fewer_pixels(monkeypatch):
    """One of 100 million pixels took 100 s."""
    runs = struct.pack("<IiiHHIIiiII", 40, 30, 20, 1, 8, 1, 82, 0, 0, 256, 0) + bytes(1024) + b"\x1e\7\0\0" * 20 + b"\0\1"
    pictures = {
        "bmp_rle": b"BM" + struct.pack("<IHHI", 14 + len(runs), 0, 0, 1078) + runs,
        "ppm": b"P5 30 20 4095\n" + bytes(1200),
        "ppm_plain": b"P3 30 20 255\n" + b"7 " * 1800,
    }
    for decoder, content in pictures.items():
        picture = StoredImage("x", partial(bytes, content))
        assert open_image(picture).size == (30, 20) and FEWER_PIXELS[decoder] < 10**7
        monkeypatch.setitem(FEWER_PIXELS, decoder, 400)
        with pytest.raises(ValueError, match=f"x: expected at most 400 pixels of {decoder}, got 30 x 20"):
            image_size(picture)
    for head in (b"P5 30 20 65535\n", b"P6 30 20 255\n"):
        assert open_image(StoredImage("x", partial(bytes, head + bytes(1800)))).size == (30, 20)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_unpacked():
    side = int(MAX_PIXELS**0.5) + 1
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\4IDATmore"
    for opens in (open_image, image_size):
        with pytest.raises(ValueError, match=f"bomb: expected at most {MAX_PIXELS} pixels, got {side} x {side}"):
            opens(StoredImage("bomb", lambda: data))


def test_long_pictures_are_refused_where_the_processor_would_refuse_them(policy):
    policy.prompt(open_image(stored(Image.new("RGB", (400, 2)))))
    with pytest.raises(ValueError, match="expected sides of at most 200 to 1, got 401 x 2"):
        open_image(stored(Image.new("RGB", (401, 2))))
    with pytest.raises(ValueError, match="aspect ratio"):
        policy.prompt(Image.new("RGB", (401, 2)))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (1, 199), (57, 57), (1000, 301), (2600, 13), (5000, 30), (9, 9)])
def test_tokens_foretold_are_those_the_processor_makes_turned_or_not(tmp_path, policy, size):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", size, "red").save(tmp_path / "x.jpg", exif=exif)
    turned = open_image(tmp_path / "x.jpg")
    assert turned.size == size[::-1] and image_size(tmp_path / "x.jpg") == size
    prompt, limits = policy.prompt(turned), policy.image_processor.size
    num_tokens = policy.image_tokens(*image_size(tmp_path / "x.jpg"))
    assert num_tokens == int(prompt.grid.prod()) // 4 == (prompt.input_ids == policy.model.config.image_token_id).sum()
    assert num_tokens * 28 * 28 >= limits["shortest_edge"]
    if min(size) > 30:  # the processor leaves a strip one token high, however long it is
        assert num_tokens * 28 * 28 <= limits["longest_edge"]
    red = prompt.pixel_values.reshape(-1, 3, 2 * 14 * 14)  # patches of three channels: none was taken for another axis
    assert red[:, 0].min() > 1.8 and red[:, 1:].max() < -1.3


def test_list_files_goes_into_subfolders(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "deep/a.jpg", "note.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_files(tmp_path, IMAGE_SUFFIXES)] == ["b.PNG", "a.jpg"]


def test_every_file_below_a_folder_is_taken_or_counted(tmp_path, capsys, monkeypatch):
    """Hidden and linked folders are searched, each once, links that lead back or to themselves are no trap."""
    for folder in ("in/.hidden", "in/deep", "elsewhere", "in/folder.png"):
        (tmp_path / folder).mkdir(parents=True)
    names = ("a.jfif", "b.JPE", "c.avif", "d.MPO", "e.jp2", "f.tga", "g.ppm", ".hidden/h.png", "deep/i.pgm", "folder.png/j.png")
    for name in (*names, "../elsewhere/k.png", "deep/l.HEIC", "m.heic", "n.pdf", "README", "._a.jfif", "._b.png", ".DS_Store"):
        (tmp_path / "in" / name).touch()
    for name in (b"/caf\xe9.png", b"/\xe9.png"):
        Path(os.fsdecode(bytes(tmp_path / "in") + name)).touch()
    for name in ("pipe.png", "pipe2.png"):
        os.mkfifo(tmp_path / "in" / name)
    links = {"linked": "../elsewhere", "deep/back": "..", "deep/again": "../../elsewhere", "to_deep": "deep",
             "itself.png": "itself.png", "nowhere.png": "nothing", "o.png": "../elsewhere/k.png", "long.png": "x" * 300}
    for link, target in links.items():
        (tmp_path / "in" / link).symlink_to(target)
    found = {path.relative_to(tmp_path / "in").as_posix() for path in list_files(tmp_path / "in", IMAGE_SUFFIXES)}
    assert found - {"linked/k.png", "deep/again/k.png"} == {*names, "itself.png", "nowhere.png", "o.png", "long.png"}
    assert len(found & {"linked/k.png", "deep/again/k.png"}) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}/in: left out: ") and said.count("\n") == 1
    for part in ("2 .heic", "1 .pdf", "2 without ending", "2 ._* of macOS", "2 neither file nor folder",
                 "2 not named in UTF-8 like caf\\xe9.png"):
        assert part in said
    monkeypatch.setenv("RANK", "1")  # the first of torchrun's workers says it for all
    list_files(tmp_path / "in", IMAGE_SUFFIXES)
    assert not capsys.readouterr().err
    print_left_out(Path("photos"), Counter({f".{n:02d}": 20 - n for n in range(13)}))
    assert capsys.readouterr().err.endswith(" 10 .10, 9 .11, ...\n")


def test_paths_in_a_file_stay_below_the_root(tmp_path, monkeypatch):
    (tmp_path / "root/deep").mkdir(parents=True)
    (tmp_path / "root/deep/a.png").touch()
    (tmp_path / "secret.png").touch()
    root = tmp_path / "root"
    for name in ("deep/a.png", "./deep//a.png", "deep\\a.png", str(root / "deep/a.png")):
        assert image_path(root, name).samefile(root / "deep/a.png")
    names = ("../secret.png", "deep/../../secret.png", "..\\secret.png", str(tmp_path / "secret.png"), f"{root}/../secret.png",
             "C:/secret.png", "deep/a.png\0")
    for name in names:
        with pytest.raises(ValueError, match="expected a path below"):
            image_path(root, name)
    for name in ("", ".", "deep", "deep/b.png"):
        with pytest.raises(ValueError, match="expected a file, found nothing"):
            image_path(root, name)
    monkeypatch.chdir(tmp_path)
    assert image_path(Path("root"), str(root / "deep/a.png")) == root / "deep/a.png"
    (root / "link").symlink_to(tmp_path)  # made by whoever owns the folder
    assert image_path(root, "link/secret.png").is_file()


def test_a_picture_in_base64_that_stands_for_a_path_is_cut_in_messages(tmp_path):
    """80 kB of it stood on the terminal and in a row. A path of 900 characters is told whole."""
    text = "iVBORw0KGgo" * 4000
    for opens in (open_image, lambda path: image_path(tmp_path, text), lambda path: image_path(tmp_path, f"/{text}")):
        with pytest.raises(ValueError, match="iVBORw0KGgo.*: expected ") as caught:
            opens(tmp_path / text)
        assert len(str(caught.value)) < 500
    path = tmp_path / ("deep/" * 180) / "a.png"
    with pytest.raises(ValueError, match=f"{path}: expected an image, found nothing"):
        open_image(path)


def test_a_picture_inside_a_larger_file_is_read_when_it_is_needed_and_named(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "x.png")
    reads = []

    def read():
        reads.append(1)
        return (tmp_path / "x.png").read_bytes()

    stored = StoredImage("set.parquet row 7", read)
    assert not reads and image_size(stored) == (30, 20) and open_image(stored).mode == "RGB" and len(reads) == 2
    with pytest.raises(ValueError, match=r"set.parquet row 8: expected an image that Pillow can read"):
        open_image(StoredImage("set.parquet row 8", lambda: b"no image"))
    (tmp_path / "x.png").unlink()
    with pytest.raises(ValueError, match=r"set.parquet row 7: expected an image that Pillow can read \(.*No such file"):
        open_image(stored)
