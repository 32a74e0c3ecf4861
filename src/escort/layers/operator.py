"""The sparse convolution as an operator of torch: for torch.compile, torch.export and whatever observes operators.

Everything that it needs is in its arguments, so an exported program carries its filters with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from escort.filter import SparseFilter
from escort.layers import runners
from escort.layers.observed import is_capturing
from escort.layers.runners import Choice, RunnerCache
from escort.methods import Runner
from escort.problem import Problem

#: How many kinds of calls the operator keeps runners for, of all layers together.
_MOST_CALLS = 1024

# `spec` is a :class:`Choice` as JSON: one string costs less per call than its dozens of values would.
torch.library.define(
    "escort::sparse_conv2d",
    "(Tensor x, Tensor? residual, Tensor values, Tensor columns, Tensor indptr, Tensor? bias, str spec, "
    "Tensor? slope=None) -> Tensor",
)

_SPEC = 5  # its place among the arguments behind x

#: Runners of the operator. An entry keeps its filter alive, so that an address in a key is never another filter's.
_runners: RunnerCache[tuple[Runner, tuple[torch.Tensor | None, ...]]] = RunnerCache(_MOST_CALLS)


@torch.library.impl("escort::sparse_conv2d", ("CPU", "CUDA"))
def _sparse_conv2d(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    values: torch.Tensor,
    columns: torch.Tensor,
    indptr: torch.Tensor,
    bias: torch.Tensor | None,
    spec: str,
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    version = 0 if values.is_inference() else values._version
    key: tuple[object, ...] = (x.shape[1:], x.dtype, x.device, residual is None, spec)
    key += (values.data_ptr(), columns.data_ptr(), indptr.data_ptr(), version)
    for tensor in (bias, slope):
        key += (None,) if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    entry = _runners.get(key)
    if entry is None:
        run = _operator_runner(x, residual, (values, columns, indptr), bias, slope, Choice.from_json(spec))
        entry = run, (values, columns, indptr, bias, slope)
        _runners.add(key, entry)
    if x.is_cuda and is_capturing():
        _runners.keep(entry)
    return entry[0](x, residual)


def _operator_runner(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    arrays: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    choice: Choice,
) -> Runner:
    """A runner for a new kind of call, or the error that the call deserves."""
    planned, device = choice.problem, arrays[0].device
    if x.dtype is not planned.storage or x.device != device:
        raise ValueError(
            f"sparse_conv2d takes {planned.storage} on the filter's device, {device}, got {x.dtype} on {x.device}; "
            "pass such an input, outside of autocast"
        )
    if x.ndim != 4 or x.shape[1] != planned.in_channels:
        raise ValueError(f"sparse_conv2d takes (N, {planned.in_channels}, H, W), got shape {tuple(x.shape)}")
    runners.check_not_capturing(device)
    values, columns, indptr = (tensor.cpu().numpy() for tensor in arrays)
    sparse_filter = SparseFilter(planned.weight_shape, planned.groups, indptr, columns, values)
    epilogue = replace(planned.epilogue, bias=bias is not None, residual=residual is not None)
    batch, _, height, width = x.shape
    problem = replace(planned, batch=batch, height=height, width=width, device=str(device), epilogue=epilogue)
    return runners.prepare(problem, sparse_filter, bias, choice, slope=slope).run


@torch.library.register_fake("escort::sparse_conv2d")
def _empty_result(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """A tensor like the operator's result; sizes may be symbols."""
    check_not_for_onnx("sparse_conv2d")
    problem = Choice.from_json(others[_SPEC]).problem
    return x.new_empty(output_shape(problem, x)).contiguous(memory_format=problem.torch_memory_format)


def check_not_for_onnx(name: str) -> None:
    """Raises RuntimeError while torch exports a model to ONNX, by whichever of its exporters."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"{name}: ONNX has no sparse convolution; export the original model")


def output_shape(problem: Problem, x: torch.Tensor) -> tuple[int, ...]:
    """The shape of what a convolution makes of an (N, C, H, W) input; sizes may be symbols."""
    kernel_size, stride, dilation = problem.kernel_size, problem.stride, problem.dilation
    size = [
        (x.shape[2 + i] + sum(problem.padding[2 * i : 2 * i + 2]) - (kernel_size[i] - 1) * dilation[i] - 1) // stride[i]
        + 1
        for i in (0, 1)
    ]
    return (x.shape[0], problem.out_channels, *size)


sparse_conv2d: Callable[..., torch.Tensor] = torch.ops.escort.sparse_conv2d.default


def _over_batches(
    info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, residual: torch.Tensor | None, *others: Any
) -> tuple[torch.Tensor, int]:
    """The rule for ``vmap``: a batch of batches is one larger batch. The filter is the same for all."""
    if any(dim is not None for dim in in_dims[2:]):
        raise ValueError(
            "vmap over the filter, bias or slopes of a sparse_conv2d is not supported; pass them with in_dims None"
        )

    def flat(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    y = sparse_conv2d(flat(x, in_dims[0]), None if residual is None else flat(residual, in_dims[1]), *others)
    return y.unflatten(0, (info.batch_size, -1)), 0


torch.library.register_vmap("escort::sparse_conv2d", _over_batches)


@register_flop_formula(torch.ops.escort.sparse_conv2d)
def _flop(x: torch.Size, residual: Any, values: torch.Size, *others: Any, out_shape: torch.Size, **_: Any) -> int:
    """The real work: a multiplication and an addition per nonzero and output position. Tensors come as their shapes."""
    return 2 * values[0] * out_shape[0] * out_shape[2] * out_shape[3]
