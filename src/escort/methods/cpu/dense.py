"""Method `dense`: torch's own convolution on the dense filter, in the better of its two memory formats.

A pointwise convolution of one pixel is a linear layer, for which torch has something faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from escort.filter import SparseFilter
from escort.methods.base import Method, Prepared, finisher
from escort.methods.lowering import is_linear, symmetric_padding
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat, Problem


@dataclass(frozen=True)
class DenseConfig:
    """memory_format: in which the filter lies. Torch converts the input to it; the result is NCHW either way."""

    memory_format: MemoryFormat = "contiguous"


class Dense(Method):
    """The dense baseline, and the choice where sparsity does not pay."""

    name = "dense"
    is_dense = True
    device_type = "cpu"
    config_type = DenseConfig

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DenseConfig]:
        configs = DenseConfig("contiguous"), DenseConfig("channels_last")
        return configs[:1] if is_linear(problem) else configs

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: DenseConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        weight, finish = sparse_filter.to_dense(), finisher(problem, slope)
        if is_linear(problem):
            return Prepared(partial(_linear, weight.flatten(1), bias, finish))
        memory_format = TORCH_MEMORY_FORMAT[config.memory_format]
        weight = weight.contiguous(memory_format=memory_format)
        stride, dilation, groups = problem.stride, problem.dilation, problem.groups

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            x, padding = symmetric_padding(problem, x)
            x = x.contiguous(memory_format=memory_format)
            y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            return finish(y.contiguous(), residual)

        return Prepared(run)


def _linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    finish: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    y = F.linear(x.flatten(1), weight, bias)[:, :, None, None]
    return finish(y, residual)
