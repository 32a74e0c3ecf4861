"""The original and the converted networks race, and the fastest is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import escort
from escort.layers import SparseConv2d
from escort.methods import by_name
from escort.methods.precision import float32_convolutions
from escort.network.check import Request, settle_favor
from escort.network.choose import choose, judge, race, run_by
from escort.network.context import tf32_is_allowed
from escort.network.example import Example
from escort.network.original import run_original
from escort.network.plan import NetworkPlan
from escort.network.swap import Swapped, alternatives
from escort.network.values import largest_error, output_error
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import Precision
from escort.runtime import Batching, Favor
from tests.network.models import Small, pruned


def test_a_slower_network_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Small())
    monkeypatch.setattr(timing, "race", lambda runs, **_: [float(i + 1) for i in range(len(runs))])
    fast = escort.convert(model, torch.randn(1, 3, 8, 8))
    assert fast.plan.kept_dense and fast.plan.speedup == 1.0
    assert fast.plan.reason is not None and "the original is kept" in fast.plan.reason
    assert not any(isinstance(module, SparseConv2d) for module in fast.modules())
    assert all(a is not b for a, b in zip(fast.parameters(), model.parameters(), strict=True))


def test_whole_networks_are_all_timed_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[bool] = []

    def timed(runs: Any, device: Any, *, capture: bool = True, **_: Any) -> list[Timing]:
        captures.append(capture)
        return [Timing(3.0 if capture else 5.0, "graph" if capture and run is able else "events") for run in runs]

    monkeypatch.setattr(timing, "race_on_gpu", timed)
    able, unable = lambda: None, lambda: None
    gpu = torch.device("cuda:0")
    assert race([able, able], gpu) == ([3.0, 3.0], "graph") and captures == [True]
    assert race([able, unable], gpu) == ([5.0, 5.0], "events") and captures == [True, True, False]
    monkeypatch.setattr(timing, "race_on_gpu", lambda *_, **__: [Timing(None, reason="out of device memory: 2 GiB")])
    with pytest.raises(RuntimeError, match="cannot be timed: out of device memory: 2 GiB; pass .*smaller batch"):
        race([able], gpu)


class Outputs(nn.Module):
    """A convolution, and an output made of what it gives."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.conv(x))


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("output", [lambda y: {"out": y, "aux": None}, lambda y: (y, None), lambda y: (y, 3)])
def test_an_output_may_hold_what_is_no_tensor(output: Callable[[Tensor], Any]) -> None:
    model, x = pruned(Outputs(output)), torch.randn(4, 3, 9, 9)
    fast = escort.convert(model, x)
    with torch.no_grad():
        ours, theirs = tree_leaves(fast(x)), tree_leaves(model(x))
    assert [type(leaf) for leaf in ours] == [type(leaf) for leaf in theirs]
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def batchings_raced(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor, best: int, **options: Any) -> Any:
    """The converted model, and the batchings that were tried for it, of which that number won."""
    seen: list[Batching] = []

    def race(runs: Any, **_: Any) -> list[float]:
        for run in runs[1:] if runs[0].func is not run_by else runs:
            run()
            seen.append(run.args[2])
        return [9.0, *(1.0 if i == best else 2.0 for i in range(len(seen)))][-len(runs) :]

    with monkeypatch.context() as patch:
        patch.setattr("escort.network.choose.race", lambda runs, device: (race(runs), "calls"))
        return escort.convert(model, x, methods=["direct"], **options), seen


LATENCY = [Batching(), *(Batching(samples) for samples in (1, 2, 4))]


@pytest.mark.usefixtures("direct_wins")
@pytest.mark.parametrize(
    ("threads", "batch", "favor", "tried"),
    [
        (2, 1, None, LATENCY[:1]),
        (1, 5, None, LATENCY),
        (2, 4, None, [*LATENCY[:3], Batching(1, "throughput"), Batching(2, "throughput")]),
        (3, 5, None, [*LATENCY, Batching(1, "throughput")]),
        (2, 5, "latency", LATENCY),
        (2, 5, "throughput", [Batching(1, "throughput"), Batching(2, "throughput")]),
        (2, 1, "throughput", [Batching(1, "throughput")]),
    ],
    indirect=["threads"],
)
def test_batchings_race(
    monkeypatch: pytest.MonkeyPatch, threads: int, batch: int, favor: Favor | None, tried: list[Batching]
) -> None:
    model, x = pruned(Small()), torch.randn(batch, 3, 12, 12)
    for best in range(len(tried)):
        fast, seen = batchings_raced(monkeypatch, model, x, best, favor=favor)
        assert seen == tried and fast.plan.batching == fast.network.native.batching == tried[best]
        assert fast.plan.is_favor_asked == (favor is not None)
        assert NetworkPlan.from_json(fast.plan.to_json()) == fast.plan
    with torch.no_grad():
        for samples in (1, 2, 7):
            x = torch.randn(samples, 3, 12, 12)
            assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.usefixtures("direct_wins")
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_what_was_asked_for_outlasts_a_new_plan(monkeypatch: pytest.MonkeyPatch, threads: int, tmp_path: Path) -> None:
    fast, _ = batchings_raced(monkeypatch, pruned(Small()), torch.randn(4, 3, 12, 12), 1, favor="throughput")
    assert fast.plan.batching == Batching(2, "throughput") and "2 samples at a time" in str(fast.plan)
    escort.save(fast, tmp_path / "fast.escort")
    again = escort.load(tmp_path / "fast.escort", remeasure=False)
    assert again.network.native.batching == again.plan.batching == Batching(2, "throughput")
    assert escort.replan(again).plan.favor == "throughput"


@pytest.mark.usefixtures("always_faster")
def test_samples_that_are_not_apart_run_together() -> None:
    def output(y: Tensor) -> Tensor:
        return torch.add(y.mean((1, 2, 3)), y.mean((2, 3)).mean(1, keepdim=True))  # (N,) and (N, 1)

    model, x = pruned(Outputs(output)), torch.randn(8, 3, 8, 8)
    fast = escort.convert(model, x, favor="throughput")
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_favor_is_checked() -> None:
    with pytest.raises(ValueError, match="favor is one of"):
        settle_favor("speed", torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave it out for a model on cuda:0"):
        settle_favor("latency", torch.device("cuda:0"))


class Masked(nn.Module):
    """Holds infinities that no filter does, and gives some: attention over positions, and classes switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.register_buffer("mask", torch.full((16, 16), float("-inf")).triu(1))
        self.register_buffer("off", torch.arange(16) >= 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        attention = (y[:, :, None] * y[:, None] + self.mask).softmax(-1)
        return (attention @ y[..., None])[..., 0].masked_fill(self.off, float("-inf"))


@pytest.mark.usefixtures("always_faster")
def test_infinities_that_both_networks_have_are_right() -> None:
    model, x = pruned(Masked()), torch.randn(2, 3, 9, 9)
    fast = escort.convert(model, x)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan"), 1.0])
def test_an_infinity_of_one_network_alone_is_an_error(wrong: float) -> None:
    ref = torch.tensor([1.0, float("-inf"), 2.0])
    assert output_error(ref.clone(), ref) == 0.0
    for place in range(3):
        out = ref.clone()
        out[place] = wrong
        if not torch.equal(out, ref):
            assert output_error(out, ref) > 0.1


class Coarse(nn.Module):
    """A convolution that amplifies its rounding, which is coarse where torch may use TF32, or always."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.always = nn.Conv2d(3, 4, 3), always

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        coarse = self.always or tf32_is_allowed()
        return (8 * y).round() / 8 if coarse and x.dtype is torch.float32 else y


@pytest.mark.parametrize(("precision", "is_right"), [("tf32", True), ("fp32", False)])
def test_in_tf32_the_original_is_judged_in_tf32(precision: Precision, is_right: bool) -> None:
    """Its weights are float32, and run so it would be exact."""
    with torch.no_grad(), float32_convolutions("fp32"):
        original = run_original(Coarse(always=False).eval(), Example((torch.randn(2, 3, 8, 8),)))
        error, why_not = judge(Coarse(always=True).eval(), original, Request(torch.device("cpu"), precision))
    assert error > 5e-3 and (why_not is None) is is_right


def test_the_largest_error_is_that_of_all_outputs() -> None:
    ref = torch.ones(3)
    assert largest_error([ref, 3 * ref, ref], [ref, ref, ref]) == 2.0 and largest_error([], []) == 0.0
    assert largest_error([ref], [ref, ref]) == largest_error([ref, ref], [ref]) == float("inf")


@pytest.fixture
def swapped(direct_wins: None, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor, Swapped]:
    """A model, an example, and the network that a conversion made of it."""
    model, x, found = pruned(Small()), torch.randn(2, 3, 8, 8), []

    def keep(dense: nn.Module, candidates: Any, *args: Any) -> Any:
        found[:] = candidates
        return choose(dense, candidates, *args)

    monkeypatch.setattr("escort.network.convert.choose", keep)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    escort.convert(model, x)
    (candidate,) = found
    assert {plan.method for plan in candidate.layers.values()} == {"direct"}
    return model, x, candidate


def timed(swapped: Swapped, dense_us: dict[str, float]) -> Swapped:
    """The network with layers that take 10 us by their choice, and so long by the dense method; by default 99 us."""
    layers = {}
    for name, plan in swapped.layers.items():
        times_us = {"direct": 10.0, "dense": dense_us.get(name, 99.0)}
        own = [replace(c, time_us=times_us.get(c.method)) for c in plan.candidates if c.config is not None]
        layers[name] = replace(plan, candidates=tuple(own))
    return replace(swapped, layers=layers)


GPU = Request(torch.device("cuda:0"), "fp32")


def methods_of(alternative: Swapped) -> dict[str, str]:
    """What runs the layers of a network once an alternative is in its place."""
    alternative.put_in_place()
    methods = {name: alternative.network.get_submodule(name).plan.method for name in alternative.layers}
    assert methods == {name: plan.method for name, plan in alternative.layers.items()}
    return methods


def test_layers_that_are_nearly_as_fast_dense_are_tried_so_in_the_network(swapped: Any) -> None:
    model, x, candidate = swapped
    names = list(candidate.layers)
    own, close = alternatives(timed(candidate, {names[0]: 11.0}), GPU)
    before = dict.fromkeys(names, "direct")
    assert methods_of(close) == before | {names[0]: "dense"} and methods_of(own) == before
    with torch.no_grad():
        for alternative in (own, close, own):
            alternative.put_in_place()
            assert torch.allclose(alternative.network(x), model(x), atol=1e-5)
    assert close.layers[names[0]].time_us == 11.0


def test_all_layers_are_tried_dense_where_they_take_little_longer_together(swapped: Any) -> None:
    _, _, candidate = swapped
    names = list(candidate.layers)
    times_us = dict.fromkeys(names, 10.5) | {names[0]: 12.0}
    _, close, dense = alternatives(timed(candidate, times_us), GPU)
    assert methods_of(dense) == dict.fromkeys(names, "dense")
    assert methods_of(close) == methods_of(dense) | {names[0]: "direct"}


def test_where_dense_is_far_slower_the_network_has_no_alternatives(
    swapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, candidate = swapped
    names = list(candidate.layers)
    assert alternatives(timed(candidate, {}), GPU) == [timed(candidate, {})]
    close = timed(candidate, {names[0]: 11.0})
    assert alternatives(close, replace(GPU, device=torch.device("cpu"))) == [close]

    with monkeypatch.context() as patch:
        patch.setattr(by_name("dense"), "without_trying", lambda config: None)
        assert alternatives(close, GPU) == [close], "its first call takes long"

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(by_name("dense"), "prepare", full)
    assert alternatives(close, GPU) == [close]


def test_the_fastest_alternative_is_kept(swapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, candidate = swapped
    name = next(iter(candidate.layers))
    for fastest, method in ((1, "direct"), (2, "dense")):
        several = alternatives(timed(candidate, {name: 11.0}), GPU)
        monkeypatch.setattr("escort.network.convert.alternatives", lambda *_, several=several: several)

        def raced(runs: Any, device: Any, fastest: int = fastest) -> Any:
            for run in runs:
                run()
            return [9.0, *(1.0 if i == fastest else 2.0 for i in range(1, len(runs)))], "calls"

        monkeypatch.setattr("escort.network.choose.race", raced)
        monkeypatch.setattr("escort.network.choose.batchings_to_try", lambda *_: [Batching()])
        fast = escort.convert(model, x)
        assert fast.network is candidate.network and not fast.plan.kept_dense
        assert fast.network.get_submodule(name).plan.method == fast.plan.layers[name].method == method
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
