"""What a compiler makes of a source: device code, what it is of, and what it uses."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

#: What the header of a cubin says: the magic number, the version of the ABI, the machine and the flags. Those hold the
#: architecture's number, 90 for sm_90, in their second byte, or in their first before that version of the ABI.
_ELF_HEADER = struct.Struct("<4s4xB9xH28xI")
_ELF_CUDA, _NEWER_ABI = 190, 8
_MOST_NUMBER = 1 << 31


@dataclass(frozen=True)
class Binary:
    """A compiled source.

    Attributes:
        key: the hash of all that it was made from, but for the compiler and its headers, which may differ.
        compiler: such as "NVRTC 13.0".
        registers: per thread, of the entry function that uses most.
        spill_bytes: stored and loaded because registers ran out, all functions together.
        stack_bytes: of local memory per thread, of the largest function; arrays that are not in registers.
        shared_bytes: of statically declared shared memory, of the entry function that uses most.
        compile_s: seconds of one core that compiling took, whenever that was.
        cubin: device code for `arch` and its minor successors.
    """

    key: str
    source: str
    defines: dict[str, str]
    arch: str
    compiler: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    compile_s: float
    cubin: bytes

    @classmethod
    def of(cls, description: Mapping[str, Any], cubin: bytes) -> Binary:
        """The binary behind :meth:`describe` and its device code.

        Raises:
            ValueError: naming what no description of a binary has; or where the code is none for its architecture.
        """
        if description.keys() != _TYPES.keys():
            raise ValueError(f"a kernel is described by {', '.join(_TYPES)}, got {', '.join(map(str, description))}")
        for name, is_valid in _TYPES.items():
            if not is_valid(description[name]):
                raise ValueError(f"no kernel has the {name} {description[name]!r:.50}")
        binary = cls(**description, cubin=cubin)
        if _arch_number(cubin) != binary.arch.strip("smaf_"):
            raise ValueError(f"{binary.source}: its code is no device code for {binary.arch}")
        return binary

    def describe(self) -> dict[str, Any]:
        """All but the device code, as JSON values."""
        return {name: getattr(self, name) for name in _TYPES}

    def check(self, expected: Mapping[str, Any]) -> None:
        """Raises RuntimeError where a field is not what is expected."""
        for name, value in expected.items():
            if (found := getattr(self, name)) != value:
                raise RuntimeError(f"what is there as {expected['source']} has the {name} {found!r:.100}, not {value}")

    @property
    def cuda(self) -> tuple[int, int]:
        """The CUDA of its compiler, such as (13, 0)."""
        return cuda_of(self.compiler)


def cuda_of(compiler: str) -> tuple[int, int]:
    """The CUDA that a compiler is of, such as "NVRTC 13.0"."""
    major, minor = compiler.rpartition(" ")[2].split(".")
    return int(major), int(minor)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_NUMBER


def _matches(pattern: str, value: Any) -> bool:
    return type(value) is str and re.fullmatch(pattern, value, re.ASCII) is not None


#: The fields of a description, and what may stand there.
_TYPES = {field.name: _is_count for field in fields(Binary) if field.name != "cubin"} | {
    "key": lambda value: _matches("[0-9a-f]{64}", value),
    "source": _is_text,
    "defines": lambda value: type(value) is dict and all(map(_is_text, (*value, *value.values()))),
    "arch": lambda value: _matches(r"sm_\d{1,4}[af]?", value),
    "compiler": lambda value: _matches(r"NVRTC \d{1,4}\.\d{1,4}", value),
    "compile_s": lambda value: type(value) in (int, float) and math.isfinite(value) and value >= 0,
}


def _arch_number(cubin: bytes) -> str | None:
    """The number of the architecture that device code is for, None where it is none."""
    if len(cubin) < _ELF_HEADER.size:
        return None
    magic, abi, machine, flags = _ELF_HEADER.unpack_from(cubin)
    if magic != b"\x7fELF" or machine != _ELF_CUDA:
        return None
    return str(flags >> 8 & 0xFF if abi >= _NEWER_ABI else flags & 0xFF)
