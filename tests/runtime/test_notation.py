"""Programs and values as JSON: what a program holds survives the trip, and nothing else gets in."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from escort.runtime import Program
from escort.runtime.saved import notation, values
from escort.runtime.saved.description import tensors_read
from escort.runtime.saved.limits import MAX_DEPTH, MAX_NAME, MAX_NUMBERS, MAX_OPERANDS, MAX_PATH, MAX_STEPS, MAX_TEXT
from escort.runtime.saved.rehearsal import rehearse
from escort.runtime.steps import Listing
from escort.runtime.templates import named_tuple
from tests.artifact.networks import through_json
from tests.network.patterns import traced

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["first", "second"])


class _Everything(nn.Module):
    """Most of what people write in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.plain = torch.rand(1)

    def forward(self, x: Tensor, y: Any = None, flag: bool = True) -> Any:
        n, _, h, w = x.shape
        x = F.relu(self.conv(x), inplace=True) * self.scale
        z = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
        x = torch.cat([x, z], 1)[:, :8, ..., ::1].to(memory_format=torch.channels_last).contiguous()
        a, b = x.chunk(2, dim=1)
        x = F.hardswish(torch.cat((b, a), 1)[..., :h, :w]).clamp(min=-1.0, max=float("inf")) / 2
        x = F.linear(x.mean((2, 3), dtype=torch.float32).view(x.size(0), -1), self.fc.weight)
        x -= self.fc(x) + self.plain.to("cpu")
        return {"out": (x, [x.softmax(-1)]), "shape": x.shape, "rows": n, "pair": Pair(x + 1, x.dtype)}


def owned_by(program: Program) -> Any:
    def owned(listing: Listing) -> dict[str, Any]:
        layers = {s.target: program.get_submodule(s.target) for s in listing.steps if s.kind == "layer"}
        return layers | tensors_read(program)

    return owned


def rebuilt(program: Program) -> Program:
    record = through_json(notation.describe_program(program))
    back = notation.build_program(record, owned_by(program))
    rehearse(back, CPU)
    assert notation.describe_program(back) == record
    return back


def test_a_program_computes_the_same_when_rebuilt() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6)
    program = Program.of(traced(_Everything().eval(), x))
    back = rebuilt(program)
    for samples in (2, 5):
        x = torch.randn(samples, 3, 8, 6)
        with torch.inference_mode():
            ours, theirs = back(x), program(x)
        assert torch.equal(ours["out"][0], theirs["out"][0])
        assert torch.equal(ours["out"][1][0], theirs["out"][1][0])
        assert (ours["shape"], ours["rows"]) == (theirs["shape"], theirs["rows"])
        assert isinstance(ours["out"], tuple)
        assert torch.equal(ours["pair"].first, theirs["pair"].first)
        assert (type(ours["pair"]).__name__, ours["pair"]._fields) == ("Pair", Pair._fields)


def test_an_exported_program_computes_the_same_when_rebuilt() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(2, 3, 6, 6)
    network = traced(fx.symbolic_trace(torch.export.export(model, (x,)).module(check_guards=False)), x)
    assert torch.equal(rebuilt(Program.of(network))(x), model(x))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -1.5, float("inf"), "bilinear", [1, [2.0]], (1, (2,)), torch.Size([1, 2]), {"a": (1,)}, ...),
        *(slice(None, 3, -1), torch.float16, torch.channels_last, torch.strided, torch.device("cpu")),
        *(OrderedDict(b=1, a=2), named_tuple("Pair", ("first", "count"))(1, 2)),
    ],
    ids=repr,
)
def test_values_come_back(value: Any) -> None:
    back = values.decode(through_json(values.encode(value)))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value", [1j, object(), torch.ones(1), {1: 2}, range(3), print], ids=lambda v: type(v).__name__
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot be saved"):
        values.encode(value)


def deep(levels: int) -> Any:
    return 1 if levels == 0 else [deep(levels - 1)]


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (2**63 - 1, 2**63),
        (-(2**63) + 1, -(2**63)),
        ("a" * MAX_TEXT, "a" * (MAX_TEXT + 1)),
        (deep(MAX_DEPTH), deep(MAX_DEPTH + 1)),
        ({"dict": [["a" * MAX_NAME, 1]]}, {"dict": [["a" * (MAX_NAME + 1), 1]]}),
        ({"dict": [["a", 1], ["b", 1]]}, {"dict": [["a", 1], ["a", 1]]}),
        ({"slice": [1, 2, 3]}, {"slice": [1, 2, 3, 4]}),
        ({"tuple": [1]}, {"tuple": "ab"}),
        ({"size": [1]}, {"size": [True]}),
        ({"size": [0]}, {"size": [-1]}),
        ({"float": "nan"}, {"float": "1e9"}),
        ({"device": "cuda:1"}, {"device": "cuda:1\n"}),
        ({"device": "cpu"}, {"device": "meta"}),
        ({"dtype": "float16"}, {"dtype": "load"}),
        ({"value": 0}, {"value": "0"}),
        ({"value": 1}, {"value": True}),
        (
            {"named_tuple": {"name": "P", "fields": ["a"], "values": [1]}},
            {"named_tuple": {"name": "P", "fields": ["a"], "values": [1, 2]}},
        ),
        (
            {"named_tuple": {"name": "P", "fields": ["a", "b"], "values": [1, 2]}},
            {"named_tuple": {"name": "P", "fields": ["a", "a"], "values": [1, 2]}},
        ),
        (
            {"named_tuple": {"name": "P", "fields": ["a"], "values": [1]}},
            {"named_tuple": {"name": "P", "fields": ["__class__"], "values": [1]}},
        ),
        (
            {"named_tuple": {"name": "P", "fields": ["a"], "values": [1]}},
            {"named_tuple": {"name": "P, x=print(1)", "fields": ["a"], "values": [1]}},
        ),
        ({"ellipsis": None}, {"eval": "1"}),
        ({"tuple": []}, {"tuple": [], "size": []}),
        ({"tuple": []}, {}),
        ({"tuple": []}, {"layer": {"type": "Identity", "arguments": {}}}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_within_the_limits_and_beyond(allowed: Any, refused: Any) -> None:
    values.decode(through_json(allowed))
    with pytest.raises((ValueError, TypeError, KeyError)):
        values.decode(through_json(refused))


def program_of(function: Any) -> Program:
    built = fx.Graph()
    built.output(built.call_function(function, (built.placeholder("x"),)))
    return Program.of(fx.GraphModule({}, built))


@pytest.mark.parametrize(
    "function",
    [torch.save, torch.load, torch.compile, torch.from_file, torch.empty_like, torch.as_strided, eval, print],
)
def test_a_function_outside_the_list_is_refused_by_name(function: Any) -> None:
    with pytest.raises(ValueError, match=rf"step %1 = {function.__name__}.*: a call of .*{function.__name__}"):
        notation.describe_program(program_of(function))


CODE = "relu(__import__('os').system('touch HACKED'))"
X, Y = {"value": 0}, {"value": 1}


def call(target: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"call": target, "args": list(args), **({"kwargs": kwargs} if kwargs else {})}


def layer(target: Any, *args: Any) -> dict[str, Any]:
    return {"layer": target, "args": list(args)}


def program(*steps: Any, inputs: Any = None, output: Any = None) -> dict[str, Any]:
    given = [{"name": "x", "shape": [2, 3, 8, 8], "dtype": "float32"}] if inputs is None else inputs
    return {"inputs": given, "steps": list(steps), "output": {"value": len(steps)} if output is None else output}


def built(record: Any, limit: Any = None) -> Program:
    """What a reader makes of it."""
    layers = {"conv": nn.Conv2d(3, 4, 1), "conv-1": nn.ReLU()}
    tensors = {"conv.weight": layers["conv"].weight}
    result = notation.build_program(
        record,
        lambda listing: {s.target: (layers | tensors)[s.target] for s in listing.steps if s.kind != "call"},
    )
    rehearse(result, CPU)
    return result


def test_what_is_forged_below_would_be_allowed_otherwise() -> None:
    record = program(layer("conv", X), layer("conv-1", Y), call("torch.add", {"value": 2}, 1))
    assert built(record)(torch.zeros(1, 3, 4, 4)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    "record",
    [
        *(program(call(target, X)) for target in ("torch.load", "os.system", "builtins.eval", "getattr", "", CODE)),
        *(program(call(target, X)) for target in ("torch.ops.aten.from_file.default", "torch.ops.aten.relu.out")),
        *(
            program(call(target, X))
            for target in ("torch.ops.aten.set_.source_Storage", "torch.ops.aten.resize_.default")
        ),
        *(program(call(f"Tensor.{name}", X)) for name in ("apply_", "__reduce__", "set_", "numpy", "data_ptr", "item")),
        *(
            program(call(f"Tensor.{name}", X))
            for name in ("__class__", "grad", "storage", "tolist", "relu();import os")
        ),
        *(program(call(f"torch.ops.aten.{name}", X)) for name in ("mul.left_t", "add.t", "add.str", "pow.int_to_int")),
        *(program(call(f"torch.ops.aten.{name}", X)) for name in ("div.out_mode", "sort.any", "split.str", "relu.out")),
        program(call(["torch.relu"], X)),
        program(call(None, X)),
        program(call("torch.as_strided", X, [9], [9])),
        program(call("Tensor.resize_", X, 99)),
        program(call("Tensor.shape", X, 1)),
        program(call("Tensor.shape", [X])),
        program(call("Tensor.shape", X), call("Tensor.shape", Y)),
        *(program(layer(path, X)) for path in ("there.is.none", "conv['x']", "__class__", "forward", "training", "")),
        *(program({"tensor": path}) for path in ("conv.__init__", "forward", "conv.stride", "conv", "_modules")),
        program({"tensor": "conv.weight", "args": []}),
        program({"exec": "torch.relu", "args": [X]}),
        program({"call": "torch.relu", "layer": "conv", "args": [X]}),
        program({"call": "torch.relu", "args": {"0": X}}),
        program({"call": "torch.relu"}),
        program(call("torch.add", X, {"value": 1})),
        program(call("torch.add", X, {"value": 99})),
        program(call("torch.add", X, {"value": -1})),
        program(call("torch.add", X, {"value": 2**70})),
        program(call("torch.add", X, {"value": 0.0})),
        program(call("torch.add", X, {"code": CODE})),
        program(call("torch.add", X, {"value": 0, "tuple": []})),
        program(call("torch.add", X, {"layer": {"type": "Identity", "arguments": {}}})),
        program(call("torch.add", X, 2**63)),
        program(call("torch.add", X, **{"other=1);import os;(": 1})),
        program(call("torch.add", X, **{"__class__": 1})),
        program(call("torch.add", X, 1, out=X)),
        program(call("torch.relu", X), output={"value": 2}),
        program(call("torch.relu", X), output={"value": -1}),
        program(inputs=[{"name": f"y=({CODE})", "default": 1}]),
        program(inputs=[{"name": "__class__", "default": 1}]),
        program(inputs=[{"name": "***y", "default": 1}]),
        program(inputs=[{"name": 1, "default": 1}]),
        program(inputs=[{"name": "y", "default": {"value": 0}}]),
        program(inputs=[{"name": "y", "default": 1}, {"name": "y", "default": 1}]),
        program(inputs=[{"name": "y", "default": 1, "code": CODE}]),
        program(inputs=[{"name": "y"}]),
        program(inputs=[{"name": "y", "shape": [-1, 3], "dtype": "float32"}]),
        program(inputs=[{"name": "y", "shape": [True], "dtype": "float32"}]),
        program(inputs=[{"name": "y", "shape": [2.0], "dtype": "float32"}]),
        program(inputs=[{"name": "y", "shape": [2], "dtype": "load"}]),
        program(inputs=[{"name": "y", "shape": [2]}]),
        program(inputs={"name": "y"}),
        {"inputs": [], "steps": {}, "output": None},
        {"inputs": [], "steps": []},
        {},
        program("torch.relu"),
        program([]),
    ],
    ids=lambda record: str(record)[:120],
)
def test_a_forged_program_is_refused(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.system", lambda command: pytest.fail(f"it ran {command}"))
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        built(record)


def test_text_in_an_output_stays_text() -> None:
    text = "'); import os; os.system('touch HACKED'); ('\"\\"
    assert built(program(output=[X, text, {"dict": [[text, text]]}]))(1) == [1, text, {text: text}]


@pytest.mark.parametrize(
    "path",
    ["", ".", "a..b", "a.b;c", "a'b", 'a"b', "a\n", "a\x1b[31m", 3, "__class__", "a.__b__", "a" * (MAX_NAME + 1)],
)
def test_a_path_that_could_be_more_than_a_name_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match="rename it"):
        notation.check_path(path)


@pytest.mark.parametrize("path", ["a", "0", "conv-1.b", "a b", "é", "Mixed_7c/b.1x1", "a" * MAX_NAME])
def test_a_path_is_made_of_labels(path: str) -> None:
    notation.check_path(path)
    notation.check_path(".".join([path] * (MAX_PATH // (len(path) + 1))))
    with pytest.raises(ValueError, match="rename it"):
        notation.check_path(".".join([path] * (MAX_PATH // len(path) + 1)))


def relus(count: int) -> dict[str, Any]:
    return program(*(call("torch.relu", {"value": number}) for number in range(count)))


def test_the_number_of_steps_is_limited() -> None:
    record = relus(MAX_STEPS)
    notation.build_program(record, lambda listing: {})
    with pytest.raises(ValueError, match=f"at most {MAX_STEPS} steps"):
        notation.build_program(relus(MAX_STEPS + 1), lambda listing: {})


def test_the_number_of_operands_is_limited() -> None:
    built(program(call("torch.cat", [X] * MAX_OPERANDS)))
    built(program(output=[X] * MAX_OPERANDS))
    for record in (
        program(call("torch.cat", [X] * (MAX_OPERANDS + 1))),
        program(output=[X] * (MAX_OPERANDS + 1)),
    ):
        with pytest.raises(ValueError, match=f"more than {MAX_OPERANDS} values"):
            built(record)


def test_the_size_of_an_input_is_limited() -> None:
    built(program(inputs=[{"name": "y", "shape": [MAX_NUMBERS], "dtype": "float32"}]))
    built(program(inputs=[{"name": "y", "shape": [1] * 16, "dtype": "float32"}]))
    for shape in ([MAX_NUMBERS + 1], [2**15, 2**16], [1] * 17, [0, 2**40]):
        with pytest.raises(ValueError, match="no network takes an input of shape"):
            built(program(inputs=[{"name": "y", "shape": shape, "dtype": "float32"}]))
