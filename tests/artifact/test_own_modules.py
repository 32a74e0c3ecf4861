"""A program that calls modules of the model as they are, with programs inside of them: saved, loaded and forged."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from escort.artifact import ArtifactError, load, save
from escort.layers import SparseConv2d
from escort.network.convert import ConvertedModel, convert
from escort.network.plan import NetworkPlan
from escort.runtime import Program
from escort.runtime.saved.builders import OWN
from escort.runtime.saved.description import describe
from tests.artifact.forgery import Forgery
from tests.artifact.networks import X, assert_same, sparse
from tests.network.models import Block

LOAD = importlib.import_module("escort.artifact.load")  # by that name the package has the function


class Gate(nn.Module):
    """Not traceable: a block and another gate inside of it are, and a convolution belongs to no graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.conv, self.pool = inner, nn.Conv2d(3, 3, 1), nn.MaxPool2d(1)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.conv(x)) * self.scale + self.shift
        return self.inner(y) if y.sum() > -1e9 and self.inner.source < 0 else x


class Around(nn.Module):
    """Traceable around what is not; it reads a tensor of that, too."""

    source = -1

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.gate, self.last = Block(), Gate(inner or Block()), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.gate(self.first(x)) * self.gate.scale)
        return x - x.mean((2, 3), keepdim=True)


def deep() -> Around:
    return Around(Around())


@pytest.fixture(scope="module")
def around() -> ConvertedModel:
    result = convert(sparse(deep(), 0.6), X)
    assert not result.plan.kept_dense and result.plan.not_saved is None and not result.traced
    return result


@pytest.fixture(scope="module")
def path(around: ConvertedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "around.escort"
    save(around, path)
    return path


def test_what_the_file_says_of_it(around: ConvertedModel) -> None:
    description = describe(around.network)
    assert sorted(description.programs) == ["", "gate.inner", "gate.inner.gate.inner"]
    assert [name for name, record in description.layers.items() if record == OWN] == ["gate", "gate.inner.gate"]
    assert {"first.conv", "gate.conv", "gate.pool", "gate.inner.gate.inner.conv"} <= description.layers.keys()


def test_it_comes_back_into_a_new_model(
    around: ConvertedModel, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = deep()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    back = load(path, fresh)
    assert not back.traced and type(back.network) is Program
    assert type(back.network.gate) is Gate and type(back.network.gate.conv) is SparseConv2d
    assert type(back.network.gate.inner) is Program and back.network.gate.inner.source == -1
    assert torch.equal(back.network.gate.scale, around.network.gate.scale)
    assert_same(back, around)
    assert back.plan == around.plan
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    save(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    (said,) = caplog.messages
    assert "again does not hold the whole program, as layers gate (Gate), gate.inner.gate (Gate) could not be" in said


def test_in_another_process(around: ConvertedModel, path: Path, tmp_path: Path) -> None:
    x = torch.randn(3, 3, 21, 18)
    torch.save(x, tmp_path / "x")
    code = (
        "import sys, torch; from escort import load; from tests.artifact.test_own_modules import deep\n"
        "path, x, y = sys.argv[1:]\n"
        "torch.save(load(path, deep(), remeasure=False)(torch.load(x)), y)"
    )
    files = [str(path), str(tmp_path / "x"), str(tmp_path / "y")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "y"), around(x))


def test_a_part_keeps_the_attributes_that_code_around_it_reads(tmp_path: Path) -> None:
    model = sparse(nn.Sequential(Gate(Block())), 0.6)
    fast = convert(model, X)
    save(fast, tmp_path / "model")
    back = load(tmp_path / "model", nn.Sequential(Gate(Block())))
    assert_same(back, fast)


def with_a_layer_twice() -> nn.Module:
    model = Around()
    model.gate.more = model.first.conv
    return model


def with_a_part_twice() -> nn.Module:
    model = Around()
    model.gate.more = model.gate.inner
    return model


def with_all_twice() -> nn.Module:
    model = Gate(Block())
    model.gate, model.more = [Gate(Block())] * 2
    model.inner.gate = model.gate
    return nn.Sequential(model)


@pytest.mark.parametrize("make", [with_a_layer_twice, with_a_part_twice, with_all_twice])
def test_what_is_in_two_places_comes_back(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    fast = convert(sparse(make(), 0.6), X)
    assert fast.plan.not_saved is None
    save(fast, tmp_path / "model")
    assert_same(load(tmp_path / "model", make()), fast)


class Particular(Gate):
    """Takes a state dict in a way of its own, as some encoders of segmentation_models_pytorch do."""

    def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict)


def test_a_class_with_a_load_state_dict_of_its_own(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return sparse(nn.Sequential(nn.Conv2d(3, 3, 3), Particular(Block())))

    fast = convert(made(), X)
    save(fast, tmp_path / "model.escort")
    assert_same(load(tmp_path / "model.escort", None if fast.traced else made()), fast)


def test_an_exported_program_with_guards_comes_back_into_itself(tmp_path: Path) -> None:
    exported = torch.export.export(sparse(Around().last, 0.6), (X,))
    fast = convert(exported, X)
    save(fast, tmp_path / "model")
    back = load(tmp_path / "model", exported)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(back(X), fast(X))


def test_no_filter_of_a_file_is_read_by_a_second_path(tmp_path: Path) -> None:
    save(convert(sparse(with_all_twice(), 0.6), X), tmp_path / "model")
    forgery = Forgery((tmp_path / "model").read_bytes())
    forgery.tensors["0.more.inner.conv.columns"] = torch.full((9,), 2**30, dtype=torch.int32)
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match="nothing in the network uses its tensor 0.more.inner.conv.columns"):
        load(tmp_path / "forged", with_all_twice())


def test_no_program_reads_a_filter_by_a_second_path(tmp_path: Path) -> None:
    def twice() -> nn.Module:
        model = Around()
        model.gate.inner, model.gate.other = [Gate(Block())] * 2
        model.gate.inner.source = -1
        return model

    save(convert(sparse(twice(), 0.6), X), tmp_path / "model")
    forgery = Forgery((tmp_path / "model").read_bytes())
    forgery.program["steps"].append({"tensor": "gate.other.conv.columns"})
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match="gate.other.conv.columns is no tensor that a program may read"):
        load(tmp_path / "forged", twice())


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("gate", "layer gate: forward hooks cannot be saved"),
        ("gate.inner", "layer gate.inner: forward hooks cannot be saved"),
        ("last.conv", "layer last.conv: forward hooks cannot be saved"),
        ("gate.conv", "layer gate.conv: forward hooks cannot be saved"),
        ("", "forward hooks cannot be saved"),
    ],
)
def test_hooks_are_code(path: str, complaint: str, tmp_path: Path) -> None:
    model = sparse(Around(), 0.6)
    model.get_submodule(path).register_forward_hook(lambda module, args, output: output + 1)
    fast = convert(model, X)
    assert str(fast.plan.not_saved).startswith(complaint)
    with pytest.raises(ValueError, match=complaint):
        save(fast, tmp_path / "model")


def test_the_model_is_asked_for(path: Path) -> None:
    with pytest.raises(ArtifactError, match="it does not hold the whole program; pass load a new model"):
        load(path)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (nn.Sequential(), "layer gate: the model has no gate"),
        (Around(), "layer gate.inner.gate: the model has no gate.inner.gate"),
        (nn.ModuleDict({"gate": nn.ReLU()}), "layer gate: the file takes it from the model, which has ReLU"),
    ],
    ids=["empty", "shallow", "layer"],
)
def test_another_model_is_refused(path: Path, model: nn.Module, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=f"{complaint}.*; pass a new model of the class that was converted"):
        load(path, model)


def larger() -> nn.Module:
    model = deep()
    model.gate.more = nn.Linear(2, 2)
    return model


def of_another_shape() -> nn.Module:
    model = deep()
    model.gate.shift = torch.zeros(2)
    return model


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (larger, "layer gate: .*gate.more.weight is missing"),
        (of_another_shape, "layer gate: shift is of shape"),
    ],
)
def test_a_module_with_other_tensors_is_refused(path: Path, make: Callable[[], nn.Module], complaint: str) -> None:
    with pytest.raises(ArtifactError, match=f"{complaint}.*; pass a new model of the class that was converted"):
        load(path, make())


def calling(path: str) -> Callable[[Forgery], None]:
    """A forgery that calls a module of the model's own."""

    def forge(forgery: Forgery) -> None:
        forgery.architecture["layers"][path] = dict(OWN)
        forgery.program["steps"].append({"layer": path, "args": [{"value": 0}]})

    return forge


def renamed(old: str, new: str) -> Callable[[Forgery], None]:
    return lambda f: f.architecture["programs"].update({new: f.architecture["programs"].pop(old)})


def appended(**step: Any) -> Callable[[Forgery], None]:
    return lambda f: f.program["steps"].append(step)


ATTACKS: dict[str, tuple[Callable[[Forgery], Any], str]] = {
    "a module that the model lacks": (calling("missing"), "layer missing: the model has no missing"),
    "a method of the model": (calling("forward"), "layer forward: the model has no forward"),
    "Python's own": (calling("gate.__class__"), "cannot name a layer"),
    "the model itself": (calling(""), "cannot name a layer"),
    "a layer that files describe": (calling("first.norm"), "layer first.norm: the file takes it from the model, which"),
    "a module within a called one": (calling("gate.inner.first"), "layer gate.inner.first.conv: the file holds Sp"),
    "a module around a called one": (calling("first"), "layer first.conv: the file holds SparseConv2d"),
    "a module with arguments": (
        lambda f: f.architecture["layers"].update(gate={**OWN, "arguments": {}}),
        "layer gate: there is no layer of type 'model'",
    ),
    "a module that nothing calls": (
        lambda f: f.architecture["layers"].update(last=dict(OWN)),
        "layer last.conv: the file holds SparseConv2d",
    ),
    "a module of no program": (
        lambda f: f.architecture["layers"].update({"gate.inner.gate.inner.conv": dict(OWN)}),
        "which has Conv2d",
    ),
    "a module that is a program": (
        lambda f: f.architecture["layers"].update({"gate.inner": dict(OWN)}),
        "the part gate.inner is a layer, too",
    ),
    "a program that is a module": (renamed("gate.inner", "gate"), "the part gate is a layer, too"),
    "a program within a program": (
        lambda f: f.architecture["programs"].update(first=f.architecture["programs"]["gate.inner.gate.inner"]),
        "the part first lies within another part",
    ),
    "a program that the model lacks": (renamed("gate.inner.gate.inner", "gate.inner.gate.x"), "the model has no"),
    "a program in the place of a method": (
        lambda f: f.architecture["programs"].update({"gate.forward": f.architecture["programs"]["gate.inner"]}),
        "part gate.forward: the model has no gate.forward",
    ),
    "another layer within the module": (
        lambda f: f.architecture["layers"].update({"gate.conv": {"type": "ReLU", "arguments": {}}}),
        "layer gate.conv: the file holds ReLU",
    ),
    "a layer within a module within a program": (
        lambda f: f.architecture["layers"].update({"gate.inner.more": {"type": "ReLU", "arguments": {}}}),
        "nothing in the network uses its layer gate.inner.more",
    ),
    "a filter within the module": (appended(tensor="gate.conv.values"), "no tensor that a program may read"),
    "a tensor of a program within the module": (appended(tensor="gate.inner.first.conv.bias"), "no tensor that a prog"),
    "an attribute of the module": (appended(tensor="gate.training"), "gate.training is no tensor that a program"),
    "a tensor that is a module": (appended(tensor="gate.pool"), "no tensor that a program may read"),
    "a missing tensor of the module": (lambda f: f.tensors.pop("gate.shift"), "layer gate: .*gate.shift is missing"),
    "a forbidden call behind the module": (appended(call="torch.load", args=[{"value": 9}]), "a call of torch.load"),
    "a bomb before the module": (appended(call="torch.zeros", args=[2**40]), "step %.* = zeros"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_forged_file_is_refused(path: Path, tmp_path: Path, attack: str) -> None:
    forge, complaint = ATTACKS[attack]
    forgery = Forgery(path.read_bytes())
    forge(forgery)
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match=rf"(?s)forged: .*({complaint})"):
        load(tmp_path / "forged", deep())


def test_the_forgeries_are_what_makes_them_refused(path: Path, tmp_path: Path, around: ConvertedModel) -> None:
    (tmp_path / "copy").write_bytes(Forgery(path.read_bytes()).seal())
    assert_same(load(tmp_path / "copy", deep()), around)


def test_steps_behind_the_module_are_checked_on_every_call(path: Path, tmp_path: Path) -> None:
    forgery = Forgery(path.read_bytes())
    number = len(forgery.program["inputs"]) + len(forgery.program["steps"])
    last = {"value": number - 1}
    shape = {"call": "Tensor.shape", "args": [last]}
    repeated = {"call": "operator.mul", "args": [{"value": number}, 2**30]}
    forgery.program["steps"] += [shape, repeated]
    (tmp_path / "forged").write_bytes(forgery.seal())
    back = load(tmp_path / "forged", deep())
    with pytest.raises(ValueError, match="a product repeats a sequence"):
        back(X)


def test_the_module_is_not_run_before_it_is_asked_for(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgery = Forgery(path.read_bytes())
    forgery.plan["machine"]["device"] = "another"
    (tmp_path / "moved").write_bytes(forgery.seal())
    calls: list[Any] = []
    forward = Gate.forward
    monkeypatch.setattr(Gate, "forward", lambda self, x: calls.append(x) or forward(self, x))
    back = load(tmp_path / "moved", deep())
    assert not calls and all(plan.time_us is not None for plan in back.plan.layers.values())
    measured: NetworkPlan = load(tmp_path / "moved", deep(), remeasure=True).plan
    assert calls and measured.layers.keys() == back.plan.layers.keys()
