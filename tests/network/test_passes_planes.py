"""What stands between convolutions becomes layers of ours on a GPU, wherever they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from escort.cuda.gpu import H200
from escort.layers import AdaptiveAvgPool2d, FusedLinear, NormedConcat, OnPlanes, Squeeze
from escort.network.passes import PASSES, planes
from escort.network.passes.classifiers import SLOWER
from escort.network.passes.norms import join_norms
from escort.network.passes.squeezes import ONE_LAUNCH, join_squeezes
from escort.network.swap import find_layers
from tests.network.models import Between
from tests.network.patterns import ON_CPU, traced
from tests.network.rewritten import Rewritten, settled

ON_GPU = replace(ON_CPU, device=torch.device("cuda:0"))


class Calls(nn.Module):
    """Calls a function on the input and on its gates, one for each channel."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, x.amax((2, 3), keepdim=True))


def rewritten(model: nn.Module, x: Tensor) -> list[str]:
    """The layers of ours that a model gets."""
    network, left_alone = planes.rewrite(traced(model.eval(), x), ON_GPU)
    assert not left_alone
    torch.testing.assert_close(network(x), model(x))
    more = torch.randn(3, *x.shape[1:])
    torch.testing.assert_close(network(more), model(more))
    return [type(module).__name__ for module in network.modules() if isinstance(module, OnPlanes)]


@pytest.mark.parametrize(
    ("function", "layer"),
    [
        (lambda x, g: F.local_response_norm(x, 5), "LocalResponseNorm"),
        (lambda x, g: F.local_response_norm(x, size=3, alpha=0.5, beta=0.6, k=2.0), "LocalResponseNorm"),
        (lambda x, g: F.avg_pool2d(x, 2), "AvgPool2d"),
        (lambda x, g: F.avg_pool2d(x, (3, 2), stride=1, padding=1, count_include_pad=False), "AvgPool2d"),
        (lambda x, g: torch.ops.aten.avg_pool2d.default(x, [2, 2], []), "AvgPool2d"),
        (lambda x, g: F.adaptive_avg_pool2d(x, (2, None)), "AdaptiveAvgPool2d"),
        (lambda x, g: x.mean((2, 3)), "AdaptiveAvgPool2d"),
        (lambda x, g: x.mean([-1, -2], keepdim=True), "AdaptiveAvgPool2d"),
        (lambda x, g: torch.mean(x, dim=(2, 3)).relu(), "AdaptiveAvgPool2d"),
        (lambda x, g: F.interpolate(x, scale_factor=2), "Upsample"),
        (lambda x, g: F.interpolate(x, (9, 20), mode="bilinear", align_corners=False), "Upsample"),
        (lambda x, g: x * g, "Gate"),
        (lambda x, g: g.sigmoid() * x, "Gate"),
        (lambda x, g: torch.mul(x, g), "Gate"),
        (lambda x, g: torch.cat([x, x + 1, x], 1), "Concat"),
        (lambda x, g: torch.concat((x, x + 1), dim=-3), "Concat"),
    ],
)
def test_what_becomes_a_layer(function: Callable[[Tensor, Tensor], Tensor], layer: str) -> None:
    assert rewritten(Calls(function), torch.randn(2, 6, 8, 9)) == [layer]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: x.mean(),
        lambda x, g: x.mean((1, 2)),
        lambda x, g: x.mean((2, 3), dtype=torch.float64),
        lambda x, g: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 1)),
        lambda x, g: F.interpolate(x, (4, 4), mode="bilinear", antialias=True),
        lambda x, g: x * x,
        lambda x, g: g * g,
        lambda x, g: x * 2.0,
        lambda x, g: x * g[:, :1],
        lambda x, g: x.clone().mul_(g),
        lambda x, g: torch.cat([x, x], 2),
        lambda x, g: torch.cat([x.flatten(2), x.flatten(2)], 1),
    ],
)
def test_what_stays(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert rewritten(Calls(function), torch.randn(2, 6, 8, 9)) == []


class Own(nn.AvgPool2d):
    """A subclass may compute anything."""


def hooked() -> nn.Module:
    module = nn.AvgPool2d(2)
    module.register_forward_hook(lambda *_: None)
    return module


def test_modules_are_replaced_where_they_stand() -> None:
    model = nn.Sequential(
        *(nn.LocalResponseNorm(5, 0.1), nn.AvgPool2d(3, 2, 1, True, False), Own(2), hooked()),
        *(nn.UpsamplingNearest2d(scale_factor=2), nn.AdaptiveAvgPool2d(1)),
    )
    x = torch.randn(2, 6, 33, 34)
    expected = model(x)
    planes.replace_modules(model)
    names = [type(module).__name__ for module in model]
    assert names == ["LocalResponseNorm", "AvgPool2d", "Own", "AvgPool2d", "Upsample", "AdaptiveAvgPool2d"]
    assert [isinstance(module, OnPlanes) for module in model] == [True, True, False, False, True, True]
    assert torch.equal(model(x), expected)


def test_on_a_cpu_all_stays() -> None:
    network = traced(nn.Sequential(nn.AvgPool2d(2), nn.LocalResponseNorm(5)).eval(), torch.randn(1, 6, 8, 8))
    rewritten, _ = planes.rewrite(network, ON_CPU)
    assert not any(isinstance(module, OnPlanes) for module in rewritten.modules())


def test_a_network_keeps_nothing_that_a_kernel_computes() -> None:
    torch.manual_seed(0)
    model, x = settled(Between()), torch.randn(2, 3, 16, 16)
    rewritten = Rewritten(model, x, torch.randn(3, 3, 16, 16), request=ON_GPU)
    names = ["AdaptiveAvgPool2d", "Gate", "LocalResponseNorm", "AvgPool2d", "Upsample", "Concat", "AdaptiveAvgPool2d"]
    assert [name for name in rewritten.rest if name in names or name in ("mean", "mul", "cat", "interpolate")] == names
    activations = {name: conv.activation for name, conv in rewritten.convs.items()}
    assert activations["depthwise.0"] == activations["reduce"] == "silu" and activations["expand"] == "sigmoid"


class Dense(nn.Module):
    """Norms behind a concatenation, behind a tensor that others read too, and in front of what is no ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 4, 1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(11), nn.BatchNorm2d(15), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        z = self.second(self.relu(self.norm1(torch.cat([x, y], 1))))
        both = torch.cat([x, y, z], 1)
        return F.relu(self.norm2(both)), both, torch.tanh(self.norm3(y.abs()))


def test_norms_take_in_what_is_around_them() -> None:
    model = settled(Dense(), density=1.0)
    x = torch.randn(2, 3, 8, 9)
    network, _ = planes.rewrite(traced(model, x), ON_GPU)
    names = set(network.state_dict())
    join_norms(network)
    assert set(network.state_dict()) == names
    for inputs in (x, torch.randn(3, 3, 5, 5)):
        for ours, expected in zip(network(inputs), model(inputs), strict=True):
            torch.testing.assert_close(ours, expected)
    joined = {name: module for name, module in network.named_modules() if isinstance(module, NormedConcat)}
    activations = {name: norm.activation for name, norm in joined.items()}
    assert activations == {"norm1": "relu", "norm2": "relu", "norm3": "none"}
    calls = {node.target: len(node.args) for node in network.graph.nodes if node.op == "call_module"}
    assert (calls["norm1"], calls["norm2"], calls["norm3"]) == (2, 1, 1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules() if module not in joined.values())


class Excited(nn.Module):
    """Squeeze-excitation as a module of its own, as code of a block, and as something that no kernel computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.se = Excitation()
        self.other = Excitation()
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.wide = Excitation(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y * self.se(y)
        y = self.other(y) * y
        y = y * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)))))
        return y * self.wide(y)


class Excitation(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv_reduce, self.act, self.conv_expand = nn.Conv2d(16, 4, 1), activation or nn.SiLU(), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_expand(self.act(self.conv_reduce(self.pool(x)))).sigmoid()


def test_squeeze_excitation_becomes_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)
    torch.manual_seed(0)
    model, x = Excited().eval(), torch.randn(2, 3, 8, 8)
    rewritten = Rewritten(model, x, torch.randn(3, 3, 6, 6), request=ON_GPU)
    network = rewritten.network
    assert isinstance(network, fx.GraphModule)
    join_squeezes(network)
    found = {name: module for name, module in network.named_modules() if isinstance(module, Squeeze)}
    assert found.keys() == {"se", "other"}, "convolutions of a block stay, and so does a tanh"
    assert {name for name in network.state_dict() if name.startswith(("se.", "other."))} <= set(model.state_dict())
    assert (found["se"].activation, found["se"].gate_activation) == ("silu", "sigmoid")
    for inputs in (x, torch.randn(3, 3, 5, 9)):
        torch.testing.assert_close(network(inputs), model(inputs))
    calls = {node.target for node in network.graph.nodes if node.op == "call_module"}
    assert {"se", "other", "fc1", "fc2", "wide.conv_reduce"} <= calls and not calls & {"se.pool", "se.conv_reduce"}
    pixel = torch.Size((2, 16, 1, 1))
    layers = {"first": x.shape, "se.conv_reduce": pixel, "fc1": pixel}
    unplanned = find_layers(network, layers, "contiguous", {}, ON_CPU)
    assert unplanned.skipped["se.conv_reduce"] == ONE_LAUNCH and set(unplanned.layers) == {"first", "fc1"}


def test_norms_that_do_something_else_stay() -> None:
    twice = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.BatchNorm2d(6, affine=False), twice, twice, nn.Sigmoid()).eval()
    network = traced(model, torch.randn(2, 6, 4, 4))
    join_norms(network)
    assert not any(isinstance(module, NormedConcat) for module in network.modules())
    training = fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(6)).train())
    join_norms(training)
    assert not any(isinstance(module, NormedConcat) for module in training.modules())


class Classifier(nn.Sequential):
    """A VGG's end: pooling that changes nothing, a flattening, and layers with dropout between them."""

    def __init__(self, pool: int = 3, activation: nn.Module | None = None) -> None:
        super().__init__(
            *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(pool), nn.Flatten()),
            *(nn.Linear(8 * pool * pool, 32), activation or nn.ReLU(inplace=True), nn.Dropout()),
            *(nn.Linear(32, 10), nn.LogSoftmax(1)),
        )


def fused(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """What a model becomes by all passes of a GPU, on the CPU."""
    network = traced(model.eval(), x)
    for each in PASSES:
        network, left_alone = each(network, ON_GPU)
        assert not left_alone
    for given in (x, torch.randn(3, *x.shape[1:]), torch.randn(1, *x.shape[1:]).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(network(given), model(given))
    return network


def test_linear_layers_take_what_is_around_them() -> None:
    model = Classifier()
    network = fused(model, torch.randn(1, 6, 6, 7))
    layers = [each for each in network.modules() if isinstance(each, FusedLinear)]
    assert [(each.activation, each.flattens) for each in layers] == [("relu", True), ("none", False)]
    assert layers[0].weight.data_ptr() != 0 and set(network.state_dict()) >= {"5.weight", "5.bias", "8.weight"}
    called = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    assert called == ["0", "2", "3", "5", "8", "9"]


def test_pooling_to_the_size_that_there_is_returns_its_input() -> None:
    network = fused(Classifier(), torch.randn(1, 6, 6, 7))
    pool = network.get_submodule("3")
    x = torch.randn(1, 8, 3, 3)
    assert isinstance(pool, AdaptiveAvgPool2d) and pool.aliases and pool(x) is x
    assert torch.equal(pool(torch.ones(1, 8, 6, 6)), torch.ones(1, 8, 3, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: (F.adaptive_avg_pool2d(x, (8, 9)), x),
        lambda x, g: F.adaptive_avg_pool2d(x.relu(), (8, 9)).mul_(2),
    ],
)
def test_pooling_whose_input_others_may_see_copies_it(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    network, _ = planes.rewrite(traced(Calls(function).eval(), x := torch.randn(2, 6, 8, 9)), ON_GPU)
    assert not any(getattr(each, "aliases", False) for each in network.modules())
    before = x.clone()
    network(x)
    assert torch.equal(x, before)


class Tapped(nn.Module):
    """Its flattened maps and the first layer's result are read by others, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.plain = nn.Linear(24, 5), nn.Linear(5, 5), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.flatten(x, 1)
        hidden = self.first(flat)
        again = self.second(F.silu(self.second(hidden)))
        result: Tensor = self.plain(again) + hidden.relu().sum(1, keepdim=True) + flat.sum(1, keepdim=True)
        return result


def test_what_others_read_stays() -> None:
    network = fused(Tapped(), torch.randn(2, 6, 2, 2))
    layers = {name: each for name, each in network.named_modules() if isinstance(each, FusedLinear)}
    assert [(name, each.activation, each.flattens) for name, each in layers.items()] == [("first", "none", False)]


def test_a_layer_that_was_measured_stays_torchs() -> None:
    model, x = Classifier(), torch.randn(1, 6, 6, 7)
    reason = f"{SLOWER} 1.50 of its time"
    pinned = SimpleNamespace(skipped={"5": reason, "8": "you asked to skip it"})
    network, left_alone = planes.rewrite(traced(model.eval(), x), replace(ON_GPU, pinned=pinned))  # type: ignore[arg-type]
    assert left_alone == {"5": reason}
    assert [name for name, each in network.named_modules() if isinstance(each, FusedLinear)] == ["8"]
    torch.testing.assert_close(network(x), model(x))
