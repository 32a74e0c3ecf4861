"""Weights as code: kernel steps as CUDA C++ around kernels/cuda/generated.cuh, the steps themselves as inline PTX."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from escort.methods import activation
from escort.methods.cuda.generated.ptx import Emitter
from escort.methods.cuda.generated.steps import KernelSteps, MultiplyAdd, slice_channels


def text(
    kernel_steps: KernelSteps, bias: NDArray[np.float32] | None = None, slopes: NDArray[np.float32] | None = None
) -> str:
    """The kernel `generated(x, y, residual, samples, tiles)`, for a grid of any number of blocks (clusters).

    Args:
        bias: (K,), becomes part of the code.
        slopes: (K,) of an activation that has them, becomes part of the code.
    """
    return "\n".join(_lines(kernel_steps, bias, slopes)) + "\n"


def _lines(
    kernel_steps: KernelSteps, bias: NDArray[np.float32] | None, slopes: NDArray[np.float32] | None
) -> Iterator[str]:
    split = kernel_steps.config.split
    products = sum(isinstance(step, MultiplyAdd) for chunk in kernel_steps.chunks for step in chunk.steps)
    yield f"// {kernel_steps.problem}"
    yield f"// {kernel_steps.config}"
    yield (
        f"// {len(kernel_steps.parts)} parts in {split} slices, "
        f"{products} multiply-adds among {kernel_steps.step_count} steps"
    )
    macros = _macros(kernel_steps) | (_split_macros(kernel_steps) if split > 1 else {})
    yield from (f"#define {name} {value}" for name, value in macros.items())
    if split > 1:
        yield from _tables(kernel_steps, bias, slopes)
    yield '#include "generated.cuh"'
    yield ""
    yield "GENERATED {"
    yield "  BEGIN"
    slices = ((part, chunks) for part in kernel_steps.parts for chunks in part.slices)
    for case, (part, chunks) in enumerate(slices):
        yield f"  case {case}:"
        yield "    asm volatile("
        yield from (f'        "{line}\\n"' for line in Emitter(kernel_steps, part, chunks, bias, slopes).lines())
        yield "        OPERANDS);"
        yield "    break;"
    yield "  END"
    yield "}"


def arrange_defines(kernel_steps: KernelSteps, threads: int) -> dict[str, int | str]:
    """The macros of kernels/cuda/generated_arrange.cu."""
    p, phases = kernel_steps.problem, kernel_steps.words.phases
    return {
        **_layout_macros(kernel_steps),
        "THREADS": threads,
        "STRIDE_DOWN": p.stride[0],
        "STRIDE_RIGHT": p.stride[1],
        "PLANES": len(phases),
        "FIRST_ROWS": ",".join(str(row) for row, _ in phases),
        "FIRST_COLUMNS": ",".join(str(column) for _, column in phases),
    }


def _layout_macros(kernel_steps: KernelSteps) -> dict[str, int]:
    """How the words of the input lie."""
    p, w = kernel_steps.problem, kernel_steps.words
    return {
        "STORAGE": int(w.elements == 2),
        "COLUMNS": w.columns,
        "SAMPLES": w.samples,
        "CHANNELS": p.in_channels,
        "HEIGHT": p.height,
        "WIDTH": p.width,
        "PITCH": w.pitch,
        "SAMPLE_ROWS": w.sample_rows,
        "TOP": w.top,
        "LEFT": w.left,
    }


def _macros(kernel_steps: KernelSteps) -> dict[str, int | str]:
    """The macros of generated.cuh, which takes planes for channels."""
    p, c, w = kernel_steps.problem, kernel_steps.config, kernel_steps.words
    planes = len(w.phases)
    return {
        **_layout_macros(kernel_steps),
        "ARRANGED": int(c.arranged),
        "BULK": int(c.copy == 0),
        "CONSUMERS": c.consumers,
        "PRODUCERS": c.producers,
        "PREFETCH_WARPS": c.prefetch_warps,
        "THREADS": c.threads,
        "OCCUPANCY": c.occupancy,
        "PARTS": len(kernel_steps.parts),
        "PARTS_PER_GROUP": len(kernel_steps.parts) // p.groups,
        "SPLIT": c.split,
        "MULTICAST": c.multicast,
        "CHUNKS": len(kernel_steps.parts[0].slices[0]),
        "CHANNEL_BLOCK": c.channel_block * planes,
        "STAGES": c.stages,
        "START_POINTS": c.start_points,
        "COPY": max(c.copy, 1),
        "GROUP_CHANNELS": p.in_channels // p.groups * planes,
        "SLICE_CHANNELS": slice_channels(p, c.split) * planes,
        "OUT_CHANNELS": p.out_channels,
        "OUT_HEIGHT": p.out_height,
        "OUT_WIDTH": p.out_width,
        "CHANNEL_WORDS": kernel_steps.stage.channel_words,
        "STAGE_BYTES": kernel_steps.stage.words * 4,
        "TILE_WORDS": c.tile,
        "STAGE_WORDS": c.tile + w.reach,
        **activation.macros(p.epilogue),
    }


def _split_macros(kernel_steps: KernelSteps) -> dict[str, int]:
    """The macros by which the blocks of a cluster add up the sums of slices."""
    epilogue = kernel_steps.problem.epilogue
    return {
        "PART_OUT_CHANNELS": kernel_steps.most_channels,
        "RING_BYTES": kernel_steps.ring_bytes,
        "RESIDUAL": int(epilogue.residual),
        "BOUND": activation.bound(epilogue),
    }


def _tables(
    kernel_steps: KernelSteps, bias: NDArray[np.float32] | None, slopes: NDArray[np.float32] | None
) -> Iterator[str]:
    """The output channels of each part, -1 where there is none, and the bias and slope of each output channel."""
    split = kernel_steps.config.split
    room = -(-kernel_steps.most_channels // split) * split
    channel_of = [
        channel for part in kernel_steps.parts for channel in (*part.channels, *[-1] * (room - len(part.channels)))
    ]
    yield f"__constant__ int CHANNEL_OF[] = {{{', '.join(map(str, channel_of))}}};"
    for name, table in (("BIAS", bias), ("SLOPES", slopes)):
        values = np.zeros(kernel_steps.problem.out_channels, np.float32) if table is None else table
        yield f"__constant__ float {name}[] = {{{', '.join(f'{float(value).hex()}f' for value in values)}}};"
