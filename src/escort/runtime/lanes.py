"""Lanes: what replays one behind the other, and what a GPU is asked for by those who capture and replay.

Graphs of one lane share their memory, since none of them runs while another does. Each stream has a lane of its own, up
to a few; the streams after those share one, whose replays wait for each other by an event.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from escort.cuda import driver
from escort.cuda.capture import Graph, capture_stream

_PER_THREAD = 2  # the address that stands for the default stream of each thread, CU_STREAM_PER_THREAD
#: Streams of a GPU that have a lane of their own.
MOST_LANES = 4

_lanes: dict[tuple[int, int], Lane] = {}
_lanes_lock = threading.Lock()


class Lane:
    """One after the other: captures, and replays on the streams that belong to it.

    It is the same for all networks of this process, as a library's workspace belongs to the stream of the capture.

    Attributes:
        number: among those of its device.
        is_shared: whether streams have it that wait for each other.
        lock: held while inputs are copied, a graph is replayed and its outputs are copied.
    """

    def __init__(self, device: int, number: int) -> None:
        self.number, self.lock = number, threading.Lock()
        self._device, self.is_shared = device, number == MOST_LANES
        self._last: int | None = None
        self._workspace: tuple[Graph, Any] | None = None  # what keeps the pool, and the pool

    @cached_property
    def _done(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def enter(self, stream: int) -> None:
        """Lets a stream wait until what was replayed before, on another one, is done. The lock is held."""
        if self.is_shared and self._last not in (None, stream):
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def leave(self, stream: int) -> None:
        """Marks the end of what a stream did in this lane."""
        if self.is_shared:
            self._done.record(torch.cuda.current_stream(self._device))
            self._last = stream

    def capture(self, calls: Callable[[], object], pool: Any) -> Graph:
        """The calls as a graph. The caller holds `turn` and makes the GPU the current one."""
        stream = capture_stream(self._device, self.number)
        self._keep_workspace(stream)
        return Graph(calls, stream, pool)

    def _keep_workspace(self, stream: torch.cuda.Stream) -> None:
        """Lets cuBLAS have its workspace for this lane in a pool that stays.

        Torch keeps one for each thread and stream that captured. Made by the first capture that multiplies, it would
        lie in a pool that goes with that network's graphs, and other graphs would write to it still.
        """
        pool = torch.cuda.graph_pool_handle() if self._workspace is None else self._workspace[1]
        _multiply()  # on the caller's stream, so that this thread has what cuBLAS needs besides
        graph = Graph(_multiply, stream, pool)
        self._workspace = self._workspace or (graph, pool)


def _multiply() -> None:
    """Uses those parts of cuBLAS that keep a workspace."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.empty(16, 16, dtype=dtype, device="cuda")
        F.linear(x @ x, x, x[0])


def lane_of(device: int, stream: int) -> Lane:
    """The lane of a stream, by the address that CUDA gave it."""
    lane = _lanes.get((device, stream))
    if lane is None:
        with _lanes_lock:
            ours = {known.number: known for (index, _), known in _lanes.items() if index == device}
            number = min(len(ours), MOST_LANES)
            lane = _lanes.setdefault((device, stream), ours.get(number) or Lane(device, number))
    return lane


class Gpu:
    """A GPU, as graphs are captured and replayed on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = torch.cuda.current_device() if device.index is None else device.index

    def unusable(self) -> str | None:
        """Why nothing can be captured on it."""
        try:
            driver.api()
        except ImportError as error:
            return str(error)
        backend = torch.cuda.get_allocator_backend()
        return None if backend == "native" else f"torch's memory is handed out by {backend}, not by its own allocator"

    def stream(self) -> int:
        """The current stream, by the address that CUDA gave it."""
        return torch._C._cuda_getCurrentRawStream(self.index)

    def lane(self) -> Lane:
        return lane_of(self.index, self.stream())

    def is_each_threads(self) -> bool:
        """Whether the current stream is CUDA's default stream per thread: many streams by the same address."""
        return self.stream() == _PER_THREAD

    def is_current(self) -> bool:
        return torch._C._cuda_getDevice() == self.index

    def is_capturing(self) -> bool:
        """Whether somebody captures the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, calls: Callable[[], object], lane: Lane, pool: Any) -> Graph:
        return lane.capture(calls, pool)

    def launcher(self, graph: Graph, place: torch.Tensor) -> Callable[[int, torch.Tensor], int]:
        """What copies a tensor to where a graph reads it and launches the graph: see `Graph.with_input`."""
        return graph.with_input(place.data_ptr(), spanned_bytes(place))

    def memory(self) -> int:
        """All of the GPU's memory in bytes."""
        return torch.cuda.get_device_properties(self.index).total_memory

    def taken(self) -> int:
        """The memory in bytes that this and other processes took, and that torch did not take in this one."""
        free, total = torch.cuda.mem_get_info(self.index)
        return total - free - torch.cuda.memory_reserved(self.index)

    def reserved(self) -> dict[Any, int]:
        """The memory of each pool in bytes."""
        sizes: dict[Any, int] = {}
        for segment in torch.cuda.memory_snapshot():
            if segment["device"] == self.index:
                pool = tuple(segment["segment_pool_id"])
                sizes[pool] = sizes.get(pool, 0) + segment["total_size"]
        return sizes

    def at(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor where another one lies, which does not keep that memory from being used again."""
        if not tensor.numel():
            return tensor
        memory = _Memory(tensor.data_ptr(), spanned_bytes(tensor))
        there = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
        return there.as_strided(tensor.shape, tensor.stride())


def spanned_bytes(tensor: torch.Tensor) -> int:
    """The bytes from the first to the last element of a tensor that has some."""
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


class _Memory:
    """Bytes on a GPU, in the form in which libraries hand tensors to each other."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }
