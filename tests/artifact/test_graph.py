"""Graphs and arguments as JSON: what fx offers survives the trip, and nothing else gets in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from escort.artifact import arguments, graph
from tests.artifact.networks import through_json


class _Everything(nn.Module):
    """Most of what people write in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.plain = torch.rand(1)

    def forward(self, x: torch.Tensor, y: Any = None, flag: bool = True) -> Any:
        n, _, h, w = x.shape
        x = F.relu(self.conv(x), inplace=True) * self.scale
        z = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
        x = torch.cat([x, z], 1)[:, :8, ..., ::1].to(memory_format=torch.channels_last).contiguous()
        a, b = x.chunk(2, dim=1)
        x = F.hardswish(torch.cat((b, a), 1)[..., :h, :w]).clamp(min=-1.0, max=float("inf")) / 2
        x = F.linear(x.mean((2, 3), dtype=torch.float32).view(x.size(0), -1), self.fc.weight)
        x -= self.fc(x) + self.plain.to("cpu")
        return {"out": (x, [x.softmax(-1)]), "shape": x.shape, "rows": n}


def roots_of(network: fx.GraphModule) -> dict[str, Any]:
    roots: dict[str, Any] = {}
    for node in network.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            value: Any = network
            for part in str(node.target).split("."):
                value = getattr(value, part)
            roots[str(node.target)] = value
    return roots


def test_a_graph_computes_the_same_when_rebuilt() -> None:
    torch.manual_seed(0)
    network = fx.symbolic_trace(_Everything().eval(), {"flag": True})
    back = graph.build_graph(through_json(graph.describe_graph(network.graph)), roots_of(network))
    x = torch.randn(2, 3, 8, 6)
    with torch.inference_mode():
        ours, theirs = back(x), network(x)
    assert torch.equal(ours["out"][0], theirs["out"][0])
    assert torch.equal(ours["out"][1][0], theirs["out"][1][0])
    assert (ours["shape"], ours["rows"]) == (theirs["shape"], theirs["rows"])
    assert isinstance(ours["out"], tuple)


def test_an_exported_graph_computes_the_same_when_rebuilt() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(2, 3, 6, 6)
    network = fx.symbolic_trace(torch.export.export(model, (x,)).module(check_guards=False))
    back = graph.build_graph(through_json(graph.describe_graph(network.graph)), roots_of(network))
    assert torch.equal(back(x), model(x))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -1.5, float("inf"), "bilinear", [1, [2.0]], (1, (2,)), torch.Size([1, 2]), {"a": (1,)}, ...),
        *(slice(None, 3, -1), torch.float16, torch.channels_last, torch.strided, torch.device("cpu")),
    ],
    ids=repr,
)
def test_arguments_come_back(value: Any) -> None:
    back = arguments.decode(through_json(arguments.encode(value)), {})
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value", [1j, object(), torch.ones(1), {1: 2}, range(3), print], ids=lambda v: type(v).__name__
)
def test_other_arguments_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot be saved"):
        arguments.encode(value)


def _saved_by_hand(function: Any) -> fx.Graph:
    built = fx.Graph()
    built.output(built.call_function(function, (built.placeholder("x"),)))
    return built


@pytest.mark.parametrize(
    "function",
    [torch.save, torch.load, torch.compile, torch.from_file, torch.empty_like, torch.as_strided, eval, print],
)
def test_a_function_outside_the_list_is_refused_by_name(function: Any) -> None:
    with pytest.raises(ValueError, match=rf"node {function.__name__}.*: call_function of .*{function.__name__}"):
        graph.describe_graph(_saved_by_hand(function))


def node(op: str, name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


X, Y = node("placeholder", "x", "x"), {"node": "y"}
OUTPUT = node("output", "output", "output", Y)


def a_call(target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> list[dict[str, Any]]:
    return [X, node(op, "y", target, {"node": "x"}, *args, **kwargs), OUTPUT]


CODE = "relu(__import__('os').system('touch HACKED'))"


@pytest.mark.parametrize(
    "nodes",
    [
        a_call("torch.load"),
        a_call("os.system"),
        a_call("builtins.eval"),
        a_call("torch.ops.aten.from_file.default"),
        a_call("torch.ops.aten.set_.source_Storage"),
        a_call("torch.ops.aten.resize_.default"),
        a_call("torch.ops.aten.relu.out"),
        a_call("torch.as_strided", [9], [9]),
        a_call("getattr", "__class__"),
        a_call("getattr", "data_ptr"),
        a_call("getattr", {"node": "x"}),
        a_call("getattr"),
        a_call("getattr", "shape", default=1),
        a_call("apply_", op="call_method"),
        a_call("__reduce__", op="call_method"),
        a_call("set_", op="call_method"),
        a_call("resize_", 99, op="call_method"),
        a_call("numpy", op="call_method"),
        a_call(CODE, op="call_method"),
        a_call("relu();import os", op="call_method"),
        a_call("there.is.none", op="call_module"),
        a_call("conv['x']", op="call_module"),
        a_call('conv", os.system("touch HACKED"), "', op="call_module"),
        a_call("__class__", op="call_module"),
        a_call("conv.__init__", op="get_attr"),
        a_call("forward", op="get_attr"),
        a_call("torch.relu", op="exec"),
        a_call("torch.add", {"node": "later"}),
        a_call("torch.add", {"node": "y"}),
        a_call("torch.add", {"code": CODE}),
        a_call("torch.add", {"node": "x", "tuple": []}),
        a_call("torch.add", {"dtype": "load"}),
        a_call("torch.add", {"layer": {"type": "Sequential", "arguments": {}}}),
        a_call("torch.add", 2**63),
        a_call("torch.add", **{"other=1);import os;(": 1}),
        a_call("torch.add", **{"class": 1}),
        a_call("torch.add", 1, out={"node": "x"}),
        [X, node("call_function", CODE, "torch.relu", {"node": "x"}), OUTPUT],
        [X, node("call_function", "y\nimport os", "torch.relu", {"node": "x"}), OUTPUT],
        [X, node("call_function", "x", "torch.relu", {"node": "x"}), node("output", "output", "output", {"node": "x"})],
        [node("placeholder", "y", f"y=({CODE})"), OUTPUT],
        [node("placeholder", "y", "torch"), OUTPUT],
        [node("placeholder", "y", "class"), OUTPUT],
        [node("placeholder", "y", "y: print(1)"), OUTPUT],
        [node("placeholder", "y", "self"), OUTPUT],
        [node("placeholder", "y", "*self"), OUTPUT],
        [node("placeholder", "y", "__class__"), OUTPUT],
        [
            node("placeholder", "y", "y", {"layer": {"type": "LeakyReLU", "arguments": {"negative_slope": CODE}}}),
            OUTPUT,
        ],
        a_call("torch.relu", {"layer": {"type": "LeakyReLU", "arguments": {"negative_slope": CODE}}}),
        a_call("torch.relu", [{"tuple": [{"layer": {"type": "Identity", "arguments": {}}}]}]),
        a_call("torch.add", **{"__class__": 1}),
        [
            X,
            node("call_function", "self", "torch.relu", {"node": "x"}),
            node("output", "output", "output", {"node": "self"}),
        ],
        [X, node("call_function", "__y", "torch.relu", {"node": "x"}), OUTPUT],
        a_call("conv.__builtins__.get", "eval", op="call_module"),
        a_call("backward.__builtins__", op="get_attr"),
        [X, node("call_function", "y", "operator.pow", 9**18, 10**7), OUTPUT],
        [X, node("call_function", "y", "operator.mul", "a", 2**60), OUTPUT],
        [X, node("call_function", "y", "math.prod", [2] * 100), OUTPUT],
        a_call("operator.pow", 10**7),
        a_call("operator.mul", {"tuple": [1]}),
        [X, node("call_function", "y", "operator.mul", {"tuple": [{"node": "x"}]}, 2**60), OUTPUT],
        a_call("operator.ipow", {"node": "x"}),
        a_call("operator.mul", "a"),
        [*a_call("torch.relu"), OUTPUT],
        [OUTPUT, *a_call("torch.relu")],
        [*a_call("torch.relu"), node("call_function", "z", "torch.relu", Y)],
        a_call("torch.relu")[:-1],
        [],
        [{"op": "placeholder"}],
        ["placeholder"],
    ],
    ids=str,
)
def test_a_forged_graph_is_refused(nodes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.system", lambda command: pytest.fail(f"it ran {command}"))
    with pytest.raises((ValueError, TypeError, KeyError, SyntaxError)):
        graph.build_graph(nodes, {"conv": nn.Conv2d(3, 4, 1)})


def test_text_in_arguments_stays_text() -> None:
    text = "'); import os; os.system('touch HACKED'); ('\"\\"
    nodes = [X, node("output", "output", "output", [{"node": "x"}, text, {"dict": {text: text}}])]
    assert graph.build_graph(nodes, {})(1) == [1, text, {text: text}]


@pytest.mark.parametrize(
    "path",
    ["", ".", "a..b", "a b", "a.b;c", "forward", "a.training", "_modules", "é", "a\n", 3, "__class__", "a.__b__"],
)
def test_a_path_that_could_be_more_than_a_name_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match="rename it"):
        graph.check_path(path)
