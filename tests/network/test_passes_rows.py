"""Rows: 1-d convolutions as 2-d ones, with what follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from escort.network.check import Request
from escort.network.passes import fuse
from escort.network.passes import rows as rows_pass
from tests.network.rewritten import ON_CPU, Rewritten, assert_same, converted, settled


@st.composite
def rows(draw: st.DrawFn) -> tuple[nn.Conv1d, int]:
    """A 1-d convolution of any geometry, and an input length that it takes."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel_size, stride, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = draw(st.integers(0, 4) if stride > 1 else st.one_of(st.just("same"), st.integers(0, 4)))
    conv = nn.Conv1d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
    )
    span = (kernel_size - 1) * dilation + 1
    least = 1 if padding == "same" else max(span - 2 * int(padding), 1)
    return conv, least + draw(st.integers(0, 9))


@given(rows(), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_geometry(problem: tuple[nn.Conv1d, int], batch: int, exported: bool) -> None:
    conv, length = problem
    model = settled(nn.Sequential(conv, nn.ReLU()), density=0.5)
    inputs = [torch.randn(n, conv.in_channels, size) for n, size in ((batch, length), (3, length + 5), (0, length))]
    result = Rewritten(model, *inputs, torch.randn(1, conv.in_channels, 1), exported=exported)
    assert [name for name in result.convs] == ["0"] and not result.skipped
    assert result.rest == ["getitem", "getitem"] and result.convs["0"].activation == "relu"


class Stack(nn.Module):
    """What 1-d networks are made of: norms, activations of all kinds, a residual, a transposed convolution, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.first = nn.Sequential(nn.Conv1d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm1d(8), nn.Dropout1d())
        self.second = nn.Sequential(nn.Conv1d(8, 8, 3, padding="same", groups=2), nn.BatchNorm1d(8))
        self.gate = nn.Conv1d(8, 8, 1)
        self.up = nn.Sequential(nn.ConvTranspose1d(8, 6, 4, 2, 1), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.second(F.relu6(self.first(x))) + x)
        x = F.silu(x) * torch.sigmoid(self.gate(x.mean(2, keepdim=True)))
        return self.head(self.up(x))


@pytest.mark.parametrize("exported", [False, True])
def test_a_stack_fuses_as_a_2_d_one_does(exported: bool) -> None:
    model = settled(Stack())
    x = torch.randn(2, 3, 32)
    result = Rewritten(model, x, torch.randn(3, 3, 41), torch.randn(1, 3, 8), exported=exported)
    epilogues = {name: (conv.residual, conv.activation) for name, conv in result.convs.items()}
    assert epilogues == {
        "stem.0": (False, "relu"),
        "first.0": (False, "relu6"),
        "second.0": (True, "relu"),
        "gate": (False, "sigmoid"),
        "up.0": (False, "relu"),
        "head": (False, "none"),
    }
    assert not [name for name in result.rest if "norm" in name.lower() or "relu" in name.lower()]
    # Around the gate's mean, the input and the output; nothing between the others.
    assert len([name for name in result.rest if name == "getitem"]) == 4


def test_a_decomposed_program() -> None:
    model = settled(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3)))
    x = torch.randn(2, 3, 9)
    program = torch.export.export(model, (x,)).run_decompositions()
    result = Rewritten(program.module(), x)
    assert {name: conv.activation for name, conv in result.convs.items()} == {"0": "relu", "3": "none"}
    assert result.rest == ["getitem", "getitem"]


def test_without_shapes_an_input_may_lack_samples() -> None:
    model = settled(nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3)))
    network: Any = fx.symbolic_trace(model)
    for rewrite in (rows_pass.rewrite, fuse.rewrite):
        network, skipped = rewrite(network, ON_CPU)
        assert not skipped
    assert_same(network, model, torch.randn(2, 3, 9), torch.randn(3, 9))
    assert network.get_submodule("0").activation == "relu"


@pytest.mark.parametrize("exported", [False, True])
def test_a_function_of_computed_weights(exported: bool) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv1d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv1d(x, self.inner.weight * 2, self.inner.bias, stride=2, padding=1).relu()
            return torch.conv1d(input=y, weight=self.inner.weight[:, :2].tanh(), padding="valid", groups=2)

    result = Rewritten(settled(Functional(), 0.9), torch.randn(2, 3, 9), torch.randn(1, 3, 14), exported=exported)
    assert set(result.convs) == {"inner", "inner_1"} and len(result.rest) == 2


@pytest.mark.parametrize(
    "pattern",
    [
        lambda net, x: (lambda y: y.relu_() + y)(net.conv(x)),
        lambda net, x: (lambda y: torch.cat([net.relu(y), y], 1))(net.conv(x)),
        lambda net, x: net.norm(net.relu(net.conv(x)) + x),
        lambda net, x: (lambda y: x.mul(2.0).add_(y) * y)(net.conv(x)),
        lambda net, x: net.conv(net.conv(x).transpose(1, 2)[:, :, :4]).flatten(1),
        lambda net, x: net.conv(x) * net.scale + net.conv(x).mean((0, 2))[:, None],
        lambda net, x: net.norm(net.conv(x)) - net.conv(net.norm(x)),
        lambda net, x: (net.conv(x), F.batch_norm(net.conv(x), net.norm.running_mean, net.norm.running_var)),
        lambda net, x: F.batch_norm(
            input=net.conv(x), running_mean=net.norm.running_mean, running_var=net.norm.running_var
        ),
        lambda net, x: torch.add(input=net.conv(x), other=torch.mul(net.conv(x), other=x)),
        lambda net, x: F.batch_norm(net.conv(x), None, None, training=True),
        lambda net, x: F.softmax(net.conv(x), 2).amax(-1),
    ],
)
def test_what_stands_around_them_stays_right(pattern: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True)
            self.scale = nn.Parameter(torch.ones(4, 1))

        def forward(self, x: Tensor) -> Any:
            return pattern(self, x)

    result = Rewritten(settled(Net(), 0.7), torch.randn(2, 4, 4), torch.randn(3, 4, 4))
    assert result.convs


def test_what_is_left_alone() -> None:
    hooked = nn.Conv1d(3, 4, 3)
    hooked.register_forward_hook(lambda module, args, out: out * 2)
    assert "forward hooks" in Rewritten(nn.Sequential(hooked).eval(), torch.randn(1, 3, 8)).skipped["0"]
    unbatched = Rewritten(nn.Sequential(nn.Conv1d(3, 4, 3)).eval(), torch.randn(3, 8))
    assert unbatched.skipped == {"0": "its input has shape (3, 8); add a batch dimension"}
    padded = nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")
    assert "add a batch dimension" in Rewritten(nn.Sequential(padded).eval(), torch.randn(3, 8)).skipped["0"]


def test_the_user_is_asked_about_the_module_that_he_knows() -> None:
    model = settled(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 4, 3, padding_mode="zeros")))
    asked: list[tuple[str, nn.Module]] = []

    def skip(name: str, module: nn.Module) -> bool:
        asked.append((name, module))
        return name == "1"

    request = Request(ON_CPU.device, "fp32", skip=skip)
    result = Rewritten(model, torch.randn(1, 3, 8), request=request)
    assert set(result.convs) == {"0"} and result.skipped == {"1": "you asked to skip it"}
    assert {(name, type(module)) for name, module in asked} == {("0", nn.Conv1d), ("1", nn.ConvTranspose1d)}


@pytest.mark.usefixtures("always_faster", "direct_wins")
def test_a_whole_conversion(tmp_path: Path) -> None:
    inputs = [torch.randn(n, 3, length) for n, length in ((2, 32), (1, 41), (3, 64), (0, 32))]
    fast = converted(settled(Stack()), inputs[0], tmp_path, *inputs[1:])
    assert set(fast.plan.layers) == {"stem.0", "first.0", "second.0", "gate", "up.0", "head"}
    assert not fast.plan.skipped
