"""How well the model of generated kernels predicts the times that were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.findings.gpus import gpu_of
from benchmarks.findings.methods import GENERATED
from benchmarks.result_files import Result, seed_of
from benchmarks.suite import config_of, paper_layers_by_name
from escort.methods import by_name


@dataclass(frozen=True)
class Predicted:
    """A layer's timings of generated kernels beside the model's predictions.

    Attributes:
        timings: predicted and measured microseconds, in the order in which the search tried them.
    """

    timings: tuple[tuple[float, float], ...]

    @property
    def errors(self) -> list[float]:
        """``|predicted / measured - 1|``."""
        return [abs(predicted / measured - 1.0) for predicted, measured in self.timings]

    @property
    def first_cost(self) -> float:
        """How many times slower than the fastest the one with the least prediction is."""
        return min(self.timings)[1] / self._least

    @property
    def tried_cost(self) -> float:
        """How many times slower than the fastest the one that was tried first is."""
        return self.timings[0][1] / self._least

    @property
    def _least(self) -> float:
        return min(measured for _, measured in self.timings)


def predictions(result: Result) -> list[Predicted]:
    """What today's model of generated kernels says of a result's timings, per layer; none of GPUs it does not know."""
    gpu, method = gpu_of(result), by_name(GENERATED, "cuda")
    if gpu is None:
        return []
    layers = paper_layers_by_name(seed_of(result))
    timings: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for row in result.rows:
        if row.method == method.name and (row.network, row.layer) in layers:
            layer = layers[row.network, row.layer]
            problem = replace(layer.problem, batch=row.batch, precision=row.dtype)  # type: ignore[arg-type]
            predicted = method.predict_us(problem, layer.sparse_filter, gpu, config_of(method, row))
            assert predicted is not None
            timings.setdefault((row.network, row.layer, row.batch), []).append((predicted, row.time_us))
    return [Predicted(tuple(of_layer)) for of_layer in timings.values()]
