"""Networks in channels_last: the rewritten graph computes the same, and channels lie so that little is left over."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort import prune
from escort.filter import SparseFilter
from escort.layers import FusedConv2d
from escort.methods.cuda.sparse_tc.config import ELEMENTS
from escort.methods.cuda.sparse_tc.orders import order_filter
from escort.methods.cuda.sparse_tc.split import split
from escort.network.check import Request
from escort.network.mixing import mixing
from escort.network.passes import channels_last, fuse
from escort.network.values import difference, tensors_of
from escort.problem import Precision, Problem
from escort.runtime import Program
from tests.network.patterns import traced

FREE = {"stem", "reduce", "spatial", "expand", "again"}  # whose outputs convolutions alone read, or add


class Bottleneck(nn.Module):
    """Residual blocks, a view of a map, and convolutions whose channels are not free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.reduce, self.norm = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)
        self.spatial = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(64, 64, 1)
        self.again = nn.Conv2d(64, 64, 1)
        self.wide = nn.Conv2d(64, 64, 1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.last = nn.Conv2d(64, 8, 3, padding=1)
        self.head = nn.Linear(8 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        y = F.relu(self.norm(self.reduce(x)))
        x = F.relu(self.expand(F.relu(self.spatial(y))) + x)
        x = self.wide(F.relu(self.again(x) + x))
        x = F.max_pool2d(self.last(self.grouped(x)), 2)
        return self.head(x.view(x.shape[0], -1))


def pruned(sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    model = Bottleneck().eval()
    nn.init.uniform_(model.norm.running_mean)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module is not model.stem:
                module.weight *= torch.rand_like(module.weight) > sparsity
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def on_gpu(precision: Precision) -> Request:
    """What decides about the memory format is the request: the tensors are on the CPU."""
    return Request(torch.device("cuda:0"), precision)


def fused(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    network, skipped = fuse.rewrite(traced(model, x), on_gpu("fp32"))
    assert not skipped
    return network


def left_over(module: FusedConv2d, kept: int, of: int) -> float:
    return split(SparseFilter.from_dense(module.conv.weight, module.conv.groups), kept, of).share


@pytest.mark.parametrize(("precision", "kept", "of"), [("fp16", 2, 4), ("bf16", 2, 4), ("tf32", 1, 2)])
def test_a_rewritten_network_computes_the_same_and_leaves_less_over(
    x: Tensor, precision: Precision, kept: int, of: int
) -> None:
    model = pruned()
    network = fused(model, x)
    before = copy.deepcopy(network)
    assert channels_last.precluded(network, on_gpu(precision)) is None
    last = channels_last.rewrite(network, on_gpu(precision))
    with torch.inference_mode():
        expected = model.double()(x.double())
        out = last.double()(x.double().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    for (name, old), (_, new) in zip(before.named_modules(), last.named_modules(), strict=True):
        if not isinstance(old, FusedConv2d):
            continue
        assert new.conv.weight.is_contiguous(memory_format=torch.channels_last)
        reads_free = name in ("reduce", "spatial", "expand", "again", "wide")
        assert (left_over(new, kept, of) < 0.7 * left_over(old, kept, of)) is reads_free, name
        torch.testing.assert_close(network.get_submodule(name).conv.weight, old.conv.weight, rtol=0, atol=0)


def test_a_network_of_2_of_4_has_no_remainder(x: Tensor) -> None:
    model = pruned(0.0)
    prune.semi_structured(model, skip=["stem", "last"])
    prune.make_permanent(model)
    last = channels_last.rewrite(fused(model, x), on_gpu("fp16"))
    for name, module in last.named_modules():
        if isinstance(module, FusedConv2d) and name not in ("stem", "last"):
            sparse_filter = SparseFilter.from_dense(module.conv.weight, module.conv.groups)
            for memory_format in ("channels_last", "contiguous"):
                ordered = order_filter(sparse_filter, memory_format, ELEMENTS["fp16"])
                assert ordered.split.remainder.nnz == 0 and ordered.remainder_share(64, 64) == 0.0, name
            assert sparse_filter.nnz == module.conv.weight.numel() // 2


def test_channels_that_others_read_keep_their_order(x: Tensor) -> None:
    network = fused(pruned(), x)
    last = channels_last.rewrite(network, on_gpu("fp16"))
    changed = set()
    for name, module in network.named_modules():
        if isinstance(module, FusedConv2d):
            old, new = (each.conv.weight.double().sum((1, 2, 3)) for each in (module, last.get_submodule(name)))
            if not torch.allclose(old, new):
                changed.add(name)
    assert changed == FREE


def test_a_pool_that_is_given_its_input_by_name(x: Tensor) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.avg_pool2d(input=self.a(x), kernel_size=2))

    model = Pooled().eval()
    with torch.no_grad():
        torch.testing.assert_close(channels_last.rewrite(fused(model, x), on_gpu("fp16"))(x), model(x))


def test_what_is_left_over_gathers_in_the_last_channels(x: Tensor) -> None:
    last = channels_last.rewrite(fused(pruned(0.7), x), on_gpu("fp16"))
    sparse_filter = SparseFilter.from_dense(last.spatial.conv.weight)
    columns = split(sparse_filter).remainder.columns // 9
    first, last = (columns < 32).sum(), (columns >= 32).sum()
    assert 0 <= first < last


class Lying(nn.Module):
    """Something done with the map between two convolutions."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), between

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.between == "strides":
            y = y.as_strided((2, 8, 10, 10), (800, 100, 10, 1))
        elif self.between == "bits":
            y = y.view(torch.int32).view(torch.float32)
        elif self.between == "write":
            y.view(2, -1).mul_(2.0)
        return self.b(y)


@pytest.mark.parametrize(
    ("between", "reason"),
    [("strides", "depends on how"), ("bits", "depends on how"), ("write", "written to"), ("nothing", None)],
)
def test_what_depends_on_how_tensors_lie_is_not_rewritten(x: Tensor, between: str, reason: str | None) -> None:
    network = fused(Lying(between).eval(), x)
    why = channels_last.precluded(network, on_gpu("fp16"))
    assert why is None if reason is None else reason in str(why)


def test_in_which_memory_formats_a_network_is_tried(x: Tensor) -> None:
    network = fused(pruned(), x)
    networks, not_tried = channels_last.in_memory_formats(network, on_gpu("fp16"), [])
    assert list(networks) == ["contiguous", "channels_last"] and networks["contiguous"] is network and not not_tried
    assert channels_last.in_memory_formats(network, Request(torch.device("cpu"), "fp32"), []) == (
        {"contiguous": network},
        {},
    )
    for tried, precision, reason in ((network, "fp32", "in fp32"), (Bottleneck(), "fp16", "could not be traced")):
        networks, not_tried = channels_last.in_memory_formats(tried, on_gpu(precision), [])
        assert list(networks) == ["contiguous"] and reason in not_tried["channels_last"]


class TwoMaps(nn.Module):
    """Returns maps twice, its input, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        return y, self.second(y), y, x, y.mean((2, 3))


def test_maps_are_returned_as_the_original_does(x: Tensor) -> None:
    """A caller may take views of them."""
    model = TwoMaps().eval()
    last = x.contiguous(memory_format=torch.channels_last)
    for example in (x, last):
        expected = model(example)
        network = channels_last.rewrite(fused(model, x), on_gpu("fp16"), expected)
        found = network(last)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert found[0] is found[2] and [ours.stride() for ours in found[:3]] == [y.stride() for y in expected[:3]]
        assert mixing(Program.of(network)) is None


class Pair(NamedTuple):
    first: Any
    second: Any


class Packed(TwoMaps):
    """Returns the maps of `TwoMaps` in one of several ways, some of which hold more tensors than a graph returns."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        z = self.second(y)
        match self.how:
            case "dict":
                return {"z": z, "a": y, "none": None, "inner": (y.mean((2, 3)), [z, y])}
            case "named":
                return {"b": Pair(y, x.shape[0]), "a": [z, Pair(z, Pair(y, None))]}
            case "parts":
                return x.shape[0], z, y.chunk(2, 1), x.size()
            case _:
                return Pair(z, y.split(4, 1)), y, y


@pytest.mark.parametrize("how", ["dict", "named", "parts", "named parts"])
def test_maps_are_returned_as_the_original_does_in_whatever_they_are_packed(how: str, x: Tensor) -> None:
    model = Packed(how).eval()
    last = x.contiguous(memory_format=torch.channels_last)
    for example in (x, last):
        expected = model(example)
        network = channels_last.rewrite(fused(model, x), on_gpu("fp16"), tensors_of(expected))
        found = network(last)
        assert difference(found, expected) is None
        for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
            assert ours.stride() == theirs.stride()


def test_strict_float32_stays_as_it_is(x: Tensor) -> None:
    assert "fp32" in str(channels_last.precluded(fused(pruned(), x), on_gpu("fp32")))


def test_a_problem_knows_its_memory_format() -> None:
    problem = Problem(2, 8, 9, 9, 8, (3, 3), precision="fp16", device="cuda:0", memory_format="channels_last")
    assert Problem.from_json(problem.to_json()) == problem and "channels_last" in str(problem)
    assert problem.on("cpu").memory_format == "contiguous" and problem.on("cuda:1").memory_format == "channels_last"
    with pytest.raises(ValueError, match="channels_last is for GPUs"):
        Problem(2, 8, 9, 9, 8, (3, 3), memory_format="channels_last")
    with pytest.raises(ValueError, match="memory_format is one of"):
        Problem(2, 8, 9, 9, 8, (3, 3), memory_format="nhwc")  # type: ignore[arg-type]
