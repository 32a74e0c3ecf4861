"""The program form of a converted network, and what runs it."""

from escort.runtime.program import Program, as_programs, with_plain

__all__ = ["Program", "as_programs", "with_plain"]
