"""A model of which parts are programs comes back into a new dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from escort.artifact import ArtifactError, load, save
from escort.layers import MaxPool2d, SparseConv2d
from escort.network.convert import ConvertedModel, convert
from escort.runtime import Program
from escort.runtime.saved.description import describe
from tests.artifact.forgery import Forgery
from tests.artifact.networks import Residual, X, assert_same, sparse


class Halting(nn.Module):
    """Its control flow depends on the data, that of its parts does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()
        self.aside = nn.Module()
        self.aside.head = nn.Sequential(nn.Linear(10, 5), nn.ReLU())
        self.pool = nn.MaxPool2d(1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x))
        y = self.body(x if x.sum() > -1e9 else -x)
        return self.aside.head(y)


@pytest.fixture(scope="module")
def in_parts() -> ConvertedModel:
    """A model converted layer by layer, one part of it as a whole."""
    model = sparse(Halting())
    whole = convert(model.body, X)
    assert isinstance(whole.network, Program)
    result = convert(model, X)
    assert not result.traced and isinstance(result.network.conv, SparseConv2d) and result.plan.not_saved is None
    result.network.body = whole.network
    plans = {name: plan for name, plan in result.plan.layers.items() if not name.startswith("body.")}
    plans |= {f"body.{name}": plan for name, plan in whole.plan.layers.items()}
    return ConvertedModel(result.network, replace(result.plan, layers=plans))


@pytest.fixture(scope="module")
def path(in_parts: ConvertedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "parts.escort"
    save(in_parts, path)
    return path


def test_it_comes_back(in_parts: ConvertedModel, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    back = load(path, Halting())
    assert not back.traced
    assert type(back.network.body) is Program and type(back.network.conv) is SparseConv2d
    assert type(back.network.pool) is MaxPool2d and type(back.network.aside.head) is Program
    assert_same(back, in_parts)
    assert back.plan == in_parts.plan
    save(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert ["as the model, a Halting, could not be traced" in said for said in caplog.messages] == [True]


def test_what_the_file_says_of_it(in_parts: ConvertedModel) -> None:
    description = describe(in_parts.network)
    assert [*description.programs] == ["body", "aside.head"]
    assert {"body.stem.0", "body.fc", "conv", "pool"} <= description.layers.keys()


def test_the_model_is_asked_for(path: Path) -> None:
    with pytest.raises(ArtifactError, match="it does not hold the whole program; pass load a new model"):
        load(path)


def without_a_part() -> nn.Module:
    model = Halting()
    del model.body
    return model


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (without_a_part(), "part body: the model has no body"),
        (Residual(), "part body: the model has no body"),
        (nn.Sequential(), "part body: the model has no body"),
    ],
)
def test_another_model_is_refused(path: Path, model: nn.Module, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        load(path, model)


@pytest.mark.parametrize(
    ("forge", "complaint"),
    [
        (lambda f: f.architecture["programs"].update({"body.stem": f.architecture["programs"]["body"]}), "lies within"),
        (lambda f: f.architecture["programs"].update({"forward": f.architecture["programs"]["body"]}), "forward"),
        (lambda f: f.architecture["programs"].update({"a.__b__": f.architecture["programs"]["body"]}), "cannot name"),
        (lambda f: f.architecture["programs"].pop("body"), "body"),
        (lambda f: f.architecture["programs"]["body"]["inputs"][0].pop("shape"), "what its input x is like is not kno"),
        (lambda f: f.architecture["programs"]["body"]["steps"].clear(), "value .* is read where there are 1"),
    ],
)
def test_a_forged_part_is_refused(path: Path, tmp_path: Path, forge: Callable[[Forgery], Any], complaint: str) -> None:
    forgery = Forgery(path.read_bytes())
    forge(forgery)
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match=f"forged: .*{complaint}"):
        load(tmp_path / "forged", Halting())
