"""A converted model in the place of the original: whoever called that, or read from it, sees the same."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import escort
from escort.layers import SparseConv2d
from tests.network.models import Small, pruned

pytestmark = pytest.mark.usefixtures("always_faster")


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


class Options(nn.Module):
    """Options, defaults, arguments by name only, attributes, another method and a property."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classes = nn.Conv2d(3, 4, 3, padding=1), ["cat", "dog"]

    @property
    def strides(self) -> tuple[int, ...]:
        return (8, 16)

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor, scale: float = 2.0, *, mask: Tensor | None = None, twice: bool = False) -> Tensor:
        y = self.features(x) * scale
        y = y if mask is None else y * mask
        return y * 2 if twice else y


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_it_takes_what_the_original_takes() -> None:
    model, mask = pruned(Options()), torch.rand(2, 1, 8, 8)
    fast = escort.convert(model, (X, 3.0), {"mask": mask, "twice": True})
    assert str(inspect.signature(fast.forward)) == "(x, scale=2.0, *, mask=None, twice=False)"
    with torch.no_grad():
        for call in (
            lambda m: m(X, 3.0, mask=mask, twice=True),
            lambda m: m(twice=True, mask=mask, scale=3.0, x=X[:1]),
        ):
            assert close(call(fast), call(model))
    for wrong, name in (
        (lambda: fast(X, 2.0, mask=mask, twice=True), "scale"),
        (lambda: fast(X, 3.0, mask=mask), "twice"),
    ):
        with pytest.raises(ValueError, match=f"{name} was .* when the model was converted, .*; pass it as it was, or"):
            wrong()


def test_it_has_the_attributes_of_the_original_and_says_what_it_lacks() -> None:
    fast = escort.convert(pruned(Options()), X)
    assert (fast.classes, fast.width, fast.strides) == (["cat", "dog"], 8, (8, 16))
    assert isinstance(fast.conv, SparseConv2d) and (fast.conv.in_channels, fast.conv.padding) == (3, (1, 1))
    with pytest.raises(AttributeError, match="a converted model has no features: .* use features of the original"):
        fast.features(X)
    with pytest.raises(AttributeError, match="'ConvertedModel' object has no attribute 'nonsense'"):
        _ = fast.nonsense
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.classes == ["cat", "dog"] and close(other(X), fast(X))
        assert inspect.signature(other.forward) == inspect.signature(fast.forward)


def test_sequences_in_it_are_indexed_as_the_originals_are() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))

    model = pruned(nn.Sequential(OrderedDict(first=nn.Conv2d(3, 3, 1), blocks=nn.Sequential(block(), block()))))
    fast: Any = escort.convert(model, X)
    assert len(fast.blocks) == 2 and [*fast.blocks] == [fast.blocks[0], fast.blocks[1]]
    assert fast.blocks[1][3] is fast.get_submodule("network.blocks.1.3") and fast["first"] is fast.first
    with pytest.raises(
        IndexError, match="there is no 1 in this part of the converted model, which has 0, 3: others were"
    ):
        fast.blocks[0][1]
    with pytest.raises(KeyError, match="there is no last in this part"):
        fast["last"]
    with pytest.raises(TypeError, match="indexed by a number or a name, got slice"):
        fast.blocks[:1]
    with pytest.raises(TypeError, match="not iterable"):
        iter(fast)
    assert escort.convert(model.blocks, X)[0][0].in_channels == 3 and bool(fast)


def test_a_saved_one_takes_the_same(tmp_path: Path) -> None:
    fast = escort.convert(pruned(Options()), (X, 3.0), {"twice": True})
    escort.save(fast, tmp_path / "model.escort")
    back = escort.load(tmp_path / "model.escort", remeasure=False)
    assert close(back(X, 3.0, twice=True), fast(X, 3.0, twice=True))
    with pytest.raises(ValueError, match="scale was 3.0 when the model was converted, and is 2.0 now; pass it"):
        back(X, twice=True)


def test_exported_arguments_keep_their_names() -> None:
    fast = escort.convert(pruned(Options()), X)
    program = torch.export.export(fast, (), {"x": X})
    assert program.graph_signature.user_inputs == ("x",)
    assert close(program.module()(x=X), fast(X))


class Pair(NamedTuple):
    out: Tensor
    aux: Tensor | None


@dataclass
class Result:
    out: Tensor
    name: str = "result"


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 3), kind

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        kinds = {
            "dict": {"out": y, "aux": None},
            "ordered": OrderedDict(b=y, a=[y + 1]),
            "pair": Pair(y, None),
            "dataclass": Result(y),
            "nested": (y, [y, {"more": (y,)}], None),
        }
        return kinds[self.kind]


@pytest.mark.parametrize("kind", ["dict", "ordered", "pair", "dataclass", "nested"])
def test_outputs_keep_their_types(kind: str) -> None:
    model = pruned(Returns(kind))
    fast = escort.convert(model, X)
    with torch.no_grad():
        out, expected = fast(X), model(X)
    assert type(out) is type(expected)
    match kind:
        case "dict":
            assert list(out) == ["out", "aux"] and out["aux"] is None and close(out["out"], expected["out"])
        case "ordered":
            assert list(out) == ["b", "a"] and close(out["a"][0], expected["a"][0])
        case "pair" | "dataclass":
            assert close(out.out, expected.out)
        case "nested":
            assert close(out[1][1]["more"][0], expected[0]) and out[2] is None


class Opaque:
    def __init__(self, out: Any) -> None:
        self.out = out


class Wraps(nn.Module):
    def __init__(self, holds: bool) -> None:
        super().__init__()
        self.conv, self.holds = nn.Conv2d(3, 4, 3), holds

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return Opaque(y) if self.holds else str(y.shape)


def test_outputs_of_any_class_are_compared_and_those_without_tensors_are_refused() -> None:
    model = pruned(Wraps(True))
    assert close(escort.convert(model, X)(X).out, model(X).out)
    with pytest.raises(ValueError, match="returns a str, in which no tensor can be found to compare; convert the part"):
        escort.convert(pruned(Wraps(False)), X)


class Packed(nn.Module):
    """Takes tensors in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pictures: list[Tensor], options: dict[str, Any]) -> Tensor:
        return torch.cat([F.relu(self.conv(picture)) for picture in pictures]) * options["scale"]


def test_inputs_in_containers() -> None:
    model = pruned(Packed())
    example = [X, X[:1]], {"scale": torch.tensor(2.0), "name": "x"}
    fast = escort.convert(model, example)
    with torch.no_grad():
        assert close(fast(*example), model(*example))
        assert close(fast([X], {"scale": 3.0}), model([X], {"scale": 3.0}))
    again = escort.replan(fast)
    assert again.plan.converted_time_us == fast.plan.converted_time_us and close(again(*example), fast(*example))


class Mask(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer((torch.rand_like(weight) < 0.3).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked(conv: nn.Conv2d) -> nn.Module:
    parametrize.register_parametrization(conv, "weight", Mask(conv.weight))
    return conv


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "wrap", [masked, parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm]
)
def test_the_original_stays_as_it_was(wrap: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), wrap(nn.Conv2d(8, 8, 3))).eval()
    before, keys = model(X), list(model.state_dict())
    x = X.clone()
    fast = escort.convert(model, x)
    assert torch.equal(x, X) and torch.equal(model(X), before) and list(model.state_dict()) == keys
    assert close(fast(X), before) and list(fast.plan.layers) == ["0", "2"]


def test_an_input_that_the_model_writes_to() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)).eval()
    x = X.clone()
    fast = escort.convert(model, x)
    assert torch.equal(x, X)
    fast(x)
    assert torch.equal(x, X.relu())


class Stream(nn.Module):
    """Keeps the last features, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last, self.seen = Small(), None, nn.Buffer(torch.zeros(()))
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        y = h if self.last is None else h + self.last
        self.last = h
        self.seen += 1
        self.log.append(len(x))
        return y * self.seen


def test_what_a_model_keeps_is_where_it_was_in_both() -> None:
    model = pruned(Stream())
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    kept = model.last
    fast = escort.convert(model, torch.randn(2, 3, 16, 16))
    assert model.last is kept and float(model.seen) == 1.0 and model.log == [2]
    assert "keeps in itself" in fast.plan.not_tried["graph"] and set(fast.plan.layers) == {
        "inner.first",
        "inner.second",
    }
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 3, 16, 16)
            assert close(fast(x), model(x))


class Noise(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.conv, self.generator = nn.Conv2d(3, 4, 3), torch.Generator() if own else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.rand(y.shape, generator=self.generator)

    def __deepcopy__(self, memo: Any) -> Noise:
        other = Noise(False)
        other.load_state_dict(self.state_dict())
        other.generator = self.generator
        return other.eval()


def test_a_random_model_draws_anew_and_leaves_the_callers_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = Noise(False).eval()
    torch.manual_seed(5)
    fast = escort.convert(model, X)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(fast(X), fast(X))
    with pytest.raises(ValueError, match="not compute the same in two runs .* take out what is random"):
        escort.convert(Noise(True).eval(), X)


class Growing(nn.Module):
    """Returns one tensor more in each call."""

    calls: ClassVar[list[int]] = []  # of the class, as the state of an instance is put back

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls.append(len(self.calls))
        return [x] * len(self.calls)


def test_a_model_that_returns_more_in_each_call() -> None:
    with pytest.raises(ValueError, match="not compute the same in two runs"):
        escort.convert(Growing().eval(), X)


def test_the_state_of_another_model_is_refused_with_what_to_do() -> None:
    model = pruned(Options())
    fast = escort.convert(model, X)
    with pytest.raises(RuntimeError, match="(?s)load another into the original, and convert that again: .*Missing key"):
        fast.load_state_dict(model.state_dict())
    assert fast.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    assert not fast.load_state_dict(fast.state_dict()).missing_keys


def test_inference_mode_around_convert_leaves_nothing_behind() -> None:
    with torch.inference_mode():
        fast = escort.convert(pruned(Small()), torch.randn(2, 3, 16, 16))
    assert not any(tensor.is_inference() for tensor in (*fast.parameters(), *fast.buffers()))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = fast(x)
        fast.second.bias.add_(1.0) if fast.second.bias is not None else fast.first.bias.add_(1.0)
        assert not torch.equal(fast(x), before)


def test_a_frozen_backbone_of_a_model_in_training() -> None:
    whole = nn.Sequential(escort.convert(pruned(Small()), torch.randn(2, 3, 16, 16)), nn.Linear(5, 2))
    whole.train()
    assert whole.training and not any(module.training for module in whole[0].modules())
    whole(torch.randn(2, 3, 16, 16)).sum().backward()
    assert whole[1].weight.grad is not None and not any(p.requires_grad for p in whole[0].parameters())


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, AveragedModel, lambda m: torch.export.export(m, (torch.randn(2, 3, 16, 16),))],
)
def test_models_in_wrappers(wrap: Any) -> None:
    model, x = pruned(Small()), torch.randn(2, 3, 16, 16)
    wrapped = wrap(model)
    model.cpu()  # DataParallel moves the model to a machine's only GPU
    with torch.no_grad():
        fast = escort.convert(wrapped, x)
        assert close(fast(x), model(x)) and (fast.traced or wrap is not AveragedModel)


class Quantizable(nn.Module):
    """As a network is before it is quantized: floats, and modules in the place of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.conv, self.add = nn.Conv2d(3, 3, 3, padding=1), nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        return self.dequant(self.add.add_relu(self.conv(x), x))


def test_a_model_that_is_not_quantized_yet() -> None:
    model = pruned(Quantizable())
    fast = escort.convert(model, X)
    with torch.no_grad():
        assert fast.traced and close(fast(X), model(X))


def test_models_that_cannot_be_converted_say_what_to_pass() -> None:
    model, x = pruned(Small()), torch.randn(2, 3, 16, 16)
    with pytest.raises(TypeError, match="this one is TorchScript; pass the model it was made from"):
        escort.convert(torch.jit.trace(model, x), x)
    with pytest.raises(ValueError, match="layer 0 has no weights yet; call the model once"):
        escort.convert(nn.Sequential(nn.LazyConv2d(3, 3)).eval(), x)
    with pytest.raises(ValueError, match="layer 0 is quantized, .* pass the model from before that"):
        escort.convert(nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 3)).eval(), x)
