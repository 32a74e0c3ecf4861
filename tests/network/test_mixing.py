"""Samples are computed apart from each other only where they do not mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from benchmarks.networks import NETWORKS
from escort import layers
from escort.network import mixing
from escort.runtime import Program


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(2, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) if self.function is not torch.mul else x * self.scale


def test_every_layer_of_a_converted_network_keeps_samples_apart() -> None:
    for name in set(layers.__all__) - {"LAUNCHING", "OnPlanes"}:
        kind = getattr(layers, name)
        assert issubclass(kind, (layers.OnPlanes, *mixing._MODULES)), name


@pytest.mark.parametrize("name", [name for name in NETWORKS])
def test_the_networks_keep_samples_apart(name: str) -> None:
    assert mixing.mixing(Program.of(fx.symbolic_trace(NETWORKS[name].factory(num_classes=4).eval()))) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x - x.mean(),
        lambda x: x.flatten(),
        lambda x: torch.flatten(x),
        lambda x: torch.cat((x, x)),
        lambda x: x.view(x.size(0) // 2, -1),
        lambda x: F.softmax(x, 0),
        lambda x: x.flip(0),
        lambda x: x.sum((0, 1)),
        lambda x: x[:1],
        lambda x: x[None],
        lambda x: torch.permute(x, (1, 0, 2, 3)),
        lambda x: torch.unflatten(x, 0, (-1, 1)),
        lambda x: x[0],
        lambda x: torch.split(x, 1)[0],
        lambda x: torch.split(x, 1, 1)[0][0],
        lambda x: x.chunk(2)[1],
        torch.mul,
    ],
)
def test_what_may_mix_samples_is_refused(function: Callable[[Any], Any]) -> None:
    assert "may mix samples" in str(mixing.mixing(Program.of(fx.symbolic_trace(Lambda(function)))))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.flatten(x, 1) + 1.0,
        lambda x: torch.cat((x, F.relu(x)), dim=1) * 0.5,
        lambda x: torch.flatten(torch.permute(x[:, :, None, :-1], (0, 2, 1, 4, 3)), 2, 3)[:, 0],
        lambda x: torch.pixel_shuffle(torch.cat((x, x, x, x), 1), 2),
        lambda x: torch.unflatten(x, 1, (3, 1)).mean(2),
        lambda x: torch.cat((x.split(1, 1)[1], torch.chunk(x, 3, dim=1)[0]), dim=2),
        lambda x: F.interpolate(x, scale_factor=2.0),
    ],
)
def test_what_keeps_samples_apart_gives_the_same_alone(function: Callable[[Any], Any]) -> None:
    network = Program.of(fx.symbolic_trace(Lambda(function)))
    assert mixing.mixing(network) is None
    x = torch.randn(7, 3, 4, 4)
    assert torch.equal(torch.cat([network(sample) for sample in x.split(1)]), network(x))
