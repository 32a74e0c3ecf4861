"""escort doctor: what this machine can do and what is missing."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

import torch
from rich.table import Table
from rich.text import Text
from torch import fx, nn

from escort import cache, reference
from escort.cli.console import Output
from escort.cli.options import command
from escort.cuda import compiler, shipped
from escort.cuda.kernel import LEAST_CAPABILITY
from escort.filter import SparseFilter
from escort.methods import Method, for_device
from escort.planner import cores, store, timing
from escort.planner.machine import Machine
from escort.problem import MemoryFormat, Precision, Problem
from escort.runtime import Program
from escort.runtime.native.lowering import LAYERS, OPERATIONS

#: Package to what it is good for and the extra that brings it.
_OPTIONAL = {
    "scikit-learn": ("the data of escort demo", "demo"),
    "matplotlib": ("the plots of its report", "demo"),
    "Pillow": ("escort run on a folder of images", "images"),
    "onnxruntime": ("escort bench --against onnxruntime", "bench"),
    "onnx": ("the same, and escort.from_onnx", "onnx"),
    "onnxscript": ("the same", "onnx"),
    "huggingface_hub": ("models on the Hugging Face Hub", "hub"),
    "nvidia-cudnn-frontend": ("method cudnn_graph on GPUs", "cudnn"),
}
_PROBLEM = Problem(2, 16, 9, 9, 16, (3, 3), padding=(1, 1, 1, 1))
#: Every method takes one of these on its device.
_PROBLEMS = _PROBLEM, replace(_PROBLEM, groups=16), Problem(2, 16, 1, 1, 16, (1, 1))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        ok: True, False for something needed that is missing or wrong, None for something that one can do without.
        remedy: what to do about it, empty where nothing is to be done.
    """

    name: str
    value: str
    ok: bool | None = True
    remedy: str = ""


@command
def main(output: Output) -> None:
    """Say what this machine can do and what is missing; exit with 1 if something needed is."""
    findings = list(examine())
    output.failed = any(finding.ok is False for finding in findings)
    output.result = {"ok": not output.failed, "findings": [asdict(finding) for finding in findings]}
    table = Table("", "", "", "remedy", show_edge=False)
    marks = {True: Text("ok", "green"), None: Text("--", "yellow"), False: Text("missing", "bold red")}
    for finding in findings:
        table.add_row(marks[finding.ok], finding.name, finding.value, finding.remedy)
    output.text.print(table)


def examine() -> Iterator[Finding]:
    """Everything that decides what works here and how fast."""
    machine = Machine.here()
    yield Finding("escort", machine.escort)
    yield Finding("python", platform.python_version())
    yield Finding("torch", machine.torch)
    yield Finding("cpu", f"{machine.device} ({platform.machine()}), kernels for {machine.isa}")
    yield _threads(machine.threads)
    openmp, onednn = torch.backends.openmp.is_available(), torch.backends.mkldnn.is_available()
    yield Finding("torch OpenMP", *_have(openmp, "torch runs on one thread; install a build of torch with OpenMP"))
    yield Finding("torch oneDNN", *_have(onednn, "dense convolutions are slow; install a build of torch with oneDNN"))
    yield from _methods("cpu")
    yield _native_programs()
    yield Finding("compiler", "not needed: the CPU's kernels are compiled into the package")
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() and torch.version.cuda else 0)
    if not gpus:
        yield _no_gpu()
    yield _kernel_compiler(needed=bool(gpus))
    yield _kernel_cache()
    yield _shipped_kernels()
    yield _plan_store()
    for index in gpus:
        yield from _gpu(f"cuda:{index}")
    for package, (purpose, extra) in _OPTIONAL.items():
        installed = installed_version(package)
        missing = Finding(package, f"not installed, for {purpose}", None, f"pip install escort-sparse[{extra}]")
        yield missing if installed is None else Finding(package, f"{installed}, for {purpose}")


def _threads(threads: int) -> Finding:
    count = cores.count()
    value = f"{threads} of torch, {count} logical cores"
    if threads > count:
        return Finding("threads", value, None, f"more threads than cores are slow: set OMP_NUM_THREADS={count}")
    return Finding("threads", value)


def _have(available: bool, remedy: str) -> tuple[str, bool | None, str]:
    return ("available", True, "") if available else ("not available", None, remedy)


def _methods(device: str) -> Iterator[Finding]:
    """Whether each method of a device runs a small problem, the first and in the first precision that it takes."""
    for method in for_device(device):
        name = f"method {method.name}" if device == "cpu" else f"method {method.name} on {device}"
        problems = [
            replace(problem, device=device, precision=precision, memory_format=memory_format)
            for memory_format in (get_args(MemoryFormat) if device != "cpu" else ("contiguous",))
            for problem in _PROBLEMS
            for precision in get_args(Precision)
        ]
        reasons = [method.unsupported(problem) for problem in problems]
        if None not in reasons:
            yield Finding(name, f"refuses: {reasons[0]}", None)
            continue
        try:
            yield _try(name, method, problems[reasons.index(None)])
        except (ImportError, RuntimeError, ValueError) as error:
            yield Finding(name, "does not run", False, str(error))


def _try(name: str, method: Method, problem: Problem) -> Finding:
    """Runs a small convolution, and compares the result with the reference."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in (problem.input_shape, problem.weight_shape))
    x, weight = x.to(problem.storage), (weight * (weight > 0.5)).to(problem.storage).float()
    sparse_filter = SparseFilter.from_dense(weight, problem.groups)
    config = method.configs(problem, sparse_filter)[0]
    y = method.prepare(problem, sparse_filter, None, config)(x.to(problem.device))
    error = reference.compare(y.cpu(), reference.conv2d(problem, x, weight))
    if not error <= reference.ERROR_BOUND[problem.precision]:
        return Finding(name, f"computes wrong, error {error:.1e}", False, "reinstall escort-sparse, report it")
    between = "" if method.is_native or problem.device != "cpu" else ", as a step of its own between native ones"
    return Finding(name, f"works{between}")


def _native_programs() -> Finding:
    """Whether a small program runs without Python between its steps, and how much may be in one."""
    program = Program.of(fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Sigmoid())))
    with torch.no_grad():
        program(torch.zeros(1, 4))
    if reasons := ", ".join(program.native.stats()["eager"]):
        return Finding("native programs", f"steps run one by one: {reasons}", None)
    value = f"{len(OPERATIONS)} functions and {len(LAYERS)} layers of torch run without Python between them"
    return Finding("native programs", f"{value}; print(fast.plan) says which steps of a model do not")


def _no_gpu() -> Finding:
    if torch.version.cuda is None:
        return Finding("gpu", "none: this torch is built without CUDA", None, "for NVIDIA GPUs install a build with it")
    try:
        torch.cuda.init()
        reason = ""
    except RuntimeError as error:
        reason = f": {str(error).partition('. ')[0]}"
    return Finding("gpu", f"none that torch sees{reason}", None, "for NVIDIA GPUs install or update their driver")


def _kernel_compiler(*, needed: bool) -> Finding:
    try:
        return Finding("kernel compiler", f"{compiler.compiler_version()}, for GPUs")
    except ImportError:
        value = "not installed, for GPUs"
        return Finding(
            "kernel compiler", value, False if needed else None, f"pip install escort-sparse[{compiler.extra()}]"
        )


def _kernel_cache() -> Finding:
    try:
        folder = cache.folder()
        cache.check_folder()
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except cache.UnsafeFolderError as error:
        value, _, remedy = str(error).partition("; ")
        return Finding("kernel cache", value, None, remedy)
    except OSError as error:
        remedy = f"make room, or set {cache.FOLDER_VARIABLE} to a folder that can be written"
        return Finding("kernel cache", f"cannot be written: {error}", None, remedy)
    return Finding("kernel cache", f"{folder}, see escort cache")


def _shipped_kernels() -> Finding:
    counts = ", ".join(f"{count} for {arch}" for arch, count in shipped.archs().items())
    return Finding("shipped kernels", counts or "none: all are compiled at their first use")


def _plan_store() -> Finding:
    if not store.is_kept():
        value = "switched off: every process measures all layers"
        return Finding("plan store", value, None, f"leave out {store.KEEP_VARIABLE}=0 and {cache.LIMIT_VARIABLE}=0")
    try:
        count = sum(stored is not None for _, stored in store.entries())
    except OSError:
        return Finding("plan store", "not used, as the kernel cache", None)
    return Finding("plan store", f"plans kept: {count}, see escort cache")


def _gpu(device: str) -> Iterator[Finding]:
    """What a GPU is, and whether each method compiles, loads and runs its kernels on it."""
    machine = Machine.here(device)
    capability = torch.cuda.get_device_capability(device)
    value = f"{machine.device}, compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        yield Finding(device, value, None, "too old for our kernels; convert for the CPU instead")
        return
    yield Finding(device, f"{value}, driver {machine.driver or 'unknown'}, torch for CUDA {machine.cuda}")
    yield from _methods(device)
    yield _graphs(device)


def _graphs(device: str) -> Finding:
    """Whether a GPU's work can be captured in a graph and replayed, as is done to time it."""
    name = f"CUDA graphs on {device}"
    try:
        (outcome,) = timing.race_on_gpu([lambda: torch.ones(8, device=device) + 1.0], device, rounds=3)
    except RuntimeError as error:
        return Finding(name, "cannot be captured", False, str(error))
    if outcome.timer != "graph":
        remedy = "times include the host's: update the driver, or install a torch for its CUDA"
        return Finding(name, outcome.reason or "cannot be captured", None, remedy)
    return Finding(name, "can be captured and replayed")


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
