"""What kernels/bindings.cpp offers; kernels/cpu/direct.hpp describes the tables."""

from collections.abc import Sequence

from escort.filter import IntArray

def isas() -> list[tuple[str, int, int]]: ...
def max_pool2d(
    x: int,
    y: int,
    planes: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
) -> None: ...

class DirectConvolution:
    def __init__(
        self,
        *,
        isa: str,
        entries: IntArray,
        rows: IntArray,
        blocks: IntArray,
        jobs: IntArray,
        runs: IntArray,
        segments: IntArray,
        tiles: IntArray,
        in_place: bool,
        column_stride: int,
        channel_stride: int,
        stage_size: int,
        partial_size: int,
        x_image: int,
        x_plane: int,
        y_image: int,
        y_plane: int,
        activation: int,
    ) -> None: ...
    def run(self, x: int, residual: int, y: int, images: int, threads: int) -> None: ...

def keep_freed_memory(bytes: int) -> bool: ...
