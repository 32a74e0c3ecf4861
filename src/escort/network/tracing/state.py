"""What a model keeps between its calls besides its weights, and what of it a call has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from escort.layers import SparseConv2d

_Attributes = dict[str, Any]


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
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return plain | {name: value for name, value in module._buffers.items() if value is not None}


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same, as far as anyone can tell: objects of unknown classes count as the same."""
    if isinstance(a, Tensor):
        if type(a) is not type(b) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, int | float | complex | str | bytes | set | frozenset | torch.Size | torch.dtype | torch.device):
        return bool(a == b)
    return True
