"""Benchmark suites: the paper's layers, real patterns and whole networks, each raced against its rivals in one run.

A rival is timed only after its output was compared with a float64 reference, and every one that was timed is a row.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from escort import bench, prune, reference
from escort.bench import Machine, Timing
from escort.convert import NETWORK_ERROR_BOUND, convert
from escort.methods import Method, Runner, for_device
from escort.methods.base import as_taken, benchmark_configs, float32_convolutions, float32_products
from escort.paper_layers import PAPER_LAYERS
from escort.problem import Precision, Problem
from escort.sparse import IntArray, StretchedCSR

#: The `layer` of a row that is about a whole network.
WHOLE = "all"
#: The rivals that :func:`measure_network` knows besides eager torch, by type of device.
RIVALS = {"cpu": ("onnxruntime",), "cuda": ("graph", "compile")}

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
    filter: StretchedCSR


@dataclass(frozen=True)
class Row:
    """One timed way to run a layer or a network; the fields of a result file.

    Attributes:
        time_us: median time of a call.
        rel_error: ``||out - ref|| / ||ref||`` against float64, checked before timing.
    """

    network: str
    weights: str
    layer: str
    batch: int
    dtype: str
    method: str
    config: dict[str, Any]
    time_us: float
    rel_error: float


def paper_layers(batch: int | None, seed: int = 0, *, dtype: Precision = "fp32", device: str = "cpu") -> list[Layer]:
    """The paper's 39 layers with nonzeros at random positions, as many as were published.

    Args:
        batch: images; None for as many as the paper took for each network.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for entry in PAPER_LAYERS:
        problem = replace(entry.problem(batch or entry.batch), dtype=dtype, device=device)
        rows, width = problem.out_channels, math.prod(problem.weight_shape[1:])
        nnz = round((1.0 - entry.sparsity) * rows * width)
        positions = np.sort(rng.choice(rows * width, nnz, replace=False))
        row, columns = np.divmod(positions, width)
        indptr = np.searchsorted(row, np.arange(rows + 1))
        filter = _filter(problem, indptr, columns, rng.standard_normal(nnz))
        layers.append(Layer(entry.network, "paper", entry.layer, problem, filter))
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
                dtype=dtype,
                device=device,
            )
            indptr, columns = (_integers(arrays, f"{name}.{part}") for part in ("indptr", "indices"))
            values = arrays.get(f"{name}.values")
            filter = _filter(problem, indptr, columns, rng.standard_normal(len(columns)) if values is None else values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, layer {name}: {error}") from error
        layers.append(Layer(network, path.stem, name, problem, filter))
    return layers


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


def _filter(problem: Problem, indptr: NDArray[Any], columns: NDArray[Any], values: NDArray[Any]) -> StretchedCSR:
    parts = indptr.astype(np.int32), columns.astype(np.int32), values.astype(np.float32)
    return StretchedCSR(problem.weight_shape, problem.groups, *parts)


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
        runs = [[partial(run, as_taken(config, x)) for x in inputs] for _, config, run, _ in entrants]
        timings = _race_layer(problem, runs, rounds, budget_s)
    about = layer.network, layer.weights, layer.name, problem.batch, problem.dtype
    rows = []
    for (method, config, _, error), timing in zip(entrants, timings, strict=True):
        if timing.time_us is None:
            _leave_out(_name(layer, method, config), timing.reason)
            continue
        options = asdict(config) | ({"timer": "events"} if timing.timer == "events" else {})
        rows.append(Row(*about, method, options, round(timing.time_us, 2), error))
    return rows


def _entrants(layer: Layer, methods: Sequence[Method], x: Tensor) -> Iterator[tuple[str, Any, Runner, float]]:
    """Method, config, runner and relative error of all that compute the layer, as :func:`measure_layer` says."""
    problem, on_gpu = layer.problem, layer.problem.device_type == "cuda"
    expected = reference.conv2d(problem, x, layer.filter.to_dense())
    bound = reference.ERROR_BOUND[problem.dtype]
    for method in methods:
        if method.unsupported(problem) is not None:
            continue
        for config in benchmark_configs(method, problem, layer.filter):
            what = _name(layer, method.name, config)
            try:
                run = method.prepare(problem, layer.filter, None, config)
                out = run(as_taken(config, x))
            except (RuntimeError, ValueError) as failure:
                if not on_gpu:
                    raise
                _leave_out(what, bench.survived(failure))
                continue
            error = reference.compare(out, expected)
            if on_gpu and bound < error <= _ROUNDING * bound:
                _leave_out(what, f"relative error {error:.1e} exceeds {bound:.0e}")
                continue
            _check(error, bound, what)
            yield method.name, config, run, error


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


def _leave_out(what: str, reason: str | None) -> None:
    warnings.warn(f"{what} is left out: {reason}", stacklevel=3)


@dataclass(frozen=True)
class _Way:
    """One way to run a network: the method and config of its row, and whether a CUDA graph is made of it."""

    method: str
    config: dict[str, Any]
    run: Callable[[], Tensor]
    captured: bool = False


def measure_network(
    model: nn.Module,
    x: Tensor,
    *,
    network: str,
    weights: str,
    against: Sequence[str] = (),
    precision: Precision = "fp32",
    rounds: int = 8,
    budget_s: float = 30.0,
    progress: bool = False,
) -> list[Row]:
    """The model converted, raced against itself in eager mode (both memory formats) and against other engines.

    On a GPU calls are timed as a user makes them, with the host's work; ``graph`` times the same in CUDA graphs, the
    converted network too, and ``compile`` what torch.compile makes of the model, in a graph. What cannot be timed so
    is left out with a warning.

    Args:
        model: dense modules in eval mode, on the device of x; the zeros are already in its weights.
        x: (N, C, H, W), what all run on.
        network, weights: for the rows.
        against: some of the device's :data:`RIVALS`; onnxruntime gets as many threads as torch has.
        precision: of all; fp32 is strict.
        progress: show a progress bar while converting.

    Raises:
        RuntimeError: where one computes something else than the model in float64; nothing is timed then.
        ImportError: if an engine to run against is not installed.
    """
    unknown = set(against) - set(RIVALS[x.device.type])
    if unknown:
        there = ", ".join(RIVALS[x.device.type])
        raise ValueError(f"there is no rival {', '.join(sorted(unknown))}; there are {there}")
    engines = [_onnxruntime(model, x) for name in against if name == "onnxruntime"]  # first: it may not be installed
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x.double())
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    converted = convert(model, x, precision=precision, progress=progress)
    choice = {"kept_dense": converted.plan.kept_dense, "images": converted.plan.images}
    threads = {"intra_op_num_threads": torch.get_num_threads()}
    ways = [
        _Way("escort", choice, lambda: converted(x)),
        _Way("eager", {"memory_format": "contiguous"}, lambda: model(x)),
        _Way("eager", {"memory_format": "channels_last"}, lambda: channels_last(x_last)),
        *(_Way("onnxruntime", threads, run) for run in engines),
    ]
    if "graph" in against:
        ways += [replace(way, method=way.method.replace("eager", "graph"), captured=True) for way in ways]
    bound = NETWORK_ERROR_BOUND[precision]
    with torch.inference_mode(), dense_at_its_best(precision):
        if "compile" in against:
            compiled = torch.compile(channels_last, dynamic=False)
            way = _Way("compile", {"memory_format": "channels_last"}, lambda: compiled(x_last), captured=True)
            try:
                way.run()
                ways.append(way)
            except Exception as failure:  # of many kinds: compilers may be missing, or fail
                _leave_out(f"{network} in compile", f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}")
        errors = [_checked(way.run(), expected, bound, f"{network} in {way.method}") for way in ways]
        timings = _race_network(ways, x.device, rounds, budget_s)
    rows = []
    for way, timing, error in zip(ways, timings, errors, strict=True):
        if timing.time_us is None or (way.captured and timing.timer != "graph"):
            _leave_out(f"{network} in {way.method} {way.config}", timing.reason)
            continue
        config = way.config | ({"graph": way.captured} if x.is_cuda else {})
        time_us = round(timing.time_us, 2)
        rows.append(Row(network, weights, WHOLE, len(x), precision, way.method, config, time_us, error))
    return rows


@contextmanager
def dense_at_its_best(precision: Precision) -> Iterator[None]:
    """Torch's own operators in the precision, and cuDNN's algorithms chosen by trying them."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with float32_products(precision), float32_convolutions(precision):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def _race_network(ways: Sequence[_Way], device: torch.device, rounds: int, budget_s: float) -> list[Timing]:
    if device.type == "cpu":
        times = bench.race([way.run for way in ways], rounds=rounds, burst=4, budget_s=budget_s)
        return [Timing(time_us, "calls") for time_us in times]
    timings: dict[int, Timing] = {}
    for captured in (False, True):
        group = [index for index, way in enumerate(ways) if way.captured is captured]
        runs = [ways[index].run for index in group]
        found = bench.race_on_gpu(runs, device, rounds=rounds, budget_s=budget_s, capture=captured)
        timings |= zip(group, found, strict=True)
    return [timings[index] for index in range(len(ways))]


def prune_all_but_first(model: nn.Module, sparsity: float) -> None:
    """Prunes every convolution but the first, which sees the image and has few weights, by magnitude and for good."""
    prune.uniform(model, sparsity, skip=next(iter(prune.convolutions(model))))
    prune.make_permanent(model)


def _onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install escort-sparse[bench]") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Rivals take turns: its threads must not go on spinning on the cores while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own future
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _checked(out: Tensor, expected: Tensor, bound: float, what: str) -> float:
    error = reference.compare(out, expected)
    _check(error, bound, what)
    return error


def _check(error: float, bound: float, what: str) -> None:
    if not error <= bound:
        raise RuntimeError(f"{what}: relative error {error:.1e} exceeds {bound:.0e}; please report it")


def best_times(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[str, float]]:
    """(network, layer, batch) to method to the time in microseconds of its fastest configuration."""
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        times = best.setdefault((row.network, row.layer, row.batch), {})
        times[row.method] = min(row.time_us, times.get(row.method, math.inf))
    return best


def geometric_means(rows: Iterable[Row], ours: str) -> dict[str, dict[str, float]]:
    """How many times faster `ours` is than each rival: the geometric mean per network, and under "all" of all rows.

    Each method counts with its fastest configuration; a layer counts where both were timed.
    """
    logs: dict[str, dict[str, list[float]]] = {}
    for (network, _, _), times in best_times(rows).items():
        for rival, time in times.items():
            if rival != ours and ours in times:
                for name in (network, "all"):
                    logs.setdefault(name, {}).setdefault(rival, []).append(math.log(time / times[ours]))
    return {
        name: {rival: math.exp(sum(log) / len(log)) for rival, log in rivals.items()}
        for name, rivals in sorted(logs.items(), key=lambda item: item[0] == "all")
    }


def header(command: str, device: str = "cpu") -> dict[str, Any]:
    """What a result is measured on and by: device, versions, commit, date and command.

    Made before the timing: its load average tells whether other processes held the cores. OpenMP code waits for
    threads that are not running then, which makes torch, and dense convolutions above all, slower many times over.
    """
    machine = Machine.here(device)
    if device == "cpu":
        hardware: dict[str, Any] = {"device": "cpu", "cpu": machine.device, "isa": machine.isa}
        hardware["threads"] = machine.threads
        libraries: dict[str, str | None] = {name: _version(name) for name in ("numpy", "onnxruntime")}
        timing = "median of calls taken in turn after warm-up, in microseconds; outputs checked first"
    else:
        hardware = {"device": "cuda", "gpu": machine.device, "isa": machine.isa, "driver": machine.driver}
        packages = {name: _version(name) for name in ("numpy", "cuda-core", "triton")}
        libraries = {"cuda": machine.cuda, "cudnn": machine.cudnn, **packages}
        timing = (
            "device time of a call in microseconds: median of CUDA graph replays taken in turn after warm-up, over "
            "inputs and outputs twice the L2 cache where one call's are smaller; outputs checked first"
        )
    return {
        **hardware,
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": python_version(), "torch": machine.torch, "escort": machine.escort, **libraries},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "timing": timing,
    }


def write_results(path: Path, head: dict[str, Any], rows: Iterable[Row]) -> None:
    """Writes a result file: ``{"header": ..., "rows": [...]}``, one row a line."""
    lines = ",\n".join("  " + json.dumps(asdict(row), allow_nan=False) for row in rows)
    path.write_text(f'{{"header": {json.dumps(head, indent=2)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that this file was run from, "-dirty" where tracked files differ; None outside of its repository."""
    # An installed copy may lie inside another project's repository: only a tracked file tells of the right one.
    tracked = ["git", "ls-files", "--error-unmatch", __file__]
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    try:
        subprocess.run(tracked, cwd=Path(__file__).parent, capture_output=True, check=True)
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
