"""Max pooling by our kernel: wherever it computes the same, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from escort.layers import MaxPool2d
from escort.network.passes import pool
from tests.network.patterns import ON_CPU


class Pooling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pools(network: nn.Module) -> int:
    return sum(isinstance(module, MaxPool2d) for module in network.modules())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True),
        lambda x: F.max_pool2d(input=x, kernel_size=(3, 2), dilation=(1, 2)),
        lambda x: torch.max_pool2d(x, 3, 2),
        lambda x: torch.ops.aten.max_pool2d.default(x, [2, 2], [], [1, 1]),
    ],
)
def test_functions_become_modules(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 9, 11)
    network, left_alone = pool.rewrite(fx.symbolic_trace(Pooling(function)), ON_CPU)
    assert pools(network) == 1 and not left_alone
    assert torch.equal(network(x), function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x, x.shape[2] // 2),
        lambda x: F.avg_pool2d(x, 2),
    ],
)
def test_other_functions_stay(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 9, 11)
    network, _ = pool.rewrite(fx.symbolic_trace(Pooling(function)), ON_CPU)
    assert pools(network) == 0 and torch.equal(network(x), function(x))


@pytest.mark.parametrize("traced", [False, True])
def test_modules_are_replaced_where_they_stand(traced: bool) -> None:
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.MaxPool2d((2, 1), ceil_mode=True))
    x = torch.randn(2, 3, 17, 18)
    expected = model(x)
    network: nn.Module = model
    if traced:
        network, _ = pool.rewrite(fx.symbolic_trace(model), ON_CPU)
    else:
        pool.replace_modules(model)
    assert pools(network) == 2 and [name for name, _ in network.named_children()] == ["0", "1", "2", "3"]
    assert torch.equal(network(x), expected)


class Own(nn.MaxPool2d):
    """A subclass may compute anything."""


def hooked() -> nn.Module:
    module = nn.MaxPool2d(2)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("module", [nn.MaxPool2d(2, return_indices=True), Own(2), hooked()])
def test_modules_that_do_something_else_stay(module: nn.Module) -> None:
    network = nn.Sequential(module)
    pool.replace_modules(network)
    assert pools(network) == 0
