"""The PTX of kernels/cuda/activation.cuh, run in numpy: what a GPU makes of numbers, where it errs as far as it may.

Errors of approximations are those of the PTX ISA (ex2, rcp, tanh), at random within their bounds.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.cuda.compiler import KERNELS

Floats = NDArray[np.float32]

#: Largest relative errors. The last two flush numbers below 2^-126 to zero.
_TANH, _EX2, _RCP = 2.0**-10.987, 2.0**-22, 2.0**-23
_LEAST = np.finfo(np.float32).tiny


@cache
def text(activation: str, storage: int) -> str:
    """What activation.cuh makes of ACTIVATE for the register "in" and the slope "by"."""
    macros = [f"-DACTIVATION={activation}", f"-DSTORAGE={storage}"]
    source = '#include "activation.cuh"\nACTIVATE("in", "by")\n'
    options = ["g++", "-E", "-P", "-x", "c++", f"-I{KERNELS}", *macros, "-"]
    lines = subprocess.run(options, input=source, capture_output=True, text=True, check=True).stdout.splitlines()
    ptx: str = ast.literal_eval(lines[-1])
    return ptx


def instructions(activation: str, storage: int) -> list[list[str]]:
    """The instructions of a text in order, each as its guard ("" for none), its name and its operands."""
    body = re.fullmatch(r"\{(.*)\}", text(activation, storage).strip())
    assert body is not None
    found = []
    for statement in filter(None, map(str.strip, body[1].split(";"))):
        if statement.startswith(".reg"):
            continue
        guard, name, operands = re.fullmatch(r"(?:@(\S+) )?(\S+) (.*)", statement).groups()  # type: ignore[union-attr]
        found.append([guard or "", name, *operands.split(", ")])
    return found


def run(activation: str, storage: int, x: Floats, slope: float = 0.0) -> Floats:
    """The activation of numbers x (n,)."""
    errors = np.random.default_rng(len(x))

    def approximated(bound: float, function: Callable[..., Any]) -> Callable[[Floats], Floats]:
        def rounded(v: Floats) -> Floats:
            exact = function(v.astype(np.float64)) * (1.0 + bound * errors.uniform(-1.0, 1.0, len(v)))
            flushed = np.where(np.abs(exact) < _LEAST, 0.0, exact) if function is not np.tanh else exact
            return flushed.astype(np.float32)

        return rounded

    def fma(a: Floats, b: Floats, c: Floats) -> Floats:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def flushed(v: Floats) -> Floats:
        return np.where(np.abs(v) < _LEAST, np.float32(0.0), v)

    does: dict[str, Callable[..., Any]] = {
        "mov.f32": lambda a: a.copy(),
        "abs.f32": np.abs,
        "add.f32": lambda a, b: a + b,
        "sub.f32": lambda a, b: a - b,
        "mul.f32": lambda a, b: a * b,
        "fma.rn.f32": fma,
        "min.f32": np.fmin,
        "max.NaN.f32": np.maximum,
        "min.NaN.f32": np.minimum,
        "copysign.f32": lambda sign, size: np.copysign(size, sign),
        "setp.lt.f32": lambda a, b: a < b,
        "selp.f32": lambda a, b, which: np.where(which, a, b),
        "tanh.approx.f32": approximated(_TANH, np.tanh),
        "ex2.approx.ftz.f32": approximated(_EX2, lambda v: np.exp2(v)),
        "rcp.approx.ftz.f32": approximated(_RCP, lambda v: 1.0 / v),
    }
    registers: dict[str, Any] = {"in": x.astype(np.float32), "by": np.full(len(x), slope, np.float32)}

    def value(operand: str) -> Any:
        return registers[operand] if operand in registers else np.full(len(x), float(operand), np.float32)

    with np.errstate(all="ignore"):
        for guard, name, to, *operands in instructions(activation, storage):
            values = [flushed(value(operand)) if ".ftz" in name else value(operand) for operand in operands]
            result = does[name](*values)
            if guard:
                holds = registers[guard.removeprefix("!")] != guard.startswith("!")
                result = np.where(holds, result, registers[to])
            registers[to] = result
    written: Floats = registers["in"]
    return written
