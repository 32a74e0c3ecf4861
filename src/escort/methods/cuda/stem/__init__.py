"""Method `stem`: our dense kernel for a network's first convolution, of few channels and a large map.

Tensor cores multiply all weights, whatever their zeros: kernels/cuda/stem.cu gathers a filter's windows out of shared
memory, so that x is read about once, in any memory format, and y is written once. `layout` says what lies where, and
`search` which tiles are worth timing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import kernel, unavailable
from escort.cuda.launch import Grid, Launch
from escort.cuda.params import STORAGE, pack
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.base import ImagesRunner, Method, Prepared, output_strides
from escort.methods.cuda.stem.config import StemConfig
from escort.methods.cuda.stem.layout import Channels, Layout
from escort.methods.cuda.stem.params import Params
from escort.methods.cuda.stem.search import candidates, is_offered, predict_us, search
from escort.methods.runner import runner
from escort.methods.sharing import shared
from escort.problem import Problem

__all__ = ["Stem", "StemConfig"]

_MOST = 2**31 - 1
_MOST_CHANNELS, _CHANNEL_MULTIPLE = 4, 8
_MOST_CONFIGS = 8


class Stem(Method):
    """Up to four input channels; any kernel size, stride, dilation and padding; TF32, fp16 and bf16, summed in fp32."""

    name = "stem"
    device_type = "cuda"
    config_type = StemConfig

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision == "fp32":
            return "tensor cores multiply no fp32; ask for TF32, fp16 or bf16"
        if problem.groups > 1 or problem.in_channels > _MOST_CHANNELS:
            return f"it is for {_MOST_CHANNELS} input channels at most, without groups"
        if problem.out_channels % _CHANNEL_MULTIPLE:
            return f"tensor cores write {_CHANNEL_MULTIPLE} channels at a time, and there are {problem.out_channels}"
        if max(math.prod(problem.input_shape[1:]), math.prod(problem.output_shape[1:])) > _MOST // 2:
            return "a sample has more elements than 32 bits number; use a smaller input"
        device = torch.device(problem.device)
        if (reason := unavailable(device)) and unavailable(device, native=True):  # of which kernels may be carried
            return reason
        if next(candidates(problem, Gpu.of(problem.device)), None) is None:
            return "shared memory has no room for all weights and a row of x"
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[StemConfig]:
        return search(problem, Gpu.of(problem.device), _MOST_CONFIGS)

    def offers(self, problem: Problem, sparse_filter: SparseFilter, config: StemConfig) -> bool:
        return is_offered(problem, config, Gpu.of(problem.device))

    def kernels(self, problem: Problem, config: StemConfig) -> Sequence[Variant]:
        channels = Channels.of(problem)
        macros: dict[str, int | str] = {
            "STORAGE": STORAGE[problem.storage],
            "LAST": int(problem.memory_format == "channels_last"),
            "CHANNELS": problem.in_channels,
            "TILES": channels.tiles,
            "VECTOR": channels.vector,
            "THREADS": Layout.of(problem, config).threads,
        }
        if config.together:
            macros["GROUP"] = 1
        return (Variant("stem.cu", macros | activation.macros(problem.epilogue), native=config.together),)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: StemConfig | None = None
    ) -> float:
        (config,) = search(problem, gpu, 1) if config is None else [config]
        return predict_us(problem, config, gpu)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: StemConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device, layout = torch.device(problem.device), Layout.of(problem, config)

        def make_weights() -> tuple[torch.Tensor, None]:
            return layout.arrange(sparse_filter.to_dense()).to(device), None

        kind = problem.precision, problem.memory_format, layout.channels, layout.pixel, layout.together
        weights, _ = shared(sparse_filter, (self.name, device, kind), make_weights)
        table = torch.from_numpy(layout.table.view("int32")).to(device)
        tables = weights, table, activation.per_channel(problem, bias, slope)
        (variant,) = self.kernels(problem, config)
        launch, binary = _bind(variant, layout, config, tables)
        torch.cuda.current_stream(device).synchronize()  # other streams may read the tables
        blocks, (planes, pixels) = Params.of(layout, config).blocks, in_steps(problem)
        out_shape, strides = problem.output_shape[1:], output_strides(problem, problem.memory_format)

        def arrange(x: torch.Tensor) -> torch.Tensor:
            return x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)

        def launch_on(grid: Grid, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None) -> None:
            launch(grid, x, y, residual, None, *(planes if x.is_contiguous() else pixels))

        def cut(samples: int) -> tuple[Grid]:
            return ((samples * blocks, 1, 1),)

        run = runner(problem, launch_on, cut, most_samples=_MOST // blocks, alignment=16, arrange=arrange)

        @lru_cache
        def of_images(channels_last: bool) -> ImagesRunner | None:
            try:
                launch, _ = _bind(variant._replace(defines={**variant.defines, "IMAGES": 1}), layout, config, tables)
            except ImportError:  # there is no compiler, and no such kernel is carried
                return None
            steps = pixels if channels_last else planes

            def run_on_images(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
                shape, dtype = (images.shape[0], *out_shape), problem.storage
                y = torch.empty_strided(shape, strides, dtype=dtype, device=images.device)
                launch(*cut(images.shape[0]), images.contiguous(), y, None, factors, *steps)
                return y

            return run_on_images

        return Prepared(run, binaries=(binary,), of_images=of_images)


def _bind(
    variant: Variant, layout: Layout, config: StemConfig, tables: Sequence[torch.Tensor | None]
) -> tuple[Launch, Binary]:
    """The launch of a kernel, which takes x, y, the residual, factors of images, and the steps of x; and its binary."""
    device = torch.device(layout.problem.device)
    compiled = kernel(variant.source, variant.defines, device, native=variant.native)
    arguments = (*[torch.Tensor] * 3, *tables, torch.Tensor, pack(Params.of(layout, config)), *[int] * 4)
    return compiled.bind(layout.threads, layout.shared_bytes, arguments, overlap=True), compiled.binary


def in_steps(problem: Problem) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """The elements from a sample, channel, row and pixel of x to the next, in NCHW and in NHWC."""
    channels, height, width = problem.input_shape[1:]
    sample = channels * height * width
    return (sample, height * width, width, 1), (sample, 1, width * channels, channels)
