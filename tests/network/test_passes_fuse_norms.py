"""Fusing batch norms: what folds into the convolution before it, rounded once, and what does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from escort.network.passes import fuse
from escort.reference import compare
from tests.network.patterns import MORE, ON_CPU, SAMPLES, Fused, Net, fused, traced, with_statistics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_fold_into_half_precision_with_one_rounding(dtype: torch.dtype) -> None:
    model = Net(lambda net, x: net.relu(net.norm2(net.conv2(net.relu(net.norm(net.conv(x))))))).to(dtype)
    exact = copy.deepcopy(model).double()
    network, _ = fuse.rewrite(traced(model, SAMPLES.to(dtype)), ON_CPU)
    folded, _ = fuse.rewrite(traced(exact, SAMPLES.double()), ON_CPU)
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
    x = 1e-3 * SAMPLES.half()
    network, _ = fuse.rewrite(traced(model, x), ON_CPU)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 1
    with torch.no_grad():
        assert model(x).isfinite().all() and compare(network(x), model(x)) < 2e-3


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
        result = Fused(with_statistics(net), SAMPLES)
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
    graph_module = traced(Net(lambda net, x: net.norm(net.conv(x))), SAMPLES)
    graph_module.norm.train()
    network, _ = fuse.rewrite(graph_module, ON_CPU)
    assert isinstance(network.norm, nn.BatchNorm2d)
