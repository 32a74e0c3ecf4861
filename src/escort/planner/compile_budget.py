"""What may be compiled for filters: what it takes and is predicted to save, and which layers of a network get it first.

All times are seconds in which all cores are at work, by the methods' estimates.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from escort.methods import Config, Method
from escort.planner import cores
from escort.planner.plan import Candidate, Layer

#: What each further config of a method is expected to save, as a share of the layer's time: of committed timings the
#: best of the first one, two, three and four is 8.8, 4.4, 2.9 and 1.3 % slower than the best of six.
_FURTHER_SAVE = (0.044, 0.016, 0.016, 0.006, 0.006)
#: A second of all cores must save this share of the layers' time; less is not worth waiting for. In a ResNet-50 in
#: strict fp32 what saves less takes as long as the rest, and is predicted to save 2 % in all.
_LEAST_SAVED_PER_S = 3e-3
#: No kernel is compiled that takes one core longer than this, or than a share of a large budget: all would wait for it.
_LONGEST_S, _LONGEST_SHARE = 40.0, 1 / 8
#: Layers that share a plan differ in their nonzeros by up to a twentieth, and in the time to compile for them too.
_MARGIN = 1.06


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


@dataclass(frozen=True)
class Offer:
    """Kernels that could be compiled for the filters of layers that share a plan.

    The first layer tries several configs, and each layer needs the one that is chosen.

    Attributes:
        configs: what could be compiled, best guess first.
        seconds: about how long compiling each takes, for one filter.
        layers: how many share the plan.
        compiled_us: the time that is predicted for a layer by the best guess; None where no model says it.
        saved_us: how much less time a layer is expected to take than by methods that compile nothing for it; None where
            nothing says it.
    """

    configs: tuple[tuple[Method, Config], ...]
    seconds: tuple[float, ...]
    layers: int = 1
    compiled_us: float | None = None
    saved_us: float | None = None

    @classmethod
    def of(cls, layer: Layer, methods: Sequence[Method], layers: int = 1) -> Offer:
        """What could be compiled for the first of these layers; what it saves is not known yet."""
        problem, sparse_filter = layer.problem, layer.sparse_filter
        able = [method for method in methods if method.compiles_per_filter and method.unsupported(problem) is None]
        configs = tuple((method, config) for method in able for config in method.configs(problem, sparse_filter))
        return cls(configs, tuple(estimate_s(method, layer, config) for method, config in configs), layers)

    @property
    def least_us(self) -> float:
        """The least time that is expected of all layers together, 0 where nothing says it."""
        return self.layers * ((self.compiled_us or 0.0) + min(self.saved_us or 0.0, 0.0))

    def needed_s(self, tried: int) -> float:
        """How long it takes to compile another config where so many are compiled already."""
        return self.seconds[tried] * (1 if tried else self.layers)

    def saved_per_s(self, tried: int) -> float:
        """What compiling another config saves of all layers' time, in us per second; infinite where nothing says it."""
        saved_us = self.saved_us
        if tried and self.compiled_us is not None:
            saved_us = self.compiled_us * (_FURTHER_SAVE[tried - 1] if tried <= len(_FURTHER_SAVE) else 0.0)
        return math.inf if saved_us is None else self.layers * saved_us / max(self.needed_s(tried), 1e-9)


@dataclass(frozen=True)
class Grant:
    """What may be compiled for a layer's filter.

    Attributes:
        seconds: what compiling the choice of a plan that it takes over may take.
        configs: what the layer tries.
        refused: the candidates that it does not try.
        is_cut: whether more could be compiled.
        is_likely: whether what it tries is predicted to be faster than what other methods can do.
    """

    seconds: float
    configs: tuple[tuple[Method, Config], ...] = ()
    refused: tuple[Candidate, ...] = ()
    is_cut: bool = False
    is_likely: bool = False


def share_out(offers: Sequence[Offer], compile_budget_s: float) -> list[Grant]:
    """Gives the budget to what saves most in a second of compiling, until it is used up or too little is saved."""
    left_s, tried = compile_budget_s, [0] * len(offers)
    longest_s = max(_LONGEST_S, compile_budget_s * _LONGEST_SHARE)
    reasons = [""] * len(offers)
    least_per_s = _LEAST_SAVED_PER_S * sum(offer.least_us for offer in offers)
    queue = [(-offer.saved_per_s(0), 0, index) for index, offer in enumerate(offers) if offer.configs]
    heapq.heapify(queue)
    while queue:
        per_s, count, index = heapq.heappop(queue)
        offer = offers[index]
        needed_s = offer.needed_s(count)
        alone_s = offer.seconds[count] * cores.count()
        if -per_s <= least_per_s:
            reasons[index] = _too_little(offer, count)
        elif not fits(needed_s, left_s):
            reasons[index] = (
                f"compiling it takes about {_seconds(needed_s)} of all {cores.count()} cores, more than the "
                f"{_seconds(left_s)} left; pass effort='best' or more seconds"
            )
        elif alone_s > longest_s:
            reasons[index] = (
                f"compiling it takes one core about {_seconds(alone_s)}, and all would wait for it; pass "
                f"effort={math.ceil(alone_s / _LONGEST_SHARE):.0f} or more seconds"
            )
        else:
            left_s -= needed_s
            tried[index] = count = count + 1
            if count < len(offer.configs):
                heapq.heappush(queue, (-offer.saved_per_s(count), count, index))
    return [_grant(*each) for each in zip(offers, tried, reasons, strict=True)]


def _grant(offer: Offer, tried: int, reason: str) -> Grant:
    """What so many configs of an offer are, and why the others are not tried."""
    configs, others = offer.configs[:tried], offer.configs[tried:]
    refused = []
    for method in dict.fromkeys(method for method, _ in others):
        more = sum(other is method for other, _ in others)
        is_tried = any(other is method for other, _ in configs)
        refused.append(
            Candidate(method.name, reason=f"{more} more configs were not tried: {reason}" if is_tried else reason)
        )
    is_likely = bool(configs) and offer.saved_us is not None
    return Grant(sum(offer.seconds[:tried]) * _MARGIN, configs, tuple(refused), bool(others), is_likely)


def _too_little(offer: Offer, tried: int) -> str:
    """Why no more configs are tried than so many."""
    if tried or offer.saved_us is None or offer.compiled_us is None:
        return "the next is expected to save too little for the time that compiling it takes"
    return (
        f"predicted to take {offer.compiled_us:.3g} us, other methods {offer.compiled_us + offer.saved_us:.3g} us: not "
        f"worth about {_seconds(offer.needed_s(0))} of all {cores.count()} cores"
    )


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10.0 else f"{value:.2g} s"
