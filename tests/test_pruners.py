"""From a pruner to a converted network, with what torch alone brings: `make test-integrations` tries the others."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import escort
from tests.pruners import SPARSITY, follow, net, zeros


@pytest.mark.parametrize("library", ["torch.nn.utils.prune", "torch.ao.pruning"])
def test_torchs_own(library: str) -> None:
    assert zeros(follow(library)["fast"]) == pytest.approx(SPARSITY, abs=0.005)


def test_sparseml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its save_model makes floats of all tensors, and parallel training puts "module." before their names."""
    model = net()
    escort.prune.uniform(model, SPARSITY)
    escort.prune.make_permanent(model)
    state = OrderedDict((f"module.{name}", value.float()) for name, value in model.state_dict().items())
    content = {"state_dict": state, "recipe": "modifiers: []", "epoch": 3, "arch_key": "net"}
    torch.save(content, tmp_path / "sparseml.pth")
    monkeypatch.chdir(tmp_path)
    assert zeros(follow("SparseML")["fast"]) == pytest.approx(SPARSITY, abs=0.005)


def _with_mask(layer: nn.Conv2d, *, applied: bool) -> None:
    layer.register_buffer("mask", (torch.rand(layer.weight.shape) > SPARSITY).float())
    if applied:
        layer.weight.data *= layer.mask


def test_forgotten_masks_are_told() -> None:
    model = net()
    for layer in (model.first, model.second):
        _with_mask(layer, applied=False)
    message = "layer first: its mask is not applied to its weight, which stays dense, and so are those of 1 more layers"
    with pytest.warns(UserWarning, match=message) as warned:
        escort.convert(model, torch.randn(2, 3, 12, 12), methods=[])
    assert warned[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_applied_masks_are_not(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    _with_mask(model.first, applied=True)
    model.second.mask_of_inputs = torch.zeros(3)
    escort.convert(model, torch.randn(2, 3, 12, 12), methods=[])
    assert "no filter of this model has a zero" not in caplog.text


def test_dense_models_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """As where a checkpoint's weight_orig and weight_mask were left out by strict=False."""
    pruned = net()
    escort.prune.uniform(pruned, SPARSITY)
    model = net()
    model.load_state_dict(pruned.state_dict(), strict=False)
    with caplog.at_level(logging.WARNING, "escort"):
        escort.convert(model, torch.randn(2, 3, 12, 12), methods=[])
    assert "no filter of this model has a zero in it" in caplog.text and "strict=False" in caplog.text
