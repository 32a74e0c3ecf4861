"""Sources to binaries: what is compiled once, what a failure says, what a missing package is called. Needs no GPU."""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from escort import cache
from escort.cuda import carried, compiler
from escort.cuda.binary import Binary
from escort.cuda.compiler import Text
from tests.cuda.kernels import ARCHS, SCALE

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that were compiled for, one by one."""
    seen: list[str] = []
    compile_it = compiler._compile

    def record(path: Path, macros: Any, arch: str, version: str, key: str) -> Binary:
        seen.append(arch)
        return compile_it(path, macros, arch, version, key)

    monkeypatch.setattr(compiler, "_compile", record)
    return seen


@pytest.mark.parametrize("arch", ARCHS)
def test_a_binary_says_what_it_uses(scale: Path, arch: str) -> None:
    binary = compiler.compile_source(scale, {"FACTOR": 3}, arch)
    assert binary.cubin.startswith(b"\x7fELF") and b"scale" in binary.cubin
    assert 0 < binary.registers < 40 and binary.spill_bytes == binary.stack_bytes == 0
    assert binary.shared_bytes == 128
    assert (binary.source, binary.defines, binary.arch) == ("scale.cu", {"FACTOR": "3"}, arch)
    assert binary.compiler == compiler.compiler_version()


def test_spills_and_local_memory_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "spill.cu"
    path.write_text("""
extern "C" __global__ void __launch_bounds__(1024, 2) spill(const float* x, float* y, int n) {
  float a[96];
#pragma unroll
  for (int i = 0; i < 96; i++) a[i] = x[i * n];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 96; j++) y[j * n] = a[j] * a[95 - j];
}
extern "C" __global__ void indexed(const int* x, int* y) {
  int a[64];
  for (int i = 0; i < 64; i++) a[x[i]] = i;
  for (int i = 0; i < 64; i++) y[i] = a[x[64 + i]];
}
""")
    binary = compiler.compile_source(path, {}, "sm_90")
    assert binary.registers == 32 and binary.spill_bytes > 0 and binary.stack_bytes >= 256


def test_a_binary_is_compiled_once(scale: Path, compilations: list[str]) -> None:
    first = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    assert compiler.compile_source(scale, {"FACTOR": "2"}, "sm_90") == first and compilations == ["sm_90"]


def test_whatever_a_binary_is_made_from_makes_another_one(scale: Path, compilations: list[str]) -> None:
    def changed() -> bool:
        before = len(compilations)
        compiler.compile_source(scale, defines, arch)
        return len(compilations) > before

    defines, arch = {"FACTOR": 2}, "sm_90"
    assert changed() and not changed()
    defines = {"FACTOR": 3}
    assert changed() and not changed()
    arch = "sm_80"
    assert changed() and not changed()
    scale.write_text(SCALE + "// more\n")
    assert changed() and not changed()
    scale.with_name("shift.cuh").write_text("#define SHIFT 1.5f\n")
    assert changed() and not changed()


def test_the_compiler_is_part_of_the_key(scale: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    monkeypatch.setattr(compiler, "compiler_version", lambda: "NVRTC 99.0")
    compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    assert len(compilations) == 2


@pytest.mark.parametrize("damage", [b"", b"foreign", None])
def test_a_damaged_entry_is_compiled_anew(scale: Path, compilations: list[str], damage: bytes | None) -> None:
    first = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    (entry,) = cache.entries("kernel")
    path = cache.folder() / f"{entry.key}.kernel"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90").registers == first.registers
    assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90").registers == first.registers
    assert len(compilations) == 2


@pytest.mark.parametrize(
    ("changes", "cubin"),
    [
        ({"arch": "sm_80"}, None),
        ({"source": "other.cu"}, None),
        ({"defines": {"FACTOR": "3"}}, None),
        ({"registers": "many"}, None),
        ({"compile_s": "long"}, None),
        ({"extra": 1}, None),
        ({}, b""),
        ({}, b"\x7fELF" + bytes(200)),
        ({}, "sm_80"),
    ],
)
def test_an_entry_that_is_something_else_is_compiled_anew(
    changes: dict[str, Any], cubin: bytes | str | None, scale: Path
) -> None:
    """Its checksum holds, as anybody can compute it: so the entry is held against what was asked for."""
    binary = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    (entry,) = cache.entries("kernel")
    if isinstance(cubin, str):
        cubin = compiler.compile_source(scale, {"FACTOR": 2}, cubin).cubin
    cache.store("kernel", entry.key, {**entry.description, **changes}, binary.cubin if cubin is None else cubin)
    again = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    assert again.cubin == binary.cubin and (again.arch, again.defines) == ("sm_90", {"FACTOR": "2"})
    stored = cache.load("kernel", entry.key)
    assert stored is not None and stored[1] == binary.cubin


def test_without_a_cache_everything_works(
    scale: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESCORT_CACHE_MB", "0")
    for _ in range(2):
        assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90").cubin
    assert len(compilations) == 2


def _compile_in_a_process(source: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(compiler.compile_source(source, {"FACTOR": 2}, "sm_90").cubin)


def test_processes_that_compile_the_same_end_right(scale: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_compile_in_a_process, args=(scale, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    cubins = {results.get(timeout=1) for _ in processes}
    (entry,) = cache.entries("kernel")
    assert cubins == {compiler.compile_source(scale, {"FACTOR": 2}, "sm_90").cubin}
    assert entry.description["source"] == "scale.cu"
    assert [path.name for path in cache.folder().iterdir()] == [f"{entry.key}.kernel"]


def test_an_error_names_file_line_and_defines(scale: Path) -> None:
    line = 1 + SCALE[: SCALE.index("FACTOR")].count("\n")
    with pytest.raises(RuntimeError, match=r"scale\.cu does not compile for sm_90.*-DOTHER=1") as caught:
        compiler.compile_source(scale, {"OTHER": 1}, "sm_90")
    assert f"scale.cu({line}): error" in str(caught.value) and '"FACTOR" is undefined' in str(caught.value)
    assert not cache.entries("kernel")


def test_an_error_in_a_header_names_the_header(scale: Path) -> None:
    scale.with_name("shift.cuh").write_text("#define SHIFT 0.5f\nint x = nothing;\n")
    with pytest.raises(RuntimeError, match=r"shift\.cuh\(2\): error"):
        compiler.compile_source(scale, {"FACTOR": 1}, "sm_90")


@pytest.mark.parametrize("arch", ["sm_30", "sm_999", "avx2"])
def test_an_architecture_that_the_compiler_does_not_know(scale: Path, arch: str) -> None:
    with pytest.raises(ValueError, match=f"cannot compile for {arch}, only for .*sm_90"):
        compiler.compile_source(scale, {"FACTOR": 1}, arch)


def test_an_architecture_has_what_no_other_one_has(tmp_path: Path) -> None:
    path = tmp_path / "fence.cu"
    path.write_text('extern "C" __global__ void fence() { asm volatile("wgmma.fence.sync.aligned;"); }')
    assert compiler.compile_source(path, {}, "sm_90a").arch == "sm_90a"
    with pytest.raises(RuntimeError, match=r"fence\.cu does not compile for sm_90 "):
        compiler.compile_source(path, {}, "sm_90")


@pytest.mark.parametrize("tap", [0, 1])
def test_a_copy_by_a_tensor_map_compiles(copy: Path, tap: int) -> None:
    binary = compiler.compile_source(copy, {"PIXELS": 64, "TAP": tap}, "sm_90a")
    assert binary.stack_bytes == 0  # the map is read where it is, and no local copy made


def test_a_missing_source_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nothing.cu"):
        compiler.compile_source("nothing.cu", {}, "sm_90")


def test_a_text_is_compiled_like_a_file(scale: Path) -> None:
    """Its errors and its entry in the cache bear its name; headers of `kernels` and of the toolkit are found."""
    text = Text("generated.cu", scale.read_text().replace('#include "shift.cuh"', "#define SHIFT 0.5f"))
    binary, file = (
        compiler.compile_source(text, {"FACTOR": 3}, "sm_90"),
        compiler.compile_source(scale, {"FACTOR": 3}, "sm_90"),
    )
    assert binary.source == "generated.cu" and b"scale" in binary.cubin
    assert (binary.registers, binary.shared_bytes) == (file.registers, file.shared_bytes)
    assert "generated.cu" in {entry.description["source"] for entry in cache.entries("kernel")}
    with pytest.raises(RuntimeError) as caught:
        compiler.compile_source(Text("generated.cu", "typedef int x;\nnothing y;\n"), {}, "sm_90")
    version = compiler.compiler_version()
    assert str(caught.value).startswith(f"generated.cu does not compile for sm_90 ({version}): ")
    assert 'generated.cu(2): error: identifier "nothing" is undefined' in str(caught.value)


def test_what_a_text_is_made_from_makes_another_binary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compilations: list[str]
) -> None:
    monkeypatch.setattr(compiler, "KERNELS", tmp_path)
    header = tmp_path / "generated.cuh"
    header.write_text("#define WORDS 1\n")
    text = Text(
        "generated.cu", '#include "generated.cuh"\nextern "C" __global__ void generated(int* y) { *y = WORDS; }\n'
    )

    def changed() -> bool:
        before = len(compilations)
        compiler.compile_source(text, {}, "sm_90")
        return len(compilations) > before

    assert changed() and not changed()
    header.write_text("#define WORDS 2\n")
    assert changed() and not changed()
    text = replace(text, text=text.text + "// more\n")
    assert changed() and not changed()
    text = replace(text, name="other.cu")
    assert changed() and not changed()


def test_how_long_compiling_took_is_remembered(scale: Path) -> None:
    first = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    assert (
        0.0 < first.compile_s < 60.0
        and compiler.compile_source(scale, {"FACTOR": 2}, "sm_90").compile_s == first.compile_s
    )


@pytest.fixture
def forgetful() -> Any:
    """Nothing is remembered about the compiler, before and after."""
    remembered = compiler._find_nvrtc, compiler._toolkit_headers
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize("module", ["cuda.core", "cuda.bindings", "cuda.pathfinder"])
@pytest.mark.parametrize(
    ("cuda", "extra"), [(None, "cuda13"), ("11.8", "cuda12"), ("12.8", "cuda12"), ("13.0", "cuda13")]
)
@pytest.mark.usefixtures("forgetful")
def test_a_missing_package_is_named_with_the_extra(
    scale: Path, monkeypatch: pytest.MonkeyPatch, module: str, cuda: str | None, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ImportError, match=rf"pip install escort-sparse\[{extra}\]"):
        compiler.compile_source(scale, {"FACTOR": 1}, "sm_90")


@pytest.mark.usefixtures("forgetful")
def test_a_missing_compiler_library_is_named_with_the_extra(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    def missing() -> None:
        raise DynamicLibNotFoundError("no libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(ImportError, match=r"NVRTC.*escort-sparse\[cuda13\].*no libnvrtc.so"):
        compiler.compile_source(scale, {"FACTOR": 1}, "sm_90")


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC and the headers of the toolkit are not installed, and nothing is carried."""
    monkeypatch.setattr(compiler, "_find_nvrtc", lambda: ImportError("no libnvrtc.so"))
    monkeypatch.setattr(compiler, "_toolkit_headers", lambda: pytest.fail("looked for the toolkit"))


@pytest.fixture
def nothing_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "_binaries", {})


@pytest.mark.usefixtures("nothing_carried")
def test_what_is_carried_needs_no_compiler(scale: Path, request: pytest.FixtureRequest) -> None:
    binary = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    text = Text("text.cu", scale.read_text().replace('#include "shift.cuh"', "#define SHIFT 0.5f"))
    generated = compiler.compile_source(text, {"FACTOR": 2}, "sm_90")
    cache.clear("kernel")
    request.getfixturevalue("without_compiler")
    carried.carry([binary, generated])
    assert carried.has_any("sm_90") and not carried.has_any("sm_90a")
    assert compiler.compile_source(scale, {"FACTOR": "2"}, "sm_90") is binary
    assert compiler.compile_source(text, {"FACTOR": 2}, "sm_90") is generated
    assert not cache.entries("kernel")  # what came with a file is trusted in this process alone
    for defines, arch in (({"FACTOR": 3}, "sm_90"), ({"FACTOR": 2}, "sm_80")):
        with pytest.raises(ImportError, match=rf"scale.cu is not compiled for {arch} yet: CUDA kernels need NVRTC"):
            compiler.compile_source(scale, defines, arch)
    scale.with_name("shift.cuh").write_text("#define SHIFT 1.5f\n")
    with pytest.raises(ImportError, match="scale.cu is not compiled"):
        compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")


@pytest.mark.usefixtures("nothing_carried")
def test_another_compiler_may_have_made_what_is_carried(scale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    monkeypatch.setattr(compiler, "compiler_version", lambda: "NVRTC 99.0")
    carried.carry([binary])
    assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90") is binary


@pytest.mark.usefixtures("nothing_carried")
@pytest.mark.parametrize("changes", [{"source": "other.cu"}, {"arch": "sm_80"}, {"defines": {"FACTOR": "3"}}])
def test_what_is_carried_under_anothers_key_is_refused(scale: Path, changes: dict[str, Any]) -> None:
    binary = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
    carried.carry([replace(binary, **changes)])
    with pytest.raises(RuntimeError, match=f"what is there as scale.cu has the {next(iter(changes))}"):
        compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")


def test_looking_for_a_compiler_in_vain_is_done_once(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    from cuda.bindings import nvrtc

    looked: list[int] = []

    def missing() -> None:
        looked.append(1)
        raise RuntimeError("no libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    for _ in range(3):
        with pytest.raises(ImportError, match="no libnvrtc.so"):
            compiler.compiler_version()
    assert len(looked) == 1
