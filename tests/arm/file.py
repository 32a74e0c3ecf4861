"""Files of runs: what the bindings would hand to the CPU kernels, and what must come out, for a driver without Python.

A file is runs, one behind another. A run is groups of arrays, in this order:

- a header: `name` (text), `is_right` (0 where it is wrong on purpose), `bound` (float64), `arena_size`, `batch`
  (samples and those of a chunk), and how many `instructions` and `results` follow. A bound of one number is that of
  ``reference.compare``, one of two is rtol and atol of each number, as ``torch.testing.assert_close`` takes them;
- the buffers, float32, by number. What is written to holds NaN;
- each instruction of a NativeProgram: `op` (its class), `samples`, `places` (buffer, offset and stride of each input,
  then of the output; the arena has the number behind the last buffer) and the arguments of the op, by name. The tables
  of a convolution are arguments, too;
- each result: `place`, `samples`, and the `values` in float64, all samples one behind another.

A group is a uint32, how many arrays it has, and for each its name (uint32 length, text), the bytes of an item (uint32),
how many items there are (uint64), and these. Plain integers are int64, plain floats float32, triples of (int, int,
float) records of 12 bytes, pairs of four int and four float records of 32. Everything is little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Place = tuple[int, int, int]  # buffer, offset and stride, as in NativeProgram

#: The records of triples: windows, and pairs of neighbours; and of four neighbours with their weights.
TRIPLE = np.dtype([("a", "<i4"), ("b", "<i4"), ("c", "<f4")])
FOUR = np.dtype([("at", "<4i4"), ("weight", "<4f4")])


@dataclass
class Instruction:
    op: str
    arguments: Arrays
    samples: int
    places: list[Place]  # of the inputs, then of the output


@dataclass
class Result:
    place: Place
    values: NDArray[np.float64]  # (samples, size)


@dataclass
class Run:
    name: str
    bound: tuple[float, ...]
    buffers: list[NDArray[np.float32]]
    instructions: list[Instruction]
    results: list[Result]
    arena_size: int = 0
    batch: tuple[int, int] = (1, 1)  # samples, and how many of them are a chunk
    is_right: bool = True

    def groups(self) -> Iterator[Arrays]:
        """What is written, in its order."""
        yield {
            "name": _text(self.name),
            "is_right": np.array([self.is_right], np.int64),
            "bound": np.array(self.bound, np.float64),
            "arena_size": np.array([self.arena_size]),
            "batch": np.array(self.batch),
            "instructions": np.array([len(self.instructions)]),
            "results": np.array([len(self.results)]),
        }
        yield {str(number): buffer for number, buffer in enumerate(self.buffers)}
        for each in self.instructions:
            own = {"op": _text(each.op), "samples": np.array([each.samples]), "places": np.array(each.places).ravel()}
            assert not own.keys() & each.arguments.keys()
            yield own | each.arguments
        for result in self.results:
            samples = np.array([len(result.values)])
            yield {"place": np.array(result.place), "samples": samples, "values": result.values.ravel()}


def array_of(argument: Any) -> NDArray[Any]:
    """An argument of an operation as it lies in a file."""
    if isinstance(argument, np.ndarray):
        return argument
    if isinstance(argument, str):
        return _text(argument)
    if isinstance(argument, float):
        return np.array([argument], np.float32)
    if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], tuple):
        if len(argument[0]) == 3:
            return np.array(argument, TRIPLE)
        if not isinstance(argument[0][0], int):
            return np.array([(tuple(at), tuple(weight)) for at, weight in argument], FOUR)
    return np.array(argument, np.int64).ravel()


def _text(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def write(path: Path, runs: Iterator[Run]) -> int:
    """Writes a file; how many runs it holds."""
    count = 0
    with path.open("wb") as file:
        for run in runs:
            for group in run.groups():
                _write_group(file, group)
            count += 1
    return count


def _write_group(file: BinaryIO, group: Mapping[str, NDArray[Any]]) -> None:
    file.write(struct.pack("<I", len(group)))
    for name, array in group.items():
        assert array.ndim == 1 and array.dtype.newbyteorder("<") == array.dtype
        encoded = name.encode()
        file.write(struct.pack("<I", len(encoded)) + encoded + struct.pack("<IQ", array.itemsize, len(array)))
        file.write(array.tobytes())


@dataclass
class Bytes:
    """An array as the driver finds it: its type is not in the file."""

    item_size: int
    data: bytes = field(repr=False)

    def of(self, dtype: Any) -> NDArray[Any]:
        assert np.dtype(dtype).itemsize == self.item_size
        return np.frombuffer(self.data, dtype)


def read(path: Path) -> list[list[dict[str, Bytes]]]:
    """The groups of each run of a file."""
    runs = []
    with path.open("rb") as file:
        while file.peek(1):  # type: ignore[attr-defined]
            header, buffers = _read_group(file), _read_group(file)
            count = sum(int(header[name].of(np.int64)[0]) for name in ("instructions", "results"))
            runs.append([header, buffers, *(_read_group(file) for _ in range(count))])
    return runs


def _read_group(file: BinaryIO) -> dict[str, Bytes]:
    group = {}
    for _ in range(*struct.unpack("<I", file.read(4))):
        name = file.read(*struct.unpack("<I", file.read(4))).decode()
        item_size, items = struct.unpack("<IQ", file.read(12))
        group[name] = Bytes(item_size, file.read(item_size * items))
        assert len(group[name].data) == item_size * items, "the file ends too early"
    return group
