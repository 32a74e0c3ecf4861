"""A module in the place of another: the hooks of that are called, and its plain attributes can be read."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or behind a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def adopt(module: nn.Module, original: nn.Module) -> None:
    """Lets `module` take the place of `original`: its hooks are called, and its plain attributes can be read."""
    for name in (
        *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ):
        getattr(module, name).update(getattr(original, name))
    for name, value in plain_attributes(original).items():
        if not hasattr(module, name):
            setattr(module, name, value)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What can be read from a module besides its modules, tensors and methods, of its class too."""
    names = [name for name in dir(type(module)) if name not in dir(nn.Module)] + list(vars(module))
    values = {}
    for name in names:
        if name.startswith("_") or callable(inspect.getattr_static(module, name)):
            continue
        with suppress(Exception):  # a property may raise anything
            value = getattr(module, name)
            if not any(isinstance(leaf, Tensor | nn.Module) for leaf in tree_leaves(value)):
                values[name] = value
    return values
