"""RQ2: what each field of the fastest configuration is worth, and what the hardware counts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from benchmarks import counters, suite
from benchmarks.findings.methods import OURS
from benchmarks.result_files import Item
from benchmarks.study.study import Study, best_config, label, layers_of, one_per_map, race
from benchmarks.suite import Layer, Limited, Row
from escort.methods import by_name
from escort.problem import Precision


def ablate(study: Study, precision: Precision) -> list[Item]:
    """`direct` in its fastest configuration and with one field of it changed at a time.

    The first row of a layer is the configuration that the others change.
    """

    def measure(layer: Layer) -> list[Row]:
        method, config = by_name(OURS, study.device), best_config(study, layer, OURS)
        neighbours = method.neighbours(config, layer.problem, layer.sparse_filter)
        changes = [changed for values in neighbours.values() for changed in values]
        rows = race(study, layer, [Limited(method, [config, *changes])])
        if not rows or suite.config_of(method, rows[0]) != config:
            raise RuntimeError(f"{config}, which was the fastest, could not be timed again")
        return rows

    return [Item(label(layer), partial(measure, layer)) for layer in one_per_map(layers_of(study, precision))]


def count(study: Study, precision: Precision) -> list[Item]:
    """The evidence: hardware counters of `direct` on the same layers."""

    def measure(layer: Layer) -> list[Row]:
        config = best_config(study, layer, OURS)
        (checked,) = race(study, layer, [Limited(by_name(OURS, study.device), [config])])
        time_us, counts = counters.read(layer, OURS, config, study.seed)
        return [replace(checked, config={**checked.config, "counters": counts}, time_us=round(time_us, 2))]

    return [Item(label(layer), partial(measure, layer)) for layer in one_per_map(layers_of(study, precision))]
