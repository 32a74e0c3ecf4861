"""Output channels dealt to parts of a kernel, so that all parts have about as many nonzeros."""

from __future__ import annotations

import heapq

import numpy as np

from escort.filter import IntArray


def deal(nnz: IntArray, parts: int, room: int) -> list[list[int]]:
    """Deals output channels to parts: the heaviest channel first, to the lightest part that has room.

    Args:
        nnz: (channels,) nonzeros of each.
        room: channels that a part takes at most.
    """
    channels_of: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for channel in np.argsort(-nnz, kind="stable").tolist():
        load, part = heapq.heappop(loads)
        channels_of[part].append(channel)
        if len(channels_of[part]) < room:
            heapq.heappush(loads, (load + int(nnz[channel]), part))
    return channels_of
