"""escort doctor: what this machine can do and what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

from escort import reference
from escort.bench import Machine
from escort.cli.console import JsonOption, command
from escort.methods.direct import ISAS, Direct
from escort.problem import Problem
from escort.sparse import StretchedCSR

#: Package to what it is good for and the extra that brings it.
_OPTIONAL = {
    "scikit-learn": ("the data of escort demo", "demo"),
    "matplotlib": ("the plots of its report", "demo"),
    "Pillow": ("escort run on a folder of images", "images"),
    "onnxruntime": ("escort bench --against onnxruntime", "bench"),
    "onnx": ("the same", "bench"),
    "onnxscript": ("the same", "bench"),
}


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


def main(as_json: JsonOption = False) -> None:
    """Say what this machine can do and what is missing; exit with 1 if something needed is."""
    with command(as_json) as output:
        findings = list(examine())
        output.failed = any(finding.ok is False for finding in findings)
        output.result = {"ok": not output.failed, "findings": [asdict(finding) for finding in findings]}
        table = Table("", "", "", "remedy", show_edge=False)
        marks = {True: "[green]ok[/]", None: "[yellow]--[/]", False: "[bold red]missing[/]"}
        for finding in findings:
            table.add_row(marks[finding.ok], finding.name, finding.value, finding.remedy)
        output.text.print(table)


def examine() -> Iterator[Finding]:
    """Everything that decides what works here and how fast."""
    machine = Machine.here()
    yield Finding("escort", machine.escort)
    yield Finding("python", platform.python_version())
    yield Finding("torch", machine.torch)
    yield Finding("cpu", f"{machine.device} ({platform.machine()})")
    yield _threads(machine.threads)
    openmp, onednn = torch.backends.openmp.is_available(), torch.backends.mkldnn.is_available()
    yield Finding("torch OpenMP", *_have(openmp, "torch runs on one thread; install a build of torch with OpenMP"))
    yield Finding("torch oneDNN", *_have(onednn, "dense convolutions are slow; install a build of torch with oneDNN"))
    for isa in ISAS:
        yield _kernel(isa, chosen=isa == machine.isa)
    yield Finding("compiler", "not needed: the kernels are compiled into the package")
    yield Finding("gpu", _gpu(), None)
    for package, (purpose, extra) in _OPTIONAL.items():
        found = _version(package)
        missing = Finding(package, f"not installed, for {purpose}", None, f"pip install escort-sparse[{extra}]")
        yield missing if found is None else Finding(package, f"{found}, for {purpose}")


def _threads(threads: int) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = f"{threads} of torch, {cores} logical cores"
    if threads > cores:
        return Finding("threads", value, None, f"more threads than cores are slow: set OMP_NUM_THREADS={cores}")
    return Finding("threads", value)


def _have(there: bool, remedy: str) -> tuple[str, bool | None, str]:
    return ("available", True, "") if there else ("not available", None, remedy)


def _kernel(isa: str, *, chosen: bool) -> Finding:
    """Runs a small convolution on the kernel of that instruction set, against the reference."""
    problem = Problem(2, 3, 9, 9, 4, (3, 3), padding=(1, 1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in (problem.input_shape, problem.weight_shape))
    filter = StretchedCSR.from_dense(weight * (weight > 0.5))
    direct = Direct()
    config = replace(direct.configs(problem, filter)[0], isa=isa, vectors=ISAS[isa][1])
    error = reference.compare(
        direct.prepare(problem, filter, None, config)(x), reference.conv2d(problem, x, filter.to_dense())
    )
    if not error <= reference.ERROR_BOUND["fp32"]:
        return Finding(
            f"kernel {isa}", f"computes wrong, error {error:.1e}", False, "reinstall escort-sparse, report it"
        )
    return Finding(f"kernel {isa}", "works" + (", and is the fastest one here" if chosen else ""))


def _gpu() -> str:
    there = f"{torch.cuda.get_device_name()}, but" if torch.cuda.is_available() else "none that torch sees;"
    return f"{there} CUDA kernels are not part of this version"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
