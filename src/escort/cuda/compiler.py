"""CUDA C++ to device code: NVRTC, driven through `cuda.core`, and a cache on disk. Needs no GPU and no toolkit.

The compiler comes with an extra of this package and is imported on first use, so that CPU users need none of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from escort import cache

_log = logging.getLogger(__name__)
#: Where sources are looked up.
KERNELS = Path(__file__).parents[1] / "kernels" / "cuda"

Defines = Mapping[str, "str | int"]


@dataclass(frozen=True)
class Text:
    """A source that was generated, and may be megabytes long. It may include files of `kernels/cuda`.

    Attributes:
        name: what errors and the cache call it, such as "generated.cu".
    """

    name: str
    text: str = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __str__(self) -> str:
        return self.name


Source = str | Path | Text


#: -v makes ptxas say what a kernel uses. Add "lineinfo": True to see source lines in a profiler; it triples a binary.
_OPTIONS = {"std": "c++17", "ptxas_options": ["-v"]}
#: What the header of a cubin says: the magic number, the version of the ABI, the machine and the flags. Those hold the
#: architecture's number, 90 for sm_90, in their second byte, or in their first before that version of the ABI.
_ELF_HEADER = struct.Struct("<4s4xB9xH28xI")
_ELF_CUDA, _NEWER_ABI = 190, 8
#: cuda.core changes its own modules while it is imported; a second thread would find it half done.
_importing = threading.Lock()


@dataclass(frozen=True)
class Binary:
    """A compiled source.

    Attributes:
        registers: per thread, of the entry function that uses most.
        spill_bytes: stored and loaded because registers ran out, all functions together.
        stack_bytes: of local memory per thread, of the largest function; arrays that are not in registers.
        shared_bytes: of statically declared shared memory, of the entry function that uses most.
        compile_s: seconds of one core that compiling took, whenever that was.
        cubin: device code for `arch` and its minor successors.
    """

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


def compile_source(source: Source, defines: Defines, arch: str) -> Binary:
    """Compiles a source, or finds its binary in the cache. Needs no GPU.

    Threads that compile do so at the same time: the compiler runs outside Python's lock.

    Args:
        source: a file of `escort/kernels/cuda`, an absolute path, or a generated text.
        defines: macros.
        arch: such as "sm_90".

    Raises:
        ImportError: the compiler is not installed; says what to install.
        ValueError: the compiler knows no such architecture.
        RuntimeError: the source does not compile; names file and line.
    """
    source = source if isinstance(source, Text) else KERNELS / source
    compiler = compiler_version()
    macros = {name: str(value) for name, value in sorted(defines.items())}
    made_from = {
        "texts": _digests(source),
        "source": source.name,
        "defines": macros,
        "arch": arch,
        "compiler": compiler,
        "options": _OPTIONS,
        "fields": [field.name for field in fields(Binary)],
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    expected = {name: made_from[name] for name in ("source", "defines", "arch", "compiler")}
    if (stored := cache.load("kernel", key)) is not None and _is_binary(*stored, expected):
        return Binary(**stored[0], cubin=stored[1])
    _check_arch(arch)
    binary = _compile(source, macros, arch, compiler)
    _log.debug("compiled %s for %s in %.2f s of one core", source.name, arch, binary.compile_s)
    described = {field.name: getattr(binary, field.name) for field in fields(Binary) if field.name != "cubin"}
    cache.store("kernel", key, described, binary.cubin)
    return binary


def _is_binary(description: Mapping[str, Any], cubin: bytes, expected: Mapping[str, Any]) -> bool:
    """Whether an entry of the cache is what was asked for: its fields, and device code for that architecture."""
    numbers = [description.get(field.name) for field in fields(Binary) if field.type in ("int", "float")]
    if {**description, **expected} != description or not all(type(number) in (int, float) for number in numbers):
        return False
    if {*description} != {field.name for field in fields(Binary)} - {"cubin"} or len(cubin) < _ELF_HEADER.size:
        return False
    magic, abi, machine, flags = _ELF_HEADER.unpack_from(cubin)
    arch = flags >> 8 & 0xFF if abi >= _NEWER_ABI else flags & 0xFF
    return magic == b"\x7fELF" and machine == _ELF_CUDA and expected["arch"].strip("smaf_") == str(arch)


def compiler_version() -> str:
    """Such as "NVRTC 13.0". Raises ImportError where the compiler is not installed."""
    return f"NVRTC {dotted(nvrtc_version())}"


@lru_cache
def nvrtc_version() -> tuple[int, int]:
    """Of the compiler, such as (13, 0). Raises ImportError where it is not installed."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the library itself is loaded by the first call
        raise missing("NVRTC", error) from error
    return major, minor


def extra() -> str:
    """The extra of this package that brings the compiler, of the CUDA that torch was built for."""
    return "cuda12" if torch.version.cuda is not None and int(torch.version.cuda.partition(".")[0]) < 13 else "cuda13"


def missing(what: str, error: Exception) -> ImportError:
    """The error for a package that is not installed."""
    return ImportError(f"CUDA kernels need {what}, which is missing: pip install escort-sparse[{extra()}] ({error})")


def dotted(version: tuple[int, int]) -> str:
    """(13, 0) as "13.0"."""
    return f"{version[0]}.{version[1]}"


def _check_arch(arch: str) -> None:
    from cuda.bindings import nvrtc

    supported = nvrtc.nvrtcGetSupportedArchs()[1]
    number = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if number is None or int(number[1]) not in supported:
        names = ", ".join(f"sm_{known}" for known in supported)
        raise ValueError(f"{compiler_version()} cannot compile for {arch}, only for {names}; install a newer one")


@lru_cache
def _toolkit_headers() -> Path:
    """The folder of cuda_fp16.h and its like."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        folder = find_nvidia_header_directory("cudart")
    except ImportError as error:
        raise missing("cuda.pathfinder", error) from error
    if folder is None:
        raise missing("the CUDA headers", FileNotFoundError("there is no cuda_runtime.h"))
    return Path(folder)


def _digests(source: Path | Text) -> dict[str, str]:
    """The digest of a source and of every header that it may include, by name."""
    digests: dict[str, str] = {}
    wanted = [source]
    while wanted:
        source = wanted.pop()
        if source.name in digests:
            continue
        if isinstance(source, Text):
            digests[source.name], included = source.digest, _included(source.text.encode())
        else:
            digests[source.name], included = _read(source, source.stat().st_mtime_ns)
        for name in included:
            wanted += [folder / name for folder in _folders(source) if (folder / name).is_file()][:1]
    return digests


def _folders(source: Path | Text) -> list[Path]:
    """Where what a source includes is looked up, in this order."""
    return [*([] if isinstance(source, Text) else [source.parent]), KERNELS, _toolkit_headers()]


@lru_cache(maxsize=256)
def _read(path: Path, modified: int) -> tuple[str, list[str]]:
    """A file's digest and the names that it includes."""
    text = path.read_bytes()
    return hashlib.sha256(text).hexdigest(), _included(text)


def _included(text: bytes) -> list[str]:
    """The names that a text includes, under whatever condition."""
    return [name.decode() for name in re.findall(rb'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)]


def _compile(source: Path | Text, macros: Mapping[str, str], arch: str, compiler: str) -> Binary:
    try:
        with _importing:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise missing("cuda.core", error) from error
    options = ProgramOptions(
        name=source.name,
        arch=arch,
        define_macro=list(macros.items()) or None,  # an empty list is refused
        include_path=[str(folder) for folder in _folders(source)],
        **_OPTIONS,
    )
    text = source.text if isinstance(source, Text) else source.read_text()
    log = io.StringIO()
    begin = time.thread_time()  # of this thread alone: others compile at the same time
    try:
        cubin = Program(text, "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # cuda.core's errors have no public name
        made_by = " ".join([compiler, *(f"-D{name}={value}" for name, value in macros.items())])
        message = str(error).rstrip("\0\n ")
        raise RuntimeError(f"{source.name} does not compile for {arch} ({made_by}): {message}") from error

    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, log.getvalue())] or [0]

    return Binary(
        source=source.name,
        defines=dict(macros),
        arch=arch,
        compiler=compiler,
        registers=max(numbers(r"Used (\d+) registers")),
        spill_bytes=sum(numbers(r"(\d+) bytes spill")),
        stack_bytes=max(numbers(r"(\d+) bytes stack frame")),
        shared_bytes=max(numbers(r"(\d+) bytes smem")),
        compile_s=round(time.thread_time() - begin, 3),
        cubin=bytes(cubin),
    )
