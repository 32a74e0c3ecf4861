"""A sealed file of strings and tensors; docs/format.md describes its bytes.

It is a safetensors file whose first metadata entry is a checksum of all the rest. Tensors that are mostly zero are
compressed. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from escort.filter import SparseFilter
from escort.runtime.saved.description import DTYPES, check_tensor
from escort.runtime.saved.errors import naming
from escort.runtime.saved.limits import MAX_HEADER_BYTES, MAX_WEIGHTS

_SEAL_HEAD = b'{"__metadata__":{"sha256":"'
_SEAL = slice(8 + len(_SEAL_HEAD), 8 + len(_SEAL_HEAD) + 64)
_UNSIGNED = (np.uint8, np.uint16, np.uint32)
_PARTS = ("values", "row_lengths", "column_gaps")


def pack(metadata: Mapping[str, str], tensors: Mapping[str, Tensor | SparseFilter]) -> bytes:
    """The bytes of a file that holds these strings and tensors. The same content gives the same bytes.

    Filters and float32 tensors of two or more dimensions are compressed unless more than half of them is nonzero. Names
    of one and the same tensor share one copy. A zero loses its sign where it is compressed.

    Raises:
        TypeError, ValueError: naming the tensor that is not plain, dense and finite.
    """
    stored: dict[str, Tensor] = {}
    compressed: dict[str, list[int]] = {}
    shared: dict[str, str] = {}
    owners: dict[Any, str] = {}

    def store(name: str, tensor: Tensor) -> None:
        if name in stored:
            raise ValueError(f"two tensors are called {name}; rename one")
        stored[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            check_tensor(name, tensor)
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and owners.setdefault(key, name) != name:
                shared[name] = owners[key]
                continue
        sparse_filter = _compressible(tensor)
        if sparse_filter is not None:
            compressed[name] = list(tensor.shape)
            for part, array in zip(_PARTS, _compress(sparse_filter), strict=True):
                store(f"{name}.{part}", array)
        else:
            store(name, tensor if isinstance(tensor, Tensor) else tensor.to_dense())
    encodings = json.dumps({"compressed": compressed, "shared": shared}, separators=(",", ":"))
    return _seal({"sha256": "0" * 64, **metadata, "tensors": encodings}, stored)


def _seal(texts: Mapping[str, str], stored: dict[str, Tensor]) -> bytes:
    """The bytes of the file, with its checksum in the place of the 64 zeros."""
    body = safetensors.torch.save(stored)
    end = 8 + int.from_bytes(body[:8], "little")
    # safetensors writes metadata in random order, so the header is put together again.
    header = json.dumps({"__metadata__": texts, **json.loads(body[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(header)} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    data = bytearray(len(header).to_bytes(8, "little") + header + body[end:])
    data[_SEAL] = _digest(data)
    return bytes(data)


def _digest(data: bytes | bytearray) -> bytes:
    """The SHA-256 of the file, whose own 64 hexadecimal digits count as zeros."""
    digest = hashlib.sha256(memoryview(data)[: _SEAL.start])
    digest.update(b"0" * 64)
    digest.update(memoryview(data)[_SEAL.stop :])
    return digest.hexdigest().encode()


def _compressible(tensor: Tensor | SparseFilter) -> SparseFilter | None:
    """The tensor as rows of nonzeros if that is what should be stored."""
    if isinstance(tensor, SparseFilter):
        # A filter may hold zeros of its own; only the compressed form keeps them.
        return tensor if tensor.sparsity >= 0.5 or not tensor.values.all() else None
    if tensor.dtype is not torch.float32 or tensor.ndim < 2 or not 0 < tensor.numel() <= MAX_WEIGHTS:
        return None
    matrix = tensor.detach().cpu().contiguous().numpy().reshape(len(tensor), -1)
    if 2 * np.count_nonzero(matrix) > matrix.size:
        return None
    return SparseFilter.from_dense(
        matrix[:, :, None, None]
    )  # drops -0.0 too, which multiplying by a mask leaves behind


def _compress(sparse_filter: SparseFilter) -> tuple[Tensor, Tensor, Tensor]:
    """(values, row_lengths, column_gaps), the integers in the smallest unsigned type that holds them.

    The gap of a nonzero is the number of zeros between it and the nonzero before it in its row, or the row's start.
    """
    lengths = np.diff(sparse_filter.indptr)
    gaps = np.diff(sparse_filter.columns, prepend=np.int32(0)) - 1
    firsts = sparse_filter.indptr[:-1][lengths > 0]
    gaps[firsts] = sparse_filter.columns[firsts]
    return torch.from_numpy(sparse_filter.values), _smallest(lengths), _smallest(gaps)


def _smallest(array: NDArray[Any]) -> Tensor:
    largest = int(array.max(initial=0))
    return torch.from_numpy(array.astype(next(dtype for dtype in _UNSIGNED if largest <= np.iinfo(dtype).max)))


@dataclass(frozen=True, eq=False)
class _Compressed:
    """A compressed tensor as the file holds it."""

    shape: tuple[int, ...]
    values: Tensor
    row_lengths: Tensor
    column_gaps: Tensor

    def sparse_filter(self, groups: int) -> SparseFilter:
        """Raises ValueError unless the parts describe a filter; what is returned is safe to index with."""
        integer_types = {self.row_lengths.dtype, self.column_gaps.dtype}
        if self.values.dtype is not torch.float32 or not integer_types <= {torch.uint8, torch.uint16, torch.uint32}:
            raise ValueError("values are float32, row lengths and column gaps uint8, uint16 or uint32")
        lengths, gaps = (part.numpy().astype(np.int64) for part in (self.row_lengths, self.column_gaps))
        rows, width, nnz = self.shape[0], math.prod(self.shape[1:]), self.values.numel()
        if lengths.shape != (rows,) or int(lengths.sum()) != nnz or gaps.shape != (nnz,) or self.values.ndim != 1:
            raise ValueError(f"{rows} row lengths must sum up to the number of values, {nnz}, and of column gaps")
        indptr = np.concatenate(([0], np.cumsum(lengths)))
        ends = np.concatenate(([0], np.cumsum(gaps + 1)))  # as if all rows were one
        columns = ends[1:] - 1 - np.repeat(ends[indptr[:-1]], lengths)
        if nnz and columns.max() >= width:
            raise ValueError(f"columns must lie in 0..{width - 1}, found {columns.max()}")
        shape = self.shape if len(self.shape) == 4 else (rows, width, 1, 1)
        return SparseFilter(shape, groups, indptr.astype(np.int32), columns.astype(np.int32), self.values.numpy())

    @cached_property
    def dense(self) -> Tensor:
        return self.sparse_filter(1).to_dense().reshape(self.shape)


class Container:
    """The content of a file, checked; each tensor is taken out once.

    Attributes:
        metadata: the strings, those that concern the file itself included.

    Raises:
        ValueError: unless `data` is a whole, undamaged file.
    """

    def __init__(self, data: bytes) -> None:
        size = _check_seal(data)
        stored = _read_tensors(data)
        self.metadata: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
        encodings = parse(self.metadata["tensors"])
        self._contents: dict[str, Tensor | _Compressed] = {}
        weights = 0
        for name, shape in encodings["compressed"].items():
            if len(shape) < 2 or not all(type(length) is int and 1 <= length <= MAX_WEIGHTS for length in shape):
                raise ValueError(f"tensor {name}: no compressed tensor has shape {shape}")
            weights += math.prod(shape)
            if weights > MAX_WEIGHTS:
                raise ValueError(f"tensor {name}: shape {shape} exceeds the limit of {MAX_WEIGHTS} weights in a file")
            self._contents[name] = _Compressed(tuple(shape), *(_take(stored, f"{name}.{part}") for part in _PARTS))
        self._contents |= stored
        for alias, name in encodings["shared"].items():
            if alias in self._contents or name not in self._contents:
                raise ValueError(f"tensor {alias} cannot share {name}")
            self._contents[alias] = self._contents[name]

    def tensor(self, name: str) -> Tensor:
        """Takes out a tensor. Raises ValueError if there is none of that name."""
        content = _take(self._contents, name)
        with naming(f"tensor {name}"):
            return content if isinstance(content, Tensor) else content.dense

    def sparse_filter(self, name: str, shape: tuple[int, ...], groups: int) -> SparseFilter:
        """Takes out a convolution's filter of shape (K, C / groups, R, S)."""
        content = _take(self._contents, name)
        with naming(f"tensor {name}"):
            if content.shape != shape or (isinstance(content, Tensor) and content.dtype is not torch.float32):
                raise ValueError(f"should be float32 of shape {shape}, is of shape {tuple(content.shape)}")
            if isinstance(content, Tensor):
                return SparseFilter.from_dense(content, groups)
            return content.sparse_filter(groups)

    @property
    def left(self) -> list[str]:
        """The names of the tensors that nobody took out."""
        return list(self._contents)


def _check_seal(data: bytes) -> int:
    """The size of the header. Raises ValueError where the file is damaged, or of another kind."""
    size = int.from_bytes(data[:8], "little")
    if data[8 : _SEAL.start] != _SEAL_HEAD:
        raise ValueError("it is not what escort.save wrote, or its beginning is damaged")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its header of {size} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    if len(data) < max(_SEAL.stop, 8 + size):
        raise ValueError(f"it is cut short: it has {len(data)} bytes, and its header alone takes {8 + size}")
    if data[_SEAL] != _digest(data):
        raise ValueError("its checksum does not match: it is damaged or cut short")
    return size


def _read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors as they are stored. Raises ValueError where they are not plain and finite."""
    try:
        stored = safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, KeyError for a dtype, RuntimeError for a shape
        raise ValueError(f"its tensors are not laid out as safetensors: {error}") from error
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES or (tensor.is_floating_point() and not torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name} is of type {tensor.dtype}, or holds NaN or infinity")
        if tensor.dtype is torch.bool and (tensor.view(torch.uint8) > 1).any():
            raise ValueError(f"tensor {name} holds truth values other than 0 and 1")
    return stored


def parse(text: str) -> Any:
    """JSON as its standard has it, without NaN and infinities. Raises ValueError."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    return json.loads(text, parse_constant=refuse)


def parse_list(text: str, kind: str, file_format: tuple[str, int], most: int, writer: str) -> list[Any]:
    """What a text of JSON lists under the name of its kind, beside a format and a version, and nothing else.

    Raises:
        ValueError: saying that `writer` wrote no such text, that it is of another format, or of too many items.
    """
    content = parse(text)
    if not isinstance(content, dict) or content.keys() != {"format", "version", kind}:
        raise ValueError(f"it is none that {writer} wrote")
    found, (name, version) = (content["format"], content["version"]), file_format
    if found != file_format:
        raise ValueError(f"its format is {found[0]!r:.50} {found[1]!r:.50}, not {name} {version}")
    items = content[kind]
    if not isinstance(items, list) or len(items) > most:
        raise ValueError(f"it is to hold a list of at most {most:,} {kind}")
    return items


_Content = TypeVar("_Content")


def _take(contents: dict[str, _Content], name: str) -> _Content:
    if name not in contents:
        raise ValueError(f"tensor {name} is missing")
    return contents.pop(name)
