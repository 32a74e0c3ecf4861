"""What :func:`escort.methods.channel_order` does, until it is there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from escort.methods.cuda.sparse_tc.tiling import ELEMENTS
from escort.network.channels_last import best_order
from escort.problem import Precision


def channel_order(weights: Sequence[Tensor], precision: Precision, device: str) -> Tensor | None:
    """The order of the input channels of weights that read the same tensor, None where none is better than another."""
    return best_order(weights, ELEMENTS[precision]) if precision in ELEMENTS else None
