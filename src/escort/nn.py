"""The modules of a converted network: a convolution that holds a compressed filter and a plan, and pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from escort import ops
from escort.methods import Runner
from escort.planner import Plan
from escort.problem import Problem
from escort.sparse import StretchedCSR


class SparseConv2d(nn.Module):
    """Equivalent to ``activation(F.conv2d(x, w, bias, ...) + residual)``, run as its plan says. Inference only.

    It runs any batch and any input size; the plan's method and config are kept, only its tables are laid out again.

    Args:
        filter: the weights, (K, C / groups, R, S).
        bias: (K,) or None.
        plan: what :func:`escort.planner.plan_layer` chose; its problem says what the layer computes.
        name: what errors call this layer.

    Raises:
        ValueError: where filter or bias are not those of the plan's problem.
    """

    values: torch.Tensor
    columns: torch.Tensor
    indptr: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, filter: StretchedCSR, bias: torch.Tensor | None, plan: Plan, name: str = "SparseConv2d") -> None:
        super().__init__()
        problem = plan.problem
        if (filter.shape, filter.groups) != (problem.weight_shape, problem.groups):
            raise ValueError(f"the plan is for a filter of shape {problem.weight_shape}, got {filter.shape}")
        wanted = (filter.shape[0],) if problem.epilogue.bias else None
        given = None if bias is None else tuple(bias.shape)
        if given != wanted:
            raise ValueError(f"the plan is for a bias of shape {wanted}, got {given}")
        for array in ("values", "columns", "indptr"):
            self.register_buffer(array, torch.from_numpy(getattr(filter, array)))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.filter_shape, self.groups = filter.shape, filter.groups
        self.stride, self.padding, self.dilation = problem.stride, problem.padding, problem.dilation
        self.activation, self.residual = problem.epilogue.activation, problem.epilogue.residual
        self.plan, self.name = plan, name
        geometry = problem.kernel, problem.stride, problem.padding, problem.dilation, problem.groups
        self._spec = ops.Spec(*geometry, self.activation, plan.method, plan.config).to_json()
        self._runners: dict[Any, Runner] = {}
        super().train(False)

    @property
    def in_channels(self) -> int:
        return self.filter_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.filter_shape[0]

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.filter_shape[2], self.filter_shape[3]

    @property
    def filter(self) -> StretchedCSR:
        indptr, columns, values = (tensor.numpy() for tensor in (self.indptr, self.columns, self.values))
        return StretchedCSR(self.filter_shape, self.groups, indptr, columns, values)

    def problem(self, batch: int, height: int, width: int) -> Problem:
        """What this convolution asks for on an input of shape (batch, in_channels, height, width)."""
        return replace(self.plan.problem, batch=batch, height=height, width=width)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, C, H, W) float32, residual: (N, K, out_height, out_width) if the module was made for one."""
        if torch.compiler.is_compiling():
            return ops.sparse_conv2d(x, residual, self.values, self.columns, self.indptr, self.bias, self._spec)
        run = self._runners.get(x.shape[1:])
        if run is None or x.dtype is not torch.float32 or not x.is_cpu or (residual is not None) is not self.residual:
            run = self._prepare(x, residual)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{self.name} has no gradient: call it under torch.inference_mode() or torch.no_grad()")
        try:
            return run(x, residual)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _prepare(self, x: torch.Tensor, residual: torch.Tensor | None) -> Runner:
        """A runner for a new input size, or the error that a call deserves."""
        if x.dtype is not torch.float32:
            raise TypeError(f"{self.name} computes in float32, its input is {x.dtype}; convert it with .float()")
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{self.name} takes (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        if x.device != self.values.device:
            raise ValueError(f"{self.name} is on {self.values.device}, its input on {x.device}; move one to the other")
        if (residual is not None) is not self.residual:
            made = "for" if self.residual else "without"
            raise TypeError(f"{self.name} was made {made} a residual, and was called otherwise")
        try:
            problem = self.problem(*(int(size) for size in (x.shape[0], *x.shape[2:])))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        run = self._runners[x.shape[1:]] = self.plan.runner(problem, self.filter, self.bias)
        return run

    def train(self, mode: bool = True) -> SparseConv2d:
        if mode:
            raise RuntimeError(f"{self.name} is for inference only: fine-tune the pruned model and convert it again")
        return self

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> SparseConv2d:
        super()._apply(fn, recurse)
        self._runners.clear()
        if self.values.dtype is not torch.float32:
            raise TypeError(f"{self.name} computes in float32 only; convert the model again for another dtype")
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._runners.clear()

    def extra_repr(self) -> str:
        k, _, r, s = self.filter_shape
        text = f"{self.in_channels}, {k}, kernel_size=({r}, {s}), stride={self.stride}, padding={self.padding}, "
        text += f"nnz={len(self.values)}, method={self.plan.method}"
        return text + (f", activation={self.activation}" if self.activation != "none" else "")


class MaxPool2d(nn.MaxPool2d):
    """torch's, with a kernel of our own for float32 (N, C, H, W) on the CPU, where torch does not vectorise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.dtype is not torch.float32 or x.device.type != "cpu":
            return super().forward(x)
        pairs = (pair(value) for value in (self.kernel_size, self.stride, self.padding, self.dilation))
        return ops.max_pool2d(x, *pairs, self.ceil_mode)


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A size given as one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
