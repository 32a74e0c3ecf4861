"""The plan of a network as a table: what runs each layer, how long it takes, and what became of the other methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from escort.methods import dense_for
from escort.planner import Plan
from escort.planner.machine import Machine
from escort.problem import Problem
from escort.report import Table

if TYPE_CHECKING:
    from escort.network.model import NetworkPlan

_COLUMNS = ("Layer", "Convolution", "Method", "µs", "Dense µs", "Speedup", "Others µs")
_MOST_NAMES = 4  # of steps that are listed for a reason
#: What is said of times that were not taken of the layer itself.
_TIMES_FROM = {"equal layer": "equal layers", "plan store": "the plan store"}
#: How a network is not tried, where that is not in a memory format.
_WAYS = {"graph": "as a graph", "torch.compile": "by torch.compile"}


def plan_table(plan: NetworkPlan, heading: str = "Plan per layer") -> Table:
    """One line per layer, then those that were left alone, then the whole network and its rivals."""
    lines = [_layer(name, layer) for name, layer in plan.layers.items()]
    lines += [(name, "", "left alone", "-", "-", "-", reason) for name, reason in plan.skipped.items()]
    kept = "kept dense" if plan.kept_dense else "escort"
    times = _us(plan.converted_time_us), _us(plan.dense_time_us), _ratio(plan.dense_time_us, plan.converted_time_us)
    lines.append(("whole network", "", kept, *times, plan.reason or ""))
    for rival, time_us in plan.rivals.items():
        times = _us(time_us), _us(plan.dense_time_us), _ratio(plan.dense_time_us, time_us)
        lines.append(("whole network", "", rival, *times, "of the dense model, for comparison"))
    return Table(heading, _COLUMNS, tuple(lines), _caption(plan))


def machine_line(machine: Machine) -> str:
    """What a measurement was made on, in a few words."""
    host = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    if machine.cuda:
        host = f"driver {machine.driver}, CUDA {machine.cuda}"
    return f"{machine.device}, {machine.isa}, {host}, torch {machine.torch}"


def convolution(p: Problem) -> str:
    """A convolution in a few words: channels, kernel_size, input size, stride and groups."""
    text = f"{p.in_channels}->{p.out_channels} {p.kernel_size[0]}x{p.kernel_size[1]}, {p.height}x{p.width}"
    if p.stride != (1, 1):
        text += f" /{p.stride[0]}" if p.stride[0] == p.stride[1] else f" /{p.stride[0]},{p.stride[1]}"
    return text + (f", {p.groups} groups" if p.groups > 1 else "")


def _layer(name: str, plan: Plan) -> tuple[str, ...]:
    times = _us(plan.time_us), _us(plan.dense_time_us), _ratio(plan.dense_time_us, plan.time_us)
    return (name, convolution(plan.problem), plan.method, *times, _others(plan))


def _others(plan: Plan) -> str:
    """The best times of the methods that have no column of their own, and why a method was refused."""
    texts = []
    dense = dense_for(plan.problem.device).name
    for method in dict.fromkeys(candidate.method for candidate in plan.candidates if candidate.method != plan.method):
        time_us = plan.best_us(method)
        if method == dense and time_us is not None:
            continue
        reasons = (c.reason for c in plan.candidates if c.method == method and c.reason)
        texts.append(f"{method} {_us(time_us)}" if time_us is not None else f"{method}: {next(reasons, 'not timed')}")
    return "; ".join(texts)


def _caption(plan: NetworkPlan) -> str:
    shapes = ", ".join("x".join(map(str, shape)) for shape in plan.input_shapes)
    memory_format = "" if plan.memory_format == "contiguous" else f", tensors in {plan.memory_format}"
    caption = f"Medians for an input of {shapes}{memory_format}, on {machine_line(plan.machine)}."
    if plan.widened and not plan.kept_dense:
        caption += f" Computed in {plan.precision}; inputs and outputs of {plan.widened} are converted."
    for way, reason in plan.not_tried.items():
        caption += f" Not tried {_WAYS.get(way, f'in {way}')}: {reason}."
    for source, phrase in _TIMES_FROM.items():
        if count := sum(layer.times_from == source for layer in plan.layers.values()):
            caption += f" The times of {count} of {len(plan.layers)} layers are from {phrase}."
    if scattered := sum(not layer.is_steady for layer in plan.layers.values()):
        caption += f" The times of {scattered} of {len(plan.layers)} layers were disturbed by other processes."
    caption += _steps(plan.native_steps, plan.not_native)
    caption += f" Calls replay no CUDA graph: {plan.not_captured}." if plan.not_captured else ""
    return caption + (f" It cannot be saved: {plan.not_saved}." if plan.not_saved else "")


def _steps(native: int, others: Mapping[str, str]) -> str:
    """How many steps run natively, and the others by reason."""
    if not others:
        return f" All {native} steps run natively." if native else ""
    groups: dict[str, list[str]] = {}
    for name, reason in others.items():
        groups.setdefault(reason, []).append(name)
    parts = []
    for reason, names in groups.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        parts.append(f"{', '.join(names[:_MOST_NAMES])}{more} ({reason})")
    return f" {native} of {native + len(others)} steps run natively; not {'; '.join(parts)}."


def _us(time_us: float | None) -> str:
    if time_us is None:
        return "-"
    return f"{time_us:,.0f}" if time_us >= 10 else f"{time_us:.1f}"


def _ratio(slow_us: float | None, fast_us: float | None) -> str:
    return f"{slow_us / fast_us:.2f}x" if slow_us and fast_us else "-"
