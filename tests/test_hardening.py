"""What the compiled modules are hardened with, read from the files that were built, and what they ask of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from escort.cuda import _launch
from escort.kernels import _cpu

MODULES = [str(_cpu.__file__), str(_launch.__file__)]
BIND_NOW = 0x8
#: What a process that has torch has, besides the C and C++ libraries: torch brings it (see CMakeLists.txt).
OPENMP = "libgomp.so.1"


@contextmanager
def opened(path: str) -> Iterator[ELFFile]:
    with Path(path).open("rb") as file:
        yield ELFFile(file)


def dynamic(elf: ELFFile) -> DynamicSection:
    return elf.get_section_by_name(".dynamic")


@pytest.mark.parametrize("path", MODULES)
def test_addresses_of_functions_cannot_be_overwritten(path: str) -> None:
    with opened(path) as elf:
        flags = [tag.entry.d_val for tag in dynamic(elf).iter_tags("DT_FLAGS")]
        assert any(flag & BIND_NOW for flag in flags), "all of them are looked up when the module is loaded"
        kinds = {segment["p_type"] for segment in elf.iter_segments()}
        assert "PT_GNU_RELRO" in kinds, "and their table is read only from then on"


@pytest.mark.parametrize("path", MODULES)
def test_no_memory_is_both_written_and_run(path: str) -> None:
    writable, executable = 2, 1
    with opened(path) as elf:
        segments = [s for s in elf.iter_segments() if s["p_type"] in ("PT_LOAD", "PT_GNU_STACK")]
        assert any(segment["p_type"] == "PT_GNU_STACK" for segment in segments)
        assert not any(segment["p_flags"] & writable and segment["p_flags"] & executable for segment in segments)


@pytest.mark.parametrize("path", MODULES)
def test_overruns_of_buffers_are_seen(path: str) -> None:
    with opened(path) as elf:
        symbols = elf.get_section_by_name(".dynsym")
        assert isinstance(symbols, SymbolTableSection)
        names = {symbol.name for symbol in symbols.iter_symbols()}
    assert "__stack_chk_fail" in names, "functions with arrays check the word behind them (-fstack-protector-strong)"
    assert {"__vsnprintf_chk", "__fprintf_chk"} & names, "the C library knows how large buffers are (_FORTIFY_SOURCE)"


@pytest.mark.parametrize("path", MODULES)
def test_nothing_is_needed_that_wheels_may_not_need(path: str) -> None:
    with opened(path) as elf:
        needed = {tag.needed for tag in dynamic(elf).iter_tags("DT_NEEDED")}
        assert not list(dynamic(elf).iter_tags("DT_RUNPATH")) and not list(dynamic(elf).iter_tags("DT_RPATH"))
    c_and_cpp = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"}
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert needed - loader <= c_and_cpp | {OPENMP}
