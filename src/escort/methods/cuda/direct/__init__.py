"""Method `direct` on CUDA: the convolution computed straight from the compressed filter (kernels/cuda/direct.cu).

As on the CPU, output positions are numbered row by row, and sample by sample, in a pitch that leaves room for the
padding. So any range of positions is a tile, and every nonzero reads its input at one constant distance (the Escoin
paper's stretched offsets, arXiv 1802.10280, section 3). A tile's input is copied to shared memory one block of channels
after the other, with its padding. Words of 16-bit storage hold the same position of two neighbouring samples, so that
every offset stays aligned.

`layout` has the knobs and the sequence of positions, `tables` lays a filter out, `params` fills the kernel's struct,
and `search` predicts which configs are worth timing. Shared memory bounds the kernel: it delivers one wavefront of 32
words per clock, and each nonzero takes a wavefront for every 32 positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import kernel, unavailable
from escort.cuda.launch import Grid
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.base import Method, Prepared, contiguous_only
from escort.methods.cuda.direct.layout import DirectConfig, Layout, Positions, most_samples, shared_bytes
from escort.methods.cuda.direct.params import Params, defines
from escort.methods.cuda.direct.search import has_room, is_offered, neighbours, predicted_clocks, search
from escort.methods.cuda.direct.tables import lay_out
from escort.methods.runner import runner
from escort.problem import Problem

_SOURCE = "direct.cu"
_CLOCK_MHZ = 1980.0  # of an H200
#: How much longer 16-bit types take than the model says: the median over the paper's layers (docs/results.md).
_SLOWER_IN_16_BITS = 1.24
#: Blocks along y; more tiles than these continue along z.
_MOST_TILES_Y = 32768


class DirectCuda(Method):
    """Our kernel for NVIDIA GPUs: fp32, fp16 and bf16; a TF32 problem is computed in fp32, which is more precise."""

    name = "direct"
    device_type = "cuda"
    config_type = DirectConfig

    def unsupported(self, problem: Problem) -> str | None:
        if reason := contiguous_only(problem):
            return reason
        if problem.batch > (most := most_samples(problem)):
            return f"the kernel addresses {most} samples of this size at most; use a smaller batch"
        if reason := unavailable(torch.device(problem.device)):
            return reason
        if not has_room(problem, Gpu.of(problem.device)):
            return "the input of the smallest tile, with its halo, does not fit into shared memory"
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DirectConfig]:
        return search(problem, sparse_filter, Gpu.of(problem.device))

    def offers(self, problem: Problem, sparse_filter: SparseFilter, config: DirectConfig) -> bool:
        return is_offered(problem, sparse_filter, Gpu.of(problem.device), config)

    def kernels(self, problem: Problem, config: DirectConfig) -> Sequence[Variant]:
        return (Variant(_SOURCE, defines(problem, config, Layout.of(problem, config.tile))),)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: DirectConfig | None = None
    ) -> float:
        packed = problem.precision == "fp16" if config is None else config.packed
        slower = _SLOWER_IN_16_BITS if problem.storage.itemsize == 2 else 1.0
        return slower * predicted_clocks(problem, sparse_filter, gpu, packed, config) / _CLOCK_MHZ

    def neighbours(
        self, config: DirectConfig, problem: Problem, sparse_filter: SparseFilter
    ) -> dict[str, list[DirectConfig]]:
        """For each knob, the configs that differ from `config` in it alone, as far as the device can run them."""
        return neighbours(config, problem, sparse_filter, Gpu.of(problem.device))

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: DirectConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device = torch.device(problem.device)
        positions, tables = Positions(problem), lay_out(problem, sparse_filter, config)
        layout = Layout.of(problem, config.tile)
        (variant,) = self.kernels(problem, config)
        compiled = kernel(variant.source, variant.defines, device)
        arrays = (tables.records, tables.segments.view(np.int32), tables.channel_of, tables.first_channels)
        on_device = [torch.from_numpy(array).to(device) for array in arrays]
        fixed = (
            activation.per_channel(problem, bias, slope),
            *on_device,
            pack(Params.of(problem, layout, tables, config)),
        )
        groups, tile = len(tables.first_channels), config.tile

        def cut(samples: int) -> tuple[Grid, int, int]:
            tiles = -(-positions.count(-(-samples // layout.samples_per_word)) // tile)
            return (groups, min(tiles, _MOST_TILES_Y), -(-tiles // _MOST_TILES_Y)), samples, tiles

        launch = compiled.bind_spread(
            config.threads,
            int(shared_bytes(layout, asdict(config), tables.record_bytes)),
            (torch.Tensor, torch.Tensor, torch.Tensor, *fixed, int, int),  # x, y, residual; samples, tiles
            blocks=math.prod(cut(problem.batch)[0]),
        )
        # The tables are there before any stream reads them. Other streams may be in a capture, and are not waited for.
        torch.cuda.current_stream(device).synchronize()
        alignment = 4 if layout.paired else problem.storage.itemsize  # the kernel reads two columns at once
        run = runner(problem, launch, cut, most_samples=most_samples(problem), alignment=alignment)
        return Prepared(run, binaries=(compiled.binary,))
