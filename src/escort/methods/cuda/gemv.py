"""Method `gemv`: our dense kernel for convolutions of one pixel, as in squeeze-excitation and classifiers.

Few samples times a matrix: reading the weights bounds it, and the time of a launch (kernels/cuda/gemv.cu).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import kernel, unavailable
from escort.cuda.launch import Grid
from escort.cuda.params import STORAGE, pack
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.base import Method, Prepared
from escort.methods.runner import runner
from escort.methods.sharing import dense_weight
from escort.problem import Problem

_THREADS, _WARPS = 256, 8  # of a block
_MOST_ACROSS = 65535  # blocks of a grid along its second axis
# Fitted to eight layers on an H200 (docs/notes/planes.md).
_BYTES_PER_US, _PRODUCTS_PER_CLOCK, _CLOCK_MHZ, _LEAST_US = 3.4e6, 30.0, 1755.0, 2.2


@dataclass(frozen=True)
class GemvConfig:
    """The knob of the kernel.

    Attributes:
        samples: that a warp computes, for which it reads its weights once.
    """

    samples: int


class Gemv(Method):
    """Maps of one pixel, in any precision; sums are in fp32."""

    name = "gemv"
    device_type = "cuda"
    config_type = GemvConfig

    def unsupported(self, problem: Problem) -> str | None:
        sizes = (problem.height, problem.width, *problem.kernel_size)
        if sizes != (1, 1, 1, 1) or any(problem.padding):
            return "it takes maps and filters of one pixel"
        if problem.groups > 1:
            return "groups must be 1"
        return unavailable(torch.device(problem.device))

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[GemvConfig]:
        return tuple(map(GemvConfig, (1, 8) if problem.batch == 1 else (8, 1)))

    def kernels(self, problem: Problem, config: GemvConfig) -> Sequence[Variant]:
        macros: dict[str, int | str] = {
            "STORAGE": STORAGE[problem.storage],
            "VECTOR": _vector(problem),
            "SAMPLES": config.samples,
        }
        return (Variant("gemv.cu", macros | activation.macros(problem.epilogue)),)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: GemvConfig | None = None
    ) -> float:
        """What the weights take that each warp reads, or the products."""
        config = config or self.configs(problem, sparse_filter)[0]
        weights, reads = math.prod(problem.weight_shape), -(-problem.batch // config.samples)
        memory_us = weights * problem.storage.itemsize * max(reads / 2, 1.0) / _BYTES_PER_US  # again out of the L2
        products = weights * reads * config.samples
        return _LEAST_US + max(memory_us, products / (_PRODUCTS_PER_CLOCK * gpu.multiprocessors * _CLOCK_MHZ))

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: GemvConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device, samples_of_warp = torch.device(problem.device), config.samples
        (variant,) = self.kernels(problem, config)
        compiled = kernel(variant.source, variant.defines, device)
        weights = dense_weight(problem, sparse_filter, torch.contiguous_format)
        fixed = weights, activation.per_channel(problem, bias, slope), pack(Params.of(problem))
        launch = compiled.bind(_THREADS, 0, (*[torch.Tensor] * 3, *fixed, int), overlap=True)
        torch.cuda.current_stream(device).synchronize()  # other streams may read the tables
        blocks = -(-problem.out_channels // _WARPS)

        def cut(samples: int) -> tuple[Grid, int]:
            return (blocks, -(-samples // samples_of_warp), 1), samples

        run = runner(
            *(problem, launch, cut),
            most_samples=_MOST_ACROSS * samples_of_warp,
            alignment=_vector(problem) * problem.storage.itemsize,
        )
        return Prepared(run, binaries=(compiled.binary,))


def _vector(problem: Problem) -> int:
    """How many neighbouring channels a lane reads at once."""
    return math.gcd(problem.in_channels, 16 // problem.storage.itemsize)


@dataclass(frozen=True)
class Params:
    """The kernel's parameters that are the same in every launch: the fields of its struct, in their order.

    Attributes:
        in_channels, out_channels: of the problem.
        bound: 0 none, 1 ReLU, 2 ReLU6.
    """

    in_channels: int
    out_channels: int
    bound: int

    @classmethod
    def of(cls, problem: Problem) -> Params:
        return cls(problem.in_channels, problem.out_channels, activation.bound(problem.epilogue))
