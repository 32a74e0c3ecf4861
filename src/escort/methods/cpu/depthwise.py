"""Method `depthwise`: our dense kernel for convolutions whose output channels read one input channel each.

Every weight is multiplied, zeros as well: a plane is staged once, and then nine or 25 multiply-adds per output are less
than what skipping some of them would cost. kernels/cpu/depthwise.hpp says how it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.methods.activation import slopes
from escort.methods.base import Method, Prepared, prepared_op
from escort.problem import Problem

#: Instruction set -> floats per vector, fastest first.
LANES: dict[str, int] = {name: lanes for name, lanes, _ in _cpu.isas()}

#: Most output rows of a block; `kMostBlockRows` of the kernel.
MOST_ROWS = 8

# The structs of kernels/cpu/depthwise.hpp, which says what the fields mean.
PHASE = np.dtype([(name, "i4") for name in ("position", "first_column", "length")])
PARAMS = np.dtype(
    [
        (name, "i4")
        for name in (
            *("channels", "multiplier", "height", "width", "out_height", "out_width"),
            *("kernel_rows", "kernel_columns", "row_stride", "row_dilation", "column_stride", "top"),
            *("pitch", "stage_size", "bands", "block_rows", "planes", "activation"),
        )
    ]
)

_LEAST_ROWS = 14  # of a band that is there for a thread of its own
_STAGE_FLOATS = 4 * 1024  # of a 32 KiB level-1 cache, leaving room for what is read and written meanwhile


@dataclass(frozen=True)
class DepthwiseConfig:
    """The knobs of the depthwise kernel.

    Attributes:
        isa: instruction set, a key of :data:`LANES`.
        rows: most output rows whose sums are in registers at a time.
        stage: about how many floats of a plane are staged at a time, which decides into how many bands it is cut.
        planes: planes whose rows share a vector, 1 or 2.
    """

    isa: str
    rows: int
    stage: int
    planes: int = 1


class Depthwise(Method):
    """Float32 on the CPU; any kernel size, stride, dilation, padding and channel multiplier, 3x3 and 5x5 tuned."""

    name = "depthwise"
    device_type = "cpu"
    config_type = DepthwiseConfig
    is_native = True

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision != "fp32":
            return f"computes in fp32, not in {problem.precision}"
        if problem.groups != problem.in_channels:
            return f"each output channel reads {problem.in_channels // problem.groups} input channels, not one"
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[DepthwiseConfig]:
        configs: dict[DepthwiseConfig, None] = {}  # in order, each once
        for isa in [name for name in LANES if name != "generic"] or ["generic"]:
            lanes = LANES[isa]
            stage = _stage(problem, _Layout.of(problem, lanes).pitch)
            for planes in (2, 1) if _fits_two(problem, lanes) else (1,):
                for rows in (MOST_ROWS, MOST_ROWS // 2):
                    configs[DepthwiseConfig(isa, min(rows, problem.out_height), stage, planes)] = None
        return tuple(configs)

    def offers(self, problem: Problem, sparse_filter: SparseFilter, config: DepthwiseConfig) -> bool:
        """Whatever the kernel runs: what is tried depends on the number of threads, which may be another later."""
        return (
            config.isa in LANES
            and 1 <= config.rows <= min(MOST_ROWS, problem.out_height)
            and 1 <= config.stage <= _STAGE_FLOATS
            and (config.planes == 1 or (config.planes == 2 and _fits_two(problem, LANES[config.isa])))
        )

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: DepthwiseConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        layout = _Layout.of(problem, LANES[config.isa])
        zeros, of_channels = torch.zeros(problem.out_channels), slopes(problem, slope)
        tables = {
            "params": _params(problem, layout, config),
            "phases": layout.phases,
            "tap_columns": layout.tap_columns,
            "weights": sparse_filter.to_dense().numpy().ravel(),
            "bias": _numbers(zeros if bias is None else bias),
            "slope": _numbers(zeros if of_channels is None else of_channels),
        }
        return prepared_op(problem, _cpu.DepthwiseConvolution(config.isa, tables))


class _Layout(NamedTuple):
    """How rows are staged: the columns of each phase of the stride side by side, between zeros.

    Attributes:
        phases: records of PHASE, of the phases that a tap reads.
        tap_columns: (S,) int32, where each column of taps finds its first input.
        pitch: between staged rows, whole vectors.
    """

    phases: NDArray[np.void]
    tap_columns: NDArray[np.int32]
    pitch: int

    @classmethod
    def of(cls, problem: Problem, lanes: int) -> _Layout:
        stride, left = problem.stride[1], problem.padding[2]
        taps = np.arange(problem.kernel_size[1]) * problem.dilation[1]
        lead = -(left // stride) % lanes  # the map's first column falls on a whole vector
        phases, tap_columns, end = [], np.zeros(len(taps), np.int32), 0
        for phase in np.unique(taps % stride).tolist():
            first = (phase - left) % stride
            zeros, length = (first + left) // stride, max(-(-(problem.width - first) // stride), 0)
            phases.append((end + lead + zeros, first, length))
            reads = taps % stride == phase
            tap_columns[reads] = end + lead + taps[reads] // stride
            read = problem.out_width + int(taps[reads].max()) // stride
            end += -(-(lead + max(zeros + length, read)) // lanes) * lanes
        if end * ((problem.height + sum(problem.padding[:2])) + 1) > np.iinfo(np.int32).max:
            raise ValueError(f"a plane of {problem.height}x{problem.width} is too large; use a smaller input")
        return cls(np.array(phases, PHASE), tap_columns, end)


def _numbers(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def _fits_two(problem: Problem, lanes: int) -> bool:
    """Whether rows of two planes fit into a vector, half of which would else be idle."""
    # Slopes differ from plane to plane.
    return lanes >= 16 and 2 * problem.out_width <= lanes and problem.epilogue.activation != "prelu"


def _stage(problem: Problem, pitch: int) -> int:
    """How many floats to stage: a band for each thread, so that it has the rows that it has of other layers.

    As many as fit the cache where bands would be so low that most of their work were rows that others stage, too.
    """
    bands = min(torch.get_num_threads(), max(problem.out_height // _LEAST_ROWS, 1))
    return min(_STAGE_FLOATS, _staged_rows(problem, -(-problem.out_height // bands)) * pitch)


def _staged_rows(problem: Problem, rows: int) -> int:
    """Input rows that so many output rows read."""
    return (rows - 1) * problem.stride[0] + (problem.kernel_size[0] - 1) * problem.dilation[0] + 1


def _params(problem: Problem, layout: _Layout, config: DepthwiseConfig) -> NDArray[np.void]:
    """One record of PARAMS."""
    spare_rows = config.stage // layout.pitch - _staged_rows(problem, 1)
    fitting_rows = max(spare_rows // problem.stride[0] + 1, config.rows)
    bands = -(-problem.out_height // fitting_rows)
    band_rows = -(-problem.out_height // bands)
    params = np.zeros(1, PARAMS)
    values = {
        "channels": problem.in_channels,
        "multiplier": problem.out_channels // problem.in_channels,
        "height": problem.height,
        "width": problem.width,
        "out_height": problem.out_height,
        "out_width": problem.out_width,
        "kernel_rows": problem.kernel_size[0],
        "kernel_columns": problem.kernel_size[1],
        "row_stride": problem.stride[0],
        "row_dilation": problem.dilation[0],
        "column_stride": problem.stride[1],
        "top": problem.padding[0],
        "pitch": layout.pitch,
        "stage_size": _staged_rows(problem, band_rows) * layout.pitch,
        "bands": bands,
        "block_rows": config.rows,
        "planes": config.planes,
        "activation": problem.epilogue.activation_number,
    }
    for name, value in values.items():
        params[name] = value
    return params
