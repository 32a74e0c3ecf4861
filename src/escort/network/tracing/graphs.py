"""Where a network has graphs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn


def graphs(network: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """The graphs in a network, the whole or modules of it, and where they are."""
    for path, module in list(network.named_modules()):
        if isinstance(module, fx.GraphModule):
            yield path, module
