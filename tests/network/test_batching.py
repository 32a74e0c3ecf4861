"""Depth first: the same numbers in parts, and only where samples do not mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import escort
from benchmarks.networks import NETWORKS
from escort.network import batching
from escort.planner import timing
from escort.runtime import Program
from tests.network.models import Small, pruned


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(2, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) if self.function is not torch.mul else x * self.scale


@pytest.mark.parametrize("name", [name for name in NETWORKS])
def test_the_networks_keep_samples_apart(name: str) -> None:
    assert batching.mixing(Program.of(fx.symbolic_trace(NETWORKS[name].factory(num_classes=4).eval()))) is None


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
    assert "may mix samples" in str(batching.mixing(Program.of(fx.symbolic_trace(Lambda(function)))))


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
def test_what_keeps_samples_apart_gives_the_same_in_parts(function: Callable[[Any], Any]) -> None:
    network = Program.of(fx.symbolic_trace(Lambda(function)))
    assert batching.mixing(network) is None
    x = torch.randn(7, 3, 4, 4)
    for samples in (1, 2, 7, 9):
        assert torch.equal(batching.run_in_parts(network, x, samples), network(x))


def test_every_output_is_joined() -> None:
    first, (second,) = batching.run_in_parts(lambda x: (x, [2 * x]), torch.arange(5.0), 2)
    assert first.tolist() == [0, 1, 2, 3, 4] and second.tolist() == [0, 2, 4, 6, 8]


def test_conversion_takes_the_fastest_way_through_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(runs: Any, **_: Any) -> list[float]:
        for run in runs:
            run()
        return [9.0, 5.0, 3.0, 4.0][: len(runs)] if len(runs) == 4 else [1.0] * len(runs)

    monkeypatch.setattr(timing, "race", race)
    model = pruned(Small())
    x = torch.randn(4, 3, 12, 12)
    fast = escort.convert(model, x)  # the original, the batch at once, one sample at a time, two at a time
    assert (fast.plan.samples, fast.plan.converted_time_us) == (1, 3.0)
    for batch in (1, 4, 6):
        x = torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
