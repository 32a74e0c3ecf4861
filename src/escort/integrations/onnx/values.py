"""What a name of a file stands for: a constant, a result of the graph, or sizes that come of the input's."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class Value:
    """A result of the graph: a tensor, or a number that comes of its sizes.

    Sizes that the file leaves open have two examples. What differs between the results of both is open, too.

    Attributes:
        node: what computes it.
        examples: results without memory at both examples, or numbers.
    """

    node: fx.Node
    examples: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Its sizes, None for those that are open."""
        shapes = (x.shape for x in self.examples)
        return tuple(sizes[0] if len({*sizes}) == 1 else None for sizes in zip(*shapes, strict=True))

    @property
    def ndim(self) -> int:
        return int(self.examples[0].ndim)

    @property
    def dtype(self) -> torch.dtype:
        return self.examples[0].dtype

    def _combined(self, function: Callable[..., Any], *operands: Any) -> Value:
        """A number computed of this one and others."""
        nodes = [operand.node if isinstance(operand, Value) else operand for operand in operands]
        node = self.node.graph.call_function(function, tuple(nodes))
        examples = (
            function(*(operand.examples[i] if isinstance(operand, Value) else operand for operand in operands))
            for i in range(len(self.examples))
        )
        return Value(node, tuple(examples))

    def __add__(self, other: Any) -> Value:
        return self._combined(operator.add, self, other)

    def __radd__(self, other: Any) -> Value:
        return self._combined(operator.add, other, self)

    def __sub__(self, other: Any) -> Value:
        return self._combined(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Value:
        return self._combined(operator.sub, other, self)

    def __mul__(self, other: Any) -> Value:
        return self if type(other) is int and other == 1 else self._combined(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Value:
        return self * other

    def __floordiv__(self, other: Any) -> Value:
        return self._combined(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Value:
        return self._combined(operator.floordiv, other, self)

    def __truediv__(self, other: Any) -> Value:
        return self._combined(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._combined(operator.truediv, other, self)

    def __mod__(self, other: Any) -> Value:
        return self._combined(operator.mod, self, other)

    def __neg__(self) -> Value:
        return self._combined(operator.neg, self)

    def floor(self) -> Value:
        return self._combined(math.floor, self)

    def ceil(self) -> Value:
        return self._combined(math.ceil, self)


@dataclass(frozen=True, eq=False)
class Sizes:
    """A tensor of few numbers that come of the input's sizes. What is known of them is plain numbers.

    Attributes:
        array: of int, float and :class:`Value`.
        dtype: as the file has it.
    """

    array: NDArray[Any]
    dtype: torch.dtype

    @property
    def is_integer(self) -> bool:
        return not self.dtype.is_floating_point


#: What a name of a file stands for.
Operand: TypeAlias = Tensor | Value | Sizes
#: A whole number that may depend on the input's sizes.
Whole: TypeAlias = int | Value


def sizes_of(numbers: Any, dtype: torch.dtype = torch.int64) -> Operand:
    """Numbers as an operand: a constant where all are known."""
    array = np.asarray(numbers, dtype=object)
    if any(isinstance(number, Value) for number in array.flat):
        return Sizes(array, dtype)
    return torch.tensor(array.tolist(), dtype=dtype)


def product(numbers: list[Whole]) -> Whole:
    """The product of whole numbers."""
    result: Whole = 1
    for number in numbers:
        result = number * result if isinstance(number, Value) else result * number
    return result
