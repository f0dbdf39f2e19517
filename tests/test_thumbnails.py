"""Small pictures for the report page."""

import json

import numpy as np
import pytest
from PIL import Image

from data.examples import StoredImage
from tools.thumbnails import THUMBNAIL_SIZE, keep_thumbnail, thumbnail_file


def test_thumbnails_are_small_and_made_once(tmp_path):
    file, opened = tmp_path / "noise.png", []
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)).save(file)
    image = StoredImage("noise", lambda: opened.append(1) or file.read_bytes())
    for _ in range(2):
        keep_thumbnail(tmp_path, "a", image)
    [path] = (tmp_path / "thumbnails").iterdir()
    assert path == thumbnail_file(tmp_path, "a") and Image.open(path).size == (THUMBNAIL_SIZE, 192) and len(opened) == 1
    assert path.stat().st_size < 64_000  # noise, the worst there is


@pytest.mark.parametrize("id", ["../../etc/passwd", "/abs/olute", "a/b.png", "", "..", "雪", "x" * 5000, 'q"<&>', "\ud800"])
def test_any_id_has_a_thumbnail_of_its_own_in_the_folder(tmp_path, id):
    keep_thumbnail(tmp_path, id, Image.new("RGB", (4, 4)))
    [path] = (tmp_path / "thumbnails").iterdir()
    assert path.parent == tmp_path / "thumbnails"
    assert path == thumbnail_file(tmp_path, id) != thumbnail_file(tmp_path, id + "_")


def test_a_run_keeps_thumbnails_of_what_it_captioned(tiny_run):
    ids = {
        json.loads(line)["id"]
        for path in tiny_run.glob("rollouts/*.jsonl")
        for line in path.read_text().splitlines()
    }
    assert {path.name for path in (tiny_run / "thumbnails").iterdir()} == {
        thumbnail_file(tiny_run, id).name for id in ids
    }
