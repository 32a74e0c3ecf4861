"""What a reader with two minutes looks for: which method, how fast whole networks are, where we lose, what exists."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean

from benchmarks import suite
from benchmarks.exhibits.cells import Exhibit, milliseconds, times_faster
from benchmarks.exhibits.conditions import commits_of, device_of
from benchmarks.findings.break_even import break_even, by_sparsity, points_of
from benchmarks.findings.methods import SPARSE, methods_in
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result, runs_of
from benchmarks.suite import WHOLE, Row
from escort.report import Figure, Table, horizontal_bars, line_chart

NETWORKS = {
    "caffenet": "CaffeNet",
    "densenet121": "DenseNet-121",
    "efficientnet_b0": "EfficientNet-B0",
    "googlenet": "GoogLeNet",
    "mobilenet_v2": "MobileNetV2",
    "resnet50": "ResNet-50",
    "resnext50_32x4d": "ResNeXt-50",
    "unet": "U-Net",
    "vgg16_bn": "VGG-16",
    "yolo": "YOLO-style detector",
}
_ISAS = {"avx2": "AVX2", "avx512": "AVX-512"}
#: Shares of zeros of the paper's layers, up to which a line of the table of methods goes.
_BANDS = (0.90, 0.95, 1.0)
#: What dense libraries are called as methods.
_DENSE = ("cudnn", "cudnn_graph", "dense")
#: What is no rival of a whole network: ours, and ours with layers at no time.
_NO_RIVALS = ("escort", "cap")


def where(result: Result, *, strict: bool = False) -> str:
    """The device and the precision of a result, in a few words."""
    head, precision = result.header, result.rows[0].dtype
    if head["device"] == "cpu":
        name = head["cpu"].replace("(R)", "").replace("Processor", "").strip()
        threads = "1 thread" if head["threads"] == 1 else f"{head['threads']} threads"
        return f"{name}, {threads} ({_ISAS.get(head['isa'], head['isa'])}), {precision}"
    return f"{head['gpu'].removeprefix('NVIDIA ')}, {'strict ' if strict and precision == 'fp32' else ''}{precision}"


def show_overview(results: Mapping[str, Result]) -> Iterator[Exhibit]:
    """Of all committed results."""
    layers = {name: result for name, result in results.items() if _stem(name) in ("layers", "patterns", "paper")}
    layers |= {name: result for name, result in results.items() if _is_of_cpu_layers(result)}
    yield "which-method", _methods_table(layers), tuple(layers)
    races = _races(results)
    files = tuple(dict.fromkeys(race.file for race in races))
    yield "whole-networks", _networks_table("Whole networks", races), files
    lost = [race for race in races if race.gain < 1.0]
    yield "losses", _networks_table("Whole networks that lose", lost), tuple(dict.fromkeys(race.file for race in lost))
    yield "devices", _devices_table(results), ()
    for name, result in results.items():
        if _stem(name) == "networks" and result.header.get("device") == "cuda" and len(by_sparsity(result.rows)) > 1:
            plot = f"gain-by-zeros-{name.replace('/', '-').replace('-networks', '')}"
            yield plot, partial(_gains_plot, result), (name,)
    by_place: dict[str, list[_Race]] = {}
    for race in races:
        by_place.setdefault(race.on.replace(" (", ", ").replace(")", ""), []).append(race)
    for place, of_place in by_place.items():
        name = "-".join(place.lower().replace(",", "").split())
        files = tuple(dict.fromkeys(race.file for race in of_place))
        yield f"time-per-image-{name}", partial(_times_plot, place, of_place), files


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition("-")[0] or name.rpartition("/")[2]


def _is_of_cpu_layers(result: Result) -> bool:
    return result.header.get("device") == "cpu" and any(row.layer != WHOLE for row in result.rows)


@dataclass(frozen=True)
class _Race:
    """A whole network on a device: the best time of each engine in microseconds, on a GPU by its own clock."""

    file: str
    on: str
    network: str
    weights: str
    batch: int
    times: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest dense engine."""
        rivals = {engine: time for engine, time in self.times.items() if engine not in _NO_RIVALS}
        return min(rivals, key=rivals.__getitem__)

    @property
    def gain(self) -> float:
        return self.times[self.best] / self.times["escort"]


def of_networks(result: Result) -> list[Row]:
    """The rows of whole networks by which engines are compared: on a GPU those that its own clock timed."""
    by_clock = ("call", None) if result.header.get("device") == "cpu" else ("graph", None)
    return [row for row in result.rows if row.layer == WHOLE and row.timer in by_clock]


def _races(results: Mapping[str, Result]) -> list[_Race]:
    """All networks that were raced against dense engines, each with its last measurement, most gained first."""
    races: dict[tuple[str, str, str, int], _Race] = {}
    stems = {name: _stem(name) for name in results}
    for name in sorted(results, key=lambda name: str(results[name].header.get("date"))):
        result = results[name]
        if stems[name] in ("conversions", "breakdown", "inference"):
            continue
        grouped: dict[tuple[str, str, int], list[Row]] = {}
        for row in of_networks(result):
            grouped.setdefault((row.network, row.weights, row.batch), []).append(row)
        for (network, weights, batch), rows in grouped.items():
            (times,) = suite.best_times(rows).values()
            if "escort" in times and any(engine not in _NO_RIVALS for engine in times):
                on = where(Result(result.header, rows), strict=True)
                races[on, network, weights, batch] = _Race(name, on, network, weights, batch, times)
    return sorted(races.values(), key=lambda race: (race.on, -race.gain))


def _networks_table(heading: str, races: Sequence[_Race]) -> Table:
    lines = []
    for race in races:
        about = NETWORKS.get(race.network, race.network), race.weights, str(race.batch)
        times = milliseconds(race.times["escort"]), race.best, milliseconds(race.times[race.best])
        lines.append((race.on, *about, *times, times_faster(race.gain)))
    columns = ("On", "Network", "Weights", "Samples", "escort ms", "Fastest dense engine", "Its ms", "Gain")
    return Table(heading, columns, tuple(lines))


def _methods_table(results: Mapping[str, Result]) -> Table:
    """The fastest method of each layer, counted over layers of like zeros, and its gain over the dense library."""
    grouped: dict[tuple[str, str, int], list[tuple[str, float]]] = {}
    for result in results.values():
        for weights in dict.fromkeys(row.weights for row in result.rows if row.layer != WHOLE):
            rows = [row for row in result.rows if row.weights == weights and row.layer != WHOLE]
            for (network, layer, batch), times in suite.best_times(rows).items():
                sparse = [method for method in times if method in SPARSE]
                dense = [times[method] for method in times if method in _DENSE]
                if sparse and dense:
                    best = min(sparse, key=times.__getitem__)
                    kind = _band(network, layer) if weights == "paper" else weights
                    samples = batch if weights != "paper" or result.header["device"] == "cpu" else 0
                    key = where(Result(result.header, rows), strict=True), kind, samples
                    grouped.setdefault(key, []).append((best, min(dense) / times[best]))
    lines = []
    for (on, kind, samples), layers in grouped.items():
        counts = Counter(method for method, _ in layers).most_common()
        gains = [gain for _, gain in layers]
        ends = (times_faster(gain) for gain in (geometric_mean(gains), min(gains), max(gains)))
        lost = str(sum(gain < 1.0 for gain in gains))
        fastest = ", ".join(f"{method} {count}" for method, count in counts)
        lines.append((on, kind, str(samples) if samples else "the paper's", str(len(layers)), fastest, *ends, lost))
    columns = ("On", "Zeros", "Samples", "Layers", "Fastest of ours", "Mean gain", "Least", "Most", "Lost")
    caption = (
        "Gain: the time of the dense library (cuDNN, on CPUs torch's convolution) by that of the fastest of our sparse "
        "methods, at the same precision. Lost layers are run by the dense library in a converted network."
    )
    return Table("Which method, by zeros", columns, tuple(lines), caption)


def _band(network: str, layer: str) -> str:
    if (network, layer) not in LAYERS:
        return "-"
    low = 0.0
    for high in _BANDS:
        if LAYERS[network, layer].sparsity < high:
            break
        low = high
    return f"{low:.0%} to {high:.0%}" if low else f"below {high:.0%}"


def _devices_table(results: Mapping[str, Result]) -> Table:
    """A line per folder of results."""
    folders: dict[tuple[str, str], dict[str, Result]] = {}
    for name, result in results.items():
        folders.setdefault((name.partition("/")[0], device_of(result)), {})[name] = result
    lines = []
    for (folder, device), found in folders.items():
        headers = [result.header for result in found.values()]
        runs = [run for header in headers for run in runs_of(header)]
        dates = sorted({str(run["date"])[:10] for run in runs})
        commits = Counter(commit for result in found.values() for commit in commits_of(result))
        rows, failed = (
            sum(len(result.rows) for result in found.values()),
            sum(len(h.get("failed", ())) for h in headers),
        )
        kinds = ", ".join(dict.fromkeys(_kind(name) for name in found))
        period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        lines.append((folder, device, kinds, str(len(found)), str(rows), str(failed), period, _counted(commits)))
    columns = ("Folder", "Device", "What", "Files", "Rows", "Failed items", "Dates", "Commits (files)")
    return Table("What was measured, by device", columns, tuple(lines))


def _counted(commits: Counter[str]) -> str:
    """The commits, that of most files first; of several each with its number of files."""
    counts = commits.most_common()
    return ", ".join(f"{commit} ({files})" for commit, files in counts) if len(counts) > 1 else "".join(commits)


def _kind(name: str) -> str:
    """What a file is about: its stem, or the network that it is named after."""
    return name.rpartition("/")[2].removesuffix("-random-0.90").removesuffix("-random-0.95")


def _gains_plot(result: Result) -> Figure:
    """Gains over the fastest dense engine by the share of zeros, a line per network."""
    curves = {network: points_of(curve, "escort") for (network, _, _), curve in by_sparsity(result.rows).items()}
    shares = sorted({share for points in curves.values() for share, _, _ in points})
    series = {}
    for network, points in curves.items():
        gains = {share: theirs / ours for share, ours, theirs in points}
        name = f"{NETWORKS.get(network, network)}, pays {_from(break_even(points), shares)}"
        series[name] = [gains.get(share, math.nan) for share in shares]
    heading, axis = f"Gain by zeros, {where(result, strict=True)}", "Zeros in all convolutions but the first, percent"
    gain = "Times as fast as the best dense"
    return line_chart(heading, [100 * share for share in shares], series, axis, gain, mark=1.0)


def _from(share: float, shares: Sequence[float]) -> str:
    if share == math.inf:
        return f"above {max(shares):.0%}"
    return f"from below {min(shares):.0%}" if share == -math.inf else f"from {share:.0%}"


def _times_plot(place: str, races: Sequence[_Race]) -> Figure:
    """Milliseconds of one image by engine, a group of bars per network."""
    engines = [engine for engine in methods_in(race.times for race in races) if engine != "cap"]
    names = [f"{NETWORKS.get(race.network, race.network)} {race.weights}, N={race.batch}" for race in races]
    series = {
        engine: [race.times[engine] / race.batch / 1e3 if engine in race.times else None for race in races]
        for engine in engines
    }
    return horizontal_bars(f"Time per image, {place}", names, series, "Milliseconds per image")
