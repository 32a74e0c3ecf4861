"""Networks with every activation: fused, saved, loaded, and refused where a file asks for what there is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import escort
from benchmarks.zoo import sparse_forced
from escort.artifact import ArtifactError, load, save
from escort.layers import SparseConv2d
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.convert import convert
from escort.network.model import ConvertedModel
from escort.problem import Activation
from escort.reference import compare
from tests.artifact.forgery import Forgery, removing, setting
from tests.artifact.networks import X, assert_same, sparse

MODULES = (
    *(
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(0.2),
        nn.PReLU(6),
        nn.PReLU(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.SiLU(inplace=True),
    ),
    *(nn.GELU(), nn.GELU("tanh"), nn.Hardsigmoid(), nn.Hardswish(inplace=True), nn.LeakyReLU(-0.2)),
)


class Branch(nn.Module):
    """A convolution, an activation, and a convolution whose sum with a shortcut is activated as well."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.again = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.conv(x)))
        return self.activation(self.again(x) + x)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(module) for module in MODULES)
        self.last = nn.Conv2d(6 * len(MODULES), 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([branch(x) for branch in self.branches], 1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return sparse(Branches(), density=0.4)


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> ConvertedModel:
    with sparse_forced():
        return convert(model, X, methods=["direct"])


@pytest.fixture(scope="module")
def file(fast: ConvertedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("activations") / "model"
    save(fast, path)
    return path


def test_every_activation_is_fused_with_and_without_a_residual(model: nn.Module, fast: ConvertedModel) -> None:
    layers = [module for module in fast.modules() if isinstance(module, SparseConv2d)]
    assert {layer.activation for layer in layers if not layer.residual} == set(get_args(Activation))
    assert {layer.activation for layer in layers if layer.residual} == set(get_args(Activation)) - {"none"}
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-5, atol=1e-5)


def test_it_comes_back_bit_by_bit(fast: ConvertedModel, file: Path, tmp_path: Path) -> None:
    back = load(file)
    assert_same(back, fast)
    assert back.plan == fast.plan
    save(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_replanning_keeps_the_slopes(model: nn.Module, fast: ConvertedModel) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(escort.replan(fast)(X), model(X), rtol=1e-5, atol=1e-5)


LEAKY, PRELU = "branches.2.conv", "branches.3.conv"


def asking_of(layer: str, key: str, to: Any) -> Callable[[Forgery], Any]:
    return lambda forgery: forgery.problem(layer)["epilogue"].update({key: to})


@pytest.mark.parametrize(
    ("forge", "complaint"),
    [
        (asking_of(LEAKY, "negative_slope", "1"), "negative_slope is a finite float32, got '1'"),
        (asking_of(LEAKY, "negative_slope", 2**62 * 10**30), "a finite float32|64 bits"),
        (asking_of(LEAKY, "negative_slope", 1e39), "negative_slope is a finite float32"),
        (asking_of(LEAKY, "negative_slope", True), "negative_slope is a finite float32"),
        (asking_of(PRELU, "negative_slope", 0.5), "a negative_slope goes with leaky_relu"),
        (asking_of(LEAKY, "activation", "prelu"), "a negative_slope goes with leaky_relu"),
        (asking_of(PRELU, "activation", "silu"), f"nothing in the network uses its tensor {PRELU}.slope"),
        (asking_of(PRELU, "activation", "swish"), "activation is one of"),
        (removing(f"{PRELU}.slope"), f"layer {PRELU}: tensor {PRELU}.slope is missing"),
        (setting("tensors", f"{PRELU}.slope", to=torch.ones(1)), r"slopes of shape \(6,\), got \(1,\)"),
        (setting("tensors", f"{PRELU}.slope", to=torch.ones(6).int()), "its slopes are torch.int32, not float32"),
        (setting("tensors", f"{PRELU}.slope", to=torch.full((6,), torch.nan)), "slope .*NaN or infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_writer_writes_is_refused(
    file: Path, tmp_path: Path, forge: Callable[[Forgery], Any], complaint: str
) -> None:
    forgery = Forgery(file.read_bytes())
    forge(forgery)
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match=complaint):
        load(tmp_path / "forged")


@pytest.mark.gpu
def test_a_gpu_runs_what_was_fused_on_a_cpu(model: nn.Module, file: Path) -> None:
    there, x = load(file, device="cuda"), X.cuda()
    layers = [module for module in there.modules() if isinstance(module, SparseConv2d)]
    assert {layer.activation for layer in layers} == set(get_args(Activation))
    with torch.inference_mode():
        for _ in range(3):  # the second one replays a CUDA graph
            assert compare(there(x).cpu(), model(X)) < NETWORK_ERROR_BOUND[there.plan.precision]


@pytest.mark.gpu
def test_on_a_gpu_every_activation_is_fused(model: nn.Module) -> None:
    there = convert(copy.deepcopy(model).cuda(), X.cuda())
    assert {plan.problem.epilogue.activation for plan in there.plan.layers.values()} == set(get_args(Activation))
    with torch.inference_mode():
        assert compare(there(X.cuda()).cpu(), model(X)) < NETWORK_ERROR_BOUND[there.plan.precision]
