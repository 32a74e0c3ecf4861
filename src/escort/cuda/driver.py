"""Calls of the CUDA driver through `cuda.bindings`: its errors, and a device with the context that torch uses.

The bindings come with an extra of this package and are imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from escort.cuda.compiler import dotted, missing

#: Kernels need a driver for this CUDA at least.
LEAST_DRIVER = (12, 0)

_INTERFACE = 12000  # the CUDA whose version of the driver's functions is called by address
_LEGACY_STREAMS = 1  # CU_GET_PROC_ADDRESS_LEGACY_STREAM


def api() -> Any:
    """The driver's functions and types. Raises ImportError where the bindings are not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise missing("cuda.bindings", error) from error
    return driver


def call(name: str, *args: Any) -> Any:
    """The result of a function of the driver, such as "cuDeviceGet"; raises DriverError."""
    status, *results = getattr(api(), name)(*args)
    if status:
        raise DriverError(name, status)
    return results[0] if results else None


def address(name: str) -> int:
    """Where a function of the driver is, for streams as torch numbers them (0 is the legacy default stream).

    Raises:
        RuntimeError: this driver has no such function.
    """
    if found := call("cuGetProcAddress", name.encode(), _INTERFACE, _LEGACY_STREAMS):
        return int(found)
    raise RuntimeError(f"the driver, for CUDA {dotted(driver_version())}, has no {name}: update the driver")


def status(number: int) -> Any:
    """A status that a function of the driver returned, with its `name`."""
    return api().CUresult(number)


class DriverError(RuntimeError):
    """A call of the driver that failed; `name` is the driver's, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, function: str, status: Any) -> None:
        self.name = status.name
        text = api().cuGetErrorString(status)[1]
        self.text = f"{function} failed with {self.name}" + (f", {text.decode()}" if text else "")
        super().__init__(self.text)

    def of(self, what: str) -> Exception:
        """The error for users, which says what it happened to."""
        out_of_memory = self.name == "CUDA_ERROR_OUT_OF_MEMORY"
        return (torch.OutOfMemoryError if out_of_memory else RuntimeError)(f"{what}: {self.text}")


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver of this machine supports, such as (13, 0)."""
    version = int(call("cuDriverGetVersion"))
    return version // 1000, version % 1000 // 10


class Device:
    """A GPU and its primary context, the one that torch uses.

    Attributes:
        index: torch's number of it.
        name: such as "NVIDIA H200".
        most_shared_bytes: of shared memory that a block may have.
    """

    def __init__(self, index: int) -> None:
        if driver_version() < LEAST_DRIVER:
            raise RuntimeError(
                f"the driver supports CUDA {dotted(driver_version())}; CUDA kernels need {dotted(LEAST_DRIVER)}: "
                "update the driver"
            )
        torch.cuda.init()
        self.index, self.name = index, torch.cuda.get_device_name(index)
        number = call("cuDeviceGet", index)
        self._context = call("cuDevicePrimaryCtxRetain", number)
        limit = api().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.most_shared_bytes = int(call("cuDeviceGetAttribute", limit, number))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this the calling thread's device for a while, for the driver and for torch."""
        call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")


@lru_cache
def device(index: int) -> Device:
    """The GPU of that number, the same object each time."""
    return Device(index)
