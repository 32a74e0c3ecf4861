"""What code that meets a converted layer can read of it: the attributes of the convolution that it was made from."""

from __future__ import annotations

from torch import nn

from escort.planner.plan import Plan
from escort.problem import Activation


class ConvLike(nn.Module):
    """A layer with the attributes of ``nn.Conv2d`` that its plan's problem tells."""

    plan: Plan

    @property
    def in_channels(self) -> int:
        return self.plan.problem.in_channels

    @property
    def out_channels(self) -> int:
        return self.plan.problem.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.plan.problem.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        return self.plan.problem.stride

    @property
    def padding(self) -> tuple[int, ...]:
        """Zeros added on both sides of rows and columns; (top, bottom, left, right) where sides differ."""
        top, bottom, left, right = self.plan.problem.padding
        return (top, left) if (top, left) == (bottom, right) else (top, bottom, left, right)

    @property
    def dilation(self) -> tuple[int, int]:
        return self.plan.problem.dilation

    @property
    def groups(self) -> int:
        return self.plan.problem.groups

    @property
    def activation(self) -> Activation:
        return self.plan.problem.epilogue.activation

    @property
    def residual(self) -> bool:
        """Whether a residual is added to what it computes."""
        return self.plan.problem.epilogue.residual

    @property
    def padding_mode(self) -> str:
        return "zeros"

    @property
    def transposed(self) -> bool:
        return False

    @property
    def output_padding(self) -> tuple[int, int]:
        return (0, 0)
