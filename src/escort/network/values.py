"""What a model returns: its tensors, and whether two of its outputs are the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from escort import reference

#: How far numbers of two runs on a GPU, where a sum's order is not fixed, may be apart, relative to the largest.
_GPU_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value, in order: in containers, and in the attributes of objects."""
    return [leaf for leaf in _leaves(value, ()) if isinstance(leaf, Tensor)]


def _leaves(value: Any, outer: tuple[int, ...]) -> Iterator[Any]:
    inner = (*outer, id(value))
    if id(value) in outer:
        return
    if isinstance(value, Tensor | torch.nn.Module | type):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item, inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _leaves(item, inner)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name, None), inner)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in vars(value).values():
            yield from _leaves(item, inner)
    else:
        yield value


def difference(a: Any, b: Any) -> str | None:
    """How `a` differs from `b`, in structure or beyond rounding; None where it does not."""
    if isinstance(b, Tensor):
        return None if isinstance(a, Tensor) and _are_close(a, b) else "a tensor differs"
    if isinstance(b, list) or type(b) is tuple:
        if not isinstance(a, list if isinstance(b, list) else tuple) or len(a) != len(b):
            return f"a {type(a).__name__} instead of a {type(b).__name__} of {len(b)}"
        return next((d for pair in zip(a, b, strict=True) if (d := difference(*pair))), None)
    if type(b) is dict and isinstance(a, dict):
        if list(a) != list(b):
            return f"the keys {list(a)} instead of {list(b)}"
        return next((d for key in b if (d := difference(a[key], b[key]))), None)
    if type(a) is not type(b):
        return f"a {type(a).__name__} instead of a {type(b).__name__}"
    pairs = zip(tensors_of(a), tensors_of(b), strict=False)
    return next((d for pair in pairs if (d := difference(*pair))), None)


def largest_error(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest relative error of a network's outputs; infinite where there are more of them, or fewer."""
    if len(outputs) != len(references):
        return math.inf
    return max(map(output_error, outputs, references), default=0.0)


def output_error(out: Tensor, ref: Tensor) -> float:
    """The relative error of an output. Infinities and NaN are right where both have the same at the same places."""
    if out.shape != ref.shape or not ref.is_floating_point():
        return reference.compare(out, ref)
    finite = torch.isfinite(ref)
    if not torch.allclose(out[~finite].double(), ref[~finite].double(), equal_nan=True):
        return math.inf
    return reference.compare(out.where(finite, 0.0), ref.where(finite, 0.0))


def _are_close(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not a.is_cuda:
        return torch.allclose(a, b, equal_nan=True)
    size = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=size * _GPU_TOLERANCE.get(a.dtype, 1e-4), equal_nan=True)
