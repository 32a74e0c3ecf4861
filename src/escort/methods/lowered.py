"""Method `lowered`: im2col and one sparse product per group, the paper's baseline (arXiv 1802.10280, section 2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from escort.methods.base import Runner, apply_epilogue
from escort.problem import Problem
from escort.sparse import StretchedCSR


@dataclass(frozen=True)
class LoweredConfig:
    """Nothing to tune."""


class Lowered:
    """Writes every input patch out as a column and multiplies the CSR filter with that matrix."""

    name = "lowered"
    device_type = "cpu"
    config_type = LoweredConfig

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def configs(self, problem: Problem, filter: StretchedCSR) -> Sequence[LoweredConfig]:
        return (LoweredConfig(),)

    def prepare(
        self, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, config: LoweredConfig
    ) -> Runner:
        rows, width = problem.out_channels // problem.groups, filter.shape[1] * filter.shape[2] * filter.shape[3]
        matrices = []
        for group in range(problem.groups):
            indptr = torch.from_numpy(filter.indptr[group * rows : (group + 1) * rows + 1])
            first, end = int(indptr[0]), int(indptr[-1])
            columns, values = (torch.from_numpy(a[first:end]) for a in (filter.columns, filter.values))
            with warnings.catch_warnings():  # torch calls its CSR tensors beta
                warnings.simplefilter("ignore", UserWarning)
                matrices.append(torch.sparse_csr_tensor(indptr - first, columns, values, (rows, width)))
        top, bottom, left, right = problem.padding
        out = problem.out_height, problem.out_width
        activation = problem.epilogue.activation

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            images = len(x)
            padded = F.pad(x, (left, right, top, bottom))
            patches = F.unfold(padded, problem.kernel, problem.dilation, stride=problem.stride)
            positions = images * patches.shape[2]
            columns = patches.view(images, problem.groups, width, patches.shape[2]).permute(1, 2, 0, 3)
            columns = columns.reshape(problem.groups, width, positions)
            y = torch.stack([matrix @ lowered for matrix, lowered in zip(matrices, columns, strict=True)])
            y = y.view(problem.out_channels, images, *out).transpose(0, 1).contiguous()
            if bias is not None:
                y += bias.view(-1, 1, 1)
            return apply_epilogue(y, residual, activation)

        return run
