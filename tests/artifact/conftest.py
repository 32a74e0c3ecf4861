"""Converted models and their files, which all tests of files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from escort.artifact import save
from escort.layers import SparseConv2d
from escort.network import choose
from escort.network.convert import ConvertedModel, convert
from escort.planner import timing
from tests.artifact.networks import Residual, Untraceable, X, sparse


@pytest.fixture(scope="module", autouse=True)
def _no_timing() -> Any:
    """Conversion always pays and plans do not depend on time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [1.0 + i for i in range(len(runs))])
        patch.setattr(choose, "race", lambda runs, _: ([99.0, *(1.0 + i for i in range(len(runs) - 1))], "calls"))
        yield


@pytest.fixture(scope="module")
def converted() -> ConvertedModel:
    model = sparse(Residual())
    with torch.no_grad():
        model.empty.weight.zero_()
        model.full.weight.copy_(torch.randn(10, 12, 1, 1))
    result = convert(model, X)
    assert result.traced and not result.plan.kept_dense
    return result


@pytest.fixture(scope="module")
def untraced() -> ConvertedModel:
    result = convert(sparse(Untraceable()), X)
    assert not result.traced and isinstance(result.network.conv, SparseConv2d)
    return result


@pytest.fixture(scope="module")
def saved(converted: ConvertedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.escort"
    save(converted, path)
    return path


@pytest.fixture(scope="module")
def saved_untraced(untraced: ConvertedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "untraced.escort"
    save(untraced, path)
    return path
