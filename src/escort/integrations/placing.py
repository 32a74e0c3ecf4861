"""Modules and tensors put into a network by their paths."""

from __future__ import annotations

from torch import Tensor, nn


def put(root: nn.Module, path: str, item: nn.Module | Tensor) -> None:
    """Sets ``root.<path>``, which is free: a module, a parameter, or any other tensor as a buffer.

    What stands around it is made where it is missing. To set what is there already, see
    ``network/passes/operations.attach``.

    Raises:
        KeyError: where something has that name.
    """
    *around, last = path.split(".")
    for part in around:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(item, nn.Module):
        root.add_module(last, item)
    elif isinstance(item, nn.Parameter):
        root.register_parameter(last, item)
    else:
        root.register_buffer(last, item)
