"""Method `direct`: the convolution computed straight from the compressed filter by our own kernel.

`layout.py` cuts a sample into tiles, `schedule.py` sorts the filter, and kernels/cpu/direct.cpp walks their tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods.base import Method, Prepared, input_check
from escort.methods.cpu.direct.layout import Layout, Records, records
from escort.methods.cpu.direct.schedule import Schedule
from escort.problem import Problem

#: name -> (floats per vector, largest tile in vectors), fastest first.
ISAS: dict[str, tuple[int, int]] = {name: (lanes, vectors) for name, lanes, vectors in _cpu.isas()}

#: The struct of kernels/cpu/direct.hpp, which says what the fields mean.
PARAMS = np.dtype(
    [
        *((name, "i8") for name in ("stage_size", "partial_size")),
        *((f"{tensor}_{unit}_stride", "i8") for tensor in "xy" for unit in ("sample", "plane")),
        *((name, "i4") for name in ("column_stride", "channel_stride", "in_place", "activation")),
    ]
)

_CACHE_FLOATS = 6 * 1024  # of a 32 KiB level-1 cache, leaving room for the filter stream and the partial sums


@dataclass(frozen=True)
class DirectConfig:
    """The knobs of the direct kernel.

    Attributes:
        isa: instruction set, a key of :data:`ISAS`.
        vectors: largest tile, in vectors of that instruction set.
        channel_block: input channels that are staged and accumulated at a time.
        parts: shares into which the output channels of a group are cut, to feed threads where tiles are few.
    """

    isa: str
    vectors: int
    channel_block: int
    parts: int = 1


class Direct(Method):
    """Our kernel: float32 on the CPU, every shape."""

    name = "direct"
    device_type = "cpu"
    config_type = DirectConfig

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.precision == "fp32" else f"computes in fp32, not in {problem.precision}"

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DirectConfig]:
        channels = sparse_filter.shape[1]
        configs: dict[DirectConfig, None] = {}  # in order, each once
        for isa in [name for name in ISAS if name != "generic"] or ["generic"]:
            lanes, most = ISAS[isa]
            for vectors in (most, most // 2):
                layout = Layout.of(problem, lanes, vectors)
                # At least a task per thread for a single sample, so that the plan serves every batch. Four per thread
                # balance better, but each part stages its input anew.
                tasks, most_parts = problem.groups * len(layout.tiles), problem.out_channels // problem.groups
                few, many = (min(-(-n * torch.get_num_threads() // tasks), most_parts) for n in (1, 4))
                fits = max(_CACHE_FLOATS // (layout.vectors * lanes if layout.in_place else layout.channel_stride), 1)
                for block, parts in ((fits, few), (2 * fits, few), (4 * fits, few), (fits // 2, few), (fits, many)):
                    # Blocks of equal size: a last one of a few channels would cost as much as a full one.
                    blocks = -(-channels // min(max(block, 1), channels))
                    configs[DirectConfig(isa, vectors, -(-channels // blocks), parts)] = None
        return tuple(configs)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: DirectConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        lanes, most = ISAS[config.isa]
        layout = Layout.of(problem, lanes, min(config.vectors, most))
        if problem.epilogue.activation == "leaky_relu":
            slope = torch.full((problem.out_channels,), problem.epilogue.negative_slope)
        schedule = Schedule.of(sparse_filter, layout, bias, config.channel_block, config.parts, slope)
        tables = {
            "params": _params(problem, layout, schedule, config),
            "nonzeros": schedule.nonzeros,
            "out_channels": schedule.out_channels,
            "blocks": schedule.blocks,
            "jobs": schedule.jobs,
            "runs": layout.runs,
            "segments": layout.segments,
            "tiles": layout.tiles,
        }
        run_kernel, threads = _cpu.DirectConvolution(config.isa, tables).run, torch.get_num_threads
        check, out_shape = input_check(problem), problem.output_shape[1:]

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            check(x, residual)
            samples, x = x.shape[0], x.contiguous()
            y = x.new_empty((samples, *out_shape))  # whatever the default type and device are
            if residual is not None:
                residual = residual.contiguous()
            residual_address = 0 if residual is None else residual.data_ptr()
            run_kernel(x.data_ptr(), residual_address, y.data_ptr(), samples, threads())
            return y

        return Prepared(run)


def _params(problem: Problem, layout: Layout, schedule: Schedule, config: DirectConfig) -> Records:
    """One record of PARAMS."""
    plane, out_plane = problem.height * problem.width, problem.out_height * problem.out_width
    return records(
        PARAMS,
        1,
        stage_size=0 if layout.in_place else config.channel_block * layout.channel_stride,
        partial_size=schedule.partial_sums * layout.vectors * ISAS[config.isa][0],
        x_sample_stride=problem.in_channels * plane,
        x_plane_stride=plane,
        y_sample_stride=problem.out_channels * out_plane,
        y_plane_stride=out_plane,
        column_stride=problem.stride[1],
        channel_stride=layout.channel_stride,
        in_place=layout.in_place,
        activation=problem.epilogue.activation_number,
    )
