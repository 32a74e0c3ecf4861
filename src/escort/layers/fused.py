"""A convolution and what runs behind it, in plain torch: the unit that conversion replaces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort import reference
from escort.filter import SparseFilter
from escort.problem import Activation, Epilogue


class FusedConv2d(nn.Module):
    """``activation(conv(pad(x)) + residual)`` in plain torch.

    Attributes:
        conv: the convolution with any batch norm folded in; its tensors belong to this module alone.
        activation: what runs last; see :class:`escort.problem.Epilogue`.
        residual: whether `forward` takes a second operand.
        negative_slope: of "leaky_relu".
        slope: those of "prelu", (K,); None for other activations.
        zeros: (top, bottom, left, right) around x, beside the convolution's own padding.
        unfolded: the filter that the convolution had, where it has been changed since then; else None.
    """

    unfolded: SparseFilter | None = None
    slope: Tensor | None

    def __init__(
        self,
        conv: nn.Conv2d,
        activation: Activation = "none",
        residual: bool = False,
        negative_slope: float = 0.0,
        zeros: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        super().__init__()
        self.conv = conv
        self.residual = residual
        self.zeros = zeros
        self.register_buffer("slope", None)
        self.activate_by(activation, negative_slope)

    def activate_by(self, activation: Activation, negative_slope: float = 0.0, slope: Tensor | None = None) -> None:
        """Sets the activation. Raises ValueError where there is none such.

        Args:
            slope: those of "prelu", (K,) or (1,) for all channels; by default 0.25.
        """
        Epilogue(activation=activation, negative_slope=negative_slope)
        self.activation: Activation = activation
        self.negative_slope = negative_slope
        self.slope = None
        if activation == "prelu":
            weight = self.conv.weight
            slope = torch.tensor(0.25) if slope is None else slope.detach()
            self.slope = slope.to(weight.device, weight.dtype).expand(self.conv.out_channels).clone()

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.conv.bias is not None, self.residual, self.activation, self.negative_slope)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), residual and result: (N, K, out_height, out_width)."""
        top, bottom, left, right = self.zeros
        y: Tensor = self.conv(F.pad(x, (left, right, top, bottom)) if any(self.zeros) else x)
        if residual is not None:
            y = y + residual
        return reference.activate(y, self.epilogue, self.slope)

    def remember_weight(self) -> None:
        """Notes the filter as it is, unless an older one is known."""
        if self.unfolded is None:
            self.unfolded = SparseFilter.from_dense(self.conv.weight, self.conv.groups)

    def extra_repr(self) -> str:
        text = f"activation={self.activation}, residual={self.residual}"
        return text + (f", zeros={self.zeros}" if any(self.zeros) else "")
