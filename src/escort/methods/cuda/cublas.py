"""Method `cublas`: im2col and dense products by cuBLAS, a baseline of the paper (arXiv 1802.10280, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from escort.filter import SparseFilter
from escort.methods.base import Method, Prepared, contiguous_only, finisher
from escort.methods.lowering import unfold
from escort.methods.precision import float32_products
from escort.methods.sharing import shared
from escort.problem import Problem


@dataclass(frozen=True)
class CublasConfig:
    """How the batch is cut.

    Attributes:
        unfold: "at_once" writes the columns of all samples by one kernel, "by_sample" by one kernel per sample.
        product: "by_sample" multiplies each sample's columns where they lie and writes NCHW, all samples in one batched
            call. "by_group" moves them side by side for one large product per group, and its result back to NCHW.
    """

    unfold: Literal["at_once", "by_sample"] = "at_once"
    product: Literal["by_sample", "by_group"] = "by_sample"


class Cublas(Method):
    """Writes every input patch out as a column and multiplies the dense filter with that matrix."""

    name = "cublas"
    device_type = "cuda"
    config_type = CublasConfig
    lowers = True

    def unsupported(self, problem: Problem) -> str | None:
        return contiguous_only(problem)

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CublasConfig]:
        """Lowering as torch alone does it: a batched ``F.unfold``, then one product per group."""
        return (CublasConfig("by_sample", "by_group"),)

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CublasConfig]:
        return CublasConfig("at_once", "by_sample"), CublasConfig("at_once", "by_group")

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: CublasConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device, dtype = torch.device(problem.device), problem.storage
        channels = problem.out_channels // problem.groups
        weight, _ = shared(
            sparse_filter,
            (self.name, device, dtype),
            lambda: (sparse_filter.to_dense().view(problem.groups, channels, -1).to(device, dtype), None),
        )
        addend = None if bias is None else bias.detach().to(device, dtype).view(-1, 1, 1)
        out_shape, finish = problem.output_shape[1:], finisher(problem, slope)
        groups, positions, precision = problem.groups, problem.out_height * problem.out_width, problem.precision
        by_sample, by_group = config.unfold == "by_sample", config.product == "by_group"

        def multiply_by_sample(columns: torch.Tensor) -> torch.Tensor:
            samples = len(columns)
            y = columns.new_empty(samples, groups, channels, positions)
            for group in range(groups):
                filters = weight[group].expand(samples, -1, -1)
                torch.bmm(filters, columns[:, group], out=y[:, group])
            y = y.view(samples, *out_shape)
            return y if addend is None else y.add_(addend)

        def multiply_by_group(columns: torch.Tensor) -> torch.Tensor:
            samples = len(columns)
            side_by_side = columns.permute(1, 2, 0, 3).flatten(2)
            y = columns.new_empty(groups, channels, samples * positions)
            torch.bmm(weight, side_by_side, out=y)
            y = y.view(out_shape[0], samples, *out_shape[1:]).transpose(0, 1)
            # One pass over y adds the bias and moves it.
            return y.contiguous() if addend is None else torch.add(y, addend, out=y.new_empty(y.shape))

        multiply = multiply_by_group if by_group else multiply_by_sample

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            if x.shape[0] == 0:
                return finish(x.new_empty(0, *out_shape), residual)
            with float32_products(precision):
                y = multiply(unfold(problem, x, by_sample=by_sample))
            return finish(y, residual)

        return Prepared(run)
