"""escort run: images and batches through a saved model."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from escort import artifact
from tests.cli.invoking import invoke, succeed, succeed_json


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


def test_run_on_a_batch(saved: Path, batch: Path, tmp_path: Path) -> None:
    result = succeed("run", saved, batch, "--output", tmp_path / "out.npz", "--batch", 2, "--device", "cpu")
    assert "5 inputs at batch 2" in result.stdout
    with torch.inference_mode():
        expected = artifact.load(saved)(torch.from_numpy(np.load(batch))).numpy()
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        np.testing.assert_allclose(out["outputs"], expected, rtol=1e-4, atol=1e-5)
        assert out["top1"].tolist() == expected.argmax(axis=1).tolist()


def test_run_of_a_model_without_classes_and_without_graph(tmp_path: Path, batch: Path) -> None:
    name, path = "tests.cli.named:Branching", tmp_path / "model.escort"
    succeed("convert", name, "--input", "1,3,16,16", "--output", path)
    succeed("run", path, batch, "--model", name, "--output", tmp_path / "out.npz")
    assert np.load(tmp_path / "out.npz")["outputs"].shape == (5, 4, 16, 16)
    result = invoke("run", path, batch, "--model", name, "--output", tmp_path / "out.csv")
    assert result.exit_code == 2 and "write an .npz" in result.stderr


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((3, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((0, 3, 16, 16), np.float32), "the model takes (N, 3, H, W)"),
        (np.zeros((2, 3, 16, 16), np.uint8), "holds uint8"),
        (np.array([{}], dtype=object), "no readable .npy"),
    ],
)
def test_bad_batches(array: np.ndarray, message: str, saved: Path, tmp_path: Path) -> None:
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


def test_unreadable_images(saved: Path, images: Path) -> None:
    (images / "b.png").write_bytes(b"no png")
    result = invoke("run", saved, images)
    assert result.exit_code == 2 and "b.png is no readable image" in result.stderr
