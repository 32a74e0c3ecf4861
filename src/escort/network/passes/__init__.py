"""What rewrites a network before its layers are planned, one file per pass.

A pass takes a network and the request. It returns the network that takes its place, and the convolutions that it left
alone with the reasons; of several reasons the first is told. Passes that work on graphs return a network of their own,
so that the original can be compared with the result; `pool`, which stands behind all of them, writes to the network
that it gets. A model that could not be traced is an ordinary module, in which a pass replaces what it can without a
graph.

`channels_last` is not in PASSES: the network is tried with it and without it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from escort.network.check import Request
from escort.network.passes import fuse, linear, padding, pool, rows, subclasses, transposed

Pass = Callable[[nn.Module, Request], tuple[nn.Module, dict[str, str]]]

#: The passes that every network goes through, in this order. Those before `fuse` make 2-d convolutions of torch.
PASSES: tuple[Pass, ...] = (
    subclasses.rewrite,
    padding.rewrite,
    rows.rewrite,
    transposed.rewrite,
    linear.rewrite,
    fuse.rewrite,
    pool.rewrite,
)
