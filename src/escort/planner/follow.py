"""Layers that run as a plan says that was made before: nothing is timed, so that each process chooses alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

from escort.methods import Config, Method, by_name
from escort.planner.checked import check_fields
from escort.planner.cores import on_all_cores
from escort.planner.measure import Ahead, Allowance, check
from escort.planner.plan import Layer, Plan, Planned
from escort.planner.search import no_kernel, runs

_REMEDY = "convert without a plan, which measures what is right"


def follow(layers: Sequence[Layer], plans: Sequence[Plan]) -> Iterator[Planned]:
    """Each layer by the choice of its plan, prepared and validated on the layer's own filter, with the plan's times.

    A choice that tries algorithms in its first call is taken without trying: what is found so may differ each time.

    Raises:
        ValueError: where a layer's turn is, if the method does not offer the choice for its problem and filter, or it
            cannot be prepared here, or computes wrong.
    """
    choices = [_choice(layer, plan) for layer, plan in zip(layers, plans, strict=True)]
    allowance = Allowance(layers[0].problem.device) if layers else None
    ahead = [Ahead(allowance) for _ in layers]
    if layers and layers[0].problem.device_type == "cuda":
        offered = [each for each in zip(layers, choices, ahead, strict=True) if _refusal(*each[:2]) is None]
        on_all_cores([partial(one.prepare, layer, *choice) for layer, choice, one in offered])
    for layer, plan, choice, one in zip(layers, plans, choices, ahead, strict=True):
        method, config = choice
        if reason := _refusal(layer, choice):
            raise ValueError(f"its plan has {method.name}, and {reason}; {_REMEDY}")
        planned = check(layer, replace(plan, config=asdict(config)), method, one)
        if planned is None:
            raise ValueError(f"its plan has {method.name} with {config}, which does not compute it here; {_REMEDY}")
        yield planned._replace(plan=replace(planned.plan, times_from=plan.times_from))


def _choice(layer: Layer, plan: Plan) -> tuple[Method, Config]:
    method = by_name(plan.method, layer.problem.device)
    config = method.config_type(**plan.config)
    check_fields(config)  # kernels trust their configs
    return method, method.without_trying(config)


def _refusal(layer: Layer, choice: tuple[Method, Config]) -> str | None:
    """Why a method does not run a layer by a config. Kernels trust their configs: no other is prepared."""
    method, config = choice
    if reason := method.unsupported(layer.problem):
        return reason
    if not method.offers(layer.problem, layer.sparse_filter, config):
        return f"{config} is none of its configs for this layer"
    if runs(method, layer, config):
        return None
    return f"{no_kernel()}, or load a network that was saved with its kernels by kernels=True"
