"""The kernels that a wheel brings: found before the cache and the compiler, and absent where they are damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from escort import cache
from escort.cuda import carried, compiler, kernel, shipped
from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from tests.cuda.kernels import SCALE, write_scale

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where kernels would be shipped."""
    path = tmp_path / "shipped.kernels"
    monkeypatch.setattr(shipped, "FILE", path)
    monkeypatch.setattr(carried, "_binaries", {})
    shipped._opened.cache_clear()
    yield path
    shipped._opened.cache_clear()


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    return write_scale(tmp_path)


@pytest.fixture
def ship(file: Path, scale: Path) -> Callable[[], Binary]:
    """Ships the kernel of `scale` with factor 2, of which nothing is left elsewhere, and no compiler."""

    def ship() -> Binary:
        binary = compiler.compile_source(scale, {"FACTOR": 2}, "sm_90")
        other = compiler.compile_source(scale, {"FACTOR": 2}, "sm_80")
        file.write_bytes(shipped.pack([binary, other]))
        cache.clear("kernel")
        shipped._opened.cache_clear()
        return binary

    return ship


def hide_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_find_nvrtc", lambda: ImportError("no libnvrtc.so"))
    monkeypatch.setattr(compiler, "_toolkit_headers", lambda: pytest.fail("looked for the toolkit"))


def test_what_is_shipped_needs_no_compiler(
    ship: Callable[[], Binary], scale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = ship()
    hide_compiler(monkeypatch)
    assert compiler.compile_source(scale, {"FACTOR": "2"}, "sm_90") == binary
    assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_80").arch == "sm_80"
    assert not cache.entries("kernel")
    assert shipped.archs() == {"sm_80": 1, "sm_90": 1}
    for defines, arch in (({"FACTOR": 3}, "sm_90"), ({"FACTOR": 2}, "sm_90a")):
        with pytest.raises(ImportError, match=f"scale.cu is not compiled for {arch} yet"):
            compiler.compile_source(scale, defines, arch)


def test_what_came_with_a_network_goes_first(ship: Callable[[], Binary], scale: Path) -> None:
    binary = replace(ship(), compile_s=99.0)
    carried.carry([binary])
    assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90") is binary


def test_another_version_finds_nothing(ship: Callable[[], Binary], scale: Path) -> None:
    ship()
    scale.write_text(SCALE + "// changed\n")
    assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90").compile_s > 0.0
    assert len(cache.entries("kernel")) == 1


def test_what_the_driver_cannot_load_is_passed_over(
    ship: Callable[[], Binary], scale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = ship()
    hide_compiler(monkeypatch)
    major, minor = binary.cuda
    for newest in ((major, minor), (major, 0), (major + 1, 0)):
        assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90", newest) == binary
    with pytest.raises(ImportError, match="not compiled"):
        compiler.compile_source(scale, {"FACTOR": 2}, "sm_90", (major - 1, 9))


def test_a_method_is_there_where_its_kernels_are_shipped(
    ship: Callable[[], Binary], scale: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler, for an architecture of which any are, and each kernel that is; none of these for a filter."""
    binary, device, two = ship(), torch.device("cuda:0"), {"FACTOR": 2}
    hide_compiler(monkeypatch)
    monkeypatch.setattr(kernel.driver, "api", lambda: None)
    monkeypatch.setattr(kernel, "arch", lambda device, *, native=False: "sm_90a" if native else "sm_90")
    monkeypatch.setattr(kernel, "driver_version", lambda: binary.cuda)
    assert kernel.unavailable(device) is None
    assert "need NVRTC" in str(kernel.unavailable(device, native=True))
    assert "need NVRTC" in str(kernel.unavailable(device, per_filter=True))
    assert kernel.is_had(Variant(scale, two), device)
    assert not kernel.is_had(Variant(scale, {"FACTOR": 3}), device)
    assert not kernel.is_had(Variant(scale, two, native=True), device)
    monkeypatch.setattr(kernel, "driver_version", lambda: (binary.cuda[0] - 1, 9))
    assert "need NVRTC" in str(kernel.unavailable(device)) and not kernel.is_had(Variant(scale, two), device)
    carried.carry([binary])
    assert kernel.unavailable(device, per_filter=True) is None and kernel.is_had(Variant(scale, two), device)


def test_an_install_from_source_ships_nothing(scale: Path) -> None:
    assert shipped.archs() == {} and shipped.find("0" * 64) is None
    assert compiler.compile_source(scale, {"FACTOR": 2}, "sm_90").arch == "sm_90"


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"foreign" * 100,
        lambda content: content[:-100],
        lambda content: flipped(content, len(content) - 100),
        lambda content: flipped(content, content.index(b"sha256") + 12),
        lambda content: content.replace(b"kernels", b"cernels", 1),
        lambda content: content.replace(b"registers", b"registerz"),
    ],
)
def test_a_damaged_file_counts_as_absent(
    damage: Callable[[bytes], bytes],
    ship: Callable[[], Binary],
    scale: Path,
    file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    binary = ship()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found = [compiler.compile_source(scale, {"FACTOR": 2}, arch) for arch in ("sm_80", "sm_90")]
    assert [each.arch for each in found] == ["sm_80", "sm_90"] and found[1].cubin == binary.cubin
    assert "is damaged, reinstall escort-sparse" in caplog.text
    assert cache.entries("kernel")


def test_the_same_kernels_give_the_same_file(ship: Callable[[], Binary], file: Path) -> None:
    binary = ship()
    assert shipped.pack([binary, binary]) == shipped.pack([binary])
    other = shipped.find(next(iter(set(shipped._opened(file).records) - {binary.key})))
    assert other is not None and shipped.pack([other, binary]) == shipped.pack([binary, other]) == file.read_bytes()
