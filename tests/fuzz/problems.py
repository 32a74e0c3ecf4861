"""Random convolutions by every CPU method and by layers, against the float64 reference.

python -m tests.fuzz.problems --seconds 600
python -m tests.fuzz.problems --first 1234 --count 1     # the one that failed, as the failure says
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from random import Random
from typing import get_args

import torch
from torch import Tensor, nn

from escort import reference
from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.layers import SparseConv2d
from escort.methods import Method, for_device
from escort.methods.cpu.depthwise import LANES, MOST_ROWS, DepthwiseConfig
from escort.methods.cpu.direct import ISAS, DirectConfig
from escort.planner import Plan
from escort.planner.machine import Machine
from escort.problem import Activation, Epilogue, Problem
from tests.cases import benchmark_configs

_MOST_PRODUCTS = 4e6  # multiplications of a problem, zeros included: small ones find as much, and more of them run


@dataclass(frozen=True)
class Drawn:
    """A problem, its tensors, and the draws that follow."""

    problem: Problem
    weight: Tensor
    bias: Tensor | None
    slope: Tensor | None
    rng: Random

    @property
    def filter(self) -> SparseFilter:
        return SparseFilter.from_dense(self.weight, self.problem.groups)


def draw(seed: int) -> Drawn:
    """The problem of a seed, the same each time."""
    rng = Random(seed)
    torch.manual_seed(seed)
    while True:
        problem = _problem(rng)
        if problem is not None:
            break
    weight = torch.randn(problem.weight_shape) * _mask(rng, problem.weight_shape)
    bias = torch.randn(problem.out_channels) if problem.epilogue.bias else None
    slope = torch.randn(problem.out_channels) if problem.epilogue.activation == "prelu" else None
    return Drawn(problem, weight, bias, slope, rng)


def _problem(rng: Random) -> Problem | None:
    groups = rng.choice((1, 1, 1, 2, 3, 4))
    per_group = [rng.choice((1, 2, 3, rng.randint(1, 16), rng.randint(1, 80))) for _ in "CK"]
    if rng.random() < 0.2:  # depthwise
        groups, per_group = rng.randint(1, 40), [1, rng.choice((1, 1, 2, 3))]
    kernel, stride, dilation = ((rng.randint(1, n), rng.randint(1, n)) for n in (rng.choice((1, 3, 5, 7)), 4, 3))
    padding = tuple(rng.choice((0, 1, rng.randint(0, 7))) for _ in range(4))
    activation = rng.choice(("none", "relu", "relu6", *get_args(Activation)))
    slope = rng.choice((0.01, 0.2, -1.0)) if activation == "leaky_relu" else 0.0
    epilogue = Epilogue(rng.random() < 0.5, rng.random() < 0.5, activation, slope)
    sizes = rng.randint(0, 5), groups * per_group[0], rng.randint(1, 34), rng.randint(1, 34), groups * per_group[1]
    try:
        problem = Problem(
            *sizes,
            kernel,
            rng.choice(((1, 1), stride)),
            padding,  # type: ignore[arg-type]
            rng.choice(((1, 1), dilation)),
            groups,
            epilogue=epilogue,
        )
    except ValueError:  # smaller than the kernel
        return None
    products = torch.Size(problem.output_shape[2:]).numel() * torch.Size(problem.weight_shape).numel()
    return problem if products * max(problem.batch, 1) <= _MOST_PRODUCTS else None


def _mask(rng: Random, shape: tuple[int, ...]) -> Tensor:
    """Which weights are kept: in even, in uneven rows, with channels or taps that are empty, none or all."""
    density = rng.choice((0.0, 0.02, 0.1, 0.3, 0.6, 1.0))
    per_row = torch.rand(shape[0], 1, 1, 1) ** rng.choice((1, 4)) if rng.random() < 0.3 else torch.ones(1)
    mask = (torch.rand(shape) < density * per_row).float()
    for axis in range(4):
        if rng.random() < 0.2:
            kept = torch.rand(shape[axis]) < 0.5
            mask *= kept.float().reshape([-1 if i == axis else 1 for i in range(4)])
    return mask


#: The same numbers in other memory, or on other ways through a layer.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "of a larger tensor": lambda x: nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "unaligned": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].reshape(x.shape),
    "one sample many times": lambda x: x[:1].expand(x.shape),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "needs a gradient": lambda x: x.clone().requires_grad_(),  # by the operator
}


def expected(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None = None,
) -> Tensor:
    """The result in float64; the residual is of any shape that broadcasts."""
    y = reference.conv2d(replace(problem, epilogue=Epilogue(bias is not None)), x, weight, bias)
    y = y if residual is None else y + residual.double()
    return reference.activate(y, problem.epilogue, slope)


@dataclass(frozen=True)
class Truth:
    """What is computed, and its result in float64."""

    problem: Problem
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    slope: Tensor | None

    @cached_property
    def result(self) -> Tensor:
        return expected(self.problem, self.x, self.weight, self.bias, self.residual, self.slope)

    @cached_property
    def size(self) -> float:
        """The norm of the results, were all terms positive: of those that cancel out, rounding is what is left."""
        plain = replace(self.problem, epilogue=Epilogue())
        terms = (None if t is None else t.abs() for t in (self.x, self.weight, self.bias, self.residual))
        return float(torch.linalg.vector_norm(expected(plain, *terms)))  # type: ignore[arg-type]

    def check(self, y: Tensor, what: str) -> None:
        """Raises AssertionError unless `y` is right, with `what` made it."""
        assert y.shape == self.result.shape and y.dtype is torch.float32, f"{what}: {y.dtype} of {tuple(y.shape)}"
        error, bound = float(torch.linalg.vector_norm(y.double() - self.result)), reference.ERROR_BOUND["fp32"]
        is_right = error <= bound * float(torch.linalg.vector_norm(self.result)) or error <= bound * self.size
        assert is_right, f"{what}: an error of {error:.3g}, where terms are {self.size:.3g}"


def check_methods(drawn: Drawn) -> None:
    """Two configs of every method, and one of each of our kernels that nothing offers."""
    problem, rng = drawn.problem, drawn.rng
    x = torch.randn(problem.input_shape)
    residual = torch.randn(problem.output_shape) if problem.epilogue.residual else None
    truth = Truth(problem, x, drawn.weight, drawn.bias, residual, drawn.slope)
    forms = sorted(FORMS.keys() - {"negated", "needs a gradient", "one sample many times"})
    for method in _methods(problem):
        configs = benchmark_configs(method, problem, drawn.filter)
        chosen = rng.sample(configs, min(2, len(configs)))
        if method.config_type is DirectConfig:
            chosen.append(_any_config(rng, drawn.weight.shape[1]))
        if method.config_type is DepthwiseConfig:
            isa = rng.choice(sorted(LANES))
            chosen.append(DepthwiseConfig(isa, rng.randint(1, MOST_ROWS), rng.choice((1, 500, 4000, 100_000))))
        for config in chosen:
            form = rng.choice(forms)
            y = method.prepare(problem, drawn.filter, drawn.bias, config, drawn.slope)(FORMS[form](x), residual)
            truth.check(y, f"{method.name}, {config}, {form}")


def _methods(problem: Problem) -> list[Method]:
    return [method for method in for_device("cpu") if method.unsupported(problem) is None]


def _any_config(rng: Random, channels: int) -> DirectConfig:
    isa = rng.choice(sorted(ISAS))
    return DirectConfig(isa, rng.randint(1, ISAS[isa][1]), rng.randint(1, channels), rng.randint(1, 5))


def check_layer(drawn: Drawn) -> None:
    """One layer at several sizes and batches, in any memory, with any residual, and with a bias that changes."""
    problem, rng = drawn.problem, drawn.rng
    method: Method = rng.choice(_methods(problem))
    config = asdict(rng.choice(list(method.configs(problem, drawn.filter))))
    plan = Plan(problem, method.name, config, (), Machine.here())
    layer = SparseConv2d(drawn.filter, drawn.bias, plan, slope=drawn.slope)
    for number in range(5):
        size = [problem.height, problem.width] if number == 0 else [rng.randint(1, 24), rng.randint(1, 24)]
        x = torch.randn(rng.randint(0, 5), problem.in_channels, *size)
        try:
            now = replace(problem, batch=len(x), height=size[0], width=size[1])
        except ValueError as reason:
            _refused(layer, x, str(reason))
            continue
        form = rng.choice(sorted(FORMS))
        given = FORMS[form](x)
        residual = _residual(rng, now) if problem.epilogue.residual else None
        if layer.bias is not None and rng.random() < 0.4:
            layer.bias.add_(torch.randn_like(layer.bias))
        if layer.slope is not None and rng.random() < 0.4:
            layer.slope.add_(torch.randn_like(layer.slope))
        y = layer(given, residual)
        shape = None if residual is None else tuple(residual.shape)
        what = f"a layer by {method.name}, {config}, call {number} on {tuple(x.shape)} {form} with a residual {shape}"
        Truth(now, given.detach(), drawn.weight, layer.bias, residual, layer.slope).check(y, what)


def _refused(layer: SparseConv2d, x: Tensor, reason: str) -> None:
    residual = torch.zeros(1, layer.out_channels, 1, 1) if layer.residual else None
    try:
        layer(x, residual)
    except ValueError as error:
        assert "smaller than the kernel" in reason and "smaller than the kernel" in str(error), (error, reason)
    else:
        raise AssertionError(f"a layer takes {tuple(x.shape)}, and should say: {reason}")


def _residual(rng: Random, problem: Problem) -> Tensor:
    shape = list(problem.output_shape)
    if rng.random() < 0.4:
        shape = [1 if rng.random() < 0.5 else length for length in shape]
        if shape[0] == 1 and rng.random() < 0.3:
            shape = shape[1:]
        if problem.batch == 1 and len(shape) == 4 and rng.random() < 0.3:
            shape[0] = 3  # then there are more results than samples
    residual = torch.randn(shape)
    return residual.contiguous(memory_format=torch.channels_last) if residual.ndim == 4 else residual


def run(seed: int) -> None:
    """Everything about the problem of a seed. Raises AssertionError, which says how to run it again."""
    drawn = draw(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(drawn.rng.choice((1, 1, 2, 3)))
    try:
        with torch.no_grad():
            check_methods(drawn)
            check_layer(drawn)
    except Exception as error:
        again = f"python -m tests.fuzz.problems --first {seed} --count 1"
        raise AssertionError(f"{drawn.problem}: {type(error).__name__}: {error}\nrun it again: {again}") from error
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--count", type=int, default=None, help="how many problems, by default as many as time allows")
    parser.add_argument("--first", type=int, default=None, help="the first seed, by default another one each time")
    options = parser.parse_args()
    first = zlib.crc32(str(time.time_ns()).encode()) if options.first is None else options.first
    _cpu.assume_fork_join_ns(1)  # small problems on several threads, too
    end, seed = time.monotonic() + options.seconds, first
    while time.monotonic() < end and (options.count is None or seed < first + options.count):
        run(seed)
        seed += 1
    print(f"{seed - first} random problems, from seed {first}: all right")


if __name__ == "__main__":
    main()
