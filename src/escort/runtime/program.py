"""A converted network as one flat program, and the loop that runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn
from weakref import ref

from torch import fx, nn
from torch.nn.modules import module as torch_module

from escort.layers.observed import is_observed
from escort.runtime.graph import read
from escort.runtime.images import ConvOfImages, of_images, pass_on
from escort.runtime.loop import BoundStep, run_steps
from escort.runtime.native import Native
from escort.runtime.native.form import unknown
from escort.runtime.stand_in import adopt
from escort.runtime.steps import REQUIRED, Input, Listing, Step
from escort.runtime.templates import Slot, filled, mapped

#: What torch's modules look at in each call before they run their forward alone.
_HOOKS = "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


def _inside(module: nn.Module, index: int | str) -> nn.Module:
    """The module of a name or a number in another. Raises TypeError, IndexError or KeyError where there is none."""
    if not isinstance(index, int | str):
        raise TypeError(
            f"a part of a converted model is indexed by a number or a name, got {index!r}; slice the original"
        )
    if isinstance(index, int) and index < 0:
        raise IndexError("parts of a converted model are numbered from the front, as some may be left out")
    if (inner := module._modules.get(str(index))) is None:
        error = IndexError if isinstance(index, int) else KeyError
        raise error(
            f"there is no {index} in this part of the converted model, which has {', '.join(module._modules)}: others "
            "were fused into these, or do nothing"
        )
    return inner


class Container(nn.Module):
    """What layers of a program lie in. It was taken apart into steps, so that nothing calls it.

    It is indexed as the original's Sequential, ModuleList or ModuleDict is, by names or by numbers from the front. What
    was fused into another layer is left out, and the others keep their numbers. Iterating gives the layers.
    """

    def __getitem__(self, index: int | str) -> nn.Module:
        return _inside(self, index)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_hook()

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_hook()


def _refuse_hook() -> NoReturn:
    raise RuntimeError(
        "this module was taken apart when the model was converted, and a hook on it would never run; register the hook "
        "on the original and convert that"
    )


class Program(nn.Module):
    """A network as a list of steps, with its layers and tensors at the paths that they have in the network.

    A value is let go of behind the last step that reads it.

    Args:
        owned: the layers and tensors that steps name, by path. One may lie within another.

    Attributes:
        listing: what it does.
        native: what runs its calls on CPUs.

    Raises:
        ValueError: where there is nothing at a path, or a path is the name of something else.
    """

    listing: Listing
    native: Native

    def __init__(self, listing: Listing, owned: dict[str, Any]) -> None:
        super().__init__()
        self.listing = listing
        for step in listing.steps:
            if step.kind != "call" and step.target not in owned:
                raise ValueError(f"there is no {step.target}")
        for path in owned:  # what a layer lies in comes before it, else the order stays
            parts = path.split(".")
            for outer in (".".join(parts[: i + 1]) for i in range(len(parts))):
                if outer in owned:
                    self._own(outer, owned[outer])
        self._bound: Bound | None = None
        self.native = Native()
        super().train(False)

    def _own(self, path: str, value: Any) -> None:
        *containers, name = path.split(".")
        owner: nn.Module = self
        try:
            for container in containers:
                if container not in owner._modules:
                    owner.add_module(container, Container())
                owner = owner._modules[container]  # type: ignore[assignment]
            if any(name in held for held in (owner._modules, owner._parameters, owner._buffers)):
                return  # it is there already, or is a part of a layer
            if isinstance(value, nn.Module):
                owner.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                owner.register_parameter(name, value)
            elif vars(owner).get(name) is not value:  # an attribute of a layer
                owner.register_buffer(name, value)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be the name of a layer or tensor: {error}") from error

    @classmethod
    def of(cls, network: fx.GraphModule) -> Program:
        """The program of a graph. It takes over the graph's layers and tensors, and leaves out what does nothing.

        Raises:
            ValueError: where the graph takes or returns what is no plain value or container.
        """
        return cls(*read(network))

    def __getitem__(self, index: int | str) -> nn.Module:
        return _inside(self, index)

    __iter__ = None  # or Python would ask for numbers until one is not there

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._bound
        if bound is None or not bound.belongs_to(self):
            bound = self._bound = Bound(self, joins_images=True)
        values = bound.values.copy()
        if kwargs or len(args) != bound.positional:
            args = self._in_order(args, kwargs)
        values[: len(args)] = args
        try:
            if is_observed():
                run_steps(bound.steps, values)
            else:
                self.native.run(self, self.listing, bound.steps, values, bound.unobserved)
        except Exception as error:  # whatever a step raises: where a tensor is missing, that is to be read first
            if reason := next(filter(None, map(Input.no_tensor, self.listing.inputs, args)), None):
                raise TypeError(reason) from error
            raise
        return filled(self.listing.output, values)

    def bind_anew(self) -> None:
        """Lets the next call find the layers again, of which some took the places of others."""
        self._bound = None

    def _in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The values of all inputs. Raises TypeError as a function does."""
        left = dict(kwargs)
        ordered: list[Any] = []
        position = 0
        for expected in self.listing.inputs:
            name = expected.name
            if name.startswith("**"):
                ordered.append(left)
                left = {}
            elif name.startswith("*"):
                ordered.append(args[position:])
                position = len(args)
            elif position < len(args):
                ordered.append(expected.checked(args[position]))
                position += 1
                if name in left:
                    raise self._wrong_call(f"several values for {name}")
            elif name in left:
                ordered.append(expected.checked(left.pop(name)))
            elif expected.default is not REQUIRED:
                ordered.append(expected.checked(expected.default))
            else:
                unknown = [other for other in left if all(other != known.name for known in self.listing.inputs)]
                raise self._wrong_call(f"no {name}" + (f", but {', '.join(unknown)}" if unknown else ""))
        if position < len(args) or left:
            named = f" and {', '.join(kwargs)} by name" if kwargs else ""
            raise self._wrong_call(f"{len(args)} by position{named}")
        return tuple(ordered)

    def _wrong_call(self, given: str) -> TypeError:
        names = ", ".join(expected.name for expected in self.listing.inputs)
        return TypeError(f"the network takes ({names}), got {given}")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: what is bound belongs to these layers."""
        return {**self.__dict__, "_bound": None, "native": copy.copy(self.native)}

    def extra_repr(self) -> str:
        return str(self.listing)


def tensor_at(program: Program, path: str) -> Any:
    """The tensor that a program's step reads from a path."""
    *containers, name = path.split(".")
    owner: nn.Module = program
    for container in containers:
        owner = owner._modules[container]  # type: ignore[assignment]
    return _tensor(owner, name)


def with_plain(program: Program, function: Callable[[Any], Any]) -> None:
    """Puts ``function(value)`` in the place of every plain value among the arguments of a program's steps."""

    def changed(template: Any) -> Any:
        return mapped(template, lambda leaf: leaf if isinstance(leaf, Slot) else function(leaf))

    steps = [replace(step, args=changed(step.args), kwargs=changed(step.kwargs)) for step in program.listing.steps]
    program.listing = replace(program.listing, steps=tuple(steps))
    program._bound = None


def as_programs(network: nn.Module) -> nn.Module:
    """A network with programs in the place of its graphs. A graph that no program can hold stays as it is."""
    graphs = [name for name, module in network.named_modules() if isinstance(module, fx.GraphModule)]
    for name in reversed(graphs):  # those inside of others first
        graph = network.get_submodule(name)
        try:
            program = Program.of(graph)  # type: ignore[arg-type]
        except ValueError:
            continue
        adopt(program, graph)
        if not name:
            return program
        network.set_submodule(name, program)
    return network


def programs_in(network: nn.Module) -> list[Program]:
    """A network where it is a program, and the programs in it."""
    return [module for module in network.modules() if isinstance(module, Program)]


def native_steps(network: nn.Module) -> tuple[int, dict[str, str]]:
    """How many steps of a network's programs run natively on a CPU; the others, and why.

    It says so of the last kind of call that was made of a program; where there was none, of any kind.
    """
    count, others = 0, dict[str, str]()
    for path, program in network.named_modules():
        if not isinstance(program, Program):
            continue
        prefix = f"{path}." if path else ""
        forms = program.native.stats()["forms"]
        for number, step in enumerate(program.listing.steps):
            reason = forms[-1]["reasons"].get(number) if forms else unknown(program, step)
            count += reason is None
            if reason is not None:
                others[prefix + step.target if step.kind == "layer" else str(step)] = reason
    return count, others


class Bound:
    """A program's steps with the places where their functions, layers and values are.

    Args:
        joins_images: whether a convolution may normalise images itself, as part of one launch.

    Attributes:
        values: what a run starts with: room for inputs and results, then the plain arguments of steps.
        positional: how many inputs a call by position has; -1 where it may have any number, or they are checked.
        steps: what :func:`escort.runtime.loop.run_steps` runs.
        unobserved: gives the same for a call that nothing observes: the forward of each layer, without what torch's
            modules do around it, as long as no hook wants that.
    """

    def __init__(self, program: Program, *, joins_images: bool = False) -> None:
        self.modules = program._modules
        self.containers: dict[tuple[str, ...], tuple[dict[str, Any], str, nn.Module]] = {}
        listing = program.listing
        count = len(listing.inputs)
        is_checked = any(given.name.startswith("*") or given.fixed is not REQUIRED for given in listing.inputs)
        self.positional = -1 if is_checked else count
        self.values: list[Any] = [None] * (count + len(listing.steps))
        self.steps: list[BoundStep] = []
        self._forwards: list[BoundStep] = []
        self._hooks: list[Any] = [*_GLOBAL_HOOKS]
        joined = of_images(listing, program) if joins_images else {}
        for number, (step, last_reads) in enumerate(zip(listing.steps, listing.last_reads(), strict=True), count):
            table, key = self._callable(program, step)
            if number in joined.values():
                table, key = (pass_on,), 0
            elif number in joined:
                images = self._callable(program, listing.steps[joined[number] - count])
                table, key = (ConvOfImages(images, (table, key)),), 0
            is_simple = not step.kwargs and all(isinstance(value, Slot) or _is_fixed(value) for value in step.args)
            arguments = tuple(self._number(value) for value in step.args) if is_simple else ()
            template = None if is_simple else (step.args, step.kwargs)
            self.steps.append((table, key, arguments, template, number, last_reads))
            layer = table[key]
            if isinstance(layer, nn.Module) and type(layer).__call__ is _CALL:
                self._hooks += (getattr(layer, name) for name in _HOOKS)
                table = _Forward(table, layer)
            self._forwards.append((table, key, arguments, template, number, last_reads))

    def unobserved(self) -> list[BoundStep]:
        return self.steps if any(self._hooks) else self._forwards

    def _number(self, value: Any) -> int:
        if isinstance(value, Slot):
            return value.number
        self.values.append(value)
        return len(self.values) - 1

    def _callable(self, program: Program, step: Step) -> tuple[Any, Any]:
        if step.kind == "call":
            return (step.target,), 0
        *path, name = step.target.split(".")
        owner: nn.Module = program
        for i, part in enumerate(path):
            inner = owner._modules[part]
            assert inner is not None
            self.containers[tuple(path[: i + 1])] = owner._modules, part, inner
            owner = inner
        if step.kind == "layer":
            return owner._modules, name
        return (partial(_tensor, owner, name),), 0

    def belongs_to(self, program: Program) -> bool:
        """Whether it was made of this program, and the modules that the layers lie in are still the same."""
        if self.modules is not program._modules:
            return False
        return all(modules.get(name) is module for modules, name, module in self.containers.values())


_CALL = nn.Module.__call__


class _Forward:
    """What a table of layers is asked for: the forward of the layer that was there, or what has taken its place."""

    __slots__ = ("layer", "layers")

    def __init__(self, layers: Mapping[str, nn.Module | None], layer: nn.Module) -> None:
        self.layers, self.layer = layers, ref(layer)

    def __getitem__(self, name: str) -> Any:
        layer = self.layers[name]
        if layer is None or layer is not self.layer():
            return layer
        is_plain = type(layer).__call__ is _CALL and layer._compiled_call_impl is None
        return layer.forward if is_plain else layer


def _is_fixed(value: Any) -> bool:
    """Whether an argument is the same object in every run: what is called cannot write to it."""
    return not isinstance(value, (list, tuple, dict, slice)) or (
        type(value) is tuple and all(type(item) in (int, float, bool) for item in value)
    )


def _tensor(owner: nn.Module, name: str) -> Any:
    """A tensor that a module holds at the moment, whatever else the name stands for."""
    for tensors in (owner._parameters, owner._buffers):
        if name in tensors:
            return tensors[name]
    return vars(owner)[name]
