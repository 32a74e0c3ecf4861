"""What rewrites a network before its layers are planned, one file per pass.

A pass takes a network and the request. It returns the network that takes its place, and the convolutions that it left
alone with the reasons. The first pass, `fuse`, returns a network of its own, so that the original can be compared with
the result; the passes behind it may write to the network that they get. A model that could not be traced is an ordinary
module, in which a pass replaces what it can without a graph.

`channels_last` is not in PASSES: the network is tried with it and without it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from escort.network.check import Request
from escort.network.passes import fuse, pool

Pass = Callable[[nn.Module, Request], tuple[nn.Module, dict[str, str]]]

#: The passes that every network goes through, in this order.
PASSES: tuple[Pass, ...] = (fuse.rewrite, pool.rewrite)
