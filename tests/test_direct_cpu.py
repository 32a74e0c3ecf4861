"""The tables of methods/cpu/direct: what the compiled kernel takes for its structs, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from escort.kernels import _cpu
from escort.methods.cpu.direct import ISAS, PARAMS
from escort.methods.cpu.direct.layout import RUN, SEGMENT, TILE, Records, records
from escort.methods.cpu.direct.schedule import BLOCK, JOB, NONZERO, OUT_CHANNEL

TABLES = {
    "params": PARAMS,
    "nonzeros": NONZERO,
    "out_channels": OUT_CHANNEL,
    "blocks": BLOCK,
    "jobs": JOB,
    "runs": RUN,
    "segments": SEGMENT,
    "tiles": TILE,
}
ISA = next(iter(ISAS))


def convolution(**change: Any) -> _cpu.DirectConvolution:
    tables: dict[str, Records] = {name: np.ones(1, dtype) for name, dtype in TABLES.items()}
    return _cpu.DirectConvolution(ISA, {**tables, **change})


def test_the_dtypes_are_the_structs() -> None:
    convolution()


@pytest.mark.parametrize("name", TABLES)
def test_another_struct_is_refused(name: str) -> None:
    fields = [(field, TABLES[name][field].str) for field in TABLES[name].names or ()]
    renamed = [("other", fields[0][1]), *fields[1:]]
    retyped = [(fields[0][0], "u4"), *fields[1:]]
    swapped = [fields[1], fields[0], *fields[2:]]
    for other in (renamed, retyped, swapped, fields[:-1], [*fields, ("more", "i4")]):
        with pytest.raises(TypeError, match=f"{name} are records of .*{fields[0][0]}"):
            convolution(**{name: np.ones(1, np.dtype(other))})
    padded = np.dtype({"names": [f for f, _ in fields], "formats": [t for _, t in fields], "itemsize": 128})
    for array in (np.ones(1, padded), np.ones((1, len(fields)), np.int32)):
        with pytest.raises(TypeError, match=f"{name} are records of"):
            convolution(**{name: array})


def test_records_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        convolution(tiles=np.ones(4, TILE)[::2])


def test_a_missing_table_is_refused() -> None:
    with pytest.raises(KeyError, match="tiles"):
        _cpu.DirectConvolution(ISA, {name: np.ones(1, dtype) for name, dtype in TABLES.items() if name != "tiles"})


def test_tiles_that_registers_do_not_hold_are_refused() -> None:
    most = ISAS[ISA][1]
    convolution(tiles=records(TILE, 2, vectors=most))
    for vectors in (0, most + 1):
        with pytest.raises(ValueError, match="too many vectors"):
            convolution(tiles=records(TILE, 2, vectors=[1, vectors]))


def test_params_are_one_record() -> None:
    with pytest.raises(ValueError, match="one record"):
        convolution(params=np.ones(2, PARAMS))


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="'mmx' is not available"):
        _cpu.DirectConvolution("mmx", {})
