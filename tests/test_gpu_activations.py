"""Activations in kernels for GPUs: the text of activation.cuh number by number, and on a GPU behind each method.

That the text assembles within each kernel is tested with the kernel.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from escort import reference
from escort.cuda.gpu import H200
from escort.filter import SparseFilter
from escort.methods import Method, by_name
from escort.methods import activation as compiled
from escort.methods.activation import INSTRUCTIONS
from escort.problem import TORCH_DTYPE, Activation, Epilogue, MemoryFormat, Precision, Problem
from tests import ptx_interpreter
from tests.cases import ACTIVATED, Case, check_kernels
from tests.test_activations import ACTIVATIONS, SLOPE, epilogue_of, slopes_of
from tests.test_sparse_tc_layout import uneven

LAST: MemoryFormat = "channels_last"
OURS = ("direct", "generated", "sparse_tc")
BEYOND_BOUNDS: tuple[Activation, ...] = tuple(name for name in ACTIVATIONS if name in INSTRUCTIONS)
#: Infinities, NaN and numbers so large that powers of them overflow.
EXTREME = [math.inf, -math.inf, math.nan, 3e38, -3e38, 1e30, -1e30, 100.0, -100.0, 88.5, -88.5]
#: Largest relative errors in float32, and absolute ones where few digits are left.
RTOL = {"gelu": 3e-6, "gelu_tanh": 6e-6}
ATOL = {"hardsigmoid": 1e-7, "hardswish": 3e-7}


def expected_of(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    """The activation of numbers (n,) in float64."""
    return reference.activate(x.double()[None, None], epilogue_of(activation), slopes_of(activation)).flatten()


def numbers() -> torch.Tensor:
    """Of all sizes; where gelu has digits in float64, and no other result is small beside what is rounded."""
    sizes = torch.logspace(-30, 1.1, 4001)
    return torch.cat([torch.linspace(-6.0, 12.0, 9001), sizes, -sizes[sizes < 6.0]])


def bounds_of_16_bits(activation: Activation, x: torch.Tensor) -> dict[str, float]:
    """What tanh.approx may be off by, and what is made of it."""
    if activation == "tanh":
        return {"rtol": 2.0**-10.9, "atol": 0.0}
    return {"rtol": 0.0, "atol": 2.0**-11.9 * float(x.abs().max())}


@pytest.mark.parametrize("activation", BEYOND_BOUNDS)
def test_each_number_is_as_in_float64(activation: Activation) -> None:
    x = numbers()
    y = torch.from_numpy(ptx_interpreter.run(activation, 0, x.numpy(), SLOPE)).double()
    close = {"rtol": RTOL.get(activation, 2e-6), "atol": ATOL.get(activation, 0.0)}
    torch.testing.assert_close(y, expected_of(activation, x), **close)


@pytest.mark.parametrize("activation", BEYOND_BOUNDS)
def test_in_16_bits_only_tanh_and_silu_are_less_exact(activation: Activation) -> None:
    x = numbers()
    y = torch.from_numpy(ptx_interpreter.run(activation, 1, x.numpy(), SLOPE)).double()
    if activation not in ("tanh", "silu"):
        assert torch.equal(y, torch.from_numpy(ptx_interpreter.run(activation, 0, x.numpy(), SLOPE)).double())
        return
    for least, most in ((0.0, 1e-3), (1e-3, 1.0), (1.0, 20.0)):  # errors are in proportion to the argument
        some = (x.abs() >= least) & (x.abs() < most)
        torch.testing.assert_close(y[some], expected_of(activation, x[some]), **bounds_of_16_bits(activation, x[some]))


@pytest.mark.parametrize("mean", [0.0, -1.0, -2.0])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_what_16_bits_approximate_is_within_the_bound_of_fp16(activation: Activation, mean: float) -> None:
    """Of sums that are distributed as a batch norm leaves them, however its bias moves them."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) + mean
    y = torch.from_numpy(ptx_interpreter.run(activation, 1, x.numpy()))
    assert reference.compare(y, expected_of(activation, x)) < 0.8 * reference.ERROR_BOUND["fp16"]


@pytest.mark.parametrize("storage", [0, 1])
@pytest.mark.parametrize("activation", BEYOND_BOUNDS)
def test_nan_infinities_and_huge_numbers_give_what_torch_makes_of_them(activation: Activation, storage: int) -> None:
    x = torch.tensor(EXTREME)
    y = torch.from_numpy(ptx_interpreter.run(activation, storage, x.numpy(), SLOPE)).double()
    expected = expected_of(activation, x)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    finite = expected.isfinite()
    scale = expected[finite].abs() + x.double()[finite].abs() * (2.0**-11.9 if storage else 1e-30)
    assert ((y[finite] - expected[finite]).abs() <= scale * (1.0 if storage else 2e-6)).all()


@pytest.mark.parametrize("storage", [0, 1])
@pytest.mark.parametrize("activation", INSTRUCTIONS)
def test_what_an_activation_costs_is_what_it_does(activation: str, storage: int) -> None:
    """Moves are none: the assembler renames registers."""
    names = [name for _, name, *_ in ptx_interpreter.instructions(activation, storage) if name != "mov.f32"]
    special = sum("approx" in name for name in names)
    assert INSTRUCTIONS[activation][storage == 0] == (len(names), special)


def test_bounds_are_parameters_and_others_are_compiled_in() -> None:
    named = {name: compiled.compiled_in(epilogue_of(name)) for name in ACTIVATIONS}
    assert {name for name in ACTIVATIONS if named[name] is None} == {"none", "relu", "relu6"}
    assert {named[name] for name in ACTIVATIONS} - {None} == set(INSTRUCTIONS)
    assert named["prelu"] == named["leaky_relu"] == "leaky_relu", "one kernel for both, whose slopes are a table"
    bounds = {name: compiled.bound(epilogue_of(name)) for name in ACTIVATIONS}
    assert [bounds[name] for name in ("none", "relu", "relu6")] == [0, 1, 2] and not bounds["silu"]


def test_slopes_are_those_of_the_output_channels() -> None:
    problem = Problem(1, 2, 4, 4, 3, (1, 1), epilogue=Epilogue(activation="leaky_relu", negative_slope=0.25))
    assert torch.equal(compiled.slopes(problem, None), torch.full((3,), 0.25))  # type: ignore[arg-type]
    problem = replace(problem, epilogue=Epilogue(activation="prelu"))
    slope = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float16)
    assert torch.equal(compiled.slopes(problem, slope), slope.float())  # type: ignore[arg-type]
    assert compiled.slopes(replace(problem, epilogue=Epilogue(activation="silu")), None) is None


@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
@pytest.mark.parametrize("name", OURS)
def test_an_activation_is_predicted_to_take_time(
    name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)
    if name == "sparse_tc" and precision == "fp32":
        pytest.skip("sparse tensor cores multiply no fp32")
    problem = Problem(128, 64, 56, 56, 256, (1, 1), precision=precision, device="cuda:0")
    sparse_filter = SparseFilter.from_dense(uneven(problem.weight_shape))
    method = by_name(name, "cuda:0")
    config = method.configs(problem, sparse_filter)[0]

    def us(activation: Activation) -> float:
        activated = replace(problem, epilogue=Epilogue(activation=activation))
        predicted = method.predict_us(activated, sparse_filter, H200, config)
        assert predicted is not None
        return predicted

    assert us("none") == us("relu") < us("hardswish") < us("gelu") < 3.0 * us("none")
    assert us("silu") < us("gelu")


# On a GPU


def configs_of(method: Method, problem: Problem, sparse_filter: SparseFilter) -> list[Any]:
    """The first two of a method that runs there; skips where it does not."""
    if (reason := method.unsupported(problem)) is not None:
        pytest.skip(f"{method.name} does not take it: {reason}")
    return list(method.configs(problem, sparse_filter))[:2]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ACTIVATED, ids=lambda case: case.name)
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("name", OURS)
def test_our_kernels_on_a_gpu(name: str, precision: Precision, case: Case) -> None:
    method, problem = by_name(name, "cuda:0"), case.on("cuda:0", precision)[0]
    configs = configs_of(method, problem, case.filter())
    check_kernels(method, case, "cuda:0", precision, configs, tensor_cores=name == "sparse_tc")


def in_channels_last(case: Case) -> Case:
    """A case with as many channels as tensor cores read and write at once there."""
    p = case.problem
    return replace(case, problem=replace(p, in_channels=-(-p.in_channels // 8) * 8, out_channels=24))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [in_channels_last(case) for case in ACTIVATED if case.problem.groups == 1], ids=lambda case: case.name
)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
def test_sparse_tensor_cores_in_channels_last_on_a_gpu(precision: Precision, case: Case) -> None:
    problem, x, weight, bias, residual = case.on("cuda:0", precision)
    problem, method = replace(problem, memory_format=LAST), by_name("sparse_tc", "cuda:0")
    config = configs_of(method, problem, case.filter())[0]
    assert method.input_format(config) == LAST
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    run = method.prepare(problem, case.filter(), bias, config, case.slope())
    y = run(x, residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config
    assert torch.equal(run(x, residual), y), "not the same twice: a race"


def alone(name: str, activation: Activation, precision: Precision, x: torch.Tensor) -> torch.Tensor:
    """What a kernel makes of numbers (n,), by a convolution that changes nothing."""
    image = torch.cat([x, x.new_zeros(-len(x) % 64)]).view(1, 1, -1, 64).expand(1, 8, -1, 64)
    image = image.to("cuda:0", TORCH_DTYPE[precision]).contiguous()
    epilogue = epilogue_of(activation)
    problem = Problem(*image.shape, 8, (1, 1), precision=precision, device="cuda:0", epilogue=epilogue)
    sparse_filter = SparseFilter.from_dense(torch.eye(8)[:, :, None, None])
    slope = torch.full((8,), SLOPE) if activation == "prelu" else None
    method = by_name(name, "cuda:0")
    config = configs_of(method, problem, sparse_filter)[0]
    y = method.prepare(problem, sparse_filter, None, config, slope)(image)
    assert torch.equal(y.nan_to_num(), y[:, :1].expand_as(y).nan_to_num()), "the channels have the same"
    return y[0, 0].flatten()[: len(x)].cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["direct", "generated"])
def test_each_number_in_float32_on_a_gpu(name: str, activation: Activation) -> None:
    x = numbers()
    y = alone(name, activation, "fp32", x)
    # A sum of products begins with +0, and sums of a split are rounded no further.
    close = {"rtol": RTOL.get(activation, 2e-6), "atol": ATOL.get(activation, 0.0)}
    torch.testing.assert_close(y.double(), expected_of(activation, x), **close)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", OURS)
def test_each_number_in_16_bits_on_a_gpu(name: str, precision: Precision, activation: Activation) -> None:
    """Within what rounding and tanh.approx may be off by."""
    x = torch.linspace(-8.0, 8.0, 4001).to(TORCH_DTYPE[precision])
    y, expected = alone(name, activation, precision, x).double(), expected_of(activation, x)
    unit = torch.finfo(TORCH_DTYPE[precision]).eps
    off = expected.abs() * unit + (x.double().abs() * 2.0**-11 if activation in ("tanh", "silu") else 3e-7)
    assert ((y - expected).abs() <= off).all()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("name", "precision"), [("direct", "fp32"), ("generated", "fp32"), ("direct", "bf16")])
def test_nan_and_infinity_on_a_gpu(name: str, precision: Precision, activation: Activation) -> None:
    x = torch.tensor(EXTREME).to(TORCH_DTYPE[precision])
    y, expected = alone(name, activation, precision, x), expected_of(activation, x).to(TORCH_DTYPE[precision])
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isposinf(), expected.isposinf())
