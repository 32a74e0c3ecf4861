"""What may be compiled for filters: estimates, what still fits a layer's budget, and how a network's layers share one.

All times are seconds in which all cores are at work, by the methods' estimates.
"""

from __future__ import annotations

from escort.methods import Config, Method
from escort.planner import cores
from escort.planner.plan import Layer


def check_compile_budget(compile_budget_s: float) -> None:
    """Raises ValueError for what is no number of seconds."""
    if not compile_budget_s >= 0.0:
        raise ValueError(f"compile_budget_s is a number of seconds, 0 to compile nothing, got {compile_budget_s}")


def estimate_s(method: Method, layer: Layer, config: Config) -> float:
    """About how long it takes to compile a config of a method that compiles for each filter."""
    return method.compile_s(layer.problem, layer.sparse_filter, config) / cores.count()


def fits(needed_s: float, left_s: float) -> bool:
    """Whether what takes `needed_s` may be compiled. Where no time is left nothing fits, however little it needs."""
    return left_s > 0.0 and needed_s <= left_s


def outgrows(compile_budget_s: float, cut_at_s: float | None) -> bool:
    """Whether a budget is worth another search than one that left configs out at a budget of `cut_at_s`.

    A layer's share differs from time to time, mostly by little. None stands for a search that left nothing out.
    """
    return cut_at_s is not None and compile_budget_s > cut_at_s * 2.0


class LayerBudget:
    """What compiling kernels for one layer's filter may take.

    Attributes:
        spent_s: the estimate of each config that is compiled.
        is_cut: whether a larger budget would have let more be compiled.
    """

    def __init__(self, compile_budget_s: float) -> None:
        self.compile_budget_s = compile_budget_s
        self.spent_s: list[float] = []
        self.is_cut = False

    def rules_out(self, method: Method) -> str | None:
        """Why none of a method's configs is tried, or None where some may be."""
        if not method.compiles_per_filter or self.compile_budget_s > 0.0:
            return None
        self.is_cut = True
        return "it is compiled for each filter, for which no time is given; pass effort='best'"

    def spend(self, method: Method, layer: Layer, config: Config) -> str | None:
        """Takes what compiling a config needs from the budget, or says why that is too much."""
        if not method.compiles_per_filter:
            return None
        needed_s, left_s = estimate_s(method, layer, config), self.compile_budget_s - sum(self.spent_s)
        if fits(needed_s, left_s):
            self.spent_s.append(needed_s)
            return None
        self.is_cut = True
        return (
            f"compiling it takes about {_seconds(needed_s)} of all {cores.count()} cores, more than the "
            f"{_seconds(left_s)} left of the layer's share; pass effort='best' or more seconds"
        )


class SharedBudget:
    """What compiling may take for a network: each layer gets an equal share of what those before it left."""

    def __init__(self, compile_budget_s: float, layers: int) -> None:
        """`layers` is the number of those that have something to compile."""
        self._left_s = compile_budget_s
        self._layers = layers

    def next_share(self, *, compiles: bool) -> float:
        """The share of the next layer. One that compiles nothing leaves it to those behind it."""
        share_s = self._left_s / max(self._layers, 1)
        self._layers -= compiles
        return share_s

    def spend(self, seconds: float) -> None:
        self._left_s -= seconds


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10.0 else f"{value:.2g} s"
