"""Programs that run natively give what they give step by step, and whatever is not known to runs so."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves

import escort
from escort.planner import timing
from escort.runtime import Program
from tests.network.models import Small, pruned


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """A function as a model, with layers and parameters that it is given."""

    def __init__(self, function: Callable[..., Any], **owned: Any) -> None:
        super().__init__()
        for name, value in owned.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def program_of(model: nn.Module) -> Program:
    return Program.of(fx.symbolic_trace(model.eval().requires_grad_(False)))


def converted(model: nn.Module, x: Tensor) -> Any:
    """The converted model by our kernel, whatever is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
        return escort.convert(model, x, methods=["direct"])


def same(output: Any, expected: Any, bound: float = 1e-5) -> None:
    (leaves, structure), (references, wanted) = tree_flatten(output), tree_flatten(expected)
    assert structure == wanted
    for leaf, reference in zip(leaves, references, strict=True):
        if isinstance(reference, Tensor):
            torch.testing.assert_close(leaf, reference, rtol=bound, atol=bound, equal_nan=True)
            assert leaf.stride() == reference.stride()
        else:
            assert leaf == reference


def check(program: Program, model: nn.Module, *inputs: Tensor) -> None:
    """The third call of a kind, the first that runs natively, and the one after it give what the model gives."""
    for _ in range(4):
        for x in inputs:
            given = x.clone()
            same(program(given), model(x.clone()))


def steps_left(program: Program) -> dict[int, str]:
    """The steps that do not run natively in the form that was made last, and why."""
    forms = program.native.stats()["forms"]
    assert forms, program.native.stats()
    return forms[-1]["reasons"]


def images(samples: int = 2, channels: int = 6, height: int = 9, width: int = 11) -> Tensor:
    return torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(samples + height))


def shuffled(x: Tensor) -> Tensor:
    samples, channels, height, width = x.shape
    return (
        x.view(samples, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(samples, -1, height, width)
    )


OPERATIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "relu": lambda m, x: F.relu(x),
    "relu of a method": lambda m, x: x.relu(),
    "relu6": lambda m, x: F.relu6(x),
    "leaky relu": lambda m, x: F.leaky_relu(x, 0.2),
    "sigmoid": lambda m, x: torch.sigmoid(x) + x.sigmoid(),
    "tanh": lambda m, x: torch.tanh(x),
    "silu": lambda m, x: F.silu(x),
    "gelu": lambda m, x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "hardswish": lambda m, x: F.hardswish(x) + F.hardsigmoid(x),
    "hardtanh": lambda m, x: F.hardtanh(x, -0.5, 0.25),
    "clamp": lambda m, x: x.clamp(-0.3, 0.7) + torch.clamp(x, min=0.1) + x.clamp(max=0.2) + x.clamp(0, 6),
    "activations as layers": lambda m, x: m.layers(x),
    "add": lambda m, x: x + F.relu(x) + 1.5,
    "subtract": lambda m, x: 2.0 - x - torch.sub(x, 1.0),
    "multiply": lambda m, x: x * 0.5 * torch.mul(x, x),
    "divide": lambda m, x: 1.0 / (x * x + 1) + torch.div(x, 3.0),
    "maximum": lambda m, x: torch.maximum(x, x * 2) - torch.minimum(x, x * 2),
    "a gate of planes": lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "a gate of rows": lambda m, x: x * F.relu(x[:, :, :, :1]) + x[:, :, :1],
    "a gate of channels": lambda m, x: F.relu(x) * torch.sigmoid(x[:, :1]),
    "scales": lambda m, x: x * m.scale + m.shift,
    "squeeze and excitation": lambda m, x: x * F.hardsigmoid(m.second(F.relu(m.first(F.adaptive_avg_pool2d(x, 1))))),
    "max pooling": lambda m, x: F.max_pool2d(x, 3, 2, 1) + m.pool(x),
    "average pooling": lambda m, x: F.avg_pool2d(x, 3, 2, 1) + m.average(x),
    "average pooling to the edge": lambda m, x: F.avg_pool2d(x, (2, 3), ceil_mode=True),
    "average pooling by a divisor": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive pooling": lambda m, x: F.adaptive_avg_pool2d(x, (4, 3)),
    "a mean": lambda m, x: x.mean((2, 3)) + torch.mean(x, dim=[-1, -2]) + F.adaptive_avg_pool2d(x, 1).flatten(1),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda m, x: F.interpolate(x, size=(5, 23)),
    "nearest exact": lambda m, x: F.interpolate(x, scale_factor=(1.7, 0.6), mode="nearest-exact"),
    "bilinear": lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False),
    "bilinear to a size": lambda m, x: F.interpolate(x, size=(4, 30), mode="bilinear"),
    "bilinear by corners": lambda m, x: F.interpolate(x, size=(17, 5), mode="bilinear", align_corners=True),
    "upsampling layers": lambda m, x: m.up(x) + m.up_nearest(x),
    "concatenation": lambda m, x: torch.cat([F.relu(x), x, x * 2], 1),
    "concatenation by a negative axis": lambda m, x: torch.cat((F.relu(x), x), dim=-3) + 1,
    "nested concatenation": lambda m, x: torch.cat([torch.cat([F.relu(x), x + 1], 1), F.relu(x * 2)], 1) * 2,
    "one part twice": lambda m, x: (lambda y: torch.cat([y, y], 1) + torch.cat([y, x], 1))(F.relu(x)),
    "chunks": lambda m, x: (lambda y: torch.cat([F.relu(y[1]), y[0]], 1))(torch.chunk(x + 1, 2, 1)),
    "split": lambda m, x: (lambda y: [y[0] * 2, y[1], F.relu(y[2])])(torch.split(F.relu(x), [1, 2, 3], 1)),
    "slices": lambda m, x: F.relu(x)[:, 2:5] * 2 + x[:, :3],
    "every second": lambda m, x: F.relu(x)[:, :, ::2, ::2] + 1,
    "channel shuffle": lambda m, x: shuffled(F.relu(x)) + F.channel_shuffle(x, 3),
    "pad": lambda m, x: F.pad(x, (1, 2, 3, 0)) + 1,
    "pad by a number": lambda m, x: F.pad(x, (1, 1), value=-2.0) + F.pad(x, (0, 2, -1, 1), "constant", 3.0)[:, :, :1],
    "pad as a layer": lambda m, x: m.pad(x),
    "linear": lambda m, x: m.head(x.flatten(1)) + m.head(torch.flatten(x, 1)) * 2,
    "linear by a function": lambda m, x: F.linear(F.relu(x), m.weight) + F.linear(x, m.weight, m.bias),
    "reshape": lambda m, x: F.relu(x.reshape(x.shape[0], -1)).view(-1, x.size(1), x.size(2) * x.size(3)) + 1,
    "a permuted reshape": lambda m, x: F.relu(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1) * 2,
    "permuted operands": lambda m, x: torch.cat([F.relu(x).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)], 1).relu(),
    "a residual": lambda m, x: (lambda y: F.relu(y * 2 + y))(F.relu(x)),
    "results of several kinds": lambda m, x: {"a": F.relu(x), "b": (x.shape[0], [x + 1, None]), "c": x.shape},
}


def net_for(name: str, x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    owned: dict[str, Any] = {
        "layers": nn.Sequential(
            *(nn.ReLU6(), nn.LeakyReLU(0.1), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.Tanh(), nn.Sigmoid()),
            *(nn.Hardsigmoid(), nn.Hardtanh(-0.2, 0.8), nn.ReLU(inplace=True)),
        ),
        "scale": torch.randn(6, 1, 1),
        "shift": torch.randn(1, 6, 1, 1),
        "first": nn.Conv2d(6, 3, 1),
        "second": nn.Conv2d(3, 6, 1),
        "pool": nn.MaxPool2d(3, 2, 1),
        "average": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        "up": nn.Upsample(scale_factor=3, mode="bilinear"),
        "up_nearest": nn.UpsamplingNearest2d(scale_factor=3),
        "pad": nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.ConstantPad2d(1, 0.5)),
        "head": nn.Linear(x[0].numel(), 5),
        "weight": torch.randn(7, x.shape[-1]),
        "bias": torch.randn(7),
    }
    return Net(OPERATIONS[name], **owned).eval()


#: What is computed in part by convolutions of torch, which are no part of a native program.
BY_TORCH = {"squeeze and excitation"}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name: str, samples: int) -> None:
    x = images(samples)
    model = net_for(name, x)
    program = program_of(model)
    check(program, model, x)
    assert set(steps_left(program).values()) <= ({"is a Conv2d"} if name in BY_TORCH else set())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_operations_on_threads(threads: int) -> None:
    x = images(2, 16, 70, 130)
    names = "sigmoid", "a gate of planes", "average pooling", "bilinear", "nearest", "pad", "channel shuffle", "linear"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in names:
            x = x[:, :6].contiguous() if name == "channel shuffle" else x
            model = net_for(name, x)
            program = program_of(model)
            check(program, model, x)
            assert not steps_left(program)
    finally:
        torch.set_num_threads(before)


SMALL = images(2, 3, 16, 16)


def test_steps_are_called_from_no_python() -> None:
    fast = converted(pruned(Small()), SMALL)
    expected = fast(SMALL)
    for _ in range(2):
        fast(SMALL)
    for module in fast.network.modules():
        if module is not fast.network:
            module.forward = None  # a call of a layer would fail
    assert torch.equal(fast(SMALL), expected)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_convolutions_give_the_same_bits(samples: int) -> None:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU6()
    fast, x = converted(pruned(nn.Sequential(*layers)), SMALL), images(samples, 3, 16, 16)
    by_step = copy.deepcopy(fast)
    by_step.network.native.enabled = False
    for _ in range(4):
        assert torch.equal(fast(x), by_step(x))
    assert not steps_left(fast.network) and by_step.network.native.stats()["eager"] == {"it is switched off": 4}
