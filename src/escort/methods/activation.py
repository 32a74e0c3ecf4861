"""What kernels are told of activations: slopes, and on GPUs whether one bounds, as a parameter, or is compiled in."""

from __future__ import annotations

import torch

from escort.problem import Activation, Epilogue, Problem

#: What bounds, by the number that kernels know it by.
_BOUNDS: dict[Activation, int] = {"none": 0, "relu": 1, "relu6": 2}

#: Instructions of each of the others in kernels/cuda/activation.cuh, and how many of them are for the unit for special
#: functions: where results are rounded to 16 bits, and in float32.
INSTRUCTIONS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "leaky_relu": ((2, 0), (2, 0)),
    "hardsigmoid": ((3, 0), (3, 0)),
    "hardswish": ((4, 0), (4, 0)),
    "sigmoid": ((4, 2), (4, 2)),
    "tanh": ((1, 1), (15, 2)),
    "silu": ((3, 1), (5, 2)),
    "gelu": ((18, 2), (18, 2)),
    "gelu_tanh": ((8, 2), (8, 2)),
}
#: Instructions that a multiprocessor issues for a thread each per clock, and those of them for that unit.
RATE, _SPECIAL_RATE = 128, 16


def bound(epilogue: Epilogue) -> int:
    """How an epilogue bounds: 0 not at all, 1 from below by 0 (ReLU), 2 also from above by 6 (ReLU6)."""
    return _BOUNDS.get(epilogue.activation, 0)


def compiled_in(epilogue: Epilogue) -> str | None:
    """The name of the activation that a kernel is compiled with, None where it only bounds."""
    if epilogue.activation in _BOUNDS:
        return None
    return "leaky_relu" if epilogue.activation == "prelu" else epilogue.activation  # whose slopes are a table


def macros(epilogue: Epilogue) -> dict[str, str]:
    """The macro that says so."""
    name = compiled_in(epilogue)
    return {} if name is None else {"ACTIVATION": name}


def slopes(problem: Problem, slope: torch.Tensor | None) -> torch.Tensor | None:
    """Those of each output channel, (K,) float32 on the CPU; None where the activation has none.

    Args:
        slope: (K,) on any device, where the activation is "prelu".
    """
    match problem.epilogue.activation:
        case "leaky_relu":
            return torch.full((problem.out_channels,), problem.epilogue.negative_slope)
        case "prelu":
            assert slope is not None
            return slope.detach().float().cpu()
    return None


def per_channel(problem: Problem, bias: torch.Tensor | None, slope: torch.Tensor | None) -> torch.Tensor | None:
    """The bias of each output channel, and behind them the slopes, on the device; None where there are neither."""
    of_channels = slopes(problem, slope)
    if bias is None and of_channels is None:
        return None
    offsets = torch.zeros(problem.out_channels) if bias is None else bias.detach().float().cpu()
    return (offsets if of_channels is None else torch.cat([offsets, of_channels])).to(problem.device)


def clocks(problem: Problem) -> float:
    """What a result's activation takes of a multiprocessor, beside what a bound takes: an estimate, not measured."""
    if (name := compiled_in(problem.epilogue)) is None:
        return 0.0
    instructions, special = INSTRUCTIONS[name][problem.storage.itemsize == 4]
    return max(instructions / RATE, special / _SPECIAL_RATE)
