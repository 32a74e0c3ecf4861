"""Tracing: graphs compute what their modules compute, and a module that has none says why and stays as it was."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

from escort.network.example import Example
from escort.network.original import plain_copy
from escort.network.tracing.graphs import graphs
from escort.network.tracing.trace import trace
from escort.runtime import Program
from tests.network.models import Block, Checked
from tests.network.patterns import MORE, SAMPLES, Net, traced


def paths(model: nn.Module, *args: Any, stateful: frozenset[str] = frozenset(), **kwargs: Any) -> list[str]:
    """Where a network has graphs, the whole by an empty name, once it was checked on two inputs."""
    network, _ = trace(plain_copy(model), Example(args, kwargs), stateful)
    with torch.no_grad():
        assert torch.equal(network(*args, **kwargs), model(*args, **kwargs))
    return [path for path, _ in graphs(network)]


def test_the_callers_input_is_not_written_to_by_tracing() -> None:
    x = SAMPLES.clone()
    traced(Net(lambda net, x: net.conv2(net.relu(net.conv(x)))), x)
    assert torch.equal(x, SAMPLES)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (lambda net, x: net.conv(x) if x.sum() > 0 else x, r"control flow \(at .*test_trace.py:\d+: .*x.sum\(\) > 0"),
        (lambda net, x: net.conv(torch.zeros(len(x), 3, 8, 8)), "len"),
    ],
)
def test_what_cannot_be_traced_says_why(pattern: Callable[[Any, Any], Any], reason: str) -> None:
    network, why_not = trace(plain_copy(Net(pattern)), Example((SAMPLES,)))
    assert isinstance(network, Net)
    assert re.match(f"Net: .*{reason}", str(why_not))


def test_an_assignment_that_fx_would_get_wrong_is_found() -> None:
    def pattern(net: Any, x: Any) -> Any:
        y = z = net.conv(x)
        y += 1.0
        return z

    network, why_not = trace(plain_copy(Net(pattern)), Example((SAMPLES,)))
    assert isinstance(network, Net) and "computes something else" in str(why_not)


def test_running_out_of_memory_is_no_reason_to_give_up_the_graph() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20 GiB"):
        trace(Large(), Example((SAMPLES,)))


class Gate(nn.Module):
    """Not traceable: what it does depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


class Around(nn.Module):
    """Traceable around what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = Block(), Gate(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x)) * 2.0)


class Routed(nn.Module):
    """Runs its blocks as their attributes say, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(0), Block()])

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.blocks:
            kept.append(block(x if block.source < 0 else kept[block.source]))
            x = kept[-1]
        return x if len(x) else x * 0.0


def test_what_is_not_traceable_is_called_by_the_graph_around_it_and_has_graphs_inside() -> None:
    torch.manual_seed(0)
    assert paths(Around().eval(), SAMPLES) == ["", "gate.inner"]
    assert paths(Gate().eval(), SAMPLES) == ["inner"]


def test_modules_keep_the_attributes_that_the_code_around_them_reads() -> None:
    torch.manual_seed(0)
    assert paths(Routed().eval(), SAMPLES) == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_module_that_is_called_in_several_ways_has_no_graph() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled(x) + self.scaled(x, 3.0) * float(len(x))

    assert paths(Twice().eval(), SAMPLES) == []


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, height: int) -> Tensor:
        return nn.functional.interpolate(self.block(x), size=(height, height))


def test_a_number_that_code_passes_on_may_depend_on_the_size() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = Upsampled()

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, 2 * x.shape[2]) * float(len(x))

    model = Around().eval()
    network, _ = trace(plain_copy(model), Example((SAMPLES,)))
    assert [path for path, _ in graphs(network)] == ["up.block"]
    with torch.no_grad():
        for x in (SAMPLES, torch.randn(1, 3, 7, 7)):
            assert torch.equal(network(x), model(x))


def test_what_keeps_state_is_called_as_it_is() -> None:
    torch.manual_seed(0)
    network, _ = trace(Around().eval(), Example((SAMPLES,)), frozenset(["first"]))
    assert isinstance(network, fx.GraphModule) and isinstance(network.first, Block)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 2.0, *, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x) * scale
        return y if mask is None else y * mask


class Appends(nn.Module):
    """Changes the list that it is called with, and so has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, maps: list[Tensor], options: dict[str, float]) -> Tensor:
        maps[0] = self.block(maps[0])
        options["scale"] += 1.0
        return sum(maps) * options["scale"] if maps[0].sum() > -1e9 else maps[0]


def test_a_module_may_change_the_list_that_a_graph_calls_it_with() -> None:
    model = Net(lambda net, x: net.appends([x, x * 2.0], {"scale": 1.0}))
    model.appends = Appends().eval()
    assert paths(model, SAMPLES) == ["", "appends.block"]


class Collects(nn.Module):
    """Takes a list, which no graph of its own could, and calls what is not traceable."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = Block(), Gate()

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.gate(self.first(maps[0])) + maps[1]


def test_a_module_that_takes_a_list_is_part_of_the_graph_around_it() -> None:
    model = Net(lambda net, x: net.collects([x, x * 2.0]))
    model.collects = Collects().eval()
    assert paths(model, SAMPLES) == ["", "collects.gate.inner"]
    called = {str(node.target) for node in traced(model, SAMPLES).graph.nodes if node.op == "call_module"}
    assert called == {"collects.first.conv", "collects.first.norm", "collects.gate"}


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.chunk(2, 1),
        lambda x: torch.chunk(x, chunks=2, dim=1),
        lambda x: x.split((6, 2), 1),
        lambda x: torch.split(x, [6, 2], dim=1),
        lambda x: x.split(split_size=[6, 2], dim=1),
    ],
)
def test_pieces_are_counted_and_gone_through(cut: Callable[[Tensor], Any]) -> None:
    def pattern(net: Any, x: Tensor) -> Tensor:
        pieces = list(cut(net.conv(x)))
        pieces.extend(torch.sigmoid(piece) for piece in pieces[:])
        first, *others = cut(net.conv(x))
        assert len(others) == 1
        return torch.cat([*pieces, first], 1)

    model = Net(pattern)
    graph = traced(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(graph(MORE), model(MORE))


def test_pieces_whose_number_depends_on_the_input_are_not_counted() -> None:
    network, _ = trace(Net(lambda net, x: torch.cat([*net.conv(x).split(3, 2)], 1)), Example((SAMPLES[:, :, :9],)))
    assert isinstance(network, Net)


@pytest.mark.parametrize("read", [lambda x: x.ndim, lambda x: x.dim()])
def test_a_check_of_dimensions_does_not_keep_the_convolutions_output(read: Callable[[Tensor], Any]) -> None:
    def pattern(net: Any, x: Tensor) -> Tensor:
        y = net.conv2(net.conv(x))
        torch._assert(read(y) == 4, "it takes a batch")
        return net.norm(y)

    graph = traced(Net(pattern), SAMPLES)
    assert [len(node.users) for node in graph.graph.nodes if str(node.target).startswith("conv")] == [1, 1]
    with pytest.raises(AssertionError, match="it takes a batch"):
        graph(SAMPLES[0])


@fx.wrap
def dropped_in_training(x: Tensor, training: bool) -> Tensor:
    return x * 0.0 if training else x


@fx.wrap
def depends(x: Tensor) -> Tensor:
    y = x * 2.0
    return y if y.sum() > -1e9 else x


def test_functions_that_a_library_wraps_are_looked_into_where_that_is_possible() -> None:
    def pattern(net: Any, x: Tensor) -> Tensor:
        return depends(dropped_in_training(net.conv(x), net.training))

    targets = [node.target for node in traced(Net(pattern), SAMPLES).graph.nodes if node.op == "call_function"]
    assert targets == [depends]


def test_arguments_keep_their_names_and_those_that_are_no_tensors_their_values() -> None:
    model, mask = Scaled().eval(), torch.rand(2, 1, 10, 9)
    program = Program.of(traced(model, SAMPLES, 3.0, mask=mask))
    with torch.no_grad():
        for call in (lambda m: m(SAMPLES, 3.0, mask=mask), lambda m: m(x=SAMPLES, mask=2 * mask, scale=3.0)):
            assert torch.equal(call(program), call(model))
    for wrong, says in (
        (lambda: program(SAMPLES, 2.0, mask=mask), r"scale was 3.0 when the model was converted, and is 2.0 now"),
        (lambda: program(SAMPLES, mask=mask), r"scale was 3.0 when the model was converted, and is 2.0 now; pass it"),
        (lambda: program(SAMPLES, 3.0), "mask was a tensor when the model was converted, and is None now"),
        (lambda: Program.of(traced(model, SAMPLES))(SAMPLES, mask=mask), "mask was None when .*, and is a tensor now"),
    ):
        with pytest.raises(ValueError, match=says):
            wrong()


def test_checks_that_raise_are_made_by_the_graph() -> None:
    graph = traced(Checked().eval(), SAMPLES)
    assert graph(torch.randn(5, 3, 7, 6)).shape == (5, 4, 7, 6)
    for shape, check in (
        ((1, 3, 2, 6), "if channels"),
        ((1, 3, 7, 7), "if width % 3"),
        ((1, 4, 7, 6), "assert x.ndim"),
    ):
        with pytest.raises(AssertionError, match=rf"the check at models.py:\d+ failed: {check}"):
            graph(torch.randn(shape))


def test_a_branch_that_computes_is_not_decided_by_the_example() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] % 4:
                x = nn.functional.pad(x, (0, 4 - x.shape[-1] % 4))
            return self.block(x)

    model = Padded().eval()
    network, why_not = trace(plain_copy(model), Example((SAMPLES,)))
    assert "control flow" in str(why_not) and [path for path, _ in graphs(network)] == ["block"]
    with torch.no_grad():
        for width in (8, 9, 11):
            x = torch.randn(1, 3, 8, width)
            assert torch.equal(network(x), model(x))


def test_hooks_of_any_module_are_called() -> None:
    seen: list[str] = []
    model = nn.Sequential(Block(), nn.ReLU(), nn.Sequential(Block(), nn.MaxPool2d(2))).eval()
    model.register_forward_hook(lambda *_: seen.append("whole"))
    for path in ("0", "0.norm", "1", "2", "2.0.conv", "2.1"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    network, _ = trace(plain_copy(model), Example((SAMPLES,)))
    assert [path for path, _ in graphs(network)] == ["", "0", "2"]
    seen.clear()
    network(SAMPLES)
    assert seen == ["0.norm", "0", "1", "2.0.conv", "2.1", "2", "whole"]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


class Structured(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.output = nn.Conv2d(3, 4, 3), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.conv(x))


@pytest.mark.parametrize(
    "output",
    [
        lambda y: {"out": y, "aux": None},
        lambda y: OrderedDict(out=y, more=[y, (y,)]),
        lambda y: torch.return_types.max((y, y)),
    ],
)
def test_outputs_keep_their_structure(output: Callable[[Tensor], Any]) -> None:
    model = Structured(output).eval()
    network, _ = trace(plain_copy(model), Example((SAMPLES,)))
    out, expected = network(SAMPLES), model(SAMPLES)
    assert type(out) is type(expected)
    if isinstance(expected, dict):
        assert list(out) == list(expected) and torch.equal(out["out"], expected["out"])


def test_an_exported_program_keeps_its_arguments_and_its_outputs() -> None:
    model = Structured(lambda y: {"out": y, "aux": [y, y + 1]}).eval()
    program = torch.export.export(model, (SAMPLES,)).module()
    network = traced(program, SAMPLES)
    out = network(x=SAMPLES)
    assert list(out) == ["out", "aux"] and torch.equal(out["aux"][1], model(SAMPLES)["aux"][1])
