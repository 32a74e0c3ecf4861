"""Convolutions, machines and times in a few words, for tables."""

from __future__ import annotations

from escort.planner.machine import Machine
from escort.problem import Problem


def machine_line(machine: Machine) -> str:
    """What a measurement was made on, in a few words."""
    host = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    if machine.cuda:
        host = f"driver {machine.driver}, CUDA {machine.cuda}"
    return f"{machine.device}, {machine.isa}, {host}, torch {machine.torch}"


def convolution(p: Problem) -> str:
    """A convolution in a few words: channels, kernel_size, input size, stride and groups."""
    text = f"{p.in_channels}->{p.out_channels} {p.kernel_size[0]}x{p.kernel_size[1]}, {p.height}x{p.width}"
    if p.stride != (1, 1):
        text += f" /{p.stride[0]}" if p.stride[0] == p.stride[1] else f" /{p.stride[0]},{p.stride[1]}"
    return text + (f", {p.groups} groups" if p.groups > 1 else "")


def microseconds(time_us: float | None) -> str:
    """A time in us without its unit; "-" for None."""
    if time_us is None:
        return "-"
    return f"{time_us:,.0f}" if time_us >= 10 else f"{time_us:.1f}"


def percent(share: float | None) -> str:
    """A share of zeros; a tenth of a percent is told where few weights are left."""
    return "-" if share is None else f"{share:.0%}" if share < 0.985 else f"{share:.1%}"


def ratio(slow_us: float | None, fast_us: float | None) -> str:
    """How many times as long one takes as the other; "-" where a time is not known."""
    return f"{slow_us / fast_us:.2f}x" if slow_us and fast_us else "-"
