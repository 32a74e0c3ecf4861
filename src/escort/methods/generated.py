"""Method `generated`: a kernel made for the filter, its weights inside the instructions (codegen.py).

A block runs one piece of the code, the nonzeros of some output channels, for a tile of positions, one per thread: a
word of the input is read from shared memory once per tap for all of the piece's channels. What bounds it is the supply
of instructions: code that does not stay in the instruction caches arrives at about one instruction in ten clocks, for
all warps of a multiprocessor together. So the search wants many warps per block, and little code per piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from escort import codegen, jit
from escort.codegen import LANES, GeneratedConfig, Program, Words
from escort.gpu import Gpu
from escort.methods.base import Runner, input_check
from escort.problem import Problem
from escort.sparse import StretchedCSR

_STEPS_PER_S = 4000.0  # that one core assembles
_MOST_CONFIGS = 8
_MOST_BYTES = 2**31 - 1
#: Products of a row that may be summed in fp16 alone: a relative error of about 1.7e-3, of 2e-3 allowed.
_MOST_HALF_SUMS = 144

# The model of the machine, in clocks of a multiprocessor, as measured on an H200 (docs/performance.md).
_CLOCK_MHZ = 1980.0
_LAUNCH = 8000.0
_ISSUE = 2.4  # instructions per clock, all warps together
_COLD, _SHARED = 0.105, 0.16  # instructions per clock that arrive from the L2 cache, and where tiles begin apart
_HOT_STEPS = 6000  # what stays in the instruction cache that multiprocessors share
_COPY = 60.0  # per copy of a producer warp
_CHUNK, _ROW = 10, 3  # instructions around the steps of a chunk, and per output


class Generated:
    """Weights as code for NVIDIA GPUs: fp32 and fp16, stride 1; TF32 problems are computed in fp32."""

    name = "generated"
    device_type = "cuda"
    config_type = GeneratedConfig

    def unsupported(self, problem: Problem) -> str | None:
        if problem.stride != (1, 1):
            return "code is generated for stride 1 only"
        if problem.dtype == "bf16":
            return "bf16 sums would lose too much; code is generated for fp32 and fp16"
        if problem.out_channels // problem.groups < 8:
            return "fewer than 8 output channels share an input: too few to gain from one read for all of them"
        if (
            math.prod(problem.output_shape[1:]) * 4 > _MOST_BYTES
            or math.prod(problem.input_shape[1:]) * 4 > _MOST_BYTES
        ):
            return "an image exceeds 2 GiB; use a smaller input"
        try:
            jit.compiler_version()
            jit.arch(torch.device(problem.device))
        except (ImportError, RuntimeError) as error:
            return str(error)
        return None

    def configs(self, problem: Problem, filter: StretchedCSR) -> Sequence[GeneratedConfig]:
        """The configs of least predicted time, no two of them alike."""
        gpu = Gpu.of(problem.device)
        ranked = sorted(candidates(problem, filter, gpu), key=lambda c: predict_us(problem, filter, c, gpu))
        chosen, alike = list[GeneratedConfig](), set[tuple[int, ...]]()
        for config in ranked:
            shape = config.rows, config.threads * config.blocks, config.entries
            if shape not in alike:
                alike.add(shape)
                chosen.append(config)
            if len(chosen) == _MOST_CONFIGS:
                break
        return chosen

    def compile_s(self, problem: Problem, filter: StretchedCSR, config: GeneratedConfig) -> float:
        """About how long one core takes to assemble a config's code."""
        return _pieces(problem, config) * _piece_steps(problem, filter, config) / _STEPS_PER_S

    def prepare(
        self, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, config: GeneratedConfig
    ) -> Runner:
        device = torch.device(problem.device)
        program = Program.of(problem, filter, config)
        text = program.text(None if bias is None else bias.detach().float().cpu().numpy())
        kernel = jit.kernel(jit.Text("generated.cu", text), {}, device)
        launch = kernel.bind(
            config.threads,
            program.shared_bytes,
            (torch.Tensor, torch.Tensor, torch.Tensor, int, int),
            overlap=torch.cuda.get_device_capability(device) >= (9, 0),
        )
        check, out_shape, most = input_check(problem), problem.output_shape[1:], _most_images(program)
        blocks = Gpu.of(problem.device).multiprocessors * config.blocks
        alignment = max(config.copy * 4, problem.torch_dtype.itemsize)
        pieces = len(program.pieces)

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            check(x, residual)
            images = len(x)
            if images > most:
                raise ValueError(f"the kernel addresses {most} images of this size at most, got {images}")
            x = x.contiguous()
            if x.data_ptr() % alignment:
                x = x.clone()  # the kernel copies several elements at once
            if residual is not None:
                residual = residual.contiguous()
            y = torch.empty((images, *out_shape), dtype=x.dtype, device=device)
            if images:
                tiles = program.tiles(images)
                launch((min(tiles * pieces, blocks), 1, 1), x, y, residual, images, tiles)
            return y

        return _Generated(kernel.binary, run)


@dataclass(frozen=True)
class _Generated:
    binary: jit.Binary
    run: Runner

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.run(x, residual)


def _most_images(program: Program) -> int:
    """What 32-bit numbers of words reach, with a tile to spare."""
    return (_MOST_BYTES - program.config.tile - program.words.reach) // (program.words.image_rows * program.words.pitch)


def candidates(problem: Problem, filter: StretchedCSR, gpu: Gpu) -> Iterator[GeneratedConfig]:
    """The search space: every config that fits the device."""
    per_word, group_rows = codegen.elements_per_word(problem), problem.out_channels // problem.groups
    copies = [0] if per_word == 2 and problem.width % 2 else [1, 2, 4]
    nnz = int(np.diff(filter.indptr).max(initial=0))
    for rows in sorted({min(rows, group_rows) for rows in (16, 24, 32, 40, 48, 64, 96, 128)}):
        for warps, blocks in ((12, 1), (16, 1), (20, 1), (24, 1), (28, 1), (32, 1), (10, 2), (12, 2), (16, 2)):
            registers = min(65536 // (LANES * -(-warps * blocks // 4) * 4) // 8 * 8, 255)
            flush = 32 if per_word == 2 and nnz > _MOST_HALF_SUMS else 0
            if rows * (3 if flush else 1) + 14 > registers:
                continue
            for producers in (2, 3, 4, 6, 8):
                for copy in copies:
                    step = copy * per_word * problem.torch_dtype.itemsize
                    row_bytes = problem.width * problem.torch_dtype.itemsize
                    if copy and (row_bytes % (copy * 4) or (step and row_bytes * problem.height % (copy * 4))):
                        continue
                    for block in (4, 8, 16):
                        for entries in (1, 8):
                            config = GeneratedConfig(
                                rows, warps - producers, producers, block, copy, 3, blocks, entries, flush
                            )
                            words = Words.of(problem, copy)
                            ring = config.stages * (block * codegen.channel_words(words, config) * 4 + 16)
                            if blocks * (ring + 1024) <= gpu.shared_bytes + 1024:
                                yield config


def _pieces(problem: Problem, config: GeneratedConfig) -> int:
    return problem.groups * -(-problem.out_channels // problem.groups // config.rows)


def _piece_steps(problem: Problem, filter: StretchedCSR, config: GeneratedConfig) -> float:
    """About how many steps a piece takes: its multiply-adds, and a read for each tap that any of its rows needs."""
    pieces = _pieces(problem, config)
    rows = problem.out_channels / pieces
    density = filter.nnz / math.prod(problem.weight_shape)
    taps = math.prod(problem.weight_shape[1:])
    reads = 1.0 if codegen.elements_per_word(problem) == 1 else 1.6  # odd taps join two words
    return filter.nnz / pieces + reads * taps * (1.0 - (1.0 - density) ** rows)


def predict_us(problem: Problem, filter: StretchedCSR, config: GeneratedConfig, gpu: Gpu) -> float:
    """The model of the machine: what bounds a tile, times the tiles that a multiprocessor computes in turn."""
    words = Words.of(problem, config.copy)
    pieces, tiles = _pieces(problem, config), -(-words.count(max(problem.batch, 1)) // config.tile)
    channels = problem.in_channels // problem.groups
    chunks = -(-channels // config.channel_block)
    steps = _piece_steps(problem, filter, config) + _CHUNK * chunks + _ROW * config.rows
    copied = max(config.copy, 1) * LANES * config.producers
    slots = -(-(config.tile + words.reach) // copied)
    copies = slots * channels * (2 if config.copy == 0 else 1)
    issue = (steps * config.consumers + 5 * copies * config.producers) / _ISSUE * config.blocks
    registers = 65536 // (LANES * (config.consumers + config.producers) * config.blocks)
    if registers < config.rows + 28:  # reads are not hidden behind multiply-adds
        issue *= 1.1
    fetch = _SHARED if config.entries > 1 else _COLD
    rounds = -(-pieces * tiles // (gpu.multiprocessors * config.blocks))
    cold = rounds if steps * min(pieces, rounds) > _HOT_STEPS else 1
    busy = max(issue, copies * _COPY)
    if rounds == 1 and config.entries > 1:
        fetch = _COLD  # too few tiles run the same code at the same time
    clocks = cold * max(busy, steps / fetch) + (rounds - cold) * busy
    return (_LAUNCH + clocks) / _CLOCK_MHZ
