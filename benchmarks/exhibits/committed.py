"""Tables and plots of committed results, whatever folder is shown: the CPU's, and the headlines of several machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from benchmarks import suite
from benchmarks.exhibits.cells import Exhibit, milliseconds, times_faster
from benchmarks.exhibits.conditions import conditions_table
from benchmarks.exhibits.forecasts import forecast_table, network_forecast_table
from benchmarks.exhibits.overview import NETWORKS, of_networks, show_overview, where
from benchmarks.exhibits.roofline import show_rooflines
from benchmarks.findings.break_even import sparsity_of
from benchmarks.findings.methods import OURS, methods_in, rivals_in
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import WHOLE
from escort.report import Figure, Table, horizontal_bars

RESULTS = Path(__file__).parents[1] / "results"
#: Forecasts and what became of them, under :data:`RESULTS`, without ending.
FORECASTS = "forecast/cpu-avx512"

_ENGINES = {
    "eager": "eager torch",
    "graph": "torch in a CUDA graph",
    "compile": "`torch.compile`",
    "onnxruntime": "ONNX Runtime",
}


@dataclass(frozen=True)
class Headline:
    """One of the results that the README shows.

    Attributes:
        file: under :data:`RESULTS`, without ending.
        note: how the network was converted, where it was not as by default.
    """

    file: str
    network: str
    weights: str
    batch: int
    note: str = ""

    @property
    def zeros(self) -> str:
        """The share of zeros, of magnitudes drawn at random unless it says something else."""
        if self.weights.startswith("random-"):
            return f"{sparsity_of(self.weights):.0%}"
        return f"{self.weights.rpartition('_magnitude_')[2]}%, pattern of a trained one"


HEADLINES = (
    Headline("cpu-avx512/networks-fp32", "resnet50", "random-0.90", 1),
    Headline("cpu-avx512/networks-fp32", "resnet50", "random-0.95", 8),
    Headline("h200/speed-fp16", "resnet50", "resnet50_magnitude_90", 32),
    Headline("h200/speed-fp32", "resnet50", "resnet50_magnitude_90", 32, "effort=10"),
    Headline("h200/speed-fp16", "googlenet", "random-0.90", 128),
    Headline("h200/speed-fp16", "caffenet", "random-0.90", 128),
)


@cache
def committed(folder: Path = RESULTS) -> Mapping[str, Result]:
    """All result files in a folder and below, by their path in it without ending."""
    paths = sorted(folder.glob("*/**/*.json"))  # what lies in the folder itself, as the aims, is no result
    return {str(path.relative_to(folder).with_suffix("")): Result.read(path) for path in paths}


def committed_exhibits(results: Mapping[str, Result] | None = None) -> Iterator[Exhibit]:
    """Tables, and plots as the functions that draw them, by the names that documents call them, with their files.

    Args:
        results: as of :func:`committed`, which is the default.
    """
    results = committed() if results is None else results
    races = {name: result for name, result in results.items() if name != FORECASTS}
    of_cpus = {name: result for name, result in races.items() if result.header.get("device") == "cpu"}
    layers, networks = _with_rows(of_cpus, whole=False), _with_rows(of_cpus, whole=True)
    files = tuple(dict.fromkeys(headline.file for headline in HEADLINES))
    yield "headlines", _headlines_table(results), files
    yield "speedup", partial(_headlines_plot, results), files
    yield "cpu-layers", _cpu_layers_table(layers), tuple(layers)
    yield "cpu-networks", _cpu_networks_table(networks), tuple(networks)
    yield "cpu-conditions", conditions_table(of_cpus), ()
    yield "all-conditions", conditions_table(results), ()
    yield from show_overview(races)
    yield from show_rooflines(races)
    if FORECASTS in results:
        yield "forecast-by-sparsity", network_forecast_table(results[FORECASTS]), (FORECASTS,)
        yield "forecast-resnet50", network_forecast_table(results[FORECASTS], "resnet50"), (FORECASTS,)
        yield "forecast", forecast_table(results[FORECASTS]), (FORECASTS,)


def _with_rows(results: Mapping[str, Result], *, whole: bool) -> dict[str, Result]:
    """The rows of whole networks that engines raced, or those of layers, of the files that have any."""
    kept = {
        name: Result(
            result.header,
            [row for row in result.rows if (row.layer == WHOLE) == whole and row.method not in ("convert", "load")],
        )
        for name, result in results.items()
        if not name.rpartition("/")[2].startswith("conversions-")
    }
    return {name: result for name, result in kept.items() if result.rows}


def _headlines_table(results: Mapping[str, Result]) -> Table:
    lines = []
    for headline in HEADLINES:
        best, gain = _against(results, headline)
        note = f", `{headline.note}`" if headline.note else ""
        on = where(results[headline.file], strict=True) + note
        network = f"{NETWORKS[headline.network]}, {headline.zeros}"
        lines.append((network, str(headline.batch), on, _ENGINES[best], times_faster(gain)))
    return Table("Headlines", ("Network, zeros", "Samples", "On", "Fastest dense engine", "Gain"), tuple(lines))


def _headlines_plot(results: Mapping[str, Result]) -> Figure:
    names = [f"{NETWORKS[h.network]}, {h.zeros}, {where(results[h.file])}, N={h.batch}" for h in HEADLINES]
    gains = {"gain": [_against(results, headline)[1] for headline in HEADLINES]}
    heading = "Converted networks against the fastest dense engine"
    return horizontal_bars(heading, names, gains, "Times as fast as the fastest dense engine", mark=1.0)


def _against(results: Mapping[str, Result], headline: Headline) -> tuple[str, float]:
    """The fastest dense engine, and its time by that of the converted network."""
    rows = [row for row in of_networks(results[headline.file]) if row.weights == headline.weights]
    times = suite.best_times(rows)[headline.network, WHOLE, headline.batch]
    ours = times.pop("escort")
    best = min(times, key=times.__getitem__)
    return best, times[best] / ours


def _cpu_layers_table(results: Mapping[str, Result]) -> Table:
    """Geometric means over the layers of a network; of all networks where a file has several."""
    rivals: list[str] = []
    for result in results.values():
        best = suite.best_times(result.rows)
        rivals += [rival for rival in rivals_in(best.values()) if rival not in rivals]
    lines = []
    for result in results.values():
        best = suite.best_times(result.rows)
        means = suite.geometric_means(result.rows, OURS)
        networks = list(dict.fromkeys(network for network, _, _ in best))
        for name in (*networks, *(("all",) if len(networks) > 1 else ())):
            layers = {key: times for key, times in best.items() if name in (key[0], "all")}
            ratios = [times["dense"] / times[OURS] for times in layers.values()]
            batches = ", ".join(dict.fromkeys(str(batch) for _, _, batch in layers))
            means_of = (times_faster(means[name].get(rival)) for rival in rivals)
            ends = times_faster(min(ratios)), times_faster(max(ratios))
            about = NETWORKS.get(name, name), result.rows[0].weights, _zeros(layers), batches, str(len(layers))
            lines.append((*about, *means_of, *ends))
    columns = ("Network", "Weights", "Zeros", "Samples", "Layers", *(f"vs {rival}" for rival in rivals))
    columns += ("Least vs dense", "Most vs dense")
    caption = "Geometric means over the layers of the times of a rival by those of direct, in fp32."
    return Table("Layers on CPUs", columns, tuple(lines), caption)


def _zeros(layers: Mapping[tuple[str, str, int], object]) -> str:
    """The shares of zeros that the paper published for its layers."""
    published = [LAYERS[key[:2]].sparsity for key in layers if key[:2] in LAYERS]
    return f"{min(published):.0%} to {max(published):.0%}" if published else "-"


def _cpu_networks_table(results: Mapping[str, Result]) -> Table:
    timed: list[tuple[Result, tuple[str, str, int], dict[str, float]]] = []
    for result in results.values():
        rows = {(row.network, row.weights, row.batch): row for row in result.rows}
        for key in rows:
            of_network = [row for row in result.rows if (row.network, row.weights, row.batch) == key]
            timed += [(result, key, times) for times in suite.best_times(of_network).values()]
    engines = methods_in(times for *_, times in timed)
    rivals = [engine for engine in engines if engine != "escort"]
    lines = []
    for result, (network, weights, batch), times in timed:
        alone = any(row.rounds_us for row in result.rows)
        times_ms = (milliseconds(times.get(engine)) for engine in engines)
        ratios = (times_faster(times[r] / times["escort"] if r in times else None) for r in rivals)
        about = NETWORKS.get(network, network), weights, str(batch), where(result), "alone" if alone else "in turn"
        lines.append((*about, *times_ms, *ratios))
    columns = ("Network", "Weights", "Samples", "On", "Timed", *(f"{engine} ms" for engine in engines))
    columns += tuple(f"vs {rival}" for rival in rivals)
    caption = (
        "Timed alone: each engine in fresh processes of its own while no other runs. In turn: all in one process, "
        "where they disturb each other, our rivals more. Weights of dense-depthwise keep depthwise layers dense."
    )
    return Table("Whole networks on CPUs, fp32", columns, tuple(lines), caption)
