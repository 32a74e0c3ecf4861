"""A sparse layer in the place of a convolution: its weight, its bias, and what is added to its result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort import reference
from escort.filter import SparseFilter
from escort.layers import SparseConv2d
from escort.layers.weight import DenseWeight
from tests.test_conv_layer import a_layer, inputs


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_what_a_convolution_tells_about_itself() -> None:
    layer, problem, _ = a_layer()
    assert (layer.in_channels, layer.out_channels, layer.groups) == (6, 8, 2)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (2, 1), (1, 1), (1, 1))
    assert (layer.padding_mode, layer.transposed, layer.output_padding) == ("zeros", False, (0, 0))
    x, residual = inputs(layer, 2, 11, 12)
    assert torch.equal(layer(input=x, residual=residual), layer(x, residual))
    uneven = replace(problem, padding=(0, 1, 2, 1))
    assert SparseConv2d(layer.filter, layer.bias, replace(layer.plan, problem=uneven)).padding == (0, 1, 2, 1)


def test_the_first_parameter_tells_type_and_device_and_is_frozen() -> None:
    layer, *_ = a_layer()
    (parameter,) = layer.parameters()
    assert (parameter.dtype, parameter.device.type, parameter.requires_grad) == (torch.float32, "cpu", False)
    assert list(layer.state_dict()) == ["values", "columns", "indptr", "bias"]
    other, *_ = a_layer()
    assert other.load_state_dict(layer.state_dict()).missing_keys == []


def test_the_outside_of_a_weight_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, *_ = a_layer()
    monkeypatch.setattr(SparseConv2d, "_dense", lambda layer: pytest.fail("the weight was made"))
    weight = layer.weight
    assert isinstance(weight, Tensor) and (weight.shape, weight.dtype, weight.device) == (
        (8, 3, 3, 3),
        torch.float32,
        torch.device("cpu"),
    )
    assert (weight.ndim, weight.numel(), weight.size(0), len(weight), weight.requires_grad) == (4, 216, 8, 8, False)
    assert weight.data.dtype is weight.detach().dtype is torch.float32 and weight.is_floating_point()


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w.clone(),
        lambda w: 2 * w + w,
        lambda w: (w == 0).float().mean(),
        lambda w: w[3, :, 1],
        lambda w: torch.stack([w, w]).sum((0, 2)),
        lambda w: torch.from_numpy(w.numpy()),
        lambda w: w.to(torch.float64),
        lambda w: torch.tensor(w.tolist()),
        lambda w: F.conv2d(torch.ones(1, 6, 5, 5), w, groups=2),
        lambda w: nn.Parameter(w, requires_grad=False) * 1,
        lambda w: copy.deepcopy(w) + 0,
    ],
)
def test_what_is_computed_with_a_weight_is_right(compute: Callable[[Tensor], Tensor]) -> None:
    layer, _, dense = a_layer()
    result = compute(layer.weight)
    assert type(result) is Tensor and torch.equal(result, compute(dense))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.zero_(),
        lambda layer: layer.weight.__setitem__(0, 0.0),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.copy_(torch.zeros(8, 3, 3, 3)),
        lambda layer: setattr(layer.weight, "data", torch.zeros(8, 3, 3, 3)),
    ],
)
def test_writing_to_a_weight_is_refused(write: Callable[[SparseConv2d], None]) -> None:
    layer, *_ = a_layer()
    with pytest.raises(RuntimeError, match="is a copy, .* change the original model and convert it again"):
        write(layer)


def test_a_weight_cannot_be_set() -> None:
    layer, *_ = a_layer()
    for value in (torch.zeros(8, 3, 3, 3), nn.Parameter(torch.zeros(8, 3, 3, 3))):
        with pytest.raises(
            AttributeError, match="layer features.3: its weight is compressed and cannot be set; set it"
        ):
            layer.weight = value  # type: ignore[misc]


def test_a_weight_is_that_from_before_a_norm_was_folded_in() -> None:
    layer, _, dense = a_layer()
    folded = SparseFilter.from_dense(dense * torch.rand(8)[:, None, None, None], 2)
    layer = SparseConv2d(folded, layer.bias, layer.plan, unfolded=SparseFilter.from_dense(dense, 2))
    assert torch.equal(layer.weight + 0, dense) and torch.equal(copy.deepcopy(layer).weight + 0, dense)
    layer.load_state_dict({**layer.state_dict(), "values": 2 * layer.values})
    assert torch.equal(layer.weight + 0, 2 * folded.to_dense())


def test_another_pattern_of_as_many_values_is_another_weight() -> None:
    layer, _, _ = a_layer()
    dense = torch.zeros(8, 3, 3, 3)
    dense[:, 0, 0, 0] = 1.0
    filters = [SparseFilter.from_dense(weight, 2) for weight in (dense, dense.flip(1, 2, 3))]
    ours, theirs = (SparseConv2d(one, layer.bias, layer.plan, unfolded=filters[0]) for one in filters)
    assert torch.equal(ours.values, theirs.values)
    ours.load_state_dict(ours.state_dict())
    assert ours.unfolded is not None
    ours.load_state_dict(theirs.state_dict())
    assert ours.unfolded is None and torch.equal(ours.weight + 0, filters[1].to_dense())


def test_a_weight_while_compiled_or_exported() -> None:
    layer, problem, dense = a_layer(residual=False)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.to(self.conv.weight.dtype)) * self.conv.weight.shape[0] + self.conv.weight.sum()

    x = torch.randn(problem.input_shape)
    expected = layer(x) * 8 + dense.sum()
    assert torch.allclose(torch.compile(Around(), backend="aot_eager")(x), expected, atol=1e-4)
    assert torch.allclose(torch.export.export(Around(), (x,)).module()(x), expected, atol=1e-4)
    assert isinstance(layer.weight, DenseWeight)


# What changes
def run_as(layer: SparseConv2d, how: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(layer, backend="aot_eager") if how == "compiled" else layer


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_bias_counts_as_it_is(how: str, mode: Callable[[], torch.no_grad]) -> None:
    torch._dynamo.reset()
    layer, problem, dense = a_layer(residual=False)
    run, x = run_as(layer, how), torch.randn(problem.input_shape)
    for change in (
        lambda: layer.bias.add_(1.0),  # type: ignore[union-attr]
        lambda: layer.state_dict()["bias"].mul_(2.0),
        lambda: layer.load_state_dict({**layer.state_dict(), "bias": torch.arange(8.0)}),
        lambda: setattr(layer, "bias", torch.ones(8)),
    ):
        run(x)
        with mode():
            change()
            y = run(x)
        assert reference.compare(y, reference.conv2d(problem, x, dense, layer.bias)) < 1e-5


def test_values_that_are_loaded_or_written_to_are_laid_out_anew() -> None:
    layer, problem, dense = a_layer(residual=False)
    x = torch.randn(problem.input_shape)
    before = layer(x)
    layer.load_state_dict({**layer.state_dict(), "values": -layer.values})
    assert reference.compare(layer(x), reference.conv2d(problem, x, -dense, layer.bias)) < 1e-5
    layer.values.neg_()
    assert torch.equal(layer(x), before)


# What is added
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (1, 8, 6, 12), (8, 1, 1), (1, 1, 6, 1), (2, 1, 6, 12), (12,)])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_residual_that_broadcasts(shape: tuple[int, ...], how: str) -> None:
    layer, problem, dense = a_layer()
    x, residual = torch.randn(problem.input_shape), torch.randn(shape)
    alone = replace(problem, epilogue=replace(problem.epilogue, residual=False, activation="none"))
    expected = F.relu(reference.conv2d(alone, x, dense, layer.bias) + residual)
    assert reference.compare(run_as(layer, how)(x, residual), expected) < 1e-5


def test_a_residual_that_is_larger_than_the_result() -> None:
    layer, problem, dense = a_layer()
    x = torch.randn(1, 6, 1, 1)
    at_size = layer.problem(1, 1, 1)
    alone = replace(at_size, epilogue=replace(problem.epilogue, residual=False, activation="none"))
    residual = torch.randn(3, 8, 5, 7)
    expected = F.relu(reference.conv2d(alone, x, dense, layer.bias) + residual)
    assert reference.compare(layer(x, residual), expected) < 1e-5


def test_equal_shapes_on_the_example_may_differ_elsewhere() -> None:
    class Gated(nn.Module):
        """Adds a vector per sample, which on a picture of one pixel has the shape of the map."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x) + self.side(x.mean((2, 3), keepdim=True)))

    import escort

    model = Gated().eval()
    fast = escort.convert(model, torch.randn(2, 3, 1, 1))
    for x in (torch.randn(2, 3, 1, 1), torch.randn(3, 3, 9, 7)):
        assert torch.allclose(fast(x), model(x), atol=1e-5)
