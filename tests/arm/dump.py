"""Writes the tables of cases as files for the driver: ``python -m tests.arm.dump FOLDER``.

Tables are laid out for another instruction set than this machine's. What stands in for the operations of the kernels
notes what the bindings would be handed.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_leaves

from escort import reference
from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods import Method, by_name, for_device
from escort.methods.cpu import depthwise, direct
from escort.problem import Activation, Problem
from tests.arm.file import Instruction, Place, Result, Run, array_of, write
from tests.cases import ACTIVATED, CASES, DEPTHWISE, Case
from tests.runtime.test_native import BY_TORCH, OPERATIONS, images, net_for, program_of
from tests.test_activations import ATOL, epilogue_of, slopes_of

CONVOLUTIONS = ("DirectConvolution", "DepthwiseConvolution", "LinearConvolution")


class Isa(NamedTuple):
    """An instruction set: floats per vector, and vectors per tile, as kernels/cpu/vector.hpp has them."""

    name: str
    lanes: int
    vectors: int


NEON = Isa("neon", 4, 28)

NORM = (reference.ERROR_BOUND["fp32"],)
EACH = (1e-5, 1e-5)  # of operations between convolutions, as in tests/runtime/test_native.py
GAP = 3  # floats between samples, which are NaN

#: The arguments of the operations, as _cpu.pyi names them. Each of the `tables` is an argument of its own in a file.
ARGUMENTS = {
    "DirectConvolution": "isa tables",
    "DepthwiseConvolution": "isa tables",
    "LinearConvolution": "in_channels out_channels activation tables",
    "MaxPool2d": "channels input_size output_size window",
    "Elementwise": "combine activation slope shape a_strides b_strides",
    "Copy": "shape strides",
    "Pad": "channels input_size borders value",
    "BatchNorm": "channels input_size epsilon",
    "AveragePool": "channels input_size rows columns",
    "Resize": "channels input_size rows columns",
    "Bicubic": "channels input_size rows columns",
    "Softmax": "outer size inner",
    "Linear": "in_features out_features",
}


def noting(kind: str, base: type) -> type:
    """An operation that notes its arguments, and is one of this machine's where the base is."""

    def __init__(self: Any, *arguments: Any) -> None:  # noqa: N807
        base.__init__(self, *(arguments if base is not Absent else ()))
        self.arguments = {}
        for name, value in zip(ARGUMENTS[kind].split(), arguments, strict=True):
            self.arguments |= value if name == "tables" else {name: array_of(value)}

    return type(kind, (base,), {"__init__": __init__})


class Absent:
    """A convolution for another machine, which is not called."""

    run = None


@contextmanager
def for_isa(isa: Isa) -> Iterator[None]:
    """Convolutions are laid out for an instruction set, and are none of this machine's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "ISAS", {isa.name: (isa.lanes, isa.vectors)})
        patch.setattr(depthwise, "LANES", {isa.name: isa.lanes})
        for kind in CONVOLUTIONS:
            patch.setattr(_cpu, kind, noting(kind, Absent))
        yield


@contextmanager
def noted_operations() -> Iterator[list[tuple[Any, list[NDArray[np.float32]]]]]:
    """Native programs of this machine, and their buffers before each run of one."""
    runs: list[tuple[Any, list[NDArray[np.float32]]]] = []
    real = _cpu.NativeProgram

    class NotedProgram(real):
        def __init__(self, instructions: Any, buffers: int, arena_size: int, samples: int, chunk: int) -> None:
            real.__init__(self, instructions, buffers, arena_size, samples, chunk)
            self.instructions, self.buffers, self.arena_size = instructions, buffers, arena_size
            self.batch = samples, chunk

        def run(self, addresses: Sequence[int], threads: int, take_chunks: bool) -> None:
            runs.append((self, [_memory(address, size) for address, size in zip(addresses, self.sizes(), strict=True)]))
            self.addresses = addresses
            real.run(self, addresses, threads, take_chunks)

        def sizes(self) -> list[int]:
            sizes = [1] * (self.buffers + 1)
            for op, samples, inputs, output in self.instructions:
                for place, size in zip((*inputs, output), (*op.input_sizes, op.output_size), strict=True):
                    number, offset, stride = place
                    if number >= 0:
                        sizes[number] = max(sizes[number], offset + (samples - 1) * stride + size)
            return sizes[:-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "NativeProgram", NotedProgram)
        for kind in ARGUMENTS.keys() - CONVOLUTIONS:
            patch.setattr(_cpu, kind, noting(kind, getattr(_cpu, kind)))
        yield runs


def _memory(address: int, size: int) -> NDArray[np.float32]:
    """A copy of so many floats."""
    return np.frombuffer(ctypes.string_at(address, 4 * size), np.float32)


def _instruction(op: Any, samples: int, places: Sequence[Place]) -> Instruction:
    return Instruction(type(op).__name__, op.arguments, samples, [(*place,) for place in places])


def _spread(x: torch.Tensor, gap: int) -> tuple[NDArray[np.float32], int]:
    """Samples with a gap between them, and the distance from one to the next."""
    rows = x.flatten(1).float().numpy()
    return np.pad(rows, ((0, 0), (0, gap)), constant_values=np.nan).ravel(), rows.shape[1] + gap


def layer_run(
    name: str, op: Any, bound: tuple[float, ...], inputs: Sequence[torch.Tensor | None], y: torch.Tensor, gap: int = 0
) -> Run:
    """One call of one operation, which is to give y."""
    buffers, places = [], []
    for x in inputs:
        if x is None:
            places.append((-1, 0, 0))
        else:
            buffer, stride = _spread(x, gap)
            places.append((len(buffers), 0, stride))
            buffers.append(buffer)
    empty, stride = _spread(torch.full_like(y, torch.nan), gap)
    output = (len(buffers), 0, stride)
    result = Result(output, y.double().flatten(1).numpy())
    return Run(name, bound, [*buffers, empty], [_instruction(op, len(y), [*places, output])], [result])


def case_runs(case: Case, method: Method) -> Iterator[Run]:
    """A case by each config of a method, and once with a wrong weight."""
    x, weight, bias, residual = case.tensors()
    problem = case.problem

    def expected(weight: torch.Tensor) -> torch.Tensor:
        return reference.conv2d(problem, x, weight, bias, residual, case.slope())

    def run(name: str, weight: torch.Tensor, config: Any, gap: int) -> Run:
        sparse_filter = SparseFilter.from_dense(weight, problem.groups)
        op = method.prepare(problem, sparse_filter, bias, config, case.slope()).op
        return layer_run(name, op, NORM, (x, residual), y, gap)

    y, configs = expected(weight), method.configs(problem, case.filter())
    for number, config in enumerate(configs):
        yield run(f"{case.name}, {method.name}, {config}", weight, config, GAP * (number % 2))
    wrong = next(other for other in _wrong(weight) if reference.compare(expected(other), y) > 100 * NORM[0])
    yield replace(run(f"{case.name}, {method.name}, a wrong weight", wrong, configs[0], 0), is_right=False)


def _wrong(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weight with one of its numbers changed: each in turn, those that are kept first."""
    for index in torch.argsort(weight.flatten() == 0, stable=True).tolist():
        other = weight.clone()
        other.view(-1)[index] += 1.0
        yield other


def activation_runs(activation: Activation) -> Iterator[Run]:
    """Each number as in float64, in planes and in rows, as tests/test_activations.py has it."""
    inf, sizes = float("inf"), torch.logspace(-30, 1.1, 4001)
    plain = torch.cat([torch.linspace(-12.0, 12.0, 9001), sizes, -sizes])
    special = torch.tensor([inf, -inf, float("nan"), 3e38, -3e38, 1e30, -1e30, 100.0, -100.0, 88.5, -88.5] * 3)
    bounds = (2e-6, ATOL.get(activation, 0.0)), (1e-6, 1e-36)
    for what, x, bound in zip(("", "special "), (plain, special), bounds, strict=True):
        plane = torch.cat([x, x.new_zeros(-len(x) % 23)]).view(1, 1, -1, 23)
        y = reference.activate(plane.double(), epilogue_of(activation), slopes_of(activation))
        for size in (1, 3):
            margin = size // 2
            problem = Problem(*plane.shape, 1, (size, size), padding=(margin,) * 4, epilogue=epilogue_of(activation))
            weight = torch.zeros(problem.weight_shape)
            weight[0, 0, margin, margin] = 1.0
            method, sparse_filter = by_name("direct"), SparseFilter.from_dense(weight)
            config = method.configs(problem, sparse_filter)[0]
            op = method.prepare(problem, sparse_filter, None, config, slopes_of(activation)).op
            run = layer_run(f"{activation} of {what}numbers, {size}x{size}", op, bound, (plane, None), y)
            yield run
            yield _with_wrong_input(run)


#: kernel_size, stride, padding, dilation and ceil_mode of max pooling, and the size of the planes.
POOLS = (
    (3, 2, 1, 1, False, (14, 15)),
    (2, 2, 0, 1, False, (16, 16)),
    (3, 2, 0, 1, True, (13, 22)),
    (3, 1, 1, 1, False, (9, 40)),
    (5, 1, 2, 1, False, (20, 7)),
    ((2, 3), (3, 1), (1, 0), 1, False, (17, 11)),
    (3, 3, 1, 2, False, (25, 31)),
    (3, (2, 4), 1, (2, 3), True, (12, 19)),
    (1, 2, 0, 1, False, (5, 33)),
    (2, 2, 1, 1, False, (1, 1)),
    (5, 2, 2, 4, False, (15, 15)),
)


def pool_runs() -> Iterator[Run]:
    for number, (kernel_size, stride, padding, dilation, ceil_mode, size) in enumerate(POOLS):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(number))
        x.view(-1)[x.numel() // 2] = torch.nan if number % 2 else -torch.inf
        layer = torch.nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
        yield from program_runs(f"{layer} of {size}", torch.nn.Sequential(layer), x, (0.0, 0.0))


def native_runs() -> Iterator[Run]:
    """The operations between convolutions, in programs of several instructions."""
    for name in OPERATIONS.keys() - BY_TORCH:
        for x in (images(1), images(3)):
            yield from program_runs(f"{name}, {len(x)} samples", net_for(name, x), x, EACH)


def program_runs(name: str, model: torch.nn.Module, x: torch.Tensor, bound: tuple[float, ...]) -> Iterator[Run]:
    """What a model becomes natively, all in one segment."""
    with torch.no_grad(), noted_operations() as runs:
        outputs = program_of(model)(x)
        references = model.double()(x.double())
    ((program, buffers),) = runs
    results = list(_results(program, tree_leaves(outputs), tree_leaves(references)))
    for result in results:
        buffers[result.place[0]] = np.full_like(buffers[result.place[0]], np.nan)
    instructions = [
        _instruction(op, samples, [*inputs, output]) for op, samples, inputs, output in program.instructions
    ]
    run = Run(name, bound, buffers, instructions, results, program.arena_size, program.batch)
    yield run
    yield _with_wrong_input(run)


def _results(program: Any, leaves: Sequence[Any], references: Sequence[Any]) -> Iterator[Result]:
    """What a program made of each of the model's results that it wrote."""
    for leaf, wanted in zip(leaves, references, strict=True):
        if not isinstance(leaf, torch.Tensor):
            continue
        address = leaf.untyped_storage().data_ptr()
        if address in program.addresses and leaf[0].is_contiguous():
            place = program.addresses.index(address), leaf.storage_offset(), leaf.stride(0)
            yield Result(place, wanted.double().reshape(len(wanted), -1).numpy())


def _with_wrong_input(run: Run) -> Run:
    """The run with other numbers in its first buffer."""
    buffers = [0.75 - 0.5 * run.buffers[0], *run.buffers[1:]]
    return replace(run, name=f"{run.name}, a wrong input", buffers=buffers, is_right=False)


def convolution_runs(cases: Sequence[Case] = (*CASES, *DEPTHWISE, *ACTIVATED)) -> Iterator[Run]:
    for case in cases:
        for method in (method for method in for_device("cpu") if method.is_native):
            # Of no samples nothing is computed.
            if case.problem.batch and method.unsupported(case.problem) is None:
                yield from case_runs(case, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Callable[[], Iterator[Run]]] = {
        "convolutions": convolution_runs,
        "activations": lambda: (run for name in get_args(Activation) for run in activation_runs(name)),
        "pools": pool_runs,
        "native": native_runs,
    }
    with for_isa(NEON):
        for name, runs in tables.items():
            print(f"{name}: {write(folder / f'{name}.runs', runs())} runs")


if __name__ == "__main__":
    main()
