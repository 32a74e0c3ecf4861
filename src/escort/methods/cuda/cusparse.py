"""Method `cusparse`: im2col and sparse products by cuSPARSE, a baseline of the paper (arXiv 1802.10280, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from escort.filter import SparseFilter
from escort.methods.base import Method, Prepared, contiguous_only, finisher
from escort.methods.lowering import csr_matrices, unfold
from escort.problem import Problem


@dataclass(frozen=True)
class CusparseConfig:
    """unfold: "at_once" writes the columns of all samples by one kernel, "by_sample" by one kernel per sample."""

    unfold: Literal["at_once", "by_sample"] = "at_once"


class Cusparse(Method):
    """Writes every input patch out as a column and multiplies the CSR filter with that matrix, once per group.

    Torch multiplies a CSR matrix by cuSPARSE's SpMM. It copies nothing when it is given an output to overwrite.
    """

    name = "cusparse"
    device_type = "cuda"
    config_type = CusparseConfig
    lowers = True

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision == "tf32":
            return "cuSPARSE's CSR product knows no TF32; ask for fp32"
        return contiguous_only(problem)

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CusparseConfig]:
        """Lowering as torch alone does it: a batched ``F.unfold``, then one product per group."""
        return (CusparseConfig("by_sample"),)

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CusparseConfig]:
        return (CusparseConfig(),)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: CusparseConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device, dtype = torch.device(problem.device), problem.storage
        matrices = csr_matrices(sparse_filter, device, dtype)
        addend = None if bias is None else bias.detach().to(device, dtype).view(-1, 1, 1)
        out_shape, finish = problem.output_shape[1:], finisher(problem, slope)
        channels, by_sample = problem.out_channels // problem.groups, config.unfold == "by_sample"

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            samples = x.shape[0]
            if samples == 0:
                return finish(x.new_empty(0, *out_shape), residual)
            columns = unfold(problem, x, by_sample=by_sample).permute(1, 2, 0, 3).flatten(2)
            y = x.new_empty(len(matrices), channels, columns.shape[2])
            for matrix, lowered, product in zip(matrices, columns, y, strict=True):
                torch.addmm(product, matrix, lowered, beta=0, out=product)
            y = y.view(out_shape[0], samples, *out_shape[1:]).transpose(0, 1)
            # One pass over y adds the bias and moves it.
            y = y.contiguous() if addend is None else torch.add(y, addend, out=y.new_empty(y.shape))
            return finish(y, residual)

        return Prepared(run)
