"""What the direct kernel is compiled with and launched with: the macros and Params of kernels/cuda/direct.cu."""

from __future__ import annotations

from dataclasses import dataclass

from escort.cuda.params import Divisor
from escort.methods import activation
from escort.methods.cuda.direct.layout import SLOT_CLASSES, STORAGE, DirectConfig, Layout, Positions
from escort.methods.cuda.direct.tables import Tables
from escort.problem import Problem

_THREADS, _MOST_THREADS = 128, 1024  # the compiler counts in these; of a block


def defines(problem: Problem, config: DirectConfig, layout: Layout) -> dict[str, int | str]:
    """The macros that a config is compiled with; kernels/cuda/direct.cu says what each means.

    Configs share a kernel where a multiprocessor has as many threads, in one block or in several.
    """
    return {
        "STORAGE": STORAGE[problem.precision],
        "PACKED": int(config.packed),
        "PAIRED": int(layout.paired),
        "ODD": int(layout.paired and layout.odd),
        "WORDS": config.words,
        "OUT_CHANNELS": config.out_channels,
        "SLOTS": next(slots for slots in SLOT_CLASSES if slots >= layout.slots),
        "THREADS": min(-(-config.threads * config.occupancy // _THREADS) * _THREADS, _MOST_THREADS),
        **activation.macros(problem.epilogue),
    }


@dataclass(frozen=True)
class Params:
    """The kernel's parameters that are the same in every launch: the fields of its struct, in their order.

    Attributes:
        in_channels, height, width, out_channels, out_height, out_width: of the problem.
        pitch: positions from row to row.
        sample_rows: rows from sample to sample.
        by_pitch, by_sample_rows, by_width, by_pairs: divide by these, and by the pairs of columns of a channel.
        row_padding, column_padding: on top and on the left.
        row_stride, column_stride: of the convolution.
        phases: of a strided input, those that are kept.
        phase_words, channel_words, slots: of the stage's :class:`Layout`.
        chunks: stages that a group takes.
        channel_block, stages, position_warps, out_channel_warps, in_channel_warps, producers: of the config.
        record_bytes: room for records in a stage.
        bound: 0 none, 1 ReLU, 2 ReLU6.
    """

    in_channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    pitch: int
    by_pitch: Divisor
    sample_rows: int
    by_sample_rows: Divisor
    by_width: Divisor
    by_pairs: Divisor
    row_padding: int
    column_padding: int
    row_stride: int
    column_stride: int
    phases: int
    phase_words: int
    channel_words: int
    slots: int
    chunks: int
    channel_block: int
    stages: int
    position_warps: int
    out_channel_warps: int
    in_channel_warps: int
    producers: int
    record_bytes: int
    bound: int

    @classmethod
    def of(cls, problem: Problem, layout: Layout, tables: Tables, config: DirectConfig) -> Params:
        positions = Positions(problem)
        return cls(
            in_channels=problem.in_channels,
            height=problem.height,
            width=problem.width,
            out_channels=problem.out_channels,
            out_height=problem.out_height,
            out_width=problem.out_width,
            pitch=positions.pitch,
            by_pitch=Divisor.of(positions.pitch),
            sample_rows=positions.sample_rows,
            by_sample_rows=Divisor.of(positions.sample_rows),
            by_width=Divisor.of(problem.width),
            by_pairs=Divisor.of(-(-problem.height * problem.width // 2)),
            row_padding=problem.padding[0],
            column_padding=problem.padding[2],
            row_stride=problem.stride[0],
            column_stride=problem.stride[1],
            phases=positions.phases,
            phase_words=layout.phase_words,
            channel_words=layout.channel_words,
            slots=layout.slots,
            chunks=tables.chunks,
            channel_block=config.channel_block,
            stages=config.stages,
            position_warps=config.position_warps,
            out_channel_warps=config.out_channel_warps,
            in_channel_warps=config.in_channel_warps,
            producers=config.producers,
            record_bytes=tables.record_bytes,
            bound=activation.bound(problem.epilogue),
        )
