"""Activations in the epilogue: number by number as torch computes them, and in layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import get_args

import pytest
import torch

from escort import reference
from escort.filter import SparseFilter
from escort.layers import SparseConv2d
from escort.methods import by_name
from escort.methods.cpu.direct import ISAS, DirectConfig
from escort.planner import Plan, plan_layer
from escort.planner.machine import Machine
from escort.problem import Activation, Epilogue, Problem

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SLOPE = 0.3
#: Absolute errors: beside -3 few digits are all that x + 3 has, and float64 itself loses the tail of gelu.
ATOL = {"hardsigmoid": 1e-6, "hardswish": 1e-6, "gelu": 1e-14, "gelu_tanh": 1e-14}


def epilogue_of(activation: Activation) -> Epilogue:
    return Epilogue(activation=activation, negative_slope=SLOPE if activation == "leaky_relu" else 0.0)


def slopes_of(activation: Activation) -> torch.Tensor | None:
    return torch.tensor([SLOPE]) if activation == "prelu" else None


def alone(activation: Activation, isa: str, kernel_size: int, x: torch.Tensor) -> torch.Tensor:
    """What our kernel makes of numbers (n,), by a convolution that changes nothing."""
    image = torch.cat([x, x.new_zeros(-len(x) % 23)]).view(1, 1, -1, 23)
    margin = kernel_size // 2
    problem = Problem(*image.shape, 1, (kernel_size,) * 2, padding=(margin,) * 4, epilogue=epilogue_of(activation))
    weight = torch.zeros(problem.weight_shape)
    weight[0, 0, margin, margin] = 1.0
    config = DirectConfig(isa, ISAS[isa][1], 1)
    run = by_name("direct").prepare(problem, SparseFilter.from_dense(weight), None, config, slopes_of(activation))
    return run(image).flatten()[: len(x)]


@pytest.mark.parametrize("kernel_size", [1, 3], ids=["in planes", "in rows"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_number_is_as_in_float64(activation: Activation, isa: str, kernel_size: int) -> None:
    sizes = torch.logspace(-30, 1.1, 4001)
    x = torch.cat([torch.linspace(-12.0, 12.0, 9001), sizes, -sizes])
    expected = reference.activate(x.double()[None, None], epilogue_of(activation), slopes_of(activation)).flatten()
    y = alone(activation, isa, kernel_size, x)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=ATOL.get(activation, 0.0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_infinities_and_huge_numbers_give_what_torch_makes_of_them(activation: Activation, isa: str) -> None:
    inf = float("inf")
    x = torch.tensor([inf, -inf, float("nan"), 3e38, -3e38, 1e30, -1e30, 100.0, -100.0, 88.5, -88.5] * 3)
    expected = reference.activate(x.double()[None, None], epilogue_of(activation), slopes_of(activation)).flatten()
    for kernel_size in (1, 3):
        y = alone(activation, isa, kernel_size, x)
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-36, equal_nan=True)


def a_layer(activation: Activation, method: str = "direct", *, residual: bool = True) -> SparseConv2d:
    torch.manual_seed(0)
    problem = Problem(
        2, 6, 9, 10, 8, (3, 3), padding=(1, 1, 1, 1), epilogue=replace(epilogue_of(activation), residual=residual)
    )
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.3)
    sparse_filter = SparseFilter.from_dense(weight)
    config = asdict(by_name(method).configs(problem, sparse_filter)[0])
    slope = torch.rand(8) if activation == "prelu" else None
    return SparseConv2d(sparse_filter, None, Plan(problem, method, config, (), Machine.here()), "some", slope=slope)


def expected_of(layer: SparseConv2d, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    alone = replace(layer.problem(*x.shape[::1][:1], *x.shape[2:]), epilogue=Epilogue())
    y = reference.conv2d(alone, x, layer.filter.to_dense())
    y = y if residual is None else y + residual
    return reference.activate(y, layer.plan.problem.epilogue, layer.slope)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_by_every_way_through_it(activation: Activation) -> None:
    layer = a_layer(activation)
    x = torch.randn(2, 6, 9, 10)
    ways: dict[str, Callable[..., torch.Tensor]] = {"eager": layer, "copied": copy.deepcopy(layer)}
    ways["compiled"] = torch.compile(layer, backend="aot_eager")
    for way, call in ways.items():
        for shape in ((2, 8, 9, 10), (8, 1, 1)):  # the second one is added behind the kernel
            residual = torch.randn(shape)
            with torch.inference_mode():
                assert reference.compare(call(x, residual), expected_of(layer, x, residual)) < 1e-6, (way, shape)


def test_slopes_count_from_the_next_call_on() -> None:
    layer = a_layer("prelu", residual=False)
    assert layer.slope is not None
    x = torch.randn(2, 6, 9, 10)

    def check() -> None:
        for _ in range(2):
            assert reference.compare(layer(x), expected_of(layer, x, None)) < 1e-6
            with torch.no_grad():
                by_operator = layer(x.clone().requires_grad_())
            assert reference.compare(by_operator, expected_of(layer, x, None)) < 1e-6

    check()
    layer.slope.mul_(-2.0)
    check()
    layer.slope = torch.linspace(0.0, 1.0, 8)
    check()
    layer.load_state_dict({**layer.state_dict(), "slope": torch.linspace(1.0, 2.0, 8)})
    assert layer.state_dict()["slope"][-1] == 2.0
    check()


def test_only_a_layer_with_slopes_has_them_in_its_state() -> None:
    assert a_layer("leaky_relu").state_dict().keys() == {"values", "columns", "indptr"}
    assert a_layer("prelu").state_dict().keys() == {"values", "columns", "indptr", "slope"}


def test_slopes_are_there_if_and_only_if_the_activation_has_them() -> None:
    problem = Problem(1, 2, 4, 4, 3, (1, 1), epilogue=Epilogue(activation="prelu"))
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    with pytest.raises(ValueError, match=r"the plan is for slopes of shape \(3,\), got None"):
        plan_layer(problem, sparse_filter)
    with pytest.raises(ValueError, match=r"the plan is for slopes of shape \(3,\), got \(1,\)"):
        plan_layer(problem, sparse_filter, None, torch.ones(1))
    with pytest.raises(ValueError, match=r"the plan is for slopes of shape None, got \(3,\)"):
        plan_layer(replace(problem, epilogue=Epilogue()), sparse_filter, None, torch.ones(3))
    assert plan_layer(problem, sparse_filter, None, torch.ones(3)).problem == problem
