"""A program does what its graph does, wherever torch takes it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import escort
from escort.layers import SparseConv2d
from escort.network.model import ConvertedModel
from escort.planner import timing
from escort.runtime import Program, as_programs
from escort.runtime.steps import Input, Listing, Step
from escort.runtime.templates import Slot, named_tuple
from tests.network.models import pruned

Result = namedtuple("Result", ["scores", "features"])


class Sum(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


class Labelled(nn.Module):
    """Its layers are called as no attribute can be, and it returns what holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"conv-1": nn.Conv2d(3, 8, 3, padding=1), "2": nn.Conv2d(8, 8, 3, padding=1)})
        self.output = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("shift", torch.rand(8, 1, 1))

    def forward(self, x: Tensor, factor: float = 2.0) -> Any:
        y = F.relu(self.blocks["conv-1"](x)) * self.scale + self.shift
        samples, channels, height, width = y.shape
        y = self.blocks["2"](y) + y * factor
        z = F.dropout(y.view(samples, channels, height * width).mean(2), 0.5, self.training)
        return {"result": Result(self.output(z), [z, y.size(0)]), "shape": y.shape}


class Tensors(Labelled):
    def forward(self, x: Tensor, factor: float = 2.0) -> Any:
        return super().forward(x, factor)["result"].scores


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X3 = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", autouse=True)
def always_converted() -> Iterator[None]:
    """Conversion always pays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [2.0, *[1.0] * (len(runs) - 1)])
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return pruned(Labelled())


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> ConvertedModel:
    converted = escort.convert(model, X)
    assert type(converted.network) is Program and converted.traced
    return converted


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_same(ours: Any, theirs: Any) -> None:
    for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        else:
            assert one == other


def test_what_it_returns_has_the_types_of_the_model(model: nn.Module, fast: ConvertedModel) -> None:
    ours, theirs = fast(X3), model(X3)
    assert_same(ours, theirs)
    assert type(ours["result"]) is Result and type(ours["shape"]) is torch.Size


def test_layers_keep_their_paths(fast: ConvertedModel, model: nn.Module) -> None:
    assert isinstance(fast.network.get_submodule("blocks.conv-1"), SparseConv2d)
    assert isinstance(fast.network.get_submodule("output"), nn.Linear)
    assert {"scale", "shift", "output.weight", "output.bias"} <= fast.network.state_dict().keys()
    state = {key: value + 1 for key, value in fast.network.state_dict().items() if key in ("scale", "shift")}
    changed = copy.deepcopy(fast)
    changed.network.load_state_dict(state, strict=False)
    changed_model = copy.deepcopy(model)
    changed_model.load_state_dict(state, strict=False)
    assert_same(changed(X), changed_model(X))


def test_steps_that_do_nothing_are_left_out(fast: ConvertedModel) -> None:
    assert "dropout" not in str(fast.network) and "%" in str(fast.network)


@pytest.mark.parametrize(
    "take",
    [
        lambda fast: torch.compile(fast, fullgraph=True, backend="aot_eager"),
        lambda fast: torch.export.export(fast, (X,)).module(),
        lambda fast: torch.export.export(fast, (X,), strict=True).module(),
        lambda fast: make_fx(fast)(X),
        copy.deepcopy,
        lambda fast: pickle.loads(pickle.dumps(fast)),
        lambda fast: copy.deepcopy(fast).to("cpu"),
    ],
    ids=["compile", "export", "strict export", "make_fx", "deepcopy", "pickle", "to"],
)
def test_where_torch_takes_it(take: Callable[[Any], Any], fast: ConvertedModel, model: nn.Module) -> None:
    torch._dynamo.reset()
    assert_same(take(fast)(X), model(X))


def test_any_batch_when_compiled_and_exported(fast: ConvertedModel, model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    samples = torch.export.Dim("samples", min=2, max=64)
    exported = torch.export.export(fast, (X,), dynamic_shapes={"x": {0: samples}}).module()
    for run in (compiled, exported):
        for x in (X, X3, torch.cat((X, X3))):
            assert_same(run(x), model(x))


def test_traces_and_transforms() -> None:
    torch.manual_seed(0)
    model = pruned(Tensors())
    fast = escort.convert(model, X)
    assert_same(torch.jit.trace(fast, (X,), check_trace=False)(X), model(X))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(X3)).shape == (3, 4)
    batches = torch.stack((X, X + 1))
    assert_same(torch.vmap(fast)(batches), torch.stack([model(x) for x in batches]))


def test_a_layer_in_the_place_of_another_is_called() -> None:
    network = Program.of(fx.symbolic_trace(nn.Sequential(OrderedDict(a=nn.Sequential(nn.ReLU()), b=nn.Sigmoid()))))
    x = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(network(x), x.relu().sigmoid())
    network.set_submodule("a.0", nn.Tanh())
    torch.testing.assert_close(network(x), x.tanh().sigmoid())
    network.a = nn.Sequential(nn.Identity())
    torch.testing.assert_close(network(x), x.sigmoid())
    network.a[0].register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(network(x), (x + 1).sigmoid())


class Counting(nn.ReLU):
    """Counts the calls that went through torch's module."""

    calls = 0

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super()._call_impl(*args, **kwargs)


@pytest.mark.parametrize("hooks", ["none", "before", "behind", "of all modules", "another layer", "a forward"])
def test_what_torch_does_around_a_layer_is_left_out_where_nothing_wants_it(hooks: str) -> None:
    layer = Counting()
    network = Program(Listing((Input("x"),), (Step("layer", "a", (Slot(0),)),), Slot(1)), {"a": layer})
    network.native.enabled = False
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(network(x), x.relu()) and layer.calls == 0
    handle, expected, calls = None, x.relu(), 1
    match hooks:
        case "before":
            handle = layer.register_forward_pre_hook(lambda module, args: (-args[0],))
            expected = (-x).relu()
        case "behind":
            handle = layer.register_forward_hook(lambda module, args, output: output + 1)
            expected = x.relu() + 1
        case "of all modules":
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, args, output: output + 1 if module is layer else None
            )
            expected = x.relu() + 1
        case "another layer":
            before, layer = layer, Counting()
            network.a = layer
            assert before.calls == 0
        case "a forward":
            layer.forward = torch.sigmoid  # type: ignore[method-assign]
            expected, calls = x.sigmoid(), 0
        case _:
            calls = 0
    assert torch.equal(network(x), expected) and layer.calls == calls
    if handle is not None:
        handle.remove()
        assert torch.equal(network(x), x.relu()) and layer.calls == calls
    gone = weakref.ref(layer)
    if hooks == "none":
        network.a = nn.ReLU()
        del layer
        assert torch.equal(network(x), x.relu()) and gone() is None, "what was replaced is not kept"


def test_a_value_lives_until_its_last_reader() -> None:
    seen: list[Any] = []

    def watched(x: Tensor) -> Tensor:
        y = x + 1
        seen.append(weakref.ref(y))
        return y

    def alive(x: Tensor) -> Tensor:
        gc.collect()
        seen.append([reference() is not None for reference in seen if isinstance(reference, weakref.ref)])
        return x * 2

    one, two = (Step("call", watched, (Slot(number),)) for number in (0, 1))
    steps = (one, two, Step("call", alive, (Slot(2),)), Step("call", torch.add, (Slot(3), Slot(1))))
    program = Program(Listing((Input("x"),), steps, Slot(4)), {})
    assert program.listing.last_reads() == [(0,), (), (2,), (1, 3)]
    assert program(torch.zeros(1)).item() == 5.0
    assert seen[2] == [True, True]  # the second is an argument of the call itself


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1,), {}, (1, 2, 3)),
        ((1, 5), {}, (1, 5, 3)),
        ((), {"b": 5, "a": 1}, (1, 5, 3)),
        ((1,), {"c": 7}, (1, 2, 7)),
        ((), {}, "takes .a, b, c., got no a$"),
        ((), {"b": 1, "image": 2}, "takes .a, b, c., got no a, but image$"),
        ((1, 2, 3, 4), {}, "takes .a, b, c., got 4 by position"),
        ((1,), {"a": 1}, "takes .a, b, c., got several values for a"),
        ((1,), {"d": 1}, "takes .a, b, c., got 1 by position and d by name"),
    ],
)
def test_inputs_by_place_and_by_name(args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> None:
    inputs = Input("a"), Input("b", 2), Input("c", 3)
    program = Program(Listing(inputs, (), (Slot(0), Slot(1), Slot(2))), {})
    if isinstance(expected, str):
        with pytest.raises(TypeError, match=expected):
            program(*args, **kwargs)
    else:
        assert program(*args, **kwargs) == expected


def test_inputs_that_take_what_is_left() -> None:
    inputs = Input("a"), Input("*rest"), Input("**named")
    program = Program(Listing(inputs, (), [Slot(0), Slot(1), Slot(2)]), {})
    assert program(1, 2, 3, b=4) == [1, (2, 3), {"b": 4}]


@pytest.mark.parametrize("path", ["listing", "forward", "training.a", "_modules", "a..b", "of.a"])
def test_a_name_that_a_module_needs_is_refused(path: str) -> None:
    step = Step("layer", path, (Slot(0),))
    with pytest.raises(ValueError, match="cannot be the name of a layer or tensor"):
        Program(Listing((Input("x"),), (step,), Slot(1)), {path: nn.ReLU()})


def test_a_list_is_a_new_one_in_every_run() -> None:
    def emptied(items: list[int]) -> int:
        return items.pop()

    program = Program(Listing((), (Step("call", emptied, ([1, 2],)),), [Slot(0), []]), {})
    assert program() == program() == [2, []]
    program()[1].append(1)
    assert program() == [2, []]


def test_a_replica_calls_its_own_layers() -> None:
    network = Program.of(fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    assert network(torch.tensor([-1.0])).item() == 0.0
    replica = network._replicate_for_data_parallel()
    replica._modules["0"] = nn.Identity()
    assert replica(torch.tensor([-1.0])).item() == -1.0
    assert network(torch.tensor([-1.0])).item() == 0.0
    state = {"scale": torch.tensor([3.0])}
    step = Step("tensor", "scale")
    scaled = Program(Listing((), (step,), Slot(0)), {"scale": nn.Parameter(torch.ones(1))})
    assert torch.func.functional_call(scaled, state, ()).item() == 3.0 and scaled().item() == 1.0


def test_programs_in_the_place_of_graphs_within_a_model() -> None:
    model = nn.Sequential(fx.symbolic_trace(nn.Sequential(nn.ReLU())), nn.Linear(2, 2))
    x = torch.randn(3, 2)
    expected = model(x)
    assert as_programs(model) is model and type(model[0]) is Program
    assert torch.equal(model(x), expected)


def test_a_graph_that_no_program_can_hold_stays() -> None:
    x = torch.randn(3)
    exported = torch.export.export(Sum(), ((x, x),)).module()  # its inputs are packed in a tuple
    model = nn.Sequential(exported)
    assert as_programs(model) is model and model[0] is exported
    assert torch.equal(model((x, x)), x + x)


def test_a_named_tuple_made_without_source() -> None:
    made = named_tuple("Pair", ("first", "count"))
    pair = made(1, [2])
    assert (pair.first, pair.count, tuple(pair), pair._asdict()) == (1, [2], (1, [2]), {"first": 1, "count": [2]})
    assert made is named_tuple("Pair", ("first", "count")) and repr(pair) == "Pair(first=1, count=[2])"
    back = pickle.loads(pickle.dumps(pair))
    assert type(back) is made and back == pair and type(copy.deepcopy(pair)) is made
    assert tree_leaves(pair) == [1, 2]
    with pytest.raises(TypeError, match="has the fields"):
        made(1)
