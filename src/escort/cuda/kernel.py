"""CUDA kernels at run time: from a source to a Kernel on a device, bound to the arguments that never change, launched.

    compiled = kernel("max_pool.cu", macros, torch.device("cuda:0"))          shipped, from the cache or compiled
    launch = compiled.bind(256, 64 * 1024, (torch.Tensor, torch.Tensor, filter_table, int))
    launch((blocks, 1, 1), x, y, samples)                                     on torch's current stream

Kernels are `extern "C"`, and their parameters are pointers, 32-bit integers, 32-bit floats, tensor maps and structs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from escort.cuda import carried, driver, shipped
from escort.cuda.binary import Binary
from escort.cuda.compiler import Defines, Source, Text, Variant, compile_source, dotted, is_brought, no_compiler
from escort.cuda.driver import driver_version
from escort.cuda.gpu import Gpu
from escort.cuda.launch import Argument, Grid, Launch, Parameter, Passed, attributes

#: Kernels need at least this compute capability.
LEAST_CAPABILITY = (8, 0)
#: From this compute capability on there are instructions that one architecture alone has, and tensor maps.
NATIVE_CAPABILITY = (9, 0)

_PLAIN_SHARED_BYTES = 48 * 1024  # per block, what a kernel gets without asking

__all__ = [
    "LEAST_CAPABILITY",
    "NATIVE_CAPABILITY",
    "Kernel",
    "Launch",
    "Text",
    "arch",
    "driver_version",
    "is_had",
    "kernel",
    "unavailable",
]


def kernel(
    source: Source, defines: Defines, device: torch.device, entry: str | None = None, *, native: bool = False
) -> Kernel:
    """A kernel ready for launch on a device, the same object each time.

    Args:
        source: as for `compile_source`.
        defines: as for `compile_source`.
        device: a CUDA device, which need not be the current one.
        entry: the name of the `extern "C"` function, by default the source's name without suffix.
        native: the source uses instructions that the device's architecture alone has, such as the `wgmma` of "sm_90a".

    Raises:
        RuntimeError: there is no GPU, it is too old, or its driver is older than the compiler; and as `compile_source`.
        ImportError: as `compile_source`.
    """
    if device.type != "cuda":
        raise ValueError(f"{source} runs on CUDA devices, not on {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    name = source.name if isinstance(source, Text) else source
    digest = source.digest if isinstance(source, Text) else None  # the table outlives texts
    key = (name, digest, tuple(sorted(defines.items())), index, entry, native)
    if (known := _kernels.get(key)) is None:
        # Threads that plan side by side ask for the same few kernels: the first one compiles, the others wait for it.
        with _locks.setdefault(key, threading.Lock()):
            if (known := _kernels.get(key)) is None:
                its_arch = arch(torch.device("cuda", index), native=native)
                binary = compile_source(source, defines, its_arch, driver_version())
                known = _kernels[key] = Kernel(binary, driver.device(index), entry or Path(name).stem)
    return known


_kernels: dict[tuple[Any, ...], Kernel] = {}
_locks: dict[tuple[Any, ...], threading.Lock] = {}


def arch(device: torch.device, *, native: bool = False) -> str:
    """The architecture to compile for, such as "sm_90"; "sm_90a" for what its successors lack.

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


def unavailable(device: torch.device, *, native: bool = False, per_filter: bool = False) -> str | None:
    """Why no kernel can be had for a device, or None where one can; `native` as of :func:`arch`.

    Without a compiler those can be had that are carried or shipped, as :func:`is_had` says of each, and :func:`kernel`
    raises ImportError for any other one.

    Args:
        per_filter: the kernels are made for a filter, so that none is shipped.
    """
    try:
        driver.api()
        its_arch = arch(device, native=native)
        if carried.has_any(its_arch) or (reason := no_compiler()) is None:
            return None
        return None if not per_filter and shipped.has_any(its_arch, driver_version()) else reason
    except (ImportError, RuntimeError) as error:
        return str(error)


def is_had(variant: Variant, device: torch.device) -> bool:
    """Whether a kernel can be had for a device without a compiler: it is carried or shipped."""
    return is_brought(variant.source, variant.defines, arch(device, native=variant.native), driver_version())


class Kernel:
    """A function on a device. `kernel` makes it.

    Attributes:
        binary: what it was loaded from, with its use of registers and memory.
        device: where it runs.
        entry: its name.
    """

    def __init__(self, binary: Binary, device: driver.Device, entry: str) -> None:
        self.binary, self.device, self.entry = binary, torch.device("cuda", device.index), entry
        self._device = device
        self._lock = threading.Lock()
        with device.current():
            try:
                self._library = driver.call("cuLibraryLoadData", binary.cubin, [], [], 0, [], [], 0)
                handle = driver.call("cuLibraryGetKernel", self._library, entry.encode())
                # The function of this context: fully loaded now, so that the first launch may be captured.
                self._function = driver.call("cuKernelGetFunction", handle)
            except driver.DriverError as error:
                raise self._explained(error) from error
            limit = driver.api().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
            self._most_threads = int(driver.call("cuFuncGetAttribute", limit, self._function))
        self._parameter_bytes = self._measure_parameters()
        self._shared_bytes = min(_PLAIN_SHARED_BYTES, device.most_shared_bytes) - binary.shared_bytes

    def bind(
        self,
        block: int,
        shared_bytes: int,
        args: Sequence[Argument | Passed],
        *,
        overlap: bool = False,
        cluster: int = 1,
    ) -> Launch:
        """Prepares launches that differ in a few arguments, at the least cost per launch.

        Args:
            block: threads per block.
            shared_bytes: of dynamic shared memory per block.
            args: in the order of the kernel's parameters: a value where it is the same in all launches, else its type
                (`torch.Tensor`, `int` or `float`), or the map of the tensor (`tensor_map`). A struct is bytes, made by
                `params.pack`.
            overlap: the kernel may start while the one before it in the stream still runs, and waits for its results
                itself (programmatic dependent launch). Below compute capability 9.0 none does.
            cluster: blocks of a cluster along x, of which the grid is a multiple; 8 at most (from compute capability
                9.0).

        Raises:
            ValueError: more threads or shared memory than the device has for this kernel.
            TypeError: arguments of other sizes than the kernel's parameters.
        """
        self._reserve(block, shared_bytes)
        parameters = [Parameter.of(arg) for arg in args]
        if self._parameter_bytes not in (None, [parameter.size for parameter in parameters]):
            described = ", ".join(map(str, parameters))
            raise TypeError(f"{self} has parameters of {self._parameter_bytes} bytes, got ({described})")
        can_overlap = torch.cuda.get_device_capability(self.device) >= NATIVE_CAPABILITY
        extra = attributes(overlap and can_overlap, cluster)
        return Launch(str(self), self._function, self._device, block, shared_bytes, args, extra)

    def bind_spread(
        self, block: int, shared_bytes: int, args: Sequence[Argument | Passed], *, blocks: int, cluster: int = 1
    ) -> Callable[..., None]:
        """The same of launches that overlap. Those of few blocks spread over the multiprocessors.

        Args:
            blocks: of a launch on as many samples as the layer is planned for. Those of more are left as they are.
            cluster: as it is in the kernel's source.
        """
        plain = self.bind(block, shared_bytes, args, overlap=True)
        spreading_bytes = Gpu.of(str(self.device)).spreading_bytes(blocks, cluster)
        if spreading_bytes <= shared_bytes:
            return plain
        spread = self.bind(block, spreading_bytes, args, overlap=True)

        def launch(grid: Grid, *passed: torch.Tensor | float | None) -> None:
            x, y, z = grid
            (spread if x * y * z <= blocks else plain)(grid, *passed)

        return launch

    def _reserve(self, block: int, shared_bytes: int) -> None:
        """Allows blocks of so many threads with so much dynamic shared memory."""
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
                attribute = driver.api().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                with self._device.current():
                    driver.call("cuFuncSetAttribute", self._function, attribute, shared_bytes)
                self._shared_bytes = shared_bytes

    def _measure_parameters(self) -> list[int] | None:
        """The size of each parameter; None where the driver cannot say."""
        if driver_version() < (12, 4):
            return None
        sizes: list[int] = []
        while True:
            status, _, size = driver.api().cuFuncGetParamInfo(self._function, len(sizes))
            if status:  # there are no more
                return sizes
            sizes.append(size)

    def _explained(self, error: driver.DriverError) -> Exception:
        """The error for a failure to load: its cause and the remedy."""
        made_by, supported = self.binary.cuda, driver_version()
        if error.name in ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NOT_FOUND") or made_by <= supported:
            return error.of(str(self))
        older = f"install escort-sparse[cuda{supported[0]}], or " if supported[0] < made_by[0] else ""
        return RuntimeError(
            f"{self}: the driver supports CUDA {dotted(supported)} and cannot load what {self.binary.compiler} "
            f"compiled ({error.name}); {older}update the driver"
        )

    def __str__(self) -> str:
        return f"kernel {self.entry} of {self.binary.source} on {self.device}"
