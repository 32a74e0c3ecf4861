"""Fusing: the fused graph computes what the model computes, whatever was fused, and the model stays as it was."""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from benchmarks.networks import NETWORKS
from escort.layers import FusedConv2d
from escort.network.passes import fuse
from tests.network.patterns import MORE, ON_CPU, SAMPLES, Fused, Net, fused, traced, with_statistics

#: Inputs smaller than the networks' own where the classifier allows it.
SIDES = {"alexnet": 64, "caffenet": 227, "googlenet": 64}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_stay_equal(name: str) -> None:
    model = with_statistics(NETWORKS[name].factory(num_classes=10))
    side = SIDES.get(name, 32)
    result = Fused(model, torch.randn(1, 3, side, side), others=(torch.randn(2, 3, side, side),))
    assert result.convs.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert not result.skipped
    if name == "densenet121":  # half of its norms and activations stand before a convolution
        assert result.rest.count("BatchNorm2d") == 62 and result.rest.count("ReLU") == 61
        return
    assert not set(result.rest) & {"BatchNorm2d", "ReLU6", "add", "relu"}
    linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert result.rest.count("ReLU") == max(linear - 1, 0)  # those of the classifier


@pytest.mark.parametrize(
    ("name", "epilogues"),
    [
        ("resnet18", {(False, "relu"): 9, (True, "relu"): 8, (False, "none"): 3}),
        ("resnet50", {(False, "relu"): 33, (True, "relu"): 16, (False, "none"): 4}),
        ("efficientnet_b0", {(False, "silu"): 49, (False, "sigmoid"): 16, (False, "none"): 7, (True, "none"): 9}),
        ("mobilenet_v2", {(False, "relu6"): 35, (True, "none"): 10, (False, "none"): 7}),
        ("unet", {(False, "relu"): 18, (False, "none"): 1}),
        ("vgg16_bn", {(False, "relu"): 13}),
        ("yolo", {(False, "silu"): 57, (False, "none"): 6}),
    ],
)
def test_what_whole_networks_fuse(name: str, epilogues: dict[tuple[bool, str], int]) -> None:
    network, _ = fuse.rewrite(traced(NETWORKS[name].factory(num_classes=10).eval(), torch.randn(1, 3, 32, 32)), ON_CPU)
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
        (nn.ELU(), "none"),
        *(
            (getattr(nn, name)(), name.lower())
            for name in ("SiLU", "Sigmoid", "Tanh", "GELU", "Hardsigmoid", "Hardswish")
        ),
        *((getattr(nn, name)(inplace=True), name.lower()) for name in ("SiLU", "Hardsigmoid", "Hardswish")),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.2, inplace=True), "leaky_relu"),
        (nn.PReLU(), "prelu"),
        (nn.PReLU(8), "prelu"),
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
        (lambda y: y.clamp(0, 6), "relu6"),
        (lambda y: torch.clamp(y, min=0.0), "relu"),
        (lambda y: y.clamp_min(0.0), "relu"),
        (lambda y: y.clamp(max=6.0), "none"),
        (lambda y: F.silu(y, inplace=True), "silu"),
        (lambda y: y.sigmoid(), "sigmoid"),
        (lambda y: torch.sigmoid(y), "sigmoid"),
        (lambda y: y.sigmoid_(), "sigmoid"),
        (lambda y: F.tanh(y), "tanh"),
        (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
        (lambda y: F.leaky_relu(y, 0.3), "leaky_relu"),
        (lambda y: F.prelu(y, torch.full((8,), 0.1)), "prelu"),
        (lambda y: F.prelu(y, y.mean((0, 2, 3))), "none"),
        (lambda y: y, "none"),
    ],
)
def test_activations(activation: Any, name: str) -> None:
    net = Net(lambda net, x: net.activation(net.norm(net.conv(x))))
    net.activation = activation
    assert Fused(net, SAMPLES, others=(MORE,)).epilogues == {"conv": (False, name)}


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
        z = F.elu(net.conv(x))
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
        z = F.elu(net.conv(x))
        return F.relu(add(net.conv2(z), z)).float()

    assert fused(pattern).epilogues["conv2"] == (False, "none")


def test_a_constant_is_no_residual_though_its_shape_agrees() -> None:
    net = Net(lambda net, x: net.conv(x) + net.position * 2)
    net.position = nn.Parameter(torch.randn(1, 8, 10, 9))
    result = Fused(net, SAMPLES[:1], others=(SAMPLES,))
    assert result.epilogues == {"conv": (False, "none")}


def test_without_shapes_no_add_is_fused() -> None:
    net = Net(lambda net, x: F.relu(net.conv2(net.conv(x)) + net.conv(x)))
    network, _ = fuse.rewrite(fx.symbolic_trace(net), ON_CPU)
    assert not any(m.residual for m in network.modules() if isinstance(m, FusedConv2d))
    torch.testing.assert_close(network(SAMPLES), net(SAMPLES))


def test_only_the_first_add_and_the_first_activation_are_fused() -> None:
    def pattern(net: Any, x: Any) -> Any:
        z = F.elu(net.conv(x))
        y = net.conv2(z) + z + z.sigmoid()
        return F.relu6(F.relu(F.relu6(net.conv2(y)) + y))

    result = fused(pattern)
    assert result.epilogues["conv2"] == (True, "none") and result.epilogues["conv2_1"] == (False, "relu6")


def test_an_activation_comes_before_its_add_and_a_norm_after_it() -> None:
    def pattern(net: Any, x: Any) -> Any:
        z = F.elu(net.conv(x))
        return net.norm(F.relu(net.conv2(z)) + z), net.norm2(net.conv2(z) + z)

    net = Net(lambda net, x: operator.add(*pattern(net, x)))
    result = Fused(net, SAMPLES)
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
    network, _ = fuse.rewrite(traced(net, SAMPLES), ON_CPU)
    for out, expected in zip(network(SAMPLES), net(SAMPLES), strict=True):
        torch.testing.assert_close(out, expected)
    assert network.get_submodule("conv").activation == "none"


def test_writes_in_place_are_neither_dropped_nor_reordered() -> None:
    def statement(net: Any, x: Any) -> Any:
        y = net.conv(x)
        net.relu(y)
        return y

    def between(net: Any, x: Any) -> Any:
        z = F.elu(net.conv(x))
        y = net.conv2(z)  # must read z before it is written to
        z.mul_(2.0)
        return y + z

    def before(net: Any, x: Any) -> Any:
        z = F.elu(net.conv(x))
        return net.conv2(net.relu(z)).add_(z)

    assert fused(statement).rest == ["ReLU"]
    assert fused(between).epilogues["conv2"] == (False, "none")
    assert fused(before).epilogues["conv2"] == (True, "none")


def test_a_convolution_whose_result_nobody_uses_is_gone() -> None:
    def pattern(net: Any, x: Any) -> Any:
        net.conv2(net.conv(x))
        return net.relu(net.conv(x))

    assert fused(pattern).epilogues == {"conv": (False, "relu")}


def test_what_does_nothing_in_eval_mode_does_not_stand_between() -> None:
    net = Net(lambda net, x: (lambda z: net.relu(z + net.drop(net.norm2(net.idle(net.conv2(z))))))(F.elu(net.conv(x))))
    net.idle, net.drop = nn.Identity(), nn.Dropout2d()
    assert Fused(net.eval(), SAMPLES).epilogues["conv2"] == (True, "relu")


def test_a_shared_convolution_becomes_one_module_per_call() -> None:
    net = Net(lambda net, x: net.norm(net.conv(x)) * net.relu(net.conv(-x)))
    result = Fused(net, SAMPLES)
    assert result.epilogues == {"conv": (False, "none"), "conv_1": (False, "relu")}
    assert not torch.equal(result.convs["conv"].conv.weight, result.convs["conv_1"].conv.weight)
    assert torch.equal(result.convs["conv_1"].conv.weight, net.conv.weight)


def test_the_model_and_the_traced_graph_are_left_as_they_are() -> None:
    net = Net(lambda net, x: net.relu(net.norm2(net.conv2(net.conv(x)))))
    graph = traced(net, SAMPLES)
    network, _ = fuse.rewrite(graph, ON_CPU)
    for model, other in ((net, graph), (graph, network)):
        before, code = copy.deepcopy(model.state_dict()), graph.code
        for parameter in other.parameters():
            parameter.data.add_(1.0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert graph.code == code and isinstance(graph.conv, nn.Conv2d)
    assert net.conv.weight.requires_grad


def test_the_result_holds_nothing_that_it_does_not_use() -> None:
    network = Fused(Net(lambda net, x: net.relu(net.norm(net.conv(x)))), SAMPLES).network
    assert set(network.state_dict()) == {"conv.conv.weight", "conv.conv.bias"}
    assert not network.training


def test_a_model_in_training_mode_is_traced_as_if_in_eval_mode() -> None:
    net = Net(lambda net, x: net.norm(net.conv(x))).train()
    network, _ = fuse.rewrite(traced(net, SAMPLES), ON_CPU)
    assert net.training and net.norm.training
    torch.testing.assert_close(network(SAMPLES), net.eval()(SAMPLES))


def test_a_convolution_as_the_whole_model() -> None:
    assert Fused(nn.Conv2d(3, 4, 3), SAMPLES).epilogues == {"conv": (False, "none")}
    assert Fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), SAMPLES).epilogues == {"0": (False, "relu")}


def test_a_convolution_with_a_hook_is_replaced_by_itself() -> None:
    net = Net(lambda net, x: net.relu(net.norm(net.conv(x))))
    net.conv.register_forward_hook(lambda module, args, out: out * 2)
    assert Fused(net, SAMPLES).rest == ["BatchNorm2d", "ReLU"]


# What is left alone
@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect' is not zeros"),
        (nn.ConvTranspose2d(3, 8, 3), "a transposed 2-d convolution is not a 2-d one"),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3)), "a 1-d convolution is not a 2-d one"),
        (nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 8, (1, 3, 3))), "a 3-d convolution is out of scope"),
        (lambda x: F.conv_transpose2d(x, torch.ones(3, 8, 3, 3)), "a transposed 2-d convolution is not"),
        (lambda x: F.conv1d(x.flatten(2), torch.ones(8, 3, 3)), "a 1-d convolution is not"),
        (lambda x: F.conv3d(x.unsqueeze(2), torch.ones(8, 3, 1, 3, 3)).squeeze(2), "a 3-d convolution is out of scope"),
        (lambda x: F.conv2d(x, x.mean((2, 3), keepdim=True).mul(1.0)[:, :3]), "depends on the input"),
        (lambda x: F.conv2d(x[0], torch.ones(8, 3, 3, 3)), r"shape \(3, 10, 9\); add a batch dimension"),
    ],
)
def test_what_is_left_alone_says_why(conv: Any, reason: str) -> None:
    net = Net(lambda net, x: F.relu(net.tested(x)))
    net.tested = conv
    result = Fused(net, SAMPLES)
    assert not result.convs and len(result.skipped) == 1
    (text,) = result.skipped.values()
    assert re.search(reason, text)


def test_hooks_on_what_follows_a_convolution_still_run() -> None:
    net = Net(lambda net, x: net.relu(net.norm(net.conv(x))))
    net.norm.register_forward_hook(lambda module, args, out: out + 1)
    assert Fused(net, SAMPLES).rest == ["BatchNorm2d", "ReLU"]
