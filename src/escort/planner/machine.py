"""What a measurement was made on, and the devices of this machine."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from escort.kernels import _cpu

_VERSIONS = ("driver", "cuda", "cudnn")


@dataclass(frozen=True)
class Machine:
    """What a plan or a result was measured on. Plans measured on another machine are measured again.

    Attributes:
        device: the name of the processor or GPU.
        isa: its instruction set, such as ``avx2`` or ``sm_90``.
        threads: how many torch uses on the CPU; 0 for a GPU.
        torch, escort: their versions.
        driver, cuda, cudnn: their versions; empty for the CPU.
    """

    device: str
    isa: str
    threads: int
    torch: str
    escort: str
    driver: str = ""
    cuda: str = ""
    cudnn: str = ""

    @classmethod
    def here(cls, device: str = "cpu") -> Machine:
        """This machine, by its CPU or by one of its GPUs ("cuda:0")."""
        own = _own_version()
        if device.partition(":")[0] == "cpu":
            return cls(_cpu_name(), _cpu.isas()[0][0], torch.get_num_threads(), torch.__version__, own)
        gpu = torch.cuda.get_device_properties(device)
        cudnn = torch.backends.cudnn.version() or 0
        versions = _driver_version(), torch.version.cuda or "", f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
        return cls(gpu.name, f"sm_{gpu.major}{gpu.minor}", 0, torch.__version__, own, *versions)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, without the versions that a CPU has not."""
        return {name: value for name, value in asdict(self).items() if value or name not in _VERSIONS}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Machine:
        """The machine behind :meth:`to_json`. Raises ValueError where the fields are not a machine's."""
        try:
            machine = cls(**data)
        except TypeError as error:
            raise ValueError(f"not a machine: {error}") from error
        if not all(isinstance(value, int if name == "threads" else str) for name, value in asdict(machine).items()):
            raise ValueError(f"not a machine: {data}")
        return machine


@lru_cache(maxsize=1)
def _own_version() -> str:
    return version("escort-sparse")


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    described = _cpu_described(info.read_text()) if info.exists() else None
    return described or platform.processor() or platform.machine()


def _cpu_described(info: str) -> str | None:
    """The processor's name in the text of /proc/cpuinfo: that of its model or, on ARM, the numbers that stand for it.

    A processor may have cores of several kinds, which are all named.
    """
    parts: dict[str, None] = {}  # in order, each once
    maker = ""
    for line in info.splitlines():
        key, _, value = (word.strip() for word in line.partition(":"))
        if key == "model name":
            return value
        if key == "CPU implementer":
            maker = value
        if key == "CPU part":
            parts[f"{maker}:{value}"] = None
    return f"{platform.machine()} {' '.join(parts)}" if parts else None


@lru_cache(maxsize=1)
def _driver_version() -> str:
    """The driver's version as nvidia-smi prints it, from the same library; "" where that is missing."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        answered = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    except (OSError, AttributeError):
        return ""
    return text.value.decode() if answered else ""


def find_device(name: str) -> torch.device:
    """The device of that name, "cpu", "cuda" or "cuda:1", with its number.

    Raises:
        ValueError: where the name is no device's, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device; name cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"convolutions run on the CPU and on NVIDIA GPUs, not on {name}; use cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"{name} needs an NVIDIA GPU and a torch for it, and torch sees none; use cpu")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise ValueError(f"there is no {name}; torch sees {count} GPU{'' if count == 1 else 's'}, cuda:0 first")
    return torch.device("cuda", index)
