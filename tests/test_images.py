"""Opening pictures: whatever the file, RGB or one sentence that names it."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from data.images import MAX_PIXELS, StoredImage, image_path, image_size, list_images, open_image


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


def test_more_than_eight_bits_keep_their_brightness():
    gray = Image.fromarray(np.array([[0, 256 * 100 + 7, 65535]], dtype=np.uint16))
    assert [open_image(stored(gray)).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    depth = Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32))
    assert [open_image(stored(depth, "TIFF")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert pixel(stored(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "TIFF")) == (0, 0, 0)


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
    """Pillow's decoders raise a dozen kinds of errors on broken files; none may get through."""
    rng, picture = np.random.default_rng(0), Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
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


def test_list_images_goes_into_subfolders_and_refuses_an_empty_one(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "deep/a.jpg", "note.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["b.PNG", "a.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected images"):
        list_images(tmp_path / "empty")


def test_paths_in_a_file_stay_below_the_root(tmp_path):
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
    (root / "link").symlink_to(tmp_path)  # made by whoever owns the folder
    assert image_path(root, "link/secret.png").is_file()


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
