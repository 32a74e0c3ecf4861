"""Which calls replay a graph, when it is captured and how long it is kept, on a GPU made of the CPU."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from escort.cuda.capture import turn
from escort.filter import SparseFilter
from escort.layers import SparseConv2d, runners
from escort.methods import by_name
from escort.network.mixing import mixing
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from escort.problem import Epilogue, Problem
from escort.runtime import Graphs, Program, graphs
from tests.network.models import Small, pruned
from tests.runtime.fake_gpu import FakeGpu, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return install(monkeypatch)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def program_of(model: nn.Module) -> Program:
    program = Program.of(fx.symbolic_trace(model.eval()))
    program.native.enabled = False  # no GPU runs so
    return program


class Served:
    """A program and its graphs, called as a converted model calls them."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        self.program = program_of(pruned(Small()) if model is None else model)
        self.graphs = Graphs(mixing, **options)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.was_replayed = True
        return self.graphs.call(self.program, self.run, inputs, named)

    def run(self, *inputs: Any, **named: Any) -> Any:
        self.was_replayed = False
        return self.program(*inputs, **named)

    def check(self, *inputs: Any, **named: Any) -> bool:
        """Whether a call replayed, after its output was compared bit by bit."""
        output = self(*inputs, **named)
        torch.testing.assert_close(output, self.program(*inputs, **named), rtol=0, atol=0, equal_nan=True)
        return self.was_replayed

    @property
    def stats(self) -> dict[str, Any]:
        return self.graphs.stats()


def pictures(samples: int = 2, size: int = 16) -> Tensor:
    return torch.randn(samples, 3, size, size)


def test_the_second_call_of_a_size_captures_and_the_next_ones_replay(gpu: FakeGpu) -> None:
    served = Served()
    assert [served.check(pictures()) for _ in range(4)] == [False, True, True, True]
    assert [served.check(pictures(3)) for _ in range(2)] == [False, True]
    stats = served.stats
    assert (stats["captures"], stats["replays"], stats["graphs"], stats["evictions"]) == (2, 4, 2, 0)
    assert stats["eager"] == {"a size that is new": 2} and stats["bytes"] == 200


def test_outputs_belong_to_the_caller(gpu: FakeGpu) -> None:
    served, first, second = Served(), pictures(), pictures()
    for _ in range(2):
        served(first)
    one, other = served(first), served(second)
    kept = one.clone()
    other.zero_()
    assert torch.equal(one, kept) and torch.equal(served(second), served.program(second))


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda x: x.double().float(), False),
        (lambda x: x.contiguous(memory_format=torch.channels_last), True),
        (lambda x: F.pad(x, (1, 1))[..., 1:-1], True),
        (lambda x: x[:1], True),
        (nn.Parameter, False),
    ],
)
def test_a_graph_is_for_one_shape_and_strides(gpu: FakeGpu, change: Any, is_another: bool) -> None:
    served, x = Served(), pictures()
    served(x), served(x)
    output = served(change(x))
    assert served.was_replayed is not is_another
    assert output.stride() == served.program(change(x)).stride()
    assert served.check(change(x)) and served.stats["graphs"] == 1 + is_another


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Any:
        y = self.conv(x) * scale
        return {"y": y, "shifted": (y + shift, [x, None]), "size": x.shape, "again": y}


def test_arguments_by_name_and_what_they_are_returned_in(gpu: FakeGpu) -> None:
    served, x = Served(Options()), pictures()
    shift = torch.randn(4, 14, 14)
    for _ in range(3):
        output = served(x, shift=shift, scale=2.0)
        assert output["shifted"][1][0] is x and output["y"] is output["again"] and output["size"] == x.shape
        served.check(x, 2.0, shift=shift)
    assert served.check(x, shift=shift, scale=2.0)
    assert not served.check(x, shift=shift, scale=3.0)  # a number is part of what a graph is for
    assert served.check(x, shift=shift, scale=3.0)
    assert served.check(x, shift=shift, scale=2.0)
    assert not served.check(x, True, shift=shift)  # which is equal to 1.0, and is not the same
    assert served.stats["captures"] == 3


class Returns(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 4, 3, padding=1), what
        self.register_buffer("kept", torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.what == "a view of its input":
            return y, x[:, :1]
        if self.what == "two views of one tensor":
            return y[:, :2], y[:, 2:]
        if self.what == "a tensor that it keeps":
            return y, self.kept
        return y.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2)


@pytest.mark.parametrize(
    "what",
    ["a view of its input", "two views of one tensor", "a tensor that it keeps", "elements of what it returns share"],
)
def test_outputs_that_a_copy_cannot_stand_for(gpu: FakeGpu, what: str, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(Returns(what))
    with caplog.at_level(logging.WARNING):
        assert not any(served.check(pictures()) for _ in range(4))
    assert len(caplog.records) == 1 and what in caplog.text
    assert "it is tried again by warmup, or when the network is changed" in caplog.text
    (reason,) = served.stats["failed"]
    assert what in reason and served.stats["eager"][reason] == 3


class Repeats(nn.Module):
    """Its output shares memory where it is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        return self.conv(x).mean((2, 3), keepdim=True).expand(-1, -1, times, 1)


def test_a_capture_that_fails_is_not_tried_again(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    served, x = Served(), pictures()
    gpu.fails = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8")]
    assert not any(served.check(x) for _ in range(4))
    assert (
        served.stats["failed"] == ["not captured: out of device memory: Tried to allocate 9 GiB"]
        and served.stats["captures"] == 0
    )
    assert "(2, 3, 16, 16) do not replay" in caplog.text and "it is tried again after 4 more calls" in caplog.text
    assert [served.check(pictures(3)) for _ in range(2)] == [False, True]  # another size
    assert len(gpu.sizes) == 2  # in a pool in which nothing failed
    served.graphs.capture(served.program, (x,), {})
    assert served.check(x) and served.stats["failed"] == []


def test_an_error_of_the_callers_is_the_programs(gpu: FakeGpu) -> None:
    served = Served()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="channels"):
            served(torch.randn(2, 4, 16, 16))
    assert served.check(pictures()) is False


def test_graphs_of_a_stream_share_a_pool_which_goes_when_it_is_too_large(gpu: FakeGpu) -> None:
    served = Served(limit_bytes=300)
    for samples in (1, 2, 3):
        assert [served.check(pictures(samples)) for _ in range(2)] == [False, True]
    assert (served.stats["graphs"], served.stats["bytes"], len(gpu.sizes)) == (3, 300, 1)
    assert [served.check(pictures(4)) for _ in range(2)] == [False, True]
    assert (served.stats["graphs"], served.stats["evictions"], served.stats["bytes"]) == (0, 4, 0)
    assert served.stats["failed"] == [] and served.stats["replays"] == 4
    assert [served.check(pictures(4)) for _ in range(4)] == [False, False, False, True] and len(gpu.sizes) == 2


def test_the_driver_s_memory_counts(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    served, gpu.needs, taken = Served(limit_bytes=250), 0, iter(range(0, 10000, 100))
    monkeypatch.setattr(gpu, "taken", lambda: next(taken))
    for samples in (1, 2, 3):
        served(pictures(samples)), served(pictures(samples))
    assert (served.stats["graphs"], served.stats["evictions"], served.stats["bytes"]) == (2, 1, 200)
    assert served.check(pictures(2)) and served.check(pictures(3))
    assert [served.check(pictures(1)) for _ in range(4)] == [False, False, False, True]  # twice as many as before
    assert served.stats["evictions"] == 2 and served.check(pictures(3))


def test_a_graph_beyond_the_limit_is_not_kept(gpu: FakeGpu) -> None:
    served, x = Served(limit_bytes=50), pictures()
    assert [served.check(x) for _ in range(4)] == [False, True, False, False]
    assert served.stats["failed"] == ["its graph takes more than `graphs.limit_bytes`"]
    assert (served.stats["captures"], served.stats["graphs"], served.stats["bytes"]) == (1, 0, 0)


class Sharing(FakeGpu):
    """Its pools are as large as the largest of their graphs needs, 100 bytes a sample, and do not shrink."""

    def capture(self, calls: Any, lane: Any, pool: Any) -> Any:
        before = self.sizes[pool]
        recording = super().capture(calls, lane, pool)
        samples = max(len(x) for *_, x in recording.steps if isinstance(x, Tensor) and x.ndim == 4)
        self.sizes[pool] = max(before, 100 * samples)
        return recording


def test_a_size_that_is_too_large_evicts_the_others_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Sharing()
    monkeypatch.setattr(graphs, "Gpu", lambda device: gpu)
    served = Served(limit_bytes=300)
    for samples in (1, 2, 9):
        assert [served.check(pictures(samples)) for _ in range(2)] == [False, True]
    assert (served.stats["graphs"], served.stats["evictions"]) == (0, 3)
    for samples in (1, 2):
        assert [served.check(pictures(samples)) for _ in range(4)] == [False, False, False, True]
    assert [served.check(pictures(9)) for _ in range(20)] == [False, False, False, True, *[False] * 16]
    assert (served.stats["graphs"], served.stats["evictions"], served.stats["captures"]) == (2, 4, 6)
    assert served.stats["failed"] == ["its graph takes more than `graphs.limit_bytes`"]
    assert all(served.check(pictures(samples)) for samples in (1, 2))


def test_memory_may_be_there_another_time(gpu: FakeGpu) -> None:
    served, x = Served(), pictures()
    gpu.fails = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8")]
    assert [served.check(x) for _ in range(7)] == [False] * 5 + [True] * 2  # four uses after the second
    assert served.stats["failed"] == [] and served.stats["captures"] == 1


def test_what_cannot_be_captured_leaves_the_pool_to_others(gpu: FakeGpu) -> None:
    served = Served(Repeats())
    assert [served.check(pictures(2), 1) for _ in range(2)] == [False, True]
    assert not any(served.check(pictures(2), 5) for _ in range(8))
    assert [served.check(pictures(3), 1) for _ in range(2)] == [False, True]
    assert len(gpu.sizes) == 1 and served.stats["graphs"] == 2


def test_the_default_stream_of_each_thread_is_many_streams(gpu: FakeGpu) -> None:
    served, x = Served(), pictures()
    gpu.current = 2
    assert not any(served.check(x) for _ in range(3))
    assert served.stats["eager"] == {"the current stream is another one in each thread": 3}


def test_each_stream_has_graphs_of_its_own(gpu: FakeGpu) -> None:
    served, x = Served(), pictures()
    served(x), served(x)
    gpu.current = 7
    assert [served.check(x) for _ in range(3)] == [False, True, True]
    gpu.current = 0
    assert served.check(x) and len(gpu.sizes) == 2


def test_buckets(gpu: FakeGpu) -> None:
    served = Served(policy="buckets")
    served(pictures(5)), served(pictures(7))
    for samples in (5, 6, 7, 8):
        x = pictures(samples)
        output = served(x)
        assert served.was_replayed and output.shape == (samples, 5)
        torch.testing.assert_close(output, served.program(x))
    assert not served.check(pictures(9)) and served.stats["graphs"] == 1


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y - y.mean(0)


def test_batches_that_mix_are_not_padded(gpu: FakeGpu) -> None:
    served = Served(Mixes(), policy="buckets")
    for samples in (3, 4):
        assert [served.check(pictures(samples)) for _ in range(3)] == [False, True, True]
    assert served.stats["graphs"] == 2


class MixesByBroadcasting(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.conv, self.returns = nn.Conv2d(3, 4, 3), returns

    def forward(self, x: Tensor) -> Tensor:
        m = self.conv(x).mean((2, 3))
        d = m[:, None] + m
        return d.mean(1) if self.returns == "numbers" else d


@pytest.mark.parametrize(
    ("returns", "reason"),
    [("numbers", "samples mix where"), ("a matrix of samples", "the batch is not the first axis")],
)
def test_batches_that_mix_by_broadcasting_are_not_padded(
    gpu: FakeGpu, returns: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(MixesByBroadcasting(returns), policy="buckets")
    assert mixing(served.program) is None
    assert not any(served.check(pictures(64)) for _ in range(2))  # a full bucket, in which nothing is padded
    assert reason in caplog.text
    for samples in (3, 4):
        assert [served.check(pictures(samples)) for _ in range(2)] == [False, True]
    served = Served(MixesByBroadcasting(returns), policy="buckets")
    served.graphs.capture(served.program, (torch.zeros(3, 3, 16, 16),), {})  # as `warmup` does
    assert served.check(pictures(3)) and served.stats["captures"] == 1


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(x) * scale


def test_buckets_are_for_the_other_arguments_too(gpu: FakeGpu) -> None:
    graph = fx.symbolic_trace(Switched().eval())
    option = next(node for node in graph.graph.nodes if node.target == "scale")
    option.meta["fixed"] = True  # as the tracer marks what it ran the model with
    served, x = Served(), pictures(3)
    served.program, served.graphs.policy = Program.of(graph), "buckets"
    assert [served.check(x, True) for _ in range(2)] == [False, True]
    assert [served.check(x, scale=True) for _ in range(2)] == [False, True]
    assert served.check(pictures(4), True) and served.stats["graphs"] == 2
    for _ in range(3):
        with pytest.raises(ValueError, match="False"):
            served(x, False)
        with pytest.raises(TypeError, match="wrong"):
            served(x, wrong=True)


class MakesNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).argmax(1) / 3


def test_the_default_dtype_is_part_of_what_a_graph_is_for(gpu: FakeGpu) -> None:
    served, x = Served(MakesNumbers()), pictures()
    served(x), served(x)
    try:
        torch.set_default_dtype(torch.float64)
        output = served(x)
        assert not served.was_replayed and output.dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert served.check(x)


def test_a_capture_follows_what_was_written_before_the_first_call(gpu: FakeGpu) -> None:
    served = sparse()
    layer = served.program.get_submodule("conv")
    x = torch.randn(2, layer.in_channels, 9, 9)
    layer.bias.add_(1.0)
    served(x)  # by which the layer notices
    served.graphs.capture(served.program, (x,), {})
    assert served.stats["captures"] == 1 and served.check(x)


def test_policies(gpu: FakeGpu) -> None:
    served = Served()
    served(pictures()), served(pictures())
    with pytest.raises(ValueError, match="no policy 'pow2'; there are exact, buckets, off"):
        served.graphs.policy = "pow2"  # type: ignore[assignment]
    served.graphs.policy = "off"
    assert not any(served.check(pictures()) for _ in range(3)) and served.stats["graphs"] == 0
    assert served.stats["eager"]["graphs are switched off"] == 3 and served.stats["replays"] == 1


def test_a_call_like_one_before_is_launched_first(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    served, x, long_ways = Served(), pictures(), list[Any]()
    by_graph = served.graphs._by_graph

    def noted(*args: Any, **named: Any) -> Any:
        long_ways.append(args)
        return by_graph(*args, **named)

    def takes_the_long_way(call: Callable[[], Any]) -> bool:
        before = len(long_ways)
        call()
        return len(long_ways) > before

    monkeypatch.setattr(served.graphs, "_by_graph", noted)
    assert [served.check(pictures()) for _ in range(6)] == [False, True, True, True, True, True]
    assert len(long_ways) == 3 and served.stats["replays"] == 5  # the third notes what such calls are like
    for other in (nn.Parameter(x), pictures(3), x.contiguous(memory_format=torch.channels_last)):
        assert takes_the_long_way(lambda other=other: served(other)) and not takes_the_long_way(lambda: served(x))
    assert takes_the_long_way(lambda: served(x=x))
    negated = torch._neg_view(x)
    assert torch.equal(served(negated), served.program(negated)) and served.was_replayed
    for attribute, value in (("is_captured", True), ("current", 7)):
        before = getattr(gpu, attribute)
        monkeypatch.setattr(gpu, attribute, value)
        assert takes_the_long_way(lambda: served(x)) and not served.was_replayed
        monkeypatch.setattr(gpu, attribute, before)
        assert not takes_the_long_way(lambda: served(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(takes_the_long_way(lambda: served(x)) and not served.was_replayed for _ in range(2))
    assert takes_the_long_way(lambda: served(x)) and served.was_replayed and not takes_the_long_way(lambda: served(x))


def test_a_graph_that_went_is_not_launched_again(gpu: FakeGpu) -> None:
    served, x = Served(), pictures()
    for _ in range(4):
        served(x)
    (graph,) = served.graphs._bound.captured.values()  # type: ignore[union-attr]
    gone = weakref.ref(graph)
    del graph
    served.graphs.limit_bytes = 0
    served.graphs._make_room(served.graphs._bound)  # type: ignore[arg-type]
    gc.collect()
    assert gone() is None and not served.check(x)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_calls_that_something_watches_are_not_replayed(gpu: FakeGpu) -> None:
    served, x = Served(), pictures()
    served(x), served(x)
    with torch.autocast("cpu", torch.bfloat16):
        served(x)
        assert not served.was_replayed
    with torch.profiler.profile():
        assert not served.check(x)
    with Watching():
        assert not served.check(x)
    with torch.device("cpu"):
        assert served.check(x)
    gpu.is_captured = True
    assert not served.check(x)
    gpu.is_captured = False
    with torch.enable_grad():
        served(x.clone().requires_grad_())
        assert not served.was_replayed
        assert served.check(x)
    reasons = {"autocast is on", "a profiler watches", "a mode watches", "the caller captures a graph"}
    assert reasons | {"an input needs a gradient"} <= served.stats["eager"].keys()


def rewritten(served: Served) -> None:
    served.program.get_submodule("head").weight.data.mul_(2.0)  # read where it lies


def assigned(served: Served) -> None:
    served.program.get_submodule("head").weight = nn.Parameter(torch.randn(5, 8))


def moved(served: Served) -> None:
    head = served.program.get_submodule("head")
    head.weight.data = head.weight.data.clone() * 2.0


def loaded(served: Served) -> None:
    served.program.load_state_dict({k: v * 2.0 for k, v in served.program.state_dict().items()}, assign=True)


def replaced(served: Served) -> None:
    served.program.pool = nn.AvgPool2d(2)


def replaced_inside(served: Served) -> None:
    served.program._modules["pool"] = nn.AvgPool2d(2)


def hooked(served: Served) -> None:
    served.program.get_submodule("head").register_forward_hook(lambda module, args, output: output + 1.0)


def trained(served: Served) -> None:
    served.program.get_submodule("norm").train()


@pytest.mark.parametrize("change", [assigned, moved, loaded, replaced, replaced_inside, hooked, trained])
def test_a_network_that_was_changed_is_captured_anew(gpu: FakeGpu, change: Any) -> None:
    served, x = Served(), pictures()
    before = served(x), served(x), served(x)
    change(served)
    assert not torch.equal(served(x), before[0]) and not served.was_replayed
    assert served.stats["eager"]["the network was changed since the last call"] == 1
    assert served.stats["replays"] == 3 and served.stats["graphs"] == 0
    stays_so = change in (hooked, trained)
    again = [(served(x), served.was_replayed)[1] for _ in range(3)]
    assert again == ([False] * 3 if stays_so else [False, True, True])


def test_numbers_that_are_rewritten_are_read_where_they_lie(gpu: FakeGpu) -> None:
    served, x = Served(), pictures()
    served(x), served(x)
    rewritten(served)
    assert served.check(x) and served.stats["captures"] == 1


def a_sparse_layer() -> SparseConv2d:
    problem = Problem(2, 8, 9, 9, 6, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(bias=True))
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.3)
    sparse_filter = SparseFilter.from_dense(weight)
    config = asdict(by_name("direct").configs(problem, sparse_filter)[0])
    return SparseConv2d(sparse_filter, torch.randn(6), Plan(problem, "direct", config, (), Machine.here()), "conv")


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = a_sparse_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 1.0


class AsLayers(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SparseConv2d)


def sparse() -> Served:
    served = Served()
    model = Sparse()
    served.program = Program.of(fx.GraphModule(model, AsLayers().trace(model)))
    return served


@pytest.mark.parametrize("change", ["written", "loaded", "assigned", "moved"])
def test_values_and_biases_of_sparse_layers_are_followed(gpu: FakeGpu, change: str) -> None:
    served = sparse()
    layer = served.program.get_submodule("conv")
    x = torch.randn(2, layer.in_channels, 9, 9)
    assert [served.check(x) for _ in range(3)] == [False, True, True]
    before = served(x)
    if change == "written":
        layer.bias.add_(1.0)
    elif change == "loaded":
        state = served.program.state_dict()
        served.program.load_state_dict(state | {"conv.values": 2.0 * state["conv.values"]})
    elif change == "assigned":
        layer.bias = layer.bias + 1.0
    else:
        served.program.to("cpu", torch.float32)
    assert not served.check(x)
    assert torch.equal(served(x), before) is (change == "moved")
    assert [served.check(x) for _ in range(2)] == [True, True]


def kept_by_graphs(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer of a CPU does not ask whether it is captured, so it is told to keep."""
    forward = SparseConv2d.forward

    def kept(self: SparseConv2d, *args: Any) -> Tensor:
        if gpu.is_captured:
            self._runners.keep(next(iter(self._runners.values())))
        return forward(self, *args)

    monkeypatch.setattr(SparseConv2d, "forward", kept)


def test_a_graph_keeps_the_runners_that_it_calls(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_by_graphs(gpu, monkeypatch)
    served = sparse()
    layer = served.program.get_submodule("conv")
    x = torch.randn(2, layer.in_channels, 9, 9)
    served(x), served(x)
    (run,) = layer._runners.values()
    (graph,) = served.graphs._bound.captured.values()  # type: ignore[union-attr]
    assert list(graph.kept.values()) == [run] and not layer._runners._kept


@pytest.mark.parametrize("change", ["written", "cleared", "evicted"])
def test_tables_that_another_stream_may_read_stay_for_a_while(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    kept_by_graphs(gpu, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    served, now = sparse(), 100.0
    monkeypatch.setattr(runners.time, "monotonic", lambda: now)
    layer = served.program.get_submodule("conv")
    x = torch.randn(2, layer.in_channels, 9, 9)
    served(x), served(x)
    run = weakref.ref(next(iter(layer._runners.values())))
    if change == "written":
        layer.bias.add_(1.0)
        served(x)
    else:
        layer._runners.clear()
        served.graphs.limit_bytes = 0
        if change == "evicted":
            served.graphs._make_room(served.graphs._bound)  # type: ignore[arg-type]
        served.graphs.clear()
    gc.collect()
    assert run() is not None
    now = 111.0
    served(torch.randn(2, layer.in_channels, 8, 8))
    gc.collect()
    assert run() is None


def test_copies_and_pickles_begin_without_graphs(gpu: FakeGpu) -> None:
    served = Served(policy="buckets", limit_bytes=1000)
    served(pictures()), served(pictures())
    for twin in (copy.deepcopy(served.graphs), pickle.loads(pickle.dumps(served.graphs))):
        assert (twin.policy, twin.limit_bytes) == ("buckets", 1000)
        assert twin.stats()["graphs"] == 0
    other = copy.deepcopy(served.program)
    served.graphs.call(other, other, (pictures(),), {})  # another program has graphs of its own
    assert served.stats["graphs"] == 0


def test_a_program_that_is_not_safe_says_why(gpu: FakeGpu) -> None:
    served = Served(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)))
    assert [served.check(pictures()) for _ in range(2)] == [False, True]
    served = Served(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)))
    assert not any(served.check(pictures().abs()) for _ in range(3))
    (reason,) = served.stats["eager"]
    assert reason == "0(%0) writes to an input or to what the network keeps"


def test_one_capture_at_a_time(gpu: FakeGpu) -> None:
    """Who would have to wait runs step by step meanwhile."""
    served, x = Served(), pictures()
    served(x)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with turn:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert not served.check(x)
    done.set()
    holder.join()
    assert served.check(x) and served.stats["eager"]["another capture is under way"] == 1


def test_threads_and_sizes(gpu: FakeGpu) -> None:
    served = Served()
    program, failures = served.program, list[BaseException]()

    def call(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for i in range(60):
                    x = torch.randn(1 + (i * seed) % 7, 3, 16, 16, generator=generator)
                    if i < 7:
                        served.graphs.capture(program, (x,), {})
                    assert torch.equal(served.graphs.call(program, program, (x,), {}), program(x))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    stats = served.stats
    assert (stats["captures"], stats["graphs"], stats["replays"], stats["eager"]) == (7, 7, 240 + 4 * 7, {})
