"""The one table of convolutions that every method must compute: small odd shapes first, then those of real networks.

test_cases.py runs it through torch's methods on every device and through our CPU kernel. The tests of a GPU kernel take
it by :data:`every_case`, through what interprets the kernel on a CPU and, by :func:`check_kernels`, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch

from escort import reference
from escort.filter import SparseFilter
from escort.methods import Method
from escort.methods.lowering import is_linear
from escort.problem import TORCH_MEMORY_FORMAT, Activation, Epilogue, Precision, Problem

FULL = Epilogue(bias=True, residual=True, activation="relu")


@dataclass(frozen=True)
class Case:
    """A problem, and its weights: the share that is kept, or a function from the weight's shape to the mask."""

    name: str
    problem: Problem
    density: float | Callable[[tuple[int, ...]], torch.Tensor] = 0.2

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x, weight, bias and residual, the same at every call."""
        generator = torch.Generator().manual_seed(len(self.name))
        p = self.problem
        weight = torch.randn(p.weight_shape, generator=generator)
        if callable(self.density):
            weight *= self.density(p.weight_shape)
        else:
            weight *= torch.rand(p.weight_shape, generator=generator) < self.density
        x = torch.randn(p.input_shape, generator=generator)
        bias = torch.randn(p.out_channels, generator=generator) if p.epilogue.bias else None
        residual = torch.randn(p.output_shape, generator=generator) if p.epilogue.residual else None
        return x, weight, bias, residual

    def filter(self) -> SparseFilter:
        return SparseFilter.from_dense(self.tensors()[1], self.problem.groups)

    def slope(self) -> torch.Tensor | None:
        """The slopes of "prelu", None for other activations."""
        p = self.problem
        return torch.linspace(-0.5, 1.5, p.out_channels) if p.epilogue.activation == "prelu" else None

    def on(self, device: str, precision: Precision = "fp32") -> tuple[Problem, Any, Any, Any, Any]:
        """The problem on a device, x, weight, bias and residual; weight and bias stay in float32 on the host."""
        problem = replace(self.problem, precision=precision, device=device)
        x, weight, bias, residual = self.tensors()
        x = x.to(device, problem.storage)
        residual = None if residual is None else residual.to(device, problem.storage)
        return problem, x, weight, bias, residual


def check(method: Method, case: Case, device: str, precision: Precision) -> None:
    """Each config of a method computes a case, in whichever memory format x comes."""
    problem, x, weight, bias, residual = case.on(device, precision)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    configs = benchmark_configs(method, problem, case.filter())
    assert configs
    for config in configs:
        run = method.prepare(problem, case.filter(), bias, config, case.slope())
        for memory_format in TORCH_MEMORY_FORMAT.values():
            y = run(x.contiguous(memory_format=memory_format), residual)
            assert (y.dtype, y.device) == (problem.storage, x.device)
            assert y.is_contiguous() or method.input_format(config) == "channels_last", config
            assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config


def check_kernels(
    method: Method, case: Case, device: str, precision: Precision, configs: Iterable[Any], *, tensor_cores: bool = False
) -> None:
    """Each config of our own kernels computes a case, and the same when it runs again.

    Args:
        tensor_cores: whether the kernels use them; without them TF32 is as exact as fp32.
    """
    problem, x, weight, bias, residual = case.on(device, precision)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    bound = reference.ERROR_BOUND["fp32" if precision == "tf32" and not tensor_cores else precision]
    for config in configs:
        run = method.prepare(problem, case.filter(), bias, config, case.slope())
        y = run(x, residual)
        assert y.is_contiguous() and y.dtype is problem.storage
        assert reference.compare(y, expected) <= bound, config
        assert torch.equal(run(x, residual), y), "not the same twice: a race"


def takes(method: Method, problem: Problem) -> bool:
    """Whether a method of the problem's device is to compute it."""
    if method.name == "depthwise":
        return problem.groups == problem.in_channels
    if method.name == "linear":
        return is_linear(problem)
    return (method.name, problem.precision) != ("cusparse", "tf32")


def benchmark_configs(method: Method, problem: Problem, sparse_filter: SparseFilter) -> list[Any]:
    """A method's search space, and the configs that only benchmarks time."""
    return [*method.configs(problem, sparse_filter), *method.benchmark_configs(problem, sparse_filter)]


def as_taken(method: Method, config: Any, x: torch.Tensor) -> torch.Tensor:
    """x in the memory format in which a config takes it without conversion."""
    return x.contiguous(memory_format=TORCH_MEMORY_FORMAT[method.input_format(config)])


def _empty_out_channels(shape: tuple[int, ...]) -> torch.Tensor:
    mask = (torch.arange(shape[0] * shape[1] * shape[2] * shape[3]).reshape(shape) % 7 == 0).float()
    mask[::3] = 0
    return mask


def _uneven_out_channels(shape: tuple[int, ...]) -> torch.Tensor:
    """One output channel is full, the others hold about a thirtieth, as unevenly as magnitude pruning leaves them."""
    mask = (torch.arange(shape[0] * shape[1] * shape[2] * shape[3]).reshape(shape) % 31 == 0).float()
    mask[0] = 1
    return mask


def _empty_channels(shape: tuple[int, ...]) -> torch.Tensor:
    mask = torch.ones(shape)
    mask[:, : shape[1] // 2] = 0
    return mask


CASES = (
    Case("pointwise on one pixel", Problem(1, 3, 1, 1, 5, (1, 1))),
    Case("3x3 on one pixel", Problem(2, 4, 1, 1, 3, (3, 3), padding=(1, 1, 1, 1)), 1.0),
    Case("two pixels", Problem(3, 2, 1, 2, 2, (1, 2))),
    Case("one channel", Problem(1, 1, 9, 9, 1, (3, 3), padding=(1, 1, 1, 1)), 1.0),
    Case("plain 3x3", Problem(1, 8, 14, 14, 16, (3, 3), padding=(1, 1, 1, 1))),
    Case("3x3 with everything behind it", Problem(2, 8, 13, 13, 16, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL)),
    Case("relu6", Problem(1, 8, 7, 7, 9, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, False, "relu6"))),
    Case("valid 5x5", Problem(2, 5, 12, 11, 7, (5, 5))),
    Case("exactly the kernel", Problem(1, 6, 5, 5, 4, (5, 5))),
    Case("wide kernel", Problem(1, 3, 6, 30, 4, (1, 7), padding=(0, 0, 3, 3))),
    Case("tall kernel", Problem(1, 3, 30, 6, 4, (7, 1), padding=(3, 3, 0, 0))),
    Case("even kernel, 'same'", Problem(1, 4, 10, 9, 4, (4, 2), padding=(1, 2, 0, 1))),
    Case("padding beyond the kernel", Problem(1, 3, 4, 5, 4, (3, 3), padding=(5, 4, 6, 7))),
    Case("stride 2", Problem(2, 6, 15, 16, 8, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=FULL)),
    Case("stride 2, zeros at the end", Problem(2, 6, 16, 14, 9, (3, 3), (2, 2), (0, 1, 0, 1), epilogue=FULL)),
    Case("stride 2, all sides differ", Problem(1, 16, 13, 16, 8, (5, 3), (2, 2), (3, 2, 0, 1), epilogue=FULL)),
    Case("stride 3 by 1", Problem(1, 4, 20, 11, 5, (3, 3), (3, 1), (1, 1, 1, 1))),
    Case("stride 1 by 3", Problem(1, 4, 11, 20, 5, (3, 3), (1, 3), (1, 1, 1, 1))),
    Case("stride beyond the kernel", Problem(1, 4, 17, 17, 5, (2, 2), (5, 4))),
    Case("pointwise stride 2", Problem(2, 16, 14, 14, 8, (1, 1), (2, 2))),
    Case("pointwise with padding", Problem(1, 5, 6, 6, 3, (1, 1), padding=(1, 1, 1, 1))),
    Case("dilation", Problem(1, 4, 17, 15, 6, (3, 3), padding=(2, 2, 3, 3), dilation=(2, 3))),
    Case("dilation and stride", Problem(1, 4, 19, 22, 6, (3, 3), (2, 3), (2, 2, 3, 3), (3, 2))),
    Case("groups", Problem(2, 6, 9, 9, 9, (3, 3), padding=(1, 1, 1, 1), groups=3, epilogue=FULL)),
    Case("depthwise", Problem(2, 16, 12, 12, 16, (3, 3), padding=(1, 1, 1, 1), groups=16), 0.5),
    Case("one pixel", Problem(2, 35, 1, 1, 5, (1, 1)), 0.5),
    Case("one pixel, many outputs", Problem(5, 7, 1, 1, 200, (1, 1), epilogue=FULL), 0.5),
    Case("depthwise stride 2, twofold", Problem(1, 6, 13, 13, 12, (3, 3), (2, 2), (1, 1, 1, 1), groups=6), 0.5),
    Case("depthwise stride 2, zeros at the end", Problem(2, 8, 12, 14, 8, (5, 5), (2, 2), (1, 2, 1, 2), groups=8), 1.0),
    Case("no weights at all", Problem(2, 4, 8, 8, 6, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL), 0.0),
    Case("every weight", Problem(1, 12, 10, 10, 11, (3, 3), padding=(1, 1, 1, 1)), 1.0),
    Case("empty rows", Problem(1, 10, 8, 8, 12, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL), _empty_out_channels),
    Case("uneven rows", Problem(1, 40, 9, 9, 30, (3, 3), padding=(1, 1, 1, 1)), _uneven_out_channels),
    Case("empty channels", Problem(1, 64, 9, 9, 8, (1, 1)), _empty_channels),
    Case("no samples", Problem(0, 4, 8, 8, 6, (3, 3), padding=(1, 1, 1, 1))),
    Case("seven samples", Problem(7, 6, 7, 7, 10, (3, 3), padding=(1, 1, 1, 1))),
    Case("plane of a page", Problem(1, 9, 32, 32, 4, (1, 1), epilogue=FULL)),
    Case("stage of a page", Problem(1, 9, 31, 31, 4, (2, 2), padding=(0, 1, 0, 1))),
    Case("many channels", Problem(1, 600, 4, 4, 20, (1, 1), epilogue=FULL), 0.1),
    Case("many outputs on one tile", Problem(1, 64, 7, 7, 200, (3, 3), padding=(1, 1, 1, 1)), 0.1),
    Case("ResNet-50 stem", Problem(1, 3, 56, 56, 64, (7, 7), (2, 2), (3, 3, 3, 3), epilogue=Epilogue(bias=True)), 1.0),
    Case("ResNet-50 res4", Problem(2, 256, 14, 14, 64, (3, 3), padding=(1, 1, 1, 1)), 0.05),
    Case("linear layer", Problem(3, 40, 1, 1, 24, (1, 1), epilogue=FULL), 0.2),
    Case("ResNet-50 res2 1x1", Problem(1, 64, 56, 56, 32, (1, 1), epilogue=FULL), 0.1),
    Case("CaffeNet conv2", Problem(1, 96, 27, 27, 32, (5, 5), padding=(2, 2, 2, 2), groups=2), 0.15),
)

#: Depthwise convolutions: rows shorter and longer than vectors of each size, more bands than one, any taps.
DEPTHWISE = tuple(
    Case(f"depthwise {name}", replace(problem, groups=problem.in_channels), 0.9)
    for name, problem in {
        "3x3 on one pixel": Problem(2, 5, 1, 1, 5, (3, 3), padding=(1, 1, 1, 1)),
        "3x3 on 7x7, odd channels": Problem(3, 9, 7, 7, 9, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL),
        "5x5 on 7x7": Problem(1, 6, 7, 7, 6, (5, 5), padding=(2, 2, 2, 2), epilogue=Epilogue(True, False, "relu6")),
        "5x5 to 8x8, threefold": Problem(2, 3, 15, 16, 9, (5, 5), (2, 2), (2, 1, 2, 1), epilogue=FULL),
        "3x3 on 14x14": Problem(1, 4, 14, 14, 4, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True)),
        "3x3, stride 2, padded right and below": Problem(2, 3, 28, 28, 3, (3, 3), (2, 2), (0, 1, 0, 1)),
        "5x5, stride 2, padded as TensorFlow does": Problem(1, 3, 56, 57, 3, (5, 5), (2, 2), (1, 2, 1, 2)),
        "3x3 of several bands": Problem(1, 2, 130, 75, 4, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL),
        "5x5 of several bands, stride 2": Problem(2, 2, 190, 61, 2, (5, 5), (2, 2), (2, 2, 2, 2)),
        "narrow and tall": Problem(1, 3, 900, 3, 3, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL),
        "padding beyond the kernel": Problem(1, 3, 4, 5, 3, (3, 3), padding=(9, 4, 6, 19)),
        "7x7": Problem(1, 4, 20, 33, 4, (7, 7), padding=(3, 3, 3, 3), epilogue=FULL),
        "dilation": Problem(1, 3, 19, 22, 6, (3, 3), padding=(2, 2, 3, 3), dilation=(2, 3)),
        "dilated columns": Problem(1, 3, 19, 22, 3, (3, 3), padding=(1, 1, 2, 2), dilation=(1, 2)),
        "wide, stride 3 by 4": Problem(2, 3, 17, 41, 3, (2, 5), (3, 4), (0, 1, 2, 0)),
        "of one channel": Problem(2, 1, 9, 9, 3, (3, 3), padding=(1, 1, 1, 1)),
        "no samples": Problem(0, 4, 8, 8, 4, (3, 3), padding=(1, 1, 1, 1)),
    }.items()
)


def _activated(activation: Activation) -> Iterator[Case]:
    """An activation behind each way that kernels write their results: with a residual or without, in rows or planes."""
    slope = 0.2 if activation == "leaky_relu" else 0.0
    for residual in (False, True):
        epilogue = Epilogue(True, residual, activation, slope)
        what = f"{activation}{' and residual' if residual else ''}"
        yield Case(f"{what}, in rows", Problem(2, 9, 13, 13, 11, (3, 3), padding=(1, 1, 1, 1), epilogue=epilogue))
        yield Case(f"{what}, in planes", Problem(3, 40, 7, 7, 11, (1, 1), epilogue=epilogue), 0.3)
        depthwise = Problem(2, 5, 11, 7, 5, (3, 3), padding=(1, 1, 1, 1), groups=5, epilogue=epilogue)
        yield Case(f"{what}, depthwise", depthwise, 0.9)
        yield Case(f"{what}, of one pixel", Problem(3, 20, 1, 1, 83, (1, 1), epilogue=epilogue), 0.5)


#: Every activation, behind convolutions of four shapes. What kernels do not compute, torch does behind them.
ACTIVATED = tuple(case for activation in get_args(Activation) for case in _activated(activation))

#: Runs a test over the whole table.
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
