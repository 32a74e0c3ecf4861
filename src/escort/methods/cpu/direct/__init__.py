"""Method `direct`: the convolution computed straight from the compressed filter by our own kernel.

`layout.py` cuts a sample into tiles, `schedule.py` sorts the filter, and kernels/cpu/direct.cpp walks their tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods.activation import slopes
from escort.methods.base import Method, Prepared, prepared_op
from escort.methods.cpu.direct.layout import Layout, Records, records
from escort.methods.cpu.direct.schedule import Schedule
from escort.problem import Problem

#: name -> (floats per vector, largest tile in vectors), fastest first.
ISAS: dict[str, tuple[int, int]] = {name: (lanes, vectors) for name, lanes, vectors in _cpu.isas()}

_INTS = "column_stride channel_stride in_place parts blocks_of_part channels alike activation".split()
#: The struct of kernels/cpu/direct.hpp, which says what the fields mean.
PARAMS = np.dtype(
    [
        *((name, "i8") for name in ("stage_size", "partial_size")),
        *((f"{tensor}_{unit}_stride", "i8") for tensor in "xy" for unit in ("sample", "plane")),
        *((name, "i4") for name in _INTS),
    ],
    align=True,
)

_MOST_CHANNELS = 4  # output channels that the kernel accumulates at a time, as far as its registers reach
#: Tiles and stages that are worth a try: positions of a tile, and KiB that a block's input takes, best guess first.
_TILES = ((112, 48), (224, 64), (112, 96), (80, 48), (56, 64), (112, 32))
#: From so many threads on, small maps are worth tiles so low that threads share their positions, too: each then reads
#: less of what others wrote.
_MANY_THREADS, _TILES_OF_MANY = 8, (*_TILES, (32, 96))
#: The same where all weights are there: sums of four channels, their weights and a vector of x are in registers.
_FULL_TILES = ((96, 48), (64, 48), (80, 48), (112, 48))


@dataclass(frozen=True)
class DirectConfig:
    """The knobs of the direct kernel.

    Attributes:
        isa: instruction set, a key of :data:`ISAS`.
        vectors: largest tile, in vectors of that instruction set.
        channel_block: input channels that are staged and accumulated at a time.
        parts: into which the output channels of a group are cut, to feed threads where tiles are few. A task of a
            batch takes several.
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
    is_native = True

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.precision == "fp32" else f"computes in fp32, not in {problem.precision}"

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DirectConfig]:
        channels = sparse_filter.shape[1]
        threads = torch.get_num_threads()
        choices = _FULL_TILES if _is_full(sparse_filter) else _TILES if threads < _MANY_THREADS else _TILES_OF_MANY
        configs: dict[DirectConfig, None] = {}  # in order, each once
        for isa in [name for name in ISAS if name != "generic"] or ["generic"]:
            lanes, most = ISAS[isa]
            layouts = [Layout.of(problem, lanes, min(tile // lanes, most)) for tile, _ in choices]
            # Where tiles of the best guess feed all threads, no plan has one tile: threads that share positions read
            # what they wrote in the layer before, and threads that share channels alone read all that others wrote.
            least_tiles = min(threads, 2) if len(layouts[0].tiles) >= threads else 0
            for (tile, stage_kib), layout in zip(choices, layouts, strict=True):
                if len(layout.tiles) < least_tiles:
                    continue
                vectors = min(tile // lanes, most)
                channel_floats = layout.vectors * lanes if layout.in_place else layout.channel_stride
                # Blocks of equal size: a last one of a few channels would cost as much as a full one.
                blocks = -(-channels // min(max(stage_kib * 256 // channel_floats, 1), channels))
                tasks, most_parts = problem.groups * len(layout.tiles), problem.out_channels // problem.groups
                for parts in _parts(tasks)[: None if (tile, stage_kib) == choices[0] else 1]:
                    configs[DirectConfig(isa, vectors, -(-channels // blocks), min(parts, most_parts))] = None
        return tuple(configs)

    def offers(self, problem: Problem, sparse_filter: SparseFilter, config: DirectConfig) -> bool:
        """Whatever the kernel runs: what is tried depends on the number of threads, which may be another later."""
        return (
            config.isa in ISAS
            and 1 <= config.vectors <= ISAS[config.isa][1]
            and 1 <= config.channel_block <= sparse_filter.shape[1]
            and 1 <= config.parts <= problem.out_channels // problem.groups
        )

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
        of_channels = slopes(problem, slope)
        schedule = Schedule.of(sparse_filter, layout, bias, config.channel_block, config.parts, of_channels)
        tables = {
            "params": _params(problem, layout, schedule, config, _is_full(sparse_filter)),
            "nonzeros": schedule.nonzeros,
            "out_channels": schedule.out_channels,
            "blocks": schedule.blocks,
            "runs": layout.runs,
            "segments": layout.segments,
            "tiles": layout.tiles,
        }
        return prepared_op(problem, _cpu.DirectConvolution(config.isa, tables))


def _is_full(sparse_filter: SparseFilter) -> bool:
    """Whether no weight is zero, so that all output channels read alike."""
    return sparse_filter.nnz == math.prod(sparse_filter.shape)


def _parts(tasks: int) -> tuple[int, int]:
    """Into how many parts to cut each of so many tasks: what is predicted to be fastest, and four for each thread.

    Of a sample: what a task of a batch takes is left to its call.

    Each part stages the input of its task anew, which is taken to be a sixteenth of the work. More parts than are
    predicted to be best balance threads where tasks take unequally long.
    """
    threads = torch.get_num_threads()
    most = -(-4 * threads // tasks) if threads > 1 else 1

    def fullest(parts: int) -> float:
        """What the thread with most to do takes, in tasks."""
        return -(-parts * tasks // threads) * (1 / parts + 1 / 16)

    return min(range(1, most + 1), key=fullest), most


def _params(problem: Problem, layout: Layout, schedule: Schedule, config: DirectConfig, is_full: bool) -> Records:
    """One record of PARAMS. `is_full`: whether no weight is zero."""
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
        parts=schedule.parts,
        blocks_of_part=schedule.blocks_of_part,
        channels=min(_MOST_CHANNELS, ISAS[config.isa][1] // layout.vectors),
        alike=is_full,
        activation=problem.epilogue.activation_number,
    )
