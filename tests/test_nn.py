"""The modules of a converted network, eager, compiled and exported."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from escort import methods, reference
from escort.filter import SparseFilter
from escort.layers import ops
from escort.layers.nn import MaxPool2d, SparseConv2d
from escort.methods import Method, Prepared, by_name, for_device
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from escort.problem import Epilogue, Problem

EPILOGUE = Epilogue(bias=True, residual=True, activation="relu")


def a_layer(method: str = "direct", *, residual: bool = True) -> tuple[SparseConv2d, Problem, torch.Tensor]:
    """A strided 3x3 layer run by that method, the problem it was planned for, and its dense weight."""
    torch.manual_seed(0)
    problem = Problem(
        2, 6, 11, 12, 8, (3, 3), (2, 1), (1, 1, 1, 1), groups=2, epilogue=Epilogue(True, residual, "relu")
    )
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.3)
    sparse_filter = SparseFilter.from_dense(weight, 2)
    config = by_name(method).configs(problem, sparse_filter)[0]
    plan = Plan(problem, method, dict(vars(config)), (), Machine.here())
    layer = SparseConv2d(sparse_filter, torch.randn(8), plan, "features.3")
    return layer, problem, weight


def inputs(layer: SparseConv2d, batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    problem = layer.problem(batch, height, width)
    return torch.randn(problem.input_shape), torch.randn(problem.output_shape)


@pytest.mark.parametrize("method", [method.name for method in for_device("cpu")])
def test_any_batch_and_size_is_right(method: str) -> None:
    layer, _, weight = a_layer(method)
    for batch, height, width in ((2, 11, 12), (1, 11, 12), (5, 7, 30), (0, 11, 12), (1, 1, 1)):
        x, residual = inputs(layer, batch, height, width)
        expected = reference.conv2d(layer.problem(batch, height, width), x, weight, layer.bias, residual)
        assert reference.compare(layer(x, residual), expected) < 1e-5


def test_inputs_of_any_strides_are_right() -> None:
    layer, problem, weight = a_layer(residual=False)
    base = torch.randn(2, 11, 12, 6)
    views = (base.permute(0, 3, 1, 2), torch.randn(4, 6, 11, 12)[::2], torch.randn(2, 6, 11, 24)[..., ::2])
    for x in views:
        assert reference.compare(layer(x), reference.conv2d(problem, x, weight, layer.bias)) < 1e-5


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda x, r: (x[0], r), ValueError, r"features.3 takes \(N, 6, H, W\), got shape \(6, 11, 12\)"),
        (lambda x, r: (x[:, :5], r), ValueError, r"features.3 takes \(N, 6, H, W\)"),
        (lambda x, r: (x[:, :, :0], r), ValueError, "features.3: sizes are positive"),
        (
            lambda x, r: (x.double(), r),
            TypeError,
            r"features.3 computes in torch.float32, its input is torch.float64; .*\.to\(torch.float32\)",
        ),
        (lambda x, r: (x.long(), r), TypeError, "features.3 computes in torch.float32"),
        (lambda x, r: (x,), TypeError, "features.3 was made for a residual"),
        (lambda x, r: (x, r[:, :, 1:]), ValueError, "features.3: a residual is float32"),
        (lambda x, r: (x, r.double()), ValueError, "features.3: a residual is float32"),
        (lambda x, r: (x.requires_grad_(), r), RuntimeError, "features.3 has no gradient: .*no_grad"),
        (lambda x, r: (x.to("meta"), r), ValueError, "features.3 is on cpu, its input on meta"),
    ],
)
def test_bad_calls_name_the_layer_and_the_remedy(make: Any, error: type[Exception], says: str) -> None:
    layer, *_ = a_layer()
    with pytest.raises(error, match=says):
        layer(*make(*inputs(layer, 2, 11, 12)))


def test_a_filter_or_bias_of_another_problem_is_refused() -> None:
    layer, *_ = a_layer()
    other = SparseFilter.from_dense(torch.ones(8, 2, 3, 3), 2)
    with pytest.raises(ValueError, match=r"a filter of shape \(8, 3, 3, 3\), got \(8, 2, 3, 3\)"):
        SparseConv2d(other, layer.bias, layer.plan)
    for bias in (None, torch.zeros(7)):
        with pytest.raises(ValueError, match=r"a bias of shape \(8,\), got (None|\(7,\))"):
            SparseConv2d(layer.filter, bias, layer.plan)


def test_training_and_other_dtypes_are_refused() -> None:
    layer, *_ = a_layer()
    with pytest.raises(RuntimeError, match="features.3 is for inference"):
        layer.train()
    assert layer.eval() is layer
    with pytest.raises(TypeError, match="features.3 computes in torch.float32 only; convert the model again"):
        layer.half()
    assert layer.values.dtype is torch.float32 and layer.float() is layer.to(torch.float32) is layer


@dataclass(frozen=True)
class NoSettings:
    """A method's config that leaves no choice."""


class Rounded(Method):
    """The reference, rounded to the problem's type: a method of any precision that needs no GPU."""

    name, device_type, config_type = "rounded", "cpu", NoSettings

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> tuple[NoSettings, ...]:
        return (NoSettings(),)

    def prepare(
        self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: NoSettings
    ) -> Prepared:
        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return reference.conv2d(problem, x, sparse_filter.to_dense(), bias, residual).to(problem.storage)

        return Prepared(run)


@pytest.fixture
def half_layer(monkeypatch: pytest.MonkeyPatch) -> SparseConv2d:
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Rounded()))
    problem = Problem(2, 6, 11, 12, 8, (3, 3), precision="fp16", epilogue=Epilogue(bias=True))
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.3)
    plan = Plan(problem, "rounded", {}, (), Machine.here())
    return SparseConv2d(SparseFilter.from_dense(weight), torch.randn(8).half(), plan, "features.3")


def test_a_layer_computes_in_the_type_it_was_planned_for(half_layer: SparseConv2d) -> None:
    x = torch.randn(3, 6, 9, 9).half()
    expected = reference.conv2d(half_layer.problem(3, 9, 9), x, half_layer.filter.to_dense(), half_layer.bias)
    y = half_layer(x)
    assert y.dtype is torch.float16 and reference.compare(y, expected) < reference.ERROR_BOUND["fp16"]
    for other in (x.float(), x.bfloat16(), x.int()):
        with pytest.raises(TypeError, match=r"computes in torch.float16, .*convert it with .to\(torch.float16"):
            half_layer(other)
    compiled = torch.compile(half_layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), y)


def test_weights_stay_float32_whatever_the_layer_computes_in(half_layer: SparseConv2d) -> None:
    x = torch.randn(1, 6, 9, 9).half()
    before, values = half_layer(x), half_layer.values.clone()
    assert half_layer.bias is not None and half_layer.bias.dtype is torch.float32
    half_layer.half().to("cpu", torch.float16)
    assert torch.equal(half_layer.values, values) and half_layer.bias.dtype is torch.float32
    assert torch.equal(half_layer(x), before)
    for move in (half_layer.float, half_layer.bfloat16, half_layer.double):
        with pytest.raises(TypeError, match="features.3 computes in torch.float16 only; convert the model again"):
            move()


class Picky(Rounded):
    """Takes one config, up to a width, and nothing tall."""

    name = "picky"

    def unsupported(self, problem: Problem) -> str | None:
        return "too tall" if problem.height > 20 else None

    def prepare(
        self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: NoSettings
    ) -> Prepared:
        if problem.width > 20:
            raise ValueError("too wide")
        return super().prepare(problem, sparse_filter, bias, config)


@pytest.mark.parametrize(("height", "width"), [(9, 9), (9, 30), (30, 9)])
def test_a_size_that_the_plan_does_not_fit_runs_by_another_method(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    picky = Picky()
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, picky))
    problem = Problem(1, 6, 9, 9, 8, (3, 3))
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.3)
    layer = SparseConv2d(SparseFilter.from_dense(weight), None, Plan(problem, "picky", {}, (), Machine.here()), "late")
    x = torch.randn(2, 6, height, width)
    expected = reference.conv2d(layer.problem(2, height, width), x, weight)
    assert reference.compare(layer(x), expected) < 1e-5
    monkeypatch.setattr(methods, "METHODS", (picky,))
    layer._runners.clear()
    if max(height, width) > 20:
        with pytest.raises(ValueError, match="late: too (tall|wide)"):
            layer(x)


def test_a_layer_can_be_prepared_for_the_size_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, problem, _ = a_layer(residual=False)
    layer.prepare()
    monkeypatch.setattr(ops, "prepare", lambda *args: pytest.fail("prepared again"))
    assert layer(torch.randn(problem.input_shape)).shape == problem.output_shape


class Compiling(Picky):
    """One that would compile a kernel for each filter."""

    name = "compiling"
    compiles_per_filter = True

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: NoSettings) -> float:
        return 60.0

    def prepare(
        self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: NoSettings
    ) -> Prepared:
        pytest.fail("compiled where another method would do")


def test_nothing_is_compiled_for_a_size_that_another_method_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", (Picky(), Compiling(), *methods.METHODS))
    problem = Problem(1, 6, 9, 9, 8, (3, 3))
    sparse_filter = SparseFilter.from_dense(torch.randn(problem.weight_shape))
    layer = SparseConv2d(sparse_filter, None, Plan(problem, "picky", {}, (), Machine.here()))
    assert layer(torch.randn(1, 6, 30, 30)).shape == (1, 8, 28, 28)


def test_another_type_of_device_is_refused_before_anything_moves() -> None:
    layer, *_ = a_layer()
    for move in (lambda: layer.to("meta"), lambda: layer.to_empty(device="meta")):
        with pytest.raises(ValueError, match="features.3 was planned for cpu, not for meta; move the original model"):
            move()
    assert {buffer.device.type for buffer in layer.buffers()} == {"cpu"}


def test_copies_and_pickles_run_by_themselves() -> None:
    layer, *_ = a_layer(residual=False)
    x, _ = inputs(layer, 2, 11, 12)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)  # after a call: a runner is nothing to copy
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        other.values.zero_()
        other.load_state_dict(other.state_dict())
        assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)


def test_the_filter_and_new_state_come_back() -> None:
    layer, _, weight = a_layer(residual=False)
    assert torch.equal(layer.filter.to_dense(), weight)
    x, _ = inputs(layer, 1, 11, 12)
    before = layer(x)
    state = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert torch.allclose(layer(x), 2 * before, atol=1e-5)


@pytest.mark.parametrize("method", ["direct", "dense"])
def test_compiles_without_a_graph_break(method: str) -> None:
    layer, *_ = a_layer(method)
    x, residual = inputs(layer, 2, 11, 12)
    expected = layer(x, residual)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, residual), expected)
        x, residual = inputs(layer, 3, 9, 9)
        assert torch.equal(compiled(x, residual), layer(x, residual))


def test_an_exported_program_carries_its_filter(tmp_path: Path) -> None:
    layer, *_ = a_layer(residual=False)
    x, _ = inputs(layer, 2, 11, 12)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    for images in (2, 5):
        x, _ = inputs(layer, images, 11, 12)
        assert torch.equal(program(x), layer(x))


def test_the_operators_pass_torchs_own_checks() -> None:
    layer, *_ = a_layer()
    x, residual = inputs(layer, 2, 11, 12)
    arguments = (x, residual, layer.values, layer.columns, layer.indptr, layer.bias, layer._spec)
    torch.library.opcheck(ops.sparse_conv2d, arguments)
    torch.library.opcheck(ops.max_pool2d, (x, [3, 3], [2, 2], [1, 1], [1, 1], True))


def test_the_operator_notices_changed_weights() -> None:
    layer, *_ = a_layer(residual=False)
    x, _ = inputs(layer, 1, 11, 12)

    def call() -> torch.Tensor:
        return ops.sparse_conv2d(x, None, layer.values, layer.columns, layer.indptr, None, layer._spec)

    before = call()
    assert before.any()
    layer.values.mul_(3.0)
    assert torch.allclose(call(), 3 * before, atol=1e-5)


def test_the_operator_tells_types_and_residuals_apart() -> None:
    layer, problem, weight = a_layer()
    x, residual = inputs(layer, 2, 11, 12)
    arrays = layer.values, layer.columns, layer.indptr, layer.bias, layer._spec
    with pytest.raises(ValueError, match="takes torch.float32 on the filter's device, cpu, got torch.float64"):
        ops.sparse_conv2d(x.double(), residual, *arrays)
    for added in (residual, None, residual):
        expected = reference.conv2d(problem, x, weight, layer.bias, added)
        assert reference.compare(ops.sparse_conv2d(x, added, *arrays), expected) < 1e-5


def test_programs_exported_before_there_were_precisions_are_in_float32() -> None:
    layer, *_ = a_layer()
    fields = json.loads(layer._spec)
    assert fields.pop("dtype") == "fp32"
    assert ops.Spec.from_json(json.dumps(fields)) == ops.Spec.from_json(layer._spec)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_max_pool_is_torchs(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kernel = (draw(1, 5), draw(1, 5))
    stride, dilation = ((draw(1, 3), draw(1, 3)) for _ in range(2))
    padding = (draw(0, kernel[0] // 2), draw(0, kernel[1] // 2))
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=data.draw(st.booleans()))
    ours = MaxPool2d(kernel, stride, padding, dilation, ceil_mode=pool.ceil_mode)
    x = torch.randn(draw(1, 2), draw(1, 3), draw(1, 40), draw(1, 40))
    if data.draw(st.booleans()):
        x.flatten()[draw(0, x.numel() - 1)] = float("nan")
    try:
        expected = pool(x)
    except RuntimeError:
        with pytest.raises(ValueError, match="smaller than the pooling window"):
            ours(x)
        return
    assert torch.equal(ours(x).nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(ours(x[0].double()).nan_to_num(nan=1e9), pool(x[0].double()).nan_to_num(nan=1e9))


def test_pool_takes_single_numbers_and_a_default_stride() -> None:
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(MaxPool2d(2)(x), nn.MaxPool2d(2)(x))
