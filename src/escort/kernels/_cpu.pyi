"""What kernels/cpu/bindings.cpp offers; direct.hpp there describes the tables, spread_channels.hpp the order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def isas() -> list[tuple[str, int, int]]: ...
def keep_freed_memory(most_bytes: int) -> bool: ...
def fork_join_ns(threads: int, at_hand: bool) -> float: ...
def assume_fork_join_ns(nanoseconds: float) -> None: ...
def spread_channels(
    sites: NDArray[np.int32], channels: NDArray[np.int32], site_count: int, channel_count: int, kept: int, of: int
) -> list[int]: ...

class DirectConvolution:
    def __init__(self, isa: str, tables: dict[str, NDArray[Any]]) -> None: ...
    def run(self, x: int, residual: int, y: int, samples: int, threads: int) -> None: ...

class MaxPool2d:
    def __init__(
        self,
        input_size: Sequence[int],
        output_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None: ...
    def run(self, x: int, y: int, planes: int, threads: int) -> None: ...
