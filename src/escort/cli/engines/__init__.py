"""A network on the CPU in several engines, each alone: in a process of its own, engines taking turns by process.

Two engines in one process, or in two at a time, disturb each other: threads of one that wait by spinning hold the cores
of the other, and each finds the caches full of the other's weights. `engine` says what an engine loads and writes that
to files, `turns` starts the processes and judges what comes back, `worker` is what runs in them, and `placement` says
on which cores.
"""

from __future__ import annotations

from escort.cli.engines.engine import ENGINES, Bench, Engine
from escort.cli.engines.placement import placed_on
from escort.cli.engines.turns import DISTURBED, Result, Turns, take_turns

__all__ = ["DISTURBED", "ENGINES", "Bench", "Engine", "Result", "Turns", "placed_on", "take_turns"]
