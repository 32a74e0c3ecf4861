"""What to try for a layer: which methods and which of their configs, and what is refused for which reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from escort.cuda.compiler import no_compiler
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import is_had
from escort.filter import SparseFilter
from escort.methods import Config, Method
from escort.planner.compile_budget import Grant
from escort.planner.plan import Candidate, Layer
from escort.problem import Problem

#: How many configs of a method are tried at most.
_MOST_CONFIGS = 24
#: The same where predictions choose: of committed timings the best of the first three is 1 % slower than the best of
#: all in the geometric mean (docs/notes/conversion.md).
_LIKELY_CONFIGS = 3
#: Where predictions choose, a method that is predicted to take so many times as long as another is not tried: the
#: models of two methods may be off by a factor of two against one another.
_FAR = 2.0
#: Methods with what is tried of their configs.
Tried = tuple[tuple[Method, tuple[Config, ...]], ...]
_NO_TIME = "it is compiled for each filter, for which no time is given; pass effort='best'"


@dataclass(frozen=True)
class Search:
    """What is tried for a layer.

    Attributes:
        tried: methods with their configs, best guess first.
        late: configs with what they do without: tried only where that turns out to be nearly the fastest, as their
            first calls take long.
        refused: the candidates that are not tried.
        cut_at_s: the seconds for compiling for its filter, where more would let more be tried; else None.
    """

    tried: Tried
    refused: tuple[Candidate, ...]
    cut_at_s: float | None
    late: tuple[tuple[Method, Config, Config], ...] = ()

    @classmethod
    def of(cls, layer: Layer, methods: Sequence[Method], grant: Grant | None) -> Search:
        """What to try of these methods for a layer, and what not.

        Without a grant, or where what is granted is likely to win, predictions choose among the other methods: a few
        configs of each are tried, and none of a method that is predicted to be far slower than another. Without a
        grant what takes long in a first call is tried late, too.

        Args:
            grant: what may be compiled for the filter; None where nothing may be compiled for any.
        """
        predicted = predict_us(layer, methods) if grant is None or grant.is_likely else {}
        tried: list[tuple[Method, tuple[Config, ...]]] = []
        late: list[tuple[Method, Config, Config]] = []
        refused: list[Candidate] = [] if grant is None else list(grant.refused)
        is_cut = bool(predicted) or (grant is not None and grant.is_cut)
        for method in methods:
            if reason := unsupported(method, layer):
                refused.append(Candidate(method.name, reason=reason))
            elif method.compiles_per_filter and grant is None:
                is_cut = True
                refused.append(Candidate(method.name, reason=_NO_TIME))
            elif method.compiles_per_filter and grant is not None:
                tried.append((method, tuple(config for granted, config in grant.configs if granted is method)))
            elif predicted and (
                reason := method.outdone(layer.problem, layer.sparse_filter) or _unlikely(method, predicted)
            ):
                refused.append(Candidate(method.name, reason=reason + ("" if grant else "; effort='best' tries it")))
            else:
                configs = _that_run(method, layer)
                if grant is None:
                    plain = [method.without_trying(config) for config in configs]
                    pairs = list(zip(configs, plain, strict=True))
                    late += [(method, config, other) for config, other in pairs if config != other]
                    configs = [config for config, other in pairs if config == other]
                most = _LIKELY_CONFIGS if method.name in predicted else _MOST_CONFIGS
                if len(configs) > most:
                    refused.append(not_tried(method, len(configs) - most))
                tried.append((method, tuple(configs[:most])))
        seconds = 0.0 if grant is None else grant.seconds
        is_cut = math.isfinite(seconds) and (is_cut or bool(late))
        return cls(tuple(tried), tuple(refused), seconds if is_cut else None, tuple(late))


def unsupported(method: Method, layer: Layer) -> str | None:
    """Why a method cannot run a layer here, None where it can: also that it has no kernel, and none can be compiled."""
    problem = layer.problem
    if reason := method.unsupported(problem):
        return reason
    if problem.device_type == "cpu" or method.compiles_per_filter or no_compiler() is None:
        return None
    return None if _that_run(method, layer) else no_kernel()


def _that_run(method: Method, layer: Layer) -> list[Config]:
    """The configs of a method whose kernels can be had."""
    configs = method.configs(layer.problem, layer.sparse_filter)
    return [config for config in configs if runs(method, layer, config)]


def runs(method: Method, layer: Layer, config: Config) -> bool:
    """Whether the kernels of a config can be had: without a compiler those that are carried or shipped.

    What is compiled for the filter is none of them: only preparing it tells.
    """
    problem, device = layer.problem, torch.device(layer.problem.device)
    if problem.device_type == "cpu" or no_compiler() is None:
        return True
    return all(is_had(variant, device) for variant in method.kernels(problem, config))


def no_kernel() -> str:
    """Why a config does not run of which :func:`runs` says so, with the remedy."""
    return f"no kernel for it came with this package or a file, and {no_compiler()}"


def not_tried(method: Method, configs: int) -> Candidate:
    """What stands in a plan for the configs of a method that were left out, so many of them."""
    return Candidate(method.name, reason=f"{configs} more configs were not tried")


def predict_us(layer: Layer, methods: Sequence[Method]) -> dict[str, float]:
    """The least time in us that models predict for a layer on a GPU, by the names of the methods.

    It says nothing of methods that have no model, that cannot run the layer, or that compile for its filter.
    """
    problem = layer.problem
    if problem.device_type == "cpu":
        return {}
    gpu = Gpu.of(problem.device)
    known, key = _predicted.setdefault(layer.sparse_filter, {}), (problem, gpu, tuple(methods))
    if key not in known:
        able = [method for method in methods if not method.compiles_per_filter and unsupported(method, layer) is None]
        times_us = {method.name: method.predict_us(problem, layer.sparse_filter, gpu) for method in able}
        known[key] = {name: least_us for name, least_us in times_us.items() if least_us is not None}
    return known[key]


#: What :func:`predict_us` returned, as long as the filter lives: a memory format is chosen by it, and then what to try.
_predicted: WeakKeyDictionary[SparseFilter, dict[tuple[Problem, Gpu, tuple[Method, ...]], dict[str, float]]]
_predicted = WeakKeyDictionary()


def predict_compiled_us(layer: Layer, configs: Sequence[tuple[Method, Config]]) -> float | None:
    """The least time in us that models predict for configs that are compiled for a layer's filter, on a GPU."""
    problem = layer.problem
    if problem.device_type == "cpu":
        return None
    gpu = Gpu.of(problem.device)
    times_us = (method.predict_us(problem, layer.sparse_filter, gpu, config) for method, config in configs)
    return min((time_us for time_us in times_us if time_us is not None), default=None)


def _unlikely(method: Method, predicted: dict[str, float]) -> str | None:
    """Why a method is not tried where predictions choose, None where it is."""
    if method.lowers:
        return "it writes its input out patch by patch, which other methods do without"
    name, least_us = min(predicted.items(), key=lambda item: item[1])
    own_us = predicted.get(method.name, 0.0)
    if own_us <= _FAR * least_us:
        return None
    return f"predicted to take {own_us:.0f} us, {name} {least_us:.0f} us"
