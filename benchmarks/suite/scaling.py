"""How many samples per second workers of Ray Data predict, beside one process that calls the network in a loop."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import escort
from benchmarks.suite.rows import check
from escort.integrations.ray import Predictor
from escort.layers import Images
from escort.planner.cores import Watch

_BLOCK_BYTES = 1 << 26  # of a block of samples at most
_BLOCKS = 8  # of each worker at least: Ray gives some to the first ones before the last ones are there
_WARM_UP = 4  # calls
_READY_S = 120  # that workers wait for one another
_MOST_ERROR = 1e-2  # of workers against a call, of any precision
_PHOTO = 375, 500  # rows and columns of an image that is decoded, as in ImageNet


@dataclass(frozen=True)
class ScalingRow:
    """The rate of so many workers.

    Attributes:
        source: "calls" of one process in a loop, on a batch that lies on the device; "arrays" that are decoded already
            and "images" to be decoded, by workers of Ray Data.
        threads: of each worker, on a CPU.
        per_second: samples, from when the last worker began until the first had nothing left.
        seconds: how long that was.
        others: the share of the cores' time that other processes took meanwhile; of workers it has no number.
    """

    network: str
    weights: str
    precision: str
    source: str
    batch: int
    threads: int
    workers: int = 1
    per_second: float = 0.0
    seconds: float = 0.0
    others: float | None = None


class Timed(Predictor):
    """A Predictor that says when which process worked on how many samples, and begins once all are there and warm.

    Args:
        ready: a folder, in which each worker leaves a file.
        workers: how many there will be.
        batch: samples of a batch.
    """

    def __init__(self, path: Path, *, ready: Path, workers: int, batch: int, **options: Any) -> None:
        super().__init__(path, columns=["data"], **options)
        x = sample(self.model, batch).numpy()
        for _ in range(_WARM_UP):
            super().__call__({"data": x})
        (ready / str(os.getpid())).touch()
        self._ready, self._workers = ready, workers

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        until = time.monotonic() + _READY_S
        while len(list(self._ready.iterdir())) < self._workers:
            if time.monotonic() > until:
                raise RuntimeError(f"of {self._workers} workers not all began within {_READY_S} s; ask for fewer")
            time.sleep(0.01)
        begin = time.time()
        result = super().__call__(batch)
        count = len(result["outputs"])
        events = np.array([[os.getpid(), begin, time.time(), 1.0]] * count)
        return {**result, "events": events}


def rate(events: NDArray[np.float64], workers: int) -> tuple[float, float]:
    """Samples per second while all workers were at work, and for how many seconds that was.

    Args:
        events: of each sample its worker, when its batch began and ended, and 1.
        workers: how many there were.
    """
    names = np.unique(events[:, 0])
    begin = max(events[events[:, 0] == name, 1].min() for name in names)
    end = min(events[events[:, 0] == name, 2].max() for name in names)
    if end <= begin or len(names) != workers:
        raise RuntimeError("the workers were never all at work: measure for longer")
    inside = np.clip(np.minimum(events[:, 2], end) - np.maximum(events[:, 1], begin), 0.0, None)
    return float((inside / (events[:, 2] - events[:, 1])).sum() / (end - begin)), float(end - begin)


def calls(path: Path, batch: int, threads: int, seconds: float) -> tuple[float, float, float]:
    """Samples per second of one process that calls the network back to back, the seconds, and the share of others."""
    with _threads(threads):
        model = escort.load(path)
        x = sample(model, batch).to(model.plan.device)
        with torch.inference_mode():
            for _ in range(_WARM_UP):
                model(x)
            _wait(x)
            watch, begin, count = Watch(), time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                for _ in range(8):
                    model(x)
                _wait(x)
                count += 8 * batch
            passed = time.perf_counter() - begin
    return count / passed, passed, watch.others_share()


def sample(model: escort.ConvertedModel, batch: int) -> torch.Tensor:
    """A batch of what a network takes: bytes, or floats of its type, which numpy has."""
    (shape, *_), (dtype, *_) = model.plan.input_shapes, model.plan.input_types
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.uint8:
        return torch.randint(256, (batch, *shape[1:]), dtype=dtype, generator=generator)
    return torch.randn(batch, *shape[1:], generator=generator).to(dtype)


def arrays(path: Path, batch: int, workers: int, threads: int, samples: int) -> tuple[float, float]:
    """Samples per second of workers on arrays that lie in Ray's memory, and the seconds in which all were at work."""
    import ray

    from escort.integrations.ray.job import actors

    model = escort.load(path, remeasure=False)
    on_gpus, x = model.plan.device != "cpu", sample(model, batch)
    with torch.inference_mode():
        expected = model(x.to(model.plan.device)).float().cpu().numpy()
    del model
    batches = max(1, min(_BLOCK_BYTES // x.nbytes, samples // (workers * _BLOCKS * batch)))
    block = ray.put(np.concatenate([x.numpy()] * batches))
    blocks = max(workers * _BLOCKS, -(-samples // (batches * batch)))
    events = []
    with tempfile.TemporaryDirectory(dir=path.parent) as ready:
        worker = {"path": path, "ready": Path(ready), "workers": workers, "batch": batch}
        dataset = ray.data.from_numpy_refs([block] * blocks).map_batches(
            Timed,
            fn_constructor_kwargs={**worker, "threads": None if on_gpus else threads},
            batch_size=batch,
            batch_format="numpy",
            **actors(workers, threads, on_gpus=on_gpus),
        )
        for part in dataset.iter_batches(batch_size=None):
            error = np.linalg.norm(part["outputs"][:batch] - expected) / np.linalg.norm(expected)
            check(float(error), _MOST_ERROR, f"{path.name} by workers")
            events.append(part["events"])
    return rate(np.concatenate(events), workers)


def images(path: Path, batch: int, workers: int, threads: int, samples: int) -> tuple[float, float]:
    """The same of `escort run --engine ray` on photographs, made up and as large as ImageNet's."""
    from escort.cli.images import Preparation
    from escort.integrations.ray.blocks import Blocks
    from escort.integrations.ray.job import Job, Workers
    from escort.integrations.ray.workers import Reader

    model = escort.load(path, remeasure=False)
    layer = next((module for module in model.network.modules() if isinstance(module, Images)), None)
    _, *sizes = model.plan.input_shapes[0]
    channels = sizes.pop(2 if layer is not None and layer.channels_last else 0)
    height, width = sizes
    preparation, on_gpus = Preparation(channels, height, width, layer=layer), model.plan.device != "cpu"
    del model
    blank = preparation.blank().numpy()
    reader = Reader(preparation.read, blank.shape, str(blank.dtype), threads)
    with tempfile.TemporaryDirectory() as folder:
        photos = dict(_photos(Path(folder) / "photos", samples))
        predictor = {"path": path, "threads": None if on_gpus else threads}
        job = Job(photos, reader, predictor, Blocks(Path(folder) / "predictions", {}), batch, least_rows=8 * batch)
        report = job.run(Workers(workers, on_gpus, threads))
    return report.per_second, report.working_s


def _photos(folder: Path, count: int) -> Iterator[tuple[str, Path]]:
    """Photographs by name: a few, of a few waves and noise, under many names."""
    from PIL import Image

    folder.mkdir()
    rng, (height, width) = np.random.default_rng(0), _PHOTO
    for kind in range(min(count, 16)):
        waves = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(waves).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, np.int16) + rng.integers(-12, 13, (height, width, 3), np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{kind}.jpg", quality=90)
    for index in range(count):
        yield f"{index:07}", folder / f"{index % 16}.jpg"


def measure(path: Path, about: ScalingRow, counts: Sequence[int], seconds: float) -> Iterator[ScalingRow]:
    """The rows of a row's source and batch: of calls one, of workers one for each count.

    Args:
        path: a network that was planned for the row's threads.
        seconds: about how long each takes.
    """
    batch, threads = about.batch, about.threads
    per_second, passed, others = calls(path, batch, threads, seconds)
    if about.source == "calls":
        yield replace(about, per_second=per_second, seconds=passed, others=others)
        return
    by_workers = {"arrays": arrays, "images": images}[about.source]
    for workers in counts:
        reached, passed = by_workers(path, batch, workers, threads, int(per_second * seconds * workers))
        yield replace(about, workers=workers, per_second=reached, seconds=passed)


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
