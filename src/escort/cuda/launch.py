"""Launches of a kernel, and what a kernel takes: tensors, 32-bit numbers, tensor maps and structs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from escort.cuda import _launch, driver
from escort.cuda.tensor_map import TensorMap

Grid = tuple[int, int, int]
#: What a kernel takes: a tensor on its device, None (the null pointer), an int32, a float32, or the bytes of a struct
#: (`params.pack`).
Argument = torch.Tensor | int | float | bytes | None
#: What each launch passes: a tensor, an int32 or a float32 by its type, and a tensor whose map the kernel takes.
Passed = type | TensorMap

Attribute = tuple[int, tuple[int, int, int]]  # the number and the first values of a CUlaunchAttribute

_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # of the driver's CUlaunchAttributeID
_CODES = {torch.Tensor: "P", int: "i", float: "f"}  # of `struct`, as launch.cpp knows them
_SIZES = {torch.Tensor: 8, int: 4, float: 4, TensorMap: 128}


@dataclass(frozen=True)
class Parameter:
    """One of a kernel's parameters, as it is passed.

    Attributes:
        kind: torch.Tensor (also for None), int, float, TensorMap, or bytes for a struct.
        size: its bytes.
    """

    kind: type
    size: int

    @classmethod
    def of(cls, arg: Argument | Passed) -> Parameter:
        """The parameter for a value that all launches share, or for what each launch passes."""
        if isinstance(arg, bytes):
            return cls(bytes, len(arg))
        kind = arg if isinstance(arg, type) else torch.Tensor if arg is None else type(arg)
        if issubclass(kind, torch.Tensor):
            kind = torch.Tensor
        if kind not in _SIZES or arg is TensorMap:
            raise TypeError(
                f"a kernel takes tensors, None, int, float, tensor maps that `tiled` or `im2col` made and, where it is "
                f"bound, bytes, not {kind.__name__}"
            )
        return cls(kind, _SIZES[kind])

    def __str__(self) -> str:
        return f"{self.size} bytes" if self.kind is bytes else self.kind.__name__


def attributes(overlap: bool, cluster: int) -> list[Attribute]:
    """What the driver is told of each launch, by the arguments of `Kernel.bind`."""
    found: list[Attribute] = [(_PROGRAMMATIC_STREAM_SERIALIZATION, (1, 0, 0))] if overlap else []
    return [*found, (_CLUSTER_DIMENSION, (cluster, 1, 1))] if cluster > 1 else found


class Launch:
    """A kernel with its block, shared memory and the arguments that never change. `Kernel.bind` makes it.

    It may be called by several threads, on any stream, with another device as the current one, and in a CUDA graph
    capture. It holds the tensors it was bound to.
    """

    def __init__(
        self,
        kernel: str,
        function: Any,
        device: driver.Device,
        block: int,
        shared_bytes: int,
        args: Sequence[Argument | Passed],
        attributes: Sequence[Attribute],
    ) -> None:
        """`function` is what the driver loaded for the device; errors call it `kernel`."""
        self._kernel, self._device, self._index = kernel, device, device.index
        self._current_device, self._raw_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
        self._args = args
        self._shape = f"blocks of {block} threads, {shared_bytes} bytes of dynamic shared memory"
        parameters = [self._parameter(arg) for arg in args]
        address = driver.address("cuLaunchKernelEx")
        self._issue = _launch.Launch(
            kernel, address, int(function), device.index, block, shared_bytes, attributes, parameters
        ).issue

    def __call__(self, grid: Grid, *args: torch.Tensor | float | None) -> None:
        """Runs the kernel on the current stream of its device.

        Args:
            grid: blocks in x, y and z; a grid without blocks does nothing.
            args: those that were bound by type or tensor map, in their order; None is the null pointer, or a map that
                the kernel does not read.

        Raises:
            ValueError: a tensor lies on another device, or has no map.
            torch.OutOfMemoryError, RuntimeError: the driver refused the launch.
        """
        if self._current_device() == self._index:
            refused = self._issue(grid, self._raw_stream(self._index), args)
            if refused is None:
                return
            # A thread that torch has not used yet has no context at all.
            if driver.status(refused[0]).name != "CUDA_ERROR_INVALID_CONTEXT":
                raise self._error(refused, grid, args)
        with self._device.current():
            refused = self._issue(grid, self._raw_stream(self._index), args)
        if refused is not None:
            raise self._error(refused, grid, args)

    def _parameter(self, arg: Argument | Passed) -> Any:
        """An argument as launch.cpp takes it: the bytes of what all launches share, else its kind."""
        if isinstance(arg, TensorMap):
            return arg.encoder()
        if isinstance(arg, type):
            return _CODES[Parameter.of(arg).kind]
        if isinstance(arg, bytes):
            return arg
        if isinstance(arg, torch.Tensor) and arg.get_device() != self._index:
            raise ValueError(f"{self._kernel} got a tensor on {arg.device}; move it to the kernel's device")
        kind = Parameter.of(arg).kind
        value: Any = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg or 0
        try:
            return struct.pack(_CODES[kind], value)
        except struct.error as error:
            raise ValueError(f"{self._kernel} takes 32-bit integers, got {value}: {error}") from error

    def _error(self, refused: tuple[int, int], grid: Grid, args: Sequence[Any]) -> Exception:
        status, position = refused
        if position < 0:
            error = driver.DriverError("cuLaunchKernelEx", driver.status(status))
            return error.of(f"{self._kernel}, {grid} {self._shape}")
        passed = [arg for arg in self._args if isinstance(arg, (type, TensorMap))]
        return passed[position].error(self._kernel, args[position], driver.status(status))  # type: ignore[union-attr]
