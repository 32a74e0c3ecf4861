"""The program form of a converted network, and what runs it."""

from escort.runtime.capture import how_calls_run, not_capturable
from escort.runtime.graphs import Graphs
from escort.runtime.program import Program, as_programs, with_plain

__all__ = ["Graphs", "Program", "as_programs", "how_calls_run", "not_capturable", "with_plain"]
