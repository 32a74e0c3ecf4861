"""Method `linear`: convolutions of one pixel, as in squeeze and excitation, by our kernel for matrices and vectors.

Every weight is multiplied, zeros as well: positions are what the vectors of `direct` hold, and here there is one. The
vectors of this kernel hold output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods.activation import slopes
from escort.methods.base import Method, Prepared, prepared_op
from escort.methods.lowering import is_linear
from escort.problem import Problem

_PITCH = 16  # floats that rows of weights are multiples of: a cache line


@dataclass(frozen=True)
class LinearConfig:
    """Nothing to tune."""


class Linear(Method):
    """Float32 on the CPU; pointwise, of one pixel, without groups."""

    name = "linear"
    device_type = "cpu"
    config_type = LinearConfig
    is_native = True

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision != "fp32":
            return f"computes in fp32, not in {problem.precision}"
        return None if is_linear(problem) else "it is for pointwise convolutions of one pixel, without groups"

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[LinearConfig]:
        return (LinearConfig(),)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: LinearConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        channels = problem.out_channels
        rows = torch.zeros(problem.in_channels + 2, -(-channels // _PITCH) * _PITCH)
        rows[:-2, :channels] = sparse_filter.to_dense().flatten(1).T
        for row, given in ((-2, bias), (-1, slopes(problem, slope))):
            if given is not None:
                rows[row, :channels] = given.detach()
        tables = {"weights": rows[:-2].numpy().ravel(), "bias": rows[-2].numpy(), "slope": rows[-1].numpy()}
        activation = problem.epilogue.activation_number
        return prepared_op(problem, _cpu.LinearConvolution(problem.in_channels, channels, activation, tables))
