"""Settings of torch that say how it computes float32 on GPUs, made for a while and then given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from escort.problem import Precision


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Makes torch's float32 matrix products on GPUs exact, or TF32 where that is the precision.

    The setting belongs to the process: other threads see it meanwhile, and the user's choice comes back at the end.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        with _fp32_precision(torch.backends.cuda.matmul, precision):
            yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def float32_settings() -> tuple[Any, ...]:
    """What torch's settings say of float32 products and convolutions on GPUs, as values to compare."""
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        setting = torch._C._get_fp32_precision_getter
        return setting("cuda", "matmul"), setting("cuda", "conv")
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@contextmanager
def float32_convolutions(precision: Precision) -> Iterator[None]:
    """Makes torch's own float32 convolutions on GPUs exact, or TF32, as :func:`float32_products` does for products."""
    if hasattr(torch.backends.cudnn, "conv"):
        with _fp32_precision(torch.backends.cudnn.conv, precision):
            yield
        return
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _fp32_precision(operators: Any, precision: Precision) -> Iterator[None]:
    """Torch 2.9 and later have a setting per kind of operator; where a user set it, the older ones may not be read."""
    before = operators.fp32_precision
    try:
        operators.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        operators.fp32_precision = before
