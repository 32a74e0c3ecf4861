"""The knobs of the stem kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StemConfig:
    """What a thread block computes.

    Attributes:
        rows: of outputs.
        octets: of outputs in each row, eight of which a warp multiplies side by side.
        together: whether the warps of a block multiply together (wgmma), and tensor cores read the weights themselves.
    """

    rows: int
    octets: int
    together: bool = False
