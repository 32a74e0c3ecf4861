"""Files for the driver: read back they are what was written, and this machine's kernels make of them what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from escort import reference
from escort.kernels import _cpu
from tests.arm.dump import (
    ARGUMENTS,
    NEON,
    Isa,
    activation_runs,
    convolution_runs,
    for_isa,
    native_runs,
    pool_runs,
)
from tests.arm.file import FOUR, TRIPLE, Instruction, Run, read, write
from tests.cases import ACTIVATED, CASES, DEPTHWISE

#: Arguments that are one integer.
NUMBERS = "channels activation in_features out_features in_channels out_channels outer size inner".split()
TABLES: dict[str, Callable[[], Iterator[Run]]] = {
    "convolutions": lambda: convolution_runs((*CASES[:30:3], *DEPTHWISE[::4], *ACTIVATED[::5])),
    "activations": lambda: activation_runs("gelu"),
    "pools": pool_runs,
    "native": native_runs,
}


@pytest.mark.parametrize("table", TABLES)
def test_what_is_read_is_what_was_written(table: str, tmp_path: Path) -> None:
    with for_isa(NEON):
        runs = list(TABLES[table]())
    assert write(tmp_path / "runs", iter(runs)) == len(runs) > 0
    for run, groups in zip(runs, read(tmp_path / "runs"), strict=True):
        for written, found in zip(run.groups(), groups, strict=True):
            assert written.keys() == found.keys()
            for name, array in written.items():
                np.testing.assert_array_equal(found[name].of(array.dtype), array)


def test_a_file_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "runs", islice(pool_runs(), 1))
    (tmp_path / "runs").write_bytes((tmp_path / "runs").read_bytes()[:-1])
    with pytest.raises(AssertionError, match="ends too early"):
        read(tmp_path / "runs")


@pytest.mark.parametrize("table", TABLES)
def test_every_run_holds_but_for_those_that_are_wrong_on_purpose(table: str) -> None:
    with for_isa(Isa(*_cpu.isas()[-1])):
        runs = list(TABLES[table]())
    assert {run.is_right for run in runs} == {True, False}
    for run in runs:
        assert holds(run) is run.is_right, run.name


def holds(run: Run) -> bool:
    """What the driver finds of a run, by this machine's kernels."""
    buffers = [buffer.copy() for buffer in run.buffers]
    steps = [(made(each), each.samples, each.places[:-1], each.places[-1]) for each in run.instructions]
    program = _cpu.NativeProgram(steps, len(buffers), run.arena_size, *run.batch)
    program.run([buffer.ctypes.data for buffer in buffers], 1)
    for result in run.results:
        number, offset, stride = result.place
        shape, strides = result.values.shape, (4 * stride, 4)
        y = torch.from_numpy(np.lib.stride_tricks.as_strided(buffers[number][offset:], shape, strides).copy())
        wanted = torch.from_numpy(result.values)
        if len(run.bound) == 1:
            if not reference.compare(y, wanted) <= run.bound[0]:
                return False
        elif not torch.allclose(y.double(), wanted, *run.bound, equal_nan=True):
            return False
    return True


def made(each: Instruction) -> Any:
    """The operation of an instruction."""
    names = ARGUMENTS[each.op].split()
    tables = {name: array for name, array in each.arguments.items() if name not in names}
    return getattr(_cpu, each.op)(
        *(tables if name == "tables" else argument(name, each.arguments[name]) for name in names)
    )


def argument(name: str, array: NDArray[Any]) -> Any:
    """What `array_of` was given."""
    if array.dtype == np.uint8:
        return array.tobytes().decode()
    if name == "window":
        return array.reshape(4, 2).tolist()
    assert array.dtype in (np.int64, np.float32, TRIPLE, FOUR)
    return array[0].item() if array.dtype == np.float32 or name in NUMBERS else array.tolist()
