"""torch.fx's tracer for models as they are: options of a call, hooks, and checks that raise."""

from __future__ import annotations

import ast
import dis
import inspect
import itertools
import linecache
import operator
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_leaves

from escort.layers import Images
from escort.network.tracing.conv_types import is_leaf
from escort.runtime.stand_in import runs_more

_TORCH_FX = str(Path(fx.__file__).parent)
#: Instructions that ask for one truth value and branch by it. Since Python 3.13 a comparison may ask by itself.
_TESTS = ("POP_JUMP", "JUMP_IF", "TO_BOOL") + (("COMPARE_OP",) if sys.version_info >= (3, 13) else ())
#: What cuts a tensor into pieces, by function or method, and how the argument that says so is called.
_CUTS = {"chunk": ("chunks",), "split": ("split_size", "split_size_or_sections")}


@dataclass(frozen=True)
class Call:
    """How a module is called: which of its arguments are tensors, and what the others are."""

    tensors: frozenset[str]
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Raises ValueError for a call that no graph can take."""
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        tensors, constants = set(), {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if isinstance(value, Tensor) and kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
                tensors.add(name)
            elif kind in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
                raise ValueError(f"it is called with several {name}")
            elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                raise ValueError(f"its argument {name} is a {type(value).__name__} of tensors")
            else:
                constants[name] = value
        return cls(frozenset(tensors), constants)


class Tracer(fx.Tracer):
    """Traces a module for one way to call it.

    A graph takes the arguments that the module takes, by the same names. Those that are no tensors keep the value that
    they had, and any other value raises. A check of shapes that raises, as ``assert`` does, is made by the graph too.
    Modules with hooks are called as they are. Functions that a library wraps for torch.fx, so that graphs call them,
    are looked into where that is possible.

    Args:
        call: how the module is called.
        signature: what it takes.
        leaves: modules that are called as they are, besides those of torch.nn.
    """

    def __init__(self, call: Call, signature: inspect.Signature, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self._call, self._signature, self._leaves = call, signature, {id(module) for module in leaves}
        self._thread = threading.get_ident()
        #: What a graph cannot show, also where the model caught the error that said so.
        self.refused: Exception | None = None

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:  # which torch.fx does not ask: it sees the modules of all threads
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        stays = id(m) in self._leaves or runs_more(m) or is_leaf(m) or isinstance(m, Images)
        return stays or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for all arguments; the values of those that are no tensors go into the trace."""
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for parameter in self._signature.parameters.values():
            value = self._argument(parameter)
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.kind is not parameter.VAR_KEYWORD:
                positional.append(value)
        return lambda: root_fn(self.root, *positional, **named), []

    def _argument(self, parameter: inspect.Parameter) -> Any:
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return None
        is_required = parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
        if name in self._call.tensors:
            return self.create_proxy("placeholder", name, () if is_required else (None,), {})
        value = self._call.constants.get(name, parameter.default)
        if value is not None and not isinstance(value, bool | int | float | str):
            raise ValueError(f"its argument {name} is a {type(value).__name__}")  # it cannot be written down
        default = value if parameter.default is parameter.empty else parameter.default
        placeholder = self.create_proxy("placeholder", name, () if is_required else (default,), {})
        placeholder.node.meta["fixed"] = value
        return value

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **options: Any) -> Any:
        if kind == "call_function" and _is_foreign(target):
            last = next(iter(reversed(self.graph.nodes)), None)
            with suppress(Exception):  # it may do anything that no graph can
                if isinstance(result := target(*args, **kwargs), fx.Proxy):
                    return result
            self.refused = None  # the function stays as it is, and nothing is asked of it
            for node in itertools.takewhile(lambda node: node is not last, reversed(self.graph.nodes)):
                self.graph.erase_node(node)
        return super().create_proxy(kind, target, args, kwargs, *others, **options)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        count = _pieces(node)
        if count is not None:
            return _Pieces(node, self, count)
        is_tensor = node.op == "call_module" or (node.op == "placeholder" and node.target in self._call.tensors)
        return _Tensor(node, self) if is_tensor else _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)  # before it is taken for a tensor

    def refuse(self, what: str) -> NoReturn:
        self.refused = TraceError(f"{what} of a traced value is asked for, which depends on the input")
        raise self.refused

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)
        except TraceError as error:
            self.refused = error
            raise

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH_FX):
            frame = frame.f_back
        required = None if frame is None else _required(frame)
        if frame is None or required is None:
            self.refused = TraceError("symbolically traced variables cannot be used as inputs to control flow")
            raise self.refused
        where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        holds = obj if required else self.create_proxy("call_function", operator.not_, (obj,), {})
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        self.create_proxy("call_function", torch._assert, (holds, f"the check at {where} failed: {line}"), {})
        return required


def _is_foreign(function: Any) -> bool:
    """Whether a function is a library's own, which it keeps from torch.fx by :func:`torch.fx.wrap`."""
    return inspect.isfunction(function) and function.__module__.partition(".")[0] != "torch"


class _Value(fx.Proxy):
    """What a graph computes. What Python asks of it is refused and noted, as the model might catch the error."""

    tracer: Tracer

    def __len__(self) -> int:
        self.tracer.refuse("the length")

    def __int__(self) -> int:
        self.tracer.refuse("the number")

    def __float__(self) -> float:
        self.tracer.refuse("the number")

    def __index__(self) -> int:
        self.tracer.refuse("the number")

    def __contains__(self, item: Any) -> bool:
        self.tracer.refuse("whether something is part")


class _Tensor(_Value):
    """What is a tensor, and says so."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor


class _Pieces(_Value):
    """The pieces of a tensor that was cut into so many, which code may count and go through."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, count: int) -> None:
        super().__init__(node, tracer)
        self._count = count

    def __iter__(self) -> Iterator[fx.Proxy]:
        whole: Any = self
        return iter([whole[index] for index in range(self._count)])

    def __len__(self) -> int:
        return self._count


def _pieces(node: fx.Node) -> int | None:
    """Into how many pieces a node cuts a tensor, where its arguments tell, by their number or by all of their sizes."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function") or name not in _CUTS:
        return None
    named = (node.kwargs[key] for key in _CUTS[name] if key in node.kwargs)
    cut = node.args[1] if len(node.args) > 1 else next(named, None)
    if name == "chunk":
        return cut if isinstance(cut, int) else None
    return len(cut) if isinstance(cut, list | tuple) else None


def _required(frame: FrameType) -> bool | None:
    """What a condition must be lest the code around it raise; None where it decides about anything else."""
    positions: Any = getattr(frame.f_code, "co_positions", None)  # since Python 3.11
    if positions is None:
        return None
    if not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(_TESTS):
        return None  # a function or operator asks, and may ask for several
    line, _, column, _ = list(positions())[frame.f_lasti // 2]
    source = "".join(linecache.getlines(frame.f_code.co_filename))
    if line is None or column is None or not source:
        return None
    try:
        statements = ast.walk(ast.parse(source))
    except SyntaxError:
        return None
    for statement in statements:
        if not isinstance(statement, ast.Assert | ast.If):
            continue
        # Python names the whole statement as the place of a test without operators.
        is_all = (statement.lineno, statement.col_offset) == (line, column)
        if is_all or _spans(statement.test, line, column):
            if isinstance(statement, ast.If) and not _raises(statement.body):
                return None
            value = isinstance(statement, ast.Assert)
            return _whole(statement.test, value) if is_all else _part(statement.test, value, line, column)
    return None


def _raises(body: list[ast.stmt]) -> bool:
    """Whether a body ends in an error, whatever it computes before for the message."""
    ways_out = (ast.Return, ast.Break, ast.Continue)
    return isinstance(body[-1], ast.Raise) and not any(isinstance(n, ways_out) for s in body for n in ast.walk(s))


def _whole(test: ast.expr, value: bool) -> bool | None:
    """What the only condition in `test` must be for the whole to be `value`; None where there are several."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _whole(test.operand, not value)
    return None if isinstance(test, ast.BoolOp | ast.IfExp) else value


def _part(test: ast.expr, value: bool, line: int, column: int) -> bool | None:
    """What the condition at a place within `test` must be for the whole to be `value`; None where that is open."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _part(test.operand, not value, line, column)
    if isinstance(test, ast.BoolOp):
        if isinstance(test.op, ast.And) is not value:
            return None
        return next((_part(part, value, line, column) for part in test.values if _spans(part, line, column)), None)
    is_open = isinstance(test, ast.IfExp) or (isinstance(test, ast.Compare) and len(test.ops) > 1 and not value)
    return None if is_open else value


def _spans(node: ast.expr, line: int, column: int) -> bool:
    return (node.lineno, node.col_offset) <= (line, column) < (node.end_lineno or 0, node.end_col_offset or 0)
