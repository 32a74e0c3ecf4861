"""A module in the place of another: the hooks of that are called, and its plain attributes can be read."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
#: What graphs have for themselves, those of exported programs too.
_OF_GRAPHS = frozenset(dir(fx.GraphModule)) | {"meta", "shape_env", "range_constraints", "validate_inputs"}


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or behind a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_patched(module: nn.Module) -> bool:
    """Whether a call of a module runs other code than its class's forward: one put on the module, or a ``__call__``."""
    if isinstance(module, fx.GraphModule) or type(module).__module__.startswith("torch.export."):
        return False  # they run what they show
    return "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__


def runs_more(module: nn.Module) -> bool:
    """Whether what a module's class says of it is not all that happens in a call."""
    return has_hooks(module) or is_patched(module)


def adopt(module: nn.Module, original: nn.Module) -> None:
    """Lets `module` take the place of `original`: its hooks are called, and its plain attributes can be read."""
    for name in _HOOKS:
        getattr(module, name).update(getattr(original, name))
    for name, value in plain_attributes(original).items():
        if not hasattr(module, name):
            setattr(module, name, value)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What can be read from a module, or by a property, that is no module, tensor or method."""
    own = _OF_GRAPHS if isinstance(module, fx.GraphModule) else frozenset(dir(nn.Module))
    names = {*dir(type(module)), *vars(module)} - own - {"training"}
    values = {}
    for name in sorted(names):
        if name.startswith("_") or callable(inspect.getattr_static(module, name)):
            continue
        with suppress(Exception):  # a property may raise anything
            value = getattr(module, name)
            if all(isinstance(leaf, _PLAIN) or dataclasses.is_dataclass(leaf) for leaf in tree_leaves(value)):
                values[name] = value
    return values
