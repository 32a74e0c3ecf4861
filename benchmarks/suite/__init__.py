"""Benchmark suites: the paper's layers, real patterns and whole networks, each raced against its rivals in one run.

A rival is timed only after its output was compared with a float64 reference, and every one that was timed is a row.
`layers` and `networks` measure, `narrowed` limits what is tried, `rows` has the result files.
"""

from __future__ import annotations

from benchmarks.suite.layers import Layer, as_taken, measure_layer, paper_layers, pattern_layers, random_filter
from benchmarks.suite.narrowed import Narrowed, narrowed
from benchmarks.suite.networks import RIVALS, dense_at_its_best, measure_network, prune_all_but_first
from benchmarks.suite.rows import WHOLE, Row, best_times, geometric_means, header, write_results

__all__ = [
    "RIVALS",
    "WHOLE",
    "Layer",
    "Narrowed",
    "Row",
    "as_taken",
    "best_times",
    "dense_at_its_best",
    "geometric_means",
    "header",
    "measure_layer",
    "measure_network",
    "narrowed",
    "paper_layers",
    "pattern_layers",
    "prune_all_but_first",
    "random_filter",
    "write_results",
]
