"""Small networks made of one pattern each, and what fusing makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from escort.layers import FusedConv2d
from escort.network.check import Request
from escort.network.example import Example
from escort.network.original import plain_copy
from escort.network.passes import fuse
from escort.network.tracing.trace import trace
from escort.reference import compare

ON_CPU = Request(torch.device("cpu"), "fp32")


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode with batch norms as if trained, so that folding them must change the weights."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()


class Net(nn.Module):
    """The modules that most patterns are made of, and the pattern: a function of the net and its input."""

    def __init__(self, pattern: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pattern = pattern
        with_statistics(self)

    def forward(self, x: Tensor) -> Any:
        return self.pattern(self, x)


# Weights that are computed
def masked(net: Net) -> None:
    prune.l1_unstructured(net.conv, "weight", amount=0.5)
    prune.random_unstructured(net.conv, "bias", amount=2)


SAMPLES = torch.randn(2, 3, 10, 9, generator=torch.Generator().manual_seed(1))


MORE = torch.randn(3, 3, 7, 12, generator=torch.Generator().manual_seed(2))


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The graph of a copy of a model that can be traced as a whole."""
    network, why_not = trace(plain_copy(model), Example(args, kwargs))
    assert isinstance(network, fx.GraphModule), why_not
    return network


class Fused:
    """A model traced and fused, checked against the model itself."""

    def __init__(self, model: nn.Module, *example: Tensor, others: tuple[Tensor, ...] = ()) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        self.network, self.skipped = fuse.rewrite(traced(model, *example), ON_CPU)
        self.convs = {n: m for n, m in self.network.named_modules() if isinstance(m, FusedConv2d)}
        with torch.no_grad():
            for inputs in (example, *((x,) for x in others)):
                expected = model(*(x.clone() for x in inputs))
                assert compare(self.network(*(x.clone() for x in inputs)), expected) < 1e-5
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    @property
    def epilogues(self) -> dict[str, tuple[bool, str]]:
        return {name: (conv.residual, conv.activation) for name, conv in self.convs.items()}

    @property
    def rest(self) -> list[str]:
        """What the graph still does outside its fused convolutions."""
        nodes = [n for n in self.network.graph.nodes if n.op.startswith("call_")]
        modules = {n: self.network.get_submodule(n.target) if n.op == "call_module" else None for n in nodes}
        return [
            str(n.target) if m is None else type(m).__name__
            for n, m in modules.items()
            if not isinstance(m, FusedConv2d)
        ]


def fused(pattern: Callable[[Any, Any], Any]) -> Fused:
    return Fused(Net(pattern), SAMPLES, others=(MORE,))
