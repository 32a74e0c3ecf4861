"""Our kernels as torch operators, for torch.compile and torch.export.

Everything an operator needs is in its arguments, so an exported program carries its filters with it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from escort import _kernels
from escort.methods import Runner, by_name, for_device
from escort.planner import is_compiled
from escort.problem import TORCH_DTYPE, TORCH_MEMORY_FORMAT, Activation, Epilogue, MemoryFormat, Precision, Problem
from escort.sparse import StretchedCSR

# `spec` is a JSON object: one string costs less per call than its dozen values would.
torch.library.define(
    "escort::sparse_conv2d",
    "(Tensor x, Tensor? residual, Tensor values, Tensor columns, Tensor indptr, Tensor? bias, str spec) -> Tensor",
)

#: Runners of recent calls. An entry keeps its filter alive, so that an address in a key is never another filter's.
_runners: OrderedDict[tuple[object, ...], tuple[Runner, tuple[torch.Tensor | None, ...]]] = OrderedDict()
_MOST_RUNNERS = 1024
#: Seconds that a call may take to compile a kernel for an input size that was not planned.
_PATIENCE_S = 1.0


@dataclass(frozen=True)
class Spec:
    """What the operator needs to know of a layer beside its tensors."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    activation: Activation
    method: str
    config: dict[str, Any]
    dtype: Precision = "fp32"
    memory_format: MemoryFormat = "contiguous"
    planned: tuple[int, int] | None = None  # the input size, None in programs exported before it was told

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        values = json.loads(text)
        names = "kernel", "stride", "padding", "dilation", "planned"
        tuples = {name: tuple(values[name]) for name in names if values.get(name) is not None}
        return cls(**{**values, **tuples})


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
    key: tuple[object, ...] = (x.shape[1:], x.dtype, x.get_device(), residual is None, spec)
    key += (values.data_ptr(), columns.data_ptr(), indptr.data_ptr(), version)
    if bias is not None:
        key += (bias.data_ptr(), 0 if bias.is_inference() else bias._version)
    entry = _runners.get(key)
    if entry is None:
        run = _runner(x, residual, (values, columns, indptr), bias, Spec.from_json(spec))
        entry = _runners[key] = run, (values, columns, indptr, bias)
        if len(_runners) > _MOST_RUNNERS:
            _runners.popitem(last=False)
    return entry[0](x, residual)


def _runner(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    arrays: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    spec: Spec,
) -> Runner:
    if x.dtype is not TORCH_DTYPE[spec.dtype] or x.device != arrays[0].device:
        raise ValueError(
            f"sparse_conv2d takes {TORCH_DTYPE[spec.dtype]} on the filter's device, {arrays[0].device}, got {x.dtype} "
            f"on {x.device}"
        )
    check_not_capturing(x.device)
    values, columns, indptr = (tensor.cpu().numpy() for tensor in arrays)
    shape = (len(indptr) - 1, x.shape[1] // spec.groups, *spec.kernel)
    filter = StretchedCSR(shape, spec.groups, indptr, columns, values)
    epilogue = Epilogue(bias is not None, residual is not None, spec.activation)
    geometry = spec.kernel, spec.stride, spec.padding, spec.dilation, spec.groups
    batch, channels, height, width = x.shape
    asked = spec.dtype, str(x.device), epilogue, spec.memory_format
    problem = Problem(batch, channels, height, width, shape[0], *geometry, *asked)
    return prepare(problem, filter, bias, spec.method, spec.config, spec.planned)


def check_not_capturing(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is captured on that device: what follows allocates and waits."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph cannot be captured from the first call on this input size; call it once"
                )


def prepare(
    problem: Problem,
    filter: StretchedCSR,
    bias: torch.Tensor | None,
    method: str,
    config: dict[str, Any],
    planned: tuple[int, int] | None = None,
    name: str = "a convolution",
) -> Runner:
    """A runner of that method and config, complete on its device when this returns, so that any stream may call it.

    An input size that the config does not fit runs by the method's own first choice for it, and one that the method
    refuses by the first other method that takes it. So does, with a warning, one that was not planned and takes long to
    compile for: a call must not take minutes.

    Args:
        planned: the input size (height, width) that method and config were chosen for, None for this one.
        name: what the warning calls the layer.

    Raises:
        ValueError: where no method takes the problem.
    """
    if problem.device_type == "cpu":
        return _prepare(problem, filter, bias, method, config, planned, name)
    bias = None if bias is None else bias.cpu()

    def on_device() -> Runner:
        with torch.cuda.device(problem.device):
            run = _prepare(problem, filter, bias, method, config, planned, name)
            torch.cuda.current_stream().synchronize()
            return run

    # On a thread of its own, because torch.compile(mode="reduce-overhead") lends the calling thread a pool of memory
    # that nothing may keep.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_device).result()


def _prepare(
    problem: Problem,
    filter: StretchedCSR,
    bias: torch.Tensor | None,
    method: str,
    config: dict[str, Any],
    planned: tuple[int, int] | None,
    name: str,
) -> Runner:
    chosen = by_name(method, problem.device)
    others = [other for other in for_device(problem.device) if other is not chosen]
    candidates = [chosen, *sorted(others, key=is_compiled)]  # what compiles for minutes comes last
    size = problem.height, problem.width
    takes_long = planned not in (None, size) and _compile_s(chosen, problem, filter, config) > _PATIENCE_S
    if takes_long:
        candidates.sort(key=is_compiled)
    refusal = None
    for candidate in candidates:
        if reason := candidate.unsupported(problem):
            refusal = refusal or ValueError(reason)
            continue
        for first_choice in (False, True) if candidate is chosen else (True,):
            try:
                knobs = candidate.configs(problem, filter)[0] if first_choice else candidate.config_type(**config)
                run = candidate.prepare(problem, filter, bias, knobs)
            except ValueError as error:
                refusal = refusal or error
                continue
            if takes_long and candidate is not chosen:
                warnings.warn(
                    f"{name}, {problem.in_channels} to {problem.out_channels} channels, was planned for inputs of "
                    f"{planned}; those of {size} run by {candidate.name}, as compiling a {method} kernel would take "
                    "long: convert the model with such an example if they matter",
                    stacklevel=2,
                )
            return run
    assert refusal is not None
    raise refusal


def _compile_s(method: Any, problem: Problem, filter: StretchedCSR, config: dict[str, Any]) -> float:
    """About how many seconds of one core it takes until a config can run; no end where it does not fit."""
    if not is_compiled(method):
        return 0.0
    try:
        return float(method.compile_s(problem, filter, method.config_type(**config)))
    except ValueError:
        return math.inf


@torch.library.register_fake("escort::sparse_conv2d")
def _sparse_conv2d_shape(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    values: torch.Tensor,
    columns: torch.Tensor,
    indptr: torch.Tensor,
    bias: torch.Tensor | None,
    spec: str,
) -> torch.Tensor:
    s = Spec.from_json(spec)
    size = [
        (x.shape[2 + i] + sum(s.padding[2 * i : 2 * i + 2]) - (s.kernel[i] - 1) * s.dilation[i] - 1) // s.stride[i] + 1
        for i in (0, 1)
    ]
    y = x.new_empty((x.shape[0], indptr.shape[0] - 1, *size))
    return y.contiguous(memory_format=TORCH_MEMORY_FORMAT[s.memory_format])


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
    if min(*kernel, *stride, *dilation) < 1 or any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"max_pool2d takes positive sizes and padding of at most half the kernel, got kernel {kernel}, "
            f"stride {stride}, padding {padding}, dilation {dilation}"
        )
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
