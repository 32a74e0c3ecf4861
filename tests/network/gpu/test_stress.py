"""What converted models do for long and for many at once: memory is flat, and every output is right bit by bit."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.networks import NETWORKS
from escort.layers import SparseConv2d, runners
from escort.network.model import ConvertedModel
from escort.runtime import graphs
from escort.runtime.lanes import MOST_LANES
from tests.network.gpu.networks import assert_same, converted, in_formats, pruned, samples

pytestmark = [pytest.mark.gpu, pytest.mark.stress]


def picture(count: int = 2, size: int = 32) -> Tensor:
    return samples("fp32", count, 3, size, size)


def in_threads(*calls: Callable[[], None]) -> None:
    """Runs calls at once, each on a thread and a stream of its own, and raises what the first of them raised."""
    failures, ready = list[BaseException](), threading.Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                ready.wait()
                call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@in_formats(("channels_last",))
def test_memory_is_flat_over_ten_thousand_calls_of_two_hundred_sizes() -> None:
    """More sizes than a layer keeps runners for, by whatever method was chosen. The host's memory counts, too."""
    fast = converted("fp16", pruned(NETWORKS["resnet18"].factory(num_classes=10), 0.9), 1, 3, 96, 96)
    sizes = [(1 + k % 2, 48 + 8 * (k // 2 % 10), 48 + 8 * (k // 20)) for k in range(200)]
    pages = Path("/proc/self/statm")

    def call_all(times: int) -> tuple[int, int, int]:
        """What torch has of the GPU's memory after that, in use and in all, and what the process has of the host's."""
        for _ in range(times):
            for count, height, width in sizes:
                fast(samples("fp16", count, 3, height, width))
        torch.cuda.synchronize()
        resident = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident

    captured, before, after = call_all(2), call_all(8), call_all(40)
    stats = fast.graphs.stats()
    print([[count >> 20 for count in counts] for counts in (captured, before, after)], "MiB;", stats)
    assert after[0] <= before[0] <= captured[0], "runners that made room for others may go meanwhile"
    assert max(before[1], after[1]) <= captured[1] + (20 << 20), "a segment of torch's allocator"
    assert after[2] <= before[2] + (16 << 20)
    assert (stats["captures"], stats["replays"], stats["evictions"], stats["failed"]) == (200, 49 * 200, 0, [])


@pytest.mark.parametrize("policy", ["exact", "buckets"])
def test_threads_streams_sizes_evictions_and_captures_of_the_user(
    policy: Any, only: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads than lanes and more sizes than graphs and runners may be, while what a user recorded is replayed."""
    only("direct")  # a kernel of ours, so that numbers are the same bit by bit
    ours = converted("fp32")
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 8)
    monkeypatch.setattr(runners, "_GRACE_S", 0.5)
    for layer in ours.network.modules():
        if isinstance(layer, SparseConv2d):
            layer._runners.most = 3
    twin = copy.deepcopy(ours)
    twin.graphs.policy, ours.graphs.policy = "off", policy
    kinds = [(1 + k % 4, 24 + 4 * (k // 4)) for k in range(24)]
    xs = [picture(*kind) for kind in kinds]
    same = torch.equal if policy == "exact" else _is_close  # of a padded batch cuBLAS may sum otherwise
    with torch.no_grad():
        expected = [twin(x) for x in xs]
        recorded: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        for x in xs[:3]:
            ours(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ours(x)
            recorded.append((graph, y))
    torch.cuda.synchronize()

    def serve(seed: int) -> None:
        for i in range(150):
            k = (7 * (i // 3) + 5 * seed) % len(kinds)
            y = ours(xs[k])
            torch.cuda.current_stream().synchronize()
            assert same(y, expected[k]), (seed, i, kinds[k])

    def replay() -> None:
        for i in range(300):
            graph, y = recorded[i % len(recorded)]
            y.zero_()
            graph.replay()
            torch.cuda.current_stream().synchronize()
            assert torch.equal(y, expected[i % len(recorded)]), i

    in_threads(*[lambda seed=seed: serve(seed) for seed in range(MOST_LANES + 3)], replay)  # type: ignore[misc]
    stats = ours.graphs.stats()
    assert stats["evictions"] > 0 and stats["graphs"] <= 8 and stats["failed"] == [], stats
    assert stats["captures"] > 8 and stats["replays"] > stats["captures"], stats


def _is_close(a: Tensor, b: Tensor) -> bool:
    assert_same(a, b)
    return True


@pytest.fixture
def by_cudnn(only: Callable[[str], None]) -> ConvertedModel:
    """A network that runs by a library which keeps a handle and what it tried for each thread."""
    only("cudnn")
    return converted("fp16")


def test_the_first_call_of_a_thread_may_be_the_second_of_its_kind(by_cudnn: ConvertedModel) -> None:
    """That one is captured: what the library makes for the thread, it must have made before."""
    x, outputs = samples("fp16"), list[Tensor]()
    expected = by_cudnn.network(x)
    default = torch.cuda.default_stream()

    def call() -> None:
        with torch.cuda.stream(default):
            outputs.append(by_cudnn(x))
            outputs.append(by_cudnn(x))

    by_cudnn(x)
    for _ in range(3):
        in_threads(call)
    torch.cuda.synchronize()
    stats = by_cudnn.graphs.stats()
    assert (stats["captures"], stats["replays"], stats["failed"]) == (1, 6, []), stats
    for output in outputs:
        assert_same(output, expected)


def test_a_thread_that_warmed_up_may_capture(by_cudnn: ConvertedModel) -> None:
    """Also where all that its calls do is to replay a graph of ours: libraries make their handles for each thread."""
    x = samples("fp16")
    expected = by_cudnn.network(x)

    def capture() -> None:
        by_cudnn.warmup([x])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = by_cudnn(x)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(y, expected)

    torch.cuda.synchronize()
    for _ in range(3):
        in_threads(capture)


def test_what_fails_in_a_capture_says_what_to_do(by_cudnn: ConvertedModel) -> None:
    x = samples("fp16")
    by_cudnn(x)
    layer = by_cudnn.network.get_submodule("pointwise")
    assert isinstance(layer, SparseConv2d)
    for key, prepared in list(layer._runners.items()):

        def fail(x: Tensor, residual: Tensor | None = None) -> Tensor:
            raise RuntimeError("no handle")

        layer._runners[key] = replace(prepared, run=fail)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"^no handle$"):
            by_cudnn.network(x)
        graph = torch.cuda.CUDAGraph()
        remedy = r"layer pointwise: no handle; call the network's warmup in the thread that captures, before it does"
        with pytest.raises(RuntimeError, match=remedy), torch.cuda.graph(graph):
            by_cudnn.network(x)


def test_runners_that_make_room_are_not_freed_under_a_kernel_that_waits(
    only: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream is behind by a second while its layer's runner goes, and so do more than are kept for a while."""
    only("direct")
    fast = converted("fp32")
    fast.graphs.policy = "off"
    monkeypatch.setattr(runners, "_MOST_LEAVING", 4)
    for layer in fast.network.modules():
        if isinstance(layer, SparseConv2d):
            layer._runners.most = 1
    x, behind = picture(), torch.cuda.Stream()
    with torch.no_grad():
        expected = fast(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(behind):
            torch.cuda._sleep(2_000_000_000)
            y = fast(x)
        for size in range(12):
            fast(picture(size=36 + 4 * size))
        filled = [torch.full((1 << k,), torch.nan, device="cuda") for k in range(4, 20) for _ in range(8)]
        behind.synchronize()
    assert filled and torch.equal(y, expected)
