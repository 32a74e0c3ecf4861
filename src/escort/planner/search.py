"""What to try for a layer: which methods and which of their configs, and what is refused for which reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from escort.methods import Config, Method
from escort.planner.compile_budget import LayerBudget
from escort.planner.plan import Candidate, Layer

#: How many configs of a method are tried at most.
_MOST_CONFIGS = 24


@dataclass(frozen=True)
class Search:
    """What is tried for a layer.

    Attributes:
        tried: methods with their configs, best guess first.
        refused: the candidates that are not tried.
        compile_s: about how long all cores take to compile each config that is tried and compiled for the filter.
        compile_budget_s: what the sum of these may be.
        is_cut: whether a larger compile budget would let more be tried.
    """

    tried: tuple[tuple[Method, tuple[Config, ...]], ...]
    refused: tuple[Candidate, ...]
    compile_s: tuple[float, ...]
    compile_budget_s: float
    is_cut: bool

    @classmethod
    def of(cls, layer: Layer, methods: Sequence[Method], compile_budget_s: float) -> Search:
        """What to try of these methods for a layer, and what not."""
        budget = LayerBudget(compile_budget_s)
        tried: list[tuple[Method, tuple[Config, ...]]] = []
        refused: list[Candidate] = []
        for method in methods:
            if reason := method.unsupported(layer.problem) or budget.rules_out(method):
                refused.append(Candidate(method.name, reason=reason))
                continue
            configs = method.configs(layer.problem, layer.sparse_filter)
            if len(configs) > _MOST_CONFIGS:
                refused.append(not_tried(method, len(configs) - _MOST_CONFIGS))
            affordable = []
            for config in configs[:_MOST_CONFIGS]:
                if reason := budget.spend(method, layer, config):
                    refused.append(Candidate(method.name, asdict(config), reason=reason))
                else:
                    affordable.append(config)
            tried.append((method, tuple(affordable)))
        return cls(tuple(tried), tuple(refused), tuple(budget.spent_s), compile_budget_s, budget.is_cut)

    def is_outgrown(self, compile_budget_s: float) -> bool:
        """Whether a budget is worth another search. A layer's share differs from time to time, mostly by little."""
        return self.is_cut and compile_budget_s > self.compile_budget_s * 2.0


def not_tried(method: Method, configs: int) -> Candidate:
    """What stands in a plan for the configs of a method that were left out, so many of them."""
    return Candidate(method.name, reason=f"{configs} more configs were not tried")
