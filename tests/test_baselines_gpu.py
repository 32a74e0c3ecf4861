"""The baselines, the timer, the planner and the suite on a GPU."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from benchmarks import suite
from escort import reference
from escort.filter import SparseFilter
from escort.methods import Method, Prepared, by_name, for_device
from escort.methods.cuda.cublas import Cublas
from escort.planner import measure, planner, timing
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from escort.problem import TORCH_DTYPE, Epilogue, Precision, Problem
from tests.cases import CASES, Case, as_taken, benchmark_configs, every_case

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
BASELINES = [by_name(name, DEVICE) for name in ("cudnn", "cublas", "cusparse")]
BY_NAME = {case.name: case for case in CASES}
#: Larger than any GPU's memory.
TOO_MUCH = 1 << 46


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@every_case
def test_case_in_channels_last(case: Case, precision: Precision) -> None:
    problem, x, weight, bias, residual = case.on(DEVICE, precision)
    problem = replace(problem, memory_format="channels_last")
    expected = reference.conv2d(problem, x, weight, bias, residual)
    assert all(method.unsupported(problem) for method in BASELINES[1:])
    for config in BASELINES[0].configs(problem, case.filter()):
        run = BASELINES[0].prepare(problem, case.filter(), bias, config)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = run(x.contiguous(memory_format=memory_format), residual)
            assert y.dtype is problem.storage and y.is_contiguous(memory_format=torch.channels_last)
            assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_strict_fp32_is_strict_whatever_the_user_set(method: Method) -> None:
    case = BY_NAME["ResNet-50 res4"]
    problem, x, weight, _, _ = case.on(DEVICE)
    expected = reference.conv2d(problem, x, weight)
    plain = torch.nn.functional.conv2d(x, weight.to(DEVICE), padding=1)
    assert reference.compare(plain, expected) > 1e-5  # the user's setting does what it says
    for config in benchmark_configs(method, problem, case.filter()):
        y = method.prepare(problem, case.filter(), None, config)(as_taken(method, config, x))
        assert reference.compare(y, expected) <= 1e-5, config
    again = torch.nn.functional.conv2d(x, weight.to(DEVICE), padding=1)
    assert reference.compare(again, expected) > 1e-5  # and does so still


@pytest.mark.parametrize("method", BASELINES[:2], ids=lambda method: method.name)
def test_tf32_is_used_where_it_is_asked_for(method: Method) -> None:
    case = BY_NAME["ResNet-50 res4"]
    problem, x, weight, _, _ = case.on(DEVICE, "tf32")
    expected = reference.conv2d(problem, x, weight)
    for config in benchmark_configs(method, problem, case.filter()):
        y = method.prepare(problem, case.filter(), None, config)(as_taken(method, config, x))
        assert 1e-5 < reference.compare(y, expected) <= 1e-3, config


@pytest.mark.usefixtures("hostile")
def test_the_reference_is_exact_on_a_gpu() -> None:
    for case in CASES[::5]:
        problem, x, weight, bias, residual = case.on(DEVICE)
        on_gpu = reference.conv2d(problem, x, weight, bias, residual)
        tensors = (None if t is None else t.cpu() for t in (x, weight, bias, residual))
        assert reference.compare(on_gpu.cpu(), reference.conv2d(problem, *tensors)) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_a_runner_takes_any_batch_and_memory_format(method: Method) -> None:
    case = BY_NAME["plain 3x3"]
    problem, x, weight, bias, _ = case.on(DEVICE)
    run = method.prepare(problem, case.filter(), bias, method.configs(problem, case.filter())[0])
    for samples in (0, 1, 3, 8, 17):
        batch = torch.randn(2 * samples, *x.shape[1:], device=DEVICE)
        for x in (batch[:samples], batch[:samples].contiguous(memory_format=torch.channels_last), batch[::2]):
            assert reference.compare(run(x), reference.conv2d(problem, x, weight, bias)) <= 1e-5


@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_a_runner_can_be_captured(method: Method) -> None:
    case = BY_NAME["groups"]
    problem, x, weight, bias, residual = case.on(DEVICE)
    for config in benchmark_configs(method, problem, case.filter()):
        run = method.prepare(problem, case.filter(), bias, config)
        side = torch.cuda.Stream(DEVICE)
        side.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(side):
            run(x, residual)
        torch.cuda.current_stream(DEVICE).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x, residual)
        other = torch.randn_like(x)
        kept = x.clone()
        x.copy_(other)
        graph.replay()
        assert reference.compare(y, reference.conv2d(problem, other, weight, bias, residual)) <= 1e-5, config
        x.copy_(kept)


@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_a_second_gpu_need_not_be_the_current_one(method: Method) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = BY_NAME["3x3 with everything behind it"]
    problem, x, weight, bias, residual = case.on("cuda:1")
    with torch.cuda.device(0):
        run = method.prepare(problem, case.filter(), bias, method.configs(problem, case.filter())[0])
        assert reference.compare(run(x, residual), reference.conv2d(problem, x, weight, bias, residual)) <= 1e-5


def test_cusparse_does_not_read_what_its_output_overwrites() -> None:
    case = BY_NAME["seven samples"]
    problem, x, weight, _, _ = case.on(DEVICE)
    method = by_name("cusparse", DEVICE)
    run = method.prepare(problem, case.filter(), None, method.configs(problem, case.filter())[0])
    expected = reference.conv2d(problem, x, weight)
    run(x)
    torch.cuda.empty_cache()
    poison = [torch.full((size,), float("nan"), device=DEVICE) for size in [expected.numel()] * 8 + [1 << 22]]
    del poison  # into the allocator, from which the outputs come
    assert reference.compare(run(x), expected) <= 1e-5


def matmul(size: int) -> Callable[[], torch.Tensor]:
    a = torch.randn(size, size, device=DEVICE)
    return lambda: a @ a


def test_more_work_takes_longer() -> None:
    small, large = timing.race_on_gpu([matmul(512), matmul(4096)], DEVICE)
    assert small.timer == large.timer == "graph"
    assert small.time_us is not None and large.time_us is not None
    assert 1.0 < small.time_us < large.time_us / 20.0  # 512 times the work


def test_a_graph_is_captured_once_and_then_replayed() -> None:
    calls = 0
    work = matmul(256)

    def run() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return work()

    timing.race_on_gpu([run], DEVICE, rounds=3)
    few, calls = calls, 0
    timing.race_on_gpu([run], DEVICE, rounds=50, budget_s=60.0)
    assert calls < 2 * few + 2000  # 47 more rounds of hundreds of calls each make no call of ours


def test_events_include_the_host() -> None:
    run = matmul(64)
    (graph,), (events,) = (timing.race_on_gpu([run], DEVICE, capture=capture) for capture in (True, False))
    assert (graph.timer, events.timer) == ("graph", "events")
    assert graph.time_us is not None and events.time_us is not None and graph.time_us < events.time_us


def test_failures_leave_the_race_and_the_device_usable() -> None:
    x = torch.randn(64, 64, device=DEVICE)

    def synchronizes() -> float:
        return float((x @ x).sum().item())

    def too_large() -> torch.Tensor:
        return torch.empty(TOO_MUCH, dtype=torch.uint8, device=DEVICE)

    def too_large_in_turn() -> torch.Tensor:
        free = torch.cuda.mem_get_info(DEVICE)[0]
        return torch.empty(int(1.2 * free), dtype=torch.uint8, device=DEVICE)

    runs = [matmul(64), synchronizes, too_large, too_large_in_turn, matmul(64)]
    for _ in range(2):
        timings = timing.race_on_gpu(runs, DEVICE)
        assert [taken.timer for taken in timings] == ["graph", "events", "graph", "graph", "graph"]
        assert [taken.time_us is None for taken in timings] == [False, False, True, True, False]
        assert "not captured" in (timings[1].reason or "")
        assert all("out of device memory" in (timings[index].reason or "") for index in (2, 3))
    assert torch.equal((x @ x).cpu(), (x @ x).cpu())


def test_graphs_give_their_memory_back() -> None:
    def run() -> torch.Tensor:
        return torch.ones(1 << 28, dtype=torch.uint8, device=DEVICE)

    timing.race_on_gpu([run], DEVICE)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(DEVICE)
    for _ in range(3):
        timing.race_on_gpu([run, run], DEVICE)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) <= before + (1 << 25)


def test_the_machine_is_named_with_its_versions() -> None:
    machine = Machine.here(DEVICE)
    assert machine.device == torch.cuda.get_device_name(DEVICE) and machine.isa.startswith("sm_")
    assert machine.cuda and machine.cudnn and machine.driver.partition(".")[0].isdigit()
    assert Machine.from_json(machine.to_json()) == machine != Machine.here()


def test_inputs_outgrow_the_cache() -> None:
    problem = Problem(1, 256, 28, 28, 256, (3, 3), padding=(1, 1, 1, 1), precision="fp16", device=DEVICE)
    inputs = timing.example_inputs(problem)
    size = sum(x.nbytes for x, _ in inputs) * 2
    assert size >= 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    assert all(x.dtype is torch.float16 and x.data_ptr() % 256 == 0 for x, _ in inputs)


@pytest.fixture
def forget() -> None:
    planner._remembered.clear()


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_plan_weighs_every_method(precision: Precision) -> None:
    problem = Problem(
        2,
        64,
        28,
        28,
        64,
        (3, 3),
        padding=(1, 1, 1, 1),
        precision=precision,
        device=DEVICE,
        epilogue=Epilogue(True, True, "relu"),
    )
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.1)
    sparse_filter, bias = SparseFilter.from_dense(weight), torch.randn(64)
    plan = planner.plan_layer(problem, sparse_filter, bias)
    assert {candidate.method for candidate in plan.candidates} == {method.name for method in for_device(DEVICE)}
    assert plan.time_us is not None and plan.dense_time_us is not None
    assert plan.time_us * measure._WORTH_TRYING <= plan.dense_time_us
    assert plan.machine == Machine.here(DEVICE)
    assert any(candidate.timer == "graph" for candidate in plan.candidates)
    again = Plan.from_json(plan.to_json())
    ((x, residual), *_) = timing.example_inputs(problem, seed=1)
    chosen = by_name(again.method, DEVICE)
    y = chosen.prepare(problem, sparse_filter, bias, chosen.config_type(**again.config))(x, residual)
    assert (
        reference.compare(y, reference.conv2d(problem, x, weight, bias, residual)) <= reference.ERROR_BOUND[precision]
    )


@pytest.mark.usefixtures("forget")
def test_a_candidate_out_of_memory_is_a_reason_and_the_next_one_runs() -> None:
    class Greedy(Cublas):
        name = "greedy"

        def prepare(self, problem: Problem, *args: Any) -> Any:
            run = super().prepare(problem, *args)
            return Prepared(lambda x, residual=None: (torch.empty(TOO_MUCH, device=DEVICE), run(x, residual))[1])

    case = BY_NAME["plain 3x3"]
    problem = case.on(DEVICE)[0]
    plan = planner.plan_layer(problem, case.filter(), methods=(Greedy(), by_name("cudnn", DEVICE)))
    assert plan.method == "cudnn"
    greedy = [candidate for candidate in plan.candidates if candidate.method == "greedy"]
    assert greedy and all("out of device memory" in (candidate.reason or "") for candidate in greedy)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_rows_of_a_layer(precision: Precision) -> None:
    layers = suite.paper_layers(2, precision=precision, device=DEVICE)
    layer = next(layer for layer in layers if layer.name == "inception_3a/5x5")  # the smallest filter, quickly compiled
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is left out: relative error")  # configs of fewer bits
        rows = suite.measure_layer(layer, budget_s=0.2, rounds=3)
    expected = {m.name for m in for_device(DEVICE) if m.unsupported(layer.problem) is None}
    assert {row.method for row in rows} == expected
    assert all(row.rel_error <= reference.ERROR_BOUND[precision] and "timer" not in row.config for row in rows)
    assert {"memory_format": "channels_last", "output": "as_is", "fused": False, "tries": True} in [
        r.config for r in rows if r.method == "cudnn"
    ]
    head = suite.header("layers", DEVICE)
    assert head["gpu"] == torch.cuda.get_device_name(DEVICE) and head["driver"] and head["versions"]["cudnn"]


@pytest.mark.parametrize("precision", get_args(Precision))
def test_rows_of_a_network(precision: Precision) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()).eval()
    model = model.to(DEVICE, TORCH_DTYPE[precision])
    suite.prune_all_but_first(model, 0.9)
    x = torch.randn(4, 3, 32, 32, device=DEVICE, dtype=TORCH_DTYPE[precision])
    graphs = [] if importlib.util.find_spec("cudnn") is None else ["cudnn_graph"]
    race = suite.NetworkRace(against=("graph", "compile", *graphs), precision=precision, budget_s=0.2)
    rows = suite.measure_network(model, x, network="tiny", weights="random-0.90", race=race)
    plain = [("escort", False), ("eager", False), ("eager", False), ("compile", False), ("escort", True)]
    plain += [(method, False) for method in graphs]
    captured = [("graph" if method == "eager" else method, compiled) for method, compiled in plain]
    assert [(row.timer, row.method, "compiled" in row.config) for row in rows] == [
        *(("call", *way) for way in plain),
        *(("pipelined", *way) for way in plain),
        *(("graph", *way) for way in captured),
    ]
    assert all(row.config["graph"] is (row.timer == "graph") and row.time_us > 0 for row in rows)
    assert {(row.dtype, row.batch, row.layer) for row in rows} == {(precision, 4, "all")}
