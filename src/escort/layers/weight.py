"""The dense weight of a layer that holds it compressed: in memory only once something computes with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_NAMES = """
dtype device shape ndim layout requires_grad is_leaf grad grad_fn is_cuda is_cpu is_meta is_sparse itemsize nbytes
size dim numel nelement element_size stride __len__ is_floating_point is_complex is_contiguous get_device ndimension
"""
#: What can be asked of a weight without its numbers: properties and methods.
_OUTSIDES = frozenset(
    method if callable(method) else method.__get__ for method in (getattr(Tensor, name) for name in _NAMES.split())
)


def is_outside(func: Any) -> bool:
    """Whether a function of torch asks a tensor for anything but its numbers."""
    return func in _OUTSIDES


#: What gives the same weight.
_ITSELF = frozenset((Tensor.data.__get__, Tensor.detach, Tensor.requires_grad_))  # type: ignore[attr-defined]


class DenseWeight(Tensor):
    """A tensor that is read only: its shape, type and device cost nothing, and each computation makes a dense copy.

    Args:
        make: makes the dense tensor, of that shape and type and on that device.
    """

    _make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> DenseWeight:
        weight: DenseWeight = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=device, requires_grad=False
        )
        weight._make = make
        return weight

    def dense(self) -> Tensor:
        """The weight as a new plain tensor."""
        return self._make()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OUTSIDES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _ITSELF:
            return args[0]
        name = str(getattr(func, "__name__", ""))
        writes = name in ("__set__", "__setitem__", "set_") or (name.endswith("_") and not name.endswith("__"))
        if writes and isinstance(args[0], DenseWeight):
            raise RuntimeError(
                "the weight of a converted layer is a copy, and writing to it would change nothing; change the "
                "original model and convert it again"
            )
        return func(*_dense(args), **_dense(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_dense(args), **_dense(kwargs or {}))


def _dense(arguments: Any) -> Any:
    return tree_map_only(DenseWeight, DenseWeight.dense, arguments)
