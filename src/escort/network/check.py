"""A request for a conversion: what it may say, and what is refused and why."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from escort.arguments import is_number
from escort.layers import SparseConv2d
from escort.methods import Method, by_name, dense_for
from escort.network.context import tf32_is_allowed
from escort.network.example import Example
from escort.network.plan import NetworkPlan
from escort.network.progress import Progress
from escort.problem import TORCH_DTYPE, Precision
from escort.runtime import Favor

#: How long conversion may compile kernels for the weights: by name, or in seconds.
Effort = Literal["fast", "best"] | float

#: The seconds behind the names.
EFFORT_S: dict[str, float] = {"fast": 0.0, "best": 300.0}

#: Whether to leave a convolution alone, by its name and the module itself.
Skip = Callable[[str, nn.Module], bool]

#: What stands among quantized modules, and adds and concatenates floats.
_IN_FLOAT = (torch.ao.nn.quantized.FloatFunctional, torch.ao.nn.quantized.FXFloatFunctional)

_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Request:
    """A request for a conversion, checked.

    Attributes:
        device: where the model is, and the example.
        precision: what the convolutions compute in.
        compile_budget_s: seconds that compiling kernels for the weights may take.
        methods: what is weighed for a layer; None for all that the device has.
        skip: which convolutions to leave alone; None for none.
        progress: where the conversion tells what it is at.
        remeasure: whether to measure all layers, whatever was measured before.
        widened: the type of the model's weights where float32 stands for it; None where it is that of the precision.
        favor: what threads of a CPU do for; None for what is faster on the example.
        pinned: the plan to follow, which was made before; None where what runs a layer is measured.
    """

    device: torch.device
    precision: Precision
    compile_budget_s: float = 0.0
    methods: tuple[Method, ...] | None = None
    skip: Skip | None = None
    progress: Progress = field(default_factory=Progress)
    remeasure: bool = False
    widened: torch.dtype | None = None
    favor: Favor | None = None
    pinned: NetworkPlan | None = None

    @property
    def has_rival(self) -> bool:
        """Whether the whole network is compared with torch.compile of the dense model."""
        return self.device.type == "cuda" and self.pinned is None and self.compile_budget_s > 0.0

    @property
    def rounding(self) -> Precision:
        """The precision that the outputs are rounded to."""
        return self.precision if self.widened is None else _PRECISIONS[self.widened]

    def inside(self, prefix: str) -> Request:
        """The request for a part of the network: names there go on behind `prefix`."""
        skip = self.skip
        return self if skip is None or not prefix else replace(self, skip=lambda name, conv: skip(prefix + name, conv))

    def left_alone(self, name: str, conv: nn.Module) -> str | None:
        """Why the user wants a convolution left alone, or None."""
        return "you asked to skip it" if self.skip is not None and self.skip(name, conv) else None


def check_model(model: nn.Module, example: Example) -> None:
    """Raises TypeError or ValueError for a model or an example that no request could convert."""
    for name, module in model.named_modules():
        if isinstance(module, SparseConv2d):
            where = f"layer {name} of the model" if name else "the model"
            raise ValueError(
                f"{where} is converted already; use escort.replan to plan it anew, or convert the original"
            )
    for name, module in model.named_modules():
        where = _where(name)
        quantized = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        if quantized and not isinstance(module, _IN_FLOAT):
            raise ValueError(
                f"{where} is quantized, and convert takes floating-point weights; pass the model from before that"
            )
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(f"{where} has no weights yet; call the model once on an input")
    training = next((_where(name) for name, module in model.named_modules() if module.training), None)
    if training is not None and not isinstance(model, fx.GraphModule):
        raise ValueError(f"{training} is in training mode; call model.eval() first")
    device = example.device
    for name, dtype in _weight_types(model).items():
        if dtype not in _PRECISIONS:
            raise ValueError(f"{_where(name)}: weights of {dtype}; convert the model to float32 with .float()")
    for x in example.tensors:
        if x.device != device:
            raise ValueError(f"the example is on {device} and on {x.device}; move all of it to one device")
        if not x.numel():
            raise ValueError(f"the example of shape {tuple(x.shape)} holds nothing to time; pass one of some samples")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            raise ValueError(f"tensor {name} is on {tensor.device}, the example on {device}; move one to the other")
        if tensor.layout is not torch.strided:
            raise ValueError(f"tensor {name} has the layout {tensor.layout}; make it dense, with .to_dense()")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"convolutions run on the CPU and on NVIDIA GPUs; move the model from {device} with .cpu()")
    _check_filters_are_finite(model)
    for x in example.tensors:
        is_map = x.ndim == 4 and x.layout is torch.strided and x.dtype in _PRECISIONS  # masks may hold infinities
        if is_map and not all(bound.isfinite() for bound in x.aminmax()):  # which takes no memory, and keeps NaN
            raise ValueError(
                f"the example of shape {tuple(x.shape)} holds NaN or infinity, by which no output can be judged; pass "
                "finite numbers"
            )
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "autocast is on, which converted layers do not follow; convert outside of it, the model in one type"
        )


def _check_filters_are_finite(model: nn.Module) -> None:
    """Raises ValueError for a filter, its bias or a batch norm behind it that is not; other tensors may be infinite."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
            for key, tensor in (*module.named_parameters(), *module.named_buffers()):
                if not torch.isfinite(tensor).all():
                    where = f"layer {name}: its {key}" if name else f"the model's {key}"
                    raise ValueError(
                        f"{where} holds NaN or infinity; mend it, as a pruned filter cannot skip what is not finite"
                    )


def settle_favor(favor: Favor | None, device: torch.device) -> Favor | None:
    """What threads shall do for. Raises ValueError for anything else, and on a GPU."""
    if favor is not None and favor not in get_args(Favor):
        raise ValueError(f"favor is one of {get_args(Favor)}, or None for what is faster, got {favor!r}")
    if favor is not None and device.type != "cpu":
        raise ValueError(f"favor says how threads of a CPU share a batch; leave it out for a model on {device}")
    return favor


def settle_precision(
    model: nn.Module, device: torch.device, precision: Precision | None
) -> tuple[Precision, torch.dtype | None]:
    """What the convolutions shall compute in, and the type of the weights where float32 shall stand for it."""
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(
            f"precision is one of {get_args(Precision)}, or None for that of the weights, got {precision!r}"
        )
    types = _weight_types(model)
    dtype = next(iter(types.values()), torch.float32)
    for name, other in types.items():
        if other is not dtype:
            raise ValueError(
                f"{_where(name)}: weights of {other} among others of {dtype}; convert the model to one type"
            )
    if dtype is not torch.float32 and device.type == "cpu":
        if precision not in (None, "fp32"):
            raise ValueError(
                f"precision {precision!r} is for NVIDIA GPUs, the model is on the CPU, where weights of {dtype} are "
                "computed with in float32; leave it out"
            )
        return "fp32", dtype
    if precision is None:
        if dtype is torch.float32 and device.type == "cuda" and tf32_is_allowed():
            warnings.warn(
                "torch runs this model's convolutions in TF32, as it may by default; converted, they compute in strict "
                "float32: pass precision='tf32' to allow TF32, or precision='fp32' to silence this",
                stacklevel=3,  # whoever calls convert
            )
        return _PRECISIONS[dtype], None
    if TORCH_DTYPE[precision] is not dtype:
        wanted = TORCH_DTYPE[precision]
        raise ValueError(
            f"precision {precision!r} is for weights of {wanted}, the model's are {dtype}; "
            f"first call model.to({wanted})"
        )
    if precision == "tf32" and device.type == "cpu":
        raise ValueError("precision 'tf32' is for NVIDIA GPUs, the model is on the CPU; leave it out")
    return precision, None


def settle_skip(skip: Skip | None) -> Skip | None:
    """What was passed as `skip`, which is a function."""
    if skip is not None and not callable(skip):
        names = [skip] if isinstance(skip, str) else skip
        remedy = f"write lambda name, module: name in {names!r}"
        raise TypeError(f"skip is a function of (name, module), got {skip!r}; {remedy}")
    if skip is not None and not _takes_two(skip):
        raise TypeError(
            "skip is a function of (name, module), got one of other arguments; write lambda name, module: ..."
        )
    return skip


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return True  # it is built in, and says nothing of its arguments
    try:
        signature.bind("", None)
    except TypeError:
        return False
    return True


def settle_effort(effort: Effort) -> float:
    """The seconds that compiling kernels for the weights may take."""
    seconds = EFFORT_S.get(effort) if isinstance(effort, str) else effort
    if not is_number(seconds) or not seconds >= 0.0:
        raise ValueError(
            "effort is 'fast', which compiles no kernel for the weights, 'best', which takes up to "
            f"{EFFORT_S['best']:.0f} s for that, or a number of seconds, got {effort!r}"
        )
    return float(seconds)


def settle_methods(names: Collection[str] | None, device: torch.device) -> tuple[Method, ...] | None:
    """The methods of these names, the dense one among them whether it is named or not.

    Raises:
        ValueError, TypeError: where there is no such method, or something that it needs is not installed.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"methods is a list of names, got {names!r}; write [{names!r}]")
    chosen = {name: by_name(name, str(device)) for name in names}
    for name, method in chosen.items():
        if missing := method.missing():
            raise ValueError(f"the method {name} was asked for, and {missing}; or leave it out of `methods`")
    dense = dense_for(str(device))
    return tuple(({dense.name: dense} | chosen).values())


def _where(name: str) -> str:
    """What a message calls the module of that name."""
    return f"layer {name}" if name else "the model"


def _weight_types(model: nn.Module) -> dict[str, torch.dtype]:
    """The types of its convolutions' weights, where they are modules; else of all weights that could be filters."""
    for kind in (nn.Conv2d, nn.modules.conv._ConvNd):
        modules = {name: module.weight.dtype for name, module in model.named_modules() if isinstance(module, kind)}
        if modules:
            return modules
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    filters = {name: weight for name, weight in weights.items() if weight.ndim > 2}
    return {name: weight.dtype for name, weight in (filters or weights).items()}
