"""Method `generated`: a kernel made for the filter, its weights inside the instructions (codegen.py).

A block runs one piece of the code, the nonzeros of some output channels, for a tile of positions, one per thread: a
word of the input is read from shared memory once per tap for all of the piece's channels. What bounds it is the supply
of instructions: code that does not stay in the instruction caches arrives at about one instruction in ten clocks, for
all warps of a multiprocessor together. So the search wants many warps per block, and little code per piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
_LEAST_ROWS, _MOST_ROWS = 8, 128  # of a piece
_INSTRUCTION_BYTES = 16
_APART_STAGES = 2  # few, so that there are places to begin at
_ARRANGE_THREADS, _ARRANGE_WORDS = 128, 4  # of a block, and words of a thread
_MOST_BYTES = 2**31 - 1
#: Products of a row that may be summed in fp16 alone: a relative error of about 1.7e-3, of 2e-3 allowed.
_MOST_HALF_SUMS = 144

# The model of the machine, in clocks of a multiprocessor, fitted to 733 timings on an H200 (docs/performance.md).
_CLOCK_MHZ = 1850.0
_LAUNCH_US = 2.0
_ISSUE = 2.9  # instructions per clock, all warps together
_COLD, _SHARERS = 0.159, 390.0  # instructions per clock that arrive from the L2 cache; half of that for so many at once
_HOT_BYTES, _LOST_BYTES = 99e3, 215e3  # code that stays in the instruction caches, and code of which nothing stays
_LOST = 0.35  # lost code arrives so much later
_L2 = 17.0  # bytes per clock that reach a multiprocessor when all of them read
_COPY, _COPY_ISSUE = 50.0, 12.0  # per copy of a producer warp, and instructions for it
_CHUNK, _ROW = 18.0, 8.7  # instructions around the steps of a chunk, and per element of an output
_SPARE_REGISTERS, _TIGHT = 28, 1.15  # with fewer beside the sums, reads come right before their use
_ADD_PARTS = 4700.0  # of channels that are split
_CLUSTERED = 0.91  # of the multiprocessors take part where clusters of more than two blocks must fit
_ARRANGE_US, _ARRANGE_RATE = 3.0, 3.3e6  # of the kernel that lays out the input; bytes per us


class Generated:
    """Weights as code for NVIDIA GPUs: fp32 and fp16; TF32 problems are computed in fp32."""

    name = "generated"
    device_type = "cuda"
    config_type = GeneratedConfig

    def unsupported(self, problem: Problem) -> str | None:
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
            shape = config.rows, config.threads * config.blocks // 128, config.arranged, config.split
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
        arrange = _arrange(program, device) if config.arranged else None

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            check(x, residual)
            images = len(x)
            if images > most:
                raise ValueError(f"the kernel addresses {most} images of this size at most, got {images}")
            x = x.contiguous()
            if residual is not None:
                residual = residual.contiguous()
            y = torch.empty((images, *out_shape), dtype=x.dtype, device=device)
            if not images:
                return y
            if arrange is not None:
                x = arrange(x)
            elif x.data_ptr() % alignment:
                x = x.clone()  # the kernel copies several elements at once
            tiles = program.tiles(images)
            items = tiles * program.hands
            # Blocks take several items in turn, but clusters only one.
            launch(
                (items * config.split if config.split > 1 else min(items, blocks), 1, 1), x, y, residual, images, tiles
            )
            return y

        return _Generated(kernel.binary, run)


@dataclass(frozen=True)
class _Generated:
    binary: jit.Binary
    run: Runner

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.run(x, residual)


def _arrange(program: Program, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """What lays out an input, as kernels/arrange.cu says."""
    planes = program.problem.in_channels * len(program.words.phases)
    kernel = jit.kernel("arrange.cu", codegen.arrange_defines(program, _ARRANGE_THREADS), device)
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    launch = kernel.bind(_ARRANGE_THREADS, 0, (torch.Tensor, torch.Tensor, int, int), overlap=overlap)

    def run(x: torch.Tensor) -> torch.Tensor:
        words = program.arranged_words(len(x))
        arranged = torch.empty((planes, words), dtype=torch.int32, device=device)
        blocks = -(-words // (_ARRANGE_WORDS * _ARRANGE_THREADS)), min(planes, 65535), 1
        launch(blocks, x, arranged, len(x), words)
        return arranged

    return run


def _most_images(program: Program) -> int:
    """What 32-bit numbers of words reach, with a tile to spare."""
    return (
        (_MOST_BYTES - program.config.tile - program.words.reach)
        // (program.words.image_rows * program.words.pitch)
        * program.words.images
    )


def candidates(problem: Problem, filter: StretchedCSR, gpu: Gpu) -> Iterator[GeneratedConfig]:
    """The search space: every config that fits the device and leaves few multiprocessors idle in the last round."""
    half, group_rows = codegen.elements_per_word(problem) == 2, problem.out_channels // problem.groups
    nnz = int(np.diff(filter.indptr).max(initial=0))
    channels = problem.in_channels // problem.groups
    hands = range(-(-group_rows // _MOST_ROWS), max(group_rows // _LEAST_ROWS, 1) + 1)
    for copy, arranged, producers, split in _stagings(problem, gpu):
        words = Words.of(problem, GeneratedConfig(1, 1, 1, 1, copy=copy, arranged=arranged))
        flush = 32 if half and nnz > _MOST_HALF_SUMS * split else 0
        for rows in sorted({-(-group_rows // hand) for hand in hands}):
            for blocks, consumers in ((b, c) for b in (1, 2) for c in range(6, 32 // b - producers + 1)):
                registers = _registers(GeneratedConfig(rows, consumers, producers, 1, blocks=blocks), gpu)
                if rows * (3 if flush else 1) + 14 > registers:
                    continue
                for block in (8, 4, 16):
                    chunks = -(-channels // (split * block))
                    stages = min((4, 3, 2), key=lambda stages: -(-chunks // stages) * stages)
                    config = GeneratedConfig(
                        rows, consumers, producers, block, copy, stages, blocks, 1, flush, arranged, split
                    )
                    if blocks * (codegen.shared_bytes(words, config, rows) + 1024) > gpu.shared_bytes + 1024:
                        continue
                    items, slots = _items(problem, words, config), _slots(config, gpu)
                    if items > slots and items < 0.75 * slots * -(-items // slots):
                        continue
                    yield config
                    if items > slots and chunks >= 4 * _APART_STAGES:
                        yield replace(config, stages=_APART_STAGES, entries=8)


def _stagings(problem: Problem, gpu: Gpu) -> Iterator[tuple[int, bool, int, int]]:
    """The ways to stage the input: (copy, arranged, producers, split)."""
    per_word, itemsize = codegen.elements_per_word(problem), problem.torch_dtype.itemsize
    for copy in (4, 2, 1) if problem.stride == (1, 1) else ():
        if problem.width * itemsize % (copy * 4) == 0 and problem.width % per_word == 0:
            yield from ((copy, False, producers, 1) for producers in (2, 3, 4, 6, 8))
    if gpu.capability < (9, 0):
        yield from ((4, True, producers, 1) for producers in (2, 4))
    else:
        yield from ((0, True, 1, split) for split in (1, 2, 4) if split <= problem.in_channels // problem.groups)


def _pieces(problem: Problem, config: GeneratedConfig) -> int:
    return problem.groups * -(-problem.out_channels // problem.groups // config.rows)


def _piece_steps(problem: Problem, filter: StretchedCSR, config: GeneratedConfig) -> float:
    """About how many steps a piece takes: its multiply-adds, and a read for each tap that any of its rows needs."""
    pieces = _pieces(problem, config)
    rows = problem.out_channels / pieces
    density = filter.nnz / math.prod(problem.weight_shape)
    taps = math.prod(problem.weight_shape[1:])
    reads = 1.0 if config.arranged or codegen.elements_per_word(problem) == 1 else 1.6  # odd taps join two words
    return (filter.nnz / pieces + reads * taps * (1.0 - (1.0 - density) ** rows)) / config.split


def _items(problem: Problem, words: Words, config: GeneratedConfig) -> int:
    """Pairs of a piece and a tile, for each part of the channels."""
    return _pieces(problem, config) * config.split * -(-words.count(max(problem.batch, 1)) // config.tile)


def _registers(config: GeneratedConfig, gpu: Gpu) -> int:
    """That a thread may have; each quarter of a multiprocessor shares its own among its warps."""
    warps = -(-(config.consumers + config.producers) * config.blocks // 4) * 4
    return min(gpu.registers // (LANES * warps) // 8 * 8, 255)


def _slots(config: GeneratedConfig, gpu: Gpu) -> int:
    """Blocks that run at a time."""
    if config.split <= 2:
        return gpu.multiprocessors * config.blocks
    return int(gpu.multiprocessors * _CLUSTERED) // config.split * config.split * config.blocks


def predict_us(problem: Problem, filter: StretchedCSR, config: GeneratedConfig, gpu: Gpu) -> float:
    """The model of the machine: what bounds a tile, times the tiles that a multiprocessor computes in turn."""
    words = Words.of(problem, config)
    items, slots = _items(problem, words, config), _slots(config, gpu)
    tiles, rounds = items // (_pieces(problem, config) * config.split), -(-items // slots)
    channels = codegen.part_channels(problem, config)
    chunks = -(-channels // (config.channel_block * config.stages)) * config.stages
    elements = words.columns * words.images
    steps = _piece_steps(problem, filter, config) + _CHUNK * chunks + _ROW * config.rows * elements
    issued, copying = steps * config.consumers, 0.0
    stage_bytes = channels * len(words.phases) * codegen.channel_words(words, config) * 4
    if config.copy:
        copies = (
            -(-(config.tile + words.reach) // (config.copy * LANES * config.producers)) * channels * len(words.phases)
        )
        issued, copying = issued + _COPY_ISSUE * copies * config.producers, _COPY * copies
    if _registers(config, gpu) < config.rows + _SPARE_REGISTERS:
        issued *= _TIGHT
    busy = max(issued / _ISSUE * config.blocks, stage_bytes / _L2 * config.blocks, copying)
    # Code is cold when a multiprocessor meets it first, and each time where it does not stay. What wants to stay is
    # the code of all pieces that run at the same time.
    code = steps * _INSTRUCTION_BYTES * min(items / tiles, 1.0 + slots / tiles)
    lost = min(max((code - _HOT_BYTES) / (_LOST_BYTES - _HOT_BYTES), 0.0), 1.0)
    places = max(min(config.entries, chunks // config.stages), 1)
    late = (1.0 + min(tiles, slots) / places / _SHARERS) * (1.0 + _LOST * lost)
    cold = max(busy, steps / _COLD * late)
    first = min(rounds, -(-rounds * min(items, slots) // tiles), items // tiles)
    met = first + lost * (rounds - first)
    clocks = met * cold + (rounds - met) * busy + (_ADD_PARTS if config.split > 1 else 0.0)
    arrange_us = 0.0
    if config.arranged:
        arranged = problem.in_channels * len(words.phases) * words.count(max(problem.batch, 1)) * 4
        arrange_us = (
            _ARRANGE_US + (arranged + math.prod(problem.input_shape) * problem.torch_dtype.itemsize) / _ARRANGE_RATE
        )
    return _LAUNCH_US + arrange_us + clocks / _CLOCK_MHZ
