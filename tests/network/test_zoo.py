"""Structures of other networks, converted with sparse methods forced: right at any size, and out of a file."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import escort
from benchmarks.zoo import sparse_forced
from escort.layers import SparseConv2d
from escort.network.model import ConvertedModel
from escort.network.values import output_error, tensors_of
from escort.runtime import Program
from tests.network import zoo

ROOT = Path(__file__).parents[2]
EXAMPLE, OTHERS = (1, 3, 32, 32), ((2, 3, 32, 32), (1, 3, 48, 64))


@dataclass(frozen=True)
class Structure:
    """How many of a structure's convolutions are swapped, and of these how many are fused with what follows."""

    factory: Callable[[], nn.Module]
    convolutions: int
    swapped: int
    fused: int
    left: frozenset[str] = frozenset()


STRUCTURES = {
    "mobile": Structure(zoo.Mobile, 17, 17, 17),
    "detector": Structure(zoo.Detector, 18, 18, 14),
    "unet": Structure(zoo.UNet, 11, 11, 10),
    "deeplab": Structure(zoo.DeepLab, 11, 11, 9),
    "convnext": Structure(zoo.ConvNeXt, 4, 4, 0),
    "ported": Structure(zoo.Ported, 4, 4, 4),
}


def pruned(name: str) -> nn.Module:
    model = zoo.made(STRUCTURES[name].factory)
    escort.prune.uniform(model, 0.8)
    escort.prune.make_permanent(model)
    return model


@cache
def converted(name: str) -> tuple[nn.Module, ConvertedModel]:
    model = pruned(name)
    with sparse_forced():
        return model, escort.convert(model, torch.randn(EXAMPLE), methods=["direct"])


def sample(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", STRUCTURES)
def test_its_convolutions_are_swapped_and_fused(name: str) -> None:
    structure, (model, fast) = STRUCTURES[name], converted(name)
    assert isinstance(fast.network, Program) and not fast.plan.kept_dense
    assert {plan.method for plan in fast.plan.layers.values()} == {"direct"}
    sparse = [module for module in fast.modules() if isinstance(module, SparseConv2d)]
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == structure.convolutions
    assert (len(sparse), set(fast.plan.skipped)) == (structure.swapped, structure.left)
    fused = [each for each in sparse if each.unfolded is not None or each.activation != "none" or each.residual]
    assert len(fused) == structure.fused


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_it_is_right_at_other_sizes(name: str, shape: tuple[int, ...]) -> None:
    model, fast = converted(name)
    x = sample(shape)
    with torch.no_grad():
        out, exact = fast(x), copy.deepcopy(model).double()(x.double())
    assert type(out) is type(exact)
    outputs, expected = tensors_of(out), tensors_of(exact)
    assert len(outputs) == len(expected)
    assert all(output_error(a, b) < 1e-6 for a, b in zip(outputs, expected, strict=True))


def test_its_checks_still_raise() -> None:
    with pytest.raises(Exception, match=r"the check at zoo.py:\d+ failed"):
        converted("unet")[1](torch.randn(1, 3, 30, 32))


@pytest.mark.parametrize("name", STRUCTURES)
def test_another_process_computes_the_same(name: str, tmp_path: Path) -> None:
    fast = converted(name)[1]
    escort.save(fast, tmp_path / "model.escort")
    with torch.no_grad():
        torch.save(tensors_of(fast(sample(OTHERS[0]))), tmp_path / "expected.pt")
    command = [sys.executable, "-m", "tests.network.test_zoo", name, str(tmp_path), str(fast.traced)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load(name: str, folder: Path, traced: bool) -> None:
    """What the other process does: it has the model's code, and needs it where the file holds no graph."""
    fast = escort.load(folder / "model.escort", None if traced else pruned(name), remeasure=False)
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        outputs = tensors_of(fast(sample(OTHERS[0])))
    assert all(output_error(a, b) < 1e-6 for a, b in zip(outputs, expected, strict=True))


if __name__ == "__main__":
    load(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True")
