"""From NNCF and Torch-Pruning to a converted network, by the blocks of docs/pruners.md and on the command line."""

from __future__ import annotations

from pathlib import Path

import nncf
import pytest
import torch

import escort
from tests.cli.invoking import succeed
from tests.pruners import SPARSITY, follow, net, zeros

EXAMPLE = torch.randn(2, 3, 12, 12)
FACTORY = "tests.pruners:net"


def pruned(mode: nncf.PruneMode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL) -> torch.nn.Module:
    ratio = None if mode is nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED else SPARSITY
    return nncf.prune(net(), mode=mode, ratio=ratio, examples_inputs=EXAMPLE)


def test_nncf() -> None:
    names = follow("NNCF")
    share = zeros(names["fast"])  # of all layers together, the linear one among them
    assert share == pytest.approx(SPARSITY, abs=0.02)


@pytest.mark.parametrize("mode", list(nncf.PruneMode))
def test_nncf_that_is_not_stripped(mode: nncf.PruneMode) -> None:
    with pytest.raises(ValueError, match="NNCF applies .*PruningMask .*nncf.strip.*IN_PLACE"):
        escort.convert(pruned(mode).eval(), EXAMPLE)


def test_the_state_dict_of_nncf(tmp_path: Path) -> None:
    """Its masks lie beside the dense weights, under names of its own."""
    model = pruned()
    torch.save(model.state_dict(), tmp_path / "nncf.pth")
    output = tmp_path / "model.escort"
    succeed("convert", FACTORY, "--checkpoint", tmp_path / "nncf.pth", "--input", "2,3,12,12", "-o", output)
    fast, stripped = escort.load(output), nncf.strip(model, strip_format=nncf.StripFormat.IN_PLACE)
    with torch.no_grad():
        torch.testing.assert_close(fast(EXAMPLE), stripped.eval()(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_torch_pruning() -> None:
    names = follow("Torch-Pruning")
    assert names["model"].second.weight.shape == (12, 12, 3, 3)
    assert zeros(names["fast"]) == pytest.approx(SPARSITY, abs=0.005)


def test_an_export_of_torch_pruning(tmp_path: Path) -> None:
    names = follow("Torch-Pruning")
    escort.prune.make_permanent(names["model"])
    torch.export.save(torch.export.export(names["model"], (EXAMPLE,)), tmp_path / "pruned.pt2")
    succeed("convert", tmp_path / "pruned.pt2", "--input", "2,3,12,12", "-o", tmp_path / "model.escort")
    with torch.no_grad():
        expected = names["model"](EXAMPLE)
        torch.testing.assert_close(escort.load(tmp_path / "model.escort")(EXAMPLE), expected, rtol=1e-4, atol=1e-5)
