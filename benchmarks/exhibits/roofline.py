"""Rooflines: what layers reach of the device's arithmetic and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

from benchmarks import suite
from benchmarks.exhibits.cells import Exhibit
from benchmarks.findings.gpus import MEMORY_TB_S, PEAK_TFLOPS, TENSOR_TFLOPS
from benchmarks.findings.layers import flop
from benchmarks.findings.methods import SPARSE
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result
from escort.problem import TORCH_DTYPE
from escort.report import Figure, scatter_chart

_INDEX_BYTES = 2  # of a nonzero, roughly: the methods pack positions in different ways


def show_rooflines(results: Mapping[str, Result]) -> Iterator[Exhibit]:
    """One of each file of the paper's layers on a GPU that is known."""
    for name, result in results.items():
        known = result.header.get("gpu") in MEMORY_TB_S
        if known and name.rpartition("/")[2].startswith("layers-"):
            yield f"roofline-{name.replace('/layers', '')}", partial(_roofline, result), (name,)


def _roofline(result: Result) -> Figure:
    """The fastest of our methods and cuDNN on each layer: the real work by the time, over the work by the bytes."""
    precision, gpu = result.rows[0].dtype, result.header["gpu"]
    points: dict[str, list[tuple[float, float]]] = {}
    for (network, layer, batch), times in suite.best_times(result.rows).items():
        if (network, layer) not in LAYERS:
            continue
        intensity = flop(network, layer, batch) / _bytes(network, layer, batch, precision)
        best = min((method for method in times if method in SPARSE), key=times.__getitem__, default=None)
        for method in filter(None, (best, "cudnn" if "cudnn" in times else None)):
            rate = flop(network, layer, batch) / (times[method] * 1e6)
            points.setdefault(method, []).append((intensity, rate))
    memory = MEMORY_TB_S[gpu]
    peaks = {"multiply-adds": PEAK_TFLOPS[gpu].get(precision, PEAK_TFLOPS[gpu]["fp32"])}
    if precision in TENSOR_TFLOPS.get(gpu, {}):
        peaks["tensor cores, dense"] = TENSOR_TFLOPS[gpu][precision]
    ends = [each for of_method in points.values() for each, _ in of_method]
    left, right = min(ends) / 1.5, max(ends) * 1.5
    roofs = {
        f"{name}, {peak:g} TFLOP/s": [
            (x, min(peak, memory * x)) for x in sorted({left, peak / memory, right}) if x <= right
        ]
        for name, peak in peaks.items()
    }
    heading = f"Roofline of the paper's layers, {gpu.removeprefix('NVIDIA ')}, {precision}"
    x_axis = "Real work by bytes of input, output and nonzeros, FLOP/byte"
    return scatter_chart(heading, points, roofs, x_axis, "Real work by time, TFLOP/s")


def _bytes(network: str, layer: str, batch: int, precision: str) -> float:
    """What must move at least: the input and the output once, and the nonzeros with their positions."""
    entry = LAYERS[network, layer]
    problem = entry.problem(batch)
    size = TORCH_DTYPE[precision].itemsize
    nnz = (1.0 - entry.sparsity) * math.prod(problem.weight_shape)
    maps = math.prod(problem.input_shape) + batch * problem.out_channels * problem.out_height * problem.out_width
    return size * maps + nnz * (size + _INDEX_BYTES)
