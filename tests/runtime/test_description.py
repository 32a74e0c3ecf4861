"""Whether a network can be saved is known before it is planned, with the reason."""

from __future__ import annotations

import importlib
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import escort
from escort.network import swap
from escort.runtime.saved.description import unsavable
from tests.network.patterns import traced

X = torch.randn(2, 3, 12, 12)


class Out(NamedTuple):
    scores: Tensor
    count: int


class AsItIs(nn.Sequential):
    """No graph can be made of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.held = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


class Net(nn.Module):
    """A convolution, and something behind it."""

    def __init__(self, behind: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.behind = behind
        self.conv = nn.Conv2d(3, 4, 3)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.register_buffer("infinite", torch.tensor([float("-inf")]))

    def forward(self, x: Tensor) -> Any:
        return self.behind(self, self.conv(x))


SAVABLE = {
    "dropout": Net(lambda m, y: F.dropout(y, 0.1, m.training)),
    "dropout in an expression": Net(lambda m, y: F.dropout2d(F.relu(y), training=m.training) + y),
    "a named tuple": Net(lambda m, y: Out(y.mean((1, 2, 3)), y.shape[0])),
    "a dict": Net(lambda m, y: {"a": y, "b": [y, None, (1, "text")]}),
    "attention": Net(
        lambda m, y: m.attention(*[y.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0],
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    "a recurrent layer": Net(
        lambda m, y: m.cells(y.flatten(2).transpose(1, 2))[0], cells=nn.LSTM(4, 5, 2, bidirectional=True)
    ),
    "names with dashes": Net(lambda m, y: m.get_submodule("re-lu.0")(y), **{"re-lu": nn.Sequential(nn.ReLU())}),
    "softmax": Net(lambda m, y: F.softmax(y, 1)),
    "normalize": Net(lambda m, y: F.normalize(y, dim=1)),
    "a power by a tensor": Net(lambda m, y: 10000 ** y.sigmoid()),
    "an optional argument": Net(lambda m, y: y.mean(0, keepdim=True, dtype=None)),
}


@pytest.mark.parametrize("name", SAVABLE)
def test_what_models_do_is_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SAVABLE[name].eval()
    del model.infinite
    escort.prune.uniform(model, 0.8)
    escort.prune.make_permanent(model)
    fast = escort.convert(model, X)
    assert fast.plan.not_saved is None
    escort.save(fast, tmp_path / "model")
    back = escort.load(tmp_path / "model")
    with torch.inference_mode():
        ours, theirs, expected = (torch.utils._pytree.tree_flatten(run(X)) for run in (back, fast, model))
    assert all(torch.equal(a, b) if isinstance(b, Tensor) else a == b for a, b in zip(ours[0], theirs[0], strict=True))
    assert len(ours[0]) == len(expected[0])
    if name == "a named tuple":
        assert back(X).count == 2 and type(back(X)).__name__ == "Out"


REASONS = {
    r"step %2 = special_i0\(%1\): a call of .*i0 cannot be saved": Net(lambda m, y: torch.special.i0(y)),
    "layer own: forward hooks cannot be saved": Net(lambda m, y: m.own(y), own=hooked(nn.Sequential(nn.ReLU()))),
    "layer relu: forward hooks cannot be saved": Net(lambda m, y: m.relu(y), relu=hooked(nn.ReLU())),
    "layer own.0 lies within the layer own, which cannot be saved; call one of them": Net(
        lambda m, y: m.own[0](m.own(y)), own=AsItIs(nn.ReLU())
    ),
    "own.held is no tensor that a program may read; make it a buffer": Net(
        lambda m, y: m.own(y) + m.own.held, own=AsItIs()
    ),
    "infinite holds NaN or infinity": Net(lambda m, y: y + m.infinite),
    "getattr.* of 'requires_grad' cannot be saved": Net(lambda m, y: (y, y.requires_grad)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_network_cannot_be_saved(reason: str) -> None:
    network = traced(REASONS[reason].eval(), X)
    assert re.search(reason, str(unsavable(network, X.device)))


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (torch.tensor([1.0, -torch.inf]), "more holds NaN or infinity; use a finite number"),
        (torch.zeros(2, dtype=torch.complex64), "more is a torch.complex64 tensor"),
    ],
)
def test_tensors_of_no_program_are_asked_too(held: Tensor, reason: str) -> None:
    whole = AsItIs(nn.Conv2d(3, 4, 3))
    assert unsavable(whole, X.device) is None
    whole.register_buffer("more", held)
    assert str(unsavable(whole, X.device)).startswith(reason)


def test_layers_to_be_of_no_program_are_asked_too() -> None:
    whole = AsItIs(nn.Conv2d(3, 4, 3))
    found = unsavable(whole, X.device, ["0", "a\n"])
    assert found == r"layer a\n: 'a\n' cannot name a layer or tensor of a saved network; rename it"
    strange = nn.Sequential(OrderedDict({"a\n": nn.Conv2d(3, 4, 1), "other": nn.ReLU()})).eval()
    plan = replace(escort.convert(strange, X).plan, kept_dense=False)
    assert escort.convert(strange, X, plan=plan).plan.not_saved == found


def test_an_input_that_nobody_has_an_example_of() -> None:
    network = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    assert "what its input input is like is not known" in str(unsavable(network, X.device))


def test_it_is_known_before_planning_and_said_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda m, y: torch.special.i0(y)).eval()
    asked: list[str] = []
    convert = importlib.import_module("escort.network.convert")
    monkeypatch.setattr(convert, "unsavable", lambda *given: asked.append("asked") or unsavable(*given))
    plan_layers = swap.plan_layers
    monkeypatch.setattr(
        swap, "plan_layers", lambda *args, **named: asked.append("planned") or plan_layers(*args, **named)
    )
    fast = escort.convert(model, X)
    assert asked == ["asked", "planned", *["asked"] * fast.plan.kept_dense]  # what is kept instead is asked then
    assert "a call of" in str(fast.plan.not_saved)
    assert f"It cannot be saved: {fast.plan.not_saved}" in " ".join(str(fast.plan).split())
    assert type(fast.plan).from_json(fast.plan.to_json()) == fast.plan
    with pytest.raises(ValueError) as refused:
        escort.save(fast, tmp_path / "model")
    assert str(refused.value) == fast.plan.not_saved


def test_graphs_within_a_model_are_asked_too() -> None:
    parts = nn.Sequential(nn.Linear(2, 2), traced(Net(lambda m, y: torch.special.i0(y)).eval(), X))
    assert re.match(r"part 1: step %2 = special_i0\(%1\): a call of", str(unsavable(parts, X.device)))
    parts = nn.Sequential(nn.Linear(2, 2), traced(Net(lambda m, y: F.relu(y)).eval(), X))
    assert unsavable(parts, X.device) is None and isinstance(parts[1], fx.GraphModule)
