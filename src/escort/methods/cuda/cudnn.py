"""Method `cudnn`: NVIDIA's dense convolution on the dense filter, in the better of its two memory formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.methods.base import Method, Prepared, finisher
from escort.methods.lowering import is_linear, symmetric_padding
from escort.methods.sharing import dense_weight
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat, Problem

_CHANNEL_MULTIPLE = 8  # channels that tensor cores read at once
#: What a depthwise convolution and one of a pixel take at least, and each pass that adds a bias or activates behind
#: them: of the times in docs/notes/planes.md none is below. In us, and bytes that memory moves in one.
_DEPTHWISE_US, _DEPTHWISE_BYTES_PER_US, _PIXEL_US = 3.5, 1.6e6, 4.0
_PASS_US, _PASS_BYTES_PER_US = 1.5, 4e6


def _fuses(problem: Problem) -> bool:
    """Whether cuDNN computes the epilogue on tensor cores, whatever the input size.

    In float32 it would obey the process's setting of TF32, which 16-bit types do not need.
    """
    suits = problem.groups == 1 and problem.out_channels % _CHANNEL_MULTIPLE == 0
    return suits and problem.epilogue.activation == "relu" and problem.precision in ("fp16", "bf16")


@dataclass(frozen=True)
class CudnnConfig:
    """In which memory format cuDNN works, and who computes the epilogue.

    Attributes:
        memory_format: of filter, input and output within cuDNN.
        output: "contiguous" gives NCHW, whatever it costs to convert; "as_is" leaves the output as cuDNN wrote it.
        fused: cuDNN computes bias, residual and ReLU itself, by an algorithm that it chooses without trying. Where x
            has too few channels for tensor cores, as a picture does, channels of zeros are added.
        tries: on its first call cuDNN builds all its algorithms and times ten; else it takes the one that it expects to
            be fastest, as torch does by default. Fused, it never tries.
    """

    memory_format: MemoryFormat = "contiguous"
    output: Literal["contiguous", "as_is"] = "contiguous"
    fused: bool = False
    tries: bool = True


class Cudnn(Method):
    """The dense baseline on GPUs, and the choice where sparsity does not pay.

    Trying its algorithms takes a tenth of a second to a second, in each process and each thread that calls. Only the
    batch is tried that was prepared for. Each call says whether TF32 is allowed, so that no setting of the process is
    read or changed: fp32 is strict whatever the setting says.
    """

    name = "cudnn"
    is_dense = True
    device_type = "cuda"
    config_type = CudnnConfig

    def unsupported(self, problem: Problem) -> str | None:
        return None if torch.backends.cudnn.is_available() else "this torch was built without cuDNN"

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CudnnConfig]:
        if problem.memory_format == "channels_last":
            tried = [CudnnConfig("channels_last", "as_is", fused) for fused in (False, True)[: 1 + _fuses(problem)]]
        else:
            tried = [CudnnConfig("contiguous"), CudnnConfig("channels_last")]
            # Tensor cores read channels_last; strict fp32 does not use them.
            tried = tried if problem.precision == "fp32" else tried[::-1]
        return [*tried, *(self.without_trying(config) for config in tried if not config.fused)]

    def without_trying(self, config: CudnnConfig) -> CudnnConfig:
        return config if config.fused else replace(config, tries=False)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: CudnnConfig | None = None
    ) -> float | None:
        """What it takes at least where another dense method is faster, in channels_last; None elsewhere."""
        if problem.memory_format != "channels_last":
            return None
        x, y = (math.prod(shape) * problem.storage.itemsize for shape in (problem.input_shape, problem.output_shape))
        if problem.groups == problem.in_channels > 1:
            alone_us = _DEPTHWISE_US + (x + y) / _DEPTHWISE_BYTES_PER_US
        elif is_linear(problem):
            alone_us = _PIXEL_US
        else:
            return None
        epilogue = problem.epilogue
        passes = 0 if _fuses(problem) else epilogue.bias + epilogue.residual + (epilogue.activation != "none")
        return alone_us + passes * (_PASS_US + 2 * y / _PASS_BYTES_PER_US)

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CudnnConfig]:
        """The config that would run if x and y lay in channels_last and nothing were converted."""
        return () if problem.memory_format == "channels_last" else (CudnnConfig("channels_last", "as_is"),)

    def input_format(self, config: CudnnConfig) -> MemoryFormat:
        return config.memory_format if config.output == "as_is" else "contiguous"

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: CudnnConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        memory_format = TORCH_MEMORY_FORMAT[config.memory_format]
        device, dtype = torch.device(problem.device), problem.storage
        added_channels = -problem.in_channels % _CHANNEL_MULTIPLE if config.fused else 0

        weight = dense_weight(problem, sparse_filter, memory_format, added_channels)
        addend = None if bias is None else bias.detach().to(device, dtype)
        column = None if addend is None else addend.view(-1, 1, 1)
        stride, dilation, groups = problem.stride, problem.dilation, problem.groups
        out_shape, finish = problem.output_shape[1:], finisher(problem, slope)
        allow_tf32, convert = problem.precision == "tf32", config.output == "contiguous"
        tried_batch = problem.batch if config.tries else -1

        def convolve(x: torch.Tensor, padding: tuple[int, int], residual: torch.Tensor | None) -> torch.Tensor:
            tries = x.shape[0] == tried_batch
            # Torch remembers an algorithm by all of these but `benchmark`: what the same convolution took before,
            # without trying, would be taken again. All forward algorithms are deterministic.
            y = torch.cudnn_convolution(
                *(x, weight, padding, stride, dilation, groups),
                benchmark=tries,
                deterministic=tries,
                allow_tf32=allow_tf32,
            )
            if convert:
                y = y.contiguous()
            if column is not None:
                y += column
            return finish(y, residual)

        def convolve_fused(x: torch.Tensor, padding: tuple[int, int], residual: torch.Tensor | None) -> torch.Tensor:
            geometry = stride, padding, dilation, groups
            if added_channels:
                x = F.pad(x, (0, 0, 0, 0, 0, added_channels))
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, addend, *geometry)
            residual = residual.contiguous(memory_format=memory_format)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, addend, *geometry)

        compute = convolve_fused if config.fused else convolve

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            if x.shape[0] == 0:
                empty = x.new_empty(0, *out_shape).contiguous(memory_format=problem.torch_memory_format)
                return finish(empty, residual)
            x, padding = symmetric_padding(problem, x)
            return compute(x.contiguous(memory_format=memory_format), padding, residual)

        return Prepared(run)
