"""Where the time of a run goes: padding, im2col, product, direct, other.

On a GPU the times of kernels are summed, on the CPU the times that torch's operators spend themselves. What counts as
a product is a dense convolution or a dense or sparse matrix product, whichever library does it.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from escort import reference
from escort.cli.rivals import dense_at_its_best
from escort.layers import SparseConv2d
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.convert import convert
from escort.problem import Precision

#: In the order in which they are stacked.
PARTS = ("padding", "im2col", "product", "direct", "other")

_DIRECT = "escort::direct"
#: Kernels by name, the first match decides.
_KERNELS = (
    (re.compile(r"^direct\b"), "direct"),
    (re.compile(r"im2col"), "im2col"),
    (re.compile(r"nchwToNhwc|nhwcToNchw|convertTensor"), "other"),  # cuDNN's changes of memory format
    (re.compile(r"gemm|gemv|cutlass|xmma|nvjet|cublas|cudnn|conv|winograd|fft|cusparse|spmm|csrmm", re.I), "product"),
    (re.compile(r"pad"), "padding"),
)
#: Operators by name; what they call without being named here belongs to them.
_OPERATORS = {
    _DIRECT: "direct",
    "aten::im2col": "im2col",
    **dict.fromkeys(("aten::pad", "aten::constant_pad_nd"), "padding"),
    **dict.fromkeys((f"aten::{name}" for name in "conv2d convolution linear matmul addmm mm bmm".split()), "product"),
}


def part_times(run: Callable[[], object], device: str, *, calls: int = 4) -> dict[str, float]:
    """Microseconds of a call by part, all of :data:`PARTS`, as torch's profiler sees them.

    On the CPU, direct convolutions are seen where they run within :func:`marking`.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would report its own start and stop on stderr
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for count in (2, calls):  # the first calls warm up the profiler too
        with profile(activities=activities) as seen:
            for _ in range(count):
                run()
            if on_gpu:
                torch.cuda.synchronize(device)
    events = seen.events() or ()
    times = dict.fromkeys(PARTS, 0.0)
    for part, time_us in kernel_times(events) if on_gpu else operator_times(events):
        times[part] += time_us / calls
    return times


def kernel_times(events: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """Part and microseconds of each thing that the GPU did."""
    for event in events:
        # Where the host marks a range, the profiler shows its time on the GPU as well, besides that of its kernels.
        is_range = getattr(event, "is_user_annotation", False) or event.name == _DIRECT
        if event.device_type.name == "CUDA" and not is_range:
            part = next((part for name, part in _KERNELS if name.search(event.name)), "other")
            yield part, event.time_range.elapsed_us()


def operator_times(events: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """Part and microseconds of each operator on the CPU, without those that it calls."""
    for event in events:
        caller = event
        while caller is not None and caller.name not in _OPERATORS:
            caller = caller.cpu_parent
        yield "other" if caller is None else _OPERATORS[caller.name], event.self_cpu_time_total


def network_part_times(
    model: nn.Module, x: Tensor, precision: Precision
) -> list[tuple[str, dict[str, Any], float, dict[str, float]]]:
    """Where a whole network's time goes, converted, and run eagerly in the memory format that takes less.

    Args:
        model: dense modules in eval mode, on the device of x: (N, C, H, W).

    Returns:
        Method and config as in a row, the error relative to the model in float64, and the :func:`part_times`.

    Raises:
        RuntimeError: where one computes something else than the model; nothing is timed then.
    """
    device = str(x.device)
    converted = convert(model, x, precision=precision)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    eager = [("contiguous", model, x), ("channels_last", last, x.contiguous(memory_format=torch.channels_last))]
    bound = NETWORK_ERROR_BOUND[precision]
    with torch.inference_mode(), dense_at_its_best(precision):
        expected = copy.deepcopy(model).double()(x.double())
        errors = {name: reference.compare(module(inputs), expected) for name, module, inputs in eager}
        errors["escort"] = reference.compare(converted(x), expected)
        if not max(errors.values()) <= bound:
            raise RuntimeError(f"relative errors of {errors} exceed {bound:.0e}; please report it")
        with _marked(converted):
            ours = part_times(lambda: converted(x), device)
        timed = {name: part_times(partial(module, inputs), device) for name, module, inputs in eager}
    best = min(timed, key=lambda name: sum(timed[name].values()))
    return [
        ("escort", {"kept_dense": converted.plan.kept_dense}, errors["escort"], ours),
        ("eager", {"memory_format": best}, errors[best], timed[best]),
    ]


@contextmanager
def _marked(network: nn.Module) -> Iterator[None]:
    """Lets the profiler see a converted network's direct convolutions, which are no operators of torch."""
    hooks = []
    try:
        for module in network.modules():
            if isinstance(module, SparseConv2d) and module.plan.method == "direct":
                mark = record_function(_DIRECT)
                hooks.append(module.register_forward_pre_hook(lambda *_, mark=mark: _none(mark.__enter__())))
                hooks.append(module.register_forward_hook(lambda *_, mark=mark: _none(mark.__exit__(None, None, None))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def marking(run: Callable[[], object]) -> Callable[[], object]:
    """The same run, seen by the profiler as one direct convolution."""

    def marked_run() -> object:
        with record_function(_DIRECT):
            return run()

    return marked_run


def _none(_: object) -> None:
    """What a hook returns so as to change nothing."""
