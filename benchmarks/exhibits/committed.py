"""Tables and plots of committed results, whatever folder is shown: the CPU's, and the headlines of several machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from benchmarks import suite
from benchmarks.exhibits.cells import Plot, milliseconds, times_faster
from benchmarks.exhibits.conditions import conditions_table
from benchmarks.exhibits.forecasts import forecast_table, network_forecast_table
from benchmarks.findings.break_even import by_sparsity
from benchmarks.findings.methods import OURS, methods_in, rivals_in
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import WHOLE
from escort.report import Figure, Table, horizontal_bars

RESULTS = Path(__file__).parents[1] / "results"
#: Forecasts and what became of them, under :data:`RESULTS`, without ending.
FORECASTS = "forecast/cpu-avx512"

_NETWORKS = {
    "caffenet": "CaffeNet",
    "efficientnet_b0": "EfficientNet-B0",
    "googlenet": "GoogLeNet",
    "mobilenet_v2": "MobileNetV2",
    "resnet50": "ResNet-50",
    "yolo": "YOLO-style detector",
}
_ENGINES = {
    "eager": "eager torch",
    "graph": "torch in a CUDA graph",
    "compile": "`torch.compile`",
    "onnxruntime": "ONNX Runtime",
}
_ISAS = {"avx2": "AVX2", "avx512": "AVX-512"}


@dataclass(frozen=True)
class Headline:
    """One of the results that the README shows.

    Attributes:
        file: under :data:`RESULTS`, without ending.
        note: how the network was converted, where it was not as by default.
    """

    file: str
    network: str
    sparsity: float
    batch: int
    note: str = ""


HEADLINES = (
    Headline("cpu/resnet50-random-0.90", "resnet50", 0.90, 1),
    Headline("cpu/resnet50-random-0.95", "resnet50", 0.95, 8),
    Headline("h200/networks-fp16", "resnet50", 0.90, 32),
    Headline("h200/generated/networks-fp32", "resnet50", 0.90, 32, "effort=25"),
    Headline("h200/networks-fp16", "googlenet", 0.90, 128),
    Headline("h200/networks-fp16", "caffenet", 0.90, 128),
)


@cache
def committed() -> Mapping[str, Result]:
    """The files that are shown here, by their path under the results' folder, without ending."""
    of_cpus = (str(path.relative_to(RESULTS).with_suffix("")) for path in sorted(RESULTS.glob("cpu*/*.json")))
    names = dict.fromkeys((*of_cpus, *(headline.file for headline in HEADLINES)))
    if (RESULTS / f"{FORECASTS}.json").is_file():
        names[FORECASTS] = None
    return {name: Result.read(RESULTS / f"{name}.json") for name in names}


def committed_exhibits(results: Mapping[str, Result] | None = None) -> Iterator[tuple[str, Table | Plot]]:
    """Tables, and plots as the functions that draw them, by the names that documents call them.

    Args:
        results: as of :func:`committed`, which is the default.
    """
    results = committed() if results is None else results
    races = {name: result for name, result in results.items() if name != FORECASTS}
    of_cpus = {name: result for name, result in races.items() if result.header.get("device") == "cpu"}
    yield "headlines", _headlines_table(results)
    yield "speedup", partial(_headlines_plot, results)
    yield "cpu-layers", _cpu_layers_table(of_cpus)
    yield "cpu-networks", _cpu_networks_table(of_cpus)
    yield "cpu-conditions", conditions_table(of_cpus)
    if FORECASTS in results:
        yield "forecast-by-sparsity", network_forecast_table(results[FORECASTS])
        yield "forecast-resnet50", network_forecast_table(results[FORECASTS], "resnet50")
        yield "forecast", forecast_table(results[FORECASTS])


def _headlines_table(results: Mapping[str, Result]) -> Table:
    lines = []
    for headline in HEADLINES:
        best, gain = _against(results, headline)
        note = f", `{headline.note}`" if headline.note else ""
        where = _where(results[headline.file], strict=True) + note
        network = f"{_NETWORKS[headline.network]}, {headline.sparsity:.0%}"
        lines.append((network, str(headline.batch), where, _ENGINES[best], times_faster(gain)))
    return Table("Headlines", ("Network, zeros", "Samples", "On", "Fastest dense engine", "Gain"), tuple(lines))


def _headlines_plot(results: Mapping[str, Result]) -> Figure:
    names = [
        f"{_NETWORKS[h.network]}, {h.sparsity:.0%} zeros, {_where(results[h.file])}, N={h.batch}" for h in HEADLINES
    ]
    gains = {"gain": [_against(results, headline)[1] for headline in HEADLINES]}
    heading = "Converted networks against the fastest dense engine"
    return horizontal_bars(heading, names, gains, "Times as fast as the fastest dense engine", mark=1.0)


def _against(results: Mapping[str, Result], headline: Headline) -> tuple[str, float]:
    """The fastest dense engine, and its time by that of the converted network."""
    curve = by_sparsity(results[headline.file].rows)[headline.network, WHOLE, headline.batch]
    times = dict(curve[headline.sparsity])
    ours = times.pop("escort")
    best = min(times, key=times.__getitem__)
    return best, times[best] / ours


def _where(result: Result, *, strict: bool = False) -> str:
    """The device and the precision of a result, in a few words."""
    head, precision = result.header, result.rows[0].dtype
    if head["device"] == "cpu":
        return f"{head['threads']} CPU threads ({_isa(result)}), {precision}"
    return f"{head['gpu'].removeprefix('NVIDIA ')}, {'strict ' if strict and precision == 'fp32' else ''}{precision}"


def _isa(result: Result) -> str:
    isa = result.header["isa"]
    return _ISAS.get(isa, isa)


def _cpu_layers_table(results: Mapping[str, Result]) -> Table:
    """Geometric means over the layers of a network; of all networks where a file has several."""
    rivals: list[str] = []
    for result in results.values():
        best = suite.best_times(row for row in result.rows if row.layer != WHOLE)
        rivals += [rival for rival in rivals_in(best.values()) if rival not in rivals]
    lines = []
    for result in results.values():
        rows = [row for row in result.rows if row.layer != WHOLE]
        best = suite.best_times(rows)
        means = suite.geometric_means(rows, OURS)
        networks = list(dict.fromkeys(network for network, _, _ in best))
        for name in (*networks, *(("all",) if len(networks) > 1 else ())):
            layers = {key: times for key, times in best.items() if name in (key[0], "all")}
            ratios = [times["dense"] / times[OURS] for times in layers.values()]
            batches = ", ".join(dict.fromkeys(str(batch) for _, _, batch in layers))
            means_of = (times_faster(means[name].get(rival)) for rival in rivals)
            ends = times_faster(min(ratios)), times_faster(max(ratios))
            about = _NETWORKS.get(name, name), rows[0].weights, _zeros(layers), batches, str(len(layers))
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
    whole = {
        name: [row for row in result.rows if row.layer == WHOLE and row.weights.startswith("random-")]
        for name, result in results.items()
    }
    curves = {name: by_sparsity(rows) for name, rows in whole.items()}
    all_times = [times for curve in curves.values() for by_share in curve.values() for times in by_share.values()]
    engines = methods_in(all_times)
    rivals = [engine for engine in engines if engine != "escort"]
    lines = []
    for name, result in results.items():
        for (network, _, batch), curve in curves[name].items():
            for sparsity, times in curve.items():
                on = f"{result.header['threads']} threads, {_isa(result)}"
                times_ms = (milliseconds(times.get(engine)) for engine in engines)
                ratios = (times_faster(times[r] / times["escort"] if r in times else None) for r in rivals)
                about = _NETWORKS.get(network, network), f"{sparsity:.0%}", str(batch), on
                lines.append((*about, *times_ms, *ratios))
    columns = ("Network", "Zeros", "Samples", "On", *(f"{engine} ms" for engine in engines))
    columns += tuple(f"vs {rival}" for rival in rivals)
    return Table("Whole networks on CPUs, fp32", columns, tuple(lines))
