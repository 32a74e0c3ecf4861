"""Whole models: converted equals original, for every network, and what cannot be converted says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import escort
from benchmarks.networks import NETWORKS
from escort import bench, planner, prune, reference
from escort.convert import NETWORK_ERROR_BOUND, ConvertedModel, NetworkPlan, replan
from escort.nn import MaxPool2d, SparseConv2d

#: The smallest input that each network takes, so that the tests stay fast.
SIZES = {"googlenet": 64, "caffenet": 227, "alexnet": 127}


class Small(nn.Module):
    """Batch norm, ReLU6, a residual, a pool by module and one by function, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu6(self.norm(self.first(x))), 3, stride=2, padding=1)
        x = self.pool(F.relu(self.second(x) + x))
        return self.head(F.dropout(x.mean((2, 3)), training=self.training))


class Branching(nn.Module):
    """Control flow on data, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(self.other(x)[:, :3])


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks need not win on a busy machine: the first contestant, the original, always loses."""
    race = bench.race

    def ordered(runs: Any, **options: Any) -> list[float]:
        times = race(runs, **{**options, "rounds": 1})
        return [2 * max(times), *times[1:]]

    monkeypatch.setattr(bench, "race", ordered)


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    prune.uniform(model, sparsity)
    prune.make_permanent(model)
    return model.eval()


def converted(model: nn.Module, *example: torch.Tensor) -> ConvertedModel:
    return escort.convert(model, example)


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    model = pruned(NETWORKS[name].factory(num_classes=10), 0.9)
    size = SIZES.get(name, 32)
    fast = converted(model, torch.randn(1, 3, size, size))
    assert fast.traced and not fast.plan.kept_dense
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(fast.plan.layers) == len(convolutions) and not fast.plan.skipped
    assert not any(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in fast.modules())
    for batch, other in ((1, size), (3, size), (2, size + 32)):
        x = torch.randn(batch, 3, other, other)
        try:
            with torch.no_grad():
                expected, out = model(x), fast(x)
        except RuntimeError:  # its classifier takes one input size only
            continue
        assert reference.compare(out, expected) < NETWORK_ERROR_BOUND


@pytest.mark.usefixtures("always_faster")
def test_what_is_fused_and_swapped() -> None:
    model = pruned(Small())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 17, 18)
    fast = converted(model, x)
    first, second = fast.network.get_submodule("first"), fast.network.get_submodule("second")
    assert isinstance(first, SparseConv2d) and isinstance(second, SparseConv2d)
    assert (first.activation, first.residual) == ("relu6", False)
    assert (second.activation, second.residual) == ("relu", True)
    assert first.name == "first" and first.plan is fast.plan.layers["first"]
    assert sum(isinstance(m, MaxPool2d) for m in fast.modules()) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("always_faster")
def test_an_untraceable_model_is_converted_layer_by_layer() -> None:
    model = pruned(Branching())
    fast = converted(model, torch.rand(1, 3, 8, 8))
    assert not fast.traced and set(fast.plan.layers) == {"conv"}
    assert "other" not in fast.plan.layers
    for x in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
    with torch.no_grad():
        skipped = converted(model, -torch.rand(1, 3, 8, 8)).plan.skipped
    assert "reflect" in skipped["other"]


@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_compiles_and_exports() -> None:
    fast = converted(pruned(Small()), torch.randn(2, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x), atol=1e-6)
    program = torch.export.export(fast, (x,))
    assert torch.allclose(program.module()(x), fast(x), atol=1e-6)


@pytest.mark.usefixtures("always_faster")
def test_an_exported_program_can_be_converted() -> None:
    model = pruned(Small())
    x = torch.randn(2, 3, 16, 16)
    fast = converted(torch.export.export(model, (x,)).module(), x)
    assert len(fast.plan.layers) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_a_slower_network_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Small())
    monkeypatch.setattr(bench, "race", lambda runs, **_: [float(i + 1) for i in range(len(runs))])
    fast = converted(model, torch.randn(1, 3, 8, 8))
    assert fast.plan.kept_dense and fast.plan.speedup == 1.0
    assert fast.plan.reason is not None and "the original is kept" in fast.plan.reason
    assert not any(isinstance(module, SparseConv2d) for module in fast.modules())
    assert all(a is not b for a, b in zip(fast.parameters(), model.parameters(), strict=True))


@pytest.mark.usefixtures("always_faster")
def test_the_plan_survives_json() -> None:
    plan = converted(pruned(Small()), torch.randn(1, 3, 8, 8)).plan
    assert NetworkPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(ValueError, match="not a network plan"):
        NetworkPlan.from_json({"layers": 1})


@pytest.mark.usefixtures("always_faster")
def test_replanning_measures_again_and_computes_the_same() -> None:
    x = torch.randn(1, 3, 8, 8)
    fast = converted(pruned(Small()), x)
    planner._remembered.clear()
    again = replan(fast)
    assert set(again.plan.layers) == set(fast.plan.layers)
    assert again.plan.layers["first"] is not fast.plan.layers["first"]
    assert torch.allclose(again(x), fast(x), atol=1e-5)


@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_does_not_train() -> None:
    fast = converted(pruned(Small()), torch.randn(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="for inference"):
        fast.train()
    assert fast.eval() is fast


def one_conv(kernel: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, kernel, dtype=dtype)).eval()


def with_nan(model: nn.Module) -> nn.Module:
    model.second.weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    return model


@pytest.mark.parametrize(
    ("model", "example", "error", "says"),
    [
        (lambda: Small().train(), torch.randn(1, 3, 8, 8), ValueError, r"training mode; call model.eval\(\)"),
        (lambda: pruned(Small()), [1, 2], TypeError, "tensor or a tuple of tensors"),
        (lambda: pruned(Small()), (), TypeError, "tensor or a tuple of tensors"),
        (lambda: pruned(Small()), torch.randn(1, 3, 8, 8, device="meta"), ValueError, "is on cpu, the example on meta"),
        (lambda: with_nan(pruned(Small())), torch.randn(1, 3, 8, 8), ValueError, "second.weight holds NaN"),
        (lambda: nn.Linear(3, 4).eval(), torch.randn(1, 3), ValueError, "no 2-d convolution"),
        (lambda: "resnet50", torch.randn(1, 3), TypeError, "takes an nn.Module, got str"),
        (lambda: pruned(Small()), torch.randn(1, 4, 8, 8), ValueError, "example .*does not run.*channels"),
        (lambda: pruned(Small()), torch.randint(5, (1, 3, 8, 8)), ValueError, "example .*does not run"),
        (lambda: one_conv(kernel=5), torch.randn(1, 3, 4, 4), ValueError, "example .*does not run"),
        (lambda: pruned(Small()).double(), torch.randn(1, 3, 8, 8).double(), ValueError, "first: .*float64.*float32"),
        (
            lambda: one_conv(dtype=torch.complex64),
            torch.randn(1, 3, 8, 8) + 0j,
            ValueError,
            "layer 0: .*complex64.*float32",
        ),
    ],
)
def test_bad_input_is_named(model: Callable[[], Any], example: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        escort.convert(model(), example)
