"""CUDA graphs, captured so that torch and other threads stay usable whatever happens."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch

from escort.cuda import driver

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
        with self._changed:
            while self._is_stopped and not depth:
                self._changed.wait()
            self._count += 1
        self._own.depth = depth + 1

    def __exit__(self, *error: object) -> None:
        self._own.depth -= 1
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Waits until the calls of other threads have ended, and lets no other one begin. The caller holds `turn`."""
        with self._changed:
            self._is_stopped = True
            while self._count > getattr(self._own, "depth", 0):
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._is_stopped = False
                self._changed.notify_all()


#: Calls of converted networks on GPUs, step by step.
runs = Runs()

#: Captures that could not be ended. Some versions of torch ask such a graph about every later allocation.
_never_ended: list[torch.cuda.CUDAGraph] = []


def captured(calls: Callable[[], object], pool: Any, *, draws: bool = False) -> torch.cuda.CUDAGraph:
    """The calls as a graph of the current stream, whose memory comes from the pool.

    Threads that do not wait for the whole device are not disturbed. The caller holds :data:`turn`.

    Args:
        calls: launch what the graph shall do, on the current stream.
        pool: a handle of ``torch.cuda.graph_pool_handle()``.
        draws: whether the calls may draw random numbers. Other threads then may not.

    Raises:
        RuntimeError: where something cannot be captured, which `calls` may have raised. Torch's allocator and its
            random numbers are left as they were.
    """
    graph = torch.cuda.CUDAGraph()
    with ExitStack() as aside, _no_garbage_collected():
        aside.enter_context(_another_generator())
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        except RuntimeError:
            _give_up(graph, pool)
            raise
        if not draws:
            aside.close()
        try:
            calls()
        except BaseException:
            with suppress(RuntimeError):
                _end(graph, pool)
            raise
        _end(graph, pool)
    return graph


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _give_up(graph, pool)
        raise


def _give_up(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Ends what torch leaves open where a capture cannot be ended: its allocator, which would end the next one too."""
    _never_ended.append(graph)
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


@contextmanager
def _another_generator() -> Iterator[None]:
    """Lends torch another state of its random numbers, which a capture then takes hold of.

    A state that is being captured refuses the draws of other threads and the replays of other graphs; where the
    capture fails, it does so for good.
    """
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    state = random.graphsafe_get_state()
    random.graphsafe_set_state(random.clone_state())
    try:
        yield
    finally:
        random.graphsafe_set_state(state)


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


def survived(error: Exception) -> str:
    """What failed, in a line, on a device that lives on. Memory that torch keeps unused is given back.

    Raises:
        RuntimeError: where the device is lost to this process.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise RuntimeError(f"the device is lost to this process, start another: {error}") from lost
    torch.cuda.empty_cache()
    return in_a_line(error)


def in_a_line(error: Exception) -> str:
    """What failed on a GPU, in a line."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory: {line.removeprefix('CUDA out of memory. ').partition('. GPU')[0]}"
    return line
