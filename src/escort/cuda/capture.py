"""CUDA graphs that leave torch and other threads as they were, and who captures when.

Torch's own captures take hold of its random numbers, which refuses other threads theirs meanwhile, and look after them
in each replay. Calls that are captured here draw none.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch

from escort.cuda import _launch, driver

#: Held while a graph is captured, or while something is timed: a thread that waits for the whole device would end the
#: capture of another.
turn = threading.RLock()


class Runs:
    """Calls that go on while nothing is captured. Several go on at once; ``with`` begins and ends one.

    In its first call on a size cuDNN empties torch's cache, which torch refuses while any thread captures.
    """

    def __init__(self) -> None:
        self._changed, self._count, self._is_stopped = threading.Condition(), 0, False
        self._own = threading.local()

    def __enter__(self) -> None:
        depth = getattr(self._own, "depth", 0)
        try:
            with self._changed:
                while self._is_stopped and not depth:
                    self._changed.wait()
                self._count, self._own.depth = self._count + 1, depth + 1
        except BaseException:  # an interrupt may come at any line, and nobody leaves what was not entered
            if getattr(self._own, "depth", 0) > depth:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self._own.depth -= 1
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Waits until the calls of other threads have ended, and lets no other one begin. The caller holds `turn`.

        What it captures may hold calls of its own.
        """
        depth = getattr(self._own, "depth", 0)
        try:
            with self._changed:
                self._is_stopped = True
                while self._count > depth:
                    self._changed.wait()
            self._own.depth = depth + 1
            yield
        finally:
            self._own.depth = depth
            with self._changed:
                self._is_stopped = False
                self._changed.notify_all()


#: Calls of converted networks on GPUs, step by step.
runs = Runs()


_has_context: Callable[[int], bool] = getattr(torch._C, "_cuda_hasPrimaryContext", lambda index: True)


def wait_for_gpus() -> bool:
    """Waits until all that was launched so far, on any stream, has run.

    Returns:
        Whether it did. While this package times or captures something in another thread, or the current stream is
        captured, nothing may wait for a whole device.
    """
    if not turn.acquire(blocking=False):
        return False
    try:
        if torch.cuda.is_current_stream_capturing():
            return False
        for index in range(torch.cuda.device_count()):
            if _has_context(index):  # else nothing runs there
                torch.cuda.synchronize(index)
    finally:
        turn.release()
    return True


class Graph:
    """What some calls launch, as a graph of the current device that any stream may replay.

    Its memory comes from the pool, which graphs may share that never run at the same time. The caller holds `turn`.

    Args:
        calls: launch what the graph shall do, on the current stream. They draw no random numbers.
        stream: where they are captured, one of :func:`capture_stream`.
        pool: a handle of ``torch.cuda.graph_pool_handle()``. It is new, or a graph lives that has it.

    Raises:
        RuntimeError: where something cannot be captured, or there is no memory; and what `calls` raise. Torch's
            allocator goes on as before.
    """

    def __init__(self, calls: Callable[[], object], stream: torch.cuda.Stream, pool: Any) -> None:
        api, device = driver.api(), torch.cuda.current_device()
        self._launch, self._exec = api.cuGraphLaunch, None
        with torch.cuda.stream(stream), _no_garbage_collected():
            torch._C._cuda_beginAllocateCurrentStreamToPool(device, pool)
            try:
                mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
                driver.call("cuStreamBeginCapture", stream.cuda_stream, mode)
                try:
                    calls()
                except BaseException:
                    with suppress(driver.DriverError):
                        driver.call("cuGraphDestroy", driver.call("cuStreamEndCapture", stream.cuda_stream))
                    raise
                graph = driver.call("cuStreamEndCapture", stream.cuda_stream)
                try:
                    flag = api.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH
                    self._exec = driver.call("cuGraphInstantiate", graph, int(flag))
                finally:
                    driver.call("cuGraphDestroy", graph)
            finally:
                torch._C._cuda_endAllocateToPool(device, pool)
                if self._exec is None:
                    torch._C._cuda_releasePool(device, pool)
        weakref.finalize(self, _destroy, self._exec, device, pool).atexit = False

    def replay(self, stream: int) -> None:
        """Launches it on a stream, given by its address. The thread has used the device before."""
        (status,) = self._launch(self._exec, stream)
        if status:
            raise driver.DriverError("cuGraphLaunch", status).of("a graph of a network")

    def with_input(self, address: int, size: int) -> Callable[[int, torch.Tensor], int]:
        """What copies a tensor to the graph's input and launches the graph, at the least cost of the host.

        It is called with a stream's address and a tensor of the graph's device, of so many bytes as they lie there, and
        returns zero; else the graph was not launched: somebody captures the stream, or the driver refused.
        It must not outlive this.

        Args:
            address: where the input lies.
            size: its bytes.
        """
        launch, copy, ask = map(driver.address, ("cuGraphLaunch", "cuMemcpyDtoDAsync", "cuStreamIsCapturing"))
        return _launch.Replay(launch, copy, ask, int(self._exec), address, size).issue  # type: ignore[arg-type]


def _destroy(graph: Any, device: int, pool: Any) -> None:
    """Frees a graph, by whichever thread lets go of it, and even while that captures something else."""
    api = driver.api()
    with driver.device(device).current():
        mode = driver.call("cuThreadExchangeStreamCaptureMode", api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            driver.call("cuGraphExecDestroy", graph)  # one that still runs is freed when it is done
        finally:
            driver.call("cuThreadExchangeStreamCaptureMode", mode)
    torch._C._cuda_releasePool(device, pool)


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """What a collection frees may wait for the device, which ends a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@lru_cache
def capture_stream(device: int, number: int) -> torch.cuda.Stream:
    """A stream that captures have for themselves, the same one for the same number.

    Torch hands its own streams out again and again, so that another thread may launch work on any of them.
    """
    with driver.device(device).current():
        handle = driver.call("cuStreamCreate", driver.api().CUstream_flags.CU_STREAM_NON_BLOCKING.value)
    return torch.cuda.ExternalStream(int(handle), device=device)


def in_a_line(error: Exception) -> str:
    """What failed on a GPU, in a line of up to 1,000 characters."""
    line = next(iter(str(error).splitlines()), type(error).__name__)[:1000]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory: {line.removeprefix('CUDA out of memory. ').partition('. GPU')[0]}"
    return line
