"""Models of 16 bits on the CPU: computed in float32, between tensors of their own type."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import escort
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.model import ConvertedModel
from escort.network.passes import widen
from escort.network.plan import NetworkPlan, plan_table
from escort.reference import compare
from tests.network.patterns import traced
from tests.network.rewritten import settled

HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
halves = pytest.mark.parametrize("dtype", HALVES)
pytestmark = pytest.mark.usefixtures("always_faster", "direct_wins")


class Block(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


def small(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.SiLU(inplace=True), Block(), Block()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    return settled(model, density=0.4).to(dtype)


def exact(model: nn.Module, *inputs: Any) -> Any:
    """What a model makes of its inputs in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(*(x.double() for x in inputs))


@halves
def test_inputs_and_outputs_keep_the_models_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = small(dtype), torch.randn(2, 3, 16, 15).to(dtype)
    fast = escort.convert(model, x)
    assert fast.plan.precision == "fp32" and fast.plan.widened == str(dtype).removeprefix("torch.")
    assert f"Computed in fp32; inputs and outputs of {fast.plan.widened} are converted." in " ".join(
        str(fast.plan).split()
    )
    assert NetworkPlan.from_json(fast.plan.to_json()) == fast.plan
    rival = next(row for row in plan_table(fast.plan).rows if row[3] == "float32")
    assert fast.plan.rivals["float32"] > 0.0 and rival[-1] == "of the dense model, for comparison"
    assert f"The whole network's dense time is torch's in {fast.plan.widened}" in " ".join(str(fast.plan).split())
    assert len(fast.plan.layers) == 3 and not fast.plan.skipped and not fast.plan.kept_dense
    assert {tensor.dtype for tensor in fast.state_dict().values()} == {torch.float32, torch.int32}
    for inputs in (x, torch.randn(3, 3, 9, 20).to(dtype)):
        out, ref = fast(inputs), exact(model, inputs)
        assert out.dtype is dtype and out.shape == ref.shape
        with torch.no_grad():
            assert compare(out, ref) <= min(NETWORK_ERROR_BOUND[HALVES[dtype]], compare(model(inputs), ref) + 1e-3)
    escort.save(fast, tmp_path / "model.escort")
    loaded = escort.load(tmp_path / "model.escort", remeasure=False)
    for same in (
        loaded,
        copy.deepcopy(fast),
        torch.export.export(fast, (x,)).module(),
        torch.compile(fast, backend="eager"),
    ):
        assert torch.equal(same(x), fast(x))
    assert loaded.plan.widened == fast.plan.widened
    again = escort.replan(fast)
    assert again(x).dtype is dtype and again.plan.widened == fast.plan.widened


@halves
def test_weights_are_the_same_numbers(dtype: torch.dtype) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))).to(dtype)
    fast: Any = escort.convert(model, torch.randn(1, 3, 4, 4).to(dtype))
    for name in ("0", "3"):
        own, original = fast.network.get_submodule(name), model.get_submodule(name)
        expected = original.weight.float().reshape(own.weight.shape)  # type: ignore[union-attr, operator]
        assert own.weight.dtype is torch.float32 and torch.equal(own.weight + 0.0, expected)
        assert torch.equal(own.bias, original.bias.float())  # type: ignore[union-attr, operator]


@halves
def test_a_state_dict_goes_round(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 8, 8).to(dtype)
    fast, other = escort.convert(small(dtype), x), escort.convert(small(dtype), x)
    with torch.no_grad():
        fast.network.get_submodule("0").bias.add_(1.0)  # type: ignore[union-attr, operator]
    assert not torch.equal(fast(x), other(x))
    other.load_state_dict(
        {name: value.to(dtype) if "bias" in name else value for name, value in fast.state_dict().items()}
    )
    assert compare(other(x), fast(x)) < NETWORK_ERROR_BOUND[HALVES[dtype]]
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), fast(x))


class Typed(nn.Module):
    """Asks for types, makes tensors of types, and returns tensors of several."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.register_buffer("gain", torch.rand(1, 4, 1, 1))
        self.register_buffer("index", torch.tensor([2, 0, 1]))

    def forward(self, picture: Tensor, scale: Tensor, times: int = 1) -> dict[str, Any]:
        x = picture[:, self.index]
        y = self.conv(x.to(self.dtype)) * self.gain * scale
        y = y + torch.zeros(1, dtype=x.dtype) + torch.ones(4, 1, 1, dtype=self.dtype)
        y = y.half() if self.dtype is torch.float16 else y.bfloat16()
        if y.dtype != x.dtype:
            raise TypeError("the types differ")
        normed = F.layer_norm(y.float(), y.shape[1:]).relu().type_as(x)
        out = self.linear(normed.mean((2, 3), dtype=torch.float32).to(dtype=self.dtype))
        return {
            "out": out * times,
            "both": [out, normed.view(-1)],
            "logits": out.float(),
            "exact": out.double(),
            "mask": y.isnan(),
            "sizes": (x.shape, 3),
            "input": picture,
        }


@halves
def test_code_that_asks_for_types_or_makes_tensors_of_them(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = settled(Typed(dtype), density=0.5).to(dtype)
    inputs = torch.randn(2, 3, 6, 5).to(dtype), torch.rand(1).to(dtype)
    fast: Any = escort.convert(model, inputs)
    assert not fast.plan.kept_dense and set(fast.plan.layers) == {"conv"} and fast.dtype is dtype
    with torch.no_grad():
        out, ref = fast(*inputs), model(*inputs)
    flat, expected = (torch.utils._pytree.tree_leaves(value) for value in (out, ref))
    tensors = [pair for pair in zip(flat, expected, strict=True) if isinstance(pair[1], Tensor)]
    assert len(tensors) == 7 and out["sizes"] == ref["sizes"] and out["input"] is inputs[0]
    for one, other in tensors:
        assert one.dtype is other.dtype and one.shape == other.shape
        assert other.dtype is torch.bool or compare(one, other) < NETWORK_ERROR_BOUND[HALVES[dtype]]
    escort.save(fast, tmp_path / "model.escort")
    loaded: Any = escort.load(tmp_path / "model.escort", remeasure=False)
    assert torch.equal(loaded(*inputs)["out"], out["out"])


class Branching(nn.Module):
    """No graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(x) * 2.0


def test_a_module_without_a_graph_within_one_computes_in_float32() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 3), Branching(), nn.ReLU()), density=0.5).bfloat16()
    x = torch.randn(1, 3, 6, 6).bfloat16()
    fast = escort.convert(model, x)
    assert set(fast.plan.layers) == {"0", "1.conv"} and fast(x).dtype is torch.bfloat16
    assert compare(fast(x), exact(model, x)) < NETWORK_ERROR_BOUND["bf16"]


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mul_(2.0))


@pytest.mark.parametrize(
    ("model", "why"), [(Branching(), "Branching: .*control flow"), (Writing(), "it writes to its input")]
)
def test_what_is_refused_says_what_to_do(model: nn.Module, why: str) -> None:
    model = settled(copy.deepcopy(model)).bfloat16()
    x = torch.randn(1, 3, 4, 4).bfloat16()
    with pytest.raises(
        ValueError, match=rf"of torch.bfloat16 in float32, .* this one has none: {why}.*; .* with \.float\(\)$"
    ):
        escort.convert(model, x)
    assert isinstance(escort.convert(model.float(), x.float()), ConvertedModel)


@halves
def test_exported_programs(dtype: torch.dtype) -> None:
    model, x = small(dtype), torch.randn(2, 3, 16, 15).to(dtype)
    fast = escort.convert(torch.export.export(model, (x,)), x)  # type: ignore[arg-type]
    assert len(fast.plan.layers) == 3 and fast(x).dtype is dtype
    assert compare(fast(x), exact(model, x)) < NETWORK_ERROR_BOUND[HALVES[dtype]]


def test_what_comes_in_and_what_goes_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval().half()
    network = widen.rewrite(traced(model, torch.randn(1, 3, 4, 4).half()), torch.float16)
    (placeholder, wide, conv, relu, narrow, _) = network.graph.nodes
    assert [node.target for node in (wide, narrow)] == ["to", "to"] and wide.args[0] is placeholder
    assert conv.args == (wide,) and relu.meta["shape"][1] is torch.float32
    assert placeholder.meta["shape"][1] is torch.float16
    assert model[0].weight.dtype is torch.float16  # type: ignore[union-attr]
