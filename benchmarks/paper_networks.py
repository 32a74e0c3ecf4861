"""The paper's three networks whole: its 39 layers sparse as it published them, every other convolution dense."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from benchmarks.networks import NETWORKS, googlenet, resnet50
from benchmarks.suite import paper_layers_by_name

#: As the paper had them: GoogLeNet's branches of 5x5, and ResNet-50 with its strides on the first convolutions.
FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "caffenet": NETWORKS["caffenet"].factory,
    "googlenet": partial(googlenet, kernel_size=5),
    "resnet50": partial(resnet50, strides_first=True),
}
#: What the paper's names of layers become in each network.
_MODULES: dict[str, tuple[tuple[str, str], ...]] = {
    "caffenet": ((r"conv(\d)", r"conv\1"),),
    "googlenet": (
        (r"conv2/3x3", "conv3.conv"),
        (r"inception_(\w+)/3x3", r"inception\1.branch2.1.conv"),
        (r"inception_(\w+)/5x5", r"inception\1.branch3.1.conv"),
    ),
    "resnet50": tuple(
        (rf"res{stage + 1}{letter}_branch2b", f"layer{stage}.{block}.conv2")
        for stage in range(1, 5)
        for block, letter in enumerate("abcdef")
    ),
}


def module_of(network: str, layer: str) -> str:
    """The name of the module that is a layer of the paper."""
    for pattern, module in _MODULES[network]:
        if found := re.fullmatch(pattern, layer):
            return found.expand(module)
    raise ValueError(f"{network} has no layer {layer}")


def paper_network(network: str, seed: int = 0) -> tuple[nn.Module, list[str]]:
    """A network of the paper with random weights, in eval mode, and the names of its pruned modules.

    The zeros lie where :func:`benchmarks.suite.paper_layers` has them. What is left of a layer's weights is scaled, so
    that its outputs keep their size. Weights follow torch's global generator.

    Raises:
        ValueError: where the paper knows no such network.
    """
    if network not in FACTORIES:
        raise ValueError(f"the paper knows no {network}, only {', '.join(FACTORIES)}")
    model = FACTORIES[network]().eval()
    names = []
    for (of, name), layer in paper_layers_by_name(seed).items():
        if of != network:
            continue
        names.append(module_of(network, name))
        weight = model.get_parameter(f"{names[-1]}.weight")
        kept = layer.sparse_filter.to_dense().ne(0.0)
        weight.data.mul_(kept * (kept.numel() / kept.sum()) ** 0.5)
    return model, names
