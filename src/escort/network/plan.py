"""The plan of a network, and its table: what runs each layer, how long it takes, what became of the other methods."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from escort import report
from escort.methods import by_name, dense_for
from escort.network.example import Example
from escort.network.forecast.advice import advice_table
from escort.network.wording import convolution, machine_line, microseconds, percent, ratio
from escort.planner import Plan
from escort.planner.checked import check_fields
from escort.planner.machine import Machine
from escort.planner.timing import Timer
from escort.problem import MemoryFormat, Precision
from escort.report import Table
from escort.runtime import Batching, Favor
from escort.runtime.saved.errors import naming

_NAMES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}
#: Fields of a plan that are JSON values as they are, and that it holds where they say anything.
_PLAIN = (
    "not_tried packed_inputs refused rivals not_saved not_captured native_steps not_native widened is_favor_asked "
    "sparsities"
).split()
#: Further fields that are such values, where they are there.
_SOMETIMES = "samples favor precision device timer call_time_us".split()
#: Fields that the JSON of every plan has; older versions knew no others.
_ALWAYS = ("layers skipped input_shapes dense_time_us converted_time_us rel_error kept_dense machine").split()
_COLUMNS = ("Layer", "Convolution", "Zeros", "Method", "µs", "Dense µs", "Speedup", "Others µs")
_MOST_NAMES = 4  # of steps that are listed for a reason
#: What is said of times that were not taken of the layer itself.
_TIMES_FROM = {"equal layer": "equal layers", "plan store": "the plan store"}
#: The rival that was timed by plain calls, as `call_time_us` was.
_BY_CALLS = "eager"
#: Where a terminal's reader finds what that has no room for.
_WHY = " Why methods were not timed: candidates of plan.layers[NAME], or escort plan --candidates."
#: How a network is not tried, where that is not in a memory format.
_WAYS = {"graph": "as a graph", "torch.compile": "by torch.compile"}


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """What became of each convolution of a model, and how long the whole takes. Printed, it is a table.

    Attributes:
        layers: layer name to plan, in the order of execution.
        skipped: layer name to the reason why it was left alone.
        packed_inputs: whether some inputs come in lists or dicts, or are no tensors, so that shapes do not tell them.
        refused: why the converted network was not taken, whatever its time; None where it is right.
        not_tried: why the network was not tried as a "graph", in "channels_last", in "float32" or by "torch.compile".
        input_shapes: the example's shapes.
        input_dtypes: the example's types, as torch writes them without its name.
        input_names: the names of those inputs that are given by name, which are the last ones.
        dense_time_us, converted_time_us: median time of a forward on the example, of the model as given (None where the
            network was planned anew) and converted, both in `precision`.
        rel_error: ``||out - ref|| / ||ref||`` of the converted network against the original.
        kept_dense: whether the original network was kept because converting it did not pay.
        machine: what it was measured on.
        samples: how many samples of a larger batch go through native steps together; None for all.
        favor: whether threads share each layer ("latency"), or each takes samples of its own where a batch has enough
            for all of them ("throughput").
        is_favor_asked: whether that was asked for; else it is what was faster on the example.
        precision: what the convolutions compute in.
        device: what they were planned on, as torch writes it.
        timer: how both times were taken (see :mod:`escort.planner.timing`).
        rivals: median times in us of the dense model by others, which are never what was kept: on a GPU by
            "torch.compile", and "eager" by plain calls of the model itself, see `call_time_us`; on a CPU of a model of
            16 bits in "float32".
        call_time_us: on a GPU the median time of a plain call of what was kept, waited for, by the host's clock; None
            where it was not taken.
        not_saved: why the network cannot be saved; None where it can.
        not_captured: why calls on a GPU replay no CUDA graph; None where they do.
        native_steps, not_native: how many steps run natively on a CPU, and why the others do not.
        methods: the methods that the choice was restricted to; empty where it was among all.
        widened: the original's type, "float16" or "bfloat16", where it is computed in float32; empty where in its own.
        sparsities: layer name to the share of zeros in its filter; of plans of older versions nothing, and such a plan
            cannot be followed.
    """

    layers: dict[str, Plan]
    skipped: dict[str, str]
    input_shapes: tuple[tuple[int, ...], ...]
    dense_time_us: float | None
    converted_time_us: float
    rel_error: float
    kept_dense: bool
    machine: Machine
    samples: int | None = None
    favor: Favor = "latency"
    is_favor_asked: bool = False
    precision: Precision = "fp32"
    device: str = "cpu"
    input_dtypes: tuple[str, ...] = ()
    timer: Timer = "calls"
    input_names: tuple[str, ...] = ()
    not_tried: dict[str, str] = field(default_factory=dict)
    packed_inputs: bool = False
    refused: str | None = None
    rivals: dict[str, float] = field(default_factory=dict)
    not_saved: str | None = None
    not_captured: str | None = None
    native_steps: int = 0
    not_native: dict[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    widened: str = ""
    call_time_us: float | None = None
    sparsities: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return report.text(plan_table(self))

    def _repr_html_(self) -> str:
        """For notebooks: the table, and what to prune further."""
        advice = advice_table(self.layers, self.sparsities)
        return report.html(plan_table(self, whole=True)) + ("" if advice is None else report.html(advice))

    @property
    def speedup(self) -> float | None:
        """Dense time over the time of what was kept; None where the dense time is not known."""
        if self.kept_dense:
            return 1.0
        return None if self.dense_time_us is None else self.dense_time_us / self.converted_time_us

    @property
    def batching(self) -> Batching:
        """How a batch goes through native steps."""
        return Batching(self.samples, self.favor)

    @property
    def memory_format(self) -> MemoryFormat:
        """The memory format of the tensors that its convolutions write."""
        return next((layer.problem.memory_format for layer in self.layers.values()), "contiguous")

    @property
    def reason(self) -> str | None:
        """Why the original network was kept, None where it was converted."""
        if not self.kept_dense:
            return None
        if self.refused is not None:
            return f"{self.refused}: the original is kept"
        return (
            f"the converted network takes {self.converted_time_us:.0f} us, the original {self.dense_time_us:.0f} us: "
            "the original is kept; prune further or use a larger input"
        )

    @property
    def input_types(self) -> tuple[torch.dtype, ...]:
        """The example's types."""
        return tuple(_DTYPES[name] for name in self.input_dtypes) or (torch.float32,) * len(self.input_shapes)

    def example(self, device: torch.device | str) -> Example | None:
        """Random inputs like those that the network was planned for; zeros where they are no floating-point numbers.

        None where shapes do not tell what the inputs are.
        """
        if self.packed_inputs:
            return None
        tensors = [
            (torch.randn if dtype.is_floating_point else torch.zeros)(shape, dtype=dtype, device=device)
            for shape, dtype in zip(self.input_shapes, self.input_types, strict=True)
        ]
        positional = len(tensors) - len(self.input_names)
        return Example(tuple(tensors[:positional]), dict(zip(self.input_names, tensors[positional:], strict=True)))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; the last fifteen where they say anything."""
        data: dict[str, Any] = {
            "layers": {name: plan.to_json() for name, plan in self.layers.items()},
            "skipped": self.skipped,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "dense_time_us": self.dense_time_us,
            "converted_time_us": self.converted_time_us,
            "rel_error": self.rel_error if math.isfinite(self.rel_error) else None,
            "kept_dense": self.kept_dense,
            "machine": self.machine.to_json(),
            "samples": self.samples,
            "precision": self.precision,
            "device": self.device,
            "input_dtypes": list(self.input_dtypes),
            "timer": self.timer,
        }
        sometimes = {
            **{"input_names": list(self.input_names), "methods": list(self.methods)},
            "favor": self.favor if self.favor != "latency" else None,
            **{name: getattr(self, name) for name in (*_PLAIN, "call_time_us")},
        }
        return data | {name: value for name, value in sometimes.items() if value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NetworkPlan:
        """The plan behind :meth:`to_json`, of which every field has the type and the range that it must have.

        Raises:
            ValueError: naming what is wrong; also where a method or a config is none of this version.
        """
        if not isinstance(data, dict):
            raise ValueError(
                f"not a network plan: it is a dictionary, as json.loads gives it, got {type(data).__name__}"
            )
        if missing := ", ".join(name for name in _ALWAYS if name not in data):
            raise ValueError(f"not a network plan: it has no {missing}; make it by fast.plan.to_json()")
        plain = {name: data[name] for name in (*_PLAIN, *_ALWAYS, *_SOMETIMES) if name in data}
        try:
            plan = cls(
                **plain
                | {"layers": {name: _layer_plan(name, layer) for name, layer in data["layers"].items()}}
                | {"input_shapes": tuple(map(tuple, _list(data, "input_shapes")))}
                | {"rel_error": math.inf if data["rel_error"] is None else data["rel_error"]}
                | {"machine": Machine.from_json(data["machine"])}
                | {name: tuple(_list(data, name)) for name in ("input_dtypes", "input_names", "methods")}
            )
            rest = replace(plan, layers={}, rel_error=0.0 if data["rel_error"] is None else plan.rel_error)
            check_fields(rest)  # each layer's plan was checked when it was read
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"not a network plan: {error}") from error
        plan._check()
        return plan

    def _check(self) -> None:
        """Raises ValueError where the fields contradict each other."""
        problems = [layer.problem for layer in self.layers.values()]
        kinds = {(problem.device, problem.precision, problem.memory_format) for problem in problems}
        if (
            not re.fullmatch(r"cpu|cuda:\d{1,3}", self.device)
            or self.samples == 0
            or len(self.input_dtypes) not in (0, len(self.input_shapes))
            or not all(name in _DTYPES for name in self.input_dtypes)
            or len(set(self.input_names)) != len(self.input_names)
            or len(self.input_names) > len(self.input_shapes)
            or self.widened not in ("", "float16", "bfloat16")
            or not all(0.0 <= share <= 1.0 for share in self.sparsities.values())
            or not kinds <= {(self.device, self.precision, self.memory_format)}
        ):
            raise ValueError(
                f"not a network plan: its layers are for {kinds}, the whole for {self.device} in {self.precision}, "
                f"inputs of {self.input_dtypes} and named {self.input_names}, timed by {self.timer}, "
                f"shares of zeros from 0 to 1, got {sorted(set(self.sparsities.values()))[:3]}"
            )


def plan_table(plan: NetworkPlan, heading: str = "Plan per layer", *, whole: bool = False) -> Table:
    """One line per layer, then those that were left alone, then the whole network and its rivals.

    Args:
        whole: whether to say why methods were not timed, for which a terminal has no room.
    """
    lines = [_layer(name, layer, plan.sparsities.get(name), whole) for name, layer in plan.layers.items()]
    lines += [(name, "", "-", "left alone", "-", "-", "-", reason) for name, reason in plan.skipped.items()]
    kept = "kept dense" if plan.kept_dense else "escort"
    times = (
        microseconds(plan.converted_time_us),
        microseconds(plan.dense_time_us),
        ratio(plan.dense_time_us, plan.converted_time_us),
    )
    lines.append(("whole network", "", "-", kept, *times, plan.reason or ""))
    for rival, time_us in plan.rivals.items():
        if rival == _BY_CALLS:  # by another clock
            continue
        times = microseconds(time_us), microseconds(plan.dense_time_us), ratio(plan.dense_time_us, time_us)
        lines.append(("whole network", "", "-", rival, *times, "of the dense model, for comparison"))
    return Table(heading, _COLUMNS, tuple(lines), _caption(plan) + ("" if whole else _WHY))


def _layer(name: str, plan: Plan, sparsity: float | None, whole: bool) -> tuple[str, ...]:
    times = microseconds(plan.time_us), microseconds(plan.dense_time_us), ratio(plan.dense_time_us, plan.time_us)
    return (name, convolution(plan.problem), percent(sparsity), plan.method, *times, _others(plan, whole))


def _others(plan: Plan, whole: bool) -> str:
    """The best times of the methods that have no column of their own; those without one, and why if there is room."""
    texts, untimed = list[str](), dict[str, str]()
    dense = dense_for(plan.problem.device).name
    for method in dict.fromkeys(candidate.method for candidate in plan.candidates if candidate.method != plan.method):
        time_us = plan.best_us(method)
        if time_us is None:
            reasons = (c.reason for c in plan.candidates if c.method == method and c.reason)
            untimed[method] = next(reasons, "not timed")
        elif method != dense:
            texts.append(f"{method} {microseconds(time_us)}")
    if whole:
        return "; ".join(texts + [f"{method}: {reason}" for method, reason in untimed.items()])
    return "; ".join(texts + ([f"not {', '.join(untimed)}"] if untimed else []))


def _caption(plan: NetworkPlan) -> str:
    shapes = ", ".join("x".join(map(str, shape)) for shape in plan.input_shapes)
    memory_format = "" if plan.memory_format == "contiguous" else f", tensors in {plan.memory_format}"
    caption = f"Medians for an input of {shapes}{memory_format}, on {machine_line(plan.machine)}."
    if plan.widened and not plan.kept_dense:
        caption += f" Computed in {plan.precision}; inputs and outputs of {plan.widened} are converted."
    if plan.widened:
        caption += f" The whole network's dense time is torch's in {plan.widened}, in which most CPUs are slow."
    for way, reason in plan.not_tried.items():
        caption += f" Not tried {_WAYS.get(way, f'in {way}')}: {reason}."
    if plan.call_time_us is not None and _BY_CALLS in plan.rivals:
        ours, eager = microseconds(plan.call_time_us), microseconds(plan.rivals[_BY_CALLS])
        caption += f" Plain calls take {ours} us, those of the original {eager} us."
    for source, phrase in _TIMES_FROM.items():
        if count := sum(layer.times_from == source for layer in plan.layers.values()):
            caption += f" The times of {count} of {len(plan.layers)} layers are from {phrase}."
    if scattered := sum(not layer.is_steady for layer in plan.layers.values()):
        caption += f" The times of {scattered} of {len(plan.layers)} layers were disturbed by other processes."
    caption += _steps(plan.native_steps, plan.not_native) + _batching(plan.batching)
    if waived := sum(_is_waived(layer) for layer in plan.layers.values()):
        caption += f" In {waived} of {len(plan.layers)} layers torch is faster by less than the step between costs."
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


def _batching(batching: Batching) -> str:
    """How a batch runs, where that is not all at once."""
    if batching.samples is None:
        return ""
    at_a_time = f" Of a batch, {batching.samples} sample{'' if batching.samples == 1 else 's'}"
    if batching.favor == "throughput":
        return f"{at_a_time} at a time go through native steps on each thread."
    return f"{at_a_time} at a time go through native steps, on all threads."


def _is_waived(plan: Plan) -> bool:
    """Whether a method is faster and was not chosen, since no native program calls it."""
    methods = {candidate.method for candidate in plan.candidates if candidate.time_us is not None}
    methods = {name for name in methods if not by_name(name, plan.problem.device).is_native}
    times_us = [plan.best_us(name) or 0.0 for name in methods - {plan.method}]
    return plan.problem.device_type == "cpu" and min(times_us, default=math.inf) < (plan.time_us or 0.0)


def _layer_plan(name: str, data: Any) -> Plan:
    with naming(f"layer {name:.100}"):
        return Plan.from_json(data)


def _list(data: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(value := data.get(name, []), list):
        raise ValueError(f"{name} is a list, got {value!r:.50}")
    return value
