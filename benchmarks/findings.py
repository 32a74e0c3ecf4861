"""What the rows of a study say, in numbers: sums and aims, where two methods break even, what a change costs, how well
the model of generated kernels predicts.

Everything is computed from result files, which :mod:`benchmarks.study` writes; nothing is measured here. A method
always counts with its fastest configuration. :mod:`benchmarks.exhibits` shows it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from functools import cache, lru_cache, partial
from statistics import median
from typing import Any

from benchmarks import suite
from benchmarks.paper_layers import PAPER_LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import Layer, Row
from escort.cuda.gpu import H200, Gpu
from escort.filter import SparseFilter
from escort.methods.cuda.direct.search import candidates as direct_candidates
from escort.methods.cuda.generated import Generated, predict_us
from escort.methods.cuda.generated.search import candidates as generated_candidates
from escort.methods.cuda.generated.steps import GeneratedConfig
from escort.methods.cuda.sparse_tc import SparseTc
from escort.methods.cuda.sparse_tc.model import Remainder
from escort.methods.cuda.sparse_tc.model import predict_us as predict_sparse_tc_us
from escort.methods.cuda.sparse_tc.orders import order_filter
from escort.methods.cuda.sparse_tc.search import search as search_sparse_tc
from escort.methods.cuda.sparse_tc.tiling import Tiling
from escort.problem import MemoryFormat, Precision, Problem

#: The paper's layers by network and name.
LAYERS = {(entry.network, entry.layer): entry for entry in PAPER_LAYERS}
#: The paper's method, which its questions compare with all rivals.
OURS = "direct"
#: Our methods that multiply outside of the tensor cores, and all our sparse ones; the others are rivals.
ON_FMA = (OURS, Generated.name)
SPARSE = (*ON_FMA, SparseTc.name)
#: GPUs that the methods' models know, as results name them.
GPUS = {"NVIDIA H200": H200}
#: Their TFLOP/s of multiply-adds outside of the tensor cores, by precision: NVIDIA's data sheet gives 67 in fp32, which
#: is 2 flop * 128 lanes * 132 multiprocessors * 1.98 GHz, and packed fp16 does two multiply-adds per lane.
PEAK_TFLOPS = {"NVIDIA H200": {"fp32": 67.0, "fp16": 134.0}}


@dataclass(frozen=True)
class Aim:
    """A least ratio of total times, ``rival / direct``, over the layers of a network at the paper's batch.

    Attributes:
        least: by network.
        config: what tells the rival's configurations that are meant from its other ones; by default its fastest counts.
        least_sparsity: only layers with at least this share of zeros count.
        paper: the speedup that the paper reports over all networks, None where it does not compare.
    """

    against: str
    rival: str
    dtype: str
    least: Mapping[str, float]
    config: Mapping[str, Any] = field(default_factory=dict)
    least_sparsity: float = 0.0
    paper: float | None = None

    def meant(self, row: Row) -> bool:
        """Whether the row counts."""
        return row.method != self.rival or self.config.items() <= row.config.items()


#: Lowering as torch alone does it: im2col image by image, then one product per group of the filter.
_PLAIN_CUBLAS = {"unfold": "by_image", "product": "by_group"}
_PLAIN_CUSPARSE = {"unfold": "by_image"}
AIMS = (
    Aim("cuBLAS lowering", "cublas", "fp32", {"caffenet": 5, "googlenet": 7, "resnet50": 8}, _PLAIN_CUBLAS, paper=2.63),
    Aim(
        "cuSPARSE lowering",
        "cusparse",
        "fp32",
        {"caffenet": 5, "googlenet": 8, "resnet50": 8},
        _PLAIN_CUSPARSE,
        paper=3.07,
    ),
    Aim("cuDNN strict fp32", "cudnn", "fp32", {"caffenet": 1.2, "googlenet": 1.5, "resnet50": 4}),
    Aim("cuDNN, layers of at least 96 %", "cudnn", "fp16", {"googlenet": 1.4, "resnet50": 1.4}, least_sparsity=0.96),
)


@dataclass(frozen=True)
class SparseAim:
    """What the faster of our sparse methods is to gain over cuDNN at the same precision.

    Attributes:
        wanted: by network a floor and a goal for the geometric mean, over its layers at the paper's batch, of
            ``cudnn / fastest sparse method``; "all" for the layers of all networks.
        sparsities: only layers with shares of zeros from the first to the second count.
    """

    against: str
    dtype: str
    wanted: Mapping[str, tuple[float, float]]
    sparsities: tuple[float, float] = (0.0, 1.0)


SPARSE_AIMS = (
    SparseAim("cuDNN strict fp32", "fp32", {"caffenet": (2.5, 5), "googlenet": (3.5, 6), "resnet50": (6.5, 10)}),
    SparseAim("cuDNN TF32", "tf32", {"caffenet": (0.9, 1.5), "googlenet": (1, 1.5), "resnet50": (1.3, 1.8)}),
    SparseAim("cuDNN fp16", "fp16", {"caffenet": (0.9, 1.5), "googlenet": (1, 1.5), "resnet50": (1.25, 2)}),
    SparseAim("cuDNN fp16, layers of 75 to 92 %", "fp16", {"all": (1.2, 1.6)}, (0.75, 0.92)),
    SparseAim("cuDNN TF32, layers of 75 to 92 %", "tf32", {"all": (1.2, 1.6)}, (0.75, 0.92)),
)


@dataclass(frozen=True)
class PatternAim:
    """As :class:`SparseAim`, on layers that were really pruned.

    Attributes:
        weights: the stem of the pattern file.
        kind: which layers, for readers.
        layers: globs of their names.
        count: how many there are.
        batch: images.
        wanted: by precision a floor and a goal.
    """

    weights: str
    kind: str
    layers: tuple[str, ...]
    count: int
    batch: int
    wanted: Mapping[str, tuple[float, float]]

    def meant(self, row: Row) -> bool:
        """Whether the row counts."""
        named = any(fnmatch(row.layer, pattern) for pattern in self.layers)
        return named and (row.weights, row.batch) == (self.weights, self.batch)


#: Names of the layers of a ResNet-50 but its first, in the pattern files.
_BUT_THE_FIRST = ("module*", "conv2d_[!0]*")
PATTERN_AIMS = (
    PatternAim(
        "resnet50_magnitude_90",
        "3x3",
        ("*_conv2d_2", "*_module3_1_conv2d_0"),
        16,
        128,
        {"fp32": (2.5, 4), "tf32": (0.8, 1.3), "fp16": (0.7, 1.2)},
    ),
    *(
        PatternAim(
            "resnet50_magnitude_90", "3x3 and 1x1", _BUT_THE_FIRST, 52, batch, {"tf32": (1.2, 1.6), "fp16": (1.2, 1.6)}
        )
        for batch in (32, 128)
    ),
    PatternAim(
        "resnet50_magnitude_95",
        "3x3 and 1x1",
        _BUT_THE_FIRST,
        52,
        128,
        {"fp32": (3.5, 6), "tf32": (1.2, 1.8), "fp16": (1, 1.6)},
    ),
)


@dataclass(frozen=True)
class Total:
    """Times in microseconds summed over a network's layers, of the methods that ran all of them.

    Attributes:
        layers: how many were measured.
        published: how many the paper has of this kind.
    """

    network: str
    batch: int
    layers: int
    published: int
    times: Mapping[str, float]

    def ratio(self, rival: str) -> float | None:
        """How many times faster direct is; None where one of the two did not run all layers."""
        ours, theirs = self.times.get(OURS), self.times.get(rival)
        return theirs / ours if ours and theirs else None


def totals(rows: Iterable[Row], least_sparsity: float = 0.0) -> list[Total]:
    """Sums over the paper's layers per network and batch, of rows of one precision.

    Args:
        least_sparsity: only layers with at least this published share of zeros.
    """
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for (network, layer, batch), times in suite.best_times(rows).items():
        if (network, layer) in LAYERS and LAYERS[network, layer].sparsity >= least_sparsity:
            found.setdefault((network, batch), []).append(times)
    sums = []
    for (network, batch), layers in found.items():
        everywhere = [method for method in methods_in(layers) if all(method in times for times in layers)]
        published = sum(e.network == network and e.sparsity >= least_sparsity for e in PAPER_LAYERS)
        times = {method: math.fsum(times[method] for times in layers) for method in everywhere}
        sums.append(Total(network, batch, len(layers), published, times))
    return sums


def complete(sums: Iterable[Total]) -> dict[str, Total]:
    """By network those of all its layers at the paper's batch."""
    batches = {entry.network: entry.batch for entry in PAPER_LAYERS}
    return {
        total.network: total
        for total in sums
        if total.layers == total.published and total.batch == batches[total.network]
    }


def flop(network: str, layer: str, batch: int) -> int:
    """The real work of one of the paper's layers: a multiplication and an addition per nonzero and output position."""
    entry = LAYERS[network, layer]
    problem = entry.problem(batch)
    nnz = round((1.0 - entry.sparsity) * math.prod(problem.weight_shape))
    return 2 * nnz * batch * problem.out_height * problem.out_width


@dataclass(frozen=True)
class Fastest:
    """A layer with the faster of our sparse methods; times in microseconds.

    Attributes:
        cudnn_us: None where cuDNN was not timed.
    """

    network: str
    layer: str
    batch: int
    method: str
    time_us: float
    cudnn_us: float | None

    @property
    def speedup(self) -> float | None:
        """How many times faster than cuDNN."""
        return None if self.cudnn_us is None else self.cudnn_us / self.time_us

    def share(self, peak_tflops: float) -> float:
        """The real work per time, of that peak; for the paper's layers."""
        return flop(self.network, self.layer, self.batch) / (self.time_us * 1e6 * peak_tflops)


def fastest_sparse(rows: Iterable[Row], methods: Sequence[str] = SPARSE) -> list[Fastest]:
    """The layers that one of these methods ran, of rows of one precision and with the same weights."""
    found = []
    for (network, layer, batch), times in suite.best_times(rows).items():
        ours = [method for method in methods if method in times]
        if ours:
            method = min(ours, key=times.__getitem__)
            found.append(Fastest(network, layer, batch, method, times[method], times.get("cudnn")))
    return found


def against_cudnn(
    rows: Iterable[Row], network: str, sparsities: tuple[float, float] = (0.0, 1.0)
) -> list[tuple[float, float]]:
    """The times of cuDNN and of the fastest sparse method, in microseconds, on layers at the paper's batch.

    Nothing where one of the two did not run all of them.

    Args:
        network: whose layers; "all" for those of all networks.
        sparsities: shares of zeros, from the first to the second.
    """
    published = {
        (entry.network, entry.layer, entry.batch)
        for entry in PAPER_LAYERS
        if network in (entry.network, "all") and sparsities[0] <= entry.sparsity <= sparsities[1]
    }
    found = [
        (f.cudnn_us, f.time_us)
        for f in fastest_sparse(rows)
        if (f.network, f.layer, f.batch) in published and f.cudnn_us is not None
    ]
    return found if len(found) == len(published) else []


def against_cudnn_on_patterns(rows: Iterable[Row], aim: PatternAim) -> list[tuple[float, float]]:
    """As :func:`against_cudnn`, on the layers of an aim."""
    mine = fastest_sparse(row for row in rows if aim.meant(row))
    found = [(f.cudnn_us, f.time_us) for f in mine if f.cudnn_us is not None]
    return found if len(found) == aim.count else []


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
    gpu = GPUS.get(result.header.get("gpu", ""))
    if gpu is None:
        return []
    layers = _paper_layers(result.header.get("study", {}).get("seed", 0))
    names = [f.name for f in fields(GeneratedConfig)]
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for row in result.rows:
        if row.method == Generated.name and (row.network, row.layer) in layers:
            layer = layers[row.network, row.layer]
            config = GeneratedConfig(**{name: row.config[name] for name in names if name in row.config})
            problem = replace(layer.problem, batch=row.batch, precision=row.dtype)  # type: ignore[arg-type]
            predicted = predict_us(problem, layer.filter, config, gpu)
            found.setdefault((row.network, row.layer, row.batch), []).append((predicted, row.time_us))
    return [Predicted(tuple(timings)) for timings in found.values()]


@cache
def _paper_layers(seed: int) -> dict[tuple[str, str], Layer]:
    return {(layer.network, layer.name): layer for layer in suite.paper_layers(None, seed)}


def break_even(points: Sequence[tuple[float, float, float]]) -> float:
    """The share of zeros from which we stay faster, as (sparsity, our time, their time) say, in any order.

    Between two of them the logarithm of the ratio is taken as linear. Returns -inf where we are faster at all of them,
    and inf where we are not at the sparsest.
    """
    if not points:
        raise ValueError("no times, no break-even")
    gains = [(sparsity, math.log(theirs / ours)) for sparsity, ours, theirs in sorted(points)]
    slower = [index for index, (_, gain) in enumerate(gains) if gain <= 0.0]
    if not slower:
        return -math.inf
    if slower[-1] == len(gains) - 1:
        return math.inf
    (left, loss), (right, gain) = gains[slower[-1] : slower[-1] + 2]
    return left + (right - left) * loss / (loss - gain)


#: Shares of zeros, rising, at which the methods' models are asked where a method begins to pay.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
#: What forecasts are made of: by network and name some of the paper's layers, one per kind of shape, and two pointwise
#: ones of the pattern files, whose rows do not tell their shapes.
SHAPES: dict[tuple[str, str], Problem] = {
    (network, layer): LAYERS[network, layer].problem(LAYERS[network, layer].batch)
    for network, layer in (
        ("resnet50", "res2b_branch2b"),
        ("resnet50", "res3b_branch2b"),
        ("resnet50", "res4b_branch2b"),
        ("resnet50", "res5b_branch2b"),
        ("googlenet", "conv2/3x3"),
        ("googlenet", "inception_3b/5x5"),
        ("googlenet", "inception_4e/3x3"),
    )
} | {
    ("resnet50", "module9_1_module0_1_conv2d_4"): Problem(128, 256, 14, 14, 1024, (1, 1)),
    ("resnet50", "module9_1_module0_1_conv2d_0"): Problem(128, 1024, 14, 14, 256, (1, 1)),
}
#: The least that a method's model predicts: microseconds, and of direct clocks.
Model = Callable[[Problem, SparseFilter, Gpu], float]


@dataclass(frozen=True)
class Forecast:
    """From which share of zeros on methods are faster than cuDNN, as their models say; nothing of theirs was timed.

    Attributes:
        layout: "NCHW" on both ends, or "any": tensors lie as suits each method best, and nothing is converted.
        cudnn_us: measured, microseconds.
        least: by method a share as :func:`break_even` gives it, within :data:`SHARES`.
    """

    problem: Problem
    layout: str
    cudnn_us: float
    least: Mapping[str, float]


def forecasts(results: Mapping[str, Result], dtype: Precision) -> list[Forecast]:
    """Of those of :data:`SHAPES` that cuDNN was timed on, with nonzeros at random positions.

    None on GPUs that the models do not know.

    Args:
        results: by the stems of their files, ``layers-fp16`` and the like.
    """
    units = dict.fromkeys(ON_FMA if dtype == "fp32" else SPARSE, 1.0)
    rates = direct_mhz(results[f"layers-{dtype}"], dtype) if f"layers-{dtype}" in results else []
    if rates:
        units[OURS] = median(rates)
    else:
        del units[OURS]
    found = []
    for result in (results[stem] for stem in (f"layers-{dtype}", f"patterns-{dtype}") if stem in results):
        gpu, seed = GPUS.get(result.header.get("gpu", "")), result.header.get("study", {}).get("seed", 0)
        for (problem, layout), cudnn_us in _cudnn_us(result.rows, dtype).items():
            if gpu is not None:
                least = {}
                for method, unit in units.items():
                    models = MODELS[method] if layout == "any" else MODELS[method][:1]
                    least[method] = _least_share(models, problem, seed, gpu, cudnn_us * unit)
                found.append(Forecast(problem, layout, cudnn_us, least))
    return found


def _cudnn_us(rows: Iterable[Row], dtype: Precision) -> dict[tuple[Problem, str], float]:
    """Its least time by shape and layout, that of any layout where it is less than in NCHW."""
    found: dict[tuple[Problem, str], float] = {}
    for row in rows:
        shape = SHAPES.get((row.network, row.layer))
        if row.method == "cudnn" and shape is not None and row.batch == shape.batch:
            for layout in ("any",) if row.config.get("output") == "as_is" else ("NCHW", "any"):
                key = replace(shape, precision=dtype), layout
                found[key] = min(row.time_us, found.get(key, math.inf))
    return {key: us for key, us in found.items() if key[1] == "NCHW" or us < found.get((key[0], "NCHW"), math.inf)}


def _least_share(models: Sequence[Model], problem: Problem, seed: int, gpu: Gpu, limit: float) -> float:
    """The share of zeros from which one of the models predicts less than a limit; by bisection, as more take less."""

    def predicted(sparsity: float) -> float:
        return min(_predicted(model, problem, sparsity, seed, gpu) for model in models)

    first = bisect_left(SHARES, True, key=lambda sparsity: predicted(sparsity) < limit)
    around = SHARES[max(first - 1, 0) : first + 1]
    return break_even([(sparsity, predicted(sparsity), limit) for sparsity in around])


@cache
def _predicted(model: Model, problem: Problem, sparsity: float, seed: int, gpu: Gpu) -> float:
    return model(problem, _random_filter(problem, sparsity, seed), gpu)


_random_filter = lru_cache(maxsize=len(SHARES))(suite.random_filter)


def direct_mhz(result: Result, dtype: Precision) -> list[float]:
    """The clocks that direct's model predicts for the paper's layers, by their measured time: megahertz.

    None on GPUs that the model does not know.
    """
    gpu, seed = GPUS.get(result.header.get("gpu", "")), result.header.get("study", {}).get("seed", 0)
    return [
        _clocks_of_layer(network, layer, batch, dtype, seed, gpu) / times[OURS]
        for (network, layer, batch), times in suite.best_times(result.rows).items()
        if gpu and OURS in times and (network, layer) in LAYERS
    ]


@cache
def _clocks_of_layer(network: str, layer: str, batch: int, dtype: Precision, seed: int, gpu: Gpu) -> float:
    measured = _paper_layers(seed)[network, layer]
    return _direct_clocks(replace(measured.problem, batch=batch, precision=dtype), measured.filter, gpu)


def _direct_clocks(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu) -> float:
    return float(direct_candidates(problem, sparse_filter, gpu, packed=problem.precision == "fp16")["clocks"].min())


def _generated_us(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu) -> float:
    return min(
        float(predict_us(problem, sparse_filter, many, gpu).min())
        for many in generated_candidates(problem, sparse_filter, gpu)
    )


def _sparse_tc_us(problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, layout: MemoryFormat) -> float:
    (config,) = search_sparse_tc(problem, sparse_filter, gpu, 1, layout)
    tiling = Tiling.of(problem, config, gpu.shared_bytes)
    return predict_sparse_tc_us(tiling, Remainder.of(order_filter(sparse_filter, layout, tiling.element)), gpu)


#: The models by method: of tensors in NCHW first, then of those that lie otherwise.
MODELS: dict[str, tuple[Model, ...]] = {
    OURS: (_direct_clocks,),
    Generated.name: (_generated_us,),
    SparseTc.name: tuple(partial(_sparse_tc_us, layout=layout) for layout in ("contiguous", "channels_last")),
}


@dataclass(frozen=True)
class Change:
    """One field of a layer's chosen configuration set to another value, and what that costs."""

    network: str
    layer: str
    field: str
    chosen: str
    value: str
    time_us: float
    cost: float


def changes_of(rows: Iterable[Row]) -> list[Change]:
    """A layer's first row is the chosen configuration, the others are changes of it."""
    chosen: dict[tuple[str, str], Row] = {}
    changes = []
    for row in rows:
        base = chosen.setdefault((row.network, row.layer), row)
        fields = [name for name, value in row.config.items() if value != base.config.get(name)]
        if fields:
            before, after = (
                ", ".join(str(config.get(name)) for name in fields) for config in (base.config, row.config)
            )
            cost = row.time_us / base.time_us
            changes.append(Change(row.network, row.layer, " and ".join(fields), before, after, row.time_us, cost))
    return changes


def by_sparsity(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[float, dict[str, float]]]:
    """(network, layer, batch) to sparsity, rising, to each method's best time in microseconds."""
    found: dict[tuple[str, str, int], dict[float, dict[str, float]]] = {}
    for row in rows:
        times = found.setdefault((row.network, row.layer, row.batch), {}).setdefault(sparsity_of(row.weights), {})
        times[row.method] = min(row.time_us, times.get(row.method, math.inf))
    return {key: dict(sorted(curve.items())) for key, curve in found.items()}


def points(curve: Mapping[float, Mapping[str, float]], ours: str) -> list[tuple[float, float, float]]:
    """A curve of :func:`by_sparsity` as :func:`break_even` takes it: one method against the fastest of all others."""
    return [
        (sparsity, times[ours], min(time for method, time in times.items() if method != ours))
        for sparsity, times in curve.items()
        if ours in times and len(times) > 1
    ]


def random_weights(sparsity: float) -> str:
    """What rows call weights at random positions with this share of zeros."""
    return f"random-{sparsity:.2f}"


def sparsity_of(weights: str) -> float:
    """The share of zeros in :func:`random_weights`."""
    return float(weights.removeprefix("random-"))


def methods_in(times: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(method for found in times for method in found))


def rivals_in(times: Iterable[Mapping[str, float]]) -> list[str]:
    """The methods that are not our sparse ones."""
    return [method for method in methods_in(times) if method not in SPARSE]
