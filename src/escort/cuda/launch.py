"""Launches of a kernel, and what a kernel takes: tensors, 32-bit numbers, tensor maps and structs."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from escort.cuda import driver


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine of a GPU sees a tensor (`CUtensorMap`). The functions of `tensor_map` make it.

    A kernel takes it as `const __grid_constant__ T map`, where T has 128 bytes and is aligned to 64. It is an address
    and no more: whoever launches the kernel keeps the tensor alive.

    Attributes:
        opaque: its 128 bytes, whose meaning the driver keeps to itself.
    """

    opaque: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.opaque) != _SIZES[TensorMap]:
            raise ValueError(f"a tensor map has {_SIZES[TensorMap]} bytes, got {len(self.opaque)}")


Grid = tuple[int, int, int]
#: What a kernel takes: a tensor on its device, None (the null pointer), an int32, a float32, a tensor map, or the bytes
#: of a struct (`params.pack`).
Argument = torch.Tensor | int | float | TensorMap | bytes | None

_ALIGNMENT = 64  # bytes, of tensor maps; arguments are kept at multiples of it, so that every one of them has it
_CODES = {torch.Tensor: "P", int: "i", float: "f", TensorMap: "128s"}  # of `struct`
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
    def of(cls, arg: Argument | type) -> Parameter:
        """The parameter for a value that all launches share, or for the type of what each launch passes."""
        if isinstance(arg, bytes):
            return cls(bytes, len(arg))
        kind = arg if isinstance(arg, type) else torch.Tensor if arg is None else type(arg)
        if issubclass(kind, torch.Tensor):
            kind = torch.Tensor
        if kind not in _SIZES:
            raise TypeError(
                f"a kernel takes tensors, None, int, float, tensor maps and, where it is bound, bytes, "
                f"not {kind.__name__}"
            )
        return cls(kind, _SIZES[kind])

    @property
    def code(self) -> str:
        """How `struct` writes it: in whole multiples of the alignment."""
        return f"{_CODES.get(self.kind, f'{self.size}s')}{-self.size % _ALIGNMENT}x"

    def __str__(self) -> str:
        return f"{self.size} bytes" if self.kind is bytes else self.kind.__name__


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
        config: Any,
        args: Sequence[Argument | type],
    ) -> None:
        """`function` is what the driver loaded for the device, which errors call `kernel`; see `launch_config`."""
        self._kernel, self._device, self._index = kernel, device, device.index
        self._function, self._launch = function, driver.api().cuLaunchKernelEx
        self._current_device, self._raw_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
        self._lock = threading.Lock()
        self._config = config

        per_launch = [position for position, arg in enumerate(args) if isinstance(arg, type)]
        fixed = [position for position, arg in enumerate(args) if not isinstance(arg, type)]
        self._kinds = [Parameter.of(args[position]).kind for position in per_launch]
        self._fixed = [args[position] for position in fixed]
        # The slots hold first what each launch passes, then what is fixed. The driver gets their addresses in the order
        # of the parameters.
        parameters = [Parameter.of(args[position]) for position in per_launch + fixed]
        self._format, fixed_format = _format(parameters[: len(per_launch)]), _format(parameters[len(per_launch) :])
        self._slots = aligned_bytes(self._format.size + fixed_format.size)
        fixed_kinds = [parameter.kind for parameter in parameters[len(per_launch) :]]
        self._write(fixed_format, self._format.size, self._values(fixed_kinds, self._fixed))
        sizes = [_format([parameter]).size for parameter in parameters]
        starts = accumulate(sizes, initial=ctypes.addressof(self._slots))
        address_of = dict(zip(per_launch + fixed, starts, strict=False))  # starts has the end besides
        addresses = [address_of[position] for position in range(len(args))]
        self._addresses = (ctypes.c_void_p * max(len(args), 1))(*addresses)
        self._parameters = ctypes.addressof(self._addresses)

    def __call__(self, grid: Grid, *args: Argument) -> None:
        """Runs the kernel on the current stream of its device.

        Args:
            grid: blocks in x, y and z; a grid without blocks does nothing.
            args: those that were bound by type, in their order; None is the null pointer.

        Raises:
            ValueError: a tensor lies on another device.
            torch.OutOfMemoryError, RuntimeError: the driver refused the launch.
        """
        if len(args) != len(self._kinds):
            raise TypeError(f"{self._kernel} takes {len(self._kinds)} arguments per launch, got {len(args)}")
        if 0 in grid:
            return
        values = self._values(self._kinds, args)
        if self._current_device() == self._index:
            status = self._issue(grid, values)
            if not status:
                return
            # A thread that torch has not used yet has no context at all.
            if status.name != "CUDA_ERROR_INVALID_CONTEXT":
                raise self._error(status, grid)
        with self._device.current():
            status = self._issue(grid, values)
        if status:
            raise self._error(status, grid)

    def _issue(self, grid: Grid, values: list[Any]) -> Any:
        config = self._config
        with self._lock:  # the driver copies the slots before it returns, but the call lets other threads in
            self._write(self._format, 0, values)
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.hStream = self._raw_stream(self._index)
            return self._launch(config, self._function, self._parameters, 0)[0]

    def _values(self, kinds: Sequence[type], args: Sequence[Any]) -> list[Any]:
        """Addresses for tensors, bytes for tensor maps, numbers and bytes as they are."""
        values = []
        for kind, arg in zip(kinds, args, strict=True):
            if kind is torch.Tensor:
                if arg is None:
                    arg = 0
                elif arg.get_device() == self._index:
                    arg = arg.data_ptr()
                else:
                    raise ValueError(f"{self._kernel} got a tensor on {arg.device}; move it to the kernel's device")
            elif kind is TensorMap:
                if not isinstance(arg, TensorMap):
                    raise TypeError(f"{self._kernel} takes a tensor map where it got {type(arg).__name__}")
                arg = arg.opaque
            values.append(arg)
        return values

    def _write(self, packer: struct.Struct, offset: int, values: list[Any]) -> None:
        try:
            packer.pack_into(self._slots, offset, *values)
        except struct.error as error:
            raise ValueError(f"{self._kernel} takes 32-bit integers and floats, got {values}: {error}") from error

    def _error(self, status: Any, grid: Grid) -> Exception:
        config = self._config
        shape = f"{grid} blocks of {config.blockDimX} threads, {config.sharedMemBytes} bytes of dynamic shared memory"
        return driver.DriverError("cuLaunchKernelEx", status).of(f"{self._kernel}, {shape}")


def aligned_bytes(size: int) -> ctypes.Array[ctypes.c_char]:
    """So many zero bytes at an address that tensor maps may have."""
    memory = ctypes.create_string_buffer(size + _ALIGNMENT)
    return (ctypes.c_char * size).from_buffer(memory, -ctypes.addressof(memory) % _ALIGNMENT)


def launch_config(block: int, shared_bytes: int, overlap: bool, cluster: int) -> Any:
    """The driver's description of launches, without grid and stream; `Kernel.bind` says what the arguments are."""
    api = driver.api()
    config = api.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared_bytes
    attributes = []
    if overlap:
        attribute = api.CUlaunchAttribute()
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if cluster > 1:
        attribute = api.CUlaunchAttribute()
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = attribute.value.clusterDim
        dimension.x, dimension.y, dimension.z = cluster, 1, 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def _format(parameters: Sequence[Parameter]) -> struct.Struct:
    """The packer of arguments, one behind the other."""
    return struct.Struct("".join(parameter.code for parameter in parameters))
