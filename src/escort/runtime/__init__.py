"""The program form of a converted network, and what runs it."""

from escort.runtime.capture import how_calls_run, not_capturable
from escort.runtime.graphs import Graphs
from escort.runtime.native.batching import Batching, Favor
from escort.runtime.program import Program, as_programs, programs_in, with_plain

__all__ = [
    "Batching",
    "Favor",
    "Graphs",
    "Program",
    "as_programs",
    "how_calls_run",
    "not_capturable",
    "programs_in",
    "with_plain",
]
