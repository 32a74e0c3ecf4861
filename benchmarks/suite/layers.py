"""The layers that are measured: the paper's, and any shape with a random filter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.paper_layers import PAPER_LAYERS
from escort.filter import SparseFilter
from escort.problem import Precision, Problem


@dataclass(frozen=True)
class Layer:
    """One convolution to be measured: the problem, and the pruned filter.

    Attributes:
        weights: where the filter comes from: ``paper`` or the stem of a pattern file.
    """

    network: str
    weights: str
    name: str
    problem: Problem
    sparse_filter: SparseFilter


def paper_layers(
    batch: int | None, seed: int = 0, *, precision: Precision = "fp32", device: str = "cpu"
) -> list[Layer]:
    """The paper's 39 layers with nonzeros at random positions, as many as were published.

    Args:
        batch: samples; None for as many as the paper took for each network.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for entry in PAPER_LAYERS:
        problem = replace(entry.problem(batch or entry.batch), precision=precision, device=device)
        width = math.prod(problem.weight_shape[1:])
        nnz = round((1.0 - entry.sparsity) * problem.out_channels * width)
        positions = np.sort(rng.choice(problem.out_channels * width, nnz, replace=False))
        channels, columns = np.divmod(positions, width)
        indptr = np.searchsorted(channels, np.arange(problem.out_channels + 1))
        sparse_filter = filter_of(problem, indptr, columns, rng.standard_normal(nnz))
        layers.append(Layer(entry.network, "paper", entry.layer, problem, sparse_filter))
    return layers


def filter_of(problem: Problem, indptr: NDArray[Any], columns: NDArray[Any], values: NDArray[Any]) -> SparseFilter:
    """The problem's filter of a CSR matrix with a row per output channel."""
    parts = indptr.astype(np.int32), columns.astype(np.int32), values.astype(np.float32)
    return SparseFilter(problem.weight_shape, problem.groups, *parts)


@cache
def paper_layers_by_name(seed: int) -> dict[tuple[str, str], Layer]:
    """The paper's layers in fp32 at its batch sizes, by network and name."""
    return {(layer.network, layer.name): layer for layer in paper_layers(None, seed)}


def random_filter(problem: Problem, sparsity: float, seed: int) -> SparseFilter:
    """A filter for the problem with this share of zeros, at random positions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(problem.weight_shape, generator=generator)
    zeros = torch.randperm(weight.numel(), generator=generator)[: round(sparsity * weight.numel())]
    weight.view(-1)[zeros] = 0.0
    return SparseFilter.from_dense(weight, problem.groups)
