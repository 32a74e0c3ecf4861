"""What a saved program may call: a closed list, and what the arguments of a call may ask for."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from escort.runtime.saved.limits import INTEGER_BITS, MAX_ITEMS, MAX_POWER
from escort.runtime.steps import Method, Step
from escort.runtime.templates import leaves

aten = torch.ops.aten

_OPERATORS = """
abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imod imul invert ior ipow isub itruediv ixor le lt matmul mod
mul ne neg not_ or_ pos pow sub truediv xor
""".split()
_MATHS = "ceil floor log log2 prod sqrt".split()
# Computations on tensors that have the same name and meaning in torch, as methods and in torch.ops.aten.
_TENSOR = """
abs acos add addcdiv addcmul addmm all alias amax amin any arange argmax argmin argsort asin atan atan2 avg_pool1d
baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm broadcast_to cat ceil channel_shuffle chunk clamp clamp_max
clamp_min clone concat contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
cos cosh count_nonzero cumprod cumsum detach div einsum eq erf erfc exp expand expm1 flatten flip floor
floor_divide fmod frac full full_like gather ge greater gt hardshrink hstack index_select instance_norm isfinite isinf
isnan layer_norm le lerp less linspace log log10 log1p log2 log_softmax logical_and logical_not logical_or logical_xor
logsumexp lt masked_fill matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min minimum mm
moveaxis movedim mul narrow ne neg norm numel ones ones_like outer permute pixel_shuffle pixel_unshuffle pow prelu
prod ravel reciprocal relu remainder reshape rms_norm roll rot90 round rsqrt rsub scalar_tensor
scatter select selu sigmoid sign sin sinh slice softmax sort split split_with_sizes sqrt square squeeze stack std sub
sum swapaxes swapdims t take_along_dim tan tanh tensordot tile topk transpose tril triu true_divide trunc unbind
unflatten unsqueeze var var_mean vstack where zeros zeros_like
""".split()
_FUNCTIONALS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout
avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear celu channel_shuffle conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d dropout dropout1d dropout2d dropout3d elu embedding feature_alpha_dropout fold gelu
glu grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu
linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d mish normalize
pad pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu softmax
softmin softplus softshrink softsign tanh tanhshrink threshold unfold
""".split()
# What torch.export writes besides, and methods that are no functions.
_ATEN = """
_adaptive_avg_pool2d _log_softmax _softmax _to_copy constant_pad_nd lift_fresh_copy max_pool2d_with_indices sym_size to
upsample_bicubic2d upsample_bilinear2d upsample_nearest2d view
""".split()
_METHODS = """
bfloat16 bool cpu dim double expand_as float half int long masked_fill_ ndimension new_full new_ones new_zeros repeat
reshape_as size to type_as unfold view view_as
""".split()
_INPLACE = """
abs_ add_ addcdiv_ addcmul_ ceil_ celu_ clamp_ clamp_max_ clamp_min_ div_ elu_ exp_ floor_ fmod_ hardsigmoid_ hardswish_
hardtanh_ leaky_relu_ log_ mul_ neg_ pow_ reciprocal_ relu6_ relu_ remainder_ round_ rsqrt_ selu_ sigmoid_ silu_ sqrt_
square_ squeeze_ sub_ tanh_ transpose_ unsqueeze_
""".split()
_ATTRIBUTES = "T device dtype itemsize mT ndim shape".split()


@dataclass(frozen=True)
class Attribute:
    """An attribute of a tensor, out of a closed list."""

    name: str

    def __call__(self, tensor: Tensor) -> Any:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.name} is read of a {type(tensor).__name__}, which is no tensor")
        return getattr(tensor, self.name)


@dataclass(frozen=True)
class Plain:
    """A function that gives no tensor, or perhaps none, and what it is asked for and gives checked on every call.

    Sizes depend on the input, and Python's numbers and sequences have no bounds of their own.
    """

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_call(self.function, args, kwargs)
        return check_value(self.function(*args, **kwargs))


def _operations() -> dict[str, Callable[..., Any]]:
    operations: dict[str, Callable[..., Any]] = {"torch._assert": torch._assert}
    for prefix, module, names in (
        ("operator", operator, _OPERATORS),
        ("math", math, _MATHS),
        ("torch", torch, _TENSOR + _INPLACE),
        ("torch.nn.functional", F, _FUNCTIONALS + _INPLACE),
        ("Tensor", Tensor, _TENSOR + _METHODS + _INPLACE),
    ):
        operations |= {f"{prefix}.{name}": getattr(module, name) for name in names if hasattr(module, name)}
    for name in sorted({*_TENSOR, *_FUNCTIONALS, *_ATEN, *_INPLACE}):
        if hasattr(aten, name):
            packet = getattr(aten, name)
            overloads = {overload: getattr(packet, overload) for overload in packet.overloads()}
            operations |= {f"torch.ops.aten.{name}.{key}": op for key, op in overloads.items() if _is_of_tensors(op)}
    return operations | {f"Tensor.{name}": Attribute(name) for name in _ATTRIBUTES}


def _is_of_tensors(overload: torch._ops.OpOverload) -> bool:
    """Whether an exported operator computes with tensors and writes to none that it is given as `out`.

    Those of the same names for lists, texts and numbers know no bounds.
    """
    arguments = overload._schema.arguments
    return "Tensor" in str(overload._schema) and not any(argument.is_out for argument in arguments)


#: What a step may call, by name.
OPERATIONS: Mapping[str, Callable[..., Any]] = _operations()
_NAMES = {function: name for name, function in reversed(list(OPERATIONS.items()))}
_ARITHMETIC = tuple(function for name, function in OPERATIONS.items() if name.startswith(("operator.", "math.")))
_MATHS_OF_NUMBERS = tuple(function for name, function in OPERATIONS.items() if name.startswith("math."))
_VIEWS = Tensor.view, *(op for name, op in OPERATIONS.items() if name.startswith("torch.ops.aten.view."))
_SIZES = ("chunks", "split_size", "split_size_or_sections", "split_sizes")
_PRODUCTS, _POWERS = (operator.mul, operator.imul), (operator.pow, operator.ipow)
_PIECES = frozenset(
    function
    for name, function in OPERATIONS.items()
    if name.split(".")[-1 if "aten" not in name else 3] in ("chunk", "split", "split_with_sizes", "unbind")
)


def named(step: Step) -> tuple[str, tuple[Any, ...]]:
    """The name of what a step calls, and its arguments by position.

    Raises:
        ValueError: where it is not in the list.
    """
    target, args = step.target, step.args
    if isinstance(target, Plain):
        target = target.function
    if target is getattr and len(args) == 2 and args[1] in _ATTRIBUTES:
        return f"Tensor.{args[1]}", args[:1]
    name = f"Tensor.{target.name}" if isinstance(target, Method) else _NAMES.get(target)
    if name is None or name not in OPERATIONS:
        called = target.name if isinstance(target, Method) else torch.typename(target)
        called = f"{called} of {args[1]!r}" if target is getattr and len(args) > 1 else called
        raise ValueError(
            f"a call of {called} cannot be saved; compute it with functions of torch or torch.nn.functional, or "
            "outside the model"
        )
    return name, args


def check_step(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for templates of arguments that no call may have, whatever the input is."""
    if "out" in kwargs:
        raise ValueError("a call that writes to out= cannot be saved; use its result instead")
    if function in _ARITHMETIC and (kwargs or any(isinstance(leaf, str) for leaf in leaves(args))):
        raise ValueError("an operator of Python takes no text and nothing by name; compute it before converting")


def check_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that would take Python long, or make it many values."""
    has_tensor = any(isinstance(value, Tensor) for value in args)
    has_sequence = any(isinstance(value, (list, tuple, dict)) for value in args)
    if function in _PRODUCTS and has_sequence:
        raise ValueError("a product repeats a sequence; write it out before converting")
    if function in _ARITHMETIC and function is not operator.getitem and has_sequence and has_tensor:
        raise ValueError("an operator of Python would go through the elements of a tensor; use a function of torch")
    if function in _MATHS_OF_NUMBERS and has_tensor:
        raise ValueError("it computes with numbers, and is given a tensor; use a function of torch")
    if function in _POWERS and not has_tensor and abs(args[1]) > MAX_POWER:
        raise ValueError(f"a power of numbers has an exponent beyond {MAX_POWER}; use torch.pow")
    if function in _VIEWS and any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
        raise ValueError("a view of another type shows bytes that need not be numbers of it; use .to")
    if function in _PIECES:
        _check_pieces(function, args, kwargs)


def _check_pieces(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where a tensor would be cut into too many."""
    if not args or not isinstance(args[0], Tensor) or not kwargs.keys() <= {"dim", *_SIZES}:
        raise ValueError("what is cut comes first, by position; sizes and `dim` may have their names")
    tensor = args[0]
    given = [*args[1:], *(value for key, value in kwargs.items() if key != "dim")]
    size = 1 if "unbind" in _NAMES[function] else given.pop(0) if given else 1
    dim = kwargs.get("dim", given[0] if given else 0)
    if type(size) is not int or type(dim) is not int or not -tensor.ndim <= dim < tensor.ndim:
        return  # so many sizes as are named, or torch refuses it
    length = tensor.shape[dim]
    pieces = size if "chunk" in _NAMES[function] else length // max(size, 1)
    if type(length) is int and min(pieces, length) > MAX_ITEMS:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is cut into more than {MAX_ITEMS}")


def check_value(value: Any) -> Any:
    """The value of a step, if it is one that a network computes with. Raises ValueError for any other."""
    count = -1  # the value itself is none of its items
    pending = [value]
    while pending:
        item = pending.pop()
        count += 1
        if count > MAX_ITEMS:
            raise ValueError(f"a value holds more than {MAX_ITEMS} items")
        if isinstance(item, (list, tuple)):
            pending += item[: MAX_ITEMS + 1]
        elif isinstance(item, dict):
            pending += list(item.values())[: MAX_ITEMS + 1]
        elif isinstance(item, slice):
            pending += (item.start, item.stop, item.step)
        elif type(item) is int and item.bit_length() >= INTEGER_BITS:
            raise ValueError(f"an integer has more than {INTEGER_BITS} bits")
        elif not isinstance(item, _VALUES) and item is not None and item is not ...:
            raise ValueError(f"a step gives a {type(item).__name__}")
    return value


_VALUES = (
    *(Tensor, bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
