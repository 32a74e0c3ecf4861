"""Weights as code: kernel steps as CUDA source in which every nonzero is one multiply-add with the weight inside.

The text is CUDA C++ around kernels/cuda/generated.cuh, with the steps as inline PTX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from escort.methods.cuda.generated.steps import (
    Chunk,
    GeneratedConfig,
    Join,
    KernelSteps,
    Load,
    MultiplyAdd,
    Piece,
    Step,
    elements_per_word,
    part_channels,
    ring_bytes,
    stage_words,
)
from escort.problem import Problem


def text(kernel_steps: KernelSteps, bias: NDArray[np.float32] | None = None) -> str:
    """The kernel `generated(x, y, residual, samples, tiles)`, for a grid of any number of blocks (clusters).

    Args:
        bias: (K,), becomes part of the code.
    """
    return "\n".join(_text(kernel_steps, bias)) + "\n"


def _text(kernel_steps: KernelSteps, bias: NDArray[np.float32] | None) -> Iterator[str]:
    p, c, w = kernel_steps.problem, kernel_steps.config, kernel_steps.words
    products = sum(isinstance(s, MultiplyAdd) for q in kernel_steps.pieces for chunk in q.chunks for s in chunk.steps)
    yield f"// {p}"
    yield f"// {_described(c)}"
    yield f"// {len(kernel_steps.pieces)} pieces of code, {products} multiply-adds among {kernel_steps.steps} steps"
    planes = len(w.phases)  # the kernel takes them for channels
    macros = {
        **_layout_macros(kernel_steps),
        "ARRANGED": int(c.arranged),
        "BULK": int(c.copy == 0),
        "CONSUMERS": c.consumers,
        "PRODUCERS": c.producers,
        "PREFETCH_WARPS": c.prefetch_warps,
        "THREADS": c.threads,
        "OCCUPANCY": c.occupancy,
        "PIECES": kernel_steps.hands,
        "PIECES_PER_GROUP": kernel_steps.hands // p.groups,
        "SPLIT": c.split,
        "MULTICAST": c.multicast,
        "CHUNKS": len(kernel_steps.pieces[0].chunks),
        "CHANNEL_BLOCK": c.channel_block * planes,
        "STAGES": c.stages,
        "START_POINTS": c.start_points,
        "COPY": max(c.copy, 1),
        "GROUP_CHANNELS": p.in_channels // p.groups * planes,
        "PART_CHANNELS": part_channels(p, c) * planes,
        "OUT_CHANNELS": p.out_channels,
        "OUT_HEIGHT": p.out_height,
        "OUT_WIDTH": p.out_width,
        "CHANNEL_WORDS": kernel_steps.channel_words,
        "STAGE_BYTES": stage_words(w, c) * 4,
        "TILE_WORDS": c.tile,
        "STAGE_WORDS": c.tile + w.reach,
    }
    if c.split > 1:
        macros |= {
            "ROWS": kernel_steps.rows,
            "RING_BYTES": ring_bytes(w, c, kernel_steps.rows),
            "RESIDUAL": int(p.epilogue.residual),
            "ACTIVATION": p.epilogue.activation_number,
        }
    yield from (f"#define {name} {value}" for name, value in macros.items())
    if c.split > 1:
        yield from _tables(kernel_steps, bias)
    yield '#include "generated.cuh"'
    yield ""
    yield "GENERATED {"
    yield "  BEGIN"
    for i, piece in enumerate(kernel_steps.pieces):
        yield f"  case {i}:"
        yield "    asm volatile("
        yield from (f'        "{line}\\n"' for line in _code(kernel_steps, piece, bias))
        yield "        OPERANDS);"
        yield "    break;"
    yield "  END"
    yield "}"


def _described(config: GeneratedConfig) -> str:
    """The knobs that differ from their defaults."""
    knobs = ((knob.name, getattr(config, knob.name), knob.default) for knob in fields(config))
    return ", ".join(f"{name}={value}" for name, value, default in knobs if value != default)


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
    p, w = kernel_steps.problem, kernel_steps.words
    return {
        "STORAGE": int(w.columns * w.samples == 2),
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


def _tables(kernel_steps: KernelSteps, bias: NDArray[np.float32] | None) -> Iterator[str]:
    """Which output channel each row of a piece is, -1 for none, and the bias of each output channel."""
    p, split = kernel_steps.problem, kernel_steps.config.split
    share = -(-kernel_steps.rows // split)
    channels = [list(piece.rows) for piece in kernel_steps.pieces[::split]]
    padded = [channel for rows in channels for channel in rows + [-1] * (share * split - len(rows))]
    yield f"__constant__ int CHANNEL_OF[] = {{{', '.join(map(str, padded))}}};"
    values = np.zeros(p.out_channels, np.float32) if bias is None else bias
    yield f"__constant__ float BIAS[] = {{{', '.join(f'{float(value).hex()}f' for value in values)}}};"


#: The operands of a piece of code, see generated.cuh.
_PARITY, _WORDS, _FULL, _INSIDE, _FIRST_CHUNK, _RESIDUAL, _Y, _PREFETCH_WARP = (f"%{i}" for i in range(8))
_LOOK = 32  # steps at least from one place that prefetch warps touch to the next


def _code(kernel_steps: KernelSteps, piece: Piece, bias: NDArray[np.float32] | None) -> Iterator[str]:
    """What a consumer does of a piece, as PTX: s are sums, x words of the input.

    Prefetch warps take the chunks in turn. They jump from one place of a chunk to the next. They wait for stages and
    leave them as consumers do, so that they are ahead by the ring's stages at most.
    """
    c, fp32, rows = kernel_steps.config, _is_fp32(kernel_steps), len(piece.rows)
    if c.split > 1:
        bias = None  # it is added when the parts are
    words = max(1, *(chunk.registers for chunk in piece.chunks))
    kind = "f32" if fp32 else "b32"
    yield f"{{ .reg .{kind} s<{c.sums * rows}>; .reg .{kind} x<{words}>; .reg .f32 u; .reg .f32 v; .reg .f32 w;"
    yield ".reg .b16 h; .reg .b16 g; .reg .pred a; .reg .pred b; .reg .pred p; .reg .b32 t; .reg .b32 left;"
    yield ".reg .b64 d; .reg .b64 e; .reg .pred first;"
    yield "mov.u32 t, %%laneid; setp.eq.u32 first, t, 0;"
    if c.prefetch_warps:
        # A vote tells the assembler that all lanes agree, and so do the jumps.
        yield f".reg .pred prefetch; setp.ge.s32 prefetch, {_PREFETCH_WARP}, 0;"
        yield "vote.sync.any.pred prefetch, prefetch, 0xffffffff;"
        for other in range(c.prefetch_warps):
            yield f".reg .pred other{other}; setp.ne.and.s32 other{other}, {_PREFETCH_WARP}, {other}, prefetch;"
            yield f"vote.sync.any.pred other{other}, other{other}, 0xffffffff;"
    for place in range(c.sums * rows):
        start = 0.0 if bias is None or not fp32 or place >= rows else bias[piece.rows[place]]
        yield f"mov.{kind} s{place}, {_f32(start) if fp32 else 0};"
    count = len(piece.chunks)
    if c.start_points > 1:
        yield f"mov.b32 left, {count};"
        for start in sorted(
            {number * (count // c.stages) // c.start_points * c.stages for number in range(1, c.start_points)} - {0}
        ):
            yield f"setp.eq.u32 p, {_FIRST_CHUNK}, {start}; @p bra CHUNK{start};"
    for i, chunk in enumerate(piece.chunks):
        stage = i % c.stages
        at = stage * stage_words(kernel_steps.words, c)
        yield f'CHUNK{i}: mbarrier." WAIT ".parity.shared.b64 p, [{_FULL}+{stage * 8}], {_PARITY}; @!p bra CHUNK{i};'
        places = _places(kernel_steps, chunk) if c.prefetch_warps else []
        jumps = dict(zip(places, [*(f"LOOK{i}_{place}" for place in places[1:]), f"SEEN{i}"], strict=False))
        if c.prefetch_warps > 1:
            yield f"@other{i % c.prefetch_warps} bra.uni SEEN{i};"
        for number, step in enumerate(chunk.steps):
            if number in jumps:
                yield f"LOOK{i}_{number}: @prefetch bra.uni {jumps[number]};"
            yield _instruction(step, at, fp32)
        if c.prefetch_warps:
            yield f"SEEN{i}:"
        yield "bar.warp.sync 0xffffffff;"
        yield f"@first mbarrier.arrive.shared.b64 d, [{_FULL}+{(c.stages + stage) * 8}];"
        if stage == c.stages - 1:
            yield f"xor.b32 {_PARITY}, {_PARITY}, 1;"
            if c.start_points > 1:
                yield f"sub.u32 left, left, {c.stages}; setp.eq.u32 p, left, 0; @p bra END;"
    if c.start_points > 1:
        yield "bra CHUNK0;"
        yield "END:"
    if c.prefetch_warps:
        yield "@prefetch bra.uni DONE;"
    yield from _hand_over(kernel_steps, piece) if c.split > 1 else _epilogue(kernel_steps, piece, bias)
    if c.prefetch_warps:
        yield "DONE:"
    yield "}"


def _places(kernel_steps: KernelSteps, chunk: Chunk) -> list[int]:
    """The steps of a chunk in front of which prefetch warps may jump: no word of the input is held there.

    Words that were held would have to be kept in registers from the beginning, as far as the assembler knows.
    """
    places: list[int] = []
    last = None
    for number, step in enumerate(chunk.steps):
        if isinstance(step, Load):
            plane = step.offset // kernel_steps.channel_words
            if plane != last and (not places or number >= places[-1] + _LOOK):
                places.append(number)
            last = plane
    return places


def _instruction(step: Step, stage: int, fp32: bool) -> str:
    match step:
        case Load(to, offset):
            return f"ld.shared.{'f32' if fp32 else 'b32'} x{to}, [{_WORDS}+{(stage + offset) * 4}];"
        case Join(to, low, high):
            return f"prmt.b32 x{to}, x{low}, x{high}, 0x5432;"
        case MultiplyAdd(place, source, weight):
            if fp32:
                return f"fma.rn.f32 s{place}, x{source}, {_f32(weight)}, s{place};"
            return f"mov.b32 t, {_half2(weight)}; fma.rn.f16x2 s{place}, x{source}, t, s{place};"


def _halves(row: int, rows: int, sums: int) -> Iterator[str]:
    """Both elements of a row's 16-bit sums, added up, as u and v."""
    yield f"mov.b32 {{h, g}}, s{row}; cvt.f32.f16 u, h; cvt.f32.f16 v, g;"
    for place in range(row + rows, sums * rows, rows):
        yield f"mov.b32 {{h, g}}, s{place}; cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;"


def _hand_over(kernel_steps: KernelSteps, piece: Piece) -> Iterator[str]:
    """Writes the sums to shared memory, where the ring was."""
    c, fp32 = kernel_steps.config, _is_fp32(kernel_steps)
    yield f"bar.sync 1, {c.tile};"
    for row in range(len(piece.rows)):
        if c.sums > 1:
            yield from _halves(row, len(piece.rows), c.sums)
            yield f"cvt.rn.f16x2.f32 s{row}, v, u;"
        yield f"st.shared.{'f32' if fp32 else 'b32'} [{_WORDS}+{row * c.tile * 4}], s{row};"


def _epilogue(kernel_steps: KernelSteps, piece: Piece, bias: NDArray[np.float32] | None) -> Iterator[str]:
    p, c, w, fp32 = kernel_steps.problem, kernel_steps.config, kernel_steps.words, _is_fp32(kernel_steps)
    size, plane = (4 if fp32 else 2), p.out_height * p.out_width
    yield f"and.b32 t, {_INSIDE}, 1; setp.ne.u32 a, t, 0; and.b32 t, {_INSIDE}, 2; setp.ne.u32 b, t, 0;"
    yield f"add.u64 d, {_Y}, {_RESIDUAL};"
    # Where the second element of a word goes, and where its residual is.
    second, second_residual, step = _Y, "d", 2
    if w.samples > 1:
        second, second_residual, step = "e", "r", 0
        yield f".reg .b64 r; add.u64 e, {_Y}, {p.out_channels * plane * size}; add.u64 r, e, {_RESIDUAL};"
    whole = w.columns == 2 and p.out_width % 2 == 0  # both elements of a word are outputs, or none is
    # 16-bit sums end as they are where nothing is added that 16 bits do not hold: the results are the same.
    held = bias is None or np.array_equal(bias[list(piece.rows)].astype(np.float16), bias[list(piece.rows)])
    short = not fp32 and c.sums == 1 and held and not p.epilogue.residual
    for row, channel in enumerate(piece.rows):
        at = channel * plane * size
        if fp32:
            if p.epilogue.residual:
                yield f"mov.f32 w, 0f00000000; @a ld.global.f32 w, [d+{at}]; add.f32 s{row}, s{row}, w;"
            yield from _activate(p, "f32", f"s{row}")
            yield f"@a st.global.f32 [{_Y}+{at}], s{row};"
            continue
        if short:
            if bias is not None:
                yield f"mov.b32 t, {_half2(bias[channel])}; add.rn.f16x2 s{row}, s{row}, t;"
            yield from _activate(p, "f16x2", f"s{row}")
        else:
            yield from _halves(row, len(piece.rows), c.sums)
            if bias is not None:
                yield f"add.f32 u, u, {_f32(bias[channel])}; add.f32 v, v, {_f32(bias[channel])};"
            if p.epilogue.residual:
                yield "mov.b16 h, 0; mov.b16 g, 0;"
                yield f"@a ld.global.b16 h, [d+{at}]; @b ld.global.b16 g, [{second_residual}+{at + step}];"
                yield "cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;"
            yield from _activate(p, "f32", "u")
            yield from _activate(p, "f32", "v")
            yield f"cvt.rn.f16x2.f32 s{row}, v, u;"
        if whole:
            yield f"@a st.global.b32 [{_Y}+{at}], s{row};"
        else:
            yield f"mov.b32 {{h, g}}, s{row};"
            yield f"@a st.global.b16 [{_Y}+{at}], h; @b st.global.b16 [{second}+{at + step}], g;"


def _activate(problem: Problem, kind: str, value: str) -> Iterator[str]:
    """The activation of a float, or of both halves of a word."""
    zero, six = (_f32(0.0), _f32(6.0)) if kind == "f32" else (_half2(0.0), _half2(6.0))
    steps = {"none": (), "relu": (("max", zero),), "relu6": (("max", zero), ("min", six))}
    for step, bound in steps[problem.epilogue.activation]:
        yield f"mov.b32 t, {bound}; {step}.NaN.{kind} {value}, {value}, t;"


def _is_fp32(kernel_steps: KernelSteps) -> bool:
    return elements_per_word(kernel_steps.problem) == 1


def _f32(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"


def _half2(value: float) -> str:
    """A weight in both halves of a word; raises ValueError where it does not fit."""
    with np.errstate(over="ignore"):
        half = np.float16(value)
    if not np.isfinite(half):
        raise ValueError(f"a weight of {value:.3g} does not fit fp16; use fp32")
    return "0x" + f"{int(half.view(np.uint16)):04X}" * 2
