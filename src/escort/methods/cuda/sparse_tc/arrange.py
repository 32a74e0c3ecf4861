"""Arranging x in NCHW as tensor cores read it (kernels/cuda/sparse_tc_arrange.cu)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from escort.cuda.kernel import kernel
from escort.filter import IntArray
from escort.methods.base import aligned
from escort.methods.cuda.sparse_tc.config import Element
from escort.problem import Problem

_THREADS, _MOST_PIXELS = 256, 128  # of a block


def arranger(
    problem: Problem, element: Element, in_order: IntArray, device: torch.device
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Binary]:
    """What takes x (N, C, H, W) to (N, H * W, places), with channel in_order[i] in place i, and zeros where it is -1.

    TF32 is rounded to the nearest on the way. The binary is that of the kernel.
    """
    plane, places = problem.height * problem.width, len(in_order)
    vector, strips, strip = cut_into_strips(plane, element)
    variant = arranging_kernel(problem, element)
    compiled = kernel(variant.source, variant.defines, device)
    fixed = torch.from_numpy(in_order).to(device), problem.in_channels, plane, strips, strip
    launch = compiled.bind(_THREADS, 0, (torch.Tensor, torch.Tensor, *fixed), overlap=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = aligned(x.contiguous(), element.bytes * vector)
        samples = x.shape[0]
        arranged = x.new_empty_strided((samples, plane, places), (plane * places, places, 1))
        launch((samples * strips, places // element.k_block, 1), x, arranged)
        return arranged

    return run, compiled.binary


def arranging_kernel(problem: Problem, element: Element) -> Variant:
    """What :func:`arranger` launches."""
    vector, *_ = cut_into_strips(problem.height * problem.width, element)
    return Variant("sparse_tc_arrange.cu", {"BYTES": element.bytes, "VECTOR": vector})


def cut_into_strips(plane: int, element: Element) -> tuple[int, int, int]:
    """Elements that are read at once, the strips of a plane, and the elements of each but the last, a multiple of 8."""
    least = -(-plane // _MOST_PIXELS)
    strip = -(-plane // (least * 8)) * 8
    return element.vector(plane), -(-plane // strip), strip
