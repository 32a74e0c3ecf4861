"""The runner of a method for GPUs: it checks what it is given, allocates y, and launches a kernel of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from escort.cuda.launch import Grid
from escort.methods.base import MOST_BATCHES, Runner, aligned, input_check, output_strides
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat, Problem

#: The shape of y, the grid of the launch and what is passed behind it. No grid stands for a launch that is none.
_Batch = tuple[torch.Size, Grid | None, tuple[Any, ...]]


def runner(
    problem: Problem,
    launch: Callable[..., None],
    cut: Callable[[int], tuple[Any, ...]],
    *,
    most_samples: int,
    alignment: int,
    memory_format: MemoryFormat | None = None,
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Runner:
    """What runs a problem by a launch.

    What depends on the batch alone is worked out once per batch size: Python must not take longer to ask for a layer
    than a GPU to compute it.

    Args:
        launch: is given a grid, x, y, the residual or None, and what `cut` puts behind the grid.
        cut: the grid for a number of samples, and further arguments of the launch.
        most_samples: that the kernel can address.
        alignment: bytes of which the addresses of x and the residual must be multiples.
        memory_format: in which x, the residual and y lie, by default the problem's.
        arrange: takes x as it comes to what the launch is given; by default it is brought into the memory format.
    """
    check, dtype, device = input_check(problem, most_samples), problem.storage, torch.device(problem.device)
    torch_format = TORCH_MEMORY_FORMAT[memory_format or problem.memory_format]
    strides, out_shape = output_strides(problem, memory_format or problem.memory_format), problem.output_shape[1:]
    takes_residual = problem.epilogue.residual
    batches: dict[torch.Size, _Batch] = {}  # by the shape of x, which is right then

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return aligned(x.contiguous(memory_format=torch_format), alignment)

    def first(x: torch.Tensor, residual: torch.Tensor | None) -> _Batch:
        """The batch of a call, which is checked."""
        check(x, residual)
        grid, *further = cut(x.shape[0]) if len(x) else [None]
        if len(batches) >= MOST_BATCHES:
            batches.clear()
        batch = batches[x.shape] = torch.Size((x.shape[0], *out_shape)), grid, tuple(further)
        return batch

    arrange = arrange or laid_out

    def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        batch = batches.get(x.shape)
        if batch is None or x.dtype is not dtype or x.device != device or (residual is not None) is not takes_residual:
            batch = first(x, residual)
        shape, grid, further = batch
        y = x.new_empty_strided(shape, strides)
        if grid is None:
            return y
        if residual is not None:
            if residual.shape != shape or residual.dtype is not dtype or residual.device != device:
                check(x, residual)
            residual = laid_out(residual)
        launch(grid, arrange(x), y, residual, *further)
        return y

    return run
