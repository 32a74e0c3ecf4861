"""Tensors and types of a file as those of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from escort.integrations.onnx.errors import NotSupportedError

if TYPE_CHECKING:
    from onnx import TensorProto

#: The types of a file that torch computes with, by their names in ONNX.
DTYPES = {
    "FLOAT": torch.float32,
    "DOUBLE": torch.float64,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
#: Types of a few bits hold whole numbers, or eights of them in a float, and are computed with in larger ones.
_LARGER = {"INT4": torch.int8, "UINT4": torch.uint8, "INT2": torch.int8, "UINT2": torch.uint8}


def type_name(number: int) -> str:
    """What ONNX calls an element type."""
    from onnx import TensorProto

    return TensorProto.DataType.Name(number) if number in TensorProto.DataType.values() else f"number {number}"


def dtype_of(number: int) -> torch.dtype:
    """The torch type of an element type. Raises NotSupportedError where there is none."""
    name = type_name(number)
    if name not in DTYPES:
        raise NotSupportedError(f"it is of type {name.lower()}, which torch does not compute with; use float32")
    return DTYPES[name]


def is_narrow(tensor: TensorProto) -> bool:
    """Whether the numbers of a tensor are of a type of a few bits, and :func:`to_torch` gives them in a larger one."""
    return type_name(tensor.data_type) not in DTYPES


def to_torch(tensor: TensorProto) -> Tensor:
    """A tensor of a file, in memory of its own.

    Raises:
        NotSupportedError: where torch has no such type.
    """
    from onnx import numpy_helper

    name = type_name(tensor.data_type)
    if name not in DTYPES and name not in _LARGER and not name.startswith("FLOAT8"):
        raise NotSupportedError(f"a constant is of type {name.lower()}, which torch does not compute with")
    array: NDArray[Any] = numpy_helper.to_array(tensor)
    if name == "BFLOAT16":
        return torch.from_numpy(np.array(array, copy=True).view(np.int16)).view(torch.bfloat16)
    if name.startswith("FLOAT8"):
        return torch.from_numpy(array.astype(np.float32))
    if name in _LARGER:
        return torch.from_numpy(array.astype(np.int8)).to(_LARGER[name])
    return torch.from_numpy(np.array(array, order="C", copy=True))
