"""A sparse convolution of a converted network, eager, compiled and exported."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from escort import methods, reference
from escort.filter import SparseFilter
from escort.layers import SparseConv2d, runners
from escort.layers.operator import sparse_conv2d
from escort.methods import by_name, for_device
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from escort.problem import Epilogue, Problem
from tests.fakes import Rounded

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
        (lambda x, r: (x[0], r), ValueError, r"layer features.3 takes \(N, 6, H, W\), got shape \(6, 11, 12\)"),
        (lambda x, r: (x[:, :5], r), ValueError, r"layer features.3 takes \(N, 6, H, W\)"),
        (lambda x, r: (x[:, :, :0], r), ValueError, "features.3: sizes are positive"),
        (
            lambda x, r: (x.double(), r),
            TypeError,
            r"layer features.3 computes in torch.float32, its input is torch.float64; .*\.to\(torch.float32\)",
        ),
        (lambda x, r: (x.long(), r), TypeError, "layer features.3 computes in torch.float32"),
        (lambda x, r: (x,), TypeError, "layer features.3 was made for a residual"),
        (lambda x, r: (x, r[:, :, 1:]), ValueError, "features.3: a residual is float32"),
        (lambda x, r: (x, r.double()), ValueError, "features.3: a residual is float32"),
        (lambda x, r: (x.requires_grad_(), r), RuntimeError, "layer features.3 has no gradient: .*no_grad"),
        (lambda x, r: (x.to_sparse(), r), TypeError, r"features.3 takes dense tensors, .*\.to_dense\(\)"),
        (lambda x, r: (x.to("meta"), r), ValueError, "layer features.3 is on cpu, its input on meta"),
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


def test_a_layer_stays_in_eval_and_in_its_dtype() -> None:
    layer, *_ = a_layer()
    assert layer.train() is layer.eval() is layer and not layer.training
    with pytest.raises(TypeError, match="layer features.3 computes in torch.float32 only; convert the model again"):
        layer.half()
    assert layer.values.dtype is torch.float32 and layer.float() is layer.to(torch.float32) is layer


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
    torch._dynamo.reset()  # other tests compiled the same forward
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
        with pytest.raises(TypeError, match="layer features.3 computes in torch.float16 only; convert the model again"):
            move()


def test_a_layer_can_be_prepared_for_the_size_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, problem, _ = a_layer(residual=False)
    layer.prepare()
    monkeypatch.setattr(runners, "prepare", lambda *args: pytest.fail("prepared again"))
    assert layer(torch.randn(problem.input_shape)).shape == problem.output_shape


def test_a_layer_runs_by_what_was_prepared_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, problem, _ = a_layer(residual=False)
    x = torch.randn(problem.input_shape)
    expected = layer(x)
    prepared = runners.prepare(problem, layer.filter, layer.bias, runners.Choice.of(layer.plan))
    layer._runners.clear()
    layer.run_by(prepared)
    monkeypatch.setattr(runners, "prepare", lambda *args: pytest.fail("prepared again"))
    assert torch.equal(layer(x), expected)
    monkeypatch.undo()
    assert layer.bias is not None
    layer.bias += 1.0  # what was prepared holds the bias as it was
    assert not torch.equal(layer(x), expected)


def test_another_type_of_device_is_refused_before_anything_moves() -> None:
    layer, *_ = a_layer()
    for move in (lambda: layer.to("meta"), lambda: layer.to_empty(device="meta")):
        with pytest.raises(
            ValueError, match="layer features.3 was planned for cpu, not for meta; move the original model"
        ):
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


def test_a_copy_begins_with_one_cache_of_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, *_ = a_layer(residual=False)
    follow, follows = SparseConv2d._follow, list[SparseConv2d]()
    monkeypatch.setattr(SparseConv2d, "_follow", lambda self: (follows.append(self), follow(self)))
    twin = copy.deepcopy(layer)
    assert follows == [twin]


def test_a_copy_made_in_inference_mode_notices_what_is_written_to_it() -> None:
    layer, *_ = a_layer(residual=False)
    x, _ = inputs(layer, 2, 11, 12)
    with torch.inference_mode():
        expected, twin = layer(x), copy.deepcopy(layer)
        assert torch.equal(twin(x), expected)
        known = twin.filter
        twin.load_state_dict(layer.state_dict() | {"values": layer.values * 2})
        doubled = twin(x)
        assert twin.filter is not known and not torch.equal(doubled, expected)
        twin.values.fill_(1.0)
    assert not torch.equal(twin(x), doubled)
    assert torch.equal(layer(x), expected)


def test_the_filter_and_new_state_come_back() -> None:
    layer, _, weight = a_layer(residual=False)
    assert torch.equal(layer.filter.to_dense(), weight)
    x, _ = inputs(layer, 1, 11, 12)
    before = layer(x)
    state = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert torch.allclose(layer(x), 2 * before, atol=1e-5)


def test_the_filter_is_one_object_until_values_are_written_to() -> None:
    layer, _, weight = a_layer(residual=False)
    before = layer.filter
    layer(inputs(layer, 1, 7, 7)[0])
    assert layer.filter is before and copy.deepcopy(layer).filter is not before
    with torch.no_grad():
        layer.values.mul_(2)
    assert layer.filter is not before and torch.equal(layer.filter.to_dense(), 2 * weight)
    written = layer.filter
    layer.load_state_dict(layer.state_dict())
    assert layer.filter is not written


def test_loading_that_fails_leaves_the_layer_whole() -> None:
    layer, _, _ = a_layer()

    def refuse(*args: object) -> None:
        raise KeyboardInterrupt

    state = layer.state_dict()
    layer._register_state_dict_hook(refuse)
    with pytest.raises(KeyboardInterrupt):
        layer.state_dict()
    hook = layer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(KeyboardInterrupt):
        layer.load_state_dict(state)
    hook.remove()
    assert [name for name, _ in layer.named_parameters()] == ["frozen"]


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
    for samples in (2, 5):
        x, _ = inputs(layer, samples, 11, 12)
        assert torch.equal(program(x), layer(x))


def test_the_operator_passes_torchs_own_checks() -> None:
    layer, *_ = a_layer()
    x, residual = inputs(layer, 2, 11, 12)
    arguments = (x, residual, layer.values, layer.columns, layer.indptr, layer.bias, layer._spec)
    torch.library.opcheck(sparse_conv2d, arguments)


def test_the_operator_notices_changed_weights() -> None:
    layer, *_ = a_layer(residual=False)
    x, _ = inputs(layer, 1, 11, 12)

    def call() -> torch.Tensor:
        return sparse_conv2d(x, None, layer.values, layer.columns, layer.indptr, None, layer._spec)

    before = call()
    assert before.any()
    layer.values.mul_(3.0)
    assert torch.allclose(call(), 3 * before, atol=1e-5)


def test_the_operator_tells_types_and_residuals_apart() -> None:
    layer, problem, weight = a_layer()
    x, residual = inputs(layer, 2, 11, 12)
    arrays = layer.values, layer.columns, layer.indptr, layer.bias, layer._spec
    with pytest.raises(ValueError, match="takes torch.float32 on the filter's device, cpu, got torch.float64"):
        sparse_conv2d(x.double(), residual, *arrays)
    for added in (residual, None, residual):
        expected = reference.conv2d(problem, x, weight, layer.bias, added)
        assert reference.compare(sparse_conv2d(x, added, *arrays), expected) < 1e-5
