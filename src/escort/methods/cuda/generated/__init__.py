"""Method `generated`: a kernel made for the filter, its weights inside the instructions.

A block runs one part of the code, the nonzeros of some output channels, for a tile of positions, one per thread. A word
of the input is read from shared memory once per tap, for all channels of the part. What bounds the kernel is mostly the
supply of instructions, which arrive slowly where no cache holds them; on small maps it is copying the input.

`words` and `staging` say how the input lies, `steps` what the kernel does with it, `ptx` and `codegen` write the code,
`model` predicts how long it takes, and `search` chooses the configs (`config`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from escort.cuda.binary import Binary
from escort.cuda.compiler import Text
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import kernel, unavailable
from escort.cuda.launch import Grid
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.base import MOST_BATCHES, Method, Prepared, contiguous_only
from escort.methods.cuda.generated import codegen
from escort.methods.cuda.generated.config import GeneratedConfig
from escort.methods.cuda.generated.model import part_count, part_steps, predict_us, space_of
from escort.methods.cuda.generated.search import candidates, is_offered, search
from escort.methods.cuda.generated.steps import KernelSteps
from escort.methods.runner import runner
from escort.problem import Problem

__all__ = ["Generated", "GeneratedConfig"]

_STEPS_PER_S = 4000.0  # that one core assembles
_MOST_CONFIGS = 8  # that a plan may time
_ARRANGE_THREADS, _ARRANGE_WORDS = 128, 4  # of a block, and words of a thread
_MOST_BLOCKS_Y = 65535
_MOST_BYTES = 2**31 - 1


class Generated(Method):
    """Weights as code for NVIDIA GPUs: fp32 and fp16; TF32 problems are computed in fp32."""

    name = "generated"
    compiles_per_filter = True
    device_type = "cuda"
    config_type = GeneratedConfig

    def unsupported(self, problem: Problem) -> str | None:
        if reason := contiguous_only(problem):
            return reason
        if problem.precision == "bf16":
            return "bf16 sums would lose too much; code is generated for fp32 and fp16"
        if problem.out_channels // problem.groups < 8:
            return "fewer than 8 output channels share an input: too few to gain from one read for all of them"
        if (
            math.prod(problem.output_shape[1:]) * 4 > _MOST_BYTES
            or math.prod(problem.input_shape[1:]) * 4 > _MOST_BYTES
        ):
            return "a sample exceeds 2 GiB; use a smaller input"
        return unavailable(torch.device(problem.device), per_filter=True)

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[GeneratedConfig]:
        """The configs of least predicted time, no two of them alike."""
        return search(problem, sparse_filter, Gpu.of(problem.device), _MOST_CONFIGS)

    def offers(self, problem: Problem, sparse_filter: SparseFilter, config: GeneratedConfig) -> bool:
        return is_offered(problem, sparse_filter, Gpu.of(problem.device), config)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: GeneratedConfig | None = None
    ) -> float:
        spaces = candidates(problem, sparse_filter, gpu) if config is None else [space_of(config)]
        return min(float(predict_us(problem, sparse_filter, space, gpu).min()) for space in spaces)

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: GeneratedConfig) -> float:
        """About how long one core takes to assemble a config's code."""
        space = space_of(config)
        steps = part_count(problem, space) * config.split * part_steps(problem, sparse_filter, space)
        return float(steps[0] / _STEPS_PER_S)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: GeneratedConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device = torch.device(problem.device)
        kernel_steps = KernelSteps.of(problem, sparse_filter, config)
        per_channel = (
            None if table is None else table.detach().float().cpu().numpy()
            for table in (bias, activation.slopes(problem, slope))
        )
        text = codegen.text(kernel_steps, *per_channel)
        compiled = kernel(Text("generated.cu", text), {}, device)
        clusters = config.clusters(Gpu.of(problem.device))
        arrange, binaries = None, [compiled.binary]
        if config.arranged:
            arrange, arranging = _arrange(kernel_steps, device)
            binaries.append(arranging)

        def cut(samples: int) -> tuple[Grid, int, int]:
            tiles = kernel_steps.tiles(samples)
            items = -(-tiles // config.multicast) * len(kernel_steps.parts)
            # Clusters take several items in turn, but those that split channels only one.
            blocks = (items if config.split > 1 else min(items, clusters)) * config.cluster
            return (blocks, 1, 1), samples, tiles

        launch = compiled.bind_spread(
            config.threads,
            kernel_steps.shared_bytes,
            (torch.Tensor, torch.Tensor, torch.Tensor, int, int),
            blocks=math.prod(cut(problem.batch)[0]),
            cluster=config.cluster,
        )
        run = runner(
            *(problem, launch, cut),
            most_samples=_most_samples(kernel_steps),
            alignment=max(config.copy * 4, problem.storage.itemsize),  # the kernel copies several elements at once
            arrange=arrange,
        )
        return Prepared(run, compiled.binary, binaries=tuple(binaries))


def _arrange(kernel_steps: KernelSteps, device: torch.device) -> tuple[Callable[[torch.Tensor], torch.Tensor], Binary]:
    """Lays out an input x (N, C, H, W) as (planes, words) of 32 bits, by kernels/cuda/generated_arrange.cu."""
    planes = kernel_steps.problem.in_channels * len(kernel_steps.words.phases)
    compiled = kernel("generated_arrange.cu", codegen.arrange_defines(kernel_steps, _ARRANGE_THREADS), device)
    launch = compiled.bind(_ARRANGE_THREADS, 0, (torch.Tensor, torch.Tensor, int, int), overlap=True)

    @lru_cache(MOST_BATCHES)
    def cut(samples: int) -> tuple[Grid, int]:
        words = kernel_steps.arranged_words(samples)
        return (-(-words // (_ARRANGE_WORDS * _ARRANGE_THREADS)), min(planes, _MOST_BLOCKS_Y), 1), words

    def run(x: torch.Tensor) -> torch.Tensor:
        x, samples = x.contiguous(), x.shape[0]
        grid, words = cut(samples)
        arranged = torch.empty_strided((planes, words), (words, 1), dtype=torch.int32, device=device)
        launch(grid, x, arranged, samples, words)
        return arranged

    return run, compiled.binary


def _most_samples(kernel_steps: KernelSteps) -> int:
    """As many samples as 32 bits can number the words of, with a tile to spare."""
    return (
        (_MOST_BYTES - kernel_steps.config.tile - kernel_steps.words.reach)
        // (kernel_steps.words.sample_rows * kernel_steps.words.pitch)
        * kernel_steps.words.samples
    )
