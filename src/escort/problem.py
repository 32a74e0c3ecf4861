"""One convolution as a problem: its shapes, its precision, and what is fused behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from operator import add
from typing import Any, Literal, get_args

import torch
from torch import nn

Activation = Literal[
    "none",
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "sigmoid",
    "tanh",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardsigmoid",
    "hardswish",
]
Precision = Literal["fp32", "tf32", "fp16", "bf16"]
MemoryFormat = Literal["contiguous", "channels_last"]

_MOST = torch.finfo(torch.float32).max

#: The storage type of each precision. ``tf32`` is stored as float32 and multiplied with a 10-bit mantissa.
TORCH_DTYPE: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def torch_name(value: torch.dtype | torch.layout | torch.memory_format) -> str:
    """What torch calls a type, a layout or a memory format, without its own name in front: "float32"."""
    return str(value).removeprefix("torch.")


#: Torch's name of each memory format: NCHW, and NHWC seen as (N, C, H, W).
TORCH_MEMORY_FORMAT: dict[MemoryFormat, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


@dataclass(frozen=True)
class Epilogue:
    """What is fused behind the convolution, in this order: bias, residual add, activation.

    Attributes:
        activation: as torch computes what it calls so; "gelu_tanh" is ``gelu(approximate="tanh")``. The slopes of
            "prelu" are a tensor (K,), which lies beside the bias.
        negative_slope: what "leaky_relu" multiplies negative numbers by.

    Raises:
        ValueError: if the activation is unknown, or the slope is no float32 or goes with another activation.
    """

    bias: bool = False
    residual: bool = False
    activation: Activation = "none"
    negative_slope: float = field(default=0.0, metadata={"signed": True})

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation is one of {get_args(Activation)}, got {self.activation!r}")
        slope = self.negative_slope
        if type(slope) not in (float, int) or not abs(slope) <= _MOST:
            raise ValueError(f"negative_slope is a finite float32, got {slope!r}")
        if slope and self.activation != "leaky_relu":
            raise ValueError(f"a negative_slope goes with leaky_relu, got {slope} with {self.activation}")

    @property
    def activation_number(self) -> int:
        """The activation's number in kernels: its place in `Activation`."""
        return get_args(Activation).index(self.activation)

    def without_activation(self) -> Epilogue:
        return replace(self, activation="none", negative_slope=0.0)

    def __str__(self) -> str:
        parts = [name for name in ("bias", "residual") if getattr(self, name)]
        slope = f"({self.negative_slope:g})" if self.activation == "leaky_relu" else ""
        return "+".join(parts + ([self.activation + slope] if self.activation != "none" else [])) or "none"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, the slope where there is one."""
        fields = asdict(self)
        return fields if self.activation == "leaky_relu" else {k: v for k, v in fields.items() if k != "negative_slope"}


@dataclass(frozen=True)
class Problem:
    """One convolution: ``activation(conv2d(x, w) + bias + residual)``.

    x is (batch, in_channels, height, width), w is ``(out_channels, in_channels / groups, *kernel_size)``, the result is
    (batch, out_channels, out_height, out_width), as in :func:`torch.nn.functional.conv2d`.

    Attributes:
        kernel_size: (R, S), rows and columns of the filter.
        padding: zeros added (top, bottom, left, right).
        precision: of storage and products; ``fp32`` is strict.
        device: as torch writes it, ``cpu`` or ``cuda:0``.
        memory_format: of x, residual and result. x and residual may come in the other one too and are then converted.
            ``channels_last`` is for GPUs.

    Raises:
        ValueError: if no such convolution exists (channels not divisible by groups, input smaller than the filter), or
            if its device is a CPU and its memory format is channels_last.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    precision: Precision = "fp32"
    device: str = "cpu"
    epilogue: Epilogue = field(default_factory=Epilogue)
    memory_format: MemoryFormat = "contiguous"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is one of {get_args(Precision)}, got {self.precision!r}")
        if self.memory_format not in get_args(MemoryFormat):
            raise ValueError(f"memory_format is one of {get_args(MemoryFormat)}, got {self.memory_format!r}")
        if self.memory_format != "contiguous" and self.device_type == "cpu":
            raise ValueError("channels_last is for GPUs: on the CPU tensors are contiguous")
        sizes = (self.in_channels, self.height, self.width, self.out_channels, self.groups)
        if min(*sizes, *self.kernel_size, *self.stride, *self.dilation) < 1 or min(self.batch, *self.padding) < 0:
            raise ValueError(f"sizes are positive and batch and padding not negative: {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"in_channels {self.in_channels} and out_channels {self.out_channels} must both be divisible by "
                f"groups {self.groups}"
            )
        if self.out_height < 1 or self.out_width < 1:
            span = [(size - 1) * dilation + 1 for size, dilation in zip(self.kernel_size, self.dilation, strict=True)]
            raise ValueError(
                f"input {self.height}x{self.width} with padding {self.padding} is smaller than the kernel, which spans "
                f"{span[0]}x{span[1]}; use a larger input or more padding"
            )

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        input_shape: tuple[int, ...] | torch.Size,
        *,
        zeros: tuple[int, int, int, int] = (0, 0, 0, 0),
        epilogue: Epilogue | None = None,
        precision: Precision = "fp32",
        device: str = "cpu",
        memory_format: MemoryFormat = "contiguous",
    ) -> Problem:
        """The problem of running `conv` on an input of shape (N, C, H, W).

        Args:
            zeros: (top, bottom, left, right) around the input, beside the convolution's own padding.
            epilogue: by default the convolution's own bias and nothing else.

        Raises:
            ValueError: if the shape is not one that the convolution takes.
        """
        if len(input_shape) != 4:
            raise ValueError(f"a convolution takes (N, C, H, W), got shape {tuple(input_shape)}")
        batch, channels, height, width = input_shape
        if channels != conv.in_channels:
            raise ValueError(f"the convolution takes {conv.in_channels} channels, got shape {tuple(input_shape)}")
        top, bottom, left, right = map(add, explicit_padding(conv.padding, conv.kernel_size, conv.dilation), zeros)
        return cls(
            batch,
            channels,
            height,
            width,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            (top, bottom, left, right),
            (conv.dilation[0], conv.dilation[1]),
            conv.groups,
            precision,
            device,
            epilogue or Epilogue(bias=conv.bias is not None),
            memory_format,
        )

    def on(self, device: str) -> Problem:
        """The same problem on another device; on a CPU its memory format is contiguous."""
        memory_format = self.memory_format if device.partition(":")[0] == "cuda" else "contiguous"
        return replace(self, device=device, memory_format=memory_format)

    @property
    def out_height(self) -> int:
        span = (self.kernel_size[0] - 1) * self.dilation[0] + 1
        return (self.height + sum(self.padding[:2]) - span) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        span = (self.kernel_size[1] - 1) * self.dilation[1] + 1
        return (self.width + sum(self.padding[2:]) - span) // self.stride[1] + 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, self.out_height, self.out_width

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]

    @property
    def storage(self) -> torch.dtype:
        return TORCH_DTYPE[self.precision]

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return TORCH_MEMORY_FORMAT[self.memory_format]

    def __str__(self) -> str:
        text = f"{self.batch}x{self.in_channels}x{self.height}x{self.width} -> {self.out_channels}"
        text += f", kernel {self.kernel_size[0]}x{self.kernel_size[1]}, {self.precision} on {self.device}"
        for name, default in (("stride", (1, 1)), ("padding", (0, 0, 0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name} {getattr(self, name)}"
        text += f", {self.memory_format}" if self.memory_format != "contiguous" else ""
        return text + (f", then {self.epilogue}" if str(self.epilogue) != "none" else "")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; :meth:`from_json` reads them back."""
        return asdict(self) | {"epilogue": self.epilogue.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Problem:
        """The problem of :meth:`to_json`'s fields.

        Raises:
            ValueError: if fields are missing, unknown or make no problem.
        """
        try:
            tuples = {name: tuple(data[name]) for name in ("kernel_size", "stride", "padding", "dilation")}
            return cls(**{**data, **tuples, "epilogue": Epilogue(**data["epilogue"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a problem: {error}") from error


def explicit_padding(
    padding: str | tuple[int, ...] | int, kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Torch's padding ('same', 'valid', an int or a pair) as zeros (top, bottom, left, right).

    'same' puts the odd zero at the bottom and right, as torch does.

    Raises:
        ValueError: if the padding is another string.
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [(size - 1) * step for size, step in zip(kernel_size, dilation, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if isinstance(padding, str):
        raise ValueError(f"padding is 'same', 'valid', an int or a pair, got {padding!r}")
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return rows, rows, columns, columns
