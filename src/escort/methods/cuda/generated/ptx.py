"""The code of a slice of a part as inline PTX, in which every nonzero is one multiply-add with the weight inside."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from escort.methods import activation
from escort.methods.cuda.generated.steps import Chunk, Join, KernelSteps, Load, MultiplyAdd, Part, Step

# The operands of the code, see generated.cuh.
_PARITY, _WORDS, _FULL, _INSIDE, _FIRST_CHUNK, _RESIDUAL, _Y, _PREFETCH_WARP = (f"%{i}" for i in range(8))
_LOOK = 32  # steps at least from one jump of a prefetch warp to the next


class Emitter:
    """Writes what a consumer does of a slice of a part, line by line: s are sums, x words of the input.

    Prefetch warps take the chunks in turn, and only jump through them from label to label. They wait for stages and
    leave them as consumers do, so that they are ahead by the ring's stages at most.
    """

    def __init__(
        self,
        kernel_steps: KernelSteps,
        part: Part,
        chunks: tuple[Chunk, ...],
        bias: NDArray[np.float32] | None,
        slopes: NDArray[np.float32] | None,
    ) -> None:
        """The code of these chunks of a part. bias, slopes: (K,), or None where there are none."""
        self._steps, self._config, self._problem = kernel_steps, kernel_steps.config, kernel_steps.problem
        self._channels, self._chunks = part.channels, chunks
        self._bias = None if self._config.split > 1 else bias  # the blocks that add up the slices add it
        self._slopes = slopes
        self._fp32 = kernel_steps.words.elements == 1
        self._kind = "f32" if self._fp32 else "b32"  # of sums and words

    def lines(self) -> Iterator[str]:
        """The code."""
        yield from self._declarations()
        yield from self._first_sums()
        yield from self._jump_to_first_chunk()
        for number, chunk in enumerate(self._chunks):
            yield from self._chunk(number, chunk)
        if self._config.start_points > 1:
            yield "bra CHUNK0;"
            yield "END:"
        if self._config.prefetch_warps:
            yield "@prefetch bra.uni DONE;"
        yield from self._share_sums() if self._config.split > 1 else self._epilogue()
        if self._config.prefetch_warps:
            yield "DONE:"
        yield "}"

    def _declarations(self) -> Iterator[str]:
        kind, sums = self._kind, self._config.sums * len(self._channels)
        words = max(1, *(chunk.registers for chunk in self._chunks))
        yield f"{{ .reg .{kind} s<{sums}>; .reg .{kind} x<{words}>; .reg .f32 u; .reg .f32 v; .reg .f32 w;"
        yield ".reg .b16 h; .reg .b16 g; .reg .pred a; .reg .pred b; .reg .pred p; .reg .b32 t; .reg .b32 left;"
        yield ".reg .b64 d; .reg .b64 e; .reg .pred first;"
        yield "mov.u32 t, %%laneid; setp.eq.u32 first, t, 0;"
        if not self._config.prefetch_warps:
            return
        # A vote tells the assembler that all lanes agree, and so do the jumps.
        yield f".reg .pred prefetch; setp.ge.s32 prefetch, {_PREFETCH_WARP}, 0;"
        yield "vote.sync.any.pred prefetch, prefetch, 0xffffffff;"
        for warp in range(self._config.prefetch_warps):
            yield f".reg .pred other{warp}; setp.ne.and.s32 other{warp}, {_PREFETCH_WARP}, {warp}, prefetch;"
            yield f"vote.sync.any.pred other{warp}, other{warp}, 0xffffffff;"

    def _first_sums(self) -> Iterator[str]:
        """Sums begin with zero, in float32 a channel's first with the bias."""
        for place in range(self._config.sums * len(self._channels)):
            start = 0.0
            if self._bias is not None and self._fp32 and place < len(self._channels):
                start = self._bias[self._channels[place]]
            yield f"mov.{self._kind} s{place}, {_f32(start) if self._fp32 else 0};"

    def _jump_to_first_chunk(self) -> Iterator[str]:
        count, stages, points = len(self._chunks), self._config.stages, self._config.start_points
        if points == 1:
            return
        yield f"mov.b32 left, {count};"
        for start in sorted({point * (count // stages) // points * stages for point in range(1, points)} - {0}):
            yield f"setp.eq.u32 p, {_FIRST_CHUNK}, {start}; @p bra CHUNK{start};"

    def _chunk(self, number: int, chunk: Chunk) -> Iterator[str]:
        """Waits for a chunk's stage, takes its steps and leaves the stage."""
        c, stage = self._config, number % self._config.stages
        yield (
            f'CHUNK{number}: mbarrier." WAIT ".parity.shared.b64 p, [{_FULL}+{stage * 8}], {_PARITY}; '
            f"@!p bra CHUNK{number};"
        )
        jumps = self._jumps(number, chunk) if c.prefetch_warps else {}
        if c.prefetch_warps > 1:
            yield f"@other{number % c.prefetch_warps} bra.uni SEEN{number};"
        for i, step in enumerate(chunk.steps):
            if i in jumps:
                yield f"LOOK{number}_{i}: @prefetch bra.uni {jumps[i]};"
            yield self._instruction(step, stage * self._steps.stage.words)
        if c.prefetch_warps:
            yield f"SEEN{number}:"
        yield "bar.warp.sync 0xffffffff;"
        yield f"@first mbarrier.arrive.shared.b64 d, [{_FULL}+{(c.stages + stage) * 8}];"
        if stage == c.stages - 1:
            yield f"xor.b32 {_PARITY}, {_PARITY}, 1;"
            if c.start_points > 1:
                yield f"sub.u32 left, left, {c.stages}; setp.eq.u32 p, left, 0; @p bra END;"

    def _jumps(self, number: int, chunk: Chunk) -> dict[int, str]:
        """The labels that prefetch warps jump to, by the step in front of which they jump.

        No word of the input is in use at such a step: the assembler would keep its register from the beginning.
        """
        stops: list[int] = []
        last = None
        for i, step in enumerate(chunk.steps):
            if isinstance(step, Load):
                plane = step.offset // self._steps.stage.channel_words
                if plane != last and (not stops or i >= stops[-1] + _LOOK):
                    stops.append(i)
                last = plane
        return dict(zip(stops, [*(f"LOOK{number}_{i}" for i in stops[1:]), f"SEEN{number}"], strict=False))

    def _instruction(self, step: Step, stage: int) -> str:
        """A step as an instruction; `stage` is the ring's word at which the chunk's stage begins."""
        match step:
            case Load(to, offset):
                return f"ld.shared.{self._kind} x{to}, [{_WORDS}+{(stage + offset) * 4}];"
            case Join(to, low, high):
                return f"prmt.b32 x{to}, x{low}, x{high}, 0x5432;"
            case MultiplyAdd(to, source, weight):
                if self._fp32:
                    return f"fma.rn.f32 s{to}, x{source}, {_f32(weight)}, s{to};"
                return f"mov.b32 t, {_half2(weight)}; fma.rn.f16x2 s{to}, x{source}, t, s{to};"

    def _halves(self, place: int) -> Iterator[str]:
        """Both elements of a channel's 16-bit sums, added up, as u and v."""
        count = len(self._channels)
        yield f"mov.b32 {{h, g}}, s{place}; cvt.f32.f16 u, h; cvt.f32.f16 v, g;"
        for other in range(place + count, self._config.sums * count, count):
            yield f"mov.b32 {{h, g}}, s{other}; cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;"

    def _share_sums(self) -> Iterator[str]:
        """Writes the sums to shared memory, where the ring was."""
        yield f"bar.sync 1, {self._config.tile};"
        for place in range(len(self._channels)):
            if self._config.sums > 1:
                yield from self._halves(place)
                yield f"cvt.rn.f16x2.f32 s{place}, v, u;"
            yield f"st.shared.{self._kind} [{_WORDS}+{place * self._config.tile * 4}], s{place};"

    def _epilogue(self) -> Iterator[str]:
        """Adds bias and residual to the sums, activates them, and writes the outputs."""
        p, samples = self._problem, self._steps.words.samples
        size, plane = (4 if self._fp32 else 2), p.out_height * p.out_width
        yield f"and.b32 t, {_INSIDE}, 1; setp.ne.u32 a, t, 0; and.b32 t, {_INSIDE}, 2; setp.ne.u32 b, t, 0;"
        yield f"add.u64 d, {_Y}, {_RESIDUAL};"
        if samples > 1:
            yield f".reg .b64 r; add.u64 e, {_Y}, {p.out_channels * plane * size}; add.u64 r, e, {_RESIDUAL};"
        for place, channel in enumerate(self._channels):
            at = channel * plane * size
            if self._fp32:
                yield from self._float_output(place, at)
            else:
                yield from self._half_sums(place, at)
                yield from self._half_outputs(place, at)

    def _float_output(self, place: int, at: int) -> Iterator[str]:
        """The output of a channel that lies so many bytes behind the first channel's."""
        if self._problem.epilogue.residual:
            yield f"mov.f32 w, 0f00000000; @a ld.global.f32 w, [d+{at}]; add.f32 s{place}, s{place}, w;"
        yield from self._activate("f32", f"s{place}", self._channels[place])
        yield f"@a st.global.f32 [{_Y}+{at}], s{place};"

    def _half_sums(self, place: int, at: int) -> Iterator[str]:
        """The sums of a channel's two elements, ready to be written."""
        bias, channel = self._bias, self._channels[place]
        if self._ends_in_16_bits:
            if bias is not None:
                yield f"mov.b32 t, {_half2(bias[channel])}; add.rn.f16x2 s{place}, s{place}, t;"
            yield from self._activate("f16x2", f"s{place}", channel)
            return
        yield from self._halves(place)
        if bias is not None:
            yield f"add.f32 u, u, {_f32(bias[channel])}; add.f32 v, v, {_f32(bias[channel])};"
        if self._problem.epilogue.residual:
            second = f"r+{at}" if self._steps.words.samples > 1 else f"d+{at + 2}"
            yield "mov.b16 h, 0; mov.b16 g, 0;"
            yield f"@a ld.global.b16 h, [d+{at}]; @b ld.global.b16 g, [{second}];"
            yield "cvt.f32.f16 w, h; add.f32 u, u, w; cvt.f32.f16 w, g; add.f32 v, v, w;"
        yield from self._activate("f32", "u", channel)
        yield from self._activate("f32", "v", channel)
        yield f"cvt.rn.f16x2.f32 s{place}, v, u;"

    def _half_outputs(self, place: int, at: int) -> Iterator[str]:
        """Writes both elements: neighbours in a row, or outputs of two samples."""
        if self._steps.words.columns == 2 and self._problem.out_width % 2 == 0:  # both are outputs, or none is
            yield f"@a st.global.b32 [{_Y}+{at}], s{place};"
            return
        second = f"e+{at}" if self._steps.words.samples > 1 else f"{_Y}+{at + 2}"
        yield f"mov.b32 {{h, g}}, s{place};"
        yield f"@a st.global.b16 [{_Y}+{at}], h; @b st.global.b16 [{second}], g;"

    @cached_property
    def _ends_in_16_bits(self) -> bool:
        """Whether 16-bit sums can be finished in 16 bits, as nothing is added to them that 16 bits do not hold."""
        epilogue = self._problem.epilogue
        if self._config.sums > 1 or epilogue.residual or activation.compiled_in(epilogue):
            return False
        added = np.zeros(0, np.float32) if self._bias is None else self._bias[list(self._channels)]
        return np.array_equal(added.astype(np.float16), added)

    def _activate(self, kind: str, value: str, channel: int) -> Iterator[str]:
        """The activation of a channel's float, or of both halves of a word; that of activation.cuh is a macro."""
        if activation.compiled_in(self._problem.epilogue):
            slope = 0.0 if self._slopes is None else self._slopes[channel]
            yield f'" ACTIVATE("{value}", "{_f32(slope)}") "'
            return
        zero, six = (_f32(0.0), _f32(6.0)) if kind == "f32" else (_half2(0.0), _half2(6.0))
        steps = {"none": (), "relu": (("max", zero),), "relu6": (("max", zero), ("min", six))}
        for step, bound in steps[self._problem.epilogue.activation]:
            yield f"mov.b32 t, {bound}; {step}.NaN.{kind} {value}, {value}, t;"


def _f32(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"


def _half2(value: float) -> str:
    """A weight in both halves of a word; raises ValueError where it does not fit."""
    with np.errstate(over="ignore"):
        half = np.float16(value)
    if not np.isfinite(half):
        raise ValueError(f"a weight of {value:.3g} does not fit fp16; use fp32")
    return "0x" + f"{int(half.view(np.uint16)):04X}" * 2
