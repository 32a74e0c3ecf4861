"""What a model is run on while it is converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Example:
    """A typical input of a model: some tensors by position, others by name.

    Attributes:
        args: what the model is given by position.
        kwargs: what the model is given by name.
    """

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: Any, example_kwargs: Any = None) -> Example:
        """The example that a user named. Raises TypeError where anything in it is no tensor."""
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        kwargs = {} if example_kwargs is None else example_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise TypeError(f"example_kwargs holds tensors by name, got {type(kwargs).__name__}")
        for name, value in kwargs.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"example_kwargs holds tensors, and {name} is a {type(value).__name__}; leave it out where it has "
                    "a default, or give it its value in a module around the model"
                )
        if not (args or kwargs) or not all(isinstance(x, Tensor) for x in args):
            raise TypeError("example_inputs is a tensor or a tuple of tensors")
        return cls(args, dict(kwargs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, those with a name last."""
        return (*self.args, *self.kwargs.values())

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def run(self, network: nn.Module) -> Any:
        """What a network makes of it."""
        return network(*self.args, **self.kwargs)
