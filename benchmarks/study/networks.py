"""The questions about whole networks: how fast they are, and where their time and that of layers goes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import suite
from benchmarks.ahead import Compilation
from benchmarks.breakdown import marking, network_part_times, part_times
from benchmarks.findings.break_even import random_weights
from benchmarks.findings.methods import OURS
from benchmarks.result_files import Item
from benchmarks.study.study import Study, best_rows, label, layers_of, raced
from benchmarks.suite import WHOLE, Layer, NetworkRace, Row
from escort.methods import by_name
from escort.planner import timing
from escort.problem import TORCH_DTYPE, Precision

#: Zeros in the whole networks whose time is broken down.
BREAKDOWN_SPARSITY = 0.90


def sweep_networks(study: Study, precision: Precision) -> list[Item]:
    """RQ4 for networks: converted ones against torch's ways to run them dense, at several sparsities."""
    race = NetworkRace(precision=precision, effort=study.effort, budget_s=4 * study.budget_s, ahead=study.ahead)

    def measure(name: str, sparsity: float) -> list[Row]:
        model, x = pruned(study, name, sparsity, precision)
        weights = random_weights(sparsity)
        if study.device_type == "cpu":
            return suite.measure_network(model, x, network=name, weights=weights, race=race)
        return suite.measure_speed(model, x, network=name, weights=weights, race=race, formats=study.formats)

    def compilation(name: str) -> Compilation | None:
        if study.device_type == "cpu":
            return None
        return Compilation(name, study.samples(name), precision, study.device, tuple(study.formats))

    return [
        Item(f"{name} {sparsity:.2f} N={study.samples(name)}", partial(measure, name, sparsity), compilation(name))
        for name in study.networks
        for sparsity in study.sparsities
    ]


def break_down(study: Study, precision: Precision) -> list[Item]:
    """Where the time goes: in every method's best configuration on the pruned layers, and in whole networks."""

    def measure(layer: Layer) -> list[Row]:
        return [part for row in best_rows(raced(study, layer)) for part in parts_of_layer(layer, row, study.seed)]

    def measure_network(name: str) -> list[Row]:
        return parts_of_network(*pruned(study, name, BREAKDOWN_SPARSITY, precision), name, precision)

    layers = [Item(label(layer), partial(measure, layer)) for layer in layers_of(study, precision)]
    return layers + [Item(f"{name} N={study.samples(name)}", partial(measure_network, name)) for name in study.networks]


def parts_of_layer(layer: Layer, row: Row, seed: int) -> list[Row]:
    """A row for each part of the time of a layer by the method and the configuration of a row."""
    method = by_name(row.method, layer.problem.device)
    config = suite.config_of(method, row)
    x = timing.example_inputs(layer.problem, seed=seed)[0][0]
    prepared = method.prepare(layer.problem, layer.sparse_filter, None, config)
    run = partial(prepared, suite.as_taken(method, config, x))
    with torch.inference_mode():
        times = part_times(marking(run) if row.method == OURS else run, layer.problem.device)
    return [
        replace(row, config={**row.config, "part": part}, time_us=round(time_us, 2)) for part, time_us in times.items()
    ]


def parts_of_network(model: nn.Module, x: Tensor, name: str, precision: Precision) -> list[Row]:
    """A row for each part of the time of a whole network, converted and run eagerly."""
    about = name, random_weights(BREAKDOWN_SPARSITY), WHOLE, len(x), precision
    return [
        Row(*about, method, {**config, "part": part}, round(time_us, 2), error)
        for method, config, error, parts in network_part_times(model, x, precision)
        for part, time_us in parts.items()
    ]


def pruned(study: Study, name: str, sparsity: float, precision: Precision) -> tuple[nn.Module, Tensor]:
    """A whole network with random weights, pruned by magnitude, and an input for it."""
    torch.manual_seed(study.seed)
    network = study.factories[name]
    model = network.factory().eval()
    suite.prune_all_but_first(model, sparsity)
    x = torch.randn(study.samples(name), *network.input_size)
    return model.to(study.device, TORCH_DTYPE[precision]), x.to(study.device, TORCH_DTYPE[precision])
