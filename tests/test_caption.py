"""Captioning at scale: every kind of input, leases, kills, corrupt files, exports."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import threading
import time
from functools import partial
from multiprocessing import Process, get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import data.captions.leases as leases
from caption import CaptionConfig, caption, main
from data.captions.exports import check_captions, check_export
from data.captions.leases import Lease, _new_part, take_lease, take_leases, write_shard
from data.captions.shards import Shard, plan_shards
from data.images import open_image
from data.io import ahead, text_hash
from data.jsonl import read_log
from data.toy.world import draw, make_scene
from grpo.captioning import Captioning, caption_batches
from grpo.pretrained import load_policy, model_hash

TOY = dict(policy="data/toy/policy", max_new_tokens=96, temperature=0.0, lease_seconds=2.0)


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    draw(make_scene("train", index)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six images in two folders."""
    path = tmp_path_factory.mktemp("images")
    (path / "sub").mkdir()
    for n in range(6):
        (path / ("sub" if n > 3 else ".") / f"{n}.png").write_bytes(png(n))
    return path


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> list[str]:
    """The six captions, each written alone."""
    policy = load_policy("data/toy/policy", torch.device("cpu"))
    images = [(str(n), partial(draw, make_scene("train", n))) for n in range(6)]
    settings = Captioning(temperature=0.0, max_new_tokens=96, batch_size=1)
    batches = caption_batches(policy, images, settings, seed=0)
    return [row["caption"] for batch in batches for (row,) in batch]


def rows_of(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("shard-*.jsonl")) for row in read_log(path)]


def test_a_folder_in_shards(folder, expected, tmp_path, capsys):
    caption(CaptionConfig(str(folder), str(tmp_path / "new/a"), shard_size=4, batch_size=3, **TOY))
    rows = rows_of(tmp_path / "new/a")
    assert [row["caption"] for row in rows] == expected
    names = [*(f"{n}.png" for n in range(4)), "sub/4.png", "sub/5.png"]
    assert [row["id"] for row in rows] == [row["image"] for row in rows] == names
    assert all(row["finish_reason"] == "stop" and row["tokens"] > 3 for row in rows)
    policy = load_policy("data/toy/policy", torch.device("cpu"))
    assert {row["model"] for row in rows} == {model_hash(policy)} and len({row["prompt"] for row in rows}) == 1
    left = sorted(path.name for path in (tmp_path / "new/a").iterdir())
    assert left == ["about.json", "shard-000000.jsonl", "shard-000001.jsonl"]
    assert "this worker captioned 6 images, 0 of them unreadable" in capsys.readouterr().out
    caption(CaptionConfig(str(folder), str(tmp_path / "new/a"), shard_size=4, **TOY))  # again: nothing is left to do
    assert "this worker captioned 0 images" in capsys.readouterr().out and rows_of(tmp_path / "new/a") == rows
    with pytest.raises(ValueError, match="about.json: expected seed 1 as now asked for, found 0; take another --out"):
        caption(CaptionConfig(str(folder), str(tmp_path / "new/a"), shard_size=4, seed=1, **TOY))
    shutil.copytree("data/toy/policy", tmp_path / "other")
    moved = TOY | {"policy": str(tmp_path / "other")}  # another machine has the same policy at another path
    caption(CaptionConfig(str(folder), str(tmp_path / "new/a"), shard_size=4, **moved))
    settings = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(settings | {"video_token_id": 5}))
    both = (rf"expected model {tmp_path}/other '\w+' as now asked for, found data/toy/policy '{model_hash(policy)}'; "
            "take another --out")
    with pytest.raises(ValueError, match=both):
        caption(CaptionConfig(str(folder), str(tmp_path / "new/a"), shard_size=4, **moved))
    with pytest.raises(ValueError, match="expected shards 3 as now asked for, found 2"):
        caption(CaptionConfig(str(folder), str(tmp_path / "new/a"), shard_size=2, **TOY))


def test_a_finished_shard_that_is_damaged_or_anothers_is_no_success(folder, tmp_path):
    """Captioned again, nothing is left to do: every row of what is there is read."""
    settings = CaptionConfig(str(folder), str(tmp_path / "a"), shard_size=2, **TOY | {"max_new_tokens": 4})
    caption(settings)
    first, second = (tmp_path / f"a/shard-00000{n}.jsonl" for n in range(2))
    whole = second.read_text()
    other = [json.dumps(json.loads(line) | {"model": "0" * 16}) + "\n" for line in whole.splitlines()]
    asked = [json.dumps(json.loads(line) | {"prompt": "0" * 16}) + "\n" for line in whole.splitlines()]
    strange = "a: expected rows of the images that about.json stands for, in their order, found others"
    damages = {
        first.read_text(): "expected another image than in .*shard-000000.jsonl line 1, found id '0.png' again",
        2 * (whole.splitlines()[1] + "\n"): "line 2: expected another image than in .*01.jsonl line 1, found id '3.png' again",
        whole.replace("3.png", "7.png"): strange,
        "".join(whole.splitlines(keepends=True)[::-1]): strange,
        "".join(other): "shard-000001.jsonl line 1: expected model [0-9a-f]{16}, as about.json has it, found 0000",
        "".join(asked): "shard-000001.jsonl line 1: expected prompt [0-9a-f]{16}, as about.json has it, found 0000",
        whole[: len(whole) // 2]: "shard-000001.jsonl: expected 2 rows, found 1|shard-000001.jsonl line",
        "": "shard-000001.jsonl: expected 2 rows, found 0",
    }
    for damaged, message in damages.items():
        second.write_text(damaged)
        for again in (lambda: caption(settings), lambda: main(["--out", str(tmp_path / "a"), "--export", "llava"])):
            with pytest.raises(ValueError, match=message):
                again()
    second.write_text(whole)
    caption(settings)


@pytest.mark.parametrize("left", ["shard-000000.jsonl", "shard-000000.part-0000"])
def test_captions_without_their_settings_are_refused(folder, tmp_path, left):
    """Those of other images or settings counted as finished, under a new about.json that was untrue."""
    (tmp_path / left).write_text(row := json.dumps({"id": "x", "image": "x", "caption": "x"}) + "\n")
    with pytest.raises(ValueError, match="about.json: expected the settings of the rows beside it, found none; take another"):
        caption(CaptionConfig(str(folder), str(tmp_path), **TOY))
    assert [path.name for path in tmp_path.iterdir()] == [left] and (tmp_path / left).read_text() == row


def test_captions_are_written_where_there_are_no_links(folder, expected, tmp_path, no_links):
    config = CaptionConfig(str(folder), str(tmp_path / "a"), shard_size=4, **TOY)
    caption(config)
    caption(config)  # finds it done
    rows = [row for n in range(2) for row in read_log(tmp_path / f"a/shard-{n:06d}.jsonl")]
    assert [row["caption"] for row in rows] == expected
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "about.json", "shard-000000.jsonl", "shard-000001.jsonl"]


@pytest.mark.parametrize("instruction, reason", [
    ("<|image_pad|> What is it?", "expected one image placeholder"), ("caf\udce9", "expected text in instruction"),
])
def test_an_instruction_that_cannot_be_used_leaves_nothing_behind(folder, tmp_path, instruction, reason):
    """Its about.json refused the corrected instruction: "take another --out"."""
    with pytest.raises(ValueError, match=reason):
        caption(CaptionConfig(str(folder), str(tmp_path / "a"), instruction=instruction, **TOY))
    assert not (tmp_path / "a").exists()


def test_ids_that_begin_again_in_each_file_are_no_copied_shard(tmp_path):
    for n in range(2):
        row = {"id": "0", "image": f"{n}.parquet row 0", "caption": "x"}
        (tmp_path / f"shard-00000{n}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "about.json").write_text(json.dumps({"shards": 2}))
    check_captions(tmp_path)


def test_a_row_of_parquet_without_an_id_has_the_place_of_its_file(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        columns = {"id": ["", f"{folder} 1", None], "index": [0, 1, 2], "image": [png(0)] * 3}
        pq.write_table(pa.table(columns), tmp_path / folder / "x.parquet")
    ids = [id for shard in plan_shards(tmp_path, 9) for id, _, _ in shard.images()]
    assert ids == ["a/x:0", "a 1", "a/x:2", "b/x:0", "b 1", "b/x:2"]


def test_the_hash_is_of_the_weights(policy, monkeypatch):
    before = model_hash(policy)
    monkeypatch.setattr("transformers.configuration_utils.__version__", "5.999")  # a worker's elsewhere
    assert before == model_hash(policy)
    with torch.no_grad():
        policy.model.lm_head.weight[5, 5] += 1
    assert model_hash(policy) != before


def test_jsonl_parquet_and_tar(folder, expected, tmp_path):
    """The same images in each container: the same captions, in order, with ids and references of the container."""
    names = [*(f"{n}.png" for n in range(4)), "sub/4.png", "sub/5.png"]
    lines = [json.dumps({"id": f"i{n}", "image_path" if n % 2 else "image": name}) for n, name in enumerate(names)]
    lines[5] = lines[5].replace("/", "\\\\")  # as Windows writes a path
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    table = pa.Table.from_pylist([{"id": n, "image": {"bytes": png(n), "path": None}} for n in range(6)])
    (tmp_path / "parquet").mkdir()
    pq.write_table(table.slice(0, 4), tmp_path / "parquet" / "a.parquet", row_group_size=3)
    pq.write_table(table.slice(4, 2).drop_columns(["id"]), tmp_path / "parquet" / "b.parquet")
    (tmp_path / "tars").mkdir()
    for name, part in (("00000", range(4)), ("00001", range(4, 6))):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as archive:
            for n in part:
                for ending, content in (("json", b"{}"), ("PNG", png(n))):
                    info = tarfile.TarInfo(f"s/{n}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    found = {}
    for name, source in (("jsonl", folder / "list.jsonl"), ("parquet", tmp_path / "parquet"), ("tar", tmp_path / "tars")):
        caption(CaptionConfig(str(source), str(tmp_path / f"{name}-captions"), shard_size=4, **TOY))
        found[name] = rows_of(tmp_path / f"{name}-captions")
        assert [row["caption"] for row in found[name]] == expected
    assert [row["id"] for row in found["jsonl"]] == [f"i{n}" for n in range(6)]
    assert found["jsonl"][5]["image"] == "sub/5.png"
    assert [row["id"] for row in found["parquet"]] == ["0", "1", "2", "3", "b:0", "b:1"]
    assert found["parquet"][3]["image"] == "a.parquet row 3"
    assert [row["id"] for row in found["tar"]] == [f"00000/s/{n}" for n in range(4)] + ["00001/s/4", "00001/s/5"]
    assert found["tar"][0]["image"] == "00000.tar/s/0.PNG"
    (folder / "list.jsonl").unlink()


def test_a_row_or_group_of_parquet_that_cannot_be_read_costs_no_other(tmp_path):
    rows = [{"id": id, "image": {"bytes": png(n) if id != "b" else None, "path": None}} for n, id in enumerate("abcd")]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2, compression="none", use_dictionary=False)
    ids = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[ids.data_page_offset : ids.data_page_offset + ids.total_compressed_size] = b"\xff" * ids.total_compressed_size
    path.write_bytes(content)
    images = [image for shard in plan_shards(path, 4) for image in shard.images()]
    assert [id for id, _, _ in images] == ["a", "b", "x:group 1"]
    assert images[0][2].read() == png(0)
    for _, name, image in images[1:]:
        with pytest.raises(ValueError, match=f"^{name}: expected an image that Pillow can read"):
            open_image(image)


def test_corrupt_images_are_recorded_and_passed_over(tmp_path, expected, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(png(0))
    (images / "1.png").write_bytes(png(1)[:60])  # cut off
    (images / "2.png").write_bytes(b"")
    Image.new("RGB", (2000, 4)).save(images / "3.png")  # more than 200 times as wide as high
    (images / "4.png").write_bytes(png(1))
    (tmp_path / "list.jsonl").write_text(
        "".join(json.dumps({"image": f"images/{n}.png"}) + "\n" for n in (0, 1, 2, 3, 4, 9))
    )
    caption(CaptionConfig(str(tmp_path / "list.jsonl"), str(tmp_path / "out"), **TOY))
    rows = rows_of(tmp_path / "out")
    assert [row.get("caption") for row in rows] == [expected[0], None, None, None, expected[1], None]
    capsys.readouterr()
    caption(CaptionConfig(str(tmp_path / "list.jsonl"), str(tmp_path / "out"), **TOY))  # nothing is left to do
    assert "shard-000000.jsonl line 2: no caption, as of 4 images in all" in capsys.readouterr().err
    for n, reason in ((1, "expected an image that Pillow can read"), (2, "expected an image that Pillow can read"),
                      (3, "sides of at most 200 to 1"), (5, "expected an image, found nothing")):
        assert reason in rows[n]["error"] and "tokens" not in rows[n]
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for n in range(2):
            info = tarfile.TarInfo(f"{n}.png")
            info.size = len(png(n))
            archive.addfile(info, io.BytesIO(png(n)))
    second = 512 + -(-len(png(0)) // 512) * 512  # where the second member begins
    cuts = (("at a member", second, 2), ("in a header", second + 99, 2), ("in a picture", second + 600, 3))
    for name, length, num_rows in cuts:
        (tmp_path / f"{name}.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:length])
        (shard,) = plan_shards(tmp_path / f"{name}.tar", 4)
        (id, _, image), *_, (_, _, end) = found = list(shard.images())
        assert len(found) == num_rows and id == f"{name}/0" and open_image(image).size[0] > 50
        with pytest.raises(ValueError, match=f"{name}.tar: expected an image that Pillow can read"):
            open_image(end)


@pytest.mark.parametrize(("row", "reason"), [
    ('{"id": "a"}', "list.jsonl line 2: expected a path in 'image', got None"),
    ('{"image": "a.png"}', "list.jsonl line 2: id 'a.png' was used before, on line 1"),
    ('{"images": ["a.png", "b.png"]}', "list.jsonl line 2: expected a path in 'image', got .'a.png', 'b.png'"),
    ('{"image": "data:image/png;base64,iVBO"}', "list.jsonl line 2: expected a path in 'image', got 'data:image/png"),
    ('{"image": "%s"}' % ("iVBO" * 256), "list.jsonl line 2: expected a path in 'image', got '(iVBO){19}iVB$"),
])
def test_lists_that_do_not_fit(tmp_path, row, reason):
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\n' + row + "\n")
    with pytest.raises(ValueError, match=reason):
        plan_shards(tmp_path / "list.jsonl", 4)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match=r"expected a folder, .jsonl, .parquet or .tar files of one kind, found \['.txt'\]"):
        plan_shards(tmp_path / "x.txt", 4)
    with pytest.raises(ValueError, match="none: expected a folder or a file of images, found nothing"):
        plan_shards(tmp_path / "none", 4)
    (tmp_path / "a.tar").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(ValueError, match="of one kind, found"):
        plan_shards(tmp_path, 4)


def test_a_folder_of_many_things_is_taken_refused_or_counted(tmp_path, capsys):
    """Photos beside a tar file were left out in silence; archives are found in subfolders and in capitals."""
    (tmp_path / "mixed").mkdir()
    for name in ("a.png", "b.JFIF", "c.heic", "d.tar"):
        (tmp_path / "mixed" / name).touch()
    with pytest.raises(ValueError, match=r"mixed: expected .* of one kind, found \['.jfif', '.png', '.tar'\]"):
        plan_shards(tmp_path / "mixed", 4)
    assert "mixed: left out: 1 .heic" in capsys.readouterr().err
    (tmp_path / "tars/deep").mkdir(parents=True)
    for name in ("x.TAR", "deep/x.tar"):
        write_tar(tmp_path / "tars" / name, [("0.png", png(0))])
    (tmp_path / "tars/readme.md").touch()
    ids = [id for shard in plan_shards(tmp_path / "tars", 4) for id, _, _ in shard.images()]
    assert ids == ["deep/x/0", "x/0"] and "left out: 1 .md" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"caf\\xe9.tar: expected a path in UTF-8"):
        plan_shards(tmp_path / "caf\udce9.tar", 4)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").touch()
    with pytest.raises(ValueError, match="notes: expected images, .parquet or .tar files, found none"):
        plan_shards(tmp_path / "notes", 4)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"text.parquet: expected rows with image or images, found 1 rows of \['text'\]"):
        plan_shards(tmp_path / "text.parquet", 4)
    (tmp_path / "list.jsonl").write_text(
        '{"id": null, "image": null, "image_path": "a"}\n{"id": null, "images": ["b"]}\n'
    )
    (shard,) = plan_shards(tmp_path / "list.jsonl", 4)
    assert [(id, name) for id, name, _ in shard.images()] == [("a", "a"), ("b", "b")]


def test_a_corrected_path_of_a_list_needs_another_folder(tmp_path, expected):
    """The run said that it had captioned all: under the same id it found the row of the missing picture. Where ids are the
    paths, the hash is as it was before, and older runs go on."""
    (tmp_path / "0.png").write_bytes(png(0))
    for name in ("missing.png", "0.png"):
        (tmp_path / "list.jsonl").write_text(json.dumps({"id": "x", "image": name}) + '\n{"image": "0.png"}\n')
        out = tmp_path / "out"
        if name == "missing.png":
            caption(CaptionConfig(str(tmp_path / "list.jsonl"), str(out), **TOY))
            assert "expected an image, found nothing" in rows_of(out)[0]["error"]
    with pytest.raises(ValueError, match=r"about.json: expected contents '\w+' as now asked for, found '\w+'; take another"):
        caption(CaptionConfig(str(tmp_path / "list.jsonl"), str(out), **TOY))
    caption(CaptionConfig(str(tmp_path / "list.jsonl"), str(tmp_path / "anew"), **TOY))
    assert [row["caption"] for row in rows_of(tmp_path / "anew")] == [expected[0]] * 2
    (tmp_path / "list.jsonl").unlink()
    (tmp_path / "1.png").write_bytes(png(1))
    assert [shard.key for shard in plan_shards(tmp_path, 4)] == [text_hash("0.png\n1.png")]


def write_tar(path: Path, members: list[tuple[str, bytes | tuple[bytes, str]]]) -> None:
    """Members with their content, or with a kind of link and where it leads."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)


def test_a_member_of_a_tar_file_in_pieces_is_refused(tmp_path):
    """GNU tar leaves holes of a file out: what follows the rest in the tar file is another member."""
    Image.new("RGB", (400, 400)).save(tmp_path / "a.bmp")  # black
    size = (tmp_path / "a.bmp").stat().st_size
    with (tmp_path / "a.bmp").open("r+b") as file:
        file.truncate(54)  # its head
        file.truncate(size)
    Image.effect_noise((900, 900), 90).convert("RGB").save(tmp_path / "b.bmp")
    subprocess.run(["tar", "--sparse", "-cf", "x.tar", "a.bmp", "b.bmp"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "x.tar") as archive:
        if not archive.next().issparse():
            pytest.skip("no holes on this disk")
    (shard,) = plan_shards(tmp_path / "x.tar", 1)
    (_, _, holes), (_, _, whole) = shard.images()
    with pytest.raises(ValueError, match="x.tar/a.bmp: .*stored without its zeros"):
        open_image(holes)
    assert open_image(whole).size == (900, 900)


def test_no_member_of_a_tar_file_is_passed_over_in_silence(tmp_path, capsys):
    """Links stand for what they lead to, equal names get ids of their own, names that are not UTF-8 a written form."""
    members = [
        ("s", (tarfile.DIRTYPE, "")), ("s/a.png", png(0)), ("s/a.json", b"{}"), ("s/a.png", png(1)), ("s/a.png", png(2)),
        ("s/hard.png", (tarfile.LNKTYPE, "s/a.png")), ("s/soft.png", (tarfile.SYMTYPE, "./a.png")),
        ("s/lost.png", (tarfile.SYMTYPE, "../b.png")), ("s/._a.png", b"\0\5"), ("s/b.heic", b""), ("s/caf\udce9.png", png(3)),
    ]
    write_tar(tmp_path / "t.tar", members)
    (shard,) = plan_shards(tmp_path / "t.tar", 4)
    images = {id: (name, image) for id, name, image in shard.images()}
    assert list(images) == ["t/s/a", "t/s/a.png", "t/s/a.png:2", "t/s/hard", "t/s/soft", "t/s/lost", r"t/s/caf\xe9"]
    assert images[r"t/s/caf\xe9"][0] == r"t.tar/s/caf\xe9.png"
    for id, index in (("t/s/a", 0), ("t/s/a.png:2", 2), ("t/s/hard", 2), ("t/s/soft", 2), (r"t/s/caf\xe9", 3)):
        assert images[id][1].read() == png(index)
    with pytest.raises(ValueError, match=r"t.tar/s/lost.png: expected an image .* \(a link to b.png, no member before it\)"):
        open_image(images["t/s/lost"][1])
    assert capsys.readouterr().err == f"{tmp_path}/t.tar: left out: 1 ._* of macOS, 1 .heic\n"


@pytest.mark.parametrize("place, size", [(0, 200 << 30), (0, 1 << 70), (2, 1 << 70), (2, -1 << 40)])
def test_a_member_of_an_absurd_size_stops_no_worker(tmp_path, place, size):
    """Its worker ended with MemoryError or OverflowError, or a sentence without a name, and so did each next one."""
    with (tmp_path / "t.tar").open("wb") as file:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.png")
            info.size = size if n == place else len(png(n))
            file.write(info.tobuf(tarfile.GNU_FORMAT) + png(n) + bytes(-len(png(n)) % 512))
        file.write(bytes(1024))
        if size == 200 << 30:
            file.truncate(size + 4096)  # with holes: the member is all there
    (shard,) = plan_shards(tmp_path / "t.tar", 4)
    images = list(shard.images())
    assert [name for _, name, _ in images][: place + 1] == [f"t.tar/{n}.png" for n in range(place + 1)]
    for _, _, image in images[:place]:
        assert open_image(image).size
    for _, name, image in images[place:]:
        with pytest.raises(ValueError, match=rf"^{name}: expected an image"):
            open_image(image)


@pytest.mark.parametrize("size", [1 << 62, 1 << 70])  # MemoryError, OverflowError
def test_a_name_of_an_absurd_size_costs_the_images_behind_it(tmp_path, size):
    with (tmp_path / "t.tar").open("wb") as file:
        for kind, length in ((tarfile.REGTYPE, len(png(0))), (tarfile.GNUTYPE_LONGNAME, size)):
            info = tarfile.TarInfo("0.png")
            info.type, info.size = kind, length
            file.write(info.tobuf(tarfile.GNU_FORMAT) + png(0) + bytes(-len(png(0)) % 512))
    (shard,) = plan_shards(tmp_path / "t.tar", 4)
    first, last = shard.images()
    assert open_image(first[2]).size and last[1] == "t.tar"
    with pytest.raises(ValueError, match=r"^t.tar: expected an image .*(MemoryError|cannot fit)"):
        open_image(last[2])


def test_a_second_tar_file_behind_the_first_is_told(tmp_path):
    """Of two joined by `cat` the second's images were lost in silence. Zeros, however many, are the first one's end."""
    write_tar(tmp_path / "t.tar", [("0.png", png(0))])
    whole = (tmp_path / "t.tar").read_bytes()
    for rest, num_rows in ((bytes(3 << 20), 1), (bytes(1 << 20) + whole, 2)):
        (tmp_path / "t.tar").write_bytes(whole + rest)
        (shard,) = plan_shards(tmp_path / "t.tar", 4)
        images = [image for _, _, image in shard.images()]
        assert len(images) == num_rows and images[0].read() == png(0)
    with pytest.raises(ValueError, match=r"t.tar: expected .* \(expected zeros alone after its end, found more, as of a sec"):
        open_image(images[1])


def test_null_and_a_byte_order_mark_are_nothing_in_an_exported_file(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    row = {"id": "a", "image": None, "images": None, "conversations": turns}
    (tmp_path / "l.json").write_text("\ufeff" + json.dumps([row]))
    assert check_export(tmp_path / "l.json") == 1
    (tmp_path / "l.json").write_text(json.dumps([row, row | {"id": "b\ud83d"}]))
    with pytest.raises(ValueError, match="l.json row 1: expected text in the row, got half a surr"):
        check_export(tmp_path / "l.json")


def test_a_run_without_a_caption_is_no_success(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.txt", b"none")])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"out: expected a caption, found none; .*a.tar: .*no image among its members"):
            caption(CaptionConfig(str(tmp_path / "a.tar"), str(tmp_path / "out"), **TOY))
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["a"]


def test_a_single_picture_and_errors_that_are_the_same_in_every_run(tmp_path, expected):
    """No address of a buffer stands in a row."""
    (tmp_path / "0.png").write_bytes(png(0))
    caption(CaptionConfig(str(tmp_path / "0.png"), str(tmp_path / "single"), **TOY))
    assert [(row["id"], row["caption"]) for row in rows_of(tmp_path / "single")] == [("0.png", expected[0])]
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", b"junk"), ("2.jpg", png(1)[:60]), ("3.gif", b"")])
    found = []
    for out in ("first", "second"):
        caption(CaptionConfig(str(tmp_path / "a.tar"), str(tmp_path / out), **TOY))
        found.append(rows_of(tmp_path / out))
    assert found[0] == found[1] and [row.get("caption") for row in found[0]] == [expected[0], None, None, None]
    assert not any("0x" in row.get("error", "") for row in found[0])


# ------------------------------------------------------------------------------------------- leases


@pytest.mark.parametrize("worker, num_workers, first", [(0, 1, 0), (1, 2, 2), (3, 1, 0), (9, 2, 2)])
def test_a_worker_of_any_number_takes_every_shard(tmp_path, worker, num_workers, first):
    """Where a scheduler had left RANK=3 without WORLD_SIZE, it asked for the shards after the last."""
    taken = []
    for lease in take_leases(tmp_path, 4, worker, num_workers, 100.0):
        taken.append(lease.number)
        lease.finished.touch()
    assert taken == [*range(first, 4), *range(first)]


def test_a_worker_that_finds_all_shards_held_waits(tmp_path, monkeypatch):
    held, waits = take_lease(tmp_path, 0, 100.0), []

    def sleep(seconds):
        waits.append(seconds)
        assert len(waits) < 3, "it waits without end and says nothing"

    monkeypatch.setattr("time.sleep", sleep)
    found = take_leases(tmp_path, 1, 0, 1, 100.0)
    assert next(found) is None and waits == [5]
    held.finished.touch()
    assert list(found) == []


def test_one_of_many_workers_gets_the_lease(tmp_path):
    """50 threads at once, ten shards: each shard has one holder."""
    got, start = [], threading.Barrier(50)

    def work():
        start.wait()
        got.extend(lease.name for n in range(10) if (lease := take_lease(tmp_path, n, 100.0)))

    threads = [threading.Thread(target=work) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [f"shard-{n:06d}" for n in range(10)]


def test_who_looked_before_another_took_or_finished_the_shard_gets_no_lease(tmp_path, monkeypatch):
    finished = tmp_path / "shard-000001.jsonl"
    take_lease(tmp_path, 0, 100.0).release()
    monkeypatch.setattr(leases, "own_files", lambda *_: [])  # as it looked there was no lease
    assert take_lease(tmp_path, 0, 100.0) is None
    monkeypatch.setattr(leases, "own_files", lambda *_: finished.touch() or [])
    assert take_lease(tmp_path, 1, 100.0) is None
    assert {path.name for path in tmp_path.iterdir()} == {"shard-000000.lease-0000", finished.name}


def test_a_shard_whose_worker_ended_with_an_error_is_taken_over_at_once(tmp_path):
    """The same command, run again after a full disk, waited two minutes in silence."""
    def batches(images):
        yield [{"id": "0", "image": "0.png"}]
        raise OSError(28, "No space left on device")

    shard = Shard(lambda: [(id, f"{id}.png", Path()) for id in "01"], "key")
    with pytest.raises(OSError, match="No space left"):
        list(write_shard(take_lease(tmp_path, 0, 100.0), shard, batches))
    assert take_lease(tmp_path, 0, 100.0).generation == 1 and take_lease(tmp_path, 0, 100.0) is None


@pytest.mark.parametrize("rest", [b'{"i', b"\0" * 9 + b"\n", b'\0\0\n{"id": 3}\n', b"3\n"])
def test_a_lease_is_taken_over_when_it_is_no_longer_touched(tmp_path, rest):
    first = take_lease(tmp_path, 0, 0.4)
    time.sleep(0.8)
    assert take_lease(tmp_path, 0, 0.4) is None  # the holder lives: its thread touches the lease
    first.release()  # as if it had died
    os.utime(first.path, (time.time() - 10, time.time() - 10))
    rows = [{"id": id, "image": f"{id}.png"} for id in "012"]
    first.part.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with first.part.open("ab") as file:
        file.write(rest)
    second = take_lease(tmp_path, 0, 0.4)
    second.part.write_text(json.dumps({"image": "0.png", "id": "0"}) + "\n")  # shorter, though it comes later in order
    assert second.generation == 1 and first.is_lost and not second.is_lost
    with _new_part(second, [(id, f"{id}.png", Path()) for id in "012"]) as (num_done, append):
        assert num_done == 2  # what was cut off in the middle of a line, or is no row, is gone
        append(rows[2:])
    second.finish()
    second.release()
    assert rows_of(tmp_path) == rows
    first.finish()  # the first one wakes up: nothing changes
    assert rows_of(tmp_path) == rows and first.is_lost and take_lease(tmp_path, 0, 0.4) is None
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.jsonl"]


def test_rows_of_a_part_that_was_whole_are_on_the_disk_before_it_goes(tmp_path, monkeypatch):
    """No row was left to write, so its copy was never synced: after a power cut the finished shard was empty."""
    lines, synced = b"".join(b'{"id": "%d", "image": "%d.png"}\n' % (id, id) for id in range(3)), []
    (tmp_path / "shard-000000.part-0000").write_bytes(lines)
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").read_bytes()))
    with _new_part(Lease(tmp_path, 0, 1, 100), [(id, f"{id}.png", Path()) for id in "012"]) as (num_done, _):
        assert num_done == 3 and synced == [lines]


@pytest.mark.parametrize(("lines", "found"), [
    ([0, 2], r"line 2: expected id and image \[\('1.png', '1.png'\)\], found \[\('2.png', '2.png'\)\]"),
    ([1, 0], r"line 1: expected id and image \[\('0.png', '0.png'\)\], found \[\('1.png', '1.png'\)\]"),
    ([0, 1, 2], r"line 3: expected id and image \[\], found \[\('2.png', '2.png'\)\]"),
])
def test_a_part_with_rows_of_other_images_is_refused_and_stays(folder, tmp_path, lines, found):
    """Its rows were counted, whose they were was not looked at: as many images were never captioned."""
    config = CaptionConfig(str(folder), str(tmp_path), shard_size=2, **TOY | {"max_new_tokens": 4, "lease_seconds": 0.1})
    caption(config)
    whole = [line for path in sorted(tmp_path.glob("*.jsonl")) for line in path.read_text().splitlines(keepends=True)]
    (tmp_path / "shard-000000.jsonl").unlink()
    part = tmp_path / "shard-000000.part-0000"
    part.write_text("".join(whole[n] for n in lines))
    with pytest.raises(ValueError, match=rf"shard-000000.part-0000 {found}; without this file its shard begins anew"):
        caption(config)
    assert part.read_text() == "".join(whole[n] for n in lines)
    part.unlink()
    time.sleep(0.2)
    caption(config)
    assert (tmp_path / "shard-000000.jsonl").read_text() == "".join(whole[:2])


@pytest.mark.parametrize("num", [0, 1, 2])
def test_a_worker_that_has_lost_its_shard_writes_and_finishes_nothing_more(tmp_path, num):
    """After so many rows another one takes it over."""
    def batches(images):
        for place, id in enumerate(["0", "1", ""]):
            if place == num:
                (tmp_path / "shard-000000.lease-0001").touch()
            if id:
                yield [{"id": id, "image": f"{id}.png"}]

    shard = Shard(lambda: [(id, f"{id}.png", Path()) for id in "01"], "key")
    lease = take_lease(tmp_path, 0, 100.0)
    written = []
    for rows in write_shard(lease, shard, batches):
        written += rows
        assert read_log(lease.part) == written  # on the disk already
    assert [row["id"] for row in written] == ["0", "1"][:num]
    assert not lease.finished.exists() and lease.path.exists()


def test_a_lease_of_a_time_to_come_is_taken_over(tmp_path):
    """A worker waited for it in silence, here for a day. One that a clock a little ahead has written is held."""
    first = take_lease(tmp_path, 0, 100.0)
    os.utime(first.path, (time.time() + 50,) * 2)
    assert take_lease(tmp_path, 0, 100.0) is None
    os.utime(first.path, (time.time() + 86400,) * 2)
    assert take_lease(tmp_path, 0, 100.0).generation == 1 and take_lease(tmp_path, 0, 100.0) is None


def test_files_of_other_names_neither_count_nor_go(folder, tmp_path):
    """A copy of a shard stood for one that was never captioned, a copied lease ended the worker with a message about int(),
    and notes whose names began like a part's were deleted."""
    out = tmp_path / "out"
    config = CaptionConfig(str(folder), str(out), shard_size=2, **TOY | {"max_new_tokens": 4})
    caption(config)
    whole = (out / "shard-000002.jsonl").read_bytes()
    (out / "shard-000002.jsonl").rename(tmp_path / "x")
    others = ["shard-000001 (copy).jsonl", "shard-000001.jsonl.bak-mine", "shard-000002.lease-0000 (copy)",
              "shard-000002.notes-by-me.txt", "shard-000002.part-0000-mine", "shard-0000021.part-0000.txt"]
    for name in others:
        (out / name).write_text("mine")
    for path in out.glob("*.lease*"):
        os.utime(path, (0, 0))
    (out / "shard-000000.part-0000").touch()  # of a worker that was killed while it cleared up
    caption(config)
    assert (out / "shard-000002.jsonl").read_bytes() == whole
    names = ["about.json", *(f"shard-00000{n}.jsonl" for n in range(3)), *others]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)


def num_lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("shard-*") if "lease" not in path.name)


def test_two_workers_killed_four_times_write_every_row_once(tmp_path):
    """kill -9 of either worker, at a random moment of its work: 60 rows, those of an undisturbed run."""
    (tmp_path / "images").mkdir()
    for n in range(60):
        (tmp_path / "images" / f"{n:02d}.png").write_bytes(png(n))
    caption(CaptionConfig(str(tmp_path / "images"), str(tmp_path / "calm"), shard_size=60, **TOY))
    out, rng = tmp_path / "out", random.Random(0)
    config = CaptionConfig(str(tmp_path / "images"), str(out), shard_size=20, batch_size=5, **TOY)
    context = get_context("forkserver")  # its server imports torch once; a worker is a fork of it
    context.set_forkserver_preload(["caption"])

    def start() -> Process:
        worker = context.Process(target=caption, args=(config,))
        worker.start()
        return worker

    workers = [start(), start()]
    for kill in range(4):
        target, deadline = num_lines(out) + rng.randrange(1, 8), time.monotonic() + 120
        while num_lines(out) < min(target, 55) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.random() / 4)
        workers[kill % 2].kill()
        workers[kill % 2].join()
        assert workers[kill % 2].exitcode in (-9, 0)  # 0: it had just finished
        workers[kill % 2] = start()
    for worker in workers:
        worker.join(timeout=300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert rows_of(out) == rows_of(tmp_path / "calm") and len({row["id"] for row in rows_of(out)}) == 60
    assert sorted(path.name for path in out.iterdir()) == ["about.json", *(f"shard-00000{n}.jsonl" for n in range(3))]


# ------------------------------------------------------------------------------------------ exports


@pytest.fixture
def finished(tmp_path) -> Path:
    """Two finished shards as `caption` leaves them, without a model; the good rows are a and e."""
    out = tmp_path / "captions"
    out.mkdir()
    about = {"images": "photos", "instruction": "Describe.", "max_new_tokens": 9, "shards": 2}
    (out / "about.json").write_text(json.dumps(about))
    rows = [{"id": "a", "image": "a.png", "caption": "A \"red\"\nsquare.", "finish_reason": "stop"},
            {"id": "b", "image": "b.png", "error": "broken"},
            {"id": "c", "image": "c.png", "caption": " ", "finish_reason": "stop"},
            {"id": "d", "image": "d.png", "caption": "An <image> of", "finish_reason": "stop"},
            {"id": "e", "image": "x/e.png", "caption": "Blue", "finish_reason": "length"}]
    for number, part in enumerate((rows[:3], rows[3:])):
        (out / f"shard-00000{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return out


def test_llava_export_field_by_field(finished, capsys):
    main(["--out", str(finished), "--export", "llava"])
    assert json.loads((finished / "llava.json").read_text()) == [
        {"id": id, "image": image,
         "conversations": [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text}]}
        for id, image, text in (("a", "a.png", 'A "red"\nsquare.'), ("e", "x/e.png", "Blue"))
    ]
    printed = capsys.readouterr().out
    assert "2 rows, 1 of them cut off at 9 tokens" in printed
    assert "{'image unreadable': 1, 'caption empty': 1, 'caption with a placeholder': 1}" in printed
    assert check_export(finished / "llava.json") == 2
    with pytest.raises(ValueError, match=r"llava.json row 0: image .*a.png: expected a file, found nothing"):
        main(["--check", str(finished / "llava.json"), "--images", str(finished)])
    shard = finished / "shard-000000.jsonl"
    shard.write_text(shard.read_text().replace('"stop"', '"length"'))
    main(["--out", str(finished), "--export", "llava"])
    assert "2 rows, 2 of them cut off at 9 tokens" in capsys.readouterr().out


def test_an_export_warns_of_images_that_trainers_see_otherwise(finished, tmp_path, capsys, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos/x").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "photos/a.png", exif=exif)
    Image.new("RGBA", (30, 20)).save(tmp_path / "photos/x/e.png")
    monkeypatch.chdir(tmp_path)
    main(["--out", str(finished), "--export", "llava"])
    printed = capsys.readouterr().out
    assert "otherwise than the captioner did: 1 turned by EXIF, the first is a.png" in printed
    assert "otherwise than the captioner did: 1 transparent, the first is x/e.png" in printed
    Image.new("RGB", (30, 20)).save(tmp_path / "photos/a.png")
    (tmp_path / "photos/x/e.png").unlink()
    main(["--out", str(finished), "--export", "llava"])
    printed = capsys.readouterr().out
    assert "EXIF" not in printed and "did: 1 not found or not readable here, the first is x/e.png" in printed


def test_llama_factory_export_field_by_field(finished):
    """As LLaMA-Factory documents it: dataset_info.json names file, formatting and columns; the tags
    are its defaults."""
    main(["--out", str(finished), "--export", "sharegpt"])
    info = json.loads((finished / "dataset_info.json").read_text())["captions"]
    assert info["formatting"] == "sharegpt" and set(info) == {"file_name", "formatting", "columns"}
    rows = json.loads((finished / info["file_name"]).read_text())
    assert len(rows) == 2
    for row in rows:
        turns, images = row[info["columns"]["messages"]], row[info["columns"]["images"]]
        assert [turn["from"] for turn in turns] == ["human", "gpt"]
        assert all(isinstance(turn["value"], str) for turn in turns)
        assert sum(turn["value"].count("<image>") for turn in turns) == len(images) == 1
    assert check_export(finished / "sharegpt.json") == 2


def shards(out: Path, images: str, rows: list[dict]) -> Path:
    """A folder of one finished shard."""
    out.mkdir()
    (out / "about.json").write_text(json.dumps({"images": images, "shards": 1}))
    (out / "shard-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def content(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_captionqa_and_capeval_exports_field_by_field(finished, capsys):
    """An object from ids to captions, or from file names: CaptionQA's qa.py looks up `id`, CAPEval's load_submission
    file names. Captions are as they were written; there is none of an image that could not be opened."""
    texts = {"a": 'A "red"\nsquare.', "c": " ", "d": "An <image> of", "e": "Blue"}
    main(["--out", str(finished), "--export", "captionqa"])
    assert content(finished / "captionqa.json") == texts
    assert "4 captions, 1 of them empty; 1 images could not be opened and have none" in capsys.readouterr().out
    main(["--out", str(finished), "--export", "capeval"])
    assert content(finished / "capeval.json") == {f"{id}.png": text for id, text in texts.items()}
    main(["--out", str(finished), "--export", "caparena"])
    assert content(finished / "caparena.json") == content(finished / "capeval.json")
    rows = [{"id": name, "image": name, "caption": "x"} for name in ("a/1.png", "b/1.png")]
    two = shards(finished.parent / "two", "photos", rows)
    with pytest.raises(ValueError, match="expected a caption for each file name, found two for 1.png"):
        main(["--out", str(two), "--export", "capeval"])
    with pytest.raises(ValueError, match="expected captions of CaptionQA's rows, by their ids, found one of the file a/1.png"):
        main(["--out", str(two), "--export", "captionqa"])
    table = shards(finished.parent / "table", "x", [{"id": "nat_001", "image": "x.parquet row 3", "caption": "x"}])
    main(["--out", str(table), "--export", "captionqa"])
    assert content(table / "captionqa.json") == {"nat_001": "x"}
    with pytest.raises(ValueError, match="expected captions of files, which keep their names, found one of x.parquet row 3"):
        main(["--out", str(table), "--export", "capeval"])


def test_caparena_pairs_field_by_field(finished, capsys):
    """The fields that caparena_auto_eval.py writes, and that its judge and its table read. Ours are on both sides."""
    models = ("GPT-4o-0806", "CogVLM2-llama3-chat-19B", "MiniCPM-V2.6-8B")
    names = [f"test_{n:05d}.jpg" for n in range(60)]
    entries = {name: {"ref_model": models[n % 3], "captions": {"human": f"h{n}", models[n % 3]: f"r{n}"}} for n, name in
               enumerate(names)}
    reference = finished.parent / "caparena_auto_600.json"
    reference.write_text(json.dumps(entries))
    rows = [{"id": name, "image": name, "caption": f"mine {n}"} for n, name in enumerate(names)]
    out = shards(finished.parent / "ours", "all_images", rows)
    command = ["--out", str(out), "--export", "caparena", "--reference", str(reference)]
    main(command)
    pairs = content(out / "caparena/ours.json")
    sides = set()
    for n, (name, pair) in enumerate(zip(names, pairs, strict=True)):
        mine = 1 + (pair["source2"] == "ours")
        sides.add(mine)
        assert pair == {"img": name, "ref": f"h{n}", "ref_model": models[n % 3], f"source{mine}": "ours",
                        f"caption{mine}": f"mine {n}", f"source{3 - mine}": models[n % 3], f"caption{3 - mine}": f"r{n}"}
    assert sides == {1, 2}
    main(command)
    assert content(out / "caparena/ours.json") == pairs
    for broken, reason in (
        (entries | {"x.jpg": {}}, "'x.jpg': expected ref_model, and texts of it and of human in captions, found {}"),
        (entries | {"x.jpg": entries[names[0]]}, "expected a caption of each image .* found none of 'x.jpg'"),
        ([1], "expected an object from images to captions, found "),
    ):
        reference.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=reason):
            main(command)
    with pytest.raises(ValueError, match="reference: expected export caparena"):
        CaptionConfig(out=str(out), export="capeval", reference=str(reference))


def test_capability_export_field_by_field(finished):
    """As its eval.py reads them: a file for each dimension, with file_id and caption."""
    rows = [{"id": f"{d}/{d}_{n}.jpg", "image": f"{d}/{d}_{n}.jpg", "caption": f"{d} {n}"}
            for d in ("OCR", "object_number") for n in range(2)]
    out = shards(finished.parent / "ours", "data", rows)
    main(["--out", str(out), "--export", "capability"])
    assert sorted(path.name for path in (out / "capability").iterdir()) == ["OCR.jsonl", "object_number.jsonl"]
    lines = (out / "capability/object_number.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_id": f"object_number_{n}", "caption": f"object_number {n}"} for n in range(2)]
    with pytest.raises(ValueError, match="expected CAPability's images, named like OCR_12.jpg, found a.png"):
        main(["--out", str(finished), "--export", "capability"])


def test_detailcaps_is_captioned_and_exported_field_by_field(finished, tmp_path):
    """In its parquet file `binary` is the picture, and `image` says where it came from. CAPTURE takes references and
    predictions with the same keys."""
    columns = ("GT_Caption_GPT4O", "GT_Caption_GPT4V", "GT_Caption_Gemini15Pro")
    rows = [{"source": "coco", "image": f"train2017/{n}.jpg", "binary": png(n)} | {c: f"{c} {n}" for c in columns}
            for n in range(3)]
    path = tmp_path / "DetailCaps-4870.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    main(["--images", str(path), "--out", str(tmp_path / "out"), "--policy", "data/toy/policy", "--max-new-tokens", "4",
          "--export", "detailcaps"])
    written = {row["id"]: row["caption"] for row in rows_of(tmp_path / "out")}
    assert list(written) == [f"DetailCaps-4870:{n}" for n in range(3)] and all(written.values())
    assert content(tmp_path / "out/detailcaps.json") == {
        "refs": {f"DetailCaps-4870:{n}": [f"{c} {n}" for c in columns] for n in range(3)},
        "preds": {id: [text] for id, text in written.items()}}
    (tmp_path / "other").mkdir()
    pq.write_table(pa.Table.from_pylist([row | {columns[1]: None} for row in rows]), tmp_path / "other" / path.name)
    about = content(tmp_path / "out/about.json") | {"images": str(tmp_path / "other")}
    (tmp_path / "out/about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"DetailCaps-4870.parquet row 0: expected texts in GT_Caption_GPT4O"):
        main(["--out", str(tmp_path / "out"), "--export", "detailcaps"])
    with pytest.raises(ValueError, match="expected captions of DetailCaps' parquet file, found a.png"):
        main(["--out", str(finished), "--export", "detailcaps"])


@pytest.mark.parametrize(("change", "reason"), [
    ({"caption": 5}, "shard-000000.jsonl line 2: expected an object with id, image and caption, got"),
    ({"caption": None}, "line 2: expected an object with id, image and caption, got"),
    ({"image": 5}, "line 2: expected an object with id, image and caption, got"),
    ({"id": None}, "line 2: expected an object with id, image and caption, got"),
    ({"error": 5}, "line 2: expected an object with id, image and error, got"),
    ({"tokens": "5"}, "line 2: expected a number of tokens, got '5'"),
    ({"id": "a", "image": "x.parquet row 1"}, "expected a caption for each id, found two for a"),
])
def test_a_row_that_would_be_lost_or_misread_ends_an_export(tmp_path, change, reason):
    """A doubled id lost a caption in silence, and what was no text a sentence."""
    row = {"id": "a", "image": "x.parquet row 0", "caption": "x"}
    out = shards(tmp_path / "out", "x", [row, row | {"id": "b"} | change])
    with pytest.raises(ValueError, match=re.escape(reason)):
        main(["--out", str(out), "--export", "captionqa"])
    assert not (out / "captionqa.json").exists()


def test_an_export_of_no_captions_is_refused(tmp_path):
    """It wrote an empty file, or none, as if all were well. An empty error is none."""
    row = {"id": "a", "image": "OCR_1.jpg", "error": "broken"}
    for benchmark in ("captionqa", "capability"):
        with pytest.raises(ValueError, match="expected a caption, found none"):
            main(["--out", str(shards(tmp_path / benchmark, "x", [row])), "--export", benchmark])
    out = shards(tmp_path / "empty", "x", [row | {"caption": "x", "error": ""}])
    main(["--out", str(out), "--export", "capeval"])
    assert content(out / "capeval.json") == {"OCR_1.jpg": "x"}
    doubled = [row | {"image": f"{folder}/OCR_1.jpg", "caption": "x", "error": ""} for folder in "ab"]
    with pytest.raises(ValueError, match="expected a caption for each file_id, found two for OCR_1"):
        main(["--out", str(shards(tmp_path / "two", "x", doubled)), "--export", "capability"])


@pytest.mark.parametrize("about", [{}, [], {"shards": 1}, {"shards": "1", "images": "x"}, {"shards": 1, "images": 5},
                                   *({"shards": 1, "images": "x", "rows": rows} for rows in (1, {}, "", [1, 1], ["1"], [True])),
                                   {"shards": True, "images": "x"}])
def test_settings_that_are_none_are_named(tmp_path, about):
    out = shards(tmp_path / "out", "x", [{"id": "a", "image": "x.parquet row 0", "caption": "x"}])
    (out / "about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"about.json: expected the settings in a folder that caption.py has written, found"):
        main(["--out", str(out), "--export", "detailcaps"])
    (out / "about.json").write_text(json.dumps({"shards": 1, "images": "x", "instruction": "y"}))  # and no max_new_tokens
    with pytest.raises(ValueError, match=r"has written, found {.*'max_new_tokens': None, 'shards': 1, 'rows': None}"):
        main(["--out", str(out), "--export", "llava"])


@pytest.mark.parametrize(("entry", "reason"), [
    (5, "'a.png': expected ref_model, and texts of it and of human in captions, found 5"),
    ({"ref_model": ["gpt"], "captions": {"gpt": "x", "human": "y"}}, "'a.png': expected ref_model, and texts"),
    ({"ref_model": "gpt", "captions": ["gpt", "human"]}, "'a.png': expected ref_model, and texts"),
    ({"ref_model": "gpt", "captions": {"gpt": "\ud83d", "human": "y"}}, "'a.png', got half a surrogate pair"),
])
def test_an_entry_of_the_reference_that_is_none_is_named(tmp_path, entry, reason):
    out = shards(tmp_path / "out", "x", [{"id": "a", "image": "a.png", "caption": "x"}])
    (tmp_path / "reference.json").write_text(json.dumps({"a.png": entry}))
    with pytest.raises(ValueError, match=reason):
        main(["--out", str(out), "--export", "caparena", "--reference", str(tmp_path / "reference.json")])


def test_an_export_wants_all_shards_and_files(finished):
    (finished / "shard-000001.jsonl").rename(finished / "x")
    with pytest.raises(ValueError, match="expected 2 finished shards, found 1"):
        main(["--out", str(finished), "--export", "llava"])
    row = {"id": "t", "image": "0.tar/t.png", "caption": "x", "finish_reason": "stop"}
    (finished / "shard-000001.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="expected images that are files, for a trainer to open, got '0.tar/t.png'"):
        main(["--out", str(finished), "--export", "llava"])


def test_a_shard_that_was_cut_after_a_line_is_named(folder, tmp_path):
    """A copy had broken off: the export had 5 of 6 rows. Without that file the run goes on, as one of before without `rows`."""
    out = tmp_path / "out"
    config = CaptionConfig(str(folder), str(out), shard_size=4, **TOY)
    caption(config)
    assert content(out / "about.json")["rows"] == [4, 2]
    whole = (out / "shard-000000.jsonl").read_text()
    (out / "shard-000000.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(ValueError, match="shard-000000.jsonl: expected 4 rows, found 3; without this file the same run"):
        main(["--out", str(out), "--export", "llava"])
    (out / "shard-000000.jsonl").unlink()
    about = content(out / "about.json")
    del about["rows"]
    (out / "about.json").write_text(json.dumps(about))
    caption(config)
    assert (out / "shard-000000.jsonl").read_text() == whole


GOOD = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
}


@pytest.mark.parametrize(("change", "reason"), [
    ({"id": 1}, "row 1: expected a text in id, got 1"),
    ({"id": "z"}, "row 1: id 'z' was used before, in row 0"),
    ({"image": ""}, "row 1: expected paths of images, got"),
    ({"conversations": "x"}, "row 1: expected an object with conversations"),
    ({"conversations": GOOD["conversations"][:1]}, "row 1: expected turns of human and gpt, got 1 turns"),
    ({"conversations": GOOD["conversations"][::-1]}, "row 1: turn 0: expected one from human"),
    ({"conversations": [GOOD["conversations"][0], {"from": "gpt", "value": " "}]}, "row 1: turn 1: expected words in value"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "turn 0: expected 1 <image>"),
    ({"conversations": [GOOD["conversations"][0], {"from": "gpt", "value": "<image>"}]}, "turn 1: expected 0 <image>"),
    ({"conversations": [GOOD["conversations"][0], {"from": "gpt", "value": "a <video>"}]}, "and no other placeholder"),
    ({"images": ["a.png", "b.png"]}, "turn 0: expected 2 <image>"),
    ({"images": ["a.png"], "id": ["a"]}, "row 1: expected a text in id, got .'a'"),
])
def test_the_validator_finds(tmp_path, change, reason):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([GOOD | {"id": "z"}, GOOD | change]))
    with pytest.raises(ValueError, match=reason):
        check_export(path)
    path.write_text(json.dumps([GOOD | {"image": "iVBO" * 9999}]))
    with pytest.raises(ValueError, match="row 0: image .*(iVBO){9}.*[.]{3}: expected a file, found nothing"):
        check_export(path, tmp_path)
    text_only = {"id": "t", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    path.write_text(json.dumps([GOOD, text_only]))
    assert check_export(path) == 2
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a list of rows, found none"):
        check_export(path)


@pytest.mark.parametrize(("settings", "reason"), [
    (dict(), "expected a folder in out, or a file to check"),
    (dict(out="x"), "expected images to caption, or an export of captions"),
    (dict(out="x", images="y", batch_size=0), "batch_size 0: expected at least 1"),
    (dict(out="x", images="y", temperature=-1.0), "temperature -1.0: expected 0 or more"),
    (dict(out="x", images="y", lease_seconds=0.0), "lease_seconds 0.0: expected more than 0"),
])
def test_settings_that_do_not_fit(settings, reason):
    with pytest.raises(ValueError, match=reason):
        CaptionConfig(**settings)


def test_what_is_computed_ahead_keeps_its_order_and_its_errors():
    """One item ahead: the second is begun when the first is asked for, and an error waits for its turn."""
    begun, gate = [], threading.Event()

    def load(item):
        begun.append(item)
        if item == 1:
            assert gate.wait(30)
        if item == 2:
            raise ValueError("picture 2")
        return 10 * item

    results = ahead(load, range(5), num_ahead=1)
    assert next(results) == 0
    deadline = time.monotonic() + 30
    while begun != [0, 1] and time.monotonic() < deadline:  # it runs in a thread, while the first is worked on
        time.sleep(0.001)
    assert begun == [0, 1]
    gate.set()
    assert next(results) == 10
    with pytest.raises(ValueError, match="picture 2"):
        next(results)
    slow = ahead(lambda item: time.sleep(0.01 * (item % 3)) or item, range(20), num_ahead=7, threads=4)
    assert list(slow) == list(range(20)) and list(ahead(load, [], num_ahead=3)) == []
