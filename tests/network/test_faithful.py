"""Forwards that a trace by itself would get wrong: what they write to, keep, ask and catch is as in the original."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import escort
from escort.network.model import ConvertedModel
from tests.network.models import pruned

pytestmark = pytest.mark.usefixtures("always_faster")

X = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(3))
LARGE, WIDE = 50 * X, torch.randn(3, 8, 20, 12, generator=torch.Generator().manual_seed(4))


class Model(nn.Module):
    """A convolution, and what a test does with it."""

    def __init__(self, forward: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.how = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, other: Any = None) -> Any:
        return self.how(self, x) if other is None else self.how(self, x, other)


def agrees(model: nn.Module, *inputs: tuple[Tensor, ...]) -> ConvertedModel:
    """Converts a model on the first input, and compares every call with the original, each input twice."""
    model = pruned(model, 0.7)
    fast = escort.convert(model, inputs[0])
    assert fast.plan.refused is None
    with torch.no_grad():
        for given in (*inputs, *inputs):
            torch.testing.assert_close(
                fast(*(x.clone() for x in given)), model(*(x.clone() for x in given)), rtol=1e-4, atol=1e-4
            )
    return fast


def summed(model: Any, x: Tensor) -> Tensor:
    total = torch.zeros(1)
    total += model.conv(x).abs().mean()
    return total


def added(model: Any, x: Tensor) -> Tensor:
    total = torch.zeros(2, 1)
    total.view(-1)[:1].add_(model.conv(x).abs().mean())
    return total


@pytest.mark.parametrize("forward", [summed, added])
def test_a_tensor_made_in_forward_is_made_in_every_call(forward: Any) -> None:
    agrees(Model(forward), (X,), (WIDE,))


def test_a_tensor_made_in_forward_belongs_to_the_caller() -> None:
    fast = escort.convert(pruned(Model(lambda m, x: (m.conv(x), torch.zeros(1)))), X)
    with torch.no_grad():
        fast(X)[1].add_(5.0)
        assert float(fast(X)[1]) == 0.0


class Meter:
    peak: Any = None


def private(model: Any, x: Tensor) -> Tensor:
    y = model.conv(x).mean((2, 3))
    model._ema = y if model._ema is None else 0.9 * model._ema + 0.1 * y
    return model._ema


def queued(model: Any, x: Tensor) -> Tensor:
    model.queue.append(model.conv(x).mean())
    return sum(model.queue)


def metered(model: Any, x: Tensor) -> Tensor:
    y = model.conv(x).abs().max()
    model.meter.peak = y if model.meter.peak is None else torch.maximum(model.meter.peak, y)
    return model.meter.peak


def counted(model: Any, x: Tensor) -> Tensor:
    y = model.conv(x)
    model.rare = model.rare + (y.abs().max() > 100).float()
    return y + model.rare


@pytest.mark.parametrize(
    ("forward", "attributes"),
    [
        (private, lambda: {"_ema": None}),
        (queued, lambda: {"queue": deque(maxlen=3)}),
        (metered, lambda: {"meter": Meter()}),
        (counted, lambda: {"rare": nn.Buffer(torch.zeros(()))}),
    ],
)
def test_state_of_any_kind_is_kept(forward: Any, attributes: Any) -> None:
    fast = agrees(Model(forward, **attributes()), (X,), (LARGE[:, :, :16, :16],))
    assert not fast.traced


class Doubling(Model):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


def test_a_call_of_its_own() -> None:
    agrees(Doubling(lambda m, x: m.conv(x)), (X,), (WIDE,))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Identity(), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8)])
def test_a_forward_put_on_a_layer(layer: nn.Module) -> None:
    layer.forward = lambda x: x * 3  # type: ignore[method-assign]
    agrees(Model(lambda m, x: m.layer(m.conv(x)), layer=layer), (X,), (WIDE,))


def test_a_tensor_is_a_tensor() -> None:
    def masked(model: Any, x: Tensor, mask: Any) -> Tensor:
        y = model.conv(x)
        return y * mask if isinstance(mask, torch.Tensor) else y

    ones = torch.ones(2, 1, 16, 16)
    assert agrees(Model(masked), (X, ones), (X, 2 * ones)).traced


def limited(model: Any, x: Tensor) -> Tensor:
    y = model.conv(x)
    try:
        if y.abs().max() > 5:
            y = y / y.abs().max()
    except Exception:
        pass
    return y


def divided(model: Any, x: Tensor) -> Tensor:
    try:
        samples = int(x.shape[0])
    except Exception:
        samples = 1
    return model.conv(x) / samples


@pytest.mark.parametrize("forward", [limited, divided])
def test_an_error_that_the_model_catches_is_no_way_to_trace_it(forward: Any) -> None:
    assert not agrees(Model(forward), (X,), (LARGE,), (WIDE,)).traced


class Halving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 6:
            x.mul_(0.5)
        return x


def unused(model: Any, x: Tensor) -> Tensor:
    x = x * 1
    model.inner(x)
    return model.conv(x)


def between(model: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = model.conv(x)
    return y + model.inner(x)


@pytest.mark.parametrize("forward", [unused, between])
def test_a_module_that_writes_to_its_input_keeps_its_place(forward: Any) -> None:
    agrees(Model(forward, inner=Halving()), (X,), (LARGE,))


def masked_weight(model: Any, x: Tensor) -> Tensor:
    weight = model.conv.weight.clone()
    weight.mul_((x.abs().max() < 10).float())
    return F.conv2d(x, weight, model.conv.bias, padding=1)


def moved_mean(model: Any, x: Tensor) -> Tensor:
    y = model.conv(x)
    mean = torch.zeros(8)
    mean.add_(y.mean())
    return F.batch_norm(y, mean, torch.ones(8))


@pytest.mark.parametrize("forward", [moved_mean])
def test_what_is_written_to_is_no_constant(forward: Any) -> None:
    agrees(Model(forward), (X,), (LARGE,))


def test_a_weight_that_is_written_to_is_left_alone() -> None:
    with pytest.raises(ValueError, match="layer conv: its weight, bias or geometry depends on the input"):
        escort.convert(pruned(Model(masked_weight)), X)


def one_of(model: Any, x: Tensor) -> Tensor:
    assert x.shape[0] in (1, 2, 3)
    return model.conv(x)


def any_of(model: Any, x: Tensor) -> Tensor:
    assert any([x.shape[0] == 2, x.shape[0] == 3])
    return model.conv(x)


def largest(model: Any, x: Tensor) -> Tensor:
    assert max(x.shape[2], x.shape[3]) <= 64
    return model.conv(x)


@pytest.mark.parametrize("forward", [one_of, any_of, largest])
def test_checks_are_not_stricter_than_they_are(forward: Any) -> None:
    agrees(Model(forward), (X,), (WIDE,), (WIDE.mT.contiguous(),))


def test_an_option_that_is_nan() -> None:
    class Filled(Model):
        def forward(self, x: Tensor, fill: float = float("nan")) -> Tensor:  # type: ignore[override]
            return self.conv(x)

    agrees(Filled(lambda m, x: x), (X,), (WIDE,))


class Extractor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def save(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


def test_hooks_reach_whoever_registered_them() -> None:
    def tapped(model: Any, x: Tensor) -> Tensor:
        y = model.conv(x)
        model.tap(y)
        return y.relu()

    extractor, model = Extractor(), Model(tapped, tap=nn.Identity())
    model.tap.register_forward_hook(extractor.save)
    fast = escort.convert(pruned(model), X)
    extractor.seen.clear()
    fast(X)
    assert len(extractor.seen) == 1


def test_a_hook_on_a_module_that_was_taken_apart_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()).eval()
    fast, seen = escort.convert(model, X), list[str]()
    block = fast.get_submodule("network.0")
    for register in (block.register_forward_hook, block.register_forward_pre_hook):
        with pytest.raises(RuntimeError, match="taken apart .* register the hook on the original and convert that"):
            register(lambda *_: None)
    fast.get_submodule("network.0.0").register_forward_hook(lambda *_: seen.append("layer"))
    fast.register_forward_hook(lambda *_: seen.append("whole"))
    fast(X)
    assert seen == ["layer", "whole"]


def test_copies_that_are_none() -> None:
    class Itself(Model):
        def __deepcopy__(self, memo: Any) -> Itself:
            return self

    with pytest.raises(ValueError, match="a copy of the model shares its .* let its __deepcopy__ copy it"):
        escort.convert(pruned(Itself(lambda m, x: m.conv(x))), X)
    with pytest.raises(ValueError, match="the model: its attribute lock, a lock, cannot be copied.*; leave it out"):
        escort.convert(pruned(Model(lambda m, x: m.conv(x), lock=threading.Lock())), X)


def test_modules_that_were_fused_away_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    fast = escort.convert(model, X)
    with pytest.raises(AttributeError, match="a converted model has no 1: .*fused into others; use 1 of the original"):
        getattr(fast, "1")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda module: torch.jit.trace(module, X)], ids=["script", "trace"]
)
def test_torchscript_within_a_model_is_called(compiled: Callable[[nn.Module], nn.Module]) -> None:
    inner = compiled(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
    agrees(pruned(Model(lambda m, x: m.inner(m.conv(x)), inner=inner)), (X,), (WIDE,))


def test_a_model_that_is_one_convolution_is_named_once() -> None:
    with pytest.raises(ValueError, match=r"nothing to convert; layer conv: its input .*; add a batch dimension$"):
        escort.convert(nn.Conv2d(8, 8, 3).eval(), X[0])
