"""The loop that runs a program step by step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from escort.runtime.templates import filled

#: (table, key, numbers of the arguments, template, number of the result, values to let go of). What is called is
#: ``table[key]``, so that a layer that takes another's place is called. The template, None where the numbers say all,
#: is that of args and kwargs.
BoundStep = tuple[Any, Any, tuple[int, ...], Any, int, tuple[int, ...]]


def run_steps(steps: Iterable[BoundStep], values: list[Any]) -> None:
    """Runs steps on values, to which their results are written."""
    for table, key, arguments, template, result, last_reads in steps:
        if template is None:
            values[result] = table[key](*[values[i] for i in arguments])
        else:
            filled_args, filled_kwargs = filled(template, values)
            values[result] = table[key](*filled_args, **filled_kwargs)
        for i in last_reads:
            values[i] = None
