"""The depthwise kernel on every instruction set, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from escort import reference
from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods import by_name
from escort.methods.cpu import depthwise
from escort.methods.cpu.depthwise import LANES, MOST_ROWS, PARAMS, PHASE, DepthwiseConfig
from escort.planner import plan_layer
from escort.problem import Epilogue, Problem
from tests.cases import ACTIVATED, CASES, DEPTHWISE, Case

METHOD = by_name("depthwise")
EVERY = [case for case in (*CASES, *DEPTHWISE, *ACTIVATED) if METHOD.unsupported(case.problem) is None]


def configs(isa: str, problem: Problem) -> Iterator[DepthwiseConfig]:
    """Every number of rows of a block, with stages of many sizes, and planes side by side where the kernel can."""
    for rows in range(1, MOST_ROWS + 1):
        for planes in (1, 2) if LANES[isa] == 16 and problem.epilogue.activation != "prelu" else (1,):
            yield DepthwiseConfig(isa, rows, 1 if rows == MOST_ROWS else 300 * rows**2, planes)


@pytest.mark.parametrize("isa", LANES)
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_instruction_set_is_right(isa: str, case: Case) -> None:
    x, weight, bias, residual = case.tensors()
    expected = reference.conv2d(case.problem, x, weight, bias, residual, case.slope())
    for config in configs(isa, case.problem):
        y = METHOD.prepare(case.problem, case.filter(), bias, config, case.slope())(x, residual)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND["fp32"], config


@pytest.mark.parametrize("isa", LANES)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_infinities_and_nan_pass_as_in_torch(isa: str, activation: Any) -> None:
    problem = Problem(2, 3, 9, 19, 3, (3, 3), padding=(1, 1, 1, 1), groups=3, epilogue=Epilogue(activation=activation))
    x = torch.randn(problem.input_shape)
    x[0, 0, 0, 0], x[0, 1, 4, 18], x[1, 2, 8, 9] = torch.nan, torch.inf, -torch.inf
    weight = torch.randn(problem.weight_shape)
    weight[1, 0, 1, 1] = 0.0  # times infinity is NaN
    expected = reference.conv2d(problem, x, weight).float()
    for config in configs(isa, problem):
        y = METHOD.prepare(problem, SparseFilter.from_dense(weight, 3), None, config)(x)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert expected.isnan().any()


def test_nothing_but_the_result_is_written(a_case: Case) -> None:
    """Memory in front of and behind y keeps its values: rows shorter than vectors end within the plane."""
    problem, (x, _, bias, _) = a_case.problem, a_case.tensors()
    for config in METHOD.configs(problem, a_case.filter()):
        op = METHOD.prepare(problem, a_case.filter(), bias, config).op
        assert isinstance(op, _cpu.DepthwiseConvolution)
        size = torch.Size(problem.output_shape).numel()
        memory = torch.full((size + 128,), 7.0)
        op.run(x.data_ptr(), 0, memory[64:].data_ptr(), problem.batch, 1)
        assert (memory[:64] == 7.0).all() and (memory[64 + size :] == 7.0).all()
        assert not (memory[64 : 64 + size] == 7.0).any()


@pytest.fixture(params=[(7, 7), (14, 14), (3, 5), (5, 33)], ids=str)
def a_case(request: pytest.FixtureRequest) -> Case:
    height, width = request.param
    return Case("a case", Problem(2, 5, height, width, 5, (3, 3), padding=(1, 1, 1, 1), groups=5), 1.0)


def test_threads_share_the_work_without_changing_it() -> None:
    case = next(case for case in DEPTHWISE if "several bands, stride 2" in case.name)
    x, _, bias, _ = case.tensors()
    threads = torch.get_num_threads()
    try:
        for config in METHOD.configs(case.problem, case.filter()):
            run = METHOD.prepare(case.problem, case.filter(), bias, config)
            torch.set_num_threads(1)
            alone = run(x)
            torch.set_num_threads(4)
            for _ in range(20):
                assert torch.equal(run(x), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_plan_says_why_other_layers_are_not_its_own() -> None:
    problem = Problem(1, 4, 8, 8, 4, (3, 3), groups=2)
    plan = plan_layer(problem, SparseFilter.from_dense(torch.randn(problem.weight_shape), 2))
    (candidate,) = (candidate for candidate in plan.candidates if candidate.method == "depthwise")
    assert candidate.reason == "each output channel reads 2 input channels, not one"
    half = replace(problem, groups=4, precision="bf16")
    assert "fp32" in str(METHOD.unsupported(half))


TABLES: dict[str, Any] = {
    "params": np.ones(1, PARAMS),
    "phases": np.ones(1, PHASE),
    "tap_columns": np.zeros(1, np.int32),
    **{name: np.ones(1, np.float32) for name in ("weights", "bias", "slope")},
}
ISA = next(iter(LANES))


def test_the_dtypes_are_the_structs() -> None:
    _cpu.DepthwiseConvolution(ISA, TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_other_types_or_sizes_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        _cpu.DepthwiseConvolution(ISA, {**TABLES, name: np.ones(1, np.int64)})
    with pytest.raises(KeyError, match=name):
        _cpu.DepthwiseConvolution(ISA, {other: table for other, table in TABLES.items() if other != name})
    if name != "phases":
        with pytest.raises(ValueError, match=r"one record|those of params"):
            _cpu.DepthwiseConvolution(ISA, {**TABLES, name: np.repeat(TABLES[name], 2)})


@pytest.mark.parametrize(
    ("isa", "field", "value"), [(ISA, "block_rows", 9), (ISA, "block_rows", 0), (list(LANES)[-1], "planes", 2)]
)
def test_what_registers_do_not_hold_is_refused(isa: str, field: str, value: int) -> None:
    params = np.ones(1, PARAMS)
    params[field] = value
    with pytest.raises(ValueError, match=field):
        _cpu.DepthwiseConvolution(isa, {**TABLES, "params": params})


def test_each_thread_has_rows_of_its_own_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SparseFilter.from_dense(torch.ones(96, 1, 3, 3), groups=96)
    for threads, size, bands in ((1, 112, 5), (2, 28, 2), (8, 112, 8), (8, 14, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        problem = Problem(1, 96, size, size, 96, (3, 3), padding=(1, 1, 1, 1), groups=96)
        config = by_name("depthwise").configs(problem, full)[0]
        layout = depthwise._Layout.of(problem, depthwise.LANES[config.isa])
        assert depthwise._params(problem, layout, config)["bands"] == bands
