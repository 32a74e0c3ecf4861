"""What observes torch's operators sees a converted layer as an operator; a plain call hands over memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from escort.filter import SparseFilter
from escort.layers import SparseConv2d
from escort.methods import by_name
from escort.planner import Plan
from escort.planner.machine import Machine
from escort.problem import Epilogue, Problem

PROBLEM = Problem(2, 8, 9, 9, 6, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, True, "relu"))


@pytest.fixture
def direct() -> SparseConv2d:
    torch.manual_seed(0)
    weight = torch.randn(PROBLEM.weight_shape) * (torch.rand(PROBLEM.weight_shape) < 0.3)
    sparse_filter = SparseFilter.from_dense(weight)
    config = asdict(by_name("direct").configs(PROBLEM, sparse_filter)[0])
    return SparseConv2d(sparse_filter, torch.randn(6), Plan(PROBLEM, "direct", config, (), Machine.here()), "a layer")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(samples: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 8, 9, 9), torch.randn(samples, 6, 9, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_changes_nothing(direct: SparseConv2d, dtype: torch.dtype) -> None:
    x, residual = inputs()
    expected = direct(x, residual)
    fresh = copy.deepcopy(direct)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(direct(x, residual), expected) and torch.equal(fresh(x, residual), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_changes_nothing(direct: SparseConv2d) -> None:
    x, residual = inputs()
    expected = direct(x, residual)
    with torch.device("meta"):
        assert torch.equal(direct(x, residual), expected)


def test_a_trace_records_the_operator(direct: SparseConv2d) -> None:
    traced = torch.jit.trace(direct, inputs())
    x, residual = inputs(3)
    assert torch.equal(traced(x, residual), direct(x, residual))
    assert "escort::sparse_conv2d" in str(traced.graph)


def test_make_fx_records_the_operator(direct: SparseConv2d) -> None:
    graph = make_fx(direct)(*inputs())
    x, residual = inputs()
    assert torch.equal(graph(x, residual), direct(x, residual))


def test_a_fake_tensor_has_a_shape_and_no_memory(direct: SparseConv2d) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = direct(*(mode.from_tensor(x) for x in inputs(5)))
    assert y.shape == (5, 6, 9, 9) and y.dtype is torch.float32


def test_vmap_runs_a_batch_of_batches(direct: SparseConv2d) -> None:
    x, residual = torch.randn(4, 2, 8, 9, 9), torch.randn(2, 4, 6, 9, 9)
    y = torch.vmap(direct, in_dims=(0, 1))(x, residual)
    assert torch.equal(y, torch.stack([direct(x[i], residual[:, i]) for i in range(4)]))
    shared = torch.vmap(direct, in_dims=(0, None))(x, residual[:, 0])
    assert torch.equal(shared[1], direct(x[1], residual[:, 0]))


def test_flops_are_those_of_the_nonzeros(direct: SparseConv2d) -> None:
    with FlopCounterMode(display=False) as counter:
        direct(*inputs(3))
    assert counter.get_total_flops() == 2 * len(direct.values) * 3 * 81


def test_a_lazily_negated_view_keeps_its_sign(direct: SparseConv2d) -> None:
    x, residual = inputs()
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert torch.equal(direct(negated, residual), direct(-x, residual))
    negated = torch.complex(residual, residual).conj().imag
    assert torch.equal(direct(x, negated), direct(x, -residual))


def _backward(layer: SparseConv2d, x: Tensor, residual: Tensor) -> None:
    with torch.enable_grad():
        layer(x.requires_grad_(), residual)


def _forward(layer: SparseConv2d, x: Tensor, residual: Tensor) -> None:
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, torch.ones_like(x)), residual)


def _functional_forward(layer: SparseConv2d, x: Tensor, residual: Tensor) -> None:
    torch.func.jvp(lambda value: layer(value, residual), (x,), (x,))


def _functional_backward(layer: SparseConv2d, x: Tensor, residual: Tensor) -> None:
    with torch.enable_grad():
        torch.func.grad(lambda value: layer(value, residual).sum())(x)


@pytest.mark.parametrize("derive", [_backward, _forward, _functional_forward, _functional_backward])
def test_a_gradient_is_refused(derive: Callable[..., None], direct: SparseConv2d) -> None:
    with pytest.raises(RuntimeError, match="a layer has no gradient: call it under torch.inference_mode"):
        derive(direct, *inputs())
