"""What rewrites a network before its layers are planned, one file per pass.

A pass takes a network and what was asked for, and returns the network that takes its place, with the convolutions that
it left alone and why. The first, `fuse`, returns a network of its own, so that the original can be compared with the
result; those behind it may write to what they are given. A model that could not be traced is an ordinary module, in
which a pass replaces what it can without a graph.

`channels_last` is no member of PASSES but a fork: the network is tried with it and without it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from escort.network.check import Request
from escort.network.passes import fuse, pool

Pass = Callable[[nn.Module, Request], tuple[nn.Module, dict[str, str]]]

#: The passes that every network goes through, in this order.
PASSES: tuple[Pass, ...] = (fuse.rewrite, pool.rewrite)
