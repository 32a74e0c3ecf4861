"""Graph passes: the fused graph computes what the model computes, whatever was fused, and the model stays as it was."""

from __future__ import annotations

import copy
import io
import operator
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

from benchmarks.networks import NETWORKS
from escort.network.fuse import FusedConv2d, Untraceable, fuse, plain_copy, trace
from escort.reference import compare

#: Inputs smaller than the networks' own where the classifier allows it.
SIDES = {"alexnet": 64, "caffenet": 227, "googlenet": 64}


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode with batch norms as if trained, so that folding them must change the weights."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()


class Fused:
    """A model traced and fused, checked against the model itself."""

    def __init__(self, model: nn.Module, *example: Tensor, others: tuple[Tensor, ...] = ()) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        self.network, self.skipped = fuse(trace(model, example))
        self.convs = {n: m for n, m in self.network.named_modules() if isinstance(m, FusedConv2d)}
        with torch.no_grad():
            for inputs in (example, *((x,) for x in others)):
                expected = model(*(x.clone() for x in inputs))
                assert compare(self.network(*(x.clone() for x in inputs)), expected) < 1e-5
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    @property
    def epilogues(self) -> dict[str, tuple[bool, str]]:
        return {name: (conv.residual, conv.activation) for name, conv in self.convs.items()}

    @property
    def rest(self) -> list[str]:
        """What the graph still does outside its fused convolutions."""
        nodes = [n for n in self.network.graph.nodes if n.op.startswith("call_")]
        modules = {n: self.network.get_submodule(n.target) if n.op == "call_module" else None for n in nodes}
        return [
            str(n.target) if m is None else type(m).__name__
            for n, m in modules.items()
            if not isinstance(m, FusedConv2d)
        ]


class Net(nn.Module):
    """The modules that most patterns are made of, and the pattern: a function of the net and its input."""

    def __init__(self, pattern: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pattern = pattern
        with_statistics(self)

    def forward(self, x: Tensor) -> Any:
        return self.pattern(self, x)


IMAGES = torch.randn(2, 3, 10, 9, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(3, 3, 7, 12, generator=torch.Generator().manual_seed(2))


def fused(pattern: Callable[[Any, Any], Any]) -> Fused:
    return Fused(Net(pattern), IMAGES, others=(MORE,))


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_stay_equal(name: str) -> None:
    model = with_statistics(NETWORKS[name].factory(num_classes=10))
    side = SIDES.get(name, 32)
    result = Fused(model, torch.randn(1, 3, side, side), others=(torch.randn(2, 3, side, side),))
    assert result.convs.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert not result.skipped
    assert not set(result.rest) & {"BatchNorm2d", "ReLU6", "add", "relu"}
    linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert result.rest.count("ReLU") == linear - 1  # those of the classifier


@pytest.mark.parametrize(
    ("name", "epilogues"),
    [
        ("resnet18", {(False, "relu"): 9, (True, "relu"): 8, (False, "none"): 3}),
        ("resnet50", {(False, "relu"): 33, (True, "relu"): 16, (False, "none"): 4}),
        ("mobilenet_v2", {(False, "relu6"): 35, (True, "none"): 10, (False, "none"): 7}),
        ("vgg16_bn", {(False, "relu"): 13}),
    ],
)
def test_what_whole_networks_fuse(name: str, epilogues: dict[tuple[bool, str], int]) -> None:
    network, _ = fuse(trace(NETWORKS[name].factory(num_classes=10).eval(), torch.randn(1, 3, 32, 32)))
    convs = [m for m in network.modules() if isinstance(m, FusedConv2d)]
    assert Counter((conv.residual, conv.activation) for conv in convs) == epilogues


def test_a_projection_shortcut_is_fused_into_the_convolution_that_runs_last() -> None:
    result = fused(lambda net, x: F.relu(net.norm2(net.conv2(net.conv(x))) + net.conv2(net.conv(x))))
    # torch's own ResNet runs the shortcut first, torchvision's last; either way the other result exists by then.
    assert [e for e in result.epilogues.values() if e != (False, "none")] == [(True, "relu")]
    assert result.epilogues["conv2_1"] == (True, "relu") and not result.rest


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.Hardtanh(0, 6, inplace=True), "relu6"),
        (nn.Hardtanh(), "none"),
        (nn.LeakyReLU(), "none"),
        (nn.SiLU(), "none"),
        (F.relu, "relu"),
        (F.relu_, "relu"),
        (F.relu6, "relu6"),
        (torch.relu, "relu"),
        (lambda y: F.relu(y, inplace=True), "relu"),
        (lambda y: F.relu(input=y), "relu"),
        (lambda y: F.hardtanh(y, 0.0, 6.0), "relu6"),
        (lambda y: F.hardtanh(y, min_val=0, max_val=6), "relu6"),
        (lambda y: F.hardtanh_(y, 0.0, 6.0), "relu6"),
        (lambda y: F.hardtanh(y), "none"),
        (lambda y: F.hardtanh(y, -1.0, 6.0), "none"),
        (lambda y: y.relu(), "relu"),
        (lambda y: y.relu_(), "relu"),
        (lambda y: y.relu_().relu(), "relu"),
        (lambda y: y, "none"),
    ],
)
def test_activations(activation: Any, name: str) -> None:
    net = Net(lambda net, x: net.activation(net.norm(net.conv(x))))
    net.activation = activation
    assert Fused(net, IMAGES, others=(MORE,)).epilogues == {"conv": (False, name)}


@pytest.mark.parametrize(
    "add",
    [
        lambda y, z: y + z,
        lambda y, z: z + y,
        lambda y, z: operator.iadd(y, z),
        lambda y, z: torch.add(y, z),
        lambda y, z: torch.add(y, other=z),
        lambda y, z: torch.add(z, y, alpha=1),
        lambda y, z: y.add(z),
        lambda y, z: y.add(other=z),
        lambda y, z: z.add(y),
        lambda y, z: y.add_(z),
    ],
)
def test_residual_adds(add: Callable[[Any, Any], Any]) -> None:
    def pattern(net: Any, x: Any) -> Any:
        z = F.silu(net.conv(x))
        return net.relu(add(net.norm2(net.conv2(z)), z))

    result = fused(pattern)
    assert result.epilogues == {"conv": (False, "none"), "conv2": (True, "relu")}
    assert len(result.rest) == 1


@pytest.mark.parametrize(
    "add",
    [
        lambda y, z: y + 1.0,
        lambda y, z: 1.0 + y,
        lambda y, z: y.add_(1.0),
        lambda y, z: torch.add(y, z, alpha=2),
        lambda y, z: y.add(z, alpha=-1),
        lambda y, z: y + y,
        lambda y, z: y + z.double(),
        lambda y, z: y + z.mean((2, 3), keepdim=True),
        lambda y, z: y + z.mean((2, 3), keepdim=True)[:1],
        lambda y, z: y + z.unsqueeze(0),
        lambda y, z: z.add_(y) * z,  # the sum is seen under both names
        lambda y, z: y.add_(z) * y,
        lambda y, z: y - z,
    ],
)
def test_what_is_no_residual_add(add: Callable[[Any, Any], Any]) -> None:
    def pattern(net: Any, x: Any) -> Any:
        z = F.silu(net.conv(x))
        return F.relu(add(net.conv2(z), z)).float()

    assert fused(pattern).epilogues["conv2"] == (False, "none")


def test_a_constant_is_no_residual_though_its_shape_agrees() -> None:
    net = Net(lambda net, x: net.conv(x) + net.position * 2)
    net.position = nn.Parameter(torch.randn(1, 8, 10, 9))
    result = Fused(net, IMAGES[:1], others=(IMAGES,))
    assert result.epilogues == {"conv": (False, "none")}


def test_without_shapes_no_add_is_fused() -> None:
    net = Net(lambda net, x: F.relu(net.conv2(net.conv(x)) + net.conv(x)))
    network, _ = fuse(fx.symbolic_trace(net))
    assert not any(m.residual for m in network.modules() if isinstance(m, FusedConv2d))
    torch.testing.assert_close(network(IMAGES), net(IMAGES))


def test_only_the_first_add_and_the_first_activation_are_fused() -> None:
    def pattern(net: Any, x: Any) -> Any:
        z = F.silu(net.conv(x))
        y = net.conv2(z) + z + z.sigmoid()
        return F.relu6(F.relu(F.relu6(net.conv2(y)) + y))

    result = fused(pattern)
    assert result.epilogues["conv2"] == (True, "none") and result.epilogues["conv2_1"] == (False, "relu6")


def test_an_activation_comes_before_its_add_and_a_norm_after_it() -> None:
    def pattern(net: Any, x: Any) -> Any:
        z = F.silu(net.conv(x))
        return net.norm(F.relu(net.conv2(z)) + z), net.norm2(net.conv2(z) + z)

    net = Net(lambda net, x: operator.add(*pattern(net, x)))
    result = Fused(net, IMAGES)
    assert result.epilogues == {"conv": (False, "none"), "conv2": (False, "relu"), "conv2_1": (True, "none")}
    assert result.rest.count("BatchNorm2d") == 2


def test_the_other_convolution_takes_the_add_if_the_last_cannot() -> None:
    result = fused(lambda net, x: net.conv(x) + net.relu(net.norm2(net.conv2(net.conv(x)))))
    assert result.epilogues["conv2"] == (False, "relu")
    assert [name for name, conv in result.convs.items() if conv.residual] == ["conv"]


@pytest.mark.parametrize(
    "pattern",
    [
        lambda net, x: (lambda y: F.relu(y) * y)(net.conv(x)),
        lambda net, x: (lambda y: net.norm(y) * y)(net.conv(x)),
        lambda net, x: (lambda y: torch.cat([y + torch.sigmoid(x[:, :1] * y), y]))(net.conv(x)),
        lambda net, x: (lambda y: torch.cat([net.relu(y), y]))(net.conv(x)),
    ],
)
def test_a_result_that_is_used_twice_is_kept(pattern: Callable[[Any, Any], Any]) -> None:
    assert fused(pattern).epilogues == {"conv": (False, "none")}


def test_a_result_that_is_returned_is_kept() -> None:
    net = Net(lambda net, x: (lambda y: (y, F.relu(y)))(net.norm(net.conv(x))))
    network, _ = fuse(trace(net, IMAGES))
    for out, expected in zip(network(IMAGES), net(IMAGES), strict=True):
        torch.testing.assert_close(out, expected)
    assert network.get_submodule("conv").activation == "none"


def test_writes_in_place_are_neither_dropped_nor_reordered() -> None:
    def statement(net: Any, x: Any) -> Any:
        y = net.conv(x)
        net.relu(y)
        return y

    def between(net: Any, x: Any) -> Any:
        z = F.silu(net.conv(x))
        y = net.conv2(z)  # must read z before it is written to
        z.mul_(2.0)
        return y + z

    def before(net: Any, x: Any) -> Any:
        z = F.silu(net.conv(x))
        return net.conv2(net.relu(z)).add_(z)

    assert fused(statement).rest == ["ReLU"]
    assert fused(between).epilogues["conv2"] == (False, "none")
    assert fused(before).epilogues["conv2"] == (True, "none")


def test_a_convolution_whose_result_nobody_uses_is_gone() -> None:
    def pattern(net: Any, x: Any) -> Any:
        net.conv2(net.conv(x))
        return net.relu(net.conv(x))

    assert fused(pattern).epilogues == {"conv": (False, "relu")}


def test_the_callers_input_is_not_written_to_by_tracing() -> None:
    x = IMAGES.clone()
    trace(Net(lambda net, x: net.conv(net.relu(x))), x)
    assert torch.equal(x, IMAGES)


def test_an_assignment_that_fx_would_get_wrong_is_refused() -> None:
    def pattern(net: Any, x: Any) -> Any:
        y = z = net.conv(x)
        y += 1.0
        return z

    with pytest.raises(Untraceable, match="computes something else"):
        trace(Net(pattern), IMAGES)


def test_norms() -> None:
    for norm, folds in (
        (nn.BatchNorm2d(8, eps=0.1), True),
        (nn.BatchNorm2d(8, affine=False), True),
        (nn.SyncBatchNorm(8), True),
        (nn.BatchNorm2d(8, track_running_stats=False), False),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), False),
        (nn.GroupNorm(2, 8), False),
    ):
        net = Net(lambda net, x: net.relu(net.tested(net.conv(x))))
        net.tested = norm
        result = Fused(with_statistics(net), IMAGES)
        assert result.epilogues == {"conv": (False, "relu" if folds else "none")}
        assert result.rest == ([] if folds else [type(norm).__name__, "ReLU"])


@pytest.mark.parametrize(
    ("norm", "folds"),
    [
        (lambda n, y: F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=0.01), True),
        (lambda n, y: F.batch_norm(y, n.running_mean, n.running_var), True),
        (lambda n, y: F.batch_norm(y, None, None, n.weight, n.bias, training=True), False),
        (lambda n, y: F.batch_norm(y, n.running_mean, n.running_var, n.weight * y.mean(), n.bias), False),
        (
            lambda n, y: torch.batch_norm(
                y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-3, torch.backends.cudnn.enabled
            ),
            True,
        ),
    ],
)
def test_functional_norms(norm: Callable[[Any, Any], Any], folds: bool) -> None:
    result = fused(lambda net, x: F.relu(norm(net.norm, net.conv(x))))
    assert result.epilogues == {"conv": (False, "relu" if folds else "none")}
    assert bool(result.rest) != folds


def test_a_norm_in_training_mode_is_not_folded() -> None:
    graph_module = trace(Net(lambda net, x: net.norm(net.conv(x))), IMAGES)
    graph_module.norm.train()
    network, _ = fuse(graph_module)
    assert isinstance(network.norm, nn.BatchNorm2d)


def test_what_does_nothing_in_eval_mode_does_not_stand_between() -> None:
    net = Net(lambda net, x: (lambda z: net.relu(z + net.drop(net.norm2(net.idle(net.conv2(z))))))(F.silu(net.conv(x))))
    net.idle, net.drop = nn.Identity(), nn.Dropout2d()
    assert Fused(net.eval(), IMAGES).epilogues["conv2"] == (True, "relu")


def test_a_shared_convolution_becomes_one_module_per_call() -> None:
    net = Net(lambda net, x: net.norm(net.conv(x)) * net.relu(net.conv(-x)))
    result = Fused(net, IMAGES)
    assert result.epilogues == {"conv": (False, "none"), "conv_1": (False, "relu")}
    assert not torch.equal(result.convs["conv"].conv.weight, result.convs["conv_1"].conv.weight)
    assert torch.equal(result.convs["conv_1"].conv.weight, net.conv.weight)


def test_the_model_and_the_traced_graph_are_left_as_they_are() -> None:
    net = Net(lambda net, x: net.relu(net.norm2(net.conv2(net.conv(x)))))
    traced = trace(net, IMAGES)
    network, _ = fuse(traced)
    for model, other in ((net, traced), (traced, network)):
        before, code = copy.deepcopy(model.state_dict()), traced.code
        for parameter in other.parameters():
            parameter.data.add_(1.0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert traced.code == code and isinstance(traced.conv, nn.Conv2d)
    assert net.conv.weight.requires_grad


def test_the_result_holds_nothing_that_it_does_not_use() -> None:
    network = Fused(Net(lambda net, x: net.relu(net.norm(net.conv(x)))), IMAGES).network
    assert set(network.state_dict()) == {"conv.conv.weight", "conv.conv.bias"}
    assert not network.training


def test_a_model_in_training_mode_is_traced_as_if_in_eval_mode() -> None:
    net = Net(lambda net, x: net.norm(net.conv(x))).train()
    network, _ = fuse(trace(net, IMAGES))
    assert net.training and net.norm.training
    torch.testing.assert_close(network(IMAGES), net.eval()(IMAGES))


# Weights that are computed


def masked(net: Net) -> None:
    prune.l1_unstructured(net.conv, "weight", amount=0.5)
    prune.random_unstructured(net.conv, "bias", amount=2)


def masked_twice(net: Net) -> None:
    prune.l1_unstructured(net.conv, "weight", amount=0.5)
    prune.ln_structured(net.conv, "weight", amount=3, n=2, dim=0)


def masked_then_trained(net: Net) -> None:
    prune.l1_unstructured(net.conv, "weight", amount=0.5)
    net.conv.weight_orig.data.mul_(2.0)  # conv.weight is stale until the next forward


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    "change",
    [
        masked,
        masked_twice,
        masked_then_trained,
        lambda net: parametrize.register_parametrization(net.conv, "weight", Halved()),
        lambda net: parametrizations.weight_norm(net.conv),
        lambda net: parametrizations.spectral_norm(net.conv).eval(),
    ],
)
@pytest.mark.parametrize("exported", [False, True])
def test_the_weight_in_effect_is_taken(change: Callable[[Net], Any], exported: bool) -> None:
    net = Net(lambda net, x: net.relu(net.conv(x)))
    change(net)
    expected = net(IMAGES)
    model = torch.export.export(net, (IMAGES,)).module() if exported else net
    network, skipped = fuse(trace(model, IMAGES))
    torch.testing.assert_close(network(IMAGES), expected)
    assert not skipped and isinstance(network.conv, FusedConv2d) and network.conv.activation == "relu"
    effective = F.conv2d(IMAGES, network.conv.conv.weight, network.conv.conv.bias, padding=1).relu()
    torch.testing.assert_close(effective, expected)
    assert set(network.state_dict()) == {"conv.conv.weight", "conv.conv.bias"}


def test_a_pruned_model_can_be_copied_and_stays_pruned() -> None:
    net = Net(lambda net, x: net.conv(x))
    masked(net)
    copied = plain_copy(net)
    assert hasattr(net.conv, "weight_mask") and not hasattr(copied.conv, "weight_mask")
    assert isinstance(copied.conv.weight, nn.Parameter) and torch.equal(copied.conv.weight, net.conv.weight)


class Standardized(nn.Conv2d):
    """A subclass with a forward of its own, which computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(4, 2, 3, 2))
        self.inner.bias = nn.Parameter(torch.randn(4))
        self.standardized = Standardized(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(x, self.kernel, stride=2, padding="valid").relu()
        x = F.conv2d(x, weight=self.inner.weight, bias=self.inner.bias, padding=(2, 1), dilation=(2, 1), groups=2)
        return F.relu6(self.standardized(x))


def test_functional_convolutions() -> None:
    result = Fused(Functional(), torch.randn(2, 3, 19, 17), others=(torch.randn(1, 3, 20, 21),))
    assert result.epilogues == {"kernel": (False, "relu"), "inner": (False, "none"), "standardized": (False, "relu6")}
    assert not result.rest and len(result.network.state_dict()) == 5


def test_a_weight_with_other_uses_stays_where_it_is() -> None:
    net = Net(lambda net, x: net.conv(x) * net.conv.weight.sum() + F.conv2d(x, net.conv.weight, padding=1))
    result = Fused(net, IMAGES)
    assert set(result.convs) == {"conv_1", "conv_2"}
    assert set(result.network.state_dict()) >= {"conv.weight"}


def test_a_convolution_as_the_whole_model() -> None:
    assert Fused(nn.Conv2d(3, 4, 3), IMAGES).epilogues == {"conv": (False, "none")}
    assert Fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGES).epilogues == {"0": (False, "relu")}


# Exported programs


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 4, (3, 1), stride=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y += x
        return F.hardtanh(self.head(torch.relu_(y)), 0.0, 6.0)


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs(decomposed: bool) -> None:
    model = with_statistics(Exported())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},))
    if decomposed:
        program = program.run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    result = Fused(torch.export.load(file).module(), IMAGES, others=(IMAGES[:1],))
    assert result.epilogues == {"stem.0": (False, "relu6"), "body.0": (True, "relu"), "head": (False, "relu6")}
    assert len(result.rest) <= 1  # torch.export's own check of the input's shape


def test_an_exported_resnet() -> None:
    model = with_statistics(NETWORKS["resnet18"].factory(num_classes=10))
    x = torch.randn(1, 3, 32, 32)
    result = Fused(torch.export.export(model, (x,)).module(), x)
    assert result.convs.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert Counter(result.epilogues.values()) == {(False, "relu"): 9, (True, "relu"): 8, (False, "none"): 3}


def test_a_graph_module_keeps_its_graph() -> None:
    graph_module = fx.symbolic_trace(Net(lambda net, x: net.relu(net.norm(net.conv(x)))))
    assert Fused(graph_module, IMAGES).epilogues == {"conv": (False, "relu")}
    assert isinstance(graph_module.conv, nn.Conv2d)


# What is left alone


def hooked() -> nn.Conv2d:
    conv = nn.Conv2d(3, 8, 3)
    conv.register_forward_hook(lambda module, args, out: out * 2)
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect' is not zeros"),
        (nn.ConvTranspose2d(3, 8, 3), "ConvTranspose2d is not a 2-d convolution"),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3)), "Conv1d is not a 2-d convolution"),
        (nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 8, (1, 3, 3))), "Conv3d is not a 2-d convolution"),
        (hooked(), "it has forward hooks"),
        (lambda x: F.conv_transpose2d(x, torch.ones(3, 8, 3, 3)), "transposed or not 2-d"),
        (lambda x: F.conv1d(x.flatten(2), torch.ones(8, 3, 3)), "transposed or not 2-d"),
        (lambda x: F.conv2d(x, x.mean((2, 3), keepdim=True).mul(1.0)[:, :3]), "depends on the input"),
        (lambda x: F.conv2d(x[0], torch.ones(8, 3, 3, 3)), r"shape \(3, 10, 9\); add a batch dimension"),
    ],
)
def test_what_is_left_alone_says_why(conv: Any, reason: str) -> None:
    net = Net(lambda net, x: F.relu(net.tested(x)))
    net.tested = conv
    result = Fused(net, IMAGES)
    assert not result.convs and len(result.skipped) == 1
    (text,) = result.skipped.values()
    assert re.search(reason, text)


def test_hooks_on_what_follows_a_convolution_still_run() -> None:
    net = Net(lambda net, x: net.relu(net.norm(net.conv(x))))
    net.norm.register_forward_hook(lambda module, args, out: out + 1)
    assert Fused(net, IMAGES).rest == ["BatchNorm2d", "ReLU"]


# Tracing


class WithOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.conv(x)
        return y * scale if mask is None else y * mask


def test_optional_arguments_are_fixed_at_what_the_example_says() -> None:
    assert set(Fused(WithOptions(), IMAGES).convs) == {"conv"}
    assert set(Fused(WithOptions(), IMAGES, torch.randn(8, 7)).convs) == {"conv"}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (lambda net, x: net.conv(x) if x.sum() > 0 else x, r"control flow \(at .*test_fuse.py:\d+: .*x.sum\(\) > 0"),
        (lambda net, x: net.conv(torch.zeros(len(x), 3, 8, 8)), "len"),
        (lambda net, x: net.conv2(x), "to have 8 channels"),
        (lambda net, x: net.missing(x), "missing"),
    ],
)
def test_untraceable_models_say_why(pattern: Callable[[Any, Any], Any], reason: str) -> None:
    with pytest.raises(Untraceable, match=f"Net: .*{reason}"):
        trace(Net(pattern), IMAGES)


# Any network

channels = st.integers(1, 4).map(lambda n: 2 * n)


@st.composite
def blocks(draw: st.DrawFn) -> nn.Module:
    """A chain of convolutions of any geometry, with any of the known and unknown things behind each."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            kernel = draw(st.sampled_from([1, 3, (1, 3), 5]))
            groups = draw(st.sampled_from([1, 2, width]))
            bias = draw(st.booleans())
            self.conv = nn.Conv2d(width, width, kernel, padding="same", groups=groups, bias=bias)
            self.norm = draw(st.sampled_from([nn.Identity, lambda: nn.BatchNorm2d(width)]))()
            self.act = draw(st.sampled_from([nn.Identity, lambda: nn.ReLU(True), nn.ReLU6, nn.Tanh]))()
            self.residual = draw(st.sampled_from(["none", "before", "after", "pre", "inplace", "branch"]))

        def forward(self, x: Tensor) -> Tensor:
            if self.residual == "pre":
                return self.conv(self.act(self.norm(x))) + x
            y = self.norm(self.conv(x))
            if self.residual == "branch":
                return self.act(y) + self.norm(self.conv(torch.tanh(x)))
            if self.residual == "inplace":
                y = y.add_(x)
            elif self.residual == "before":
                y = x + y
            return self.act(y) + x if self.residual == "after" else self.act(y)

    width = draw(channels)
    first = nn.Conv2d(3, width, draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2)))
    return nn.Sequential(first, *(Block(width) for _ in range(draw(st.integers(1, 4)))))


@given(blocks())
@settings(deadline=None, max_examples=25)
def test_any_network_stays_equal(model: nn.Module) -> None:
    result = Fused(with_statistics(model), IMAGES, others=(MORE,))
    assert not result.skipped
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} <= set(result.convs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_fold_into_half_precision_with_one_rounding(dtype: torch.dtype) -> None:
    model = Net(lambda net, x: net.relu(net.norm2(net.conv2(net.relu(net.norm(net.conv(x))))))).to(dtype)
    exact = copy.deepcopy(model).double()
    network, _ = fuse(trace(model, IMAGES.to(dtype)))
    folded, _ = fuse(trace(exact, IMAGES.double()))
    for name in ("conv", "conv2"):
        for part in ("weight", "bias"):
            ours, theirs = (net.get_submodule(name).conv.get_parameter(part) for net in (network, folded))
            assert ours.dtype is dtype and torch.equal(ours, theirs.to(dtype))
    with torch.no_grad():
        x = MORE.to(dtype)
        assert compare(network(x), exact(x.double())) < {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


def test_a_norm_that_float16_cannot_hold_is_not_folded() -> None:
    model = Net(lambda net, x: net.norm2(net.conv2(net.norm(net.conv(x)))))
    with torch.no_grad():
        model.conv.weight.fill_(3.0)
        model.norm.weight.fill_(100.0)
        model.norm.running_var.zero_()  # epsilon makes it a scale of 316 more, and the weights 95000
    model.half()
    x = 1e-3 * IMAGES.half()
    network, _ = fuse(trace(model, x))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 1
    with torch.no_grad():
        assert model(x).isfinite().all() and compare(network(x), model(x)) < 2e-3


def test_running_out_of_memory_is_no_reason_to_give_up_the_graph() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20 GiB"):
        trace(Large(), IMAGES)
