"""``torch.compile(model, backend="escort")``: what Dynamo cuts out is converted, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from escort import ConvertedModel, NetworkPlan, convert, prune
from escort.integrations import dynamo
from tests.network.models import Block, Small, pruned


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Branching(nn.Module):
    """Two graphs for each way through it, as Dynamo cuts where the way depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.left(x) if x.sum() > 0 else self.right(x)
        return x.flatten(2).view(x.shape[0], -1).relu()


class Counting(nn.Module):
    """Counts its calls in a buffer, in place and through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.calls.view(-1)[0].add_(1)
        return self.conv(x) * self.calls[0]


def compiled(model: nn.Module, **options: Any) -> tuple[Callable[..., Tensor], list[NetworkPlan]]:
    plans: list[NetworkPlan] = []
    options = {"methods": ["direct"], "on_plan": plans.append, **options}
    return torch.compile(model, backend="escort", options=options), plans


def check(fast: Callable[..., Any], model: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_it_is_registered() -> None:
    assert "escort" in torch._dynamo.list_backends(None)
    assert torch._dynamo.lookup_backend("escort") is dynamo.backend


def test_each_graph_is_converted() -> None:
    model = pruned(Branching())
    fast, plans = compiled(model)
    for sign in (1, -100):
        with torch.no_grad():
            model.stem[1].bias.fill_(sign)  # which way it goes
        check(fast, model, torch.randn(2, 3, 10, 10))
    assert [list(plan.layers) for plan in plans[:2]] == [["stem.0"], ["left"]]
    assert list(plans[-1].layers) == ["right"]
    assert plans[0].layers["stem.0"].problem.epilogue.activation == "relu"  # the norm is folded in
    assert "direct" in plans[0].methods


def test_any_batch() -> None:
    model = pruned(Branching())
    fast, plans = compiled(model)
    for batch in (2, 5, 1):
        check(fast, model, torch.randn(batch, 3, 10, 10) + 1)
    assert len(plans) <= 6  # of both graphs: the first size, any size, and size one, which torch takes for another kind
    before = len(plans)
    check(fast, model, torch.randn(9, 3, 10, 10) + 1)
    assert len(plans) == before


def _write(model: nn.Module) -> None:
    model.second.weight.mul_(2)


def _replace(model: nn.Module) -> None:
    model.second.weight = nn.Parameter(2 * model.second.weight)


def _move(model: nn.Module) -> None:
    model.second.weight.data = 2 * model.second.weight.data


def _normalise(model: nn.Module) -> None:
    """What torch counts no version for."""
    model.norm.train()(torch.randn(2, model.norm.num_features, 4, 4) + 3)
    model.norm.eval()


def _step_fused(model: nn.Module) -> None:
    """Neither is one counted here."""
    model.second.weight.grad = torch.ones_like(model.second.weight)
    torch.optim.SGD([model.second.weight], lr=0.1, fused=True).step()


@pytest.mark.parametrize("change", [_replace, _move, _normalise, _step_fused])
def test_changed_weights_are_converted_anew(change: Callable[[nn.Module], None]) -> None:
    model, x = pruned(Small()), torch.randn(2, 3, 16, 16)
    fast, plans = compiled(model)
    check(fast, model, x)
    check(fast, model, x)
    assert len(plans) == 1
    with torch.no_grad():
        change(model)
    check(fast, model, x)
    assert len(plans) == 2


class Looping(nn.Module):
    """A loop that Dynamo cannot cut, so that it compiles the code of the blocks in it, which are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.sum() < 0:
                x = -x
        return x


def test_one_graph_for_blocks_that_are_alike() -> None:
    model, x = pruned(Looping()), torch.randn(1, 3, 8, 8)
    fast, plans = compiled(model)
    for _ in range(3):
        check(fast, model, x)
    assert len(plans) == len(model.blocks)
    with torch.no_grad():
        model.blocks[2].conv.weight.mul_(2)
    for _ in range(3):
        check(fast, model, x)
    assert len(plans) == len(model.blocks) + 1


def test_weights_that_go_on_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "_MOST_CHANGES", 2)
    model, x = pruned(Small()), torch.randn(2, 3, 16, 16)
    fast, plans = compiled(model)
    for _ in range(2):
        check(fast, model, x)
        with torch.no_grad():
            _write(model)
    with pytest.warns(UserWarning, match="its weights changed 2 times"):
        check(fast, model, x)
    with torch.no_grad():
        _write(model)
    check(fast, model, x)
    assert len(plans) == 2


def test_gradients_flow_as_in_the_model() -> None:
    model = pruned(Small())
    fast, plans = compiled(model)
    x = torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match="need gradients.*inference_mode"):
        fast(x).sum().backward()
    assert model.first.weight.grad is not None and not plans
    check(fast, model, x)  # without gradients the same object is converted
    assert len(plans) == 1


def test_nothing_needs_gradients() -> None:
    model = pruned(Small()).requires_grad_(False)
    fast, plans = compiled(model)
    fast(torch.randn(2, 3, 16, 16))
    assert len(plans) == 1


def test_training_runs_as_it_is() -> None:
    model = pruned(Small()).train()
    fast, plans = compiled(model)
    before = model.norm.running_mean.clone()
    with torch.no_grad(), pytest.warns(UserWarning, match="training mode.*model.eval()"):
        fast(torch.randn(2, 3, 16, 16))
    assert not plans and not torch.equal(model.norm.running_mean, before)


def test_an_instance_norm_in_training_notes_its_statistics() -> None:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    fast, plans = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    with torch.no_grad(), pytest.warns(UserWarning, match="training mode.*model.eval()"):
        fast(torch.randn(2, 3, 8, 8))
    assert not plans and norm.running_mean.any()


def test_what_a_model_keeps_is_its_own() -> None:
    model = pruned(Counting())
    fast, plans = compiled(model)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for calls in (2, 4, 6):
            expected = model.conv(x) * calls
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    assert model.calls.tolist() == [6, 3]
    assert [list(plan.layers) for plan in plans] == [["conv"]]


def test_masks_are_applied() -> None:
    model = Small()
    prune.uniform(model, 0.9)
    fast, plans = compiled(model.eval())
    for _ in range(2):
        check(fast, model, torch.randn(2, 3, 16, 16))
    (plan,) = plans
    assert list(plan.layers) == ["first", "second"]
    with torch.no_grad():
        fast(torch.randn(2, 3, 16, 16))
        model.second.weight.zero_()  # what the mask made of it, which the next call makes anew
    check(fast, model, torch.randn(2, 3, 16, 16))
    assert len(plans) == 2


def test_inference_mode() -> None:
    model, x = pruned(Small()), torch.randn(2, 3, 16, 16)
    fast, plans = compiled(model)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fast(x * 2), model(x * 2), rtol=1e-4, atol=1e-5)
    assert len(plans) == 1


def test_a_number_that_changes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, factor: int) -> Tensor:
            return self.conv(x) * factor

    model, x = pruned(Scaled()), torch.randn(1, 3, 8, 8)
    fast, plans = compiled(model)
    check(fast, model, x, 2)
    with pytest.warns(UserWarning, match="is a number that changes"):
        check(fast, model, x, 3)
    check(fast, model, x, 4)
    assert len(plans) == 1


@pytest.mark.filterwarnings("ignore:a graph of torch.compile")
def test_what_cannot_be_converted_runs_as_it_is() -> None:
    model = pruned(Small())
    with torch.no_grad():
        model.first.weight[0] = torch.inf  # of which it makes numbers that cannot be compared
    fast, plans = compiled(model)
    for _ in range(2):
        with torch.no_grad():
            assert fast(torch.randn(2, 3, 16, 16)).isnan().all()
    assert not plans


@pytest.mark.filterwarnings("error")
def test_numbers_of_modules_are_constants() -> None:
    """Where sizes change Dynamo hands numbers over as tensors: batch norms are folded all the same, and followed."""
    model = pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    plans: list[NetworkPlan] = []
    options = {"methods": ["direct"], "on_plan": plans.append}
    fast = torch.compile(model, backend="escort", dynamic=True, options=options)
    for batch in (2, 3):
        check(fast, model, torch.randn(batch, 3, 8, 8))
    (plan,) = plans
    assert [layer.problem.epilogue.activation for layer in plan.layers.values()] == ["relu"]
    model[1].eps = 0.5
    check(fast, model, torch.randn(4, 3, 8, 8))
    assert len(plans) == 2
    check(fast, model, torch.randn(4, 3, 9, 9)[:, :, :8, :8])  # another layout, whose strides are inputs, too
    assert len(plans) == 3


def test_graphs_without_layers_say_nothing() -> None:
    fast = torch.compile(lambda x: x * 2, backend="escort")
    assert fast(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"efort": 3}, "no option efort; it takes effort"),
        ({"effort": "most"}, "effort is 'fast'"),
        ({"methods": "direct"}, "methods is a list"),
        ({"precision": "int8"}, "precision is one of"),
        ({"on_plan": 3}, "on_plan is a function of a plan"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    fast = torch.compile(nn.Conv2d(1, 1, 1), backend="escort", options=options)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        fast(torch.ones(1, 1, 2, 2))


def test_there_is_no_mode() -> None:
    fast = torch.compile(nn.Conv2d(1, 1, 1), backend="escort", mode="max-autotune")
    with torch.no_grad(), pytest.raises(Exception, match="has no mode"):
        fast(torch.ones(1, 1, 2, 2))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph replays a CUDA graph of its own, with the weights of now, for any batch."""
    made: list[ConvertedModel] = []
    monkeypatch.setattr(dynamo, "convert", lambda *args, **asked: made.append(convert(*args, **asked)) or made[-1])
    model = pruned(Branching()).cuda().half()
    fast = torch.compile(model, backend="escort", dynamic=True)
    for batch in (2, 2, 2, 2, 5):
        x = torch.randn(batch, 3, 10, 10, device="cuda", dtype=torch.half) + 1
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert len(made) == 2 and all(network.plan.precision == "fp16" for network in made)
    for network in made:
        assert network.plan.not_captured is None and network.graphs.stats()["replays"] >= 1
    with torch.no_grad():
        model.left.weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert len(made) == 3
