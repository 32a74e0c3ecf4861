"""What every way to run a convolution offers the planner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch

from escort.problem import Problem
from escort.sparse import StretchedCSR


class Config(Protocol):
    """The tuning knobs of a method: a frozen dataclass of JSON values, so that a plan can store and compare it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Runner(Protocol):
    """A prepared convolution: x (N, C, H, W) and residual (N, K, out_height, out_width) to y like residual, any N."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


class Method(Protocol):
    """One way to run a problem.

    ``prepare`` does all work that depends on shapes and weights; the runner it returns only runs.
    """

    #: What plans and results call it. On each type of device a name means one method.
    name: str
    device_type: str
    config_type: type[Any]

    def unsupported(self, problem: Problem) -> str | None:
        """Why this method cannot run a problem on its type of device, or None where it can."""
        ...

    def configs(self, problem: Problem, filter: StretchedCSR) -> Sequence[Any]:
        """The search space for this problem, best guess first."""
        ...

    def prepare(self, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, config: Any) -> Runner:
        """A runner for this filter and input size, on the problem's device. bias: (K,) on any device, or None."""
        ...


def apply_epilogue(y: torch.Tensor, residual: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The epilogue behind the bias, by torch operators in place."""
    if residual is not None:
        if residual.shape != y.shape or residual.dtype is not y.dtype:
            raise ValueError(
                f"a residual is {y.dtype} of shape {tuple(y.shape)}, got {residual.dtype} {tuple(residual.shape)}"
            )
        y += residual
    if activation == "relu":
        return y.relu_()
    return y.clamp_(0.0, 6.0) if activation == "relu6" else y
