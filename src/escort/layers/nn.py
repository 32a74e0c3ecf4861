"""The modules of a converted network: a convolution that holds a compressed filter and a plan, and pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from escort.filter import SparseFilter
from escort.layers import ops
from escort.methods import Runner
from escort.planner.plan import Plan
from escort.problem import Problem


class SparseConv2d(nn.Module):
    """Equivalent to ``activation(F.conv2d(x, w, bias, ...) + residual)``, run as its plan says. Inference only.

    It runs any batch and any input size: the plan's method and config are kept, only its tables are laid out again, by
    the first call on a size. Where they do not fit a size, or a kernel would take long to compile for it, it is run by
    what does (see :func:`escort.layers.ops.prepare`).

    Args:
        sparse_filter: the weights, (K, C / groups, R, S).
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

    def __init__(
        self, sparse_filter: SparseFilter, bias: torch.Tensor | None, plan: Plan, name: str = "SparseConv2d"
    ) -> None:
        super().__init__()
        problem = plan.problem
        if (sparse_filter.shape, sparse_filter.groups) != (problem.weight_shape, problem.groups):
            raise ValueError(f"the plan is for a filter of shape {problem.weight_shape}, got {sparse_filter.shape}")
        wanted = (sparse_filter.shape[0],) if problem.epilogue.bias else None
        given = None if bias is None else tuple(bias.shape)
        if given != wanted:
            raise ValueError(f"the plan is for a bias of shape {wanted}, got {given}")
        for array in ("values", "columns", "indptr"):
            self.register_buffer(array, torch.from_numpy(getattr(sparse_filter, array)).to(problem.device))
        bias = None if bias is None else bias.detach().to(problem.device, torch.float32, copy=True)
        self.register_buffer("bias", bias)
        self.filter_shape, self.groups = sparse_filter.shape, sparse_filter.groups
        self.stride, self.padding, self.dilation = problem.stride, problem.padding, problem.dilation
        self.activation, self.residual = problem.epilogue.activation, problem.epilogue.residual
        self.plan, self.name = plan, name
        geometry = problem.kernel_size, problem.stride, problem.padding, problem.dilation, problem.groups
        choice = self.activation, plan.method, plan.config, problem.precision, problem.memory_format
        self._spec = ops.Spec(*geometry, *choice, planned=(problem.height, problem.width)).to_json()
        self._dtype = problem.storage
        self._runners: dict[Any, Runner] = {}  # by input size, all on _device
        self._device = self.values.device
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
    def filter(self) -> SparseFilter:
        indptr, columns, values = (tensor.cpu().numpy() for tensor in (self.indptr, self.columns, self.values))
        return SparseFilter(self.filter_shape, self.groups, indptr, columns, values)

    def problem(self, batch: int, height: int, width: int) -> Problem:
        """What this convolution asks for on an input of shape (batch, in_channels, height, width)."""
        return replace(self.plan.problem, batch=batch, height=height, width=width, device=str(self.values.device))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, C, H, W), residual: (N, K, out_height, out_width) if the module was made for one; the plan's dtype.

        Both in any memory format; the result is in the plan's.
        """
        if torch.compiler.is_compiling():
            return ops.sparse_conv2d(x, residual, self.values, self.columns, self.indptr, self.bias, self._spec)
        run = self._runners.get(x.shape[1:])
        if (
            run is None
            or x.dtype is not self._dtype
            or x.device != self._device
            or (residual is not None) is not self.residual
        ):
            run = self._prepare(x, residual)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{self.name} has no gradient: call it under torch.inference_mode() or torch.no_grad()")
        try:
            return run(x, residual)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def prepare(self) -> None:
        """Does for the input size of the plan what the first call on it would do: lays out tables, compiles a kernel.

        Raises:
            ValueError, RuntimeError: as a call does.
        """
        problem = self.plan.problem
        self._lay_out(problem.batch, problem.height, problem.width)

    def _prepare(self, x: torch.Tensor, residual: torch.Tensor | None) -> Runner:
        """A runner for a new input size, or the error that a call deserves."""
        if x.dtype is not self._dtype:
            told = f"{self.name} computes in {self._dtype}, its input is {x.dtype}"
            raise TypeError(f"{told}; convert it with .to({self._dtype})")
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{self.name} takes (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        if x.device != self.values.device:
            raise ValueError(f"{self.name} is on {self.values.device}, its input on {x.device}; move one to the other")
        if (residual is not None) is not self.residual:
            made = "for" if self.residual else "without"
            raise TypeError(f"{self.name} was made {made} a residual, and was called otherwise")
        return self._lay_out(int(x.shape[0]), int(x.shape[2]), int(x.shape[3]))

    def _lay_out(self, batch: int, height: int, width: int) -> Runner:
        try:
            problem, device = self.problem(batch, height, width), self.values.device
            ops.check_not_capturing(device)
            planned = self.plan.problem.height, self.plan.problem.width
            choice = self.plan.method, self.plan.config, planned, self.name
            run = ops.prepare(problem, self.filter, self.bias, *choice)
        except (ValueError, RuntimeError) as error:
            kinds = (ValueError, torch.OutOfMemoryError, RuntimeError)
            raise next(kind for kind in kinds if isinstance(error, kind))(f"{self.name}: {error}") from error
        self._runners[torch.Size((self.in_channels, height, width))], self._device = run, device
        return run

    def train(self, mode: bool = True) -> SparseConv2d:
        if mode:
            raise RuntimeError(f"{self.name} is for inference only: fine-tune the pruned model and convert it again")
        return self

    def check_move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raises TypeError or ValueError unless the layer may go where `fn` leads, as ``.to()`` hands it to ``_apply``.

        That is any device of the type that it was planned for, in the precision that it was planned for.
        """
        moved = fn(torch.empty(0, dtype=self._dtype, device=self.values.device))
        if moved.dtype is not self._dtype:
            raise TypeError(f"{self.name} computes in {self._dtype} only; convert the model again for another dtype")
        planned = self.plan.problem.device_type
        if moved.device.type != planned:
            raise ValueError(
                f"{self.name} was planned for {planned}, not for {moved.device.type}; move the original model and "
                "convert it there, or save this one and load it there"
            )

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> SparseConv2d:
        self.check_move(fn)

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            # Weights stay float32 in a layer of any precision: its method rounds them to what it stores.
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        self._runners.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: runners hold kernels and pointers, and are made anew where the copy runs."""
        return {**self.__dict__, "_runners": {}}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._runners.clear()

    def extra_repr(self) -> str:
        k, _, r, s = self.filter_shape
        text = f"{self.in_channels}, {k}, kernel_size=({r}, {s}), stride={self.stride}, padding={self.padding}, "
        text += f"nnz={len(self.values)}, method={self.plan.method}"
        return text + (f", activation={self.activation}" if self.activation != "none" else "")


class MaxPool2d(nn.MaxPool2d):
    """torch's, with kernels of our own for (N, C, H, W): on the CPU in float32, where torch does not vectorise, and on
    GPUs, where torch writes the places of the largest elements besides, eight bytes for each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or not ops.pools(x.device, x.dtype):
            return super().forward(x)
        pairs = (pair(value) for value in (self.kernel_size, self.stride, self.padding, self.dilation))
        return ops.max_pool2d(x, *pairs, self.ceil_mode)


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A size given as one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
