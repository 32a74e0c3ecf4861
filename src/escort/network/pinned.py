"""A conversion by a plan that was made before: what it says is done, compared with the original, and not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from escort.filter import SparseFilter
from escort.network.check import Request
from escort.network.choose import judge, sparsities
from escort.network.context import dense_in
from escort.network.example import Example
from escort.network.model import ConvertedModel
from escort.network.original import Original
from escort.network.plan import NetworkPlan
from escort.network.swap import Swapped, Unplanned
from escort.network.wording import percent
from escort.planner.store import steps_of_nonzeros
from escort.problem import MemoryFormat, Precision, torch_name

#: How many steps of the plan store's numbers of nonzeros a filter may be from its plan: a quarter more, or fewer.
_FAR = 5
#: The same as a share of a filter's weights, since one nonzero of few is many steps.
_FEW = 0.02
_ANEW = "convert it without a plan"


def check_pinned(plan: NetworkPlan, example: Example, asked: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError where a plan is not for an example, or goes with nothing that was asked for.

    Args:
        asked: other arguments of the conversion by name, None for those that were not given.
    """
    if not isinstance(plan, NetworkPlan):
        raise TypeError(
            f"plan is the plan of a converted model, fast.plan, got {type(plan).__name__}; of JSON make one by "
            "NetworkPlan.from_json"
        )
    if given := ", ".join(name for name, value in asked.items() if value is not None):
        raise ValueError(f"a plan says what runs, so that nothing is measured; leave out {given}")
    if (here := example.device.type) != (there := plan.device.partition(":")[0]):
        raise ValueError(f"the plan is for {there}, the model on {here}; move the model, or {_ANEW}")
    shapes = tuple(tuple(x.shape) for x in example.tensors)
    if shapes != plan.input_shapes:
        raise ValueError(f"the plan is for inputs of {plan.input_shapes}, the example has {shapes}; pass one like them")
    types, names = tuple(x.dtype for x in example.tensors), tuple(example.kwargs) if example.is_plain else ()
    if (types, names) != (plan.input_types, plan.input_names):
        raise ValueError(
            f"the plan is for inputs of {plan.input_types} with the names {plan.input_names}, the example has {types} "
            f"and {names}; pass one like them, or {_ANEW}"
        )


def check_pinned_precision(plan: NetworkPlan, precision: Precision, widened: torch.dtype | None) -> None:
    """Raises ValueError where a plan is for another precision than the model's."""
    if plan.widened != ("" if widened is None else torch_name(widened)):
        raise ValueError(
            f"the plan is for a model of {plan.widened or 'float32'}, this one is of another type; {_ANEW}"
        )
    if plan.precision != precision:
        raise ValueError(f"the plan is for {plan.precision}, the model is computed in {precision}; {_ANEW}")


def only_planned(networks: Mapping[MemoryFormat, Unplanned], plan: NetworkPlan) -> dict[MemoryFormat, Unplanned]:
    """The network in the memory format of a plan. Raises ValueError where it has other layers than that."""
    if plan.kept_dense:
        return {"contiguous": replace(networks["contiguous"], layers={})}
    if plan.memory_format not in networks:
        raise ValueError(f"the plan is for tensors in {plan.memory_format}, in which this model is not converted here")
    unplanned = networks[plan.memory_format]
    if differing := sorted(unplanned.layers.keys() ^ plan.layers.keys()):
        raise ValueError(f"the plan is for another model: only one of the two has the layer {differing[0]}")
    for name, layer in unplanned.layers.items():
        if (planned := plan.layers[name].problem.on(layer.problem.device)) != layer.problem:
            raise ValueError(f"layer {name}: the plan is for {planned}, the model has {layer.problem}")
        if name not in plan.sparsities:
            raise ValueError(f"layer {name}: the plan does not say how many zeros it is for; {_ANEW}")
        _check_zeros(name, plan.sparsities[name], layer.sparse_filter)
    return {plan.memory_format: unplanned}


def _check_zeros(name: str, planned: float, sparse_filter: SparseFilter) -> None:
    """Raises ValueError where a filter's nonzeros are far more or fewer than those that its plan was measured with.

    Args:
        planned: the share of zeros in the plan.
    """
    weights = math.prod(sparse_filter.shape)
    shares = planned, round(sparse_filter.sparsity, 4)  # as a plan has it
    before, now = (steps_of_nonzeros(round((1.0 - zeros) * weights)) for zeros in shares)
    if abs(before - now) > _FAR and abs(shares[0] - shares[1]) > _FEW:
        raise ValueError(
            f"layer {name}: the plan is for {percent(planned)} zeros, the model has {percent(sparse_filter.sparsity)}, "
            f"of which other methods may be the fastest; {_ANEW}"
        )


def keep_as_planned(dense: nn.Module, swapped: Swapped, original: Original, request: Request) -> ConvertedModel:
    """The network that a plan keeps, with that plan. Raises ValueError where it is not right here."""
    plan = request.pinned
    assert plan is not None
    network, error = dense, plan.rel_error
    if not plan.kept_dense:
        network = swapped.network
        with dense_in(request.precision, request.device):
            error, reason = judge(network, original, request)
        if reason is not None:
            raise ValueError(f"by its plan the network is wrong here: {reason}; {_ANEW}")
        request.progress.done("compared with the original")
    if original.state is not None:
        original.state.restore(network)
    here = str(request.device)
    if plan.kept_dense:
        layers = {name: replace(each, problem=each.problem.on(here)) for name, each in plan.layers.items()}
        plan = replace(plan, layers=layers)
    else:
        plan = replace(plan, layers=swapped.layers, sparsities=sparsities(network))
    plan = replace(plan, skipped=swapped.skipped, rel_error=error, device=here)
    return ConvertedModel(network, plan, original.model)
