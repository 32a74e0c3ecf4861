"""Tables and plots of crossings: from which share of zeros on methods should be faster than cuDNN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from benchmarks.exhibits.cells import Shown, bar_length, microseconds
from benchmarks.findings import crossing
from benchmarks.findings.methods import OURS, methods_in
from benchmarks.result_files import Result
from escort.network.wording import convolution
from escort.problem import Precision
from escort.report import Table, horizontal_bars

#: The precisions that there is a crossing of.
CROSSING: tuple[Precision, ...] = ("fp16", "fp32")


def show_crossing(results: Mapping[str, Result], precision: Precision) -> Shown:
    crossings = crossing.crossings(results, precision)
    if not crossings:
        return {}
    methods = methods_in(f.least for f in crossings)
    lines = []
    for f in crossings:
        shares = (_least(f.least[method]) for method in methods)
        lines.append((convolution(f.problem), str(f.problem.batch), f.memory_format, microseconds(f.cudnn_us), *shares))
    lowest, highest = 100 * crossing.SHARES[0], 100 * crossing.SHARES[-1]
    caption = (
        "Share of zeros, at random positions, from which a method's model predicts less than the time measured of "
        f"cuDNN; never: not at {highest:g} % either."
    )
    if any(f.memory_format == "any" for f in crossings):
        caption += (
            " Tensors in any memory format: each method takes them as suits it best and nothing is converted, which "
            "for cuDNN and sparse_tc means channels_last, as a network that is channels_last throughout has them."
        )
    if OURS in methods:
        factors = crossing.direct_factors(results[f"layers-{precision}"], precision)
        low, middle, high = np.quantile(factors, (0.1, 0.5, 0.9))
        caption += (
            f" What the model of direct predicts counts {middle:.2f} times, the median over the paper's layers of the "
            f"time measured by the time predicted (10th percentile {low:.2f}, 90th {high:.2f})."
        )
    columns = ("Convolution", "Samples", "Tensors", "cudnn µs", *methods)
    heading = f"Predicted break-even sparsity, {precision}"
    names = [f"{convolution(f.problem)}, {f.problem.batch} samples, {f.memory_format}" for f in crossings]
    bars = {method: [bar_length(f.least[method], crossing.SHARES[0]) for f in crossings] for method in methods}
    plot = partial(horizontal_bars, heading, names, bars, f"Percent zeros, no less than {lowest:g}")
    return {f"crossing-{precision}": Table(heading, columns, tuple(lines), caption), f"crossing-{precision}-plot": plot}


def _least(share: float) -> str:
    if share == math.inf:
        return "never"
    return f"below {crossing.SHARES[0]:.0%}" if share == -math.inf else f"{share:.0%}"
