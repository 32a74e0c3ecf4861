"""What a model is run on while it is converted."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True, eq=False)
class Example:
    """A typical input of a model: arguments by position and by name, tensors or anything that holds some.

    Attributes:
        args: what the model is given by position.
        kwargs: what the model is given by name.
        is_written: whether the model writes to it, so that each run takes a copy.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_written: bool = False

    @classmethod
    def of(cls, example_inputs: Any, example_kwargs: Any = None) -> Example:
        """The example that a user named. Raises TypeError where it holds no tensor."""
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        kwargs = {} if example_kwargs is None else example_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise TypeError(f"example_kwargs holds arguments by name, got {type(kwargs).__name__}")
        example = cls(args, dict(kwargs))
        if not example.tensors:
            raise TypeError(
                "example_inputs is what the model takes, a tensor or a tuple of its arguments; there is no tensor in "
                f"{reprlib.repr(example_inputs)}; pass {_tensor_like(example_inputs)}"
            )
        return example

    def __str__(self) -> str:
        """Its arguments in short, shapes in the place of tensors, those by name last."""
        args, kwargs = tree_map_only(Tensor, lambda x: tuple(x.shape), (self.args, dict(self.kwargs)))
        named = [f"{name}={reprlib.repr(value)}" for name, value in kwargs.items()]
        return ", ".join([reprlib.repr(value) for value in args] + named)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, those with a name last."""
        return tuple(x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Tensor))

    @property
    def is_plain(self) -> bool:
        """Whether all arguments are tensors, so that shapes and types say how to make another such example."""
        return all(isinstance(x, Tensor) for x in (*self.args, *self.kwargs.values()))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def run(self, network: nn.Module) -> Any:
        """What a network makes of it."""
        args, kwargs = (self.args, self.kwargs)
        if self.is_written:
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
        return network(*args, **kwargs)

    def run_on_copy(self, network: nn.Module) -> tuple[Any, Example]:
        """What a network makes of a copy of it, and this example, which knows now whether it is written to."""
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (self.args, dict(self.kwargs)))
        copied = Example(args, kwargs)
        before = [x._version for x in copied.tensors]
        output = network(*args, **kwargs)
        is_written = before != [x._version for x in copied.tensors]
        return output, replace(self, is_written=is_written)


def is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(size) is int for size in value)


def _tensor_like(value: Any) -> str:
    """What to pass instead of a value that holds no tensor."""
    if isinstance(value, np.ndarray):
        return "torch.as_tensor of it"
    if is_shape(value):
        return f"torch.randn({', '.join(map(str, value))})"
    return "such inputs as the model gets, for example torch.randn(1, 3, 224, 224)"
