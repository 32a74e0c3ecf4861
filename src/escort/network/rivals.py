"""What a conversion is compared with besides the original: its plain calls, torch.compile of it, and it in float32."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from escort.cuda.capture import in_a_line
from escort.network.check import Request
from escort.network.choose import NETWORK_ERROR_BOUND, race
from escort.network.context import dense_in
from escort.network.example import Example
from escort.network.model import ConvertedModel
from escort.network.original import Original, plain_copy
from escort.network.plan import NetworkPlan
from escort.network.tracing.state import same_draws
from escort.network.values import largest_error, tensors_of
from escort.planner import timing

#: What plans call them.
EAGER, COMPILED, FLOAT32 = "eager", "torch.compile", "float32"

_PLAIN_CALLS_S = 0.3  # seconds of calls after which no further round of them starts
_FLOAT32_S = 1.0  # likewise, of races with the model in float32
_log = logging.getLogger(__name__)


def laid_out(model: nn.Module, example: Example, memory_format: torch.memory_format) -> tuple[nn.Module, Example]:
    """A copy of a model and an example for it, in a memory format."""

    def lay_out(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x

    args, kwargs = tree_map_only(Tensor, lay_out, (example.args, dict(example.kwargs)))
    network = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
    return network, replace(example, args=args, kwargs=kwargs)


def compiled(model: nn.Module, example: Example) -> Callable[[], Any]:
    """A forward of what torch.compile makes of a model, on an example in channels_last. It compiles when it first runs.

    The model itself is not changed.
    """
    network, example = laid_out(model, example, torch.channels_last)
    network.compile(dynamic=False)
    return partial(example.run, network)


def compare_with_eager(
    chosen: ConvertedModel, dense: nn.Module, original: Original, request: Request
) -> ConvertedModel:
    """The network on a GPU with the times of plain calls in its plan, its own and those of the original.

    All were timed in CUDA graphs, which is what calls replay. Where they cannot, a converted network may be faster in a
    graph and slower without one: then the original is kept where its plain calls take less time.

    Args:
        dense: what stays where the original is kept.
    """
    plan, example = chosen.plan, original.example
    called = ConvertedModel(chosen.network, plan, original.model)  # its graphs go with it
    model = original.model if original.state is None else plain_copy(original.model)
    runs = [partial(example.run, called), partial(example.run, model)]
    try:
        with torch.inference_mode(), dense_in(request.precision, request.device):
            own_us, eager_us = timing.race_on_host(runs, request.device, budget_s=_PLAIN_CALLS_S)
    finally:
        called.graphs.clear()
        if original.state is not None:
            original.state.restore(chosen.network)
    request.progress.done(f"timed by plain calls: {own_us:.1f} us, the original's {eager_us:.1f} us")
    plan = replace(plan, call_time_us=own_us, rivals={**plan.rivals, EAGER: eager_us})
    if plan.not_captured is None or plan.kept_dense or own_us <= eager_us:
        chosen.plan = plan
        return chosen
    reason = f"calls replay no CUDA graph, and take {own_us:.0f} us without, those of the original {eager_us:.0f} us"
    if original.state is not None:
        original.state.restore(dense)
    kept = replace(plan, kept_dense=True, refused=reason, call_time_us=eager_us)
    return ConvertedModel(dense, kept, original.model)


def compare_with_float32(chosen: ConvertedModel, original: Original, request: Request) -> NetworkPlan:
    """The plan of a network of 16 bits on a CPU with the time of the dense model in float32, or why there is none.

    Torch computes 16 bits slowly on most CPUs, so that the original's own time promises too much.
    """
    plan, example = chosen.plan, original.example

    def widened(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x.clone()

    try:
        model = copy.deepcopy(original.model).float()
        args, kwargs = tree_map_only(Tensor, widened, (example.args, dict(example.kwargs)))
        runs = [partial(example.run, chosen.network), partial(replace(example, args=args, kwargs=kwargs).run, model)]
        with torch.inference_mode():
            own_us, time_us = timing.race(runs, rounds=5, budget_s=_FLOAT32_S)
    except Exception as failure:  # a model's code may be written for one type
        return replace(plan, not_tried=plan.not_tried | {FLOAT32: in_a_line(failure).rstrip(".")})
    finally:
        if original.state is not None:
            original.state.restore(chosen.network)
    request.progress.done(f"timed in {FLOAT32}: {time_us:.1f} us")
    said = "the dense model in float32 is faster than what was chosen"
    return _beside(plan, FLOAT32, said, own_us, time_us)


def compare_with_compiled(chosen: ConvertedModel, original: Original, request: Request) -> NetworkPlan:
    """The plan of a network on a GPU with the time of the dense model by torch.compile, or why there is none.

    Both networks are raced. Where torch.compile wins, a warning is logged, and what was chosen stays: nothing that is
    returned needs a compiler when it runs.
    """
    plan, example = chosen.plan, original.example
    try:
        run = compiled(original.model, example)
        with torch.inference_mode(), dense_in(request.precision, request.device):
            with same_draws():
                error = largest_error(tensors_of(run()), original.expected)
            bound = NETWORK_ERROR_BOUND[request.precision]
            if not error <= bound:
                raise ValueError(f"its outputs differ by {error:.1e} (bound {bound:.0e}) from the original's")
            (own_us, time_us), timer = race([partial(example.run, chosen.network), run], request.device)
        if timer != plan.timer:
            raise ValueError("it cannot be captured in a CUDA graph, by which the others were timed")
    except Exception as failure:  # of many kinds: compilers may be missing, or fail
        reason = timing.survived(getattr(failure, "inner_exception", failure)).rstrip(".")
        request.progress.done(f"not tried by {COMPILED}: {reason}")
        return replace(plan, not_tried=plan.not_tried | {COMPILED: reason})
    finally:
        if original.state is not None:
            original.state.restore(chosen.network)
    request.progress.done(f"timed by {COMPILED}: {time_us:.1f} us")
    said = "torch.compile of the dense model is faster than what was chosen"
    return _beside(plan, COMPILED, said, own_us, time_us)


def _beside(plan: NetworkPlan, rival: str, said: str, own_us: float, time_us: float) -> NetworkPlan:
    """A plan with the time of a rival, which stays one though it may be faster.

    Args:
        said: what is said in a warning where it is faster.
        own_us, time_us: what was chosen took, and the rival, in one race.
    """
    if time_us < own_us:
        _log.warning("%s: %.0f us, instead of %.0f us", said, time_us, own_us)
    return replace(plan, rivals={**plan.rivals, rival: time_us})
