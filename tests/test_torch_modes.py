"""What observes torch's operators sees a converted layer as an operator; a plain call hands over memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.layers import MaxPool2d, SparseConv2d, runners
from escort.methods import by_name
from escort.planner import Plan
from escort.planner.machine import Machine
from escort.problem import Epilogue, Problem
from tests.forked import in_a_child

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


def test_a_profiler_sees_the_layer_and_its_name(direct: SparseConv2d) -> None:
    with torch.profiler.profile() as profile:
        direct(*inputs())
    assert [event.key for event in profile.key_averages()].count("escort::sparse_conv2d") == 1


@pytest.mark.parametrize(
    "emit", [torch.autograd.profiler.emit_itt, pytest.param(torch.autograd.profiler.emit_nvtx, marks=pytest.mark.gpu)]
)
def test_ranges_of_other_profilers_name_the_layer(
    emit: Callable[[], AbstractContextManager[Any]], direct: SparseConv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[str] = []

    def begin(name: str, args: str | None = None) -> AbstractContextManager[None]:
        ranges.append(name)
        return nullcontext()

    monkeypatch.setattr(torch.profiler, "record_function", begin)
    direct(*inputs())
    with emit():
        direct(*inputs())
    direct(*inputs())
    assert ranges == ["escort::sparse_conv2d a layer"]


def test_autocast_before_a_layer_is_named_as_what_to_leave(direct: SparseConv2d) -> None:
    x, residual = inputs()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="a layer .* outside of autocast"):
        direct(x.bfloat16(), residual)
    with pytest.raises(TypeError, match=r"a layer computes in torch.float32, .* convert it with .to\(torch.float32\)"):
        direct(x.bfloat16(), residual)


def test_a_child_of_fork_has_threads_of_its_own(direct: SparseConv2d) -> None:
    """OpenMP would wait for those that were left behind in the parent."""
    x, residual = torch.randn(16, 8, 9, 9), torch.randn(16, 6, 9, 9)
    pool = MaxPool2d(2)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        expected = pool(direct(x, residual))

        def check() -> None:
            _cpu.assume_fork_join_ns(1)  # it is not the parent's, and too long for a layer of this size
            assert all(torch.equal(pool(direct(x, residual)), expected) for _ in range(3))

        in_a_child(check)
        assert torch.equal(pool(direct(x, residual)), expected)
    finally:
        torch.set_num_threads(before)


def test_a_bias_that_changes_while_a_runner_is_made_counts(
    direct: SparseConv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call on one thread has read the bias of before, when another one finds that there is a new one."""
    x, residual = inputs()
    prepare, has_read, may_end = runners.prepare, threading.Event(), threading.Event()

    def slow(*args: object) -> object:
        run = prepare(*args)
        if threading.current_thread() is first:
            has_read.set()
            may_end.wait(20)
        return run

    monkeypatch.setattr(runners, "prepare", slow)
    first = threading.Thread(target=direct, args=(x, residual))
    first.start()
    assert has_read.wait(20)
    direct.bias.add_(1.0)
    expected = copy.deepcopy(direct)(x, residual)
    direct(x[:, :, 1:], residual[:, :, 1:])  # of another size: it finds the change
    may_end.set()
    first.join()
    assert torch.equal(direct(x, residual), expected)


def test_a_bias_of_inference_mode_is_followed(direct: SparseConv2d) -> None:
    x, residual = inputs()
    with torch.inference_mode():
        direct.bias = torch.full((6,), 50.0)
        before = direct(x, residual)
        direct.bias.add_(1.0)
        assert torch.allclose(direct(x, residual), before + 1.0)


@pytest.mark.parametrize("x", [[1.0, 2.0], "text", torch.zeros(2, 8, 9, 9).numpy()])
def test_what_is_no_tensor_is_named(direct: SparseConv2d, x: object) -> None:
    with pytest.raises(TypeError, match=f"layer a layer takes tensors, got {type(x).__name__}; pass torch.as_tensor"):
        direct(x, inputs()[1])
    with pytest.raises(TypeError, match=f"layer a layer takes tensors, got {type(x).__name__}; pass torch.as_tensor"):
        direct(inputs()[0], x)
