"""Compiles ahead what rows will compile: processes of their own run torch.compile, whose results lie in files.

Torch keeps what it compiled for a graph on disk, and finds it there in any process. Compiling a network takes a minute
of one core, and little of the GPU; so rows that are still to come compile while the first are measured, and none of
these processes runs while something is raced.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch

from escort.problem import TORCH_DTYPE, MemoryFormat, Precision

log = logging.getLogger("escort.benchmarks")
#: What compiles, followed by a compilation as JSON.
PROGRAM = (sys.executable, "-m", "benchmarks.ahead")


@dataclass(frozen=True)
class Compilation:
    """What a row compiles by torch.compile: the weights do not matter.

    Attributes:
        formats: the memory formats in which the network is compiled.
        of_the_paper: as :func:`benchmarks.paper_networks.paper_network` builds it.
    """

    network: str
    batch: int
    precision: Precision
    device: str
    formats: tuple[MemoryFormat, ...]
    of_the_paper: bool = False


class Ahead:
    """So many processes that compile. None compile anything where that is 0.

    What they compile is found by the process that made this, and by nobody else that has other caches.
    """

    def __init__(self, processes: int = 0) -> None:
        self.processes = processes
        self._pool: ThreadPoolExecutor | None = None
        self._results: dict[Compilation, Future[None]] = {}
        self._running: set[subprocess.Popen[str]] = set()
        self._turn = threading.RLock()  # held while processes are stopped: none begins then
        self._is_paused = False
        self._is_over = False
        self._current: Compilation | None = None

    @contextmanager
    def of(self, compilations: Iterable[Compilation | None]) -> Iterator[None]:
        """Compiles these, in their order, until the end of the block, which ends what still runs.

        Within such a block another one does nothing: it lasts for several measurements.
        """
        wanted = dict.fromkeys(each for each in compilations if each is not None) if self.processes else {}
        if not wanted or self._pool is not None:
            yield
            return
        self._pool = ThreadPoolExecutor(self.processes)
        self._results = {each: self._pool.submit(self._compile, each) for each in wanted}
        try:
            yield
        finally:
            self._is_over = True
            self._pool.shutdown(wait=False, cancel_futures=True)
            with self._turn:
                self._signal(signal.SIGKILL)
            self._pool.shutdown()

    def turn_to(self, compilation: Compilation | None) -> None:
        """Says which one the rows are about that are measured from now on."""
        self._current = compilation

    def wait(self) -> None:
        """Until that one is compiled, which would take as long here."""
        result = None if self._current is None else self._results.get(self._current)
        if result is None or result.done():
            return
        begin = time.perf_counter()
        result.result()
        log.info("%s: waited %.1f s for torch.compile", self._current.network, time.perf_counter() - begin)  # type: ignore[union-attr]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops all processes meanwhile; within such a block another one changes nothing."""
        with self._turn:
            if self._is_paused:
                yield
                return
            self._is_paused = True
            self._signal(signal.SIGSTOP)
            try:
                yield
            finally:
                self._is_paused = False
                self._signal(signal.SIGCONT)

    def _compile(self, compilation: Compilation) -> None:
        words = [*PROGRAM, json.dumps(asdict(compilation))]
        # Torch would start processes of its own, which could not be stopped with this one.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2"}
        begin = time.perf_counter()
        with self._turn:
            if self._is_over:
                return
            process = subprocess.Popen(
                words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
            )
            self._running.add(process)
        _, said = process.communicate()
        with self._turn:
            self._running.discard(process)
        lines = said.strip().splitlines()
        how = "" if process.returncode == 0 else f", which failed: {lines[-1] if lines else process.returncode}"
        log.info("%s: compiled ahead in %.1f s%s", compilation.network, time.perf_counter() - begin, how)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):  # it may just have ended
                os.killpg(process.pid, number)


def compile_(compilation: Compilation) -> None:
    """Compiles a network as a row does, and runs it once."""
    from benchmarks.networks import NETWORKS
    from benchmarks.paper_networks import FACTORIES
    from benchmarks.suite.networks import dense_ways
    from escort.cli.rivals import dense_at_its_best

    network = NETWORKS[compilation.network]
    factory = FACTORIES[compilation.network] if compilation.of_the_paper else network.factory
    storage = TORCH_DTYPE[compilation.precision]
    model = factory().eval().to(compilation.device, storage)
    x = torch.randn(compilation.batch, *network.input_size).to(compilation.device, storage)
    with torch.inference_mode(), dense_at_its_best(compilation.precision):
        torch.backends.cudnn.benchmark = False  # what cuDNN would try here, it tries again elsewhere
        for way in dense_ways(model, x, compilation.formats, compiled=True):
            way.run()


def main(job: str) -> None:
    fields = json.loads(job)
    compile_(Compilation(**{**fields, "formats": tuple(fields["formats"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
