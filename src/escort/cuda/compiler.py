"""CUDA C++ to device code: NVRTC, driven through `cuda.core`, and a cache on disk. Needs no GPU and no toolkit.

The compiler comes with an extra of this package and is imported on first use, so that CPU users need none of it. What
:mod:`escort.cuda.carried` or :mod:`escort.cuda.shipped` holds needs no compiler at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from escort import cache
from escort.cuda import carried, shipped
from escort.cuda.binary import Binary

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


class Variant(NamedTuple):
    """A source and the macros that one kernel of it is compiled with.

    `native` says whether it uses instructions that one architecture alone has, such as the `wgmma` of "sm_90a".
    """

    source: Source
    defines: Defines
    native: bool = False

    @property
    def key(self) -> Hashable:
        """The same for the same variant."""
        return self.source, tuple(sorted(self.defines.items())), self.native


#: -v makes ptxas say what a kernel uses. Add "lineinfo": True to see source lines in a profiler; it triples a binary.
_OPTIONS = {"std": "c++17", "ptxas_options": ["-v"]}
#: cuda.core changes its own modules while it is imported; a second thread would find it half done.
_importing = threading.Lock()


class NotInstalledError(ImportError, RuntimeError):
    """A package that kernels need is not installed: a RuntimeError as well, as a kernel that cannot run here raises."""


def compile_source(source: Source, defines: Defines, arch: str, newest: tuple[int, int] | None = None) -> Binary:
    """Finds a source's binary among those that are carried, shipped or in the cache, or compiles it. Needs no GPU.

    Threads that compile do so at the same time: the compiler runs outside Python's lock.

    Args:
        source: a file of `escort/kernels/cuda`, an absolute path, or a generated text.
        defines: macros.
        arch: such as "sm_90".
        newest: the newest CUDA that the driver supports: what is shipped may be made by a later one. None for any.

    Raises:
        ImportError: the compiler is not installed; says what to install.
        ValueError: the compiler knows no such architecture.
        RuntimeError: the source does not compile; names file and line. Or what is carried for it is something else.
    """
    source = source if isinstance(source, Text) else KERNELS / source
    made_from, key = _key_of(source, defines, arch)
    if (binary := _brought(made_from, key, newest)) is not None:
        return binary
    compiler = _compiler_for(source, arch)
    expected = {**made_from, "key": key, "compiler": compiler}
    # What is included of the toolkit differs from machine to machine, as the compiler does.
    texts, names = _digests(source, _all_folders), [field.name for field in fields(Binary)]
    cache_key = _hash({**expected, "texts": texts, "fields": names})
    if (stored := _from_cache(cache_key, expected)) is not None:
        return stored
    _check_arch(arch)
    binary = _compile(source, made_from["defines"], arch, compiler, key)
    _log.debug("compiled %s for %s in %.2f s of one core", source.name, arch, binary.compile_s)
    cache.store("kernel", cache_key, binary.describe(), binary.cubin)
    return binary


def no_compiler() -> str | None:
    """Why nothing can be compiled here, None where it can."""
    found = _find_nvrtc()
    return str(missing("NVRTC", found)) if isinstance(found, Exception) else None


def is_brought(source: Source, defines: Defines, arch: str, newest: tuple[int, int] | None = None) -> bool:
    """Whether :func:`compile_source` needs no compiler for its arguments, as the binary is carried or shipped."""
    made_from, key = _key_of(source if isinstance(source, Text) else KERNELS / source, defines, arch)
    return _brought(made_from, key, newest) is not None


def _key_of(source: Path | Text, defines: Defines, arch: str) -> tuple[dict[str, Any], str]:
    """What a binary is made from, and the key of that."""
    macros = {name: str(value) for name, value in sorted(defines.items())}
    made_from = {"source": source.name, "defines": macros, "arch": arch}
    return made_from, _hash({**made_from, "texts": _digests(source, _folders), "options": _OPTIONS})


def _brought(made_from: Mapping[str, Any], key: str, newest: tuple[int, int] | None) -> Binary | None:
    """The binary that is carried under a key, or shipped and loaded by a driver of that CUDA; None where none is."""
    if (binary := carried.find(key)) is not None:
        binary.check(made_from)
        return binary
    binary = shipped.find(key)
    return binary if binary is not None and (newest is None or binary.cuda[0] <= newest[0]) else None


def _hash(made_from: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _compiler_for(source: Path | Text, arch: str) -> str:
    """The compiler's version. Raises ImportError naming the kernel that is to be compiled."""
    try:
        return compiler_version()
    except ImportError as error:
        raise NotInstalledError(f"{source.name} is not compiled for {arch} yet: {error}") from error


def _from_cache(key: str, expected: Mapping[str, Any]) -> Binary | None:
    """An entry of the cache; None where there is none, or it is not what was asked for."""
    if (stored := cache.load("kernel", key)) is None:
        return None
    try:
        binary = Binary.of(*stored)
        binary.check(expected)
    except (ValueError, RuntimeError):
        return None
    return binary


def compiler_version() -> str:
    """Such as "NVRTC 13.0". Raises ImportError where the compiler is not installed."""
    return f"NVRTC {dotted(nvrtc_version())}"


def nvrtc_version() -> tuple[int, int]:
    """Of the compiler, such as (13, 0). Raises ImportError where it is not installed."""
    found = _find_nvrtc()
    if isinstance(found, Exception):
        raise missing("NVRTC", found) from found
    return found


@lru_cache
def _find_nvrtc() -> tuple[int, int] | Exception:
    """The compiler's version, or why there is none: looking for it takes long, and every layer asks."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the library itself is loaded by the first call
        return error
    return major, minor


def extra() -> str:
    """The extra of this package that brings the compiler, of the CUDA that torch was built for."""
    return "cuda12" if torch.version.cuda is not None and int(torch.version.cuda.partition(".")[0]) < 13 else "cuda13"


def missing(what: str, error: Exception) -> ImportError:
    """The error for a package that is not installed."""
    return NotInstalledError(
        f"CUDA kernels need {what}, which is missing: pip install escort-sparse[{extra()}] ({error})"
    )


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


def _digests(source: Path | Text, folders: Callable[[Path | Text], list[Path]]) -> dict[str, str]:
    """The digest of a source and of every header that it may include out of these folders, by name."""
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
            wanted += [folder / name for folder in folders(source) if (folder / name).is_file()][:1]
    return digests


def _folders(source: Path | Text) -> list[Path]:
    """Where our own headers that a source includes are looked up, in this order."""
    return [*([] if isinstance(source, Text) else [source.parent]), KERNELS]


def _all_folders(source: Path | Text) -> list[Path]:
    """Where what a source includes is looked up, in this order."""
    return [*_folders(source), _toolkit_headers()]


@lru_cache(maxsize=256)
def _read(path: Path, modified: int) -> tuple[str, list[str]]:
    """A file's digest and the names that it includes."""
    text = path.read_bytes()
    return hashlib.sha256(text).hexdigest(), _included(text)


def _included(text: bytes) -> list[str]:
    """The names that a text includes, under whatever condition."""
    return [name.decode() for name in re.findall(rb'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)]


def _compile(source: Path | Text, macros: Mapping[str, str], arch: str, compiler: str, key: str) -> Binary:
    try:
        with _importing:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise missing("cuda.core", error) from error
    options = ProgramOptions(
        name=source.name,
        arch=arch,
        define_macro=list(macros.items()) or None,  # an empty list is refused
        include_path=[str(folder) for folder in _all_folders(source)],
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
        key=key,
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
