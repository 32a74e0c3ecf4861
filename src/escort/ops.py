"""Our kernels as torch operators, for torch.compile and torch.export.

Everything an operator needs is in its arguments, so an exported program carries its filters with it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable

import torch

from escort import _kernels
from escort.methods import Runner, by_name
from escort.problem import Epilogue, Problem
from escort.sparse import StretchedCSR

torch.library.define(
    "escort::sparse_conv2d",
    "(Tensor x, Tensor? residual, Tensor values, Tensor columns, Tensor indptr, Tensor? bias, SymInt[2] kernel, "
    "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, int groups, str activation, str method, str config) "
    "-> Tensor",
)

#: Runners of recent calls. An entry keeps its filter alive, so that an address in a key is never another filter's.
_runners: OrderedDict[tuple[object, ...], tuple[Runner, tuple[torch.Tensor, ...]]] = OrderedDict()
_MOST_RUNNERS = 1024


@torch.library.impl("escort::sparse_conv2d", "CPU")
def _sparse_conv2d(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    values: torch.Tensor,
    columns: torch.Tensor,
    indptr: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    method: str,
    config: str,
) -> torch.Tensor:
    owners = (values, columns, indptr) if bias is None else (values, columns, indptr, bias)
    pointers = tuple((t.data_ptr(), len(t), t._version if not t.is_inference() else 0) for t in owners)
    key = (x.shape[1:], pointers, *map(tuple, (kernel, stride, padding, dilation)), groups, activation, method, config)
    if key not in _runners:
        filter = StretchedCSR(
            (len(indptr) - 1, x.shape[1] // groups, kernel[0], kernel[1]),
            groups,
            *(t.numpy() for t in (indptr, columns, values)),
        )
        problem = Problem(
            *x.shape,
            filter.shape[0],
            (kernel[0], kernel[1]),
            (stride[0], stride[1]),
            (padding[0], padding[1], padding[2], padding[3]),
            (dilation[0], dilation[1]),
            groups,
            epilogue=Epilogue(bias is not None, residual is not None, activation),  # type: ignore[arg-type]
        )
        chosen = by_name(method)
        _runners[key] = chosen.prepare(problem, filter, bias, chosen.config_type(**json.loads(config))), owners
        if len(_runners) > _MOST_RUNNERS:
            _runners.popitem(last=False)
    return _runners[key][0](x, residual)


@torch.library.register_fake("escort::sparse_conv2d")
def _sparse_conv2d_shape(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    values: torch.Tensor,
    columns: torch.Tensor,
    indptr: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *rest: object,
) -> torch.Tensor:
    size = [
        (x.shape[2 + i] + padding[2 * i] + padding[2 * i + 1] - (kernel[i] - 1) * dilation[i] - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    return x.new_empty((x.shape[0], indptr.shape[0] - 1, *size))


sparse_conv2d: Callable[..., torch.Tensor] = torch.ops.escort.sparse_conv2d.default

torch.library.define(
    "escort::max_pool2d",
    "(Tensor x, SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode) -> Tensor",
)

Pair = tuple[int, int]


@torch.library.impl("escort::max_pool2d", "CPU")
def _max_pool2d(
    x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    if x.ndim != 4 or x.dtype is not torch.float32:
        raise ValueError(f"max_pool2d takes float32 (N, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    y = _max_pool2d_shape(x, kernel, stride, padding, dilation, ceil_mode)
    x = x.contiguous()
    planes, sizes = x.shape[0] * x.shape[1], (x.shape[2:], y.shape[2:], kernel, stride, padding, dilation)
    _kernels.max_pool2d(x.data_ptr(), y.data_ptr(), planes, *sizes, torch.get_num_threads())
    return y


@torch.library.register_fake("escort::max_pool2d")
def _max_pool2d_shape(
    x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    size = []
    for i in (0, 1):
        reach = x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        out = (reach + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        # As in torch, a window that ceil_mode adds must start inside the image or its left padding.
        size.append(out - 1 if ceil_mode and (out - 1) * stride[i] >= x.shape[2 + i] + padding[i] else out)
    if min(size) < 1:
        raise ValueError(f"input {tuple(x.shape)} is smaller than the pooling window {kernel} with padding {padding}")
    return x.new_empty((*x.shape[:2], *size))


max_pool2d: Callable[..., torch.Tensor] = torch.ops.escort.max_pool2d.default
