"""Method `cudnn`: NVIDIA's dense convolution on the dense filter, in the better of its two memory formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from escort.methods.base import Runner, apply_epilogue, symmetric_padding
from escort.problem import Problem
from escort.sparse import StretchedCSR


@dataclass(frozen=True)
class CudnnConfig:
    """How the tensors lie.

    Attributes:
        memory_format: of filter, input and output within cuDNN.
        output: "contiguous" gives NCHW, whatever it costs to convert; "as_is" leaves the output as cuDNN wrote it.
    """

    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    output: Literal["contiguous", "as_is"] = "contiguous"

    @property
    def takes_channels_last(self) -> bool:
        return (self.memory_format, self.output) == ("channels_last", "as_is")


class Cudnn:
    """The dense baseline on GPUs, and the choice where sparsity does not pay.

    cuDNN tries its algorithms on the first call of each shape (benchmark mode) and is told with each call whether
    TF32 is allowed, so that no setting of the process is read or changed: fp32 is strict whatever it says.
    """

    name = "cudnn"
    device_type = "cuda"
    config_type = CudnnConfig

    def unsupported(self, problem: Problem) -> str | None:
        return None if torch.backends.cudnn.is_available() else "this torch was built without cuDNN"

    def configs(self, problem: Problem, filter: StretchedCSR) -> Sequence[CudnnConfig]:
        formats = CudnnConfig("contiguous"), CudnnConfig("channels_last")
        # Tensor cores read channels_last; strict fp32 does not use them.
        return formats if problem.dtype == "fp32" else formats[::-1]

    def benchmarks(self, problem: Problem, filter: StretchedCSR) -> Sequence[CudnnConfig]:
        """What a network that stays in channels_last throughout would run: x comes so, and nothing is converted."""
        return (CudnnConfig("channels_last", "as_is"),)

    def prepare(self, problem: Problem, filter: StretchedCSR, bias: torch.Tensor | None, config: CudnnConfig) -> Runner:
        channels_last = config.memory_format == "channels_last"
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        device, dtype = torch.device(problem.device), problem.torch_dtype
        weight = filter.to_dense().to(device, dtype).contiguous(memory_format=memory_format)
        addend = None if bias is None else bias.detach().to(device, dtype).view(-1, 1, 1)
        stride, dilation, groups = problem.stride, problem.dilation, problem.groups
        out_shape, activation = problem.output_shape[1:], problem.epilogue.activation
        allow_tf32, convert = problem.dtype == "tf32", config.output == "contiguous"

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            if len(x) == 0:
                return apply_epilogue(x.new_empty(0, *out_shape), residual, activation)
            x, padding = symmetric_padding(problem, x)
            x = x.contiguous(memory_format=memory_format)
            y = torch.cudnn_convolution(
                x, weight, padding, stride, dilation, groups, benchmark=True, deterministic=False, allow_tf32=allow_tf32
            )
            if convert:
                y = y.contiguous()
            if addend is not None:
                y += addend
            return apply_epilogue(y, residual, activation)

        return run
