"""escort run: images and batches through a saved model."""

from __future__ import annotations

import csv
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from escort import artifact
from escort.cli import run
from tests.cli.invoking import invoke, succeed, succeed_json
from tests.cli.named import TINY


def test_run_on_images(saved: Path, images: Path, tmp_path: Path) -> None:
    report = succeed_json("run", saved, images, "--output", tmp_path / "out.csv", "--batch", 2)
    assert report["inputs"] == 3 and report["inputs_per_second"] > 0
    rows = list(csv.reader((tmp_path / "out.csv").open()))
    assert rows[0] == ["input", "top1", "score"] and [row[0] for row in rows[1:]] == ["a.jpg", "b.png", "c.PNG"]
    assert [int(row[1]) for row in rows[1:]] == [entry["top1"] for entry in report["predictions"]]


def test_run_prepares_images_as_asked(saved: Path, images: Path, tmp_path: Path) -> None:
    from PIL import Image

    options = ["--size", "12,10", "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", "--output", tmp_path / "out.npz"]
    succeed("run", saved, images, *options)
    pixels = (
        np.asarray(Image.open(images / "b.png").resize((10, 12), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    )
    x = (pixels - np.float32([0.1, 0.2, 0.3])) / np.float32([0.4, 0.5, 0.6])
    with torch.inference_mode():
        expected = artifact.load(saved)(torch.from_numpy(x.transpose(2, 0, 1)[None].copy()))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        assert out["names"][1] == "b.png"
        np.testing.assert_allclose(out["outputs"][1], expected[0], rtol=1e-3, atol=1e-4)


def test_every_format_that_pillow_reads_but_those_it_cannot_alone(saved: Path, images: Path) -> None:
    from PIL import Image

    pixels = Image.open(images / "b.png")
    for suffix in (".gif", ".tif", ".tga", ".ppm", ".webp", ".ico", ".jp2", ".qoi"):
        (pixels.convert("P") if suffix == ".gif" else pixels).save(images / f"x{suffix}")
    pixels.save(images / "page.eps")
    (images / "=cmd.h5").write_bytes(b"\x89HDF")
    (images / "cats.png").mkdir()
    (images / "gone.png").symlink_to("nowhere.png")
    result = succeed("run", saved, images, "--json")
    assert json.loads(result.stdout)["inputs"] == 3 + 8
    note = result.stderr.replace("\n", "")
    assert "left out =cmd.h5, cats.png/, gone.png, notes.txt, page.eps: no images, or of formats that are not" in note
    for path in images.iterdir():
        if not path.is_dir():
            path.unlink()
    assert ".jpg or .png, or one of its folders, cats.png/" in invoke("run", saved, images).stderr


def test_images_of_folders_within(saved: Path, images: Path, tmp_path: Path) -> None:
    inside = images / "2024" / "été"
    inside.mkdir(parents=True)
    for name in ("b.png", "c.png"):
        shutil.copy(images / "b.png", inside / name)
    (images / "link").symlink_to(images / "2024")
    assert "2024/, link/, notes.txt: no images" in (flat := invoke("run", saved, images).stderr.replace("\n", " "))
    assert "--recursive takes what folders hold, too" in flat.replace("  ", " ")
    result = succeed("run", saved, images, "--recursive", "--output", tmp_path / "out.npz")
    assert "left out link/, notes.txt: no images" in result.stderr.replace("\n", " ")
    assert "--recursive" not in result.stderr
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        assert [name for name in out["names"] if "/" in name] == ["2024/été/b.png", "2024/été/c.png"]
        assert "b.png" in out["names"] and len(out["names"]) == 3 + 2
    shutil.rmtree(inside)
    one = invoke("run", saved, images / "b.png", "--recursive")
    assert one.exit_code == 0


def test_run_on_one_image(saved: Path, images: Path) -> None:
    assert succeed_json("run", saved, images / "b.png")["inputs"] == 1


def test_a_file_that_lies_about_its_format(saved: Path, images: Path) -> None:
    """Pillow would start Ghostscript on it."""
    from PIL import Image

    Image.open(images / "b.png").save(images / "page.eps")
    (images / "page.eps").rename(images / "b.png")
    result = invoke("run", saved, images)
    assert result.exit_code == 1 and "b.png is no readable image" in result.stderr


@pytest.mark.parametrize("error", [RuntimeError, struct.error, IndexError, zlib.error, OverflowError])
def test_what_a_decoder_raises_names_the_image(
    error: type[Exception], saved: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged AVIF files are a RuntimeError of Pillow's, and its plugins raise others."""
    from PIL import Image

    def fail(*_: Any, **__: Any) -> None:
        raise error("Failed to decode frame 0")

    monkeypatch.setattr(Image.Image, "convert", fail)
    result = invoke("run", saved, images / "b.png")
    assert result.exit_code == 2 and "b.png is no readable image (Failed to decode frame 0)" in result.stderr


def test_images_of_16_bits_are_refused(saved: Path, images: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(images / "b.png")
    result = invoke("run", saved, images)
    assert result.exit_code == 1 and "more than 8 bits per channel" in result.stderr


def test_the_first_forward_is_not_counted(saved: Path, batch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = run._forward

    def slow_at_first(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        calls.append(len(x))
        y, seconds = forward(model, x)
        return y, 1000.0 if len(calls) == 1 else seconds

    monkeypatch.setattr(run, "_forward", slow_at_first)
    report = succeed_json("run", saved, batch, "--batch", 2)
    assert calls == [2, 2, 2, 1] and report["model_seconds"] < 1000.0


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=cmd.png", "'=cmd.png"),
        ("+1.png", "'+1.png"),
        ("-1.png", "'-1.png"),
        ("@x.png", "'@x.png"),
        ("\t=x\n\x1b.png", "\\t=x\\n\\x1b.png"),
        ('a,"b.png', 'a,"b.png'),
    ],
)
def test_cells_are_no_formulas(name: str, cell: str, saved: Path, images: Path, tmp_path: Path) -> None:
    (images / "b.png").rename(images / name)
    report = succeed_json("run", saved, images, "--output", tmp_path / "out.csv")
    assert name in {prediction["input"] for prediction in report["predictions"]}
    assert cell in {row[0] for row in csv.reader((tmp_path / "out.csv").open(newline=""))}


def test_run_on_a_batch(saved: Path, batch: Path, tmp_path: Path) -> None:
    result = succeed("run", saved, batch, "--output", tmp_path / "out.npz", "--batch", 2, "--device", "cpu")
    assert "5 inputs at batch 2" in result.stdout and result.stderr == ""
    with torch.inference_mode():
        expected = artifact.load(saved)(torch.from_numpy(np.load(batch))).numpy()
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        np.testing.assert_allclose(out["outputs"], expected, rtol=1e-4, atol=1e-5)
        assert out["top1"].tolist() == expected.argmax(axis=1).tolist()


def test_run_of_a_model_without_classes_and_without_graph(tmp_path: Path, batch: Path) -> None:
    name, path = "tests.cli.named:Branching", tmp_path / "model.escort"
    told = succeed("convert", name, "--input", "1,3,16,16", "--output", path).stderr
    assert "does not hold the whole program" in told and "by --model on the command line" in told
    assert "or name it by --model on the command line" in invoke("run", path, batch).stderr
    succeed("run", path, batch, "--model", name, "--output", tmp_path / "out.npz")
    assert np.load(tmp_path / "out.npz")["outputs"].shape == (5, 4, 16, 16)
    result = invoke("run", path, batch, "--model", name, "--output", tmp_path / "out.csv")
    assert result.exit_code == 2 and "write an .npz" in result.stderr


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((3, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((0, 3, 16, 16), np.float32), "holds no sample: its array has the shape (0, 3, 16, 16)"),
        (np.zeros((2, 3, 16, 16), np.uint8), "holds uint8"),
        (np.array([{}], dtype=object), "no readable .npy"),
        (b"no array", "(ValueError: This file contains pickled (object) data); write it by numpy.save"),
    ],
)
def test_bad_batches(array: np.ndarray | bytes, message: str, saved: Path, tmp_path: Path) -> None:
    if isinstance(array, bytes):
        (tmp_path / "batch.npy").write_bytes(array)
    else:
        np.save(tmp_path / "batch.npy", array)
    result = invoke("run", saved, tmp_path / "batch.npy")
    assert result.exit_code == 2 and message in result.stderr


def test_npz_batches_hold_one_array(saved: Path, batch: Path, tmp_path: Path) -> None:
    array = np.load(batch)
    np.savez(tmp_path / "one.npz", x=array)
    assert succeed_json("run", saved, tmp_path / "one.npz")["inputs"] == 5
    np.savez(tmp_path / "two.npz", x=array, y=array)
    result = invoke("run", saved, tmp_path / "two.npz")
    assert result.exit_code == 2 and "2 arrays (x, y)" in result.stderr


def test_unreadable_images_are_set_aside(saved: Path, images: Path, tmp_path: Path) -> None:
    """The others' predictions are what they are without it, whatever batch it was in."""
    expected = succeed_json("run", saved, images)["predictions"]
    (images / "b.png").write_bytes(b"no png")
    result = invoke("run", saved, images, "--json", "--batch", 2, "--output", tmp_path / "out.csv")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["inputs"] == 2 and list(report["failed"]) == ["b.png"]
    assert [row["input"] for row in report["predictions"]] == ["a.jpg", "c.PNG"]
    assert [row["score"] for row in report["predictions"]] == pytest.approx([expected[i]["score"] for i in (0, 2)])
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
    assert "set aside: " in result.stderr and "b.png is no readable image" in result.stderr
    assert "1 of 3 images could not be read" in result.stderr
    for name in ("a.jpg", "c.PNG"):
        (images / name).write_bytes(b"none")
    result = invoke("run", saved, images)
    assert result.exit_code == 2 and "a.jpg is no readable image" in result.stderr
    assert "nor can the 2 others" in result.stderr.replace("\n", " ")


def test_how_images_are_normalised_is_said(saved: Path, images: Path) -> None:
    text = " ".join(succeed("run", saved, images).stdout.split())
    assert "images are resized to 16x16, scaled to 0..1, less mean 0.485,0.456,0.406" in text
    assert "ImageNet's; --mean and --std change that" in text
    text = " ".join(succeed("run", saved, images, "--mean", "0,0,0", "--std", "1,1,1").stdout.split())
    assert "less mean 0,0,0, by deviation 1,1,1" in text and "ImageNet" not in text


def test_a_model_that_takes_bytes(saved: Path, pruned: Path, images: Path, tmp_path: Path) -> None:
    """It gives what the one gives whose images are normalised before."""
    path, normalising = tmp_path / "bytes.escort", ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    succeed("convert", TINY, "--checkpoint", pruned, "--input", "2,3,16,16", "--output", path, *normalising)
    of_bytes, of_floats = (succeed_json("run", model, images)["predictions"] for model in (path, saved))
    assert [row["input"] for row in of_bytes] == ["a.jpg", "b.png", "c.PNG"]
    scores = [[row["score"] for row in rows] for rows in (of_bytes, of_floats)]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-4)
    batch = tmp_path / "batch.npy"
    np.save(batch, np.zeros((5, 16, 16, 3), np.uint8))
    assert succeed_json("run", path, batch)["inputs"] == 5
    for array, says in (
        (np.zeros((5, 3, 16, 16), np.uint8), "the model takes (N, H, W, 3)"),
        (np.zeros((5, 16, 16, 3), np.float32), "save them as uint8"),
    ):
        np.save(batch, array)
        result = invoke("run", path, batch)
        assert result.exit_code == 2 and says in result.stderr.replace("\n", " ")
    result = invoke("run", path, images, *normalising)
    assert result.exit_code == 2 and "normalises images itself" in result.stderr


def test_bytes_for_a_model_of_other_inputs(tmp_path: Path) -> None:
    options = ["--input", "2,3,16,16", "--output", tmp_path / "x.escort", "--mean", "0.5", "--std"]
    result = invoke("convert", TINY, *options, "0.5")
    assert result.exit_code == 2 and "--mean and --std have 1 values" in result.stderr.replace("\n", " ")
    result = invoke("convert", TINY, *options, "0.5,0.5")
    assert result.exit_code == 2 and "a finite number for each channel" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--workers", 2], "--workers is for --engine ray; leave it out, or add that"),
        (["--engine", "ray"], "--engine ray writes a folder of Parquet files; name one"),
        (["--engine", "ray", "--output", "out.csv"], "--engine ray writes a folder of Parquet files; name one"),
        (["--engine", "ray", "--output", "{images}/b.png"], "is a file; name a folder for the predictions"),
        (["--engine", "ray", "--output", "{images}/out"], "--engine ray takes Ray Data: pip install"),
    ],
)
def test_what_many_workers_take(
    options: list[object], says: str, saved: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("escort.cli.many.find_spec", lambda name: None)
    result = invoke("run", saved, images, *(str(option).format(images=images) for option in options))
    assert result.exit_code == (1 if "pip install" in says else 2)
    assert says in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("mean", ["nan,0,0", "inf,0,0", "0,0,x"])
def test_means_are_finite_numbers(mean: str, saved: Path, images: Path) -> None:
    result = invoke("run", saved, images, "--mean", mean)
    assert result.exit_code == 2 and "--mean takes finite numbers separated by commas" in result.stderr


def test_a_damaged_batch(saved: Path, tmp_path: Path) -> None:
    """Whatever zipfile and zlib raise of it."""
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((2, 3, 16, 16), np.float32))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    for place in range(60, 120):
        content[place] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(content)
    result = invoke("run", saved, tmp_path / "x.npz")
    assert result.exit_code == 2 and "x.npz is no readable .npy or .npz batch" in result.stderr


def test_an_output_that_is_a_dangling_link_is_refused_before_the_work(
    saved: Path, images: Path, tmp_path: Path
) -> None:
    link = tmp_path / "out.csv"
    link.symlink_to(tmp_path / "gone" / "out.csv")
    result = invoke("run", saved, images, "--output", link)
    assert result.exit_code != 0 and f"there is no folder {tmp_path / 'gone'}" in result.stderr
