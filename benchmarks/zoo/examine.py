"""One network of the zoo: converted, compared with float64, saved, and loaded in another process.

``python -m benchmarks.zoo.examine NAME`` prints a row as JSON; with ``--load FOLDER`` it is that other process.
"""

from __future__ import annotations

import copy
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import escort
from benchmarks.suite.rows import commit
from benchmarks.zoo.build import build, inputs
from benchmarks.zoo.catalogue import ENTRIES, Entry
from benchmarks.zoo.forced import sparse_forced
from benchmarks.zoo.rows import ZooRow
from escort.layers import SparseConv2d
from escort.network.model import ConvertedModel
from escort.network.values import output_error, tensors_of
from escort.runtime import Program

#: Bytes that a process may ask for: a network that needs more fails alone.
MEMORY = 10 << 30
#: Relative error of what another process computes with the same filters: the order of sums may differ.
_SAME = 1e-5
_LOAD_S = 120.0


def examine(entry: Entry) -> ZooRow:
    """All of it, in this process and one more."""
    begin = time.perf_counter()
    model = build(entry)
    convolutions = sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    about: dict[str, Any] = {
        "network": entry.name,
        "input": [list(x.shape) for x in inputs(entry, entry.shapes[0])],
        "convolutions": convolutions,
        "commit": commit(),
    }
    with sparse_forced():
        fast = escort.convert(model, inputs(entry, entry.shapes[0]), methods=["direct"])
    if fast.plan.kept_dense:
        about["failed"] = fast.plan.reason or "the original is kept"
    sparse = [module for module in fast.modules() if isinstance(module, SparseConv2d)]
    about |= {
        "swapped": len(sparse),
        "fused": sum(layer.unfolded is not None or layer.activation != "none" or layer.residual for layer in sparse),
        "left": dict(Counter(map(_shortened, fast.plan.skipped.values()))),
        "traced": _traced(fast),
        "why_not_whole": "" if fast.traced else _shortened(fast.plan.not_tried.get("graph", "")),
        "errors": _errors(entry, model, fast),
        "saved": _shortened(_saved(entry, fast)),
    }
    return ZooRow(**about, seconds=round(time.perf_counter() - begin, 1))


def _shortened(reason: str) -> str:
    """A reason without the place in a library's code, and without the folders of files."""
    return re.sub(r"/\S*/", "", re.sub(r" *\(at /.*\)", "", reason))


def _traced(fast: ConvertedModel) -> str:
    """Into how many graphs the network went, and whether one around everything calls modules that have none."""
    if isinstance(fast.network, Program):
        called = {step.target for step in fast.network.listing.steps if step.kind == "layer"}
        others = [name for name in called if not _is_layer(fast.network.get_submodule(name))]
        return f"around {len(others)}" if others else "whole"
    programs = sum(isinstance(module, Program) for module in fast.modules())
    return f"in {programs} parts" if programs else "not"


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("torch", "escort")


def _errors(entry: Entry, model: nn.Module, fast: ConvertedModel) -> dict[str, list[float] | str]:
    exact = copy.deepcopy(model).double()
    errors: dict[str, list[float] | str] = {}
    for shape in entry.shapes:
        args = inputs(entry, shape)
        with torch.no_grad():
            own = tensors_of(model(*args))
            try:
                with _default(torch.float64):
                    expected, compared = tensors_of(exact(*(x.double() for x in args))), [own]
            except RuntimeError:  # it says .float() somewhere
                expected, compared = own, []
            try:
                found: list[float] | str = [_error(x, expected) for x in (tensors_of(fast(*args)), *compared)]
            except Exception as error:  # whatever it is, it is the finding
                found = f"{type(error).__name__}: {error}"
        errors["x".join(map(str, shape))] = found
    return errors


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """The type of the tensors that a forward makes of nothing, such as grids of positions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error; of indices, which ties decide, there is none."""
    if len(outputs) != len(expected):
        raise ValueError(f"it returns {len(outputs)} tensors instead of {len(expected)}")
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=True) if b.is_floating_point() and b.numel()]
    return float(f"{max(output_error(a, b) for a, b in pairs):.2e}")


def _saved(entry: Entry, fast: ConvertedModel) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            escort.save(fast, Path(folder) / "model.escort")
        except (TypeError, ValueError) as error:
            return f"not saved: {error}"
        args = inputs(entry, entry.shapes[1])
        with torch.no_grad():
            torch.save([x.contiguous() for x in tensors_of(fast(*args))], Path(folder) / "expected.pt")
        command = [sys.executable, "-m", __spec__.name, entry.name, "--load", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LOAD_S)
        except subprocess.TimeoutExpired:
            return f"loading took more than {_LOAD_S:.0f} s"
    return (
        "loaded" if done.returncode == 0 else f"not loaded: {(done.stderr.strip().splitlines() or ['it crashed'])[-1]}"
    )


def load(entry: Entry, folder: Path) -> None:
    """Loads what another process saved. Raises whatever keeps it from computing what that process expects."""
    try:
        fast = escort.load(folder / "model.escort", remeasure=False)
    except ValueError as error:
        if "model" not in str(error):
            raise
        fast = escort.load(folder / "model.escort", build(entry), remeasure=False)
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        outputs = tensors_of(fast(*inputs(entry, entry.shapes[1])))
    if (off := _error(outputs, expected)) > _SAME:
        raise ValueError(f"it computes something else there: {off:.1e}")


def main(name: str, *options: str) -> None:
    """Of a process that does nothing else."""
    warnings.simplefilter("ignore")  # of the libraries; what matters is in the row
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    entry = next(entry for entry in ENTRIES if entry.name == name)
    if options:
        return load(entry, Path(options[1]))
    try:
        row = examine(entry)
    except Exception as error:  # whatever it is, it is the finding
        row = ZooRow(name, failed=_shortened(f"{type(error).__name__}: {error}"), commit=commit() or "")
    print(json.dumps(asdict(row)))
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
