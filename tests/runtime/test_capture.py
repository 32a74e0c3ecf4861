"""Which programs may be captured, and why others may not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from benchmarks.networks import NETWORKS
from escort.runtime import Program, not_capturable
from escort.runtime.saved.operations import OPERATIONS
from escort.runtime.steps import Input, Listing, Method, Step
from escort.runtime.templates import Slot
from tests.network.models import Small, pruned


class Calls(nn.Module):
    """Calls a function on a convolution's result, its input and a buffer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), function
        self.register_buffer("kept", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x), x, self.kept)


def program_of(model: nn.Module) -> Program:
    return Program.of(fx.symbolic_trace(model.eval()))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x, kept: F.relu(y, inplace=True).flatten(1).add_(1.0),
        lambda y, x, kept: (x * 2.0).mul_(3.0) + y.mean(),
        lambda y, x, kept: torch.cat([x, x], 1).clamp_(0.0) if x is not None else y,
        lambda y, x, kept: y.view(x.shape[0], -1, 1, 1).expand(-1, -1, 2, 2).mean((2, 3), True),
        lambda y, x, kept: torch.arange(4, device=x.device) + y.mean(),
        lambda y, x, kept: F.batch_norm(y, kept, kept, None, None, False),
        lambda y, x, kept: F.instance_norm(y),
        lambda y, x, kept: F.dropout(y, 0.5, False) + torch.zeros_like(y),
        lambda y, x, kept: (y > 0) & (y < 1),
        lambda y, x, kept: y.to(torch.float64),
        lambda y, x, kept: F.interpolate(y, scale_factor=2.0),
    ],
)
def test_what_does_the_same_in_each_call(function: Callable[..., Any]) -> None:
    assert not_capturable(program_of(Calls(function))) is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda y, x, kept: F.dropout(y, 0.5, True), "draws random numbers"),
        (lambda y, x, kept: F.scaled_dot_product_attention(y, y, y, None, 0.1), "draws random numbers"),
        (lambda y, x, kept: torch.rand_like(y), "rand_like.* is not known"),
        (lambda y, x, kept: torch.nonzero(y), "nonzero.* is not known"),
        (lambda y, x, kept: y.mean().item(), "item.* is not known"),
        (lambda y, x, kept: y.cpu(), "another device"),
        (lambda y, x, kept: y.to("cuda:7"), "another device"),
        (lambda y, x, kept: y.to(torch.device("meta")), "another device"),
        (lambda y, x, kept: y.to("cpu", torch.float32, True), "another device"),
        (lambda y, x, kept: F.batch_norm(y, kept, kept, None, None, True), "may write to its statistics"),
        (lambda y, x, kept: F.instance_norm(y, kept, kept), "may write to its statistics"),
        (lambda y, x, kept: F.relu(x, inplace=True), "writes to an input"),
        (lambda y, x, kept: F.relu(x, True), "writes to an input"),
        (lambda y, x, kept: x.view(-1).add_(1.0), "writes to an input"),
        (lambda y, x, kept: x.contiguous().chunk(2)[1].clamp_(0.0), "writes to an input"),
    ],
)
def test_what_may_do_something_else(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(not_capturable(program_of(Calls(function))))


def layer(module: nn.Module) -> Program:
    return Program(Listing((Input("x"),), (Step("layer", "a", (Slot(0),)),), Slot(1)), {"a": module.eval()})


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def hooked() -> nn.Module:
    module = nn.Conv2d(3, 3, 1)
    module.register_forward_hook(lambda *_: None)
    return module


def on_another_device() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, device="meta"))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: layer(Own()), "layer a is a Own"),
        (lambda: layer(nn.LSTM(3, 3)), "layer a is a LSTM"),
        (lambda: layer(hooked()), "layer a runs code besides its own"),
        (lambda: layer(nn.ReLU(inplace=True)), "a.* writes to an input"),
        (lambda: layer(nn.Embedding(3, 3, max_norm=1.0)), "layer a writes to its weight"),
        (lambda: layer(on_another_device()), "a.1.weight is on another device than a.0.weight"),
        (lambda: Own(), "the model could not be traced as a whole"),
    ],
)
def test_layers_that_may_do_something_else(network: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(not_capturable(network()))


def test_a_layer_in_training_and_a_network_with_hooks() -> None:
    program = program_of(pruned(Small()))
    assert not_capturable(program) is None
    program.get_submodule("norm").train()
    assert not_capturable(program) == "layer norm is in training mode"
    program.get_submodule("norm").eval()
    program.register_forward_pre_hook(lambda *_: None)
    assert not_capturable(program) == "the network has hooks"


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_are_captured(name: str) -> None:
    with torch.device("meta"):
        assert not_capturable(program_of(NETWORKS[name].factory())) is None


def test_an_operation_that_is_new_in_files_was_thought_of_here() -> None:
    """Before this number changes: does it wait for the GPU, draw numbers, keep a state, or may it give back a view?"""
    names = {name.split(".")[3 if "aten" in name else -1] for name in OPERATIONS}
    assert len(names) == 320, sorted(names)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Step("call", Method("nonzero"), (Slot(0),))], "nonzero.* is not known"),
        ([Step("call", torch.arange, (4,))], "arange.* makes a tensor on another device"),
        ([Step("tensor", "kept"), Step("call", Method("add_"), (Slot(1), 1.0))], "to what the network keeps"),
        ([Step("call", Method("contiguous"), (Slot(0),)), Step("call", operator.iadd, (Slot(1), 1.0))], "an input"),
    ],
)
def test_steps_that_may_do_something_else(steps: list[Step], reason: str) -> None:
    program = Program(Listing((Input("x"),), tuple(steps), Slot(1)), {"kept": torch.ones(3)})
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(not_capturable(program))
