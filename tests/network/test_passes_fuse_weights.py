"""Fusing: which weights a convolution has that computes them, is a function, or shares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from escort.layers import FusedConv2d
from escort.network.passes import fuse
from tests.network.patterns import ON_CPU, SAMPLES, Fused, Net, masked, traced


def masked_twice(net: Net) -> None:
    prune.l1_unstructured(net.conv, "weight", amount=0.5)
    prune.ln_structured(net.conv, "weight", amount=3, n=2, dim=0)


def masked_then_trained(net: Net) -> None:
    prune.l1_unstructured(net.conv, "weight", amount=0.5)
    net.conv.weight_orig.data.mul_(2.0)  # conv.weight is stale until the next forward


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    "change",
    [
        masked,
        masked_twice,
        masked_then_trained,
        lambda net: parametrize.register_parametrization(net.conv, "weight", Halved()),
        lambda net: parametrizations.weight_norm(net.conv),
        lambda net: parametrizations.spectral_norm(net.conv).eval(),
    ],
)
@pytest.mark.parametrize("exported", [False, True])
def test_the_weight_in_effect_is_taken(change: Callable[[Net], Any], exported: bool) -> None:
    net = Net(lambda net, x: net.relu(net.conv(x)))
    change(net)
    expected = net(SAMPLES)
    model = torch.export.export(net, (SAMPLES,)).module() if exported else net
    network, skipped = fuse.rewrite(traced(model, SAMPLES), ON_CPU)
    torch.testing.assert_close(network(SAMPLES), expected)
    assert not skipped and isinstance(network.conv, FusedConv2d) and network.conv.activation == "relu"
    effective = F.conv2d(SAMPLES, network.conv.conv.weight, network.conv.conv.bias, padding=1).relu()
    torch.testing.assert_close(effective, expected)
    assert set(network.state_dict()) == {"conv.conv.weight", "conv.conv.bias"}


class Standardized(nn.Conv2d):
    """A subclass with a forward of its own, which computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(4, 2, 3, 2))
        self.inner.bias = nn.Parameter(torch.randn(4))
        self.standardized = Standardized(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(x, self.kernel, stride=2, padding="valid").relu()
        x = F.conv2d(x, weight=self.inner.weight, bias=self.inner.bias, padding=(2, 1), dilation=(2, 1), groups=2)
        return F.relu6(self.standardized(x))


def test_functional_convolutions() -> None:
    result = Fused(Functional(), torch.randn(2, 3, 19, 17), others=(torch.randn(1, 3, 20, 21),))
    assert result.epilogues == {"kernel": (False, "relu"), "inner": (False, "none"), "standardized": (False, "relu6")}
    assert not result.rest and len(result.network.state_dict()) == 5


def test_a_weight_with_other_uses_stays_where_it_is() -> None:
    net = Net(lambda net, x: net.conv(x) * net.conv.weight.sum() + F.conv2d(x, net.conv.weight, padding=1))
    result = Fused(net, SAMPLES)
    assert set(result.convs) == {"conv_1", "conv_2"}
    assert set(result.network.state_dict()) >= {"conv.weight"}


# Tracing
class WithOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.conv(x)
        return y * scale if mask is None else y * mask


def test_optional_arguments_are_fixed_at_what_the_example_says() -> None:
    assert set(Fused(WithOptions(), SAMPLES).convs) == {"conv"}
    assert set(Fused(WithOptions(), SAMPLES, torch.randn(8, 7)).convs) == {"conv"}
