"""A GPU made of the CPU: a capture notes operators, and a replay runs them again on the same memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from escort.runtime import graphs
from escort.runtime.lanes import Gpu, Lane


class Recording(TorchDispatchMode):
    """What a CUDA graph is: the operators of a capture, with the memory that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):  # else it makes an empty tensor
            self.steps.append((func, args, kwargs or {}, output))
        return output

    def replay(self, stream: int) -> None:
        with torch.no_grad():
            for func, args, kwargs, output in self.steps:
                for there, again in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(there, Tensor):
                        there.copy_(again)


class FakeGpu(Gpu):
    """The CPU as a GPU.

    Attributes:
        current: the address of the current stream.
        sizes: the bytes of each pool.
        needs: how many bytes a capture adds to its pool.
        fails: what the next captures raise.
        during: is called in each capture.
    """

    def __init__(self) -> None:
        self.device, self.index = torch.device("cpu"), -1
        self.current, self.needs = 0, 100
        self._capturing = threading.local()
        self.sizes: dict[Any, int] = {}
        self.fails: list[Exception] = []
        self.during: Callable[[], object] = lambda: None
        self._lanes: dict[int, Lane] = {}

    def unusable(self) -> str | None:
        return None

    def stream(self) -> int:
        return self.current

    def lane(self) -> Lane:
        return self._lanes.setdefault(self.current, FakeLane(self, len(self._lanes)))

    def is_current(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return self.is_captured

    def new_pool(self) -> Any:
        self.sizes[len(self.sizes)] = 0
        return len(self.sizes) - 1

    def capture(self, calls: Callable[[], object], lane: Lane, pool: Any) -> Any:
        self.during()
        recording = Recording()
        self.is_captured = True
        try:
            with recording:
                calls()
                if self.fails:
                    raise self.fails.pop(0)
        finally:
            self.is_captured = False
        self.sizes[pool] += self.needs
        return recording

    def launcher(self, graph: Any, place: Tensor) -> Callable[[int, Tensor], int]:
        def launch(stream: int, x: Tensor) -> int:
            if self.is_captured:
                return -1
            place.copy_(x)
            graph.replay(stream)
            return 0

        return launch

    @property
    def is_captured(self) -> bool:
        """Whether the calling thread captures."""
        return getattr(self._capturing, "now", False)

    @is_captured.setter
    def is_captured(self, now: bool) -> None:
        self._capturing.now = now

    def memory(self) -> int:
        return 8000

    def taken(self) -> int:
        return 0

    def reserved(self) -> dict[Any, int]:
        return dict(self.sizes)

    def at(self, tensor: Tensor) -> Tensor:
        return tensor


class FakeLane(Lane):
    """A lane that needs no events."""

    def __init__(self, gpu: FakeGpu, number: int) -> None:
        super().__init__(0, number)
        self.is_shared = False


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU of that kind for all graphs that are bound from now on."""
    gpu = FakeGpu()
    monkeypatch.setattr(graphs, "Gpu", lambda device: gpu)
    return gpu
