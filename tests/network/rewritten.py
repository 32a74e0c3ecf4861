"""Models put through all passes, or through a whole conversion, and held to what they compute in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import escort
from escort.layers import FusedConv2d, SparseConv2d
from escort.network.check import Request
from escort.network.model import ConvertedModel
from escort.network.passes import PASSES
from escort.reference import compare
from tests.network.patterns import traced

ON_CPU = Request(torch.device("cpu"), "fp32")


def settled(model: nn.Module, density: float = 0.2) -> nn.Module:
    """`model` in eval mode with most weights of its filters zero, and batch norms as if trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - (-0.5 if "var" in name else 0.5))
            if tensor.ndim > 1:
                tensor *= torch.rand(tensor.shape, generator=generator) < density
    return model.eval()


def assert_same(ours: Any, model: nn.Module, *inputs: Tensor) -> None:
    """Both compute the same, and refuse the same inputs."""
    exact = copy.deepcopy(model).double()
    for x in inputs:
        with torch.no_grad():
            try:
                expected = exact(x.clone().double())
            except RuntimeError:
                try:
                    out = ours(x.clone())
                except (RuntimeError, ValueError):
                    continue
                if out.numel() == 0:  # torch itself refuses outputs without positions in some types only
                    continue
                raise AssertionError(f"inputs of {tuple(x.shape)} are refused, and gave {tuple(out.shape)}") from None
            for one, other in zip(tree_leaves(ours(x.clone())), tree_leaves(expected), strict=True):
                assert one.shape == other.shape and one.dtype is x.dtype
                # Where terms cancel, what is left is as small as their rounding.
                assert compare(one, other) < 1e-5 or torch.allclose(one.double(), other, rtol=1e-5, atol=1e-6)


class Rewritten:
    """A model behind all passes, checked against the model itself.

    Attributes:
        network: what the passes return.
        skipped: what they left alone, and why.
        convs: the fused convolutions by name.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, *others: Tensor, exported: bool = False, request: Request = ON_CPU
    ) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.network: Any = traced(torch.export.export(model, (x,)).module() if exported else model, x)
        code, self.skipped = self.network.code, dict[str, str]()
        graph = self.network
        for rewrite in PASSES:
            self.network, left_alone = rewrite(self.network, request)
            self.skipped = left_alone | self.skipped
        assert graph.code == code
        assert_same(graph, model, x)
        assert_same(self.network, model, x, *(() if exported else others))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        self.convs = {name: conv for name, conv in self.network.named_modules() if isinstance(conv, FusedConv2d)}

    @property
    def rest(self) -> list[str]:
        """What the graph does outside its fused convolutions."""
        assert isinstance(self.network, fx.GraphModule)
        found = []
        for node in self.network.graph.nodes:
            module = self.network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Module) and not isinstance(module, FusedConv2d):
                found.append(type(module).__name__)
            elif node.op in ("call_function", "call_method"):
                found.append(str(getattr(node.target, "__name__", node.target)))
        return [name for name in found if name not in ("_guards_fn", "GuardsFn")]


def converted(model: nn.Module, x: Tensor, folder: Path, *others: Tensor) -> ConvertedModel:
    """`model` converted, saved and loaded, and checked on inputs of several sizes."""
    fast = escort.convert(model, x)
    assert not fast.plan.kept_dense
    assert_same(fast, model, x, *others)
    sparse = [module for module in fast.modules() if isinstance(module, SparseConv2d)]
    assert len(sparse) == len(fast.plan.layers) and {one.plan.method for one in sparse} == {"direct"}
    escort.save(fast, folder / "model.escort")
    again = escort.load(folder / "model.escort", remeasure=False)
    for inputs in (x, *others):
        with torch.no_grad():
            try:
                expected = fast(inputs)
            except (RuntimeError, ValueError):
                continue
            assert torch.equal(again(inputs), expected)
    program = torch.export.export(fast, (x,))
    with torch.no_grad():
        assert compare(program.module()(x), fast(x)) < 1e-6
    return fast
