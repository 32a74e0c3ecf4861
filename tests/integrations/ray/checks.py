"""Many images by Ray Data: a Predictor in a pipeline, and jobs whose workers and driver are killed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from ray import serve
from ray.data import ActorPoolStrategy

import escort
from escort.cli.images import Preparation
from escort.integrations.ray.blocks import FAILED, Blocks
from escort.integrations.ray.job import Job, Workers
from escort.integrations.ray.workers import Reader
from escort.report import printable
from tests.cli.named import tiny
from tests.integrations.ray.folder import make
from tests.network.models import pruned

BAD = {"017.jpg", "118.jpg"}
COUNT = 120
LIMIT_S = 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was planned for one thread, as the workers have."""
    path, threads = tmp_path_factory.mktemp("saved") / "model.escort", torch.get_num_threads()
    torch.set_num_threads(1)
    escort.save(escort.convert(pruned(tiny().eval()), torch.randn(4, 3, 16, 16)), path)
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take some 30 ms each to decode, so that there is a middle in which to kill; two are damaged."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    for kind in range(4):
        Image.fromarray(np.roll(pixels, 100 * kind, axis=0) // (kind + 1)).save(folder / f"{kind}.source", "jpeg")
    for index in range(COUNT):
        os.link(folder / f"{index % 4}.source", folder / f"{index:03}.jpg")
    for name in BAD:
        (folder / name).unlink()
        (folder / name).write_bytes(b"no image")
    return folder


@dataclass(frozen=True)
class Run:
    """escort run, and what it says: into files, since a pipe that is full would stop it."""

    process: subprocess.Popen[bytes]
    out: Path

    @property
    def errors(self) -> str:
        return self.out.with_suffix(".err").read_text()

    def report(self) -> dict[str, Any]:
        """What it reports at its end. Some images are always damaged, so that the exit code is 1."""
        assert self.process.wait(LIMIT_S) == 1, self.errors[-4000:]
        return json.loads(self.out.read_text())

    def check_runs(self) -> None:
        assert self.process.poll() is None, f"it ended too early: {self.errors[-4000:]}"


def start(saved: Path, images: Path, output: Path, *options: object) -> Run:
    """escort run by two workers of a Ray of its own."""
    words = ["run", saved, images, "--engine", "ray", "--output", output, "--workers", 2, "--batch", 4, "--rows", 8]
    command = [sys.executable, "-m", "escort", *map(str, [*words, "--json", *options])]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    out = output.with_suffix(".out")
    with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
        return Run(subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment), out)


def wait_for_files(output: Path, count: int, driver: Run) -> None:
    until = time.monotonic() + LIMIT_S
    while len(list(output.glob("*.parquet"))) < count:
        driver.check_runs()
        assert time.monotonic() < until
        time.sleep(0.05)


def below(ancestor: int) -> Iterator[tuple[int, str]]:
    """The processes that a process started, and those that they did, by what they are called."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            pass
    for process in parents:
        above: int | None = process
        while above is not None and above != ancestor:
            above = parents.get(above)
        if above is not None and process != ancestor:
            yield process, names[process]


def workers_of(driver: Run) -> dict[int, bool]:
    """The workers that there are, and whether each is in the middle of a task, as Ray names them."""
    return {process: ".submit" in name for process, name in below(driver.process.pid) if "MapWorker(" in name}


def kill_a_worker(driver: Run) -> None:
    """Kills one that is in the middle of a task."""
    while not (working := [process for process, works in workers_of(driver).items() if works]):
        driver.check_runs()
        time.sleep(0.02)
    os.kill(min(working), signal.SIGKILL)


def kill(driver: Run) -> None:
    """Kills a job, and waits until what it started has ended with it."""
    started = [process for process, _ in below(driver.process.pid)]
    driver.process.kill()
    driver.process.wait()
    while any(Path(f"/proc/{process}/exe").exists() for process in started):
        time.sleep(0.1)


def check_all_there(output: Path, report: Mapping[str, object]) -> None:
    table = pq.read_table(output)
    names = table["input"].to_pylist()
    assert sorted(names) == sorted({f"{index:03}.jpg" for index in range(COUNT)} - BAD), "each once"
    outputs = table["outputs"].combine_chunks().to_numpy_ndarray()
    assert outputs.shape == (len(names), 5) and (outputs.argmax(1) == table["top1"].to_numpy()).all()
    kinds = np.array([int(name[:3]) % 4 for name in names])
    for kind in range(4):  # the same image, whoever predicted it, and however often it was tried
        same = outputs[kinds == kind]
        np.testing.assert_allclose(same, np.broadcast_to(same[0], same.shape), rtol=1e-4, atol=1e-5)
    assert np.abs(outputs[kinds == 0][0] - outputs[kinds == 3][0]).max() > 1e-3
    rows = list(csv.reader((output / FAILED).open()))
    assert rows[0] == ["input", "reason"] and {row[0] for row in rows[1:]} == BAD == report["failed"].keys()
    assert all("is no readable image" in row[1] for row in rows[1:])
    assert not list(output.glob(".escort-*"))


def test_a_predictor_in_a_pipeline(saved: Path) -> None:
    x = np.random.default_rng(0).standard_normal((50, 3, 16, 16), dtype=np.float32)
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    try:
        dataset = ray.data.from_numpy([x[:25], x[25:]]).rename_columns({"data": "x"})
        dataset = dataset.add_column("id", lambda batch: batch["x"][:, 0, 0, 0], batch_format="numpy")
        result = dataset.map_batches(
            escort.ray.Predictor,
            fn_constructor_kwargs={"path": saved, "threads": 1},
            batch_size=8,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=2),
            num_cpus=1,
        ).take_all()
    finally:
        ray.shutdown()
    rows = {float(row["id"]): row["outputs"] for row in result}
    assert set(result[0]) == {"id", "outputs"}
    with torch.inference_mode():
        expected = escort.load(saved, remeasure=False)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose([rows[float(key)] for key in x[:, 0, 0, 0]], expected, rtol=1e-4, atol=1e-5)


def test_workers_on_gpus_have_others_read(saved: Path, images: Path, tmp_path: Path) -> None:
    """GPUs that Ray only believes in: the network runs on the CPU."""
    preparation = Preparation(3, 16, 16)
    reader = Reader(preparation.read, (3, 16, 16), "float32")
    paths = {path.name: path for path in sorted(images.glob("01*.jpg"))}
    job = Job(paths, reader, {"path": saved, "device": "cpu", "remeasure": False}, Blocks(tmp_path, {}), 4, 4)
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False)
    try:
        with pytest.raises(RuntimeError, match="Ray has room for 2 workers by its GPUs"):
            job.run(Workers(3, on_gpus=True))
        report = job.run(Workers(None, on_gpus=True))
    finally:
        ray.shutdown()
    assert (report.done, report.workers, report.written.failed.keys()) == (9, 2, {"017.jpg"})
    assert report.working_s > 0 and 0 < report.predicting_share < 1
    x = torch.stack([preparation.read(paths["010.jpg"])])
    with torch.inference_mode():
        expected = escort.load(saved, remeasure=False)(x)[0]
    row = next(row for row in pq.read_table(tmp_path).to_pylist() if row["input"] == "010.jpg")
    np.testing.assert_allclose(row["outputs"], expected, rtol=1e-4, atol=1e-5)


def test_a_killed_worker_is_replaced(saved: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions"
    driver = start(saved, images, output)
    while list((workers := workers_of(driver)).values()) != [True, True]:
        driver.check_runs()
        time.sleep(0.02)
    os.kill(min(workers), signal.SIGKILL)
    replaced = set()
    while driver.process.poll() is None:
        replaced |= workers_of(driver).keys() - workers.keys()
        time.sleep(0.1)
    assert replaced
    report = driver.report()
    assert report["done"] == COUNT - len(BAD) and report["done_before"] == 0 and report["workers"] == 2
    check_all_there(output, report)


def test_a_killed_job_goes_on(saved: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions"
    driver = start(saved, images, output)
    wait_for_files(output, 3, driver)
    kill(driver)
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    names = pq.read_table(output)["input"].to_pylist()
    assert 0 < len(names) == len(set(names)) < COUNT - len(BAD)
    report = start(saved, images, output).report()
    assert report["done_before"] == len(names) and report["done"] == COUNT - len(BAD) - len(names)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    check_all_there(output, report)
    again = start(saved, images, output).report()
    assert (again["done"], again["done_before"]) == (0, COUNT - len(BAD)) and again["failed"].keys() == BAD
    (tmp_path / "others").mkdir()
    os.link(images / "001.jpg", tmp_path / "others" / "001.jpg")
    for folder, options, what in (
        (images, ["--size", "8,8"], "preparation"),
        (tmp_path / "others", [], "folder of images"),
    ):
        refused = start(saved, folder, output, *options)
        assert refused.process.wait(LIMIT_S) == 2
        assert f"was made by another {what}; name another folder" in refused.errors.replace("\n", " ")


def test_a_folder_of_20_000_images(saved: Path, tmp_path: Path) -> None:
    """Three workers and once the driver are killed; then all is there as one process without Ray predicts it."""
    photos, output = tmp_path / "photos", tmp_path / "predictions"
    made = make(photos, 20_000)
    options = ("--recursive", "--batch", 32, "--rows", 256)
    driver = start(saved, photos, output, *options)
    for files in (4, 16):
        wait_for_files(output, files, driver)
        kill_a_worker(driver)
    wait_for_files(output, 32, driver)  # of 256 each, less damaged ones
    kill(driver)
    done = len(pq.read_table(output, columns=["input"]))
    assert 7_000 < done < len(made.good)
    driver = start(saved, photos, output, *options)
    kill_a_worker(driver)
    report = driver.report()
    assert (report["done_before"], report["done"]) == (done, len(made.good) - done)
    reasons = report["failed"]
    assert sorted(reasons) == sorted(made.bad + [printable(name) for name in made.nameless])
    assert all(("is no readable image" in reason) == (name in made.bad) for name, reason in reasons.items())

    table = pq.read_table(output)
    names = table["input"].to_pylist()
    assert sorted(names) == sorted(made.good), "each once"
    here = tmp_path / "here.npz"
    command = [sys.executable, "-m", "escort", "run", saved, photos, "--recursive", "--batch", "32", "--output", here]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    with np.load(here) as plain:
        places = {name: place for place, name in enumerate(plain["names"].tolist())}
        expected = plain["outputs"][[places[name] for name in names]]
    assert len(np.unique(expected, axis=0)) > 0.99 * len(expected), "each image has an output of its own"
    np.testing.assert_allclose(table["outputs"].combine_chunks().to_numpy_ndarray(), expected, rtol=1e-4, atol=1e-6)


def test_room_for_workers(saved: Path, images: Path, tmp_path: Path) -> None:
    driver = start(saved, images, tmp_path / "predictions", "--threads", 1000)
    assert driver.process.wait(LIMIT_S) == 1
    assert "error: Ray has room for 0 workers by its CPUs" in driver.errors


def test_serving_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine the process that takes requests is not there within 5 s, and would be killed.
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    from examples.serve import MOST, Classifier

    path, pixels = tmp_path / "model.escort", torch.randint(256, (40, 16, 16, 3), dtype=torch.uint8)
    network = torch.nn.Sequential(escort.Images([0.5] * 3, [0.25] * 3), pruned(tiny())).eval()
    escort.save(escort.convert(network, pixels[:4], methods=["direct"]), path)
    bodies = [io.BytesIO() for _ in pixels]
    for body, image in zip(bodies, pixels, strict=True):
        Image.fromarray(image.numpy()).save(body, "png")
    ray.init(address="local", num_cpus=4, include_dashboard=False)
    try:
        handle = serve.run(Classifier.bind(str(path)))
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(ask, [body.getvalue() for body in bodies]))
        assert ask(b"no image") == (400, {"error": ANY})
        calls = handle.statistics.remote().result()
    finally:
        serve.shutdown()
        ray.shutdown()
    with torch.inference_mode():
        expected = escort.load(path, remeasure=False)(pixels)
    assert [status for status, _ in answers] == [200] * len(pixels)
    np.testing.assert_allclose([said["score"] for _, said in answers], expected.amax(1), rtol=1e-4, atol=1e-5)
    assert sum(size * count for size, count in calls.items()) == len(pixels)
    assert calls.total() < len(pixels) and max(calls) <= MOST, "batches of several"


def ask(body: bytes) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000/", body, timeout=LIMIT_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def table_of(blocks: Blocks) -> dict[str, float]:
    rows = pq.read_table(blocks.folder).to_pylist()
    assert len(rows) == len({row["input"] for row in rows})
    return {row["input"]: row["outputs"] for row in rows}


def test_blocks(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, {"network": "a"})
    assert blocks.settle() == set()
    blocks.write(["x", "y"], np.float32([1, 2]))
    blocks.write(["x", "y"], np.float32([1, 2]))  # a task that is run again
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    blocks.write(["z", "y"], np.float32([3, 2]))  # one of a run that went on beside the next one
    blocks.write(["y"], np.float32([2]))
    assert blocks.settle() == {"x", "y", "z"} and table_of(blocks) == {"x": 1.0, "y": 2.0, "z": 3.0}
    assert blocks.settle() == {"x", "y", "z"}
    blocks.list_failed({"=bad": "no\nimage"})
    assert (tmp_path / FAILED).read_text() == "input,reason\n'=bad,no\\nimage\n"
    assert len(table_of(blocks)) == 3
    blocks.list_failed({})
    assert not (tmp_path / FAILED).exists()
    with pytest.raises(ValueError, match="was made by another network; name another folder"):
        Blocks(tmp_path, {"network": "b"}).settle()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged.parquet is no readable Parquet file of"):
        blocks.settle()
    pq.write_table(pa.table({"input": ["x"]}), tmp_path / "damaged.parquet")
    with pytest.raises(ValueError, match="holds something else than predictions of escort run"):
        blocks.settle()
    (tmp_path / "damaged.parquet").unlink()
    maps = Blocks(tmp_path / "maps", {})
    maps.folder.mkdir()
    maps.write(["x"], np.zeros((1, 4, 2, 3), np.float32))
    table = pq.read_table(maps.folder)
    assert table.column_names == ["input", "outputs"]
    assert table["outputs"].combine_chunks().to_numpy_ndarray().shape == (1, 4, 2, 3)
