"""Single layers: the paper's, and those of pattern files, with every method's configurations raced on them."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.paper_layers import PAPER_LAYERS
from benchmarks.suite.rows import Row, check, leave_out
from escort import reference
from escort.filter import IntArray, SparseFilter
from escort.methods import Method, Runner, for_device
from escort.planner import timing as bench
from escort.planner.timing import Timing
from escort.problem import TORCH_MEMORY_FORMAT, Precision, Problem

#: An error within so many times a precision's bound is rounding; what exceeds even that is wrong.
_ROUNDING = 10.0


@dataclass(frozen=True)
class Layer:
    """One convolution to be measured: what is asked, and the pruned filter.

    Attributes:
        weights: where the filter comes from: ``paper`` or the stem of a pattern file.
    """

    network: str
    weights: str
    name: str
    problem: Problem
    filter: SparseFilter


def paper_layers(batch: int | None, seed: int = 0, *, dtype: Precision = "fp32", device: str = "cpu") -> list[Layer]:
    """The paper's 39 layers with nonzeros at random positions, as many as were published.

    Args:
        batch: images; None for as many as the paper took for each network.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for entry in PAPER_LAYERS:
        problem = replace(entry.problem(batch or entry.batch), precision=dtype, device=device)
        rows, width = problem.out_channels, math.prod(problem.weight_shape[1:])
        nnz = round((1.0 - entry.sparsity) * rows * width)
        positions = np.sort(rng.choice(rows * width, nnz, replace=False))
        row, columns = np.divmod(positions, width)
        indptr = np.searchsorted(row, np.arange(rows + 1))
        sparse_filter = _filter(problem, indptr, columns, rng.standard_normal(nnz))
        layers.append(Layer(entry.network, "paper", entry.layer, problem, sparse_filter))
    return layers


def pattern_layers(
    path: Path, batch: int | None, seed: int = 0, *, dtype: Precision = "fp32", device: str = "cpu"
) -> list[Layer]:
    """The layers of a pattern file, in its order.

    The file is an .npz with, per layer, ``<layer>.shape`` (height, width, in channels, out channels, kernel, padding,
    stride, groups), ``<layer>.indptr`` and ``<layer>.indices``, the CSR matrix of the nonzeros with column
    ``(c * R + r) * S + s``, and perhaps ``<layer>.values``; without, values are random. The network's name is
    the file's up to the first underscore.

    Args:
        batch: images; None for as many as the paper took for a network of that name.

    Raises:
        ValueError, FileNotFoundError: naming the file, the layer and what is wrong.
    """
    rng = np.random.default_rng(seed)
    arrays = _read_arrays(path)
    network = path.stem.split("_")[0]
    if batch is None:
        batches = {entry.network: entry.batch for entry in PAPER_LAYERS}
        if network not in batches:
            raise ValueError(f"{path}: the paper knows no {network}, only {', '.join(batches)}; choose a batch size")
        batch = batches[network]
    names = [key.removesuffix(".shape") for key in arrays if key.endswith(".shape")]
    if not names:
        raise ValueError(f"{path} holds no layer: each needs <layer>.shape, <layer>.indptr and <layer>.indices")
    layers = []
    for name in names:
        try:
            shape = _integers(arrays, f"{name}.shape")
            if len(shape) != 8:
                raise ValueError(
                    f"shape holds 8 numbers (H, W, in, out, kernel, pad, stride, groups), got {len(shape)}"
                )
            height, width, in_channels, out_channels, kernel, padding, stride, groups = (int(size) for size in shape)
            problem = Problem(
                batch,
                in_channels,
                height,
                width,
                out_channels,
                (kernel, kernel),
                (stride, stride),
                (padding,) * 4,
                groups=groups,
                precision=dtype,
                device=device,
            )
            indptr, columns = (_integers(arrays, f"{name}.{part}") for part in ("indptr", "indices"))
            values = arrays.get(f"{name}.values")
            sparse_filter = _filter(
                problem, indptr, columns, rng.standard_normal(len(columns)) if values is None else values
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, layer {name}: {error}") from error
        layers.append(Layer(network, path.stem, name, problem, sparse_filter))
    return layers


def random_filter(problem: Problem, sparsity: float, seed: int) -> SparseFilter:
    """A filter for the problem with this share of zeros, at random positions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(problem.weight_shape, generator=generator)
    zeros = torch.randperm(weight.numel(), generator=generator)[: round(sparsity * weight.numel())]
    weight.view(-1)[zeros] = 0.0
    return SparseFilter.from_dense(weight, problem.groups)


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; name an .npz of sparsity patterns")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz of plain arrays, or damaged: {error}") from error


def _integers(arrays: dict[str, NDArray[Any]], key: str) -> IntArray:
    if key not in arrays:
        raise ValueError(f"{key} is missing")
    array = arrays[key]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{key} is a vector of integers, got {array.dtype} of shape {array.shape}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{key} holds {array.min()}..{array.max()}; 0..{np.iinfo(np.int32).max} is possible")
    return array.astype(np.int32)


def _filter(problem: Problem, indptr: NDArray[Any], columns: NDArray[Any], values: NDArray[Any]) -> SparseFilter:
    parts = indptr.astype(np.int32), columns.astype(np.int32), values.astype(np.float32)
    return SparseFilter(problem.weight_shape, problem.groups, *parts)


def measure_layer(
    layer: Layer,
    *,
    methods: Sequence[Method] | None = None,
    seed: int = 0,
    rounds: int = 9,
    budget_s: float = 2.0,
) -> list[Row]:
    """Every configuration of every method that takes the problem, raced on random inputs.

    On a GPU a configuration that the device refuses, that does not fit its memory or that rounds more than its
    precision allows is left out with a warning.

    Args:
        methods: by default all of the problem's device.

    Raises:
        RuntimeError: where one computes something else than the reference; nothing is timed then.
    """
    problem = layer.problem
    with torch.inference_mode():
        inputs = [x for x, _ in bench.example_inputs(problem, seed=seed)]
        entrants = list(_entrants(layer, for_device(problem.device) if methods is None else methods, inputs[0]))
        runs = [[partial(run, as_taken(m, config, x)) for x in inputs] for m, config, run, _ in entrants]
        timings = _race_layer(problem, runs, rounds, budget_s)
    about = layer.network, layer.weights, layer.name, problem.batch, problem.precision
    rows = []
    for (method, config, _, error), timing in zip(entrants, timings, strict=True):
        if timing.time_us is None:
            leave_out(_name(layer, method.name, config), timing.reason)
            continue
        options = asdict(config) | ({"timer": "events"} if timing.timer == "events" else {})
        rows.append(Row(*about, method.name, options, round(timing.time_us, 2), error))
    return rows


def _entrants(layer: Layer, methods: Sequence[Method], x: Tensor) -> Iterator[tuple[Method, Any, Runner, float]]:
    """Method, config, runner and relative error of all that compute the layer, as :func:`measure_layer` says."""
    problem, on_gpu = layer.problem, layer.problem.device_type == "cuda"
    expected = reference.conv2d(problem, x, layer.filter.to_dense())
    bound = reference.ERROR_BOUND[problem.precision]
    for method in methods:
        if method.unsupported(problem) is not None:
            continue
        for config in (*method.configs(problem, layer.filter), *method.benchmark_configs(problem, layer.filter)):
            what = _name(layer, method.name, config)
            try:
                run = method.prepare(problem, layer.filter, None, config).run
                out = run(as_taken(method, config, x))
            except (RuntimeError, ValueError) as failure:
                if not on_gpu:
                    raise
                leave_out(what, bench.survived(failure))
                continue
            error = reference.compare(out, expected)
            if on_gpu and bound < error <= _ROUNDING * bound:
                leave_out(what, f"relative error {error:.1e} exceeds {bound:.0e}")
                continue
            check(error, bound, what)
            yield method, config, run, error


def as_taken(method: Method, config: Any, x: Tensor) -> Tensor:
    """x in the memory format in which a config takes it without conversion."""
    return x.contiguous(memory_format=TORCH_MEMORY_FORMAT[method.input_format(config)])


def _name(layer: Layer, method: str, config: Any) -> str:
    return f"{layer.network} {layer.name}, {method} {asdict(config)}"


def _race_layer(
    problem: Problem, runs: Sequence[Sequence[Callable[[], object]]], rounds: int, budget_s: float
) -> list[Timing]:
    if problem.device_type == "cpu":
        return [
            Timing(time, "calls") for time in bench.race([run for (run,) in runs], rounds=rounds, budget_s=budget_s)
        ]
    return bench.race_on_gpu(runs, problem.device, rounds=rounds, budget_s=budget_s)
