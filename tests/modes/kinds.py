"""The kinds of models that are called in every mode: each as small as its kind allows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import escort
from tests.network.models import Branching, Small, pruned

#: Arguments by place, and arguments by name.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def pictures(samples: int, size: int = 16, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(100 * samples + size)
    return torch.randn(samples, channels, size, size, generator=generator) + 0.1


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.left(x) + self.right(y))


class ByName(nn.Module):
    """Takes a tensor by name only, and an option that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.conv(x) * scale
        return y if mask is None else y * mask


class Dictionary(nn.Module):
    """Returns a dict in which there may be nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"out": F.relu(y), "aux": None, "all": [y, (y + 1,)]}


class Mask(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer((torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def parametrized() -> nn.Module:
    model = pruned(Small())
    parametrize.register_parametrization(model.second, "weight", Mask(model.second.weight))
    return model.eval()


def double_result(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def shift_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 0.5, *args[1:])


def hooked() -> nn.Module:
    model = pruned(Small())
    model.register_forward_hook(double_result)
    model.first.register_forward_pre_hook(shift_input)
    model.second.register_forward_hook(double_result)
    return model


class Stateful(nn.Module):
    """Keeps the features of its last call, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last: Tensor | None = None
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.relu(self.conv(x)))
        y = h if self.last is None else h + self.last.mean()
        self.last = h.detach()
        self.seen += 1
        return y * self.seen


class Shared(nn.Module):
    """One convolution is called twice, at two sizes, and another one holds the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.tied = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(self.stem(x)))
        return self.tied(F.max_pool2d(F.relu(self.conv(y) + y), 2)) + F.avg_pool2d(self.conv(y), 2)[:, :, 1:-1, 1:-1]


class WithHead(nn.Module):
    """A frozen body, and a head that is in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = pruned(Small()), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def with_head() -> nn.Module:
    model = WithHead().train()
    model.body.requires_grad_(False).eval()
    return model


def convert_body(model: nn.Module, inputs: Inputs) -> nn.Module:
    fast = copy.deepcopy(model)
    fast.body = convert_whole(model.body, inputs)
    return fast.train()


def convert_whole(model: nn.Module, inputs: Inputs) -> nn.Module:
    fast = escort.convert(model, *inputs, methods=["direct"])
    assert {plan.method for plan in fast.plan.layers.values()} == {"direct"} and not fast.plan.kept_dense
    return fast


def sequential() -> nn.Module:
    return pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, stride=2)))


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        make: makes the original, the same each time.
        inputs: makes inputs of so many samples of a size.
        is: what about it decides in which modes it can be called: "branching", "stateful", "none" (returns None
            somewhere), "dict" or "named" (takes arguments by name only).
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs] = lambda samples, size: ((pictures(samples, size),), {})
    convert: Callable[[nn.Module, Inputs], nn.Module] = convert_whole
    traits: frozenset[str] = frozenset()

    def original(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    @property
    def example(self) -> Inputs:
        return self.inputs(2, 16)

    @property
    def others(self) -> list[Inputs]:
        """Another batch, and another size."""
        return [self.inputs(3, 16), self.inputs(1, 22)]


def _two(samples: int, size: int) -> Inputs:
    return (pictures(samples, size), pictures(samples, size, 4)), {}


def _named(samples: int, size: int) -> Inputs:
    mask = (pictures(samples, size, 1) > 0).float()
    return (pictures(samples, size),), {"mask": mask, "scale": 2.0}


KINDS = (
    Kind("sequential", sequential),
    Kind("residual", lambda: pruned(Small())),
    Kind("multi-input", lambda: pruned(TwoInputs()), _two),
    Kind("keyword arguments", lambda: pruned(ByName()), _named, traits=frozenset({"named"})),
    Kind("dict and None", lambda: pruned(Dictionary()), traits=frozenset({"none"})),
    Kind("untraceable", lambda: pruned(Branching()), traits=frozenset({"branching"})),
    Kind("parametrized", parametrized),
    Kind("hooked", hooked),
    Kind("stateful", lambda: pruned(Stateful()), traits=frozenset({"stateful"})),
    Kind("shared layers", lambda: pruned(Shared())),
    Kind("part of a model in training", with_head, convert=convert_body, traits=frozenset({"training"})),
)
