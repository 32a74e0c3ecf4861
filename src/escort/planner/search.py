"""What to try for a layer: which methods and which of their configs, and what is refused for which reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from escort.cuda.gpu import Gpu
from escort.methods import Config, Method
from escort.planner.compile_budget import LayerBudget
from escort.planner.plan import Candidate, Layer

#: How many configs of a method are tried at most.
_MOST_CONFIGS = 24
#: The same where predictions choose: of committed timings the best of the first three is 1 % slower than the best of
#: all in the geometric mean (docs/notes/conversion.md).
_LIKELY_CONFIGS = 3
#: Where predictions choose, a method that is predicted to take so many times as long as another is not tried: the
#: models of two methods may be off by a factor of two against one another.
_FAR = 2.0


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
        """What to try of these methods for a layer, and what not.

        Without a compile budget predictions choose: a few configs of each method are tried, and none of a method that
        is predicted to be far slower than another.
        """
        budget = LayerBudget(compile_budget_s)
        predicted = {} if compile_budget_s > 0.0 else predict_us(layer, methods)
        tried: list[tuple[Method, tuple[Config, ...]]] = []
        refused: list[Candidate] = []
        for method in methods:
            reason = method.unsupported(layer.problem) or budget.rules_out(method) or _unlikely(method, predicted)
            if reason:
                refused.append(Candidate(method.name, reason=reason))
                continue
            configs = method.configs(layer.problem, layer.sparse_filter)
            most = _LIKELY_CONFIGS if method.name in predicted else _MOST_CONFIGS
            if len(configs) > most:
                refused.append(not_tried(method, len(configs) - most))
            affordable = []
            for config in configs[:most]:
                if reason := budget.spend(method, layer, config):
                    refused.append(Candidate(method.name, asdict(config), reason=reason))
                else:
                    affordable.append(config)
            tried.append((method, tuple(affordable)))
        is_cut = budget.is_cut or bool(predicted)
        return cls(tuple(tried), tuple(refused), tuple(budget.spent_s), compile_budget_s, is_cut)

    @property
    def cut_at_s(self) -> float | None:
        """The compile budget, where a larger one would let more be tried; else None."""
        return self.compile_budget_s if self.is_cut else None


def not_tried(method: Method, configs: int) -> Candidate:
    """What stands in a plan for the configs of a method that were left out, so many of them."""
    return Candidate(method.name, reason=f"{configs} more configs were not tried")


def predict_us(layer: Layer, methods: Sequence[Method]) -> dict[str, float]:
    """The least time in us that models predict for a layer on a GPU, by the names of the methods.

    It says nothing of methods that have no model, that cannot run the layer, or that compile for its filter.
    """
    problem, predicted = layer.problem, dict[str, float]()
    if problem.device_type == "cpu":
        return predicted
    gpu = Gpu.of(problem.device)
    for method in methods:
        if not method.compiles_per_filter and method.unsupported(problem) is None:
            least_us = method.predict_us(problem, layer.sparse_filter, gpu)
            if least_us is not None:
                predicted[method.name] = least_us
    return predicted


def _unlikely(method: Method, predicted: dict[str, float]) -> str | None:
    """Why a method is not tried where predictions choose, None where it is."""
    if not predicted:
        return None
    if method.lowers:
        return "it writes its input out patch by patch, which other methods do without; effort='best' tries it"
    name, least_us = min(predicted.items(), key=lambda item: item[1])
    own_us = predicted.get(method.name, 0.0)
    if own_us <= _FAR * least_us:
        return None
    return f"predicted to take {own_us:.0f} us, {name} {least_us:.0f} us; effort='best' tries it"
