"""Sparse linear layers as pointwise convolutions, and the dense ones as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import escort
from escort.network.check import Request
from tests.network.rewritten import ON_CPU, Rewritten, assert_same, converted, settled


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 3), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_size(in_features: int, out_features: int, batch: int, bias: bool, exported: bool) -> None:
    model = settled(nn.Sequential(nn.Linear(in_features, out_features, bias), nn.BatchNorm1d(out_features), nn.ReLU()))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
        model[0].weight[0] = 0.0
    zeros = 1.0 - int(model[0].weight.count_nonzero()) / model[0].weight.numel()
    result = Rewritten(
        model, torch.randn(max(batch, 1), in_features), torch.randn(batch, in_features), exported=exported
    )
    if zeros >= 0.7:
        assert result.rest == ["getitem", "getitem"] and result.convs["0"].activation == "relu"
    else:
        assert not result.convs


class Head(nn.Module):
    """Two sparse layers with a residual, a dense one, and one on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tokens = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.first, self.drop, self.norm = nn.Linear(8, 16), nn.Dropout(), nn.BatchNorm1d(16)
        self.second, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.conv(x).flatten(2).transpose(1, 2)).mean(1)
        x = self.drop(F.relu(self.norm(self.first(x))))
        return self.last(F.relu(self.second(x) + x))


def head() -> nn.Module:
    model = settled(Head(), density=0.1)
    with torch.no_grad():
        model.last.weight.fill_(0.5)
    return model


@pytest.mark.parametrize("exported", [False, True])
def test_a_head_fuses_as_convolutions_do(exported: bool) -> None:
    result = Rewritten(head(), torch.randn(2, 3, 6, 6), torch.randn(3, 3, 8, 5), exported=exported)
    epilogues = {name: (conv.residual, conv.activation) for name, conv in result.convs.items()}
    assert epilogues == {"conv": (False, "none"), "first": (False, "relu"), "second": (True, "relu")}
    assert result.rest.count("getitem") == 2 and len([name for name in result.rest if "inear" in name]) == 2


def test_a_function_and_what_the_user_skips() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(20, 30), nn.Linear(30, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(F.linear(bias=self.inner.bias, weight=self.inner.weight * 2, input=x).relu())

    request = Request(ON_CPU.device, "fp32", skip=lambda name, module: isinstance(module, nn.Linear))
    result = Rewritten(settled(Functional(), 0.1), torch.randn(2, 20), torch.randn(3, 20), request=request)
    assert set(result.convs) == {"inner"} and result.skipped == {"other": "you asked to skip it"}


@pytest.mark.parametrize("change", [lambda layer: layer.weight[0].fill_(torch.inf), lambda layer: layer.double()])
def test_what_no_sparse_method_could_run_stays_as_it_is(change: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 30)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).mean((2, 3)).to(self.linear.weight.dtype))

    model, x = settled(Net(), 0.1), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        change(model.linear)
    fast = escort.convert(model, x)
    assert set(fast.plan.layers) == {"conv"}
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), equal_nan=True)


@pytest.mark.usefixtures("always_faster", "direct_wins")
def test_a_whole_conversion(tmp_path: Path) -> None:
    inputs = [torch.randn(n, 3, h, w) for n, h, w in ((2, 6, 6), (1, 8, 5), (3, 4, 9), (0, 6, 6))]
    fast = converted(head(), inputs[0], tmp_path, *inputs[1:])
    assert set(fast.plan.layers) == {"conv", "first", "second"} and not fast.plan.skipped


@pytest.mark.usefixtures("always_faster")
def test_where_it_does_not_pay_it_stays_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = settled(nn.Sequential(nn.Linear(30, 20), nn.ReLU())), list[Any]()
    fast = escort.convert(model, torch.randn(2, 30), methods=["dense"])
    assert {plan.method for plan in fast.plan.layers.values()} == {"dense"}
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or linear(*args))
    monkeypatch.setattr(F, "conv2d", lambda *args: pytest.fail("a convolution of one pixel"))
    x = torch.randn(3, 30)
    with torch.no_grad():
        out = fast(x)
    assert len(calls) == 1
    monkeypatch.undo()
    assert_same(lambda _: out, model, x)
