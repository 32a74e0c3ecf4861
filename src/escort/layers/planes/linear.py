"""Linear layers of a classifier, with the activation behind them: for few samples by a kernel of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort import reference
from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from escort.cuda.params import pack
from escort.layers.planes.base import MOST, OnPlanes, Planes, Work
from escort.methods import activation
from escort.problem import Activation, Epilogue

#: The activations that need nothing but their name.
ACTIVATIONS: tuple[Activation, ...] = "none", "relu", "relu6", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid"
_WARPS = 32  # of a block at most
_MOST_SAMPLES = 4  # beyond, multiplying 16-bit weights takes longer than reading them, and registers do not suffice


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order.

    Attributes:
        columns, rows: of the weights.
        pixels: of a map that lies in NHWC; 1 where x lies as the weights' columns do.
        block_rows: of a block.
        split: warps that share a row.
        bound: 0 none, 1 ReLU, 2 ReLU6.
    """

    columns: int
    rows: int
    pixels: int
    block_rows: int
    split: int
    bound: int


class _Linear(nn.Linear):
    activation: Activation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.by_torch(input.flatten(1))

    def by_torch(self, x: Tensor) -> Tensor:
        """The layer of x (..., in_features) by torch's operators."""
        return reference.activate(F.linear(x, self.weight, self.bias), Epilogue(activation=self.activation))


class FusedLinear(OnPlanes, _Linear):
    """``activation(linear(x))`` of x (N, in_features), for few samples on a GPU by kernels/cuda/linear.cu.

    Attributes:
        activation: what runs last, of :data:`ACTIVATIONS`.
        flattens: whether x is (N, C, H, W), which is flattened first, whichever way it lies.
    """

    def __init__(
        self, in_features: int, out_features: int, activation: Activation = "none", flattens: bool = False
    ) -> None:
        super().__init__(in_features, out_features)
        if activation not in ACTIVATIONS:
            raise ValueError(f"a linear layer has an activation of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.flattens = activation, flattens

    @classmethod
    def of(cls, linear: nn.Linear, activation: Activation, *, flattens: bool) -> FusedLinear:
        """The layer that shares the tensors of one of torch's, which must have a bias."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, activation, flattens)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.eval()

    def settings(self) -> tuple[Any, ...]:
        return self.in_features, self.out_features, self.activation

    def tables(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias

    def is_taken(self, x: Tensor) -> bool:
        return super().is_taken(x) and self.weight.data_ptr() % 16 == 0

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # noqa: A002
        if not self.flattens and input.ndim != 2:
            return self.by_torch(input)
        result: Tensor = super().forward(self._as_maps(input))
        return result

    def binaries(self, *inputs: Tensor) -> tuple[Binary, ...]:
        return super().binaries(*map(self._as_maps, inputs))

    def _as_maps(self, x: Tensor) -> Tensor:
        return x[:, :, None, None] if x.ndim == 2 and not self.flattens else x

    @staticmethod
    def work(settings: tuple[Any, ...], x: Planes, *others: Planes) -> Work | None:
        columns, rows, name = settings
        samples, channels, height, width = x.shape
        pixels, size, gpu = height * width if x.is_last else 1, x.dtype.itemsize, x.gpu
        vector = x.vector(columns)
        if channels * height * width != columns or (pixels > 1 and channels % vector):
            return None
        block_rows = min(-(-rows // gpu.multiprocessors), _WARPS)
        split = _WARPS // block_rows
        shared_bytes = -(-samples * columns * size // 16) * 16 + 4 * block_rows * split * samples
        if samples > _MOST_SAMPLES or shared_bytes > gpu.shared_bytes or columns * samples > MOST:
            return None
        epilogue = Epilogue(activation=name)
        params = Params(columns, rows, pixels, block_rows, split, activation.bound(epilogue))
        return Work(
            linear_kernel(x.dtype, vector, samples, name),
            (((-(-rows // block_rows), 1, 1), (pack(params),)),),
            (samples, rows),
            vector * size,
            tables=2,
            shared_bytes=shared_bytes,
            threads=32 * block_rows * split,
        )


def linear_kernel(dtype: torch.dtype, vector: int, samples: int, name: Activation) -> Variant:
    """The kernel for elements of a type, so many at once, of so many samples, with an activation."""
    macros = Planes.macros(dtype, vector) | {"SAMPLES": samples} | activation.macros(Epilogue(activation=name))
    return Variant("linear.cu", macros)
