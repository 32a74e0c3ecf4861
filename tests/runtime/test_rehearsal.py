"""What a program would make is known before it runs: bombs are refused, and what networks do is not."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch
from torch import nn

from escort.runtime.program import Program
from escort.runtime.saved import notation, rehearsal
from escort.runtime.saved.limits import MAX_ITEMS, MAX_NUMBERS, MAX_POWER
from escort.runtime.saved.operations import Plain
from escort.runtime.saved.rehearsal import Work, rehearse
from tests.runtime.test_notation import X, Y, call, layer, program

Z = {"value": 2}
CPU = torch.device("cpu")


def rehearsed(record: Any, layers: dict[str, nn.Module] | None = None) -> tuple[Program, Work]:
    built = notation.build_program(record, lambda listing: dict(layers or {}))
    return built, rehearse(built, CPU)


def doubling(times: int, function: str = "torch.cat") -> dict[str, Any]:
    """A tensor of 384 numbers, joined to itself again and again."""
    return program(*(call(function, [{"value": number}] * 2) for number in range(times)))


def squares(times: int) -> dict[str, Any]:
    steps = [call("Tensor.size", X, 2)]  # 8
    return program(*steps, *(call("operator.mul", *[{"value": number + 1}] * 2) for number in range(times)))


def sequences(times: int) -> dict[str, Any]:
    steps = [call("Tensor.shape", X)]  # four numbers
    return program(*steps, *(call("operator.add", *[{"value": number + 1}] * 2) for number in range(times)))


def nested(times: int) -> dict[str, Any]:
    """Lists of twice the same list, of which no step makes a large one."""
    return program(*(call("operator.getitem", [[{"value": n}] * 2], 0) for n in range(times)))


WITHIN = {
    "joined": (doubling(20), doubling(22)),
    "stacked": (doubling(20, "torch.stack"), doubling(22, "torch.stack")),
    "expanded": (
        program(call("Tensor.expand", X, MAX_NUMBERS // 384, 2, 3, 8, 8)),
        program(call("Tensor.expand", X, MAX_NUMBERS // 384 + 1, 2, 3, 8, 8)),
    ),
    "repeated": (program(call("Tensor.repeat", X, 2**10, 1, 1, 1)), program(call("Tensor.repeat", X, 2**40, 1, 1, 1))),
    "full": (program(call("torch.full", [2**10, 2**20], 0.0)), program(call("torch.full", [10**6, 10**6], 0.0))),
    "zeros": (program(call("torch.zeros", MAX_NUMBERS)), program(call("torch.zeros", MAX_NUMBERS + 1))),
    "arange": (program(call("torch.arange", MAX_NUMBERS)), program(call("torch.arange", 2**50))),
    "padded": (
        program(call("torch.nn.functional.pad", X, [100, 100])),
        program(call("torch.nn.functional.pad", X, [2**40, 0])),
    ),
    "interpolated": (
        program(call("torch.nn.functional.interpolate", X, scale_factor=64.0)),
        program(call("torch.nn.functional.interpolate", X, scale_factor=1e6)),
    ),
    "pooled": (
        program(call("torch.nn.functional.adaptive_avg_pool2d", X, [2**10, 2**10])),
        program(call("torch.nn.functional.adaptive_avg_pool2d", X, [10**9, 10**9])),
    ),
    "cut apart": (
        program(call("torch.arange", MAX_ITEMS), call("torch.unbind", Y)),
        program(call("torch.arange", MAX_ITEMS + 1), call("torch.unbind", Y)),
    ),
    "cut by size": (
        program(call("torch.arange", MAX_ITEMS * 3), call("torch.split", Y, 3)),
        program(call("torch.arange", 2**30), call("Tensor.split", Y, 1)),
    ),
    "cut in chunks": (
        program(call("torch.arange", MAX_ITEMS * 3), call("Tensor.chunk", Y, MAX_ITEMS)),
        program(call("torch.arange", 2**30), call("Tensor.chunk", Y, 2**30)),
    ),
    "squared": (squares(4), squares(5)),
    "longer and longer": (sequences(8), sequences(40)),
    "nested": (nested(11), nested(60)),
    "power": (program(call("operator.pow", 1, MAX_POWER)), program(call("operator.pow", 1, MAX_POWER + 1))),
    "power of a tensor": (program(call("operator.pow", X, 99)), program(call("operator.pow", X, "99"))),
    "power by a tensor": (program(call("operator.pow", 10000, X)), program(call("operator.pow", [10000], 2))),
    "power of integers": (
        program(call("Tensor.size", X, 2), call("operator.pow", Y, 20)),
        program(call("Tensor.size", X, 2), call("operator.pow", Y, 21)),
    ),
    "power of constants": (program(call("operator.pow", 2, 62)), program(call("operator.pow", 9**18, 10**7))),
    "product of constants": (program(call("operator.mul", 2**31, 2**31)), program(call("operator.mul", 2**62, 2**62))),
    "product of many": (program(call("math.prod", [2] * 62)), program(call("math.prod", [2] * 64))),
    "many times a sequence": (
        program(call("Tensor.size", X, 2), call("operator.mul", Y, 5)),
        program(call("Tensor.shape", X), call("operator.mul", Y, 2**60)),
    ),
    "many times a list": (program(call("operator.mul", X, 2)), program(call("operator.mul", [X], 2**60))),
    "a long format": (program(call("operator.mod", X, 2)), program(call("operator.mod", "%99999999999d", 2))),
    "a long format in a tuple": (
        program(call("operator.getitem", {"tuple": [X]}, 0)),
        program(call("operator.getitem", {"tuple": ["%99999999999d"]}, 0)),
    ),
    "cut by name": (
        program(call("torch.arange", 64), call("torch.split", Y, split_size_or_sections=8, dim=0)),
        program(call("torch.arange", 2**30), call("torch.unbind", input=Y)),
    ),
    "the elements of a tensor": (
        program(call("torch.arange", 64), call("operator.getitem", Y, [0, 1])),
        program(call("torch.arange", 2**30), call("operator.iadd", [], Y)),
    ),
    "the product of a tensor": (
        program(call("Tensor.shape", X), call("math.prod", Y)),
        program(call("torch.arange", 2**30), call("math.prod", Y)),
    ),
    "another type's bytes": (
        program(call("Tensor.view", X, [2, -1])),
        program(call("Tensor.view", X, {"dtype": "bool"})),
    ),
    "index": (program(call("operator.getitem", X, 0)), program(call("operator.getitem", X, 9))),
}


@pytest.mark.parametrize("name", WITHIN)
def test_a_bomb_is_refused_and_what_networks_do_is_not(name: str) -> None:
    allowed, refused = WITHIN[name]
    rehearsed(allowed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="step %"):
        rehearsed(refused)
    assert time.perf_counter() - begin < 30.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3  # KiB


@pytest.mark.parametrize("cells", [nn.LSTM(8, 6, bidirectional=True), nn.GRU(8, 6), nn.MultiheadAttention(8, 2)])
def test_layers_that_give_several_tensors_are_rehearsed(cells: nn.Module) -> None:
    x = call("torch.reshape", X, [6, 8, 8])
    record = program(x, layer("cells", *[Y] * (3 if isinstance(cells, nn.MultiheadAttention) else 1)))
    rehearsed(record, {"cells": cells.eval()})


def test_the_number_of_calls_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "MAX_CALLS", 5)
    calls = [call("torch.relu", {"value": number}) for number in range(5)]
    rehearsed(program(*calls[:4]))  # and the one that makes the example
    with pytest.raises(ValueError, match="step %5 = relu.*more than 5 times"):
        rehearsed(program(*calls))


def test_what_a_run_takes_is_known() -> None:
    record = program(call("Tensor.repeat", X, 5, 1, 1, 1), call("torch.mean", Y), call("torch.relu", Z))
    work = rehearsed(record)[1]
    assert (work.at_a_time, work.flop) == (6 * 384, 0)
    assert 5 * 384 + 2 <= work.written < 20 * 384
    record = program(call("torch.reshape", X, [8, 48]), call("Tensor.t", Y), call("torch.matmul", Y, Z))
    assert rehearsed(record)[1].flop == 2 * 8 * 8 * 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_norms_keep_shape_and_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = {"norm": nn.BatchNorm2d(3, affine=dtype is torch.float32).eval().to(dtype)}
    record = program(layer("norm", X), call("torch.relu", Y))
    record["inputs"][0]["dtype"] = str(dtype).removeprefix("torch.")
    rehearsed(record, norms)
    asked = list[Any]()
    normed = rehearsal._normed
    monkeypatch.setattr(rehearsal, "_normed", lambda *args: asked.append(normed(*args)) or asked[-1])
    _, work = rehearsed(record, norms)
    ((y, *others),) = asked
    assert (y.shape, y.dtype, [other.numel() for other in others]) == ((2, 3, 8, 8), dtype, [0, 0])
    assert work.written >= 2 * 384
    with pytest.raises(ValueError, match="step %1 = norm"):
        rehearsed(record, {"norm": nn.BatchNorm2d(4).eval().to(dtype)})
    with pytest.raises(ValueError, match=r"a batch norm of \(4,\) channels gets an input of shape \(2, 3, 8, 8\)"):
        normed(torch.ones(2, 3, 8, 8), torch.ones(4), None, torch.ones(3), torch.ones(3))


def test_what_gives_no_tensor_is_checked_on_every_call() -> None:
    steps = [call("torch.squeeze", X), call("Tensor.shape", Y)]
    steps += [call("operator.add", *[{"value": number + 2}] * 2) for number in range(30)]
    record = program(*steps, inputs=[{"name": "x", "shape": [1], "dtype": "float32"}])
    built, _ = rehearsed(record)
    assert built(torch.ones(1)) == ()
    with pytest.raises(ValueError, match=f"more than {MAX_ITEMS} items"):
        built(torch.ones(2))

    record = program(call("Tensor.size", X, 0), *(call("operator.mul", *[{"value": n + 1}] * 2) for n in range(40)))
    record["inputs"] = [{"name": "x", "shape": [1], "dtype": "float32"}]
    built, _ = rehearsed(record)
    assert built(torch.ones(1)) == 1
    with pytest.raises(ValueError, match="an integer has more than 64 bits"):
        built(torch.ones(9))


def test_what_gives_a_tensor_is_called_as_it_is() -> None:
    built, _ = rehearsed(program(call("operator.mul", X, X), call("Tensor.size", Y, 0)))
    product, size = built.listing.steps
    assert not isinstance(product.target, Plain) and isinstance(size.target, Plain)
    assert rehearse(built, CPU).at_a_time == 2 * 384 and built.listing.steps[1].target is size.target
    assert notation.describe_program(built)["steps"][1]["call"] == "Tensor.size"
