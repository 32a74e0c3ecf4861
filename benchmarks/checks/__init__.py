"""Committed results held against this machine: a random sample of what a folder says, measured again.

`sample` finds what files say and draws of it, `again` measures by the code that made the rows, `differences` judges.
"""

from __future__ import annotations

from benchmarks.checks.again import Bench, NotHereError, measure_again, why_not_here
from benchmarks.checks.differences import Difference, Limits, Verdict, differences_of, verdicts
from benchmarks.checks.sample import Drawn, Key, Subject, draw, quoted, subjects_of

__all__ = [
    "Bench",
    "Difference",
    "Drawn",
    "Key",
    "Limits",
    "NotHereError",
    "Subject",
    "Verdict",
    "differences_of",
    "draw",
    "measure_again",
    "quoted",
    "subjects_of",
    "verdicts",
    "why_not_here",
]
