"""The ways to run a convolution; the planner iterates over METHODS and knows none of them by name."""

from __future__ import annotations

from escort.methods.base import Config, Method, Runner
from escort.methods.dense import Dense
from escort.methods.direct import Direct
from escort.methods.lowered import Lowered

METHODS: tuple[Method, ...] = (Direct(), Dense(), Lowered())


def by_name(name: str) -> Method:
    """The method of that name. Raises ValueError, naming those there are."""
    for method in METHODS:
        if method.name == name:
            return method
    raise ValueError(f"no method {name!r}; there are {', '.join(method.name for method in METHODS)}")


__all__ = ["METHODS", "Config", "Method", "Runner", "by_name"]
