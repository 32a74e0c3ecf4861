"""Random weights."""

from __future__ import annotations

from torch import nn


def with_he_weights(model: nn.Module) -> nn.Module:
    """Draws He-normal weights and zero biases; batch norms keep their identity default.

    The scale follows the fan-in because it alone is right for grouped and depthwise convolutions: PyTorch's fan-out
    ignores the groups, and a depthwise layer scaled by it shrinks its output by the square root of the channel count.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
