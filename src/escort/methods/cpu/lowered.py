"""Method `lowered`: im2col and one sparse product per group, the paper's baseline (arXiv 1802.10280, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from escort.filter import SparseFilter
from escort.methods.base import Method, Prepared, finisher
from escort.methods.lowering import csr_matrices, unfold
from escort.problem import Problem


@dataclass(frozen=True)
class LoweredConfig:
    """Nothing to tune."""


class Lowered(Method):
    """Writes every input patch out as a column and multiplies the CSR filter with that matrix."""

    name = "lowered"
    device_type = "cpu"
    config_type = LoweredConfig
    lowers = True

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[LoweredConfig]:
        return (LoweredConfig(),)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: LoweredConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        matrices = csr_matrices(sparse_filter)
        out = problem.out_height, problem.out_width
        finish = finisher(problem, slope)

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            samples = x.shape[0]
            columns = unfold(problem, x, by_sample=True).permute(1, 2, 0, 3).flatten(2)
            y = torch.stack([matrix @ lowered for matrix, lowered in zip(matrices, columns, strict=True)])
            y = y.view(problem.out_channels, samples, *out).transpose(0, 1).contiguous()
            if bias is not None:
                y += bias.view(-1, 1, 1)
            return finish(y, residual)

        return Prepared(run)
