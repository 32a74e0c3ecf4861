"""What runners of one filter have in common whatever the size of their inputs: tensors made of its weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F

from escort.filter import SparseFilter
from escort.problem import Problem

Known = TypeVar("Known")

_shared: WeakKeyDictionary[Any, dict[Hashable, tuple[ref[torch.Tensor], Any]]] = WeakKeyDictionary()


def shared(owner: object, key: Hashable, make: Callable[[], tuple[torch.Tensor, Known]]) -> tuple[torch.Tensor, Known]:
    """The tensor of that key, and what is known of it: made once, and again where no runner has it any more.

    Args:
        owner: the filter, or what was made of it; compared by identity.
        key: whatever the tensor depends on besides the owner, its device too.
        make: the tensor, complete on its device when this returns, and what is known of it.
    """
    entries = _shared.setdefault(owner, {})
    if key in entries:
        reference, known = entries[key]
        if (tensor := reference()) is not None:
            return tensor, known
    tensor, known = make()
    if tensor.is_cuda:  # another thread may launch a kernel that reads it
        torch.cuda.current_stream(tensor.device).synchronize()
    entries[key] = ref(tensor), known
    return tensor, known


def dense_weight(
    problem: Problem, sparse_filter: SparseFilter, memory_format: torch.memory_format, added_channels: int = 0
) -> torch.Tensor:
    """The weight (K, C / groups + added_channels, R, S) on the problem's device, which runners of a filter share."""
    device, dtype = torch.device(problem.device), problem.storage

    def make() -> tuple[torch.Tensor, None]:
        padded = F.pad(sparse_filter.to_dense(), (0, 0, 0, 0, 0, added_channels)).to(device, dtype)
        return padded.contiguous(memory_format=memory_format), None

    return shared(sparse_filter, ("dense", device, dtype, memory_format, added_channels), make)[0]


def weights_by_tap(problem: Problem, sparse_filter: SparseFilter) -> torch.Tensor:
    """The weights of a depthwise filter, (R * S, K) on the problem's device, which runners of a filter share."""
    device, dtype = torch.device(problem.device), problem.storage

    def make() -> tuple[torch.Tensor, None]:
        return sparse_filter.to_dense().flatten(1).t().contiguous().to(device, dtype), None

    return shared(sparse_filter, ("by tap", device, dtype), make)[0]
