"""A convolution that holds a compressed filter and a plan, and the operator of torch behind it.

The operator is for torch.compile and torch.export. Everything that it needs is in its arguments, so an exported program
carries its filters with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from escort.filter import SparseFilter
from escort.layers import runners
from escort.layers.runners import Choice, RunnerCache
from escort.methods import Runner
from escort.planner.plan import Layer, Plan
from escort.problem import Activation, Epilogue, Problem

#: How many input sizes a layer keeps runners for, and how many kinds of calls the operator does for all layers.
_MOST_SIZES, _MOST_CALLS = 64, 1024

# `spec` is a :class:`Choice` as JSON: one string costs less per call than its dozens of values would.
torch.library.define(
    "escort::sparse_conv2d",
    "(Tensor x, Tensor? residual, Tensor values, Tensor columns, Tensor indptr, Tensor? bias, str spec) -> Tensor",
)

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
) -> torch.Tensor:
    version = 0 if values.is_inference() else values._version
    key: tuple[object, ...] = (x.shape[1:], x.dtype, x.device, residual is None, spec)
    key += (values.data_ptr(), columns.data_ptr(), indptr.data_ptr(), version)
    if bias is not None:
        key += (bias.data_ptr(), 0 if bias.is_inference() else bias._version)
    entry = _runners.get(key)
    if entry is None:
        run = _operator_runner(x, residual, (values, columns, indptr), bias, Choice.from_json(spec))
        entry = run, (values, columns, indptr, bias)
        _runners.add(key, entry)
    return entry[0](x, residual)


def _operator_runner(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    arrays: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    choice: Choice,
) -> Runner:
    """A runner for a new kind of call, or the error that the call deserves."""
    planned, device = choice.problem, arrays[0].device
    if x.dtype is not planned.storage or x.device != device:
        raise ValueError(
            f"sparse_conv2d takes {planned.storage} on the filter's device, {device}, got {x.dtype} on {x.device}"
        )
    if x.ndim != 4 or x.shape[1] != planned.in_channels:
        raise ValueError(f"sparse_conv2d takes (N, {planned.in_channels}, H, W), got shape {tuple(x.shape)}")
    runners.check_not_capturing(device)
    values, columns, indptr = (tensor.cpu().numpy() for tensor in arrays)
    sparse_filter = SparseFilter(planned.weight_shape, planned.groups, indptr, columns, values)
    epilogue = Epilogue(bias is not None, residual is not None, planned.epilogue.activation)
    batch, _, height, width = x.shape
    problem = replace(planned, batch=batch, height=height, width=width, device=str(device), epilogue=epilogue)
    return runners.prepare(problem, sparse_filter, bias, choice)


@torch.library.register_fake("escort::sparse_conv2d")
def _empty_result(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """A tensor like the operator's result; sizes may be symbols."""
    problem = Choice.from_json(others[-1]).problem
    kernel_size, stride, dilation = problem.kernel_size, problem.stride, problem.dilation
    size = [
        (x.shape[2 + i] + sum(problem.padding[2 * i : 2 * i + 2]) - (kernel_size[i] - 1) * dilation[i] - 1) // stride[i]
        + 1
        for i in (0, 1)
    ]
    y = x.new_empty((x.shape[0], problem.out_channels, *size))
    return y.contiguous(memory_format=problem.torch_memory_format)


sparse_conv2d: Callable[..., torch.Tensor] = torch.ops.escort.sparse_conv2d.default


def _over_batches(
    info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, residual: torch.Tensor | None, *others: Any
) -> tuple[torch.Tensor, int]:
    """The rule for ``vmap``: a batch of batches is one larger batch. The filter is the same for all."""
    if any(dim is not None for dim in in_dims[2:]):
        raise ValueError(
            "vmap over the filter or bias of a sparse_conv2d is not supported; pass them with in_dims None"
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


#: What observes or transforms torch's operators must see an operator and not a kernel that is handed memory: traces,
#: ``make_fx`` and fake tensors (modes), ``vmap`` and its like (transforms). Asked once per call, so each by its fastest
#: function.
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_PLAIN = frozenset((torch.Tensor, nn.Parameter))


class SparseConv2d(nn.Module):
    """Equivalent to ``activation(F.conv2d(x, w, bias, ...) + residual)``, run as its plan says. Inference only.

    It runs any batch and any input size by the plan's method and config. The first call on a size lays out tables for
    it. Where the config does not fit a size, or compiling for it would take long, another one runs it (see
    :func:`escort.layers.runners.prepare`).

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
        Layer(problem, sparse_filter, bias).check()
        for array in ("values", "columns", "indptr"):
            self.register_buffer(array, torch.from_numpy(getattr(sparse_filter, array)).to(problem.device))
        bias = None if bias is None else bias.detach().to(problem.device, torch.float32, copy=True)
        self.register_buffer("bias", bias)
        self.plan, self.name = plan, name
        self._spec = Choice.of(plan).to_json()
        self._runners: RunnerCache[Runner] = RunnerCache(_MOST_SIZES)
        super().train(False)

    @property
    def in_channels(self) -> int:
        return self.plan.problem.in_channels

    @property
    def out_channels(self) -> int:
        return self.plan.problem.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.plan.problem.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        return self.plan.problem.stride

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Zeros added (top, bottom, left, right)."""
        return self.plan.problem.padding

    @property
    def dilation(self) -> tuple[int, int]:
        return self.plan.problem.dilation

    @property
    def groups(self) -> int:
        return self.plan.problem.groups

    @property
    def activation(self) -> Activation:
        return self.plan.problem.epilogue.activation

    @property
    def residual(self) -> bool:
        """Whether a residual is added to what it computes."""
        return self.plan.problem.epilogue.residual

    @property
    def filter(self) -> SparseFilter:
        indptr, columns, values = (tensor.cpu().numpy() for tensor in (self.indptr, self.columns, self.values))
        return SparseFilter(self.plan.problem.weight_shape, self.groups, indptr, columns, values)

    def problem(self, batch: int, height: int, width: int) -> Problem:
        """The problem of this convolution on an input of shape (batch, in_channels, height, width)."""
        return replace(self.plan.problem, batch=batch, height=height, width=width, device=str(self.values.device))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the convolution.

        Args:
            x: (N, C, H, W) in the plan's precision.
            residual: (N, K, out_height, out_width) likewise, if the layer was made for one.

        Returns:
            (N, K, out_height, out_width) in the plan's memory format; x and residual may lie in any.

        Raises:
            ValueError, TypeError: naming the layer and the remedy.
            RuntimeError: where a gradient would be needed, or a CUDA graph is captured from the first call on a size.
        """
        if _is_compiling() or _is_tracing() or _modes() or _transforms() is not None or forward_ad._current_level >= 0:
            return self._by_operator(x, residual)
        # The operator resolves a lazily negated view.
        if x.requires_grad or type(x) not in _PLAIN or x.is_neg():
            return self._by_operator(x, residual)
        if residual is not None and (type(residual) not in _PLAIN or residual.is_neg()):
            return self._by_operator(x, residual)
        run = self._runners.get((x.shape[1:], x.dtype, x.device, residual is None))
        if run is None:
            run = self._prepare(x, residual)
        try:
            return run(x, residual)
        except ValueError as error:
            raise ValueError(f"layer {self.name}: {error}") from error

    def _by_operator(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Runs the convolution as an operator of torch, unless a gradient would have to pass through it."""
        if not torch.compiler.is_compiling():
            is_forward = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
            if is_forward or (x.requires_grad and torch.is_grad_enabled()):
                raise RuntimeError(
                    f"layer {self.name} has no gradient: call it under torch.inference_mode() or torch.no_grad()"
                )
        return sparse_conv2d(x, residual, self.values, self.columns, self.indptr, self.bias, self._spec)

    def prepare(self) -> None:
        """Does what the first call on the plan's input size would do: lays out tables, compiles a kernel.

        Raises:
            ValueError, RuntimeError: as a call does.
        """
        problem = self.plan.problem
        self._lay_out(problem.batch, problem.height, problem.width)

    def _prepare(self, x: torch.Tensor, residual: torch.Tensor | None) -> Runner:
        """A runner for a new input size, or the error that a call deserves."""
        storage = self.plan.problem.storage
        if x.dtype is not storage:
            raise TypeError(
                f"layer {self.name} computes in {storage}, its input is {x.dtype}; convert it with .to({storage})"
            )
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"layer {self.name} takes (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        if x.device != self.values.device:
            raise ValueError(
                f"layer {self.name} is on {self.values.device}, its input on {x.device}; move one to the other"
            )
        if (residual is not None) is not self.residual:
            made = "for" if self.residual else "without"
            raise TypeError(f"layer {self.name} was made {made} a residual, and was called otherwise")
        return self._lay_out(int(x.shape[0]), int(x.shape[2]), int(x.shape[3]))

    def _lay_out(self, batch: int, height: int, width: int) -> Runner:
        problem, device = self.plan.problem, self.values.device
        try:
            runners.check_not_capturing(device)
            at_size = self.problem(batch, height, width)
            run = runners.prepare(at_size, self.filter, self.bias, Choice.of(self.plan), self.name)
        except (ValueError, RuntimeError) as error:
            kinds = (ValueError, torch.OutOfMemoryError, RuntimeError)
            raise next(kind for kind in kinds if isinstance(error, kind))(f"layer {self.name}: {error}") from error
        shape = torch.Size((self.in_channels, height, width))
        self._runners.add((shape, problem.storage, device, not self.residual), run)
        return run

    def train(self, mode: bool = True) -> SparseConv2d:
        if mode:
            raise RuntimeError(
                f"layer {self.name} is for inference only: fine-tune the pruned model and convert it again"
            )
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

        super()._apply(keep_dtype, recurse)
        self._runners.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: runners hold kernels and pointers, and are made anew where the copy runs."""
        return {name: value for name, value in self.__dict__.items() if name != "_runners"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._runners = RunnerCache(_MOST_SIZES)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._runners.clear()

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
        text += f"padding={self.padding}, nnz={len(self.values)}, method={self.plan.method}"
        return text + (f", activation={self.activation}" if self.activation != "none" else "")
