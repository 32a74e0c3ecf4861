"""What workers of Ray Data run, without Ray: predicting, reading, and taking turns while loading."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import escort
from benchmarks.exhibits.scaling import read_scaling, scaling_table
from benchmarks.suite.scaling import rate
from escort import cache
from escort.cli.images import Preparation
from escort.integrations.ray.workers import (
    BEGUN,
    ENDED,
    ID,
    OUTPUTS,
    PATH,
    PREDICTING_S,
    READING_S,
    REASON,
    Reader,
    Worker,
    Written,
)
from tests.benchmarks.made_up import cells
from tests.cli.named import tiny
from tests.network.models import pruned

X = np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.escort"
    escort.save(escort.convert(pruned(tiny().eval()), torch.from_numpy(X), methods=["direct"]), path)
    return path


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def saved_as(folder: Path, model: nn.Module, *inputs: torch.Tensor) -> Path:
    escort.save(escort.convert(model.eval(), inputs, methods=["direct"]), folder / "model.escort")
    return folder / "model.escort"


def test_a_predictor_gives_what_the_network_does(saved: Path) -> None:
    predictor = escort.ray.Predictor(saved, remeasure=False)
    x = X.copy()
    x.flags.writeable = False  # as Ray's memory is
    names = np.array(list("abcde"))
    result = predictor({"name": names, "x": x})
    assert set(result) == {"name", "outputs"} and result["name"] is names
    with torch.inference_mode():
        expected = escort.load(saved, remeasure=False)(torch.from_numpy(X)).numpy()
    np.testing.assert_array_equal(result["outputs"], expected)
    strided = predictor({"x": np.repeat(X, 2, axis=3)[..., ::2].astype(np.float64)})
    np.testing.assert_allclose(strided["outputs"], expected, rtol=1e-5, atol=1e-6)
    assert predictor.model.graphs.policy == "buckets"


def test_a_predictor_sets_its_threads(saved: Path, threads: None) -> None:
    escort.ray.Predictor(saved, threads=3, remeasure=False)
    assert torch.get_num_threads() == 3


class Two(nn.Module):
    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.conv, self.both = nn.Conv2d(3, 4, 3), both

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        z = self.conv(x) - y
        return (z, x) if self.both else z


def test_arguments_that_are_none(saved: Path) -> None:
    with pytest.raises(TypeError, match=r"columns is a list of names, got 'image'; write \['image'\]"):
        escort.ray.Predictor(saved, columns="image", remeasure=False)
    for threads in (0, True, "2", 1.5):
        with pytest.raises(ValueError, match="threads is a whole number from 1 up, got .*; leave it out"):
            escort.ray.Predictor(saved, threads=threads, remeasure=False)  # type: ignore[arg-type]


def test_columns_are_the_inputs(tmp_path: Path) -> None:
    y = torch.ones(5, 4, 1, 1)
    path = saved_as(tmp_path, Two(both=False), torch.from_numpy(X), y)
    batch = {"x": X, "bias": 2 * y.numpy()}
    result = escort.ray.Predictor(path, columns=["x", "bias"], output="z", remeasure=False)(batch)
    with torch.inference_mode():
        expected = escort.load(path, remeasure=False)(torch.from_numpy(X), 2 * y).numpy()
    np.testing.assert_array_equal(result["z"], expected)
    with pytest.raises(ValueError, match="takes 2 inputs, got the columns x; name one for each"):
        escort.ray.Predictor(path, remeasure=False)


def test_a_column_takes_one_tensor(tmp_path: Path) -> None:
    y = torch.ones(5, 4, 1, 1)
    path = saved_as(tmp_path, Two(both=True), torch.from_numpy(X), y)
    predictor = escort.ray.Predictor(path, columns=["x", "y"], remeasure=False)
    with pytest.raises(TypeError, match="the network returns a tuple, and a column takes one tensor"):
        predictor({"x": X, "y": y.numpy()})


def test_a_worker_reads_and_sets_aside(saved: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    paths = [tmp_path / "a.png", tmp_path / "none.png", tmp_path / "b.png"]
    for path in paths[::2]:
        image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    preparation = Preparation(3, 16, 16)
    reader = Reader(preparation.read, tuple(preparation.blank().shape), "float32", threads=2)
    worker = Worker(reader, path=saved, remeasure=False)
    result = worker({ID: np.array(["a", "none", "b"]), PATH: np.array([str(path) for path in paths])})
    assert set(result) == {ID, OUTPUTS, REASON, READING_S, PREDICTING_S, BEGUN, ENDED}
    assert [bool(reason) for reason in result[REASON]] == [False, True, False]
    assert "none.png is no readable image" in result[REASON][1]
    x = torch.stack([preparation.read(paths[0]), preparation.blank(), preparation.read(paths[2])])
    with torch.inference_mode():
        expected = escort.load(saved, remeasure=False)(x).numpy()
    np.testing.assert_array_equal(result[OUTPUTS], expected)
    spent = (result[READING_S] + result[PREDICTING_S]).sum()
    assert 0.0 < spent <= (result[ENDED][0] - result[BEGUN][0]) * 1.01


@pytest.mark.parametrize("channels_last", [True, False])
def test_zeros_are_as_images_are(channels_last: bool, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.ones((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    for layer in (None, escort.Images([0.5] * 3, [0.5] * 3, channels_last=channels_last)):
        preparation = Preparation(3, 4, 6, layer=layer)
        read, blank = preparation.read(tmp_path / "a.png"), preparation.blank()
        assert (read.shape, read.dtype) == (blank.shape, blank.dtype) and not blank.any()


def test_what_tasks_wrote_adds_up() -> None:
    parts = [Written({"a": "x"}, 1.0, 2.0, 10.0, 12.0), Written({}, 0.5, 0.5, 9.0, 11.0)]
    assert sum(parts, Written()) == Written({"a": "x"}, 1.5, 2.5, 9.0, 12.0)


def test_processes_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "cache"))
    has_turn = threading.Event()

    def wait_for_turn() -> None:
        with cache.turn("loading"):
            has_turn.set()

    other = threading.Thread(target=wait_for_turn)
    with cache.turn("loading"), cache.turn("something else"):
        other.start()
        assert not has_turn.wait(0.2)
    other.join(10)
    assert has_turn.is_set()
    assert cache.clear("plan") == (0, 0)  # locks are no entries


def test_nobody_waits_without_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "cache"))
    with cache.turn("loading"), cache.turn("loading"):
        pass
    with pytest.raises(OSError, match="mine"), cache.turn("loading"):
        raise OSError("mine")


def test_rates_are_of_the_time_in_which_all_work() -> None:
    early = [[1, second, second + 1.0, 1] for second in range(10) for _ in range(8)]
    late = [[2, 4.5 + second, 5.5 + second, 1] for second in range(10) for _ in range(4)]
    per_second, seconds = rate(np.array(early + late, np.float64), 2)
    assert (per_second, seconds) == (12.0, 5.5)
    with pytest.raises(RuntimeError, match="never all at work"):
        rate(np.array([[1, 0.0, 1.0, 1], [2, 2.0, 3.0, 1]]), 2)
    with pytest.raises(RuntimeError, match="never all at work"):
        rate(np.array(early + late, np.float64), 3)


def test_the_table_of_workers() -> None:
    run = {"device": "cpu", "cpu": "a CPU", "isa": "avx2", "cores": [0, 1]}
    about = {"run": run, "network": "n", "weights": "w", "precision": "fp32", "batch": 8, "threads": 1}
    rates = [("arrays", 2, 150.0), ("calls", 1, 100.0), ("arrays", 1, 80.0)]
    rows = [{**about, "source": source, "workers": workers, "per_second": rate} for source, workers, rate in rates]
    lines = cells(scaling_table(rows))
    assert [(line["Source"], line["Workers"]) for line in lines] == [("calls", "-"), ("arrays", "1"), ("arrays", "2")]
    assert [line["Of one call's rate each"] for line in lines] == ["-", "80%", "75%"]
    assert [line["Of the fewest workers' rate each"] for line in lines] == ["-", "-", "94%"]
    assert scaling_table(read_scaling()).rows


@pytest.mark.gpu
def test_a_predictor_on_a_gpu(tmp_path: Path) -> None:
    """Batches of any size, from several threads, as Ray calls it."""
    path = tmp_path / "model.escort"
    model = nn.Sequential(escort.Images([0.5] * 3, [0.25] * 3), pruned(tiny())).eval().cuda()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    escort.save(escort.convert(model, torch.from_numpy(pixels[:8]).cuda()), path)
    predictor = escort.ray.Predictor(path)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels).cuda()).cpu().numpy()
    parts = [pixels[first : first + size] for size in (8, 3, 5) for first in range(0, 200, size)]
    wanted = [expected[first : first + size] for size in (8, 3, 5) for first in range(0, 200, size)]
    with ThreadPoolExecutor(2) as pool:
        for result, want in zip(pool.map(predictor, [{"x": part} for part in parts]), wanted, strict=True):
            np.testing.assert_allclose(result["outputs"], want, rtol=1e-3, atol=1e-4)
    assert predictor.model.graphs.stats()["replays"] > 0
