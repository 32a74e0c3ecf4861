"""What pruning would gain: a network measured at a few shares of zeros, and its time at all others."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from escort import prune, report
from escort.arguments import is_number
from escort.methods import by_name
from escort.network.convert import convert
from escort.network.forecast import page
from escort.network.forecast.curve import Curve, knee, wins_from
from escort.network.original import plain_copy, unwrap
from escort.network.plan import NetworkPlan
from escort.planner.machine import Machine
from escort.problem import Precision, Problem

_log = logging.getLogger(__name__)
#: The shares of zeros at which a network is pruned, converted and timed.
MEASURED = (0.5, 0.8, 0.95)
#: How far the shares of zeros of a layer that nobody prunes may be apart.
_SAME_SHARE = 0.01


@dataclass(frozen=True)
class LayerForecast:
    """How long a convolution takes at any share of zeros in its filter.

    Attributes:
        zeros: the share that is there now.
        is_pruned: whether the forecast prunes it; else it takes the same time throughout.
        curves: by method its time by density, through all densities at which it was timed.
        dense_us: of the fastest dense method, None where none was timed.
    """

    name: str
    problem: Problem
    zeros: float
    is_pruned: bool
    curves: Mapping[str, Curve]
    dense_us: float | None

    def method(self, sparsity: float) -> str:
        """The method that is fastest at a share of zeros."""
        return min(self.curves, key=lambda name: self.curves[name](1.0 - sparsity))

    def time_us(self, sparsity: float) -> float:
        """Microseconds by the fastest method at a share of zeros."""
        return min(curve(1.0 - sparsity) for curve in self.curves.values())

    @property
    def wins_from(self) -> float | None:
        """From which share of zeros on a sparse method is faster than the dense ones; None where none is at 98 %."""
        sparse = [curve for name, curve in self.curves.items() if not by_name(name, self.problem.device).is_dense]
        if self.dense_us is None or not sparse or not self.is_pruned:
            return None
        return wins_from(lambda share: min(curve(1.0 - share) for curve in sparse), self.dense_us, self.zeros)


@dataclass(frozen=True)
class Forecast:
    """What a network gains on this device by how much of it is pruned. It says nothing of accuracy.

    Printed it is two tables; :meth:`write` makes a page of it.

    Attributes:
        layers: the convolutions in the order of execution.
        skipped: those that stay with torch, and why.
        dense_us: microseconds of the model as it is, unconverted: the median of what each conversion measured.
        dense_spread: how far apart these are, as a share of it.
        points: the sum of the layers' times and the time of the whole network at each share that was measured, rising.
        measured: those shares, of all layers that were pruned together.
        error: how far off the time of the whole is at the shares in between, as a share of it, where it is forecast
            from the first and the last alone.
        seconds: that it took.
    """

    layers: tuple[LayerForecast, ...]
    skipped: Mapping[str, str]
    dense_us: float
    dense_spread: float
    points: tuple[tuple[float, float], ...]
    measured: tuple[float, ...]
    error: float
    input_shapes: tuple[tuple[int, ...], ...]
    precision: Precision
    device: str
    machine: Machine
    seconds: float

    def __str__(self) -> str:
        return "\n\n".join(report.text(table) for table in self._tables)

    def _repr_html_(self) -> str:
        """For notebooks."""
        return "".join(report.html(table) for table in self._tables)

    @property
    def _tables(self) -> tuple[report.Table, ...]:
        return page.layer_table(self), page.network_table(self)

    def to_json(self) -> dict[str, Any]:
        """The forecast as JSON values: the network and each layer, at a few shares of zeros."""
        return page.to_json(self)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes a self-contained page with the curves, and JSON beside it, whose path it returns.

        Raises:
            ValueError, TypeError: where `path` is no .html file.
            ImportError: without matplotlib, which draws the curves.
            OSError: where a file cannot be written, as where its folder is not there.
        """
        return page.write(self, path)

    def time_us(self, sparsity: float | Mapping[str, float]) -> float:
        """Microseconds of the network converted, also where the original is faster, so that it would be kept.

        Args:
            sparsity: of all layers that are pruned; or by name of each, as :func:`escort.prune.sparsity` returns it.
                A layer has at least the zeros that it has now.

        Raises:
            ValueError: for the name of a layer that there is not, and for what is no share.
        """
        layers_us = self.layers_us(sparsity)
        sums_us, times_us = zip(*self.points, strict=True)
        inside = min(max(layers_us, sums_us[0]), sums_us[-1])
        return float(np.interp(inside, sums_us, times_us)) + layers_us - inside  # beyond either end, as much more

    def speedup(self, sparsity: float | Mapping[str, float]) -> float:
        """How many times as fast as the model is now; 1 where the original is kept."""
        return max(self.dense_us / self.time_us(sparsity), 1.0)

    @property
    def wins_from(self) -> float | None:
        """From which share of zeros on the converted network is the faster one; None where it is not at 98 %."""
        return wins_from(self.time_us, self.dense_us, self.zeros)

    @property
    def knee(self) -> float | None:
        """From which share on more pruning brings little speed, see :func:`escort.network.forecast.curve.knee`."""
        return knee(self.time_us, self.zeros)

    @property
    def zeros(self) -> float:
        """The share of zeros that there is now in all layers that are pruned together."""
        weights = [(math.prod(layer.problem.weight_shape), layer.zeros) for layer in self.layers if layer.is_pruned]
        return sum(count * zeros for count, zeros in weights) / max(sum(count for count, _ in weights), 1)

    def layers_us(self, sparsity: float | Mapping[str, float]) -> float:
        """The sum of the times of the layers, each alone, in microseconds; `sparsity` as :meth:`time_us` takes it."""
        return sum(layer.time_us(share) for layer, share in self._shares(sparsity))

    def _shares(self, sparsity: float | Mapping[str, float]) -> list[tuple[LayerForecast, float]]:
        given = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
        if wrong := [share for share in given if not (is_number(share) and 0.0 <= share <= 1.0)]:
            raise ValueError(f"a share of zeros is between 0 and 1, got {wrong[0]!r}; write 0.9 for 90 %")
        if not isinstance(sparsity, Mapping):
            return [(layer, max(sparsity, layer.zeros) if layer.is_pruned else layer.zeros) for layer in self.layers]
        known = {layer.name for layer in self.layers} | self.skipped.keys() | {"overall"}
        if unknown := sparsity.keys() - known:
            names = prune.listing(layer.name for layer in self.layers)
            raise ValueError(f"there is no layer {prune.listing(sorted(unknown))}; the layers are {names}")
        return [(layer, max(sparsity.get(layer.name, 0.0), layer.zeros)) for layer in self.layers]


def forecast(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    skip: prune.Skip | None = None,
    **options: Any,
) -> Forecast:
    """What a model would gain on this device by pruning it, before it is pruned. It says nothing of accuracy.

    Copies of the model are pruned by magnitude to 50, 80 and 95 % zeros, converted and timed. Between these each
    layer's time by each method is taken as linear in its nonzeros, and the network's as linear in the sum of its
    layers'. That takes as long as three conversions, and leaves their plans to the ones that follow.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
        >>> outlook = forecast(model, torch.randn(1, 3, 32, 32))
        >>> outlook.speedup(0.9) >= 1.0
        True

    Args:
        model, example_inputs, example_kwargs: as :func:`escort.convert` takes them; the model is not changed.
        skip: the convolutions that will not be pruned, as :func:`escort.prune.uniform` takes it. By default the first
            one, which sees the picture, and depthwise ones, of which no method skips zeros.
        options: `precision`, `effort`, `methods`, `favor`, `progress` and `remeasure` of :func:`escort.convert`.

    Raises:
        ValueError, TypeError: as :func:`escort.convert`; or where there is nothing to prune.
    """
    begin = time.perf_counter()
    model = unwrap(model)
    stays = _usually_dense(model) if skip is None else skip
    now = prune.sparsity(plain_copy(model))
    prunable = prune.convolutions(model, skip=stays)
    plans: list[NetworkPlan] = []
    for share in MEASURED:
        pruned = plain_copy(model)
        prune.uniform(pruned, share, skip=stays)
        prune.make_permanent(pruned)
        plans.append(convert(pruned, example_inputs, example_kwargs, **options).plan)
        if (refused := plans[-1].refused) is not None:
            raise ValueError(f"there is no forecast, as the model cannot be converted: {refused}")
        _log.info("forecast: %.0f us at %.0f %% zeros", plans[-1].converted_time_us, 100 * share)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if there := [name for name in prunable if now[name] > MEASURED[0]]:
        _log.warning(
            "%d of %d layers have more than %.0f %% zeros already, and are forecast with no fewer; forecast the model "
            "as it was before it was pruned",
            *(len(there), len(prunable), 100 * MEASURED[0]),
        )
    return from_plans(plans, {name: now[name] for name in prunable}, time.perf_counter() - begin)


def _usually_dense(model: nn.Module) -> list[str]:
    """The convolutions that most do not prune: the first one, and depthwise ones."""
    convs = prune.convolutions(model)
    first = next(iter(convs))
    names = [name for name, conv in convs.items() if name == first or conv.groups == conv.in_channels > 1]
    if len(names) == len(convs):
        raise ValueError(
            f"there is nothing to prune: {prune.listing(names)} stay dense by default, and are all; pass skip=() to "
            "prune them too"
        )
    return names


def from_plans(plans: Sequence[NetworkPlan], now: Mapping[str, float], seconds: float = 0.0) -> Forecast:
    """The forecast that plans of a network give, which was converted at several shares of zeros, rising.

    Args:
        now: the share of zeros of each convolution that was pruned, before that.
    """
    outer = _through([plans[0], plans[-1]], now)
    errors = [abs(outer.time_us(plan.sparsities) / plan.converted_time_us - 1.0) for plan in plans[1:-1]]
    return replace(_through(plans, now), error=max(errors, default=0.0), seconds=seconds)


def _through(plans: Sequence[NetworkPlan], now: Mapping[str, float]) -> Forecast:
    """The forecast through what plans measured, without its error."""
    last = plans[-1]
    layers = tuple(_layer(name, [plan for plan in plans if name in plan.layers], now) for name in last.layers)
    dense_us = [plan.dense_time_us for plan in plans if plan.dense_time_us is not None]
    known = Forecast(
        layers=layers,
        skipped=last.skipped,
        dense_us=median(dense_us),
        dense_spread=(max(dense_us) - min(dense_us)) / median(dense_us),
        points=(),
        measured=tuple(1.0 - _density(plan, now) for plan in plans),
        error=0.0,
        input_shapes=last.input_shapes,
        precision=last.precision,
        device=last.device,
        machine=last.machine,
        seconds=0.0,
    )
    points = [(known.layers_us(plan.sparsities), plan.converted_time_us) for plan in plans]
    return replace(known, points=tuple(sorted(points)))


def _density(plan: NetworkPlan, now: Mapping[str, float]) -> float:
    """The share of weights that the layers that were pruned still have."""
    weights = {name: math.prod(plan.layers[name].problem.weight_shape) for name in now if name in plan.layers}
    left = sum(count * (1.0 - plan.sparsities[name]) for name, count in weights.items())
    return left / max(sum(weights.values()), 1)


def _layer(name: str, plans: Sequence[NetworkPlan], now: Mapping[str, float]) -> LayerForecast:
    points: dict[str, list[tuple[float, float]]] = {}
    for plan in plans:
        for method in dict.fromkeys(candidate.method for candidate in plan.layers[name].candidates):
            if (time_us := plan.layers[name].best_us(method)) is not None:
                points.setdefault(method, []).append((1.0 - plan.sparsities[name], time_us))
    problem = plans[-1].layers[name].problem
    dense = {method for method in points if by_name(method, problem.device).is_dense}
    curves = {method: Curve.of(of_method) for method, of_method in points.items() if method not in dense}
    for method in dense:  # which take as long whatever the weights are
        curves[method] = Curve(((1.0, median(us for _, us in points[method])),))
    dense_us = min((curves[method](1.0) for method in dense), default=None)
    shares = [plan.sparsities[name] for plan in plans]
    is_pruned = name in now or max(shares) - min(shares) > _SAME_SHARE  # by another name, where it is called twice
    zeros = now.get(name, 0.0 if is_pruned else shares[0])
    return LayerForecast(name, problem, zeros, is_pruned, curves, dense_us)
