"""A study's results for readers: tables and plots by name, and documents that hold the tables.

No number is written by hand: documents name a table, and :func:`render` puts it there.
"""

from __future__ import annotations

from benchmarks.exhibits.catalogue import plots, tables
from benchmarks.exhibits.documents import illustrations, render

__all__ = ["illustrations", "plots", "render", "tables"]
