"""The modes in which people call models. Each calls a converted model, and checks what comes of it."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from escort.network.values import output_error
from tests.at_once import at_once
from tests.forked import in_a_child
from tests.modes.kinds import Inputs, Kind

#: Of a converted network against the original in float64: in float32, and where autocast rounds to bfloat16 between.
_BOUND, _ROUNDED = 1e-4, 5e-2


@dataclass
class Cell:
    """A kind of model in one mode.

    Attributes:
        fast: the converted model.
        exact: the original in float64, which is called on the same inputs in the same order: it may keep a state.
        process: another process, started afresh.
    """

    kind: Kind
    fast: nn.Module
    process: ProcessPoolExecutor
    exact: nn.Module = field(init=False)
    all_inputs: list[Inputs] = field(init=False)

    def __post_init__(self) -> None:
        self.exact = self.kind.original().double()
        self.all_inputs = [self.kind.example, *self.kind.others]

    def expected(self, inputs: Inputs) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.double, inputs)
        with torch.no_grad():
            return self.exact(*args, **kwargs)

    def call(self, inputs: Inputs) -> Any:
        args, kwargs = inputs
        return self.fast(*args, **kwargs)

    def check(self, output: Any, inputs: Inputs, bound: float = _BOUND) -> None:
        """The output is what the original makes of these inputs."""
        same(output, self.expected(inputs), bound)


def same(output: Any, expected: Any, bound: float = _BOUND) -> None:
    (leaves, structure), (references, wanted) = tree_flatten(output), tree_flatten(expected)
    assert structure == wanted
    for leaf, reference in zip(leaves, references, strict=True):
        if isinstance(reference, Tensor):
            assert output_error(leaf.detach(), reference) <= bound
        else:
            assert leaf == reference


def plain(cell: Cell) -> None:
    for inputs in (*cell.all_inputs, cell.kind.example):
        cell.check(cell.call(inputs), inputs)


def inference_mode(cell: Cell) -> None:
    with torch.inference_mode():
        plain(cell)
    with torch.no_grad():  # what was made in that mode serves outside of it
        plain(cell)


def no_grad(cell: Cell) -> None:
    with torch.no_grad():
        plain(cell)


def gradient(cell: Cell) -> None:
    """Inputs that need no gradient run; one that needs one is refused, and the remedy is one."""
    args, kwargs = cell.kind.example
    leaf = args[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient.*(detach the input|call it under torch.inference_mode)"):
        cell.fast(leaf, *args[1:], **kwargs)
    cell.check(cell.fast(leaf.detach(), *args[1:], **kwargs), cell.kind.example)
    with torch.no_grad():
        cell.check(cell.fast(leaf, *args[1:], **kwargs), cell.kind.example)


def autocast(cell: Cell) -> None:
    for inputs in cell.all_inputs:
        with torch.autocast("cpu", torch.bfloat16):
            output = cell.call(inputs)
        cell.check(tree_map_only(Tensor, Tensor.float, output), inputs, _ROUNDED)
    plain(cell)


def fake_tensor(cell: Cell) -> None:
    for inputs in cell.all_inputs:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args, kwargs = tree_map_only(Tensor, mode.from_tensor, inputs)
            output = tree_leaves(cell.fast(*args, **kwargs))
        shapes = [x.shape for x in tree_leaves(cell.expected(inputs)) if isinstance(x, Tensor)]
        assert [x.shape for x in output if isinstance(x, Tensor)] == shapes
    plain(cell)


def graph_of_fx(cell: Cell) -> None:
    args, kwargs = cell.kind.example
    for mode in ("real", "symbolic"):
        with torch.no_grad():
            call = functools.partial(cell.fast, **kwargs)
            graph = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(*args)
        if mode == "real":  # which holds the sizes that it saw
            cell.check(graph(*args), cell.kind.example)
        else:
            for inputs in [cell.kind.example, *cell.kind.others][: None if not kwargs else 1]:
                cell.check(graph(*inputs[0]), inputs)
    plain(cell)


def jit_trace(cell: Cell) -> None:
    args, kwargs = cell.kind.example
    named = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    assert not named
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and warns of each size that becomes a constant
        traced = torch.jit.trace(cell.fast, args)
    for inputs in (cell.kind.example, cell.kind.others[0]):
        cell.check(traced(*inputs[0]), inputs)
    plain(cell)


def _onnx(cell: Cell, **options: Any) -> None:
    """There is no sparse convolution in ONNX."""
    args, kwargs = cell.kind.example
    with warnings.catch_warnings(), pytest.raises(Exception) as caught:
        warnings.simplefilter("ignore")
        torch.onnx.export(cell.fast, args, io.BytesIO(), kwargs=kwargs, verbose=False, **options)
    message, error = "", caught.value
    while error is not None:
        message, error = f"{message}\n{error}", error.__cause__
    assert "ONNX has no sparse convolution; export the original model" in message
    plain(cell)


def onnx_of_torchscript(cell: Cell) -> None:
    _onnx(cell, dynamo=False)


def onnx_of_torch_export(cell: Cell) -> None:
    pytest.importorskip("onnxscript")
    _onnx(cell, dynamo=True)


def _compile(cell: Cell, **options: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cell.fast, backend="aot_eager", **options)
    for inputs in cell.all_inputs:
        cell.check(compiled(*inputs[0], **inputs[1]), inputs)
    torch._dynamo.reset()


def compile_static(cell: Cell) -> None:
    _compile(cell, dynamic=False)


def compile_dynamic(cell: Cell) -> None:
    _compile(cell, dynamic=True)


def export_by_place(cell: Cell) -> None:
    args, kwargs = cell.kind.example
    program = torch.export.export(cell.fast, args, kwargs)
    cell.check(program.module()(*args, **kwargs), cell.kind.example)
    plain(cell)


def export_by_name(cell: Cell) -> None:
    """All arguments by their names, of any size."""
    names = list(_parameters(cell.fast))
    named = [dict(zip(names, args, strict=False)) | kwargs for args, kwargs in cell.all_inputs]
    any_size = tree_map_only(Tensor, lambda x: (torch.export.Dim.AUTO, None, *[torch.export.Dim.AUTO] * 2), named[0])
    any_size = {name: sizes if isinstance(sizes, tuple) else None for name, sizes in any_size.items()}
    program = torch.export.export(cell.fast, (), named[0], dynamic_shapes=any_size)
    for inputs, arguments in zip(cell.all_inputs[:2], named[:2], strict=True):
        cell.check(program.module()(**arguments), inputs)


def _parameters(model: nn.Module) -> Iterator[str]:
    yield from inspect.signature(model.forward).parameters


def vmap(cell: Cell) -> None:
    first, second = cell.kind.example, cell.kind.inputs(2, 16)
    args = [torch.stack([a, b + 1.0]) for a, b in zip(first[0], second[0], strict=True)]
    kwargs = first[1]
    with torch.no_grad():
        output = torch.vmap(lambda *args: cell.fast(*args, **kwargs))(*args)
    for i in range(2):
        inputs = tuple(x[i] for x in args), kwargs
        cell.check(tree_map_only(Tensor, lambda x, i=i: x[i], output), inputs)


def profiler(cell: Cell) -> None:
    with torch.profiler.profile() as profile:
        output = cell.call(cell.kind.example)
    assert "escort::sparse_conv2d" in {event.key for event in profile.key_averages()}
    cell.check(output, cell.kind.example)
    plain(cell)


def default_dtype(cell: Cell) -> None:
    for dtype in (torch.float64, torch.float16):
        with _default_dtype(dtype):
            outputs = [cell.call(inputs) for inputs in cell.all_inputs]
        for output, inputs in zip(outputs, cell.all_inputs, strict=True):
            assert {x.dtype for x in tree_leaves(output) if isinstance(x, Tensor)} == {torch.float32}
            cell.check(output, inputs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def default_device(cell: Cell) -> None:
    with torch.device("meta"):
        outputs = [cell.call(inputs) for inputs in cell.all_inputs]
    for output, inputs in zip(outputs, cell.all_inputs, strict=True):
        cell.check(output, inputs)


def threads(cell: Cell) -> None:
    """Eight threads call one model for the first time at once, each with other inputs."""
    inputs = [cell.kind.inputs(1 + i % 4, 16 + 2 * (i % 3)) for i in range(8)]
    expected = [cell.expected(each) for each in inputs]

    def call(each: Inputs, wanted: Any) -> None:
        for _ in range(5):
            same(cell.call(each), wanted)

    at_once(call, zip(inputs, expected, strict=True))


def fork(cell: Cell) -> None:
    """A child of a process whose kernels have already run on several threads."""
    expected = [cell.expected(inputs) for inputs in cell.all_inputs[:2]]
    parent = copy.deepcopy(cell.fast)

    def check() -> None:
        torch.set_num_threads(1)  # for torch's own operators, which would wait for the parent's threads
        for inputs, wanted in zip(cell.all_inputs, expected, strict=False):
            same(cell.call(inputs), wanted)

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        args, kwargs = cell.kind.example
        parent(*args, **kwargs)
        in_a_child(check)
    finally:
        torch.set_num_threads(before)
    same(cell.call(cell.kind.example), expected[0])


def spawn(cell: Cell) -> None:
    """A model that is pickled to another process, and what it returns."""
    outputs = cell.process.submit(_run, cell.fast, cell.all_inputs).result(120)
    for output, inputs in zip(outputs, cell.all_inputs, strict=True):
        cell.check(output, inputs)


def _run(model: nn.Module, inputs: list[Inputs]) -> list[Any]:
    with torch.no_grad():
        return [model(*args, **kwargs) for args, kwargs in inputs]


MODES: tuple[Callable[[Cell], None], ...] = (
    *(plain, inference_mode, no_grad, gradient, autocast, fake_tensor, graph_of_fx, jit_trace),
    *(onnx_of_torchscript, onnx_of_torch_export, compile_static, compile_dynamic, export_by_name, export_by_place),
    *(vmap, profiler, default_dtype, default_device, threads, fork, spawn),
)
