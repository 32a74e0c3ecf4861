"""Kernels that travel: saved on a GPU, and loaded by a process without a compiler, a cache and a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import escort
from escort.artifact import kernels
from escort.cuda import carried
from escort.layers import MaxPool2d, SparseConv2d
from escort.planner.machine import Machine
from escort.problem import Precision
from tests.network.gpu.networks import assert_same, converted, each, pruned, samples

pytestmark = pytest.mark.gpu

#: Loads the file named first, runs the input in the second and writes the outputs to the third.
LOAD = """
import logging
import sys
import warnings

sys.modules["cuda.bindings.nvrtc"] = None
sys.modules["cuda.core"] = None
warnings.simplefilter("error", RuntimeWarning)

import torch

import escort
from escort.cuda.compiler import compiler_version

try:
    compiler_version()
except ImportError:
    pass
else:
    sys.exit("the compiler was there")
logging.basicConfig(level=logging.WARNING)
model, data, out, *rest = sys.argv[1:]
fast = escort.load(model, kernels=True)
x = torch.load(data).to(fast.plan.device)
with torch.inference_mode():
    torch.save([fast(x).cpu(), fast(x).cpu()], out)
    assert not fast.counters(), fast.counters()
    if rest == ["another size"]:
        fast(torch.cat([x, x], 2))
        print(fast.counters())
"""


def run_without_compiler(*args: object) -> subprocess.CompletedProcess[str]:
    gone = ("XDG_CACHE_HOME", "ESCORT_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    environment |= {"HOME": os.devnull, "PATH": os.devnull}
    words = [sys.executable, "-c", LOAD, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


@each("fp32", "fp16", "tf32")
def test_without_a_compiler_a_saved_network_runs_as_planned(precision: Precision, tmp_path: Path) -> None:
    fast, x = converted(precision), samples(precision)
    model, data, out = tmp_path / "model.escort", tmp_path / "x.pt", tmp_path / "y.pt"
    escort.save(fast, model, kernels=True)
    torch.save(x.cpu(), data)
    done = run_without_compiler(model, data, out)
    assert done.returncode == 0, done.stderr
    assert "is run by" not in done.stderr  # neither a layer nor a pool is left to another method
    with torch.inference_mode():
        expected = fast(x).cpu()
    for y in torch.load(out):
        assert_same(y, expected, precision)


def test_the_file_holds_the_kernels_of_layers_and_pools(tmp_path: Path) -> None:
    fast = converted("fp32")
    escort.save(fast, tmp_path / "model", kernels=True)
    data = kernels.beside(tmp_path / "model")
    binaries = kernels.read(data, kernels.digest(data.read_bytes()))
    sources = {binary.source for binary in binaries}
    assert ("max_pool.cu" in sources) == any(isinstance(m, MaxPool2d) for m in fast.network.modules())
    layers = [module for module in fast.network.modules() if isinstance(module, SparseConv2d)]
    expected = {binary.key for layer in layers for binary in layer.binaries()}
    assert expected <= {binary.key for binary in binaries}
    between = {"average_pool.cu", "concat.cu", "linear.cu", "max_pool.cu"}
    assert {binary.source for binary in binaries if binary.key not in expected} <= between
    back = escort.load(tmp_path / "model", kernels=data)
    assert back.plan == fast.plan and back.plan.machine == Machine.here("cuda:0")
    assert all(carried.find(binary.key) == binary for binary in binaries)
    x = samples("fp32")
    with torch.inference_mode():
        assert_same(back(x), fast(x))


def test_where_all_are_missing_the_layer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: Any) -> None:
    only("direct")
    fast = converted("fp32")
    monkeypatch.setattr(kernels, "used_by", lambda *args: [])
    escort.save(fast, tmp_path / "model", kernels=True)
    torch.save(samples("fp32").cpu(), tmp_path / "x")
    done = run_without_compiler(tmp_path / "model", tmp_path / "x", tmp_path / "y")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "ArtifactError" in last and "layer " in last and "CUDA kernels need NVRTC" in last
    back = escort.load(tmp_path / "model", kernels=True)  # here is a compiler
    x = samples("fp32")
    with torch.inference_mode():
        assert_same(back(x), fast(x))


def test_one_missing_kernel_is_named_with_its_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: Any) -> None:
    only("direct")
    fast, used_by = converted("fp32"), kernels.used_by
    monkeypatch.setattr(kernels, "used_by", lambda *args: [b for b in used_by(*args) if b.source == "direct.cu"][:1])
    escort.save(fast, tmp_path / "model", kernels=True)
    layers = [module for module in fast.network.modules() if isinstance(module, SparseConv2d)]
    assert len({binary.key for layer in layers for binary in layer.binaries()}) > 1
    torch.save(samples("fp32").cpu(), tmp_path / "x")
    done = run_without_compiler(tmp_path / "model", tmp_path / "x", tmp_path / "y")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ArtifactError" in last and "layer " in last and "direct.cu is not compiled for sm_" in last
    assert "pip install escort-sparse[cuda" in last and "save it with kernels=True again" in last


def test_a_size_that_was_not_planned_runs_by_what_needs_no_compiler(tmp_path: Path, only: Any) -> None:
    only("generated")  # whose code is of one size
    model = pruned(torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU()))
    x = samples("fp32", 2, 8, 28, 28)
    fast = escort.convert(model.cuda(), x, effort="best")
    assert [plan.method for plan in fast.plan.layers.values()] == ["generated"]
    escort.save(fast, tmp_path / "model", kernels=True)
    torch.save(x.cpu(), tmp_path / "x")
    done = run_without_compiler(tmp_path / "model", tmp_path / "x", tmp_path / "y", "another size")
    assert done.returncode == 0, done.stderr
    assert "run by cudnn: generated.cu is not compiled" in done.stdout
    assert "those of (56, 28) run by cudnn, as generated.cu is not compiled" in done.stderr
