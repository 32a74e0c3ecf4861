"""A convolution that holds a compressed filter and a plan, in the place of the one that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from escort import reference
from escort.cuda.binary import Binary
from escort.filter import SparseFilter
from escort.layers import runners
from escort.layers.conv_like import ConvLike
from escort.layers.counters import BROADCAST, BY_OPERATOR, Counters
from escort.layers.observed import PLAIN, is_capturing, is_compiling, is_observed, is_profiled, is_tracing, profiled
from escort.layers.operator import check_not_for_onnx, output_shape, sparse_conv2d
from escort.layers.runners import Choice, RunnerCache
from escort.layers.weight import DenseWeight
from escort.methods import Prepared, Runner
from escort.planner.plan import Layer, Plan
from escort.problem import Epilogue, Problem

#: The tensors of a layer that count as they are in each call.
_FOLLOWED = "values", "bias", "slope"

#: How many input sizes a layer keeps runners for.
_MOST_SIZES = 64


class SparseConv2d(ConvLike):
    """Equivalent to ``activation(F.conv2d(x, w, bias, ...) + residual)``, run as its plan says. Inference only.

    It runs any batch and any input size by the plan's method and config. The first call on a size lays out tables for
    it. Where the config does not fit a size, or compiling for it would take long, another one runs it (see
    :func:`escort.layers.runners.prepare`).

    To the code around it, it is the convolution that it was made from: `weight`, `bias`, `in_channels` and so on. Its
    one parameter is empty; it is frozen, and of the type and on the device of the weights. A bias, slopes or values
    that are written to, or that ``load_state_dict`` brings, count from the next call on. What is written through
    ``.data`` is not seen, as by autograd.

    Args:
        sparse_filter: the weights, (K, C / groups, R, S).
        bias: (K,) or None.
        plan: what :func:`escort.planner.plan_layer` chose; its problem says what the layer computes.
        name: what errors call this layer.
        unfolded: what `weight` shows, where a batch norm was folded into `sparse_filter`, or its channels were put
            into another order.
        slope: (K,) where the activation is "prelu", else None.

    Raises:
        ValueError: where filter, bias or slopes are not those of the plan's problem.
    """

    values: torch.Tensor
    columns: torch.Tensor
    indptr: torch.Tensor
    bias: torch.Tensor | None
    slope: torch.Tensor | None

    def __init__(
        self,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        plan: Plan,
        name: str = "SparseConv2d",
        unfolded: SparseFilter | None = None,
        slope: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        problem = plan.problem
        Layer(problem, sparse_filter, bias, slope).check()
        self._runners: RunnerCache[Prepared]
        self._filter: tuple[RunnerCache[Prepared], SparseFilter] | None = None
        self._versions = -1
        with torch.inference_mode(False):  # tensors made inside of it could not be followed, or moved outside of it
            for array in ("values", "columns", "indptr"):
                self.register_buffer(
                    array, torch.from_numpy(getattr(sparse_filter, array)).to(problem.device, copy=True)
                )
            for kind, tensor in (("bias", bias), ("slope", slope)):
                own = None if tensor is None else tensor.detach().to(problem.device, torch.float32, copy=True)
                self.register_buffer(kind, own)
            empty = torch.empty(0, dtype=problem.storage, device=problem.device)
            self.register_parameter("frozen", nn.Parameter(empty, requires_grad=False))
        self.plan, self.name, self.unfolded = plan, name, unfolded
        self.counters = Counters()
        self._spec = Choice.of(plan).to_json()
        self._plain_spec = replace(Choice.of(plan), problem=self._plain(problem)).to_json()
        self._follow()
        super().train(False)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, read only, without any batch norm; each computation with it makes a new copy."""
        problem = self.plan.problem
        if is_observed():
            return self._dense()
        return DenseWeight(self._dense, problem.weight_shape, problem.storage, self.values.device)

    def _dense(self) -> torch.Tensor:
        """The weight as a new tensor, by torch's operators, which may be traced."""
        problem, device = self.plan.problem, self.values.device
        values, columns, indptr = self.values, self.columns, self.indptr
        if (original := self.unfolded) is not None:
            arrays = original.values, original.columns, original.indptr
            values, columns, indptr = (torch.from_numpy(array).to(device) for array in arrays)
        channels = torch.arange(problem.out_channels, device=device)
        channels = channels.repeat_interleave(indptr.diff(), output_size=len(values))
        dense = values.new_zeros(problem.out_channels, math.prod(problem.weight_shape[1:]))
        return dense.index_put((channels, columns.long()), values).reshape(problem.weight_shape).to(problem.storage)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"layer {self.name}: its weight is compressed and cannot be set; set it in the original model and "
                "convert that again"
            )
        if name in _FOLLOWED and isinstance(value, torch.Tensor) and value.is_inference():
            with torch.inference_mode(False):  # what is written to a tensor of inference mode cannot be followed
                value = value.clone()
        super().__setattr__(name, value)
        if name in _FOLLOWED and "_versions" in self.__dict__:
            self._follow()

    @property
    def filter(self) -> SparseFilter:
        """The weights as they are now. One object until values are written to, as runners share what is made of it."""
        self.follow()
        cached, known = self._runners, self._filter  # as it was before the values are read; another one since a change
        if known is None or known[0] is not cached:
            indptr, columns, values = (tensor.cpu().numpy() for tensor in (self.indptr, self.columns, self.values))
            sparse_filter = SparseFilter(self.plan.problem.weight_shape, self.groups, indptr, columns, values)
            known = self._filter = cached, sparse_filter
        return known[1]

    def problem(self, batch: int, height: int, width: int) -> Problem:
        """The problem of this convolution on an input of shape (batch, in_channels, height, width)."""
        return replace(self.plan.problem, batch=batch, height=height, width=width, device=str(self.values.device))

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002
        """Runs the convolution.

        Args:
            input: (N, C, H, W) in the plan's precision; called as ``nn.Conv2d`` calls it.
            residual: what is added, if the layer was made for it. Of shape (N, K, out_height, out_width) it is added
                within the kernel, of another one that broadcasts behind it.

        Returns:
            (N, K, out_height, out_width) in the plan's memory format; input and residual may lie in any.

        Raises:
            ValueError, TypeError: naming the layer and the remedy.
            RuntimeError: where a gradient would be needed, or a CUDA graph is captured from the first call on a size.
        """
        x = input
        if is_observed():
            return self._by_operator(x, residual)
        # The operator resolves a lazily negated view.
        if type(x) not in PLAIN or x.requires_grad or x.is_neg():
            return self._by_operator(x, residual)
        if residual is not None and (type(residual) not in PLAIN or residual.is_neg()):
            return self._by_operator(x, residual)
        self.follow()
        prepared = self._runners.get((x.shape[1:], x.dtype, x.device, residual is None))
        if prepared is None:
            prepared = self._prepare(x, residual)
        if is_captured := x.is_cuda and is_capturing():
            self._runners.keep(prepared)
        run = prepared.run
        try:
            if is_profiled():
                with profiled("escort::sparse_conv2d", self.name):
                    return run(x, residual)
            return run(x, residual)
        except ValueError as error:
            if residual is not None and self._broadcasts(x, residual):
                self.counters.count(BROADCAST)
                return self._add_behind(self._without_epilogue(x)(x), residual)
            raise ValueError(f"layer {self.name}: {error}") from error
        except RuntimeError as error:
            if x.layout is not torch.strided:
                raise TypeError(f"layer {self.name} takes dense tensors, got {x.layout}; call .to_dense()") from error
            if is_captured and not isinstance(error, torch.OutOfMemoryError):  # what libraries make is a thread's
                remedy = "call the network's warmup in the thread that captures, before it does"
                raise RuntimeError(f"layer {self.name}: {error}; {remedy}") from error
            raise

    def _by_operator(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Runs the convolution as an operator of torch, unless a gradient would have to pass through it."""
        for value in (x, residual):
            if value is not None and not isinstance(value, torch.Tensor):
                kind = type(value).__name__
                raise TypeError(f"layer {self.name} takes tensors, got {kind}; pass torch.as_tensor of it")
        check_not_for_onnx(f"layer {self.name}")
        if not torch.compiler.is_compiling():
            is_forward = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
            if is_forward or (x.requires_grad and torch.is_grad_enabled()):
                raise RuntimeError(
                    f"layer {self.name} has no gradient: call it under torch.inference_mode() or torch.no_grad()"
                )
            self.counters.count(BY_OPERATOR)
        arrays = self.values, self.columns, self.indptr, self.bias
        if residual is not None and self._broadcasts(x, residual):
            return self._add_behind(sparse_conv2d(x, None, *arrays, self._plain_spec), residual)
        return sparse_conv2d(x, residual, *arrays, self._spec, self.slope)

    def _broadcasts(self, x: torch.Tensor, residual: torch.Tensor) -> bool:
        """Whether a residual is not of the result's shape, but can be added to it."""
        if not is_compiling() and is_tracing():  # sizes are tensors, and a trace is of one size
            return False
        shape = output_shape(self.plan.problem, x)
        if not self.residual or residual.shape == shape or residual.dtype is not x.dtype or residual.ndim > 4:
            return False
        sizes = zip(reversed(residual.shape), reversed(shape), strict=False)
        return all(a == b or a == 1 or b == 1 for a, b in sizes)

    def _add_behind(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The epilogue by torch's operators: what is added may be larger than the convolution's result, or smaller."""
        return reference.activate(y + residual, self.plan.problem.epilogue, self.slope)

    @staticmethod
    def _plain(problem: Problem) -> Problem:
        return replace(problem, epilogue=Epilogue(problem.epilogue.bias))

    def _without_epilogue(self, x: torch.Tensor) -> Runner:
        """A runner of the convolution alone."""
        key, cached = (x.shape[1:], x.dtype, x.device, "alone"), self._runners
        prepared = cached.get(key)
        if prepared is None:
            prepared = self._make(int(x.shape[0]), int(x.shape[2]), int(x.shape[3]), alone=True)
            cached.add(key, prepared)
        if x.is_cuda and is_capturing():
            cached.keep(prepared)
        return prepared.run

    def prepared(self, shape: tuple[int, ...]) -> Prepared:
        """What runs plain calls on inputs of a shape (N, C, H, W). Raises what such a call does."""
        prepared = self._runners.get(self._key(shape[2], shape[3]))
        if prepared is None:
            prepared = self._lay_out(shape[0], shape[2], shape[3])
        if self.values.is_cuda and is_capturing():
            self._runners.keep(prepared)
        return prepared

    def follow(self) -> None:
        """Notices what was written to bias and values since the last call."""
        versions = 0
        for tensor in self._followed:
            versions += tensor._version
        if versions != self._versions:
            self._follow()

    def _follow(self) -> None:
        """Lets go of the runners, which hold copies of bias and values as they were; notes what they are now.

        Other threads may be making runners meanwhile: those of what was here before go into the cache of before.
        """
        tensors = (self._buffers.get(name, self._parameters.get(name)) for name in _FOLLOWED)
        followed = tuple(tensor for tensor in tensors if tensor is not None and not tensor.is_inference())
        versions = sum(tensor._version for tensor in followed)
        self._runners = RunnerCache(_MOST_SIZES, self.__dict__.get("_runners"))
        self._followed, self._versions = followed, versions  # last, as a call that finds them trusts the cache

    def prepare(self) -> None:
        """Does what the first call on the plan's input size would do: lays out tables, compiles a kernel.

        Raises:
            ValueError, RuntimeError: as a call does.
        """
        problem = self.plan.problem
        self._lay_out(problem.batch, problem.height, problem.width)

    def run_by(self, prepared: Prepared) -> None:
        """Takes over the plan's choice, prepared of this filter and bias for the plan's input size.

        It stands in for :meth:`prepare`. No stream may call the layer before the tables are complete on its device.
        """
        self._runners.add(self._key(self.plan.problem.height, self.plan.problem.width), prepared)

    def binaries(self) -> tuple[Binary, ...]:
        """Those of the kernels that run the plan's input size, which is laid out for that once more."""
        problem = self.plan.problem
        return self._make(problem.batch, problem.height, problem.width).binaries

    def _prepare(self, x: torch.Tensor, residual: torch.Tensor | None) -> Prepared:
        """A runner for a new input size, or the error that a call deserves."""
        storage = self.plan.problem.storage
        if x.dtype is not storage:
            is_cast = torch.is_autocast_enabled(x.device.type)
            remedy = "call the model outside of autocast" if is_cast else f"convert it with .to({storage})"
            raise TypeError(f"layer {self.name} computes in {storage}, its input is {x.dtype}; {remedy}")
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"layer {self.name} takes (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        if x.device != (device := self.values.device):
            raise ValueError(f"layer {self.name} is on {device}, its input on {x.device}; move one to the other")
        if (residual is not None) is not self.residual:
            made = "for" if self.residual else "without"
            raise TypeError(f"layer {self.name} was made {made} a residual, and was called otherwise")
        return self._lay_out(int(x.shape[0]), int(x.shape[2]), int(x.shape[3]))

    def _lay_out(self, batch: int, height: int, width: int) -> Prepared:
        cached = self._runners  # as it was before bias and values are read
        prepared = self._make(batch, height, width)
        cached.add(self._key(height, width), prepared)
        return prepared

    def _key(self, height: int, width: int) -> Hashable:
        """Under which the runner of an input size is remembered: as a plain call asks for it."""
        shape = torch.Size((self.in_channels, height, width))
        return shape, self.plan.problem.storage, self.values.device, not self.residual

    def _make(self, batch: int, height: int, width: int, *, alone: bool = False) -> Prepared:
        try:
            runners.check_not_capturing(self.values.device)
            problem = self.problem(batch, height, width)
            problem = self._plain(problem) if alone else problem
            arrays = self.filter, self.bias
            slope = None if alone else self.slope
            return runners.prepare(problem, *arrays, Choice.of(self.plan), self.name, self.counters, slope)
        except (ValueError, RuntimeError) as error:
            kinds = (ValueError, torch.OutOfMemoryError, RuntimeError)
            raise next(kind for kind in kinds if isinstance(error, kind))(f"layer {self.name}: {error}") from error

    def train(self, mode: bool = True) -> SparseConv2d:
        """Changes nothing: within a model in training the layer stays as it is, as a frozen batch norm does."""
        return self

    def check_move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raises TypeError or ValueError unless the layer may move as `fn`, which ``.to()`` passes to ``_apply``, does.

        It may move to any device of the type that it was planned for, in the precision that it was planned for.
        """
        storage, planned = self.plan.problem.storage, self.plan.problem.device_type
        moved = fn(torch.empty(0, dtype=storage, device=self.values.device))
        if moved.dtype is not storage:
            raise TypeError(f"layer {self.name} computes in {storage} only; convert the model again for another dtype")
        if moved.device.type != planned:
            raise ValueError(
                f"layer {self.name} was planned for {planned}, not for {moved.device.type}; move the original model "
                "and convert it there, or save this one and load it there"
            )

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> SparseConv2d:
        self.check_move(fn)

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            # Weights stay float32 in a layer of any precision: its method rounds them to what it stores.
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        with torch.inference_mode(False):
            super()._apply(keep_dtype, recurse)
        self._follow()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: runners hold kernels and pointers, and are made anew where the copy runs."""
        left_out = "_runners", "_followed", "_versions", "_filter", "counters"
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._filter, self.counters = None, Counters()
        for name in _FOLLOWED:  # a copy that is made in inference mode consists of tensors that cannot be followed
            setattr(self, name, getattr(self, name))
        self._follow()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = [tensor.clone() for tensor in (self.values, self.columns, self.indptr)]
        with self._without_the_empty_parameter():
            super()._load_from_state_dict(*args, **kwargs)
        if not all(map(torch.equal, (self.values, self.columns, self.indptr), before)):
            self.unfolded = None
        self._follow()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_the_empty_parameter():
            super()._save_to_state_dict(*args, **kwargs)

    @contextmanager
    def _without_the_empty_parameter(self) -> Iterator[None]:
        """A state dict has no use for it."""
        empty = self._parameters.pop("frozen")
        try:
            yield
        finally:
            self._parameters["frozen"] = empty

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
        text += f"padding={self.padding}, nnz={len(self.values)}, method={self.plan.method}"
        return text + (f", activation={self.activation}" if self.activation != "none" else "")
