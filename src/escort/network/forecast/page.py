"""A forecast for readers: its tables, its curves, a page with both, and the same as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escort.arguments import path_of
from escort.network.forecast.curve import SHARES, is_ahead, shares_from
from escort.network.wording import convolution, machine_line, microseconds, percent
from escort.report import Facts, Figure, Section, Table, Text, line_chart, write_html

if TYPE_CHECKING:
    from escort.network.forecast.forecast import Forecast, LayerForecast

#: The shares of zeros that tables have columns of.
SHOWN = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
#: How many layers are drawn: those that take longest at the first share that is shown.
_DRAWN = 4
_PRUNED_ALREADY = "it has more zeros already"
_NO_ACCURACY = "A forecast of speed: it says nothing of accuracy, and some networks bear far fewer zeros than others."


def network_table(forecast: Forecast) -> Table:
    """The whole network by share of zeros."""
    rows = [("now", microseconds(forecast.dense_us), "1.00x", "")]
    for share in SHOWN:
        if not is_ahead(share, forecast.zeros):
            rows.append((percent(share), "-", "-", _PRUNED_ALREADY))
            continue
        kept = "the original is kept" if forecast.time_us(share) >= forecast.dense_us else ""
        rows.append((percent(share), microseconds(forecast.time_us(share)), f"{forecast.speedup(share):.2f}x", kept))
    return Table("Forecast of the whole network", ("Zeros", "µs", "Speedup", ""), tuple(rows), _caption(forecast))


def layer_table(forecast: Forecast) -> Table:
    """One line per layer: its time by the dense library, and by its fastest method at shares of zeros."""
    columns = ("Layer", "Convolution", "Zeros now", "Dense µs", *(f"{share:.0%}, µs" for share in SHOWN), "Wins from")
    rows = [_layer_row(layer) for layer in forecast.layers]
    caption = (
        "Times of each layer alone, by the fastest method at each share of zeros. Wins from: the share from which a "
        "sparse method is faster than the dense ones; a layer that is not pruned has none. A dash: it has more zeros "
        "than that already."
    )
    return Table("Forecast per layer", columns, tuple(rows), caption)


def _layer_row(layer: LayerForecast) -> tuple[str, ...]:
    if layer.is_pruned:
        times = [microseconds(layer.time_us(s)) if is_ahead(s, layer.zeros) else "-" for s in SHOWN]
    else:
        times = [microseconds(layer.time_us(layer.zeros))] * len(SHOWN)
    wins = _share(layer.wins_from, "never") if layer.is_pruned else "not pruned"
    return (layer.name, convolution(layer.problem), percent(layer.zeros), microseconds(layer.dense_us), *times, wins)


def sections(forecast: Forecast) -> list[Section]:
    """What a page shows. Raises ImportError where charts cannot be drawn."""
    facts = {
        "now": f"{microseconds(forecast.dense_us)} µs",
        "pruning wins from": _share(forecast.wins_from, "never"),
        "the curve levels off at": _share(forecast.knee, "beyond 96%"),
        "at 90 % zeros": f"{forecast.speedup(0.9):.2f}x" if is_ahead(0.9, forecast.zeros) else _PRUNED_ALREADY,
    }
    says = (
        _NO_ACCURACY,
        "Levels off: from there on half as many nonzeros again make the network less than 1.2 times as fast. Where "
        "pruning wins, the converted network is faster than the model as it is, which torch runs; below that "
        "escort.convert keeps the original.",
    )
    return [
        Facts("In short", facts),
        Text("What this says", says),
        *charts(forecast),
        network_table(forecast),
        layer_table(forecast),
    ]


def charts(forecast: Forecast) -> list[Figure]:
    """Curves over the share of zeros: of the network's speed, and of the layers that take longest."""
    shares = shares_from(forecast.zeros)
    percents = [100 * share for share in shares]
    speedups = {"whole network": [forecast.speedup(share) for share in shares]}
    pruned = [layer for layer in forecast.layers if layer.is_pruned]
    longest = sorted(pruned, key=lambda layer: -layer.time_us(shares[0]))[:_DRAWN]
    times = {layer.name: [layer.time_us(max(share, layer.zeros)) for share in shares] for layer in longest}
    drawn = [line_chart("Speed by zeros", percents, speedups, "Percent zeros", "Times as fast as now", marks=False)]
    if times:
        drawn.append(line_chart("The layers that take longest", percents, times, "Percent zeros", "µs", marks=False))
    return drawn


def to_json(forecast: Forecast) -> dict[str, Any]:
    """The forecast as JSON values: the network and each layer, at the shares that tables show and that are ahead."""
    return {
        "input_shapes": [list(shape) for shape in forecast.input_shapes],
        "precision": forecast.precision,
        "device": forecast.device,
        "machine": forecast.machine.to_json(),
        "says_nothing_of": "accuracy",
        "seconds": round(forecast.seconds, 1),
        "measured": [round(share, 4) for share in forecast.measured],
        "error": round(forecast.error, 4),
        "dense_us": round(forecast.dense_us, 2),
        "dense_spread": round(forecast.dense_spread, 4),
        "wins_from": forecast.wins_from,
        "knee": forecast.knee,
        "network": [
            {
                "sparsity": share,
                "time_us": round(forecast.time_us(share), 2),
                "speedup": round(forecast.speedup(share), 4),
            }
            for share in SHOWN
            if is_ahead(share, forecast.zeros)
        ],
        "layers": [
            {
                "name": layer.name,
                "problem": layer.problem.to_json(),
                "zeros": round(layer.zeros, 4),
                "is_pruned": layer.is_pruned,
                "dense_us": layer.dense_us,
                "wins_from": layer.wins_from,
                "times": [
                    {"sparsity": share, "method": layer.method(share), "time_us": round(layer.time_us(share), 2)}
                    for share in (SHOWN if layer.is_pruned else (layer.zeros,))
                    if is_ahead(share, layer.zeros)
                ],
            }
            for layer in forecast.layers
        ],
        "skipped": dict(forecast.skipped),
    }


def write(forecast: Forecast, path: str | os.PathLike[str]) -> Path:
    """Writes a page that stands alone, and JSON beside it, whose path is returned; raises as `Forecast.write` says."""
    path = path_of(path, "forecast.html")
    write_html(path, "What pruning would gain", sections(forecast))
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(to_json(forecast), indent=2) + "\n", encoding="utf-8")
    return beside


def _caption(forecast: Forecast) -> str:
    shapes = ", ".join("x".join(map(str, shape)) for shape in forecast.input_shapes)
    measured = ", ".join(percent(share) for share in forecast.measured)
    return (
        f"{_NO_ACCURACY} For an input of {shapes} in {forecast.precision}, on {machine_line(forecast.machine)}. Timed "
        f"at {measured} zeros in {forecast.seconds:.0f} s; what lies in between, forecast from the ends alone, is "
        f"{forecast.error:.0%} off. Timings of the model as it is are {forecast.dense_spread:.0%} apart. Pruning wins "
        f"from {_share(forecast.wins_from, 'no share on')}; from {_share(forecast.knee, 'beyond 96%')} on half the "
        "nonzeros make it less than 1.2 times as fast."
    )


def _share(share: float | None, none: str) -> str:
    if share is None:
        return none
    return f"below {SHARES[0]:.0%}" if share == SHARES[0] else f"{share:.0%}"
