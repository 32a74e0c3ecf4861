"""What a conversion results in: a network that runs as planned, and the plan."""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import nn

from escort import report
from escort.layers import SparseConv2d
from escort.layers.observed import is_observed
from escort.network import batching
from escort.network.example import Example, is_shape
from escort.network.memory import keep_freed_memory
from escort.network.plan_table import plan_table
from escort.network.tracing.state import unchanged
from escort.network.values import tensors_of
from escort.planner import Plan
from escort.planner.machine import Machine
from escort.planner.timing import Timer
from escort.problem import MemoryFormat, Precision
from escort.runtime import Graphs, Program, how_calls_run, not_capturable
from escort.runtime.saved.builders import is_own
from escort.runtime.stand_in import plain_attributes

_NAMES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """What became of each convolution of a model, and how long the whole takes. Printed, it is a table.

    Attributes:
        layers: layer name to plan, in the order of execution.
        skipped: layer name to the reason why it was left alone.
        packed_inputs: whether some inputs come in lists or dicts, or are no tensors, so that shapes do not tell them.
        refused: why the converted network was not taken, whatever its time; None where it is right.
        not_tried: why the network was not tried as a "graph", in "channels_last" or by "torch.compile".
        input_shapes: the example's shapes.
        input_dtypes: the example's types, as torch writes them without its name.
        input_names: the names of those inputs that are given by name, which are the last ones.
        dense_time_us, converted_time_us: median time of a forward on the example, of the model as given (None where the
            network was planned anew) and converted, both in `precision`.
        rel_error: ``||out - ref|| / ||ref||`` of the converted network against the original.
        kept_dense: whether the original network was kept because converting it did not pay.
        machine: what it was measured on.
        samples: how many samples of a larger batch run at a time; None for all (see :mod:`escort.network.batching`).
        precision: what the convolutions compute in.
        device: what they were planned on, as torch writes it.
        timer: how both times were taken (see :mod:`escort.planner.timing`).
        rivals: median times in us of the dense model by others: by "torch.compile". It is never what was kept.
        not_saved: why the network cannot be saved; None where it can.
        not_captured: why calls on a GPU replay no CUDA graph; None where they do.
        native_steps, not_native: how many steps run natively on a CPU, and why the others do not.
        methods: the methods that the choice was restricted to; empty where it was among all.
        widened: the original's type, "float16" or "bfloat16", where it is computed in float32; empty where in its own.
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

    def __str__(self) -> str:
        return report.text(plan_table(self))

    def _repr_html_(self) -> str:
        """For notebooks."""
        return report.html(plan_table(self))

    @property
    def speedup(self) -> float | None:
        """Dense time over the time of what was kept; None where the dense time is not known."""
        if self.kept_dense:
            return 1.0
        return None if self.dense_time_us is None else self.dense_time_us / self.converted_time_us

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
        """The fields as JSON values; the last eleven where they say anything."""
        data: dict[str, Any] = {
            "layers": {name: plan.to_json() for name, plan in self.layers.items()},
            "skipped": self.skipped,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "dense_time_us": self.dense_time_us,
            "converted_time_us": self.converted_time_us,
            "rel_error": self.rel_error,
            "kept_dense": self.kept_dense,
            "machine": self.machine.to_json(),
            "samples": self.samples,
            "precision": self.precision,
            "device": self.device,
            "input_dtypes": list(self.input_dtypes),
            "timer": self.timer,
        }
        sometimes = {
            **{"input_names": list(self.input_names), "not_tried": self.not_tried, "packed_inputs": self.packed_inputs},
            **{"refused": self.refused, "rivals": self.rivals, "not_saved": self.not_saved},
            **{"not_captured": self.not_captured, "methods": list(self.methods), "widened": self.widened},
            **{"native_steps": self.native_steps, "not_native": self.not_native},
        }
        return data | {name: value for name, value in sometimes.items() if value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NetworkPlan:
        """The plan behind :meth:`to_json`. Raises ValueError on anything else."""
        try:
            plan = cls(
                layers={str(name): Plan.from_json(plan) for name, plan in data["layers"].items()},
                skipped=_texts(data["skipped"]),
                input_shapes=tuple(tuple(int(size) for size in shape) for shape in data["input_shapes"]),
                dense_time_us=None if data["dense_time_us"] is None else float(data["dense_time_us"]),
                converted_time_us=float(data["converted_time_us"]),
                rel_error=float(data["rel_error"]),
                kept_dense=bool(data["kept_dense"]),
                machine=Machine.from_json(data["machine"]),
                samples=None if data.get("samples") is None else max(int(data["samples"]), 1),
                precision=data.get("precision", "fp32"),
                device=str(data.get("device", "cpu")),
                input_dtypes=tuple(str(name) for name in data.get("input_dtypes", ())),
                timer=data.get("timer", "calls"),
                input_names=tuple(str(name) for name in data.get("input_names", ())),
                not_tried=_texts(data.get("not_tried", {})),
                packed_inputs=bool(data.get("packed_inputs", False)),
                refused=None if data.get("refused") is None else str(data["refused"]),
                rivals={str(name): float(time_us) for name, time_us in data.get("rivals", {}).items()},
                not_saved=None if data.get("not_saved") is None else str(data["not_saved"]),
                not_captured=None if data.get("not_captured") is None else str(data["not_captured"]),
                native_steps=int(data.get("native_steps", 0)),
                not_native=_texts(data.get("not_native", {})),
                methods=tuple(str(name) for name in data.get("methods", ())),
                widened=str(data.get("widened", "")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a network plan: {error}") from error
        plan._check()
        return plan

    def _check(self) -> None:
        """Raises ValueError where the fields contradict each other."""
        problems = [layer.problem for layer in self.layers.values()]
        kinds = {(problem.device, problem.precision, problem.memory_format) for problem in problems}
        if (
            not re.fullmatch(r"cpu|cuda:\d{1,3}", self.device)
            or self.precision not in get_args(Precision)
            or self.timer not in get_args(Timer)
            or len(self.input_dtypes) not in (0, len(self.input_shapes))
            or not all(name in _DTYPES for name in self.input_dtypes)
            or len(set(self.input_names)) != len(self.input_names)
            or len(self.input_names) > len(self.input_shapes)
            or self.widened not in ("", "float16", "bfloat16")
            or not kinds <= {(self.device, self.precision, self.memory_format)}
        ):
            raise ValueError(
                f"not a network plan: its layers are for {kinds}, the whole for {self.device} in {self.precision}, "
                f"inputs of {self.input_dtypes} and named {self.input_names}, timed by {self.timer}"
            )


def _texts(data: dict[str, Any]) -> dict[str, str]:
    return {str(name): str(text) for name, text in data.items()}


class ConvertedModel(nn.Module):
    """A drop-in for the model it was made from. Inference only.

    It takes what that model takes, by the same names, and has its plain attributes and its modules' names. It stays on
    the type of device and in the precision that it was planned for: convert the model again for another. Within a model
    in training it stays frozen and in eval mode, as a frozen batch norm does.

    Args:
        original: what it stands for; without it, it takes what `network` takes.

    Attributes:
        network: what runs; a program where the model could be traced, else the model with swapped layers.
        plan: what was chosen per layer and why.
        graphs: the CUDA graphs that calls on a GPU replay.
    """

    def __init__(self, network: nn.Module, plan: NetworkPlan, original: nn.Module | None = None) -> None:
        super().__init__()
        if plan.device == "cpu":
            keep_freed_memory()
        self.network = network.requires_grad_(False)
        self._plan_graphs(plan, Graphs(batching.mixing))
        self._missing: frozenset[str] = frozenset()
        if original is not None:
            signature = inspect.signature(original.forward)
            self.__class__ = _class_that_takes(signature)
            plain = plain_attributes(original)
            for name in plain.keys() - set(dir(ConvertedModel)) - {"network", "plan", "graphs", "training"}:
                self.__dict__[name] = plain[name]
            names = frozenset(dir(type(original))) - frozenset(dir(nn.Module)) - plain.keys()
            self._missing = names | original._modules.keys()  # of modules, those that were fused away
        super().train(False)

    def _plan_graphs(self, plan: NetworkPlan, graphs: Graphs) -> None:
        """Takes a plan, and says in it how calls run: whether they replay graphs, which are made as these are."""
        is_on_gpu = not plan.device.startswith("cpu")
        self.plan = replace(plan, **how_calls_run(self.network, is_on_gpu=is_on_gpu))
        self.graphs = copy.copy(graphs)
        self._may_replay = is_on_gpu

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self._may_replay and not is_observed():
            return self.graphs.call(self._modules["network"], self._run, inputs, named)  # type: ignore[arg-type]
        return self._run(*inputs, **named)

    def _run(self, *inputs: Any, **named: Any) -> Any:
        """A call, step by step."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of((inputs, named))):
            raise RuntimeError(
                "a converted model has no gradient, and its input needs one: detach the input, or call the model under "
                "torch.no_grad()"
            )
        samples = None if named or len(inputs) != 1 or torch.compiler.is_compiling() else self.plan.samples
        if samples and len(inputs[0]) > samples:
            return batching.run_in_parts(self.network, inputs[0], samples)
        return self.network(*inputs, **named)

    def counters(self) -> dict[str, dict[str, int]]:
        """What its layers did besides their plans: the layers of which there is something, by what, how often.

        Counted are input sizes that were not planned and had to be laid out, methods and configs in the place of the
        planned ones with the reason, calls as an operator of torch (see the guide, "Profile"), and residuals that were
        broadcast behind a layer. Copies start anew. What was compiled or exported has no layers, and counts nothing.
        """
        layers = {name: layer for name, layer in self.network.named_modules() if isinstance(layer, SparseConv2d)}
        return {name: counts for name, layer in layers.items() if (counts := layer.counters())}

    def with_network(self, network: nn.Module, plan: NetworkPlan) -> ConvertedModel:
        """The same drop-in by another network and plan."""
        other = copy.copy(self)
        other.__dict__ = {**self.__dict__, "_modules": {}, "plan": plan}
        other.network = network.requires_grad_(False)
        other._plan_graphs(plan, self.graphs)
        return other

    def warmup(self, inputs: Iterable[Any]) -> None:
        """Does for each of these inputs what its first calls would do: lays out tables, captures a CUDA graph.

        It serves calls on the current stream; where a capture fails, `graphs.stats()` says why. A state stays.

        Args:
            inputs: each is what the network is called with, as :func:`escort.convert` takes it; or a shape, where the
                network has one input, for zeros of that shape in the type of the example.

        Raises:
            ValueError: for a shape where the network takes other things than one tensor.
            TypeError: for one shape or one input instead of several.
        """
        if isinstance(inputs, torch.Tensor) or is_shape(inputs):
            raise TypeError("warmup takes several inputs or shapes; pass a list, with this one in it")
        with torch.no_grad(), unchanged(self.network) if not_capturable(self.network) else nullcontext():
            for example in map(self._example, inputs):
                example.run(self)
                if self._may_replay:
                    self.graphs.capture(self.network, example.args, dict(example.kwargs))

    def _example(self, given: Any) -> Example:
        """What a network is warmed up with."""
        if not is_shape(given):
            return Example.of(given)
        if self.plan.packed_inputs or len(self.plan.input_shapes) != 1 or self.plan.input_names:
            raise ValueError(f"the shape {tuple(given)} does not say what the network takes; pass inputs instead")
        device = next(itertools.chain(self.network.parameters(), self.network.buffers())).device
        return Example.of(torch.zeros(tuple(given), dtype=self.plan.input_types[0], device=device))

    @property
    def traced(self) -> bool:
        """Whether the whole network is one program and runs no code of the model: its file is loaded without one."""
        network = self.network
        if not isinstance(network, Program):
            return False
        return not any(is_own(network.get_submodule(s.target)) for s in network.listing.steps if s.kind == "layer")

    def __getattr__(self, name: str) -> Any:
        network = self.__dict__.get("_modules", {}).get("network")
        if name == "network" or network is None:
            return super().__getattr__(name)
        if name in network._modules:
            return network._modules[name]
        if name in self.__dict__.get("_missing", ()):
            raise AttributeError(
                f"a converted model has no {name}: of the original it keeps forward, plain attributes, and modules but "
                f"for those that were fused into others; use {name} of the original, or convert a module whose forward "
                "it is"
            )
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        signature = getattr(type(self), "_signature", None)
        return (_new, (signature,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module. Raises RuntimeError for the state of another model, such as the original's."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise RuntimeError(
                f"a converted model takes the state of one that was converted alike; load another into the original, "
                f"and convert that again: {error}"
            ) from error

    def train(self, mode: bool = True) -> ConvertedModel:
        """Changes nothing: it stays in eval mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ConvertedModel:
        if requires_grad:
            raise RuntimeError("a converted model is frozen: fine-tune the original, then convert it again")
        return self

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> ConvertedModel:
        for module in self.modules():  # all of them first: what is refused has changed nothing
            if isinstance(module, SparseConv2d):
                module.check_move(fn)
        super()._apply(fn, recurse)
        self.graphs.clear()
        return self


def _class_that_takes(signature: inspect.Signature) -> type[ConvertedModel]:
    """A class of converted models with the arguments of an original, which torch.export and editors read."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    signature = inspect.Signature(parameters)

    def forward(self: ConvertedModel, *inputs: Any, **named: Any) -> Any:
        return ConvertedModel.forward(self, *inputs, **named)

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[me, *parameters])  # type: ignore[attr-defined]
    return type(
        "ConvertedModel", (ConvertedModel,), {"forward": forward, "_signature": signature, "__module__": __name__}
    )


def _new(signature: inspect.Signature | None) -> ConvertedModel:
    cls = ConvertedModel if signature is None else _class_that_takes(signature)
    return cls.__new__(cls)
