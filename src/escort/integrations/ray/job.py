"""A job of images: read, predicted and written by Ray Data, to be run again until all is done."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from escort.integrations.ray.blocks import Blocks
from escort.integrations.ray.workers import ID, PATH, Reader, Worker, Written
from escort.report import printable

_MOST_BYTES = 1 << 26  # of read images in one block, which is what a task takes
_WORKERS_PER_WRITER = 4
_LOCK = ".lock"
_NO_UTF8 = "its name is no UTF-8; rename it"


@dataclass(frozen=True)
class Workers:
    """The actors that predict.

    Attributes:
        count: how many; None for as many as there are GPUs, or threads of theirs on all cores.
        on_gpus: whether each has a GPU, and reading is done by others; else each reads, too.
        threads: of each, on a CPU.
    """

    count: int | None
    on_gpus: bool
    threads: int = 1


@dataclass(frozen=True)
class Report:
    """What a job did.

    Attributes:
        done_before: how many inputs were done when it began.
        done: how many it did.
        workers: how many predicted; 0 where there was nothing to do.
        seconds: how long it took.
        written: what the workers say.
    """

    done_before: int
    done: int
    workers: int
    seconds: float
    written: Written

    @property
    def working_s(self) -> float:
        """From the first image that was read to the last prediction."""
        return max(self.written.ended - self.written.begun, 0.0)

    @property
    def per_second(self) -> float:
        """Inputs per second while there was work."""
        return (self.done + len(self.written.failed)) / self.working_s if self.workers else 0.0

    @property
    def predicting_share(self) -> float:
        """The share of that time in which the workers predicted; the rest is reading, and waiting."""
        share = self.written.predicting_s / (self.working_s * self.workers) if self.workers else 0.0
        return min(share, 1.0)  # on a GPU two batches at a time


@dataclass(frozen=True)
class Job:
    """Images to predict.

    Attributes:
        images: where they lie, by their names, which say what is done.
        reader: how they are read.
        predictor: what a Predictor takes.
        batch: how many go through the network at a time.
        least_rows: how many predictions a file has at least: what is lost at most where everything is killed.
    """

    images: Mapping[str, Path]
    reader: Reader
    predictor: Mapping[str, Any]
    blocks: Blocks
    batch: int
    least_rows: int

    def run(self, workers: Workers) -> Report:
        """Predicts what is not done yet. A killed worker is replaced; a job that was killed is run again.

        Raises:
            ImportError: where Ray is not installed.
            ValueError: where the folder holds other files, or another job writes to it.
            RuntimeError: where there is no device for a worker, or predictions are missing at the end.
        """
        begin = time.perf_counter()
        with _alone(self.blocks.folder):
            before = self.blocks.settle() & self.images.keys()
            left = {name: path for name, path in self.images.items() if name not in before}
            unnamed = {name: _NO_UTF8 for name in left if not _is_utf8(name)}
            named = {name: path for name, path in left.items() if name not in unnamed}
            written, count = Written(), 0
            if named:
                with _cluster():
                    written, count = self._predict(named, workers)
            missing = named.keys() - self.blocks.settle() - written.failed.keys()
            if missing:
                raise RuntimeError(f"{len(missing)} predictions are missing, of {min(missing)} for one; run it again")
            written += Written({printable(name): reason for name, reason in unnamed.items()})
            self.blocks.list_failed(written.failed)
            self.blocks.tidy()
        done = len(left) - len(written.failed)
        return Report(len(before), done, count, time.perf_counter() - begin, written)

    def _predict(self, images: Mapping[str, Path], workers: Workers) -> tuple[Written, int]:
        """What was written, and by how many workers."""
        import pyarrow as pa
        import ray

        from escort.integrations.ray.sink import Sink

        count = _count(workers)
        names, paths = list(images), [str(path) for path in images.values()]
        table, rows = pa.table({ID: pa.array(names), PATH: pa.array(paths)}), self._rows_of_a_block()
        dataset = ray.data.from_arrow([table.slice(first, rows) for first in range(0, len(table), rows)])
        options: dict[str, Any] = {"batch_size": self.batch, "batch_format": "numpy"}
        reader: Reader | None = self.reader
        if workers.on_gpus:
            dataset, reader = dataset.map_batches(self.reader, **options), None
        dataset = dataset.map_batches(
            Worker,
            fn_constructor_kwargs={"reader": reader, **self.predictor},
            **actors(count, workers.threads, on_gpus=workers.on_gpus),
            **options,
        )
        sink = Sink(self.blocks, self.least_rows)
        # Where workers have all cores, writing must not wait for one. A writer starts slowly and keeps up with several.
        dataset.write_datasink(sink, ray_remote_args={"num_cpus": 0}, concurrency=-(-count // _WORKERS_PER_WRITER))
        return sink.written, count

    def _rows_of_a_block(self) -> int:
        """Whole batches, since the last batch of a block is what is left."""
        image_bytes = np.dtype(self.reader.dtype).itemsize * int(np.prod(self.reader.shape))
        batches = max(1, _MOST_BYTES // (image_bytes * self.batch))
        return min(batches * self.batch, -(-self.least_rows // self.batch) * self.batch)


def actors(count: int, threads: int, *, on_gpus: bool) -> dict[str, Any]:
    """What map_batches takes for actors that predict.

    On a GPU two batches at a time, so that one is copied while the other is computed; and no core, which an actor with
    a GPU would get by default: with few of them none would be left to read.
    """
    from ray.data import ActorPoolStrategy

    if not on_gpus:
        return {"compute": ActorPoolStrategy(size=count), "num_cpus": threads}
    pool = ActorPoolStrategy(size=count, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True)
    return {"compute": pool, "num_gpus": 1, "num_cpus": 0}


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _cluster() -> Iterator[None]:
    """The cluster that there is, or one of this machine while the job takes, which tells its makers nothing."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()  # which also ends what it prints of its workers


def _count(workers: Workers) -> int:
    """How many workers there are. Raises RuntimeError where the cluster has no room for them."""
    import ray

    kind = "GPU" if workers.on_gpus else "CPU"
    room = int(ray.cluster_resources().get(kind, 0)) // (1 if workers.on_gpus else workers.threads)
    if room < (workers.count or 1):
        raise RuntimeError(
            f"Ray has room for {room} workers by its {kind}s; ask for as many, or for fewer threads each"
        )
    return workers.count or room


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other jobs of this machine out of a folder. Raises ValueError where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another job writes to it; wait for it, or name another folder") from error
        yield
