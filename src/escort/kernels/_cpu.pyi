"""What kernels/cpu/ offers; its headers describe tables, orders of channels, programs and operations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def isas() -> list[tuple[str, int, int]]: ...
def keep_freed_memory(most_bytes: int) -> bool: ...
def fork_join_ns(threads: int, at_hand: bool) -> float: ...
def assume_fork_join_ns(nanoseconds: float) -> None: ...
def spread_channels(
    sites: NDArray[np.int32],
    channels: NDArray[np.int32],
    site_count: int,
    channel_count: int,
    kept: int,
    of: int,
    cell_cost: int,
) -> list[int]: ...

Place = tuple[int, int, int]  # buffer (-1 for none), offset, and from one sample to the next

class Op:
    input_sizes: list[int]
    output_size: int

class NativeProgram:
    def __init__(
        self,
        instructions: Sequence[tuple[Op, int, Sequence[Place], Place]],
        buffers: int,
        arena_size: int,
        samples: int = 1,
        chunk: int = 1,
    ) -> None: ...
    def run(self, buffers: Sequence[int], threads: int, take_chunks: bool = False) -> None: ...

class Convolution(Op):
    def run(self, x: int, residual: int, y: int, samples: int, threads: int) -> None: ...

class LinearConvolution(Convolution):
    def __init__(
        self, in_channels: int, out_channels: int, activation: int, tables: dict[str, NDArray[np.float32]]
    ) -> None: ...

class DepthwiseConvolution(Convolution):
    def __init__(self, isa: str, tables: dict[str, NDArray[Any]]) -> None: ...

class DirectConvolution(Convolution):
    def __init__(self, isa: str, tables: dict[str, NDArray[Any]]) -> None: ...

class MaxPool2d(Op):
    def __init__(
        self, channels: int, input_size: Sequence[int], output_size: Sequence[int], window: Sequence[Sequence[int]]
    ) -> None: ...
    def run(self, x: int, y: int, samples: int, threads: int) -> None: ...

class Elementwise(Op):
    def __init__(
        self,
        combine: str,
        activation: int,
        slope: float,
        shape: Sequence[int],
        a_strides: Sequence[int],
        b_strides: Sequence[int],
    ) -> None: ...

class Copy(Op):
    def __init__(self, shape: Sequence[int], strides: Sequence[int]) -> None: ...

class Pad(Op):
    def __init__(self, channels: int, input_size: Sequence[int], borders: Sequence[int], value: float) -> None: ...

class BatchNorm(Op):
    def __init__(self, channels: int, input_size: Sequence[int], epsilon: float) -> None: ...

class AveragePool(Op):
    def __init__(
        self,
        channels: int,
        input_size: Sequence[int],
        rows: Sequence[tuple[int, int, float]],
        columns: Sequence[tuple[int, int, float]],
    ) -> None: ...

class Resize(Op):
    def __init__(
        self,
        channels: int,
        input_size: Sequence[int],
        rows: Sequence[tuple[int, int, float]],
        columns: Sequence[tuple[int, int, float]],
    ) -> None: ...

class Bicubic(Op):
    def __init__(
        self,
        channels: int,
        input_size: Sequence[int],
        rows: Sequence[tuple[Sequence[int], Sequence[float]]],
        columns: Sequence[tuple[Sequence[int], Sequence[float]]],
    ) -> None: ...

class Softmax(Op):
    def __init__(self, outer: int, size: int, inner: int) -> None: ...

class Linear(Op):
    def __init__(self, in_features: int, out_features: int) -> None: ...
