"""Tracing: the graph computes what the model computes, or says why there is none, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from escort.network.trace import Untraceable, plain_copy, trace
from tests.network.patterns import SAMPLES, Net, masked


def test_the_callers_input_is_not_written_to_by_tracing() -> None:
    x = SAMPLES.clone()
    trace(Net(lambda net, x: net.conv(net.relu(x))), x)
    assert torch.equal(x, SAMPLES)


def test_an_assignment_that_fx_would_get_wrong_is_refused() -> None:
    def pattern(net: Any, x: Any) -> Any:
        y = z = net.conv(x)
        y += 1.0
        return z

    with pytest.raises(Untraceable, match="computes something else"):
        trace(Net(pattern), SAMPLES)


def test_a_pruned_model_can_be_copied_and_stays_pruned() -> None:
    net = Net(lambda net, x: net.conv(x))
    masked(net)
    copied = plain_copy(net)
    assert hasattr(net.conv, "weight_mask") and not hasattr(copied.conv, "weight_mask")
    assert isinstance(copied.conv.weight, nn.Parameter) and torch.equal(copied.conv.weight, net.conv.weight)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (lambda net, x: net.conv(x) if x.sum() > 0 else x, r"control flow \(at .*test_trace.py:\d+: .*x.sum\(\) > 0"),
        (lambda net, x: net.conv(torch.zeros(len(x), 3, 8, 8)), "len"),
        (lambda net, x: net.conv2(x), "to have 8 channels"),
        (lambda net, x: net.missing(x), "missing"),
    ],
)
def test_untraceable_models_say_why(pattern: Callable[[Any, Any], Any], reason: str) -> None:
    with pytest.raises(Untraceable, match=f"Net: .*{reason}"):
        trace(Net(pattern), SAMPLES)


def test_running_out_of_memory_is_no_reason_to_give_up_the_graph() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20 GiB"):
        trace(Large(), SAMPLES)


def test_an_input_by_name_keeps_its_name() -> None:
    class Named(Net):
        def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            y = self.conv(x) * scale
            return y if mask is None else y * mask

    model, mask = Named(lambda net, x: x), torch.rand(2, 1, 10, 9)
    graph_module = trace(model, SAMPLES, {"mask": mask})
    assert torch.equal(graph_module(SAMPLES, mask=mask), model(SAMPLES, mask=mask))
    inputs = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert inputs[0] == "x" and inputs[-1] == "mask"
    with torch.no_grad():
        assert not torch.equal(graph_module(SAMPLES, mask=2 * mask), model(SAMPLES, mask=mask))
