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
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from escort.cuda import kernel as jit
from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods import Runner, by_name, for_device
from escort.methods.base import aligned
from escort.problem import TORCH_DTYPE, TORCH_MEMORY_FORMAT, Activation, Epilogue, MemoryFormat, Precision, Problem

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
    sparse_filter = SparseFilter(shape, spec.groups, indptr, columns, values)
    epilogue = Epilogue(bias is not None, residual is not None, spec.activation)
    geometry = spec.kernel, spec.stride, spec.padding, spec.dilation, spec.groups
    batch, channels, height, width = x.shape
    asked = spec.dtype, str(x.device), epilogue, spec.memory_format
    problem = Problem(batch, channels, height, width, shape[0], *geometry, *asked)
    return prepare(problem, sparse_filter, bias, spec.method, spec.config, spec.planned)


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
    sparse_filter: SparseFilter,
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
        return _prepare(problem, sparse_filter, bias, method, config, planned, name)
    bias = None if bias is None else bias.cpu()

    def on_device() -> Runner:
        with torch.cuda.device(problem.device):
            run = _prepare(problem, sparse_filter, bias, method, config, planned, name)
            torch.cuda.current_stream().synchronize()
            return run

    # On a thread of its own, because torch.compile(mode="reduce-overhead") lends the calling thread a pool of memory
    # that nothing may keep.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_device).result()


def _prepare(
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None,
    method: str,
    config: dict[str, Any],
    planned: tuple[int, int] | None,
    name: str,
) -> Runner:
    chosen = by_name(method, problem.device)
    others = [other for other in for_device(problem.device) if other is not chosen]
    candidates = [chosen, *sorted(others, key=lambda other: other.compiles_per_filter)]  # what takes minutes, last
    size = problem.height, problem.width
    takes_long = planned not in (None, size) and _compile_s(chosen, problem, sparse_filter, config) > _PATIENCE_S
    if takes_long:
        candidates.sort(key=lambda other: other.compiles_per_filter)
    refusal = None
    for candidate in candidates:
        if reason := candidate.unsupported(problem):
            refusal = refusal or ValueError(reason)
            continue
        for first_choice in (False, True) if candidate is chosen else (True,):
            try:
                knobs = (
                    candidate.configs(problem, sparse_filter)[0] if first_choice else candidate.config_type(**config)
                )
                run = candidate.prepare(problem, sparse_filter, bias, knobs).run
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


def _compile_s(method: Any, problem: Problem, sparse_filter: SparseFilter, config: dict[str, Any]) -> float:
    """About how many seconds of one core it takes until a config can run; no end where it does not fit."""
    if not method.compiles_per_filter:
        return 0.0
    try:
        return float(method.compile_s(problem, sparse_filter, method.config_type(**config)))
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
#: What max_pool2d takes on a GPU, in the order of the kernel's numbers for them.
POOLED_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
_POOL_THREADS, _MOST_VECTORS = 256, 2**31 - 256


@torch.library.impl("escort::max_pool2d", "CPU")
def _max_pool2d(
    x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    _check_pool(x, kernel, stride, padding, dilation)
    x = x.contiguous()
    y = _max_pool2d_shape(x, kernel, stride, padding, dilation, ceil_mode)
    planes, sizes = x.shape[0] * x.shape[1], (x.shape[2:], y.shape[2:], kernel, stride, padding, dilation)
    _cpu.MaxPool2d(*sizes).run(x.data_ptr(), y.data_ptr(), planes, torch.get_num_threads())
    return y


def _max_pool2d_on_gpu(
    x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    _check_pool(x, kernel, stride, padding, dilation)
    last = _in_channels_last(x)
    x = x.contiguous(memory_format=TORCH_MEMORY_FORMAT["channels_last" if last else "contiguous"])
    y = _max_pool2d_shape(x, kernel, stride, padding, dilation, ceil_mode)
    pitch = x.shape[1] if last else 1
    vector = math.gcd(pitch, 16 // x.element_size())
    vectors = y.numel() // vector
    if vectors > _MOST_VECTORS:  # torch's has no such limit
        return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    launch = _pool_launch(x.device, x.dtype, vector, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    blocks = -(-vectors // _POOL_THREADS)
    launch((blocks, 1, 1), aligned(x, vector * x.element_size()), y, vectors, pitch, *x.shape[2:], *y.shape[2:])
    return y


torch.library.impl("escort::max_pool2d", "CUDA", _max_pool2d_on_gpu)


@lru_cache(_MOST_RUNNERS)
def _pool_launch(
    device: torch.device, dtype: torch.dtype, vector: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> jit.Launch:
    """Of kernels/cuda/max_pool.cu, compiled for a window."""
    check_not_capturing(device)
    names = "ROWS COLUMNS DOWN RIGHT TOP LEFT DILATION_DOWN DILATION_RIGHT".split()
    window = dict(zip(names, (*kernel, *stride, *padding, *dilation), strict=True))
    compiled = jit.kernel("max_pool.cu", {"STORAGE": POOLED_ON_GPU.index(dtype), "VECTOR": vector, **window}, device)
    return compiled.bind(_POOL_THREADS, 0, (torch.Tensor, torch.Tensor, *[int] * 6), overlap=True)


@torch.compiler.assume_constant_result
def pools(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether max_pool2d takes what lies there; a GPU may be too old, or what compiles for it not installed."""
    if device.type != "cuda":
        return device.type == "cpu" and dtype is torch.float32
    return dtype in POOLED_ON_GPU and _compiles_for(device)


@cache
def _compiles_for(device: torch.device) -> bool:
    return jit.unavailable(device) is None


def _in_channels_last(x: torch.Tensor) -> bool:
    """Whether a pool's output is, as its input; the CPU's kernel has planes."""
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _check_pool(x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    taken = POOLED_ON_GPU if x.is_cuda else (torch.float32,)
    if x.ndim != 4 or x.dtype not in taken:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in taken)
        raise ValueError(f"max_pool2d takes {wanted} (N, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    if min(*kernel, *stride, *dilation) < 1 or any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"max_pool2d takes positive sizes and padding of at most half the kernel, got kernel {kernel}, "
            f"stride {stride}, padding {padding}, dilation {dilation}"
        )


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
    memory_format = TORCH_MEMORY_FORMAT["channels_last" if _in_channels_last(x) else "contiguous"]
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format)


max_pool2d: Callable[..., torch.Tensor] = torch.ops.escort.max_pool2d.default
