"""The table of cases against the float64 reference: torch's methods on every device, and our CPU kernel.

Our GPU kernels take the same table in their own tests (test_direct_cuda.py, test_generated.py, test_sparse_tc.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from escort import reference
from escort.methods import Method, by_name, for_device
from escort.methods.cpu.direct import ISAS, DirectConfig
from escort.problem import Activation, Epilogue, Precision, Problem
from tests.cases import ACTIVATED, CASES, DEPTHWISE, Case, check, takes

#: cuDNN, cuBLAS and cuSPARSE are called through torch, whose CPU operators stand in for them.
BASELINES = [by_name(name, "cuda") for name in ("cudnn", "cublas", "cusparse")]
WAYS = [
    *(pytest.param(method, "cpu", "fp32", id=f"{method.name} on the CPU") for method in for_device("cpu")),
    *(pytest.param(method, "cpu", "fp32", id=f"{method.name} by a stand-in") for method in BASELINES),
    *(
        pytest.param(method, "cuda:0", precision, id=f"{method.name} in {precision}", marks=pytest.mark.gpu)
        for method in BASELINES
        for precision in get_args(Precision)
    ),
]


@pytest.fixture
def stand_ins(request: pytest.FixtureRequest) -> None:
    """On a CPU, what torch offers for GPUs only."""
    if request.node.callspec.params["device"] == "cpu":
        request.getfixturevalue("cudnn")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("case", (*CASES, *DEPTHWISE, *ACTIVATED), ids=lambda case: case.name)
@pytest.mark.parametrize(("method", "device", "precision"), WAYS)
def test_case(method: Method, device: str, precision: Precision, case: Case) -> None:
    if method.device_type == device.partition(":")[0]:
        problem = case.on(device, precision)[0]
        reason = method.unsupported(problem)
        assert (reason is None) is takes(method, problem), reason
        if reason is not None:
            return
    check(method, case, device, precision)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", (*CASES, *ACTIVATED), ids=lambda case: case.name)
def test_direct_on_every_instruction_set(isa: str, case: Case) -> None:
    x, weight, bias, residual = case.tensors()
    expected = reference.conv2d(case.problem, x, weight, bias, residual, case.slope())
    for vectors in range(1, ISAS[isa][1] + 1):
        block = 1 + vectors % max(case.filter().shape[1], 1)
        config = DirectConfig(isa, vectors, channel_block=block, parts=1 + vectors % 3)
        y = by_name("direct").prepare(case.problem, case.filter(), bias, config, case.slope())(x, residual)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND["fp32"], config


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_direct_on_any_shape(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    kernel_size, stride, dilation = ((draw(1, high), draw(1, high)) for high in (4, 3, 3))
    padding = (draw(0, 4), draw(0, 4), draw(0, 4), draw(0, 4))
    activation = data.draw(st.sampled_from(get_args(Activation)))
    sizes = (draw(1, 3), groups * draw(1, 8), draw(1, 30), draw(1, 30), groups * draw(1, 8))
    try:
        problem = Problem(
            *sizes,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            epilogue=Epilogue(True, data.draw(st.booleans()), activation),
        )
    except ValueError:
        assume(False)
        return
    case = Case(f"{draw(0, 1000)}", problem, data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))))
    x, weight, bias, residual = case.tensors()
    isa = data.draw(st.sampled_from(sorted(ISAS)))
    config = DirectConfig(isa, draw(1, ISAS[isa][1]), draw(1, weight.shape[1]), draw(1, 5))
    y = by_name("direct").prepare(problem, case.filter(), bias, config, case.slope())(x, residual)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    assert reference.compare(y, expected) <= reference.ERROR_BOUND["fp32"]


@pytest.mark.parametrize("method", for_device("cpu"), ids=lambda method: method.name)
def test_a_runner_takes_any_batch_and_memory_format(method: Method) -> None:
    case = next(case for case in CASES if case.name in ("depthwise", "one pixel") and takes(method, case.problem))
    x, weight, bias, _ = case.tensors()
    run = method.prepare(case.problem, case.filter(), bias, method.configs(case.problem, case.filter())[0])
    for samples in (0, 1, 3, 8, 17):
        batch = torch.randn(samples, *x.shape[1:]).to(memory_format=torch.channels_last)
        expected = reference.conv2d(case.problem, batch, weight, bias)
        assert reference.compare(run(batch), expected) <= reference.ERROR_BOUND["fp32"]


def test_threads_share_the_work_without_changing_it() -> None:
    case = next(case for case in CASES if case.name == "many outputs on one tile")
    x, _, bias, _ = case.tensors()
    method, threads = by_name("direct"), torch.get_num_threads()
    run = method.prepare(case.problem, case.filter(), bias, DirectConfig(next(iter(ISAS)), 7, 20, parts=5))
    try:
        torch.set_num_threads(1)
        alone = run(x)
        torch.set_num_threads(4)
        for _ in range(20):
            assert torch.equal(run(x), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("x", "residual", "says"),
    [
        (torch.zeros(1, 8, 14, 14, dtype=torch.float64), None, "float32"),
        (torch.zeros(1, 8, 14, 13), None, "14, 14"),
        (torch.zeros(1, 8, 14, 14), torch.zeros(1, 16, 14, 13), "residual"),
        (torch.zeros(1, 8, 14, 14), torch.zeros(1, 16, 14, 14, dtype=torch.int32), "residual"),
    ],
)
def test_direct_never_reads_outside_its_tensors(x: torch.Tensor, residual: torch.Tensor | None, says: str) -> None:
    case = CASES[4]
    method = by_name("direct")
    problem = replace(case.problem, epilogue=Epilogue(residual=residual is not None))
    run = method.prepare(problem, case.filter(), None, method.configs(problem, case.filter())[0])
    with pytest.raises(ValueError, match=says):
        run(x, residual)


def test_compare_fails_nan_and_other_shapes() -> None:
    one = torch.ones(2, 3)
    assert reference.compare(one, one) == 0.0
    assert reference.compare(torch.full((2, 3), float("nan")), one) == float("inf")
    assert reference.compare(one[:1], one) == float("inf")
    assert reference.compare(one, torch.zeros(2, 3)) > 0.0
