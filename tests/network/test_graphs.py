"""Converted models that replay graphs, on a GPU made of the CPU: wherever torch takes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import escort
from escort.network.model import ConvertedModel
from escort.network.plan import NetworkPlan
from escort.planner import timing
from tests.network.models import Branching, Masked, Small, pruned
from tests.runtime.fake_gpu import FakeGpu, install


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return install(monkeypatch)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def _converted(kind: type[nn.Module]) -> ConvertedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
        return escort.convert(pruned(kind()), pictures(), methods=["direct"])


def converted(kind: type[nn.Module] = Small) -> ConvertedModel:
    fast = copy.deepcopy(_converted(kind))
    fast.plan = replace(fast.plan, samples=None)
    fast._may_replay = True
    fast.network.native.enabled = False  # no GPU runs so
    return fast


def pictures(samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, 16, 16)


def replays(fast: ConvertedModel) -> int:
    count: int = fast.graphs.stats()["replays"]
    return count


def test_calls_replay_and_give_what_the_network_gives() -> None:
    fast = converted()
    for _ in range(4):
        x = pictures()
        torch.testing.assert_close(fast(x), fast.network(x), rtol=0, atol=0)
    assert replays(fast) == 3
    with torch.inference_mode():
        x = pictures()
        assert torch.equal(fast(x), fast.network(x)) and fast(x).is_inference()
    assert replays(fast) == 5 and not fast(x).is_inference()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a converted model has no gradient"):
        fast(pictures().requires_grad_())


def test_warmup_captures_at_once() -> None:
    fast = converted()
    fast.warmup([(2, 3, 16, 16), torch.Size((1, 3, 16, 16)), pictures(3), (pictures(4),)])
    assert fast.graphs.stats()["captures"] == 4
    before = replays(fast)
    for samples in (1, 2, 3, 4):
        fast(pictures(samples))
    assert replays(fast) == before + 4
    masked = converted(Masked)
    masked.warmup([pictures(), (pictures(), 2.0)])
    with pytest.raises(TypeError, match="there is no tensor"):
        masked.warmup(["abc"])
    masked.plan = replace(masked.plan, packed_inputs=True)
    with pytest.raises(ValueError, match=r"the shape \(2, 3, 16, 16\) does not say what the network takes"):
        masked.warmup([(2, 3, 16, 16)])


def test_a_network_that_was_planned_anew_keeps_the_choices_of_its_graphs() -> None:
    fast = converted()
    fast.graphs.policy, fast.graphs.limit_bytes = "buckets", 1000
    fast(pictures()), fast(pictures())
    again = fast.with_network(copy.deepcopy(fast.network), fast.plan)
    assert (again.graphs.policy, again.graphs.limit_bytes) == ("buckets", 1000)
    assert again.graphs.stats()["graphs"] == 0 and fast.graphs.stats()["graphs"] == 1


class Counting(Small):
    """A model with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        return super().forward(x)


def test_warmup_leaves_a_state_as_it_was() -> None:
    network = pruned(Counting())
    fast = ConvertedModel(network, replace(converted().plan, layers={}))
    fast(pictures(3))
    fast.warmup([pictures(), (4, 3, 16, 16)])
    assert network.calls.item() == 1 and network.seen == [3]
    fast = converted()
    fast(pictures()), fast(pictures())
    fast.warmup([pictures(3)])
    fast(pictures())
    assert replays(fast) == 3 and fast.graphs.stats()["captures"] == 2  # what has no state stays untouched


@pytest.mark.parametrize("given", [(1, 3, 40, 40), torch.Size((1, 3, 40, 40)), torch.zeros(1, 3, 40, 40)])
def test_warmup_takes_several_inputs(given: object) -> None:
    with pytest.raises(TypeError, match="several inputs or shapes; pass a list of them"):
        converted().warmup(given)  # type: ignore[arg-type]


def test_a_copy_has_graphs_of_its_own() -> None:
    fast, x = converted(), pictures()
    fast.graphs.limit_bytes = 1000
    fast(x), fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.graphs is not fast.graphs and twin.graphs.limit_bytes == 1000
        twin.network.get_submodule("second").values.zero_()
        for _ in range(5):  # the first notices what was written, and begins new tables
            assert not torch.equal(twin(x), fast(x))
        assert replays(twin) == 2


def test_another_state_drops_the_graphs() -> None:
    fast, x = converted(), pictures()
    before = fast(x), fast(x), fast(x)
    fast.load_state_dict({name: tensor + tensor.is_floating_point() for name, tensor in fast.state_dict().items()})
    for _ in range(3):
        assert not torch.equal(fast(x), before[0]) and torch.equal(fast(x), fast.network(x))
    assert fast.graphs.stats()["captures"] == 2
    fast.to("cpu")
    assert fast.graphs.stats()["graphs"] == 0


def test_compiled_and_exported() -> None:
    fast, x = converted(), pictures()
    expected = fast(x), fast(x)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected[0])
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), expected[0])
    assert replays(fast) == 1
    torch._dynamo.reset()


def test_vmap_and_the_profiler_see_layers() -> None:
    fast, x = converted(), pictures()
    expected = fast(x), fast(x)
    torch.testing.assert_close(torch.vmap(fast)(x[None])[0], expected[0])
    with torch.profiler.profile() as profile:
        fast(x)
    assert "escort::sparse_conv2d" in {event.key for event in profile.key_averages()}
    assert replays(fast) == 1


def test_the_plan_says_why_calls_replay_nothing() -> None:
    network, plan = converted().network, replace(converted().plan, device="cuda:0", layers={})
    assert ConvertedModel(network, plan).plan.not_captured is None
    network.get_submodule("head").register_forward_hook(lambda *_: None)
    fast = ConvertedModel(network, plan)
    assert fast.plan.not_captured == "layer head runs code besides its own, such as a hook"
    assert f"Calls replay no CUDA graph: {fast.plan.not_captured}." in text_of(fast.plan)
    assert NetworkPlan.from_json(fast.plan.to_json()) == fast.plan
    untraced = ConvertedModel(pruned(Branching()), plan)
    assert untraced.plan.not_captured == "the model could not be traced as a whole"
    assert converted().plan.not_captured is None and "replay" not in text_of(converted().plan)


def text_of(plan: NetworkPlan) -> str:
    return " ".join(str(plan).split())
