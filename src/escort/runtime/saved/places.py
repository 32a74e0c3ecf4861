"""Where the programs and layers of a network lie in each other, and what a program may call and read there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from escort.layers import SparseConv2d
from escort.runtime.program import Program
from escort.runtime.saved.builders import is_own
from escort.runtime.steps import Listing


def joined(path: str, name: str) -> str:
    """The path of what has a name in the program, or the module, of a path."""
    return f"{path}.{name}" if path else name


@dataclass(frozen=True)
class Places:
    """The paths of a network's programs and layers.

    Attributes:
        programs: the whole network's path is the empty text.
        layers: those that programs call, and those that stand in the place of a model's own.
    """

    programs: Collection[str]
    layers: Mapping[str, nn.Module]

    def around(self, path: str) -> str | None:
        """The innermost program or layer that a path lies in, or None."""
        while path:
            path = path.rpartition(".")[0]
            if path in self.programs or path in self.layers:
                return path
        return None

    def in_model(self, path: str) -> bool:
        """Whether what lies around a path is code of the model, not a program or another layer."""
        outer = self.around(path)
        return outer is None or self._is_own(outer)

    def _is_own(self, path: str) -> bool:
        return path in self.layers and is_own(self.layers[path])

    def check(self) -> None:
        """Raises ValueError where one lies within another that cannot hold it."""
        for path in self.programs:
            if path in self.layers:
                raise ValueError(f"the part {path} is a layer, too")
            if not self.in_model(path):
                raise ValueError(f"the part {path} lies within another part")
        for path, layer in self.layers.items():
            outer = self.around(path)
            if outer is not None and outer in self.layers and not self._is_own(outer):
                raise _within(path, outer)
            if is_own(layer) and outer not in self.programs:
                raise ValueError(f"layer {path} is the model's own, and no program calls it")

    def again(self, module: nn.Module, path: str) -> tuple[str, ...]:
        """What the paths begin with of what lies in programs and sparse convolutions that the module of a path holds in
        a second place. Their tensors are those of the first one."""
        inside = {joined(path, name): inner for name, inner in module.named_modules(remove_duplicate=False)}
        found = {name for name, inner in inside.items() if isinstance(inner, Program | SparseConv2d)}
        return tuple(f"{name}." for name in found.difference(self.programs, self.layers))

    def owned(self, program: str, tensor: Callable[[str], Any]) -> Callable[[Listing], dict[str, Any]]:
        """What gives the program of a path its layers and tensors.

        Args:
            tensor: gives the program's own tensors, those of no layer, by their paths in the network.
        """

        def owned(listing: Listing) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for step in listing.steps:
                if step.kind == "layer" and step.target not in found:
                    found[step.target] = self._layer(program, step.target)
                elif step.kind == "tensor" and step.target not in found:
                    found[step.target] = self._tensor(program, step.target, tensor)
                if step.kind != "call" and isinstance(found[step.target], nn.Module) is not (step.kind == "layer"):
                    raise ValueError(f"{joined(program, step.target)} is no tensor that a program may read")
            return found

        return owned

    def _layer(self, program: str, target: str) -> nn.Module:
        path = joined(program, target)
        layer, outer = self.layers[path], self.around(path)
        if outer != program:
            raise _within(path, outer)
        return layer

    def _tensor(self, program: str, target: str, tensor: Callable[[str], Any]) -> Any:
        """One of a layer's, or one of the program's own."""
        path = joined(program, target)
        outer = self.around(path)
        if path not in self.layers and outer == program:
            return tensor(path)
        if outer is not None and outer in self.layers and self.around(outer) == program:
            layer, name = self.layers[outer], path.removeprefix(f"{outer}.")
            state = layer.state_dict(keep_vars=True)
            is_filter = isinstance(layer, SparseConv2d) or path.startswith(self.again(layer, outer))
            if name in state and not is_filter:  # which only kernels may read
                return state[name]
        raise ValueError(f"{path} is no tensor that a program may read; make it a buffer of the model")


def _within(path: str, outer: str | None) -> ValueError:
    return ValueError(f"layer {path} lies within the layer {outer}, which cannot be saved; call one of them")
