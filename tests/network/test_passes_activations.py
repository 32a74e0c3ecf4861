"""Activations that are written out become one operation, which is fused like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort.network.passes import activations
from escort.reference import compare
from tests.network.patterns import ON_CPU, SAMPLES, Net, traced

ONE = {
    "silu": [
        lambda y: y * y.sigmoid(),
        lambda y: torch.sigmoid(y) * y,
        lambda y: torch.mul(y, torch.sigmoid(y)),
        lambda y: y.sigmoid().mul_(y),
    ],
    "hardsigmoid": [
        lambda y: F.relu6(y + 3) / 6,
        lambda y: F.relu6(3.0 + y, inplace=True) / 6.0,
        lambda y: F.hardtanh(y + 3, 0.0, 6.0) * (1 / 6),
        lambda y: (y + 3).clamp(0, 6).div_(6),
        lambda y: (y + 3).clamp(min=0).clamp(max=6) / 6,
        lambda y: torch.div((y + 3).clamp_max(6).relu(), 6),
    ],
    "hardswish": [
        lambda y: y * F.relu6(y + 3) / 6,
        lambda y: y * (F.relu6(y + 3.0) / 6.0),
        lambda y: y.mul(F.relu6(y + 3.0).div(6.0)),
        lambda y: F.hardsigmoid(y) * y,
        lambda y: y * nn.functional.hardtanh(y + 3, 0, 6) * (1 / 6),
    ],
}
#: What looks alike and is something else, or may be.
OTHER: list[Callable[[Any], Any]] = [
    lambda y: y * (y + 1).sigmoid(),
    lambda y: (lambda gate: y * gate + gate)(y.sigmoid()),
    lambda y: y * y.sigmoid_(),
    lambda y: y.mul_(y.sigmoid()),
    lambda y: (lambda gate: y.add_(1.0) * gate)(y.sigmoid()),
    lambda y: (lambda gate: y[:, 0].add_(1.0).mean() + y * gate)(y.sigmoid()),
    lambda y: F.relu6(y + 2) / 6,
    lambda y: F.relu6(y + 3) / 5,
    lambda y: F.relu6(torch.add(y, 3, alpha=2)) / 6,
    lambda y: torch.div(F.relu6(y + 3), 6, rounding_mode="floor"),
    lambda y: F.hardtanh(y + 3) / 6,
    lambda y: (y + 3).clamp(min=0).clamp(min=1, max=6) / 6,
    lambda y: (y + 3).clamp(max=6) / 6,
    lambda y: (lambda shifted: F.relu6(shifted) / 6 + shifted)(y + 3),
    lambda y: (lambda gate: gate * F.relu6(y + 3) / 6)(y * 2),
    lambda y: y.add_(3).clamp(0, 6) / 6 + y,
]


def rewritten(pattern: Callable[[Any], Any]) -> list[str]:
    """The functions and methods that are called once the pass is done, which must compute the same."""
    net = Net(lambda net, x: pattern(net.conv(x)))
    graph = traced(net, SAMPLES)
    result, skipped = activations.rewrite(graph, ON_CPU)
    with torch.no_grad():
        assert compare(result(SAMPLES), net(SAMPLES)) < 1e-6 and not skipped
        assert compare(graph(SAMPLES), net(SAMPLES)) < 1e-6
    nodes = [node for node in result.graph.nodes if node.op in ("call_function", "call_method")]
    return [getattr(node.target, "__name__", str(node.target)) for node in nodes]


@pytest.mark.parametrize(
    ("pattern", "name"), [(pattern, name) for name, patterns in ONE.items() for pattern in patterns]
)
def test_what_is_written_out_becomes_one_operation(pattern: Callable[[Any], Any], name: str) -> None:
    assert rewritten(pattern) == [name]


@pytest.mark.parametrize("pattern", OTHER)
def test_what_is_something_else_stays(pattern: Callable[[Any], Any]) -> None:
    assert not {"silu", "hardsigmoid", "hardswish"} & set(rewritten(pattern))


def test_integers_have_no_such_activation() -> None:
    net = Net(lambda net, x: net.conv(x) + (lambda size: size * torch.sigmoid(size))(x[:1, :1].long()))
    result, _ = activations.rewrite(traced(net, SAMPLES), ON_CPU)
    assert torch.equal(result(SAMPLES), net(SAMPLES))


def test_a_step_with_a_hook_stays() -> None:
    net = Net(lambda net, x: (lambda y: y * net.gate(y))(net.conv(x)))
    net.gate = nn.Sigmoid()
    seen: list[Tensor] = []
    net.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    result, _ = activations.rewrite(traced(net, SAMPLES), ON_CPU)
    seen.clear()
    result(SAMPLES)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("activation", "name"), [(nn.SiLU(), "silu"), (nn.Hardsigmoid(), "hardsigmoid"), (nn.Hardswish(), "hardswish")]
)
def test_decomposed_programs(activation: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), activation).eval()
    program = torch.export.export(model, (SAMPLES,)).run_decompositions()
    result, _ = activations.rewrite(traced(program.module(), SAMPLES), ON_CPU)
    names = {getattr(node.target, "__name__", "") for node in result.graph.nodes}
    assert name in names and not {"mul.Tensor", "div.Tensor", "clamp.default", "add.Tensor"} & names
