"""What a network was made of when a graph or a native form was made of it, and whether it still is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from escort.layers import SparseConv2d

#: Layers that compute something else in training.
SWITCHED = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU)
_version = attrgetter("_version")


class Watch:
    """The state of a network that a graph depends on.

    A graph reads tensors where they lay, so that it follows what is written to them. It does not follow a layer that
    takes another's place, a tensor that moves, values and biases of sparse convolutions, which were laid out in tables
    of their own, and hooks. What the graphs read is kept alive as long as this is.
    """

    def __init__(self, network: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
        """It watches some modules of the network, by default all."""
        self.network = network
        self._places: list[tuple[Mapping[str, nn.Module | None], str]] = []
        self._owners: list[Mapping[str, torch.Tensor | None]] = []
        # What runs besides: hooks of all modules, of one and of any.
        self._hooks: list[Any] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._sparse: list[SparseConv2d] = []
        self._switched: list[nn.Module] = []  # those that compute something else in training
        for module in network.modules() if modules is None else modules:
            self._places += [(module._modules, name) for name in module._modules]
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            if isinstance(module, SparseConv2d):
                self._sparse.append(module)
            else:
                self._owners += [tensors for tensors in (module._parameters, module._buffers) if tensors]
            if isinstance(module, SWITCHED):
                self._switched.append(module)
        self._followed = [tensor for layer in self._sparse for tensor in layer._followed]
        self._read = [tensor for owner in self._owners for tensor in owner.values() if tensor is not None]
        self._kept = [layer._runners for layer in self._sparse], [tensor.detach() for tensor in self._read]
        self._state = self._now()

    def holds(self) -> bool:
        """Whether the network is what it was."""
        return not any(self._hooks) and self._now() == self._state

    def _now(self) -> tuple[Any, ...]:
        """What is compared. A layer that changes begins a new cache of runners; a module is equal to itself alone."""
        return (
            id(getattr(self.network, "listing", None)),
            [modules.get(name) for modules, name in self._places],
            [id(layer._runners) for layer in self._sparse],
            sum(map(_version, self._followed)),
            [*map(id, chain.from_iterable([owner.values() for owner in self._owners]))],
            [*map(torch.Tensor.data_ptr, self._read)],
            [module.training for module in self._switched],
        )
