"""CUDA kernels at run time: from a source to a Kernel on a device, and its launches.

    kernel = jit.kernel("direct.cu", {"ROWS": 4}, torch.device("cuda:0"))     compiled, or from the cache
    launch = kernel.bind(256, 64 * 1024, (torch.Tensor, torch.Tensor, filter_table, int))
    launch((blocks, 1, 1), x, y, images)                                      on torch's current stream

Kernels are `extern "C"`, and their parameters are pointers, 32-bit integers and 32-bit floats.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from escort.compiler import (
    Binary,
    Defines,
    Source,
    Text,
    compile,
    compiler_version,
    dotted,
    missing,
    nvrtc_version,
)

#: Kernels need at least this compute capability and a driver for this CUDA.
LEAST_CAPABILITY, LEAST_DRIVER = (8, 0), (12, 0)

Grid = tuple[int, int, int]
#: What a kernel takes: a tensor on its device, None (the null pointer), an int32 or a float32.
Argument = torch.Tensor | int | float | None

_PLAIN_SHARED_BYTES = 48 * 1024  # per block, what a kernel gets without asking
_SLOT = 8  # bytes in which each argument is kept
_FORMATS = {torch.Tensor: "P", int: "i4x", float: "f4x"}
_BYTES = {torch.Tensor: 8, int: 4, float: 4}

__all__ = [
    "Argument",
    "Binary",
    "Defines",
    "Grid",
    "Kernel",
    "Launch",
    "Source",
    "Text",
    "arch",
    "compile",
    "compiler_version",
    "driver_version",
    "kernel",
]


def kernel(source: Source, defines: Defines, device: torch.device, entry: str | None = None) -> Kernel:
    """A kernel ready for launch on a device, the same object each time.

    Args:
        source: as for `compile`.
        defines: as for `compile`.
        device: a CUDA device, which need not be the current one.
        entry: the name of the `extern "C"` function, by default the source's name without suffix.

    Raises:
        RuntimeError: there is no GPU, it is too old, or its driver is older than the compiler; and as `compile`.
    """
    if device.type != "cuda":
        raise ValueError(f"{source} runs on CUDA devices, not on {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    name = source.name if isinstance(source, Text) else source
    digest = source.digest if isinstance(source, Text) else None  # the table outlives texts
    key = (name, digest, tuple(sorted(defines.items())), index, entry)
    if (known := _kernels.get(key)) is None:
        binary = compile(source, defines, arch(torch.device("cuda", index)))
        # Two threads may come here at once; both then use the kernel of the first.
        known = _kernels.setdefault(key, Kernel(binary, _device(index), entry or Path(name).stem))
    return known


_kernels: dict[tuple[Any, ...], Kernel] = {}


def arch(device: torch.device) -> str:
    """The architecture to compile for, such as "sm_90"."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise RuntimeError("torch sees no NVIDIA GPU; `escort doctor` says what is missing")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; CUDA kernels need "
            f"{dotted(LEAST_CAPABILITY)} or more: convert for the CPU instead"
        )
    return f"sm_{major}{minor}"


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver of this machine supports, such as (13, 0)."""
    version = int(_call(_driver().cuDriverGetVersion))
    return version // 1000, version % 1000 // 10


class Kernel:
    """A function on a device. `kernel` makes it.

    Attributes:
        binary: what it was loaded from, with its use of registers and memory.
        device: where it runs.
        entry: its name.
    """

    def __init__(self, binary: Binary, device: _Device, entry: str) -> None:
        driver = _driver()
        self.binary, self.device, self.entry = binary, torch.device("cuda", device.index), entry
        self._device = device
        self._lock = threading.Lock()
        with device.current():
            try:
                self._library = _call(driver.cuLibraryLoadData, binary.cubin, [], [], 0, [], [], 0)
                handle = _call(driver.cuLibraryGetKernel, self._library, entry.encode())
                # The function of this context: fully loaded now, so that the first launch may be captured.
                self._function = _call(driver.cuKernelGetFunction, handle)
            except _DriverError as error:
                raise self._explained(error) from error
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
            self._most_threads = int(_call(driver.cuFuncGetAttribute, limit, self._function))
        self._parameter_bytes = self._measure_parameters()
        self._shared_bytes = min(_PLAIN_SHARED_BYTES, device.most_shared_bytes) - binary.shared_bytes

    def bind(self, block: int, shared_bytes: int, args: Sequence[Argument | type], *, overlap: bool = False) -> Launch:
        """Prepares launches that differ in little, at the least cost per launch.

        Args:
            block: threads per block.
            shared_bytes: of dynamic shared memory per block.
            args: in the order of the kernel's parameters: a value where it is the same in all launches, else its type
                (`torch.Tensor`, `int` or `float`).
            overlap: the kernel may start while the one before it in the stream still runs, and waits for its results
                itself (programmatic dependent launch, from compute capability 9.0).

        Raises:
            ValueError: more threads or shared memory than the device has for this kernel.
        """
        self._reserve(block, shared_bytes)
        return Launch(self, block, shared_bytes, args, overlap)

    def _reserve(self, block: int, shared_bytes: int) -> None:
        """Lets blocks have so much dynamic shared memory."""
        if not 0 < block <= self._most_threads:
            raise ValueError(
                f"{self}: a block of {block} threads; with {self.binary.registers} registers per thread "
                f"{self._device.name} runs 1 to {self._most_threads}"
            )
        most = self._device.most_shared_bytes - self.binary.shared_bytes
        if not 0 <= shared_bytes <= most:
            raise ValueError(
                f"{self} asks for {shared_bytes} bytes of shared memory per block; {self._device.name} has {most}: "
                "choose a config with smaller tiles"
            )
        with self._lock:
            if shared_bytes > self._shared_bytes:
                driver = _driver()
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                with self._device.current():
                    _call(driver.cuFuncSetAttribute, self._function, attribute, shared_bytes)
                self._shared_bytes = shared_bytes

    def _measure_parameters(self) -> list[int] | None:
        """The size of each parameter; None where the driver cannot say."""
        if driver_version() < (12, 4):
            return None
        sizes: list[int] = []
        while True:
            status, _, size = _driver().cuFuncGetParamInfo(self._function, len(sizes))
            if status:  # there are no more
                return sizes
            sizes.append(size)

    def _explained(self, error: _DriverError) -> Exception:
        """What a failure to load comes from, and what helps."""
        compiler, supported = nvrtc_version(), driver_version()
        if error.name in ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NOT_FOUND") or compiler <= supported:
            return error.of(str(self))
        older = f"install escort-sparse[cuda{supported[0]}], or " if supported[0] < compiler[0] else ""
        return RuntimeError(
            f"{self}: the driver supports CUDA {dotted(supported)} and cannot load what {self.binary.compiler} "
            f"compiled ({error.name}); {older}update the driver"
        )

    def __str__(self) -> str:
        return f"kernel {self.entry} of {self.binary.source} on {self.device}"


class Launch:
    """A kernel with its block, shared memory and the arguments that never change. `Kernel.bind` makes it.

    It may be called by several threads, on any stream, with another device as the current one, and in a CUDA graph
    capture. It holds the tensors it was bound to.
    """

    def __init__(
        self, kernel: Kernel, block: int, shared_bytes: int, args: Sequence[Argument | type], overlap: bool
    ) -> None:
        driver = _driver()
        self._kernel, self._device, self._index = kernel, kernel._device, kernel._device.index
        self._function, self._launch = kernel._function, driver.cuLaunchKernelEx
        self._current_device, self._raw_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
        self._lock = threading.Lock()

        if kernel._parameter_bytes not in (None, [_BYTES[_kind(arg)] for arg in args]):
            raise TypeError(f"{kernel} has parameters of {kernel._parameter_bytes} bytes, got {[*map(_kind, args)]}")
        given = [position for position, arg in enumerate(args) if isinstance(arg, type)]
        fixed = [position for position, arg in enumerate(args) if not isinstance(arg, type)]
        self._kinds = [_kind(args[position]) for position in given]
        self._fixed = [args[position] for position in fixed]
        # Slots of 8 bytes, first what is given in each launch, then what is fixed; the driver is told their addresses
        # in the order of the parameters.
        self._slots = ctypes.create_string_buffer(max(len(args), 1) * _SLOT)
        kinds = [_kind(arg) for arg in self._fixed]
        self._format = struct.Struct("".join(_FORMATS[kind] for kind in self._kinds))
        fixed_format = struct.Struct("".join(_FORMATS[kind] for kind in kinds))
        self._write(fixed_format, len(given) * _SLOT, self._values(kinds, self._fixed))
        slot_of = {position: slot for slot, position in enumerate(given + fixed)}
        base = ctypes.addressof(self._slots)
        addresses = [base + slot_of[position] * _SLOT for position in range(len(args))]
        self._addresses = (ctypes.c_void_p * max(len(args), 1))(*addresses)
        self._parameters = ctypes.addressof(self._addresses)

        config = self._config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        attributes = []
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)

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
        """Addresses for tensors, numbers as they are."""
        values = []
        for kind, arg in zip(kinds, args, strict=True):
            if kind is torch.Tensor:
                if arg is None:
                    arg = 0
                elif arg.get_device() == self._index:
                    arg = arg.data_ptr()
                else:
                    raise ValueError(f"{self._kernel} got a tensor on {arg.device}; move it to the kernel's device")
            values.append(arg)
        return values

    def _write(self, format: struct.Struct, offset: int, values: list[Any]) -> None:
        try:
            format.pack_into(self._slots, offset, *values)
        except struct.error as error:
            raise ValueError(f"{self._kernel} takes 32-bit integers and floats, got {values}: {error}") from error

    def _error(self, status: Any, grid: Grid) -> Exception:
        config = self._config
        shape = f"{grid} blocks of {config.blockDimX} threads, {config.sharedMemBytes} bytes of dynamic shared memory"
        return _DriverError("cuLaunchKernelEx", status).of(f"{self._kernel}, {shape}")


def _kind(arg: Argument | type) -> type:
    """torch.Tensor, int or float."""
    kind = arg if isinstance(arg, type) else torch.Tensor if arg is None else type(arg)
    if issubclass(kind, torch.Tensor):
        return torch.Tensor
    if kind not in _FORMATS:
        raise TypeError(f"a kernel takes tensors, None, int and float, not {kind.__name__}")
    return kind


class _Device:
    """A GPU and its primary context, the one that torch uses."""

    def __init__(self, index: int) -> None:
        driver = _driver()
        if driver_version() < LEAST_DRIVER:
            raise RuntimeError(
                f"the driver supports CUDA {dotted(driver_version())}; CUDA kernels need {dotted(LEAST_DRIVER)}: "
                "update the driver"
            )
        torch.cuda.init()
        self.index, self.name = index, torch.cuda.get_device_name(index)
        number = _call(driver.cuDeviceGet, index)
        self._context = _call(driver.cuDevicePrimaryCtxRetain, number)
        limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.most_shared_bytes = int(_call(driver.cuDeviceGetAttribute, limit, number))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this the calling thread's device for a while, for the driver and for torch."""
        driver = _driver()
        _call(driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            _call(driver.cuCtxPopCurrent)


@lru_cache
def _device(index: int) -> _Device:
    return _Device(index)


class _DriverError(RuntimeError):
    """A call of the driver that failed; `name` is the driver's, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, call: str, status: Any) -> None:
        self.name = status.name
        text = _driver().cuGetErrorString(status)[1]
        self.text = f"{call} failed with {self.name}" + (f", {text.decode()}" if text else "")
        super().__init__(self.text)

    def of(self, what: str) -> Exception:
        """The error for users."""
        out_of_memory = self.name == "CUDA_ERROR_OUT_OF_MEMORY"
        return (torch.OutOfMemoryError if out_of_memory else RuntimeError)(f"{what}: {self.text}")


def _call(function: Any, *args: Any) -> Any:
    """The result of a call of the driver; raises _DriverError."""
    status, *results = function(*args)
    if status:
        raise _DriverError(function.__name__, status)
    return results[0] if results else None


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise missing("cuda.bindings", error) from error
    return driver
