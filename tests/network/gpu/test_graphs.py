"""Converted models replay CUDA graphs: the same numbers, whatever happens between calls."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from escort.cuda import capture
from escort.cuda.capture import Graph
from escort.layers import runners
from escort.network.model import ConvertedModel
from escort.problem import Precision
from escort.runtime import graphs, lanes
from escort.runtime.lanes import MOST_LANES
from tests.network.gpu.networks import TWO_GPUS, Mixed, assert_same, converted, each, in_formats, samples

pytestmark = pytest.mark.gpu


@pytest.fixture
def ours(only: Callable[[str], None]) -> ConvertedModel:
    """A network whose convolutions run by kernels of ours, so that numbers are the same bit by bit."""
    only("direct")
    return converted("fp32")


def step_by_step(fast: ConvertedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = fast.network(x)
    return output


def picture(count: int = 2, size: int = 32) -> Tensor:
    return samples("fp32", count, 3, size, size)


def stats(fast: ConvertedModel) -> dict[str, Any]:
    return fast.graphs.stats()


@each("fp32", "tf32", "fp16", "bf16")
def test_replays_give_what_the_network_gives(precision: Precision) -> None:
    fast = converted(precision)
    assert fast.plan.not_captured is None
    with torch.inference_mode():
        for shape in ((2, 3, 32, 32), (1, 3, 32, 32), (2, 3, 40, 24), (2, 3, 32, 32)):
            for _ in range(3):
                x = samples(precision, *shape)
                assert_same(fast(x), fast.network(x))
    assert (stats(fast)["captures"], stats(fast)["replays"], stats(fast)["failed"]) == (3, 9, [])


def test_replays_are_the_same_bit_by_bit(ours: ConvertedModel) -> None:
    outputs = []
    for _ in range(6):
        x = picture()
        outputs.append((ours(x), step_by_step(ours, x)))
    assert stats(ours)["replays"] == 5
    assert len({output.data_ptr() for output, _ in outputs}) == 6
    for output, expected in outputs:  # later calls have not written to them
        assert torch.equal(output, expected) and output.stride() == expected.stride()
    x = picture().contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        assert torch.equal(ours(x), step_by_step(ours, x))
    big = picture(4)
    for _ in range(3):
        assert torch.equal(ours(big[1:3]), step_by_step(ours, big[1:3]))


def test_calls_are_launched_first_whatever_input_they_have(
    ours: ConvertedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, failures = picture(), list[BaseException]()
    for _ in range(3):
        ours(x)
    inputs = [picture() for _ in range(4)]
    inputs += [picture(4)[1:3], x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)]  # the last one lies askew
    expected = [step_by_step(ours, x) for x in inputs]

    def call() -> None:
        try:
            for x, y in zip(inputs, expected, strict=True):
                assert torch.equal(ours(x), y)
        except BaseException as error:
            failures.append(error)

    by_graph, long_ways = ours.graphs._by_graph, list[Tensor]()

    def noted(network: Any, inputs: Any, named: Any) -> Any:
        long_ways.append(inputs[0])
        return by_graph(network, inputs, named)

    monkeypatch.setattr(ours.graphs, "_by_graph", noted)
    call()
    assert not failures and all(x is inputs[-1] for x in long_ways)
    thread = threading.Thread(target=call)  # which has not used the GPU before
    thread.start()
    thread.join()
    assert not failures and stats(ours)["eager"] == {"a size that is new": 1}


def test_warmup_and_buckets(ours: ConvertedModel) -> None:
    ours.graphs.policy = "buckets"
    ours.warmup([(1, 3, 32, 32), (8, 3, 32, 32)])
    for count in (5, 8, 6, 7, 1):
        x = picture(count)
        assert_same(ours(x), step_by_step(ours, x))
    assert (stats(ours)["captures"], stats(ours)["replays"]) == (2, 7)


def test_threads_streams_and_sizes(ours: ConvertedModel) -> None:
    """More streams than there are lanes, more sizes than runners, inputs drawn on the GPU meanwhile."""
    failures, twin = list[BaseException](), copy.deepcopy(ours)
    twin.graphs.policy = "off"

    def call(seed: int) -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream), torch.no_grad():
                for i in range(120):
                    k = (7 * i + 3 * seed) % 12
                    x = picture(1 + k % 3, 24 + 4 * (k // 3))
                    first, second = ours(x), ours(x * 2.0)
                    expected = twin(x), twin(x * 2.0)
                    stream.synchronize()
                    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(MOST_LANES + 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert stats(ours)["replays"] > 500 and stats(ours)["failed"] == []


def test_streams_that_share_a_lane_do_not_mix(ours: ConvertedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MOST_LANES", 0)
    monkeypatch.setattr(lanes, "_lanes", {})
    streams = [torch.cuda.Stream() for _ in range(4)]
    xs = [picture() for _ in streams]
    expected = [step_by_step(ours, x) for x in xs]
    torch.cuda.synchronize()
    ours.warmup([(2, 3, 32, 32)])
    for _ in range(100):
        outputs = []
        for stream, x in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(ours(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert stats(ours)["captures"] == 1


def test_memory_stays_as_it_is(ours: ConvertedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_DRIVER_BYTES", 2 << 20)  # of a graph: other tests take memory meanwhile
    sizes = [(1 + k % 5, 24 + 4 * (k // 5)) for k in range(40)]

    def round_of_calls() -> tuple[int, int]:
        for count, size in sizes:
            ours(picture(count, size))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for _ in range(3):
        before = round_of_calls()
    for _ in range(20):
        assert round_of_calls() == before
    assert (stats(ours)["graphs"], stats(ours)["captures"], stats(ours)["evictions"]) == (40, 40, 0)
    # They share their memory: all together take not much more than the largest.
    together = stats(ours)["bytes"]
    ours.graphs.clear()
    ours.warmup([(5, 3, 52, 52)])
    assert together < 3 * stats(ours)["bytes"] + 40 * (2 << 20)


def test_a_limit_is_kept_and_said(ours: ConvertedModel) -> None:
    ours.graphs.limit_bytes = 1
    for _ in range(4):
        x = picture()
        assert torch.equal(ours(x), step_by_step(ours, x))
    assert stats(ours)["graphs"] == 0 and "limit_bytes" in stats(ours)["failed"][0]


def test_a_user_s_capture_has_what_it_recorded(ours: ConvertedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners make room, biases change, a state is loaded, graphs go: what was recorded stays."""
    monkeypatch.setattr(runners, "_GRACE_S", 0.0)
    for layer in ours.network.modules():
        if hasattr(layer, "_runners"):
            layer._runners.most = 1
    x = picture()
    for _ in range(3):
        ours(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = ours(x)
    assert stats(ours)["eager"]["the caller captures a graph"] == 1
    expected = step_by_step(ours, x)
    for size in (24, 28, 36):
        for _ in range(3):
            other = picture(2, size)
            assert torch.equal(ours(other), step_by_step(ours, other))
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.load_state_dict({name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in state.items()})
    for _ in range(3):
        assert torch.equal(ours(x), step_by_step(ours, x)) and not torch.equal(ours(x), expected)
    ours.load_state_dict(state)  # the classifier is read where it lies
    ours.graphs.clear()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(200)]
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    del garbage


def test_what_changes_the_network_counts(ours: ConvertedModel) -> None:
    x = picture()
    for _ in range(3):
        before = ours(x)
    twin = copy.deepcopy(ours)
    ours.network.get_submodule("pointwise").bias.add_(1.0)
    for _ in range(4):
        assert torch.equal(ours(x), step_by_step(ours, x)) and not torch.equal(ours(x), before)
    ours.network.get_submodule("head").weight.data.mul_(2.0)
    for _ in range(4):
        assert torch.equal(ours(x), step_by_step(ours, x))
    ours.network.get_submodule("head").weight = torch.nn.Parameter(torch.randn(10, 40, device="cuda"))
    for _ in range(4):
        assert torch.equal(ours(x), step_by_step(ours, x))
    ours.cuda()
    for _ in range(4):
        assert torch.equal(ours(x), step_by_step(ours, x)) and torch.equal(twin(x), before)
    assert stats(ours)["captures"] == 4 and stats(twin)["captures"] == 1


def test_compiled(ours: ConvertedModel) -> None:
    x = picture()
    expected = ours(x), ours(x)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            assert_same(compiled(x).clone(), expected[0])
    assert torch.equal(ours(x), expected[0]) and stats(ours)["replays"] == 2
    torch._dynamo.reset()


def test_tables_are_laid_out_while_another_thread_captures(ours: ConvertedModel) -> None:
    """As a conversion in another thread does."""
    layer, x = ours.network.get_submodule("pointwise"), picture()
    failures = list[BaseException]()

    def prepare() -> None:
        try:
            layer.prepare()
        except BaseException as error:
            failures.append(error)

    def calls() -> None:
        thread = threading.Thread(target=prepare)
        thread.start()
        thread.join()
        made.append(x * 2.0)

    prepare()  # compiled before
    made: list[Tensor] = []
    with capture.turn:
        graph = Graph(calls, capture.capture_stream(0, 0), torch.cuda.graph_pool_handle())
    graph.replay(torch.cuda.current_stream().cuda_stream)
    assert not failures and torch.equal(made[0], x * 2.0)


@pytest.mark.parametrize("fails", ["memory", "capture"])
def test_a_capture_that_fails_leaves_everything_usable(
    ours: ConvertedModel, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    x, graph_of = picture(), lanes.Graph

    def failing(calls: Callable[[], object], stream: torch.cuda.Stream, pool: Any) -> Graph:
        def calls_and_fails() -> None:
            calls()
            if fails == "memory":
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()  # no capture survives it

        return graph_of(calls_and_fails if calls is not lanes._multiply else calls, stream, pool)

    monkeypatch.setattr(lanes, "Graph", failing)
    torch.manual_seed(0)
    for _ in range(4):
        assert torch.equal(ours(x), step_by_step(ours, x))
    (reason,) = stats(ours)["failed"]
    assert ("out of device memory" if fails == "memory" else "not captured: ") in reason
    monkeypatch.setattr(lanes, "Graph", graph_of)
    drawn = torch.randn(1000, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(1000, device="cuda"))  # captures draw nothing of the user's
    assert not stats(ours)["captures"] and torch.equal(ours(x), step_by_step(ours, x))
    ours.warmup([x])
    assert torch.equal(ours(x), step_by_step(ours, x)) and stats(ours)["captures"] == 1
    graph, y = torch.cuda.CUDAGraph(), None
    with torch.no_grad(), torch.cuda.graph(graph):
        y = ours(x)
    graph.replay()
    assert torch.equal(y, step_by_step(ours, x))
    torch.cuda.empty_cache()


@in_formats(("channels_last",))
def test_workspaces_of_libraries_may_be_given_back() -> None:
    """torch.compile gives them back whenever it likes."""
    fast, x = converted("fp16"), samples("fp16")
    expected = step_by_step(fast, x)
    for i in range(20):
        assert_same(fast(x), expected)
        if i % 3 == 1:
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            garbage = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(50)]
            del garbage
        if i % 7 == 6:
            fast.graphs.clear()
    assert stats(fast)["failed"] == [] and stats(fast)["captures"] == 3


def test_a_model_that_goes_leaves_nothing_behind() -> None:
    def serve() -> None:
        fast = converted("fp32", Mixed().eval())
        for _ in range(3):
            fast(picture(4, 64))
        assert stats(fast)["replays"] == 2

    taken = []
    for _ in range(3):
        serve()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_allocated())
    assert taken[2] <= taken[1] + (1 << 20)


@TWO_GPUS
def test_on_another_gpu_and_with_another_one_as_the_current_one(ours: ConvertedModel) -> None:
    x = picture()
    expected = ours(x), ours(x)
    moved = copy.deepcopy(ours).to("cuda:1")
    with torch.cuda.device(1):
        assert torch.equal(ours(x), expected[0])
        for _ in range(3):
            assert torch.equal(moved(x.to("cuda:1")).to("cuda:0"), expected[0])
    assert stats(ours)["eager"]["another GPU is the current one"] == 1
    assert (stats(moved)["captures"], stats(moved)["replays"]) == (1, 2)
