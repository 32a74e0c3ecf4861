"""How fast converted networks are against the fastest dense ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.suite import Row

#: A network, its weights and a number of samples.
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Speed:
    """A network's times in microseconds; None where one was not taken.

    Attributes:
        call_us, graph_us: of a plain call of ours that is waited for, by the host's clock; in a CUDA graph, by the
            GPU's.
        rival_call_us, rival_graph_us: of torch.compile's dense model in a CUDA graph, by the same clocks.
        dense_graph_us: of the fastest dense model of all in a CUDA graph.
        kept_dense: whether the conversion kept the dense model.
    """

    call_us: float | None
    graph_us: float | None
    rival_call_us: float | None
    rival_graph_us: float | None
    dense_graph_us: float | None
    kept_dense: bool

    @property
    def gain(self) -> float | None:
        """How many times as fast a plain call of ours is as a replay of torch.compile's graph."""
        return _ratio(self.rival_call_us, self.call_us)

    @property
    def gain_in_graphs(self) -> float | None:
        return _ratio(self.rival_graph_us, self.graph_us)

    @property
    def gain_over_dense(self) -> float | None:
        """The same in graphs over the fastest dense model of all."""
        return _ratio(self.dense_graph_us, self.graph_us)


def speeds(rows: Iterable[Row]) -> dict[Key, Speed]:
    """What rows of one precision say of each network."""
    grouped: dict[Key, list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.network, row.weights, row.batch), []).append(row)
    return {key: _speed(of_network) for key, of_network in grouped.items()}


def _speed(rows: Sequence[Row]) -> Speed:
    dense = [row for row in rows if row.method != "escort"]
    ours = [row for row in rows if row.method == "escort"]
    compiled = [row for row in dense if row.method == "compile"]
    return Speed(
        call_us=_least(row for row in ours if row.timer == "call"),
        graph_us=_least(row for row in ours if row.timer == "graph"),
        rival_call_us=_least(row for row in compiled if row.timer == "call" and row.config.get("graph")),
        rival_graph_us=_least(row for row in compiled if row.timer == "graph"),
        dense_graph_us=_least(row for row in dense if row.timer == "graph"),
        kept_dense=any(row.config.get("kept_dense") for row in ours),
    )


def _least(rows: Iterable[Row]) -> float | None:
    return min((row.time_us for row in rows), default=None)


def _ratio(slow_us: float | None, fast_us: float | None) -> float | None:
    return slow_us / fast_us if slow_us and fast_us else None
