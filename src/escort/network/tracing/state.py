"""What a model keeps between its calls besides its weights, and what of it a call has changed."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from escort.layers import SparseConv2d

_Attributes = dict[str, Any]
#: What torch keeps in every module.
_OF_MODULES = frozenset(vars(nn.Module()))


class State:
    """The plain attributes and the buffers of a model's modules, as they were when this was made.

    Modules and parameters among the attributes are the model's own; everything else is a copy. Converted layers keep
    nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = {path: module for path, module in model.named_modules() if not isinstance(module, SparseConv2d)}
        self._kept = {path: _attributes(module) for path, module in modules.items()}
        memo = {id(module): module for module in model.modules()} | {id(p): p for p in model.parameters()}
        self._kept = copy.deepcopy(self._kept, memo)
        self._types = {path: type(module) for path, module in modules.items()}

    def changed(self, model: nn.Module) -> list[str]:
        """The qualified names of what is not as it was."""
        names = []
        for path, module in model.named_modules():
            now, before = _attributes(module), self._kept.get(path)
            if before is None:
                continue
            changed = [n for n in now.keys() | before.keys() if n not in now or n not in before]
            changed += [n for n in now.keys() & before.keys() if not _same(now[n], before[n])]
            names += [f"{path}.{name}" if path else name for name in sorted(changed)]
        return names

    def with_proxies(self, model: nn.Module) -> list[str]:
        """The names of what holds a value of torch.fx, since a forward that was traced put it there."""
        modules = model.modules()
        return sorted({name for module in modules for name, value in _attributes(module).items() if _is_traced(value)})

    def restore(self, model: nn.Module) -> None:
        """Puts everything back. Modules that are of another class than those that were there stay as they are."""
        for path, module in model.named_modules():
            if self._types.get(path) is not type(module):
                continue
            kept = copy.deepcopy(self._kept[path], {id(m): m for m in model.modules()})
            for name in _attributes(module).keys() - kept.keys():
                delattr(module, name)
            for name, value in kept.items():
                if name in module._buffers:
                    module._buffers[name] = value
                else:
                    module.__dict__[name] = value


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back what calls of a model have changed of its state meanwhile."""
    state = State(model)
    try:
        yield
    finally:
        if state.changed(model):
            state.restore(model)


def own_draws() -> AbstractContextManager[None]:
    """Leaves torch's generators of random numbers as they were."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else [])


@contextmanager
def same_draws() -> Iterator[None]:
    """Lets torch draw the same random numbers each time, and leaves its generators as they were."""
    with own_draws():
        torch.manual_seed(0)
        yield


def _attributes(module: nn.Module) -> _Attributes:
    # A graph's own are torch.fx's; those of TorchScript's modules lie in C++, and cannot be copied one by one.
    attributes = {} if isinstance(module, fx.GraphModule | torch.jit.ScriptModule) else vars(module)
    plain = {name: value for name, value in attributes.items() if name not in _OF_MODULES}
    return plain | {name: value for name, value in module._buffers.items() if value is not None}


def _is_traced(value: Any) -> bool:
    """Whether a value, or an object in it, holds something of torch.fx's tracing."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, fx.Proxy):
            return True
        is_object = not isinstance(leaf, nn.Module | Tensor) and hasattr(leaf, "__dict__")
        if is_object and any(isinstance(inner, fx.Proxy) for inner in vars(leaf).values()):
            return True
    return False


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same: objects of other classes by what they hold."""
    if isinstance(a, Tensor):
        if type(a) is not type(b) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if type(a) is not type(b):
        return False
    if isinstance(a, nn.Module) or a is b:
        return a is b
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if type(a).__eq__ is not object.__eq__:  # type: ignore[comparison-overlap]
        return bool(a == b)
    return _same(vars(a), vars(b)) if hasattr(a, "__dict__") and not callable(a) else True
