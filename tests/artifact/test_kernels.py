"""The file of kernels: what is in it, who reads it, and what is refused. The binaries are made up."""

from __future__ import annotations

import importlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from escort.artifact import ArtifactError, kernels, load, save
from escort.cuda import carried, compiler
from escort.cuda.binary import Binary
from escort.layers import MaxPool2d, SparseConv2d
from escort.methods import by_name
from escort.network.convert import ConvertedModel
from tests.artifact.forgery import Forgery
from tests.artifact.networks import assert_same
from tests.artifact.test_other_machines import planned_on_gpu

LOAD, SAVE = (importlib.import_module(f"escort.artifact.{name}") for name in ("load", "save"))
GPU = torch.device("cuda:0")


def cubin(arch: int = 90, size: int = 200) -> bytes:
    """What looks like device code for an architecture."""
    header = struct.pack("<4s4xB9xH28xI", b"\x7fELF", 8, 190, arch << 8)
    return header + bytes(size - len(header))


def binary(number: int = 1, **changes: Any) -> Binary:
    found = Binary(f"{number:064x}", "direct.cu", {"WORDS": "4"}, "sm_90", "NVRTC 13.0", 32, 0, 0, 128, 0.5, cubin())
    return replace(found, **changes)


BINARIES = [binary(2), binary(1, source="max_pool.cu", defines={}, arch="sm_90a", cubin=cubin(size=300))]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.escort.kernels"
    path.write_bytes(kernels.pack(BINARIES))
    return path


@pytest.fixture(autouse=True)
def nothing_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "_binaries", {})


def read(path: Path) -> list[Binary]:
    return kernels.read(path, kernels.digest(path.read_bytes()))


def test_what_is_packed_is_read(file: Path) -> None:
    assert read(file) == sorted(BINARIES, key=lambda each: each.key)
    assert kernels.pack(reversed(BINARIES)) == file.read_bytes() == kernels.pack([*BINARIES, *BINARIES])
    file.write_bytes(kernels.pack([]))
    assert read(file) == []


@pytest.mark.usefixtures("empty_cache")
def test_real_kernels_come_through(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "ROWS COLUMNS DOWN RIGHT TOP LEFT DILATION_DOWN DILATION_RIGHT".split()
    defines = {"STORAGE": 0, "VECTOR": 1, **dict.fromkeys(names, 1)}
    binaries = [compiler.compile_source("max_pool.cu", defines, arch) for arch in ("sm_80", "sm_90a")]
    file.write_bytes(kernels.pack(binaries))
    found = read(file)
    assert sorted(found, key=lambda each: each.arch) == binaries
    monkeypatch.setattr(compiler, "_find_nvrtc", lambda: ImportError("no libnvrtc.so"))
    carried.carry(found)
    assert compiler.compile_source("max_pool.cu", defines, "sm_90a") == binaries[1]


def test_a_file_of_another_digest_is_refused(file: Path) -> None:
    expected = kernels.digest(file.read_bytes())
    for data in (file.read_bytes()[:-1], file.read_bytes() + b"\0", b"", kernels.pack(BINARIES[:1])):
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="kernels: it is not the file of kernels that was saved .* copy both"):
            kernels.read(file, expected)


def test_a_link_is_followed_and_what_is_no_file_is_not_read(file: Path, tmp_path: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    assert read(link) == read(file)
    os.mkfifo(pipe)
    link.unlink()
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="is not a file; name one that escort.save wrote"):
            kernels.read(path, "")
    with pytest.raises(FileNotFoundError, match="none"):
        kernels.read(tmp_path / "none", "")


class Forged:
    """The parts of a file of kernels, to be changed."""

    def __init__(self) -> None:
        data = kernels.pack(BINARIES)
        size = int.from_bytes(data[:8], "little")
        self.content = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["kernels"])
        self.codes = safetensors.torch.load(data)
        self.first, self.second = self.content["kernels"]

    def save(self) -> bytes:
        return safetensors.torch.save(self.codes, {"kernels": json.dumps(self.content)})


def setting(to: Any, *keys: str) -> Callable[[Forged], None]:
    def forge(forged: Forged) -> None:
        inner: Any = forged.first
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return forge


def code(tensor: torch.Tensor) -> Callable[[Forged], None]:
    return lambda forged: forged.codes.update({forged.first["key"]: tensor})


def bytes_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


FORGERIES: dict[str, tuple[Callable[[Forged], Any], str]] = {
    "another format": (lambda forged: forged.content.update(format="zip"), "its format is 'zip' 1"),
    "another version": (lambda forged: forged.content.update(version=2), "its format is 'escort-kernels' 2"),
    "another key": (lambda forged: forged.content.update(more=1), "it is none that escort.save wrote"),
    "no list": (lambda forged: forged.content.update(kernels={}), "a list of at most"),
    "too many": (lambda forged: forged.content.update(kernels=[forged.first] * 20_000), "a list of at most 16,384"),
    "no object": (lambda forged: forged.content.update(kernels=[1, 2]), "not subscriptable"),
    "a kernel without code": (lambda forged: forged.codes.popitem(), "the code of each kernel that it describes"),
    "code without a kernel": (lambda forged: forged.content["kernels"].pop(), "the code of each kernel"),
    "one kernel twice": (lambda forged: forged.content.update(kernels=[forged.first] * 2), "the code of each kernel"),
    "another field": (setting(1, "more"), "a kernel is described by key, source"),
    "a key that is no hash": (lambda forged: (forged.first.update(key="k"), forged.codes.clear()), "the code of each"),
    "registers that are a text": (setting("many", "registers"), "no kernel has the registers 'many'"),
    "negative shared memory": (setting(-1, "shared_bytes"), "no kernel has the shared_bytes -1"),
    "a boolean": (setting(True, "stack_bytes"), "no kernel has the stack_bytes True"),
    "a huge number": (setting(1 << 40, "spill_bytes"), "no kernel has the spill_bytes"),
    "a macro that is a number": (setting(4, "defines", "WORDS"), "no kernel has the defines"),
    "no architecture": (setting("avx2", "arch"), "no kernel has the arch 'avx2'"),
    "no compiler": (setting("gcc", "compiler"), "no kernel has the compiler 'gcc'"),
    "code for another architecture": (setting("sm_80", "arch"), "direct.cu|max_pool.cu: its code is no device code"),
    "code that is none": (code(bytes_of(b"#!/bin/sh" * 30)), "its code is no device code for sm_90"),
    "a program of the host": (code(bytes_of(b"\x7fELF" + bytes(200))), "its code is no device code for sm_90"),
    "little code": (code(bytes_of(b"\x7fELF")), "its code is no device code for sm_90"),
    "code of numbers": (code(torch.zeros(100)), "code is a row of bytes, got torch.float32"),
    "code of rows": (code(torch.zeros(2, 2, dtype=torch.uint8)), "code is a row of bytes"),
}


@pytest.mark.parametrize(("forge", "message"), FORGERIES.values(), ids=FORGERIES)
def test_a_forged_file_is_refused(file: Path, forge: Callable[[Forged], None], message: str) -> None:
    """Its digest is right, as whoever forges it can forge the network's file as well."""
    forged = Forged()
    forge(forged)
    file.write_bytes(forged.save())
    with pytest.raises(
        ArtifactError, match=rf"model.escort.kernels: .*({message}).*; save the model with kernels=True"
    ):
        read(file)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, (1 << 40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}", b"\x08" + bytes(40)]
)
def test_what_is_no_such_file_is_refused(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="model.escort.kernels: .*; save the model with kernels=True"):
        read(file)


def test_a_file_is_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MOST_BYTES", file.stat().st_size)
    assert len(read(file)) == 2
    monkeypatch.setattr(kernels, "_MOST_BYTES", file.stat().st_size - 1)
    with pytest.raises(ArtifactError, match="it has more than"):
        read(file)


def test_kernels_of_another_gpu_or_a_newer_driver_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.cuda.kernel.arch", lambda device: "sm_90")
    monkeypatch.setattr("escort.cuda.kernel.driver_version", lambda: (13, 0))
    kernels.check_fit(file, BINARIES, GPU)
    kernels.check_fit(file, [], GPU)
    kernels.check_fit(file, [binary(compiler="NVRTC 13.9")], GPU)  # of the same major version a driver loads any
    with pytest.raises(ArtifactError, match="its kernels are of CUDA 14.0, and the driver supports CUDA 13.0; update"):
        kernels.check_fit(file, [binary(), binary(compiler="NVRTC 14.0")], GPU)
    monkeypatch.setattr("escort.cuda.kernel.arch", lambda device: "sm_80")
    with pytest.raises(ArtifactError, match="its kernels are for sm_90, sm_90a, and cuda:0 is sm_80; load the network"):
        kernels.check_fit(file, BINARIES, GPU)


def test_the_kernels_of_a_network_are_those_that_its_layers_and_pools_run_by(
    converted: ConvertedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled: list[tuple[int, ...]] = []

    def of_pool(layer: MaxPool2d, x: torch.Tensor) -> tuple[Binary, ...]:
        pooled.append(tuple(x.shape))
        return (binary(100),)

    monkeypatch.setattr(SparseConv2d, "binaries", lambda layer: (binary(layer.out_channels), binary(3)))
    monkeypatch.setattr(MaxPool2d, "binaries", of_pool)
    layers = [module for module in converted.network.modules() if isinstance(module, SparseConv2d)]
    numbers = {layer.out_channels for layer in layers} | {3, 100}
    for _ in range(2):  # nothing is left of the first time
        found = kernels.used_by(converted, torch.device("cpu"))
        assert sorted(found, key=lambda each: each.key) == [binary(number) for number in sorted(numbers)]
    assert pooled == [(2, 8, 16, 16)] * 2
    packed = ConvertedModel(converted.network, replace(converted.plan, packed_inputs=True))
    assert binary(100) not in kernels.used_by(packed, torch.device("cpu")) and len(pooled) == 2


@pytest.fixture
def on_gpu(saved: Path, tmp_path: Path) -> Path:
    """A network's file that was planned on a GPU, beside the file of its kernels."""
    path = planned_on_gpu(saved, tmp_path / "model.escort", "fp32")
    data = kernels.pack(BINARIES)
    kernels.beside(path).write_bytes(data)
    forgery = Forgery(path.read_bytes())
    forgery.texts["kernels"] = kernels.digest(data)
    path.write_bytes(forgery.seal(replacing=False))
    return path


def carry(path: Path, kernels_path: Path) -> None:
    LOAD._carry(LOAD._read(path), GPU, kernels_path)


def test_kernels_are_taken_in_when_asked_for_alone(on_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("escort.cuda.kernel.arch", lambda device: "sm_90")
    monkeypatch.setattr("escort.cuda.kernel.driver_version", lambda: (13, 0))
    load(on_gpu, device="cpu")
    assert not carried.has_any("sm_90")
    carry(on_gpu, kernels.beside(on_gpu))
    assert carried.find(BINARIES[0].key) == BINARIES[0] and carried.has_any("sm_90a")


def test_kernels_that_cannot_be_taken_in(on_gpu: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArtifactError, match="model.escort: kernels are for GPUs, and it is loaded on the CPU"):
        load(on_gpu, device="cpu", kernels=True)
    with pytest.raises(ArtifactError, match="it was saved without kernels; leave them out"):
        carry(saved, kernels.beside(on_gpu))
    kernels.beside(on_gpu).write_bytes(kernels.pack(BINARIES[:1]))
    with pytest.raises(ArtifactError, match="its SHA-256 differs"):
        carry(on_gpu, kernels.beside(on_gpu))
    assert not carried.has_any("sm_90")


def test_a_network_on_the_cpu_has_no_kernels_to_save(converted: ConvertedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this one is on the CPU; leave out kernels"):
        save(converted, tmp_path / "model", kernels=True)
    assert not list(tmp_path.iterdir())


def test_a_file_says_which_kernels_are_its_own(
    converted: ConvertedModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = kernels.pack(BINARIES)
    monkeypatch.setattr(SAVE, "_pack_kernels", lambda model: data)
    save(converted, tmp_path / "model", kernels=True)
    assert kernels.beside(tmp_path / "model").read_bytes() == data
    texts = Forgery((tmp_path / "model").read_bytes()).texts
    assert list(texts) == ["sha256", "format", "version", "escort", "architecture", "plan", "kernels", "tensors"]
    assert texts["kernels"] == kernels.digest(data)
    assert_same(load(tmp_path / "model"), converted)
    save(converted, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == saved.read_bytes()


def test_a_method_that_is_out_is_named_with_its_layer(on_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = LOAD._read(on_gpu)
    LOAD._check_kept(saved, saved.plan)
    layers = saved.plan.layers | {"stem.0": replace(saved.plan.layers["stem.0"], method="cublas")}
    monkeypatch.setattr(
        type(by_name("cudnn", "cuda")),
        "unsupported",
        lambda *_: "CUDA kernels need NVRTC, which is missing: pip install it",
    )
    with pytest.raises(ArtifactError, match="layer stem.0: CUDA kernels need NVRTC.*: pip install it; or save it with"):
        LOAD._check_kept(saved, replace(saved.plan, layers=layers))


def test_layers_are_laid_out_side_by_side(
    converted: ConvertedModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out: list[nn.Module] = []
    monkeypatch.setattr(SparseConv2d, "prepare", lambda layer: laid_out.append(layer))
    record = LOAD._read(saved)
    layers = [module for module in converted.network.modules() if isinstance(module, SparseConv2d)]
    LOAD._lay_out(record, converted.network, is_carried=False)
    assert set(laid_out) == set(layers) and len(laid_out) == len(layers)
    laid_out.clear()
    monkeypatch.setattr(LOAD, "by_name", lambda *_: type("Slow", (), {"compiles_per_filter": True}))
    LOAD._lay_out(record, converted.network, is_carried=False)
    assert not laid_out  # a stranger's file may name kernels that take hours to compile
    LOAD._lay_out(record, converted.network, is_carried=True)
    assert len(laid_out) == len(layers)

    def missing(layer: SparseConv2d) -> None:
        raise RuntimeError(f"layer {layer.name}: direct.cu is not compiled for sm_90 yet: CUDA kernels need NVRTC")

    monkeypatch.setattr(SparseConv2d, "prepare", missing)
    with pytest.raises(
        ArtifactError, match=r"layer \S+: direct.cu is not compiled .*; save it with kernels=True again"
    ):
        LOAD._lay_out(record, converted.network, is_carried=True)
