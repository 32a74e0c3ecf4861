"""CUDA kernels at run time: from a source to a Kernel on a device, and its launches.

    kernel = jit.kernel("direct.cu", {"ROWS": 4}, torch.device("cuda:0"))     compiled, or from the cache
    launch = kernel.bind(256, 64 * 1024, (torch.Tensor, torch.Tensor, filter_table, int))
    launch((blocks, 1, 1), x, y, images)                                      on torch's current stream

Kernels are `extern "C"`, and their parameters are pointers, 32-bit integers, 32-bit floats and tensor maps.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from escort.cuda.compiler import (
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
#: From this compute capability on there are instructions that one architecture alone has, and tensor maps.
NATIVE_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine of a GPU sees a tensor (`CUtensorMap`). The functions of `tensor_maps` make it.

    A kernel takes it as `const __grid_constant__ T map`, where T has 128 bytes and is aligned to 64. It is an address
    and no more: whoever launches the kernel keeps the tensor alive.

    Attributes:
        opaque: its 128 bytes, whose meaning the driver keeps to itself.
    """

    opaque: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.opaque) != _BYTES[TensorMap]:
            raise ValueError(f"a tensor map has {_BYTES[TensorMap]} bytes, got {len(self.opaque)}")

    @classmethod
    def encode(cls, what: str, device: int, function: str, *args: Any) -> TensorMap:
        """What a function of the driver writes.

        Args:
            what: is described, for errors.
            device: the index of the GPU that has the tensor.
            function: such as "cuTensorMapEncodeTiled".
            args: what it takes behind the place for the map: C ints, and ctypes values for all else.

        Raises:
            ValueError: the driver finds a value that no tensor map may have.
            RuntimeError: the driver refused for another reason.
        """
        driver = _driver()
        place = _aligned(_BYTES[cls])
        with _device(device).current():
            # By its address: cuda.bindings has the map written wherever Python's allocator puts one, which need not be
            # at a multiple of 64 bytes as the driver demands.
            address = _call(driver.cuGetProcAddress, function.encode(), _TENSOR_MAP_DRIVER, 0)
            status = driver.CUresult(ctypes.CFUNCTYPE(ctypes.c_int)(address)(place, *args))
        if status:
            error = _DriverError(function, status)
            if error.name == "CUDA_ERROR_INVALID_VALUE":
                raise ValueError(f"{what}: {error.text}; {_TENSOR_MAP_RULES}")
            raise error.of(what)
        return cls(place.raw)


Grid = tuple[int, int, int]
#: What a kernel takes: a tensor on its device, None (the null pointer), an int32, a float32 or a tensor map.
Argument = torch.Tensor | int | float | TensorMap | None

_PLAIN_SHARED_BYTES = 48 * 1024  # per block, what a kernel gets without asking
_BYTES = {torch.Tensor: 8, int: 4, float: 4, TensorMap: 128}
_ALIGNMENT = 64  # bytes, of tensor maps
#: How each argument is kept: in whole multiples of the alignment, so that every one of them has it.
_FORMATS = {torch.Tensor: "P56x", int: "i60x", float: "f60x", TensorMap: "128s"}
_TENSOR_MAP_DRIVER = 12000  # the CUDA whose version of the driver's functions is called
_TENSOR_MAP_RULES = (
    "address, strides and the bytes of a copy's channels must be multiples of 16, no size may be 0, a box has at most "
    "256 along each dimension, channels have no more bytes than the swizzle, and corners are within -128 and 127"
)

__all__ = [
    "Argument",
    "Binary",
    "Defines",
    "Grid",
    "Kernel",
    "Launch",
    "Source",
    "TensorMap",
    "Text",
    "arch",
    "compile",
    "compiler_version",
    "driver_version",
    "kernel",
]


def kernel(
    source: Source, defines: Defines, device: torch.device, entry: str | None = None, *, native: bool = False
) -> Kernel:
    """A kernel ready for launch on a device, the same object each time.

    Args:
        source: as for `compile`.
        defines: as for `compile`.
        device: a CUDA device, which need not be the current one.
        entry: the name of the `extern "C"` function, by default the source's name without suffix.
        native: the source uses what the device's architecture alone has, such as the `wgmma` of "sm_90a".

    Raises:
        RuntimeError: there is no GPU, it is too old, or its driver is older than the compiler; and as `compile`.
    """
    if device.type != "cuda":
        raise ValueError(f"{source} runs on CUDA devices, not on {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    name = source.name if isinstance(source, Text) else source
    digest = source.digest if isinstance(source, Text) else None  # the table outlives texts
    key = (name, digest, tuple(sorted(defines.items())), index, entry, native)
    if (known := _kernels.get(key)) is None:
        binary = compile(source, defines, arch(torch.device("cuda", index), native=native))
        # Two threads may come here at once; both then use the kernel of the first.
        known = _kernels.setdefault(key, Kernel(binary, _device(index), entry or Path(name).stem))
    return known


_kernels: dict[tuple[Any, ...], Kernel] = {}


def arch(device: torch.device, *, native: bool = False) -> str:
    """The architecture to compile for, such as "sm_90"; "sm_90a" for what no other one has, its successors included.

    Raises:
        RuntimeError: there is no GPU, or it is too old.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise RuntimeError("torch sees no NVIDIA GPU; `escort doctor` says what is missing")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; CUDA kernels need "
            f"{dotted(LEAST_CAPABILITY)} or more: convert for the CPU instead"
        )
    if native and (major, minor) < NATIVE_CAPABILITY:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; this kernel needs "
            f"{dotted(NATIVE_CAPABILITY)} or more: choose another method"
        )
    return f"sm_{major}{minor}" + ("a" if native else "")


def unavailable(device: torch.device, *, native: bool = False) -> str | None:
    """Why no kernel can be compiled for a device, or None where one can; `native` as of :func:`arch`."""
    try:
        compiler_version()
        arch(device, native=native)
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


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
                (`torch.Tensor`, `int`, `float` or `TensorMap`).
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
        # First what is given in each launch, then what is fixed; the driver is told where each lies in the order of the
        # parameters.
        kinds = [_kind(arg) for arg in self._fixed]
        self._format, fixed_format = _format(self._kinds), _format(kinds)
        self._slots = _aligned(self._format.size + fixed_format.size)
        self._write(fixed_format, self._format.size, self._values(kinds, self._fixed))
        sizes = [_format([kind]).size for kind in self._kinds + kinds]
        starts = accumulate(sizes, initial=ctypes.addressof(self._slots))
        address_of = dict(zip(given + fixed, starts, strict=False))  # starts has the end besides
        addresses = [address_of[position] for position in range(len(args))]
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
        """Addresses for tensors, bytes for tensor maps, numbers as they are."""
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
    """torch.Tensor, int, float or TensorMap."""
    kind = arg if isinstance(arg, type) else torch.Tensor if arg is None else type(arg)
    if issubclass(kind, torch.Tensor):
        return torch.Tensor
    if kind not in _FORMATS:
        raise TypeError(f"a kernel takes tensors, None, int, float and tensor maps, not {kind.__name__}")
    return kind


def _format(kinds: Sequence[type]) -> struct.Struct:
    """What writes arguments one behind the other."""
    return struct.Struct("".join(_FORMATS[kind] for kind in kinds))


def _aligned(size: int) -> ctypes.Array[ctypes.c_char]:
    """So many zero bytes at an address that tensor maps may have."""
    memory = ctypes.create_string_buffer(size + _ALIGNMENT)
    return (ctypes.c_char * size).from_buffer(memory, -ctypes.addressof(memory) % _ALIGNMENT)


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
