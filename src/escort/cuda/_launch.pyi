"""What launch.cpp offers."""

from collections.abc import Sequence

from torch import Tensor as TorchTensor

class Tensor:
    def __init__(
        self,
        type: int,  # noqa: A002
        element_bytes: int,
        sizes: Sequence[int],
        samples_along: int,
        swizzle: int,
        promotion: int,
        pitch: int,
        begin: int,
    ) -> None: ...

class TensorMap: ...

def tiled(function: int, x: Tensor, box: Sequence[int]) -> TensorMap: ...
def im2col(
    function: int,
    x: Tensor,
    lower: Sequence[int],
    upper: Sequence[int],
    channels: int,
    pixels: int,
    steps: Sequence[int],
) -> TensorMap: ...

class Launch:
    def __init__(
        self,
        kernel: str,
        launch: int,
        function: int,
        device: int,
        block: int,
        shared_bytes: int,
        attributes: Sequence[tuple[int, tuple[int, int, int]]],
        parameters: Sequence[bytes | str | TensorMap],
    ) -> None: ...
    def issue(
        self, grid: Sequence[int], stream: int, args: tuple[TorchTensor | int | float | None, ...]
    ) -> tuple[int, int] | None: ...

class Replay:
    def __init__(self, launch: int, copy: int, ask_capturing: int, graph: int, place: int, size: int) -> None: ...
    def issue(self, stream: int, x: TorchTensor) -> int: ...
