"""How a window of a convolution or pooling goes over a map: its attributes, and the paddings that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.limits import MAX_BYTES
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.values import Value
from escort.layers import SamePad

_AUTO = "NOTSET SAME_UPPER SAME_LOWER VALID"


@dataclass(frozen=True)
class Window:
    """A window, one number per axis of the map.

    Attributes:
        size, stride, dilation: of the window.
        before, after: what is added at either side of the map.
        same: whether `before` and `after` depend on sizes that the file leaves open, as "same" padding at the end; they
            are zeros then.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    same: bool = False

    @property
    def reach(self) -> tuple[int, ...]:
        """How many positions a window goes over."""
        return tuple((size - 1) * dilation + 1 for size, dilation in zip(self.size, self.dilation, strict=True))

    @property
    def is_symmetric(self) -> bool:
        return not self.same and self.before == self.after

    @property
    def padding(self) -> list[int]:
        """As F.pad takes it."""
        return [n for pair in reversed(list(zip(self.before, self.after, strict=True))) for n in pair]

    @classmethod
    def of(cls, node: Node, size: Sequence[int], x: Tensor | Value, explicit: bool = False) -> Window:
        """The window of a node that goes over x (N, C, *sizes), if `explicit` with its pads whatever its auto_pad."""
        count, size = len(size), tuple(int(each) for each in size)
        stride, dilation = (_numbers(node, name, [1] * count, 1) for name in ("strides", "dilations"))
        if x.ndim != count + 2 or min(size, default=1) < 1 or max(size, default=0) > MAX_BYTES:
            raise NotSupportedError(f"its window of {size} does not go over a map of shape {list(node.shape(x))}")
        auto = node.text("auto_pad", "NOTSET", _AUTO)
        pads = _numbers(node, "pads", [0] * (2 * count))
        if auto == "NOTSET" or explicit:
            return cls(size, stride, dilation, pads[:count], pads[count:])
        window = cls(size, stride, dilation, (0,) * count, (0,) * count)
        window = window if auto == "VALID" else window._same(node, auto, x)
        if not window.same:  # else nobody knows yet what its pads should be
            check_pads(pads, (*window.before, *window.after), auto)
        return window

    def _same(self, node: Node, auto: str, x: Tensor | Value) -> Window:
        """The window with "same" padding, the larger half of it at the end (SAME_UPPER) or in front."""
        size, stride, dilation, count = self.size, self.stride, self.dilation, len(self.size)
        totals = []
        for known, (reach, step) in zip(node.shape(x)[2:], _reaches(size, stride, dilation), strict=True):
            if known is None and step > 1:
                if auto == "SAME_LOWER":
                    node.known(known, "zeros in front (auto_pad)")
                return Window(size, stride, dilation, (0,) * count, (0,) * count, same=True)
            totals.append(max(reach - 1 if known is None else (-(-known // step) - 1) * step + reach - known, 0))
        less, more = tuple(n // 2 for n in totals), tuple(n - n // 2 for n in totals)
        return Window(size, stride, dilation, *((less, more) if auto == "SAME_UPPER" else (more, less)))

    def padded(self, node: Node, x: Any, value: float = 0.0) -> Any:
        """x with everything around it that the window goes over."""
        if self.same:
            if value != 0.0:
                node.known(None, "zeros in front (auto_pad)")
            return node.module(lambda: SamePad(self.size, self.stride, self.dilation), {}, node.variable())
        if not any((*self.before, *self.after)):
            return x
        return node.call(F.pad, x, self.padding, "constant", value)


def check_pads(pads: tuple[int, ...], those: tuple[int, ...], auto: str) -> None:
    """Raises NotSupportedError where a node has pads beside its auto_pad that are not those that it stands for."""
    if any(pads) and pads != those:
        raise NotSupportedError(
            f"its pads {list(pads)} are not those of its auto_pad {auto}; export it with one of the two"
        )


def _numbers(node: Node, name: str, default: list[int], least: int = 0) -> tuple[int, ...]:
    numbers = tuple(node.get(name, default) or default)
    if len(numbers) != len(default) or min(numbers, default=least) < least:
        raise NotSupportedError(
            f"its {name} are {list(numbers)[:8]}, and must be {len(default)} numbers from {least} up; export it anew"
        )
    return numbers


def _reaches(size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    return [((n - 1) * d + 1, s) for n, s, d in zip(size, stride, dilation, strict=True)]
