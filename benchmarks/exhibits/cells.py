"""What stands in the cells of tables."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.paper_layers import LAYERS
from escort.report import Figure, Table

#: A plot that is drawn when it is called.
Plot = Callable[[], Figure]
#: Tables and plots by the name that documents call them.
Shown = dict[str, Table | Plot]

#: A table or a plot by the name that documents call it, and the files that it is made of.
Exhibit = tuple[str, Table | Plot, tuple[str, ...]]


def zeros_in_paper(network: str, layer: str) -> str:
    """The share of zeros that the paper published for a layer."""
    return f"{LAYERS[network, layer].sparsity:.1%}" if (network, layer) in LAYERS else "-"


def microseconds(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us:,.0f}" if time_us >= 100 else f"{time_us:.1f}"


def milliseconds(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us / 1e3:.2f}"


def times_faster(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bar_length(share: float, lowest: float) -> float | None:
    """A share in percent, not below the lowest that was looked at; None where there is none."""
    return None if share == math.inf else 100 * max(share, lowest)
