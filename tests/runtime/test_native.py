"""Programs that run natively give what they give step by step, and whatever is not known to runs so."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

import escort
from escort.kernels import _cpu
from escort.planner import timing
from escort.runtime import Program, native
from tests.at_once import at_once
from tests.network.models import Small, pruned


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """A function as a model, with layers and parameters that it is given."""

    def __init__(self, function: Callable[..., Any], **owned: Any) -> None:
        super().__init__()
        for name, value in owned.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def program_of(model: nn.Module) -> Program:
    return Program.of(fx.symbolic_trace(model.eval().requires_grad_(False)))


def converted(model: nn.Module, x: Tensor) -> Any:
    """The converted model by our kernel, whatever is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
        return escort.convert(model, x, methods=["direct"])


def same(output: Any, expected: Any, bound: float = 1e-5) -> None:
    (leaves, structure), (references, wanted) = tree_flatten(output), tree_flatten(expected)
    assert structure == wanted
    for leaf, reference in zip(leaves, references, strict=True):
        if isinstance(reference, Tensor):
            torch.testing.assert_close(leaf, reference, rtol=bound, atol=bound, equal_nan=True)
            assert leaf.stride() == reference.stride()
        else:
            assert leaf == reference


def check(program: Program, model: nn.Module, *inputs: Tensor) -> None:
    """The third call of a kind, the first that runs natively, and the one after it give what the model gives."""
    for _ in range(4):
        for x in inputs:
            given = x.clone()
            same(program(given), model(x.clone()))


def steps_left(program: Program) -> dict[int, str]:
    """The steps that do not run natively in the form that was made last, and why."""
    forms = program.native.stats()["forms"]
    assert forms, program.native.stats()
    return forms[-1]["reasons"]


def images(samples: int = 2, channels: int = 6, height: int = 9, width: int = 11) -> Tensor:
    return torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(samples + height))


def shuffled(x: Tensor) -> Tensor:
    samples, channels, height, width = x.shape
    return (
        x.view(samples, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(samples, -1, height, width)
    )


OPERATIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "relu": lambda m, x: F.relu(x),
    "relu of a method": lambda m, x: x.relu(),
    "relu6": lambda m, x: F.relu6(x),
    "leaky relu": lambda m, x: F.leaky_relu(x, 0.2),
    "sigmoid": lambda m, x: torch.sigmoid(x) + x.sigmoid(),
    "tanh": lambda m, x: torch.tanh(x),
    "silu": lambda m, x: F.silu(x),
    "gelu": lambda m, x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "hardswish": lambda m, x: F.hardswish(x) + F.hardsigmoid(x),
    "hardtanh": lambda m, x: F.hardtanh(x, -0.5, 0.25),
    "clamp": lambda m, x: x.clamp(-0.3, 0.7) + torch.clamp(x, min=0.1) + x.clamp(max=0.2) + x.clamp(0, 6),
    "activations as layers": lambda m, x: m.layers(x),
    "add": lambda m, x: x + F.relu(x) + 1.5,
    "subtract": lambda m, x: 2.0 - x - torch.sub(x, 1.0),
    "multiply": lambda m, x: x * 0.5 * torch.mul(x, x),
    "divide": lambda m, x: 1.0 / (x * x + 1) + torch.div(x, 3.0),
    "maximum": lambda m, x: torch.maximum(x, x * 2) - torch.minimum(x, x * 2),
    "a gate of planes": lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "a gate of rows": lambda m, x: x * F.relu(x[:, :, :, :1]) + x[:, :, :1],
    "a gate of channels": lambda m, x: F.relu(x) * torch.sigmoid(x[:, :1]),
    "scales": lambda m, x: x * m.scale + m.shift,
    "squeeze and excitation": lambda m, x: x * F.hardsigmoid(m.second(F.relu(m.first(F.adaptive_avg_pool2d(x, 1))))),
    "max pooling": lambda m, x: F.max_pool2d(x, 3, 2, 1) + m.pool(x),
    "average pooling": lambda m, x: F.avg_pool2d(x, 3, 2, 1) + m.average(x),
    "average pooling to the edge": lambda m, x: F.avg_pool2d(x, (2, 3), ceil_mode=True),
    "average pooling by a divisor": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive pooling": lambda m, x: F.adaptive_avg_pool2d(x, (4, 3)),
    "a mean": lambda m, x: x.mean((2, 3)) + torch.mean(x, dim=[-1, -2]) + F.adaptive_avg_pool2d(x, 1).flatten(1),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda m, x: F.interpolate(x, size=(5, 23)),
    "nearest exact": lambda m, x: F.interpolate(x, scale_factor=(1.7, 0.6), mode="nearest-exact"),
    "bilinear": lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False),
    "bilinear to a size": lambda m, x: F.interpolate(x, size=(4, 30), mode="bilinear"),
    "bilinear by corners": lambda m, x: F.interpolate(x, size=(17, 5), mode="bilinear", align_corners=True),
    "upsampling layers": lambda m, x: m.up(x) + m.up_nearest(x),
    "bicubic": lambda m, x: F.interpolate(x, scale_factor=1.7, mode="bicubic"),
    "bicubic to a size": lambda m, x: F.interpolate(x, size=(4, 30), mode="bicubic") + 1,
    "bicubic by corners": lambda m, x: F.interpolate(x, size=(17, 5), mode="bicubic", align_corners=True),
    "by area": lambda m, x: F.interpolate(x, size=(3, 4), mode="area"),
    "exported upsampling": lambda m, x: (
        torch.ops.aten.upsample_bilinear2d.vec(x, [14, 15], False, None)
        + torch.ops.aten.upsample_bilinear2d.vec(x, None, True, [1.6, 1.4])
        + torch.ops.aten.upsample_bicubic2d.default(x, [14, 15], False)
        + torch.ops.aten.upsample_nearest2d.vec(x, None, [1.6, 1.4])
        + torch.ops.aten.upsample_nearest2d.default(x, [14, 15], 1.6, 1.4)
    ),
    "softmax": lambda m, x: torch.softmax(x, 1) + F.softmax(x * 30, dim=-1) + x.softmax(2) + m.softmax(x),
    "softmax of a matrix": lambda m, x: torch.softmax(m.head(x.flatten(1)), 1, dtype=torch.float32),
    "prelu": lambda m, x: m.prelu(x) + m.prelus(x * 2) + m.prelu(x.flatten(1)).view_as(x) + F.prelu(x, m.offset),
    "powers": lambda m, x: x**2 + x.pow(2) * -x - torch.neg(x),
    "a mean of the last axes": lambda m, x: x.flatten(2).mean(-1) + x.mean(3).mean(2) * x.mean(dim=(-1, 1, 2))[:, None],
    "concatenation": lambda m, x: torch.cat([F.relu(x), x, x * 2], 1),
    "concatenation by a negative axis": lambda m, x: torch.cat((F.relu(x), x), dim=-3) + 1,
    "concatenation along other axes": lambda m, x: [torch.cat([x, x * 2], axis) for axis in (0, 2, 3, -1)],
    "concatenation of rows": lambda m, x: torch.cat([F.relu(x).flatten(2), x[:, :, 1:].flatten(2)], 2) * 2,
    "concatenation of slices": lambda m, x: torch.cat([x[..., ::2, 1::2], F.relu(x)[..., 1:6, 1:6]], 1),
    "growing concatenation": lambda m, x: (
        lambda a, b, c: torch.cat([torch.cat([a, b], 1) + 1, torch.cat([a, b, c], 1), torch.cat([a, b, c, x], 1)], 1)
    )(F.relu(x), x * 2, x + 1),
    "stack": lambda m, x: torch.stack([x, x * 2], -1) + torch.stack((x + 1, x), dim=1).permute(0, 2, 3, 4, 1),
    "nested concatenation": lambda m, x: torch.cat([torch.cat([F.relu(x), x + 1], 1), F.relu(x * 2)], 1) * 2,
    "one part twice": lambda m, x: (lambda y: torch.cat([y, y], 1) + torch.cat([y, x], 1))(F.relu(x)),
    "chunks": lambda m, x: (lambda y: torch.cat([F.relu(y[1]), y[0]], 1))(torch.chunk(x + 1, 2, 1)),
    "split": lambda m, x: (lambda y: [y[0] * 2, y[1], F.relu(y[2])])(torch.split(F.relu(x), [1, 2, 3], 1)),
    "slices": lambda m, x: F.relu(x)[:, 2:5] * 2 + x[:, :3],
    "every second": lambda m, x: F.relu(x)[:, :, ::2, ::2] + 1,
    "channel shuffle": lambda m, x: shuffled(F.relu(x)) + F.channel_shuffle(x, 3),
    "pad": lambda m, x: F.pad(x, (1, 2, 3, 0)) + 1,
    "pad by a number": lambda m, x: F.pad(x, (1, 1), value=-2.0) + F.pad(x, (0, 2, -1, 1), "constant", 3.0)[:, :, :1],
    "pad as a layer": lambda m, x: m.pad(x),
    "pad along channels": lambda m, x: F.pad(F.relu(x), (0, 0, 0, 0, 0, 3)) + F.pad(x, (0, 0, 0, 0, 2, 1), value=1.5),
    "pad and cut channels": lambda m, x: F.pad(F.relu(x), (1, 0, 0, 2, -2, 1)) * 2 + F.pad(x, (0, 1, 0, 2, -1, 0)),
    "pad in front of pooling": lambda m, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-float("inf")), 2),
    "pixel shuffle": lambda m, x: F.pixel_shuffle(torch.cat([x, x * 2], 1), 2) + m.pixels(torch.cat([x * 3, x], 1)),
    "batch norm": lambda m, x: F.relu(m.norm(x)) + m.plain_norm(x * 2),
    "batch norm by a function": lambda m, x: F.batch_norm(x, m.mean, m.var, None, m.offset, False, 0.1, 0.01),
    "linear": lambda m, x: m.head(x.flatten(1)) + m.head(torch.flatten(x, 1)) * 2,
    "linear by a function": lambda m, x: F.linear(F.relu(x), m.weight) + F.linear(x, m.weight, m.bias),
    "reshape": lambda m, x: F.relu(x.reshape(x.shape[0], -1)).view(-1, x.size(1), x.size(2) * x.size(3)) + 1,
    "a transposed head": lambda m, x: (
        F.relu(x).view(x.shape[0], 2, 3, -1).permute(0, 1, 3, 2).reshape(x.shape[0], -1, 3)
    ),
    "a permuted reshape": lambda m, x: F.relu(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1) * 2,
    "permuted operands": lambda m, x: torch.cat([F.relu(x).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)], 1).relu(),
    "a residual": lambda m, x: (lambda y: F.relu(y * 2 + y))(F.relu(x)),
    "results of several kinds": lambda m, x: {"a": F.relu(x), "b": (x.shape[0], [x + 1, None]), "c": x.shape},
}


def net_for(name: str, x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    owned: dict[str, Any] = {
        "layers": nn.Sequential(
            *(nn.ReLU6(), nn.LeakyReLU(0.1), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.Tanh(), nn.Sigmoid()),
            *(nn.Hardsigmoid(), nn.Hardtanh(-0.2, 0.8), nn.ReLU(inplace=True)),
        ),
        "scale": torch.randn(6, 1, 1),
        "shift": torch.randn(1, 6, 1, 1),
        "first": nn.Conv2d(6, 3, 1),
        "second": nn.Conv2d(3, 6, 1),
        "pool": nn.MaxPool2d(3, 2, 1),
        "average": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        "up": nn.Upsample(scale_factor=3, mode="bilinear"),
        "up_nearest": nn.UpsamplingNearest2d(scale_factor=3),
        "softmax": nn.Softmax(1),
        "prelu": nn.PReLU(),
        "prelus": nn.PReLU(6),
        "pad": nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.ConstantPad2d(1, 0.5)),
        "norm": nn.BatchNorm2d(6),
        "plain_norm": nn.BatchNorm2d(6, affine=False, eps=0.1),
        "mean": torch.randn(6),
        "var": torch.rand(6),
        "offset": torch.randn(6),
        "pixels": nn.PixelShuffle(2),
        "head": nn.Linear(x[0].numel(), 5),
        "weight": torch.randn(7, x.shape[-1]),
        "bias": torch.randn(7),
    }
    owned["prelus"].weight.data.normal_()
    for norm in (owned["norm"], owned["plain_norm"]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return Net(OPERATIONS[name], **owned).eval()


#: What is computed in part by convolutions of torch, which are no part of a native program.
BY_TORCH = {"squeeze and excitation"}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name: str, samples: int) -> None:
    x = images(samples)
    model = net_for(name, x)
    program = program_of(model)
    check(program, model, x)
    assert set(steps_left(program).values()) <= ({"is a Conv2d"} if name in BY_TORCH else set())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_operations_on_threads(threads: int) -> None:
    x = images(2, 16, 70, 130)
    names = "sigmoid", "a gate of planes", "average pooling", "bilinear", "nearest", "pad", "channel shuffle", "linear"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in names:
            x = x[:, :6].contiguous() if name == "channel shuffle" else x
            model = net_for(name, x)
            program = program_of(model)
            check(program, model, x)
            assert not steps_left(program)
    finally:
        torch.set_num_threads(before)


SMALL = images(2, 3, 16, 16)


def test_steps_are_called_from_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = converted(pruned(Small()), SMALL)
    expected = fast(SMALL)
    for module in fast.network.modules():
        if module is not fast.network:
            monkeypatch.setattr(type(module), "forward", None)
    assert torch.equal(fast(SMALL), expected)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_convolutions_give_the_same_bits(samples: int) -> None:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU6()
    fast, x = converted(pruned(nn.Sequential(*layers)), SMALL), images(samples, 3, 16, 16)
    by_step = copy.deepcopy(fast)
    by_step.network.native.enabled = False
    for _ in range(4):
        assert torch.equal(fast(x), by_step(x))
    assert not steps_left(fast.network) and by_step.network.native.stats()["eager"] == {"it is switched off": 4}


def test_a_chain_of_small_steps_is_one_segment_with_little_memory() -> None:
    x = images(1, 6, 32, 32)
    model = Net(lambda m, x: [x := F.relu(x * 2 - 1) for _ in range(20)][-1])
    program = program_of(model)
    check(program, model, x)
    (form,) = program.native.stats()["forms"]
    assert form["segments"] == 1 and form["instructions"] == form["steps"] == 60
    assert form["bytes"] == 2 * 4 * x.numel()  # one that is read and one that is written, in turn


def grown(*parts: Tensor) -> Tensor:
    """As in dense blocks: what is computed of all parts so far becomes another one."""
    features = list(parts)
    for _ in range(2):
        features.append(F.relu_(torch.cat(features, 1)[:, :6] * 2))
    return torch.cat(features, 1)


def test_parts_are_written_where_they_are_joined() -> None:
    """Concatenation costs nothing where its parts are made for it alone, and a copy where they are not."""
    cases: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
        "new parts": (lambda m, x: torch.cat([x * 2, x + 1], 1), 2),
        "parts that are read again": (lambda m, x: (lambda y: torch.cat([y, x + 1], 1)[:, :6] * y)(x * 2), 3),
        "an input": (lambda m, x: torch.cat([x, x + 1], 1), 2),
        "nested": (lambda m, x: torch.cat([torch.cat([x * 2, x + 1], 1), x - 1], 1), 3),
        "growing": (lambda m, x: grown(x * 2, x + 1, x - 1), 7),
        "growing, and written to": (lambda m, x: (lambda a: (grown(a, x), a.mul_(2.0), grown(a, x))[2])(x * 2), 13),
        "one part twice": (lambda m, x: (lambda y: torch.cat([y, y], 1))(x * 2), 2),
        "a part that is returned": (lambda m, x: (lambda y: (y, torch.cat([y, x + 1], 1)))(x * 2), 3),
        "a part that is written to before": (lambda m, x: torch.cat([(x * 2).relu_(), x + 1], 1), 3),
        "a part that is written to behind": (lambda m, x: (lambda y: (torch.cat([y, x], 1), y.relu_())[0])(x * 2), 4),
        "a result that is written to": (lambda m, x: (lambda y: torch.cat([y, x], 1).relu_()[:, :6] + y)(x * 2), 5),
    }
    for name, (function, count) in cases.items():
        for samples in (1, 3):
            x, model = images(samples), Net(function)
            program = program_of(model)
            check(program, model, x)
            assert program.native.stats()["forms"][-1]["instructions"] == count, name


ALIASES: dict[str, Callable[[Any, Tensor], Any]] = {
    "the input": lambda m, x: (x, F.relu(x)),
    "a view of the input": lambda m, x: (x.flatten(1), F.relu(x)),
    "two views of one result": lambda m, x: (lambda y: (y.flatten(1), y[:, 1:]))(F.relu(x)),
    "one result twice": lambda m, x: (lambda y: [y, y])(F.relu(x)),
    "a result that is read again": lambda m, x: (lambda y: (y, F.relu(y) + y))(x * 2),
    "in place": lambda m, x: (lambda y: (y.relu_(), y))(x * 2),
    "in place on a view": lambda m, x: (lambda y: (y[:, :2].mul_(3.0), y + 1))(x * 2),
    "in place by an operator": lambda m, x: operator.iadd(x * 2, 1) * operator.imul(x + 1, x),
    "in place and read before": lambda m, x: (lambda y: (y + 1, F.relu(y, inplace=True), y))(x * 2),
    "in place on the input": lambda m, x: (x.relu_() + 1, x),
    "in place on a view of the input": lambda m, x: (x[:, :1].add_(1.0), x * 2),
    "in place between unknown steps": lambda m, x: (lambda y: (y.cumsum(1), y.mul_(2.0), y.cumsum(1)))(x + 1),
    "an unknown step in place": lambda m, x: (lambda y: (F.relu(y), y.exp_(), y * 2))(x + 1),
    "an unknown step in place on a view": lambda m, x: (lambda y: (y[:, :3].exp_(), y * 2))(x + 1),
}


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", ALIASES)
def test_what_shares_memory(name: str, samples: int) -> None:
    model = Net(ALIASES[name])
    program = program_of(model)
    for _ in range(3):
        mine, theirs = images(samples), images(samples)
        outputs, expected = program(mine), model(theirs)
        same(outputs, expected)
        same(mine, theirs)
        assert sharing((*outputs, mine)) == sharing((*expected, theirs))


def sharing(tensors: tuple[Tensor, ...]) -> list[int]:
    """For each tensor the first one that lies in the same memory."""
    addresses = [x.untyped_storage().data_ptr() for x in tensors]
    return [addresses.index(address) for address in addresses]


def test_results_are_the_callers() -> None:
    program = program_of(Net(lambda m, x: F.relu(x) * 2))
    first = program(SMALL)
    kept = first.clone()
    second = program(SMALL + 1)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    second.zero_()
    assert torch.equal(program(SMALL), kept)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * 2 + x.argmax(1, keepdim=True) * 3,
        lambda m, x: (x > 0) * x,
        lambda m, x: x.maximum(x.sum((2, 3), dtype=torch.float64)[..., None, None].to(torch.int32)),
    ],
)
def test_other_types_are_left_to_torch(function: Callable[[Any, Tensor], Any]) -> None:
    program = program_of(Net(function))
    check(program, Net(function), images(2))
    assert any(reason.startswith("computes with torch.") for reason in steps_left(program).values())


def test_unknown_steps_run_between_segments() -> None:
    def function(m: Any, x: Tensor) -> Any:
        y = F.relu(x) * 2
        z = torch.cumprod(y, 1) + y
        return z.view(z.size(0), -1) * 2, torch.cumsum(z, 1) * y

    model = Net(function)
    program = program_of(model)
    check(program, model, images(2), images(3), images(1, height=4))
    assert set(steps_left(program).values()) == {"there is no native cumprod", "there is no native cumsum"}
    assert {form["segments"] for form in program.native.stats()["forms"]} == {3}


class Sometimes(nn.Module):
    """A module of the model's own, whose result has another shape now and then."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x if self.calls % 3 else torch.cat([x, x])


class OwnModules(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Sometimes) or super().is_leaf_module(module, name)


def test_a_tensor_that_changes_its_shape_within_a_call() -> None:
    def function(m: Any, x: Tensor) -> Any:
        y = m.own(x * 2)
        count = y.size(0)
        return F.relu(torch.cumsum(y, 1)).view(count, -1) + count

    model = Net(function, own=Sometimes())
    graph = OwnModules().trace(model)
    program = Program.of(fx.GraphModule(model, graph))
    twin = copy.deepcopy(model)
    for _ in range(7):
        same(program(SMALL), twin(SMALL))
    assert program.native.stats()["eager"] == {"a tensor was not as in the call before": 2}


def test_each_kind_of_call_has_a_form() -> None:
    model = Net(lambda m, x: F.relu(x) * x.shape[0] + x.mean((2, 3), keepdim=True))
    program = program_of(model)
    inputs = [images(1), images(2), images(2, height=5), images(2)[:, :, ::2], images(2).permute(0, 1, 3, 2)]
    inputs.append(images(2).to(memory_format=torch.channels_last))
    for x in inputs * 2:
        same(program(x), model(x))
    assert len(program.native.stats()["forms"]) == len(inputs)


def test_forms_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_MOST_KINDS", 3)
    model = Net(lambda m, x: F.relu(x) * 2)
    program = program_of(model)
    check(program, model, *[images(samples) for samples in range(1, 8)])
    assert len(program.native.stats()["forms"]) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_other_types_run_step_by_step(dtype: torch.dtype) -> None:
    model = Net(lambda m, x: F.relu(x) + 1)
    program, x = program_of(model), (images() * 10).to(dtype)
    check(program, model, x)
    assert not any(form["segments"] for form in program.native.stats()["forms"])


def test_empty_batches() -> None:
    model = Net(lambda m, x: F.relu(x) * 2 + x.mean((2, 3), keepdim=True))
    program = program_of(model)
    check(program, model, images(2)[:0])


class Hooked:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output + 1


def test_a_hook_that_is_registered_later_is_called() -> None:
    fast, hook = converted(pruned(Small()), SMALL), Hooked()
    plain = [fast(SMALL) for _ in range(3)][-1]
    handle = fast.first.register_forward_hook(hook)
    for _ in range(3):
        assert not torch.equal(fast(SMALL), plain)
    assert hook.calls == 3 and fast.network.native.stats()["forms"][-1]["reasons"][0].startswith("runs code besides")
    handle.remove()
    assert torch.equal(fast(SMALL), plain) and hook.calls == 3


def test_a_hook_on_all_modules_is_called() -> None:
    fast, hook = converted(pruned(Small()), SMALL), Hooked()
    fast(SMALL)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        fast(SMALL)
    finally:
        handle.remove()
    assert hook.calls > len(fast.plan.layers)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a bias": lambda network: network.first.bias.add_(1.0),
    "values": lambda network: network.second.values.mul_(-1.0),
    "a bias that is set": lambda network: setattr(network.second, "bias", torch.ones(8)),
    "a linear layer's weight": lambda network: network.head.weight.mul_(2.0),
    "a linear layer's bias, set": lambda network: setattr(network.head, "bias", nn.Parameter(torch.ones(5))),
    "a layer": lambda network: network.set_submodule("pool", nn.AvgPool2d(2)),
    "a layer's attribute": lambda network: setattr(network.pool, "ceil_mode", True),
    "a layer's code": lambda network: setattr(network.pool, "forward", lambda x: F.max_pool2d(x, 3)),
    "a state": lambda network: network.load_state_dict(
        {name: x * 2 if x.is_floating_point() else x for name, x in network.state_dict().items()}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_counts_from_the_next_call_on(name: str) -> None:
    fast, x = converted(pruned(Small()), SMALL), images(2, 3, 18, 18)
    fast(x)
    before = fast(x)
    CHANGES[name](fast.network)
    by_step = copy.deepcopy(fast)
    by_step.network.native.enabled = False
    for _ in range(3):
        output = fast(x)
        same(output, by_step(x))
        assert not torch.equal(output, before)


def test_a_network_that_is_changed_again_and_again_runs_step_by_step() -> None:
    program = program_of(Net(lambda m, x: m.head(x.mean((2, 3))), head=nn.Linear(3, 2)))
    for _ in range(40):
        program.head.bias = nn.Parameter(torch.randn(2), requires_grad=False)
        same(program(SMALL), F.linear(SMALL.mean((2, 3)), program.head.weight, program.head.bias))
    assert program.native.stats()["eager"]["the network is changed again and again"] > 25


def test_copies_make_forms_of_their_own() -> None:
    fast = converted(pruned(Small()), SMALL)
    expected = [fast(SMALL) for _ in range(2)][-1]
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not other.network.native.stats()["forms"]
        other.first.bias.add_(1.0)
        assert not torch.equal(other(SMALL), expected) and torch.equal(fast(SMALL), expected)


def test_a_program_that_goes_lets_go_of_its_forms() -> None:
    program = program_of(Net(lambda m, x: m.head(x.mean((2, 3))), head=nn.Linear(3, 2)))
    program(SMALL)
    weight = weakref.ref(program.head.weight)
    del program
    gc.collect()
    assert weight() is None


def test_gradients_of_parameters_pass_through_steps() -> None:
    program = program_of(Net(lambda m, x: m.head(x.mean((2, 3))), head=nn.Linear(3, 2)))
    program(SMALL)
    program.head.weight.requires_grad_(True)
    with torch.enable_grad():
        program(SMALL).sum().backward()
        assert program.head.weight.grad is not None
        x = SMALL.clone().requires_grad_()
        program(x).sum().backward()
        assert x.grad is not None


def test_threads_share_forms() -> None:
    fast = converted(pruned(Small()), SMALL)
    inputs = [images(1 + i % 3, 3, 16 + 2 * (i % 2), 16) for i in range(6)]
    by_step = copy.deepcopy(fast)
    by_step.network.native.enabled = False
    expected = [by_step(x) for x in inputs]

    def call(x: Tensor, wanted: Tensor) -> None:
        with torch.no_grad():
            for _ in range(30):
                same(fast(x), wanted)

    at_once(call, zip(inputs, expected, strict=True))


def test_nan_and_infinity_pass() -> None:
    x = images()
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for name in ("relu", "relu6", "maximum", "average pooling", "max pooling", "nearest", "clamp", "sigmoid"):
        model = net_for(name, x)
        check(program_of(model), model, x)


def test_instructions_are_checked() -> None:
    relu = _cpu.Elementwise("first", 1, 0.0, [6], [1], [])
    whole = (0, 0, 6)
    for wrong in (
        [(relu, 1, [whole, whole], (1, 0, 6))],  # an input too many
        [(relu, 1, [whole], (-1, 0, 6))],
        [(relu, 2, [whole], (2, 0, 6))],  # beyond the arena
        [(relu, 1, [(3, 0, 6)], (1, 0, 6))],
        [(relu, 1, [(0, -1, 6)], (1, 0, 6))],
    ):
        with pytest.raises(ValueError):
            _cpu.NativeProgram(wrong, 2, 8)
    with pytest.raises(ValueError, match="buffers"):
        _cpu.NativeProgram([(relu, 1, [whole], (1, 0, 6))], 2, 0).run([0], 1)
    for make in (
        lambda: _cpu.Elementwise("first", 1, 0.0, [6], [2], []),
        lambda: _cpu.Elementwise("add", 1, 0.0, [6], [1], []),
        lambda: _cpu.Elementwise("power", 1, 0.0, [6], [1], [1]),
        lambda: _cpu.Copy([2, 3], [1]),
        lambda: _cpu.Pad(1, (2, 2), (-1, -1, 0, 0), 0.0),
        lambda: _cpu.AveragePool(1, (4, 4), [(0, 5, 1.0)], [(0, 4, 1.0)]),
        lambda: _cpu.Resize(1, (4, 4), [(0, 4, 0.5)], [(0, 0, 0.0)]),
    ):
        with pytest.raises(ValueError):
            make()


def test_layers_refuse_other_channels_as_torch_does() -> None:
    program = program_of(Net(lambda m, x: F.relu(m.norm(x) * 2), norm=nn.BatchNorm2d(6)))
    program(images(2, 6))
    with pytest.raises(RuntimeError, match="should contain 5 elements not 6"):
        program(images(2, 5))
