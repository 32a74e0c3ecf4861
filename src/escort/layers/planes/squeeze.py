"""Squeeze-excitation: the gates of maps' channels, computed from the channels' means by two dense layers."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort.cuda.compiler import Variant
from escort.cuda.kernel import NATIVE_CAPABILITY
from escort.cuda.params import pack
from escort.layers.planes.base import MOST, THREADS, OnPlanes, Planes, Work
from escort.problem import Activation

#: The activations that such layers have, in the order of their numbers in the kernel.
ACTIVATIONS: tuple[Activation, ...] = "relu", "silu", "sigmoid", "hardsigmoid"
_TABLES, _LOG_CLUSTER = 4, 3
_MOST_SHARED_BYTES = 96 * 1024  # two blocks of a multiprocessor
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class Params:
    """The kernel's parameters: the fields of its struct, in their order.

    Attributes:
        channels: of x and of the gates.
        hidden: outputs of the first layer.
        pixels: of a plane.
        slice: channels of a block of a cluster, a multiple of a vector.
        log_cluster: how many blocks share a sample, as a power of two.
        activation, gate: behind the first and the second layer, their places in `ACTIVATIONS`.
        share: of a sum that is the mean.
    """

    channels: int
    hidden: int
    pixels: int
    slice: int
    log_cluster: int
    activation: int
    gate: int
    share: float


class _Squeeze(nn.Module):
    activation: Activation
    gate_activation: Activation
    names: tuple[str, str]

    def forward(self, x: Tensor) -> Tensor:
        hidden = _APPLIED[self.activation](self._layers[0](F.adaptive_avg_pool2d(x, 1)))
        return _APPLIED[self.gate_activation](self._layers[1](hidden))

    @property
    def _layers(self) -> tuple[nn.Module, nn.Module]:
        first, second = (self.get_submodule(name) for name in self.names)
        return first, second


_OWN = frozenset(("in_channels", "hidden_size", "names", "activation", "gate_activation", "_layers"))


class Squeeze(OnPlanes, _Squeeze):
    """``gate(conv2(activation(conv1(mean of x))))``, (N, C, 1, 1) of x (N, C, H, W), the convolutions of one pixel.

    For channels_last on a GPU by kernels/cuda/squeeze.cu, in one launch.

    Attributes:
        in_channels, hidden_size: C, and the outputs of the first convolution.
        activation, gate_activation: behind the convolutions, of :data:`ACTIVATIONS`.
        names: of the convolutions within this module, which keep their paths.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        activation: Activation = "silu",
        gate_activation: Activation = "sigmoid",
        names: tuple[str, str] = ("fc1", "fc2"),
    ) -> None:
        super().__init__()
        if unknown := {activation, gate_activation} - {*ACTIVATIONS}:
            raise ValueError(f"it has activations of {', '.join(ACTIVATIONS)}, got {unknown.pop()}")
        if not are_names(names) or any(name in _OWN or hasattr(self, name) for name in names):
            raise ValueError(f"its convolutions have two names of their own, got {names}")
        self.in_channels, self.hidden_size, self.names = in_channels, hidden_size, (names[0], names[1])
        self.activation, self.gate_activation = activation, gate_activation
        self.add_module(names[0], nn.Conv2d(in_channels, hidden_size, 1))
        self.add_module(names[1], nn.Conv2d(hidden_size, in_channels, 1))

    def settings(self) -> tuple[Any, ...]:
        return self.in_channels, self.hidden_size, self.activation, self.gate_activation

    def tables(self) -> tuple[Tensor, ...]:
        return tuple(tensor for layer in self._layers for tensor in (layer.weight, layer.bias))  # type: ignore[misc]

    def is_taken(self, x: Tensor) -> bool:
        return super().is_taken(x) and all(table.data_ptr() % _VECTOR_BYTES == 0 for table in self.tables())

    @staticmethod
    def work(settings: tuple[Any, ...], x: Planes, *others: Planes) -> Work | None:
        channels, hidden, activation, gate = settings
        samples, _, height, width = x.shape
        vector = _VECTOR_BYTES // x.dtype.itemsize
        if not x.is_last or x.shape[1] != channels or channels % vector:
            return None
        log_cluster = _LOG_CLUSTER if x.gpu.capability >= NATIVE_CAPABILITY else 0
        own = -(-channels // vector >> log_cluster) * vector
        numbers = ACTIVATIONS.index(activation), ACTIVATIONS.index(gate)
        params = Params(channels, hidden, height * width, own, log_cluster, *numbers, 1.0 / (height * width))
        shared_bytes = 2 * hidden * own * x.dtype.itemsize + 4 * (THREADS * vector + channels + 2 * hidden)
        if own > THREADS * vector:  # means would lie on the sums that other blocks still read
            return None
        if shared_bytes > _MOST_SHARED_BYTES or max(samples << log_cluster, channels * hidden) > MOST:
            return None
        launch = (samples << log_cluster, 1, 1), (pack(params),)
        return Work(
            squeeze_kernel(x.dtype),
            (launch,),
            (samples, channels, 1, 1),
            _VECTOR_BYTES,
            tables=_TABLES,
            cluster=1 << log_cluster,
            shared_bytes=shared_bytes,
        )


def squeeze_kernel(dtype: torch.dtype) -> Variant:
    """The kernel for elements of a type."""
    return Variant("squeeze.cu", Planes.macros(dtype, _VECTOR_BYTES // dtype.itemsize))


def are_names(names: Any) -> bool:
    """Whether they are two different names of attributes, no longer than names are."""
    if not isinstance(names, (list, tuple)) or len(names) != 2 or names[0] == names[1]:
        return False
    return all(
        isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) and len(name) <= 64
        for name in names
    )


_APPLIED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
