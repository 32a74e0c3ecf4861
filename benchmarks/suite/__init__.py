"""Benchmark suites: the paper's layers, real patterns and whole networks, each raced against its rivals in one run.

A rival is timed only after its output was compared with a float64 reference, and every one that was timed is a row.
`layers`, `patterns` and `subjects` have the layers and networks. `race`, `networks`, `speed` and `conversions` measure,
the last in processes that run `fresh`; `by_method` makes networks whose layers run by one method, `ranking` examines
how the planner measures. `limited` limits what is tried, `rows` has the result files.
"""

from __future__ import annotations

from benchmarks.suite.conversions import SEARCH_S, Conversion, measure_calls, measure_choices, measure_conversion
from benchmarks.suite.layers import Layer, paper_layers, paper_layers_by_name, random_filter
from benchmarks.suite.limited import Limited, limited
from benchmarks.suite.networks import BOTH_FORMATS, BY_METHOD, RIVALS, NetworkRace, measure_network
from benchmarks.suite.patterns import pattern_layers
from benchmarks.suite.race import as_taken, measure_layer
from benchmarks.suite.ranking import Ranked, rank
from benchmarks.suite.rows import WHOLE, Row, best_times, config_of, geometric_means, header, write_results
from benchmarks.suite.speed import measure_speed
from benchmarks.suite.subjects import Subject, prune_all_but_first, prune_to_patterns

__all__ = [
    "BOTH_FORMATS",
    "BY_METHOD",
    "RIVALS",
    "SEARCH_S",
    "WHOLE",
    "Conversion",
    "Layer",
    "Limited",
    "NetworkRace",
    "Ranked",
    "Row",
    "Subject",
    "as_taken",
    "best_times",
    "config_of",
    "geometric_means",
    "header",
    "limited",
    "measure_calls",
    "measure_choices",
    "measure_conversion",
    "measure_layer",
    "measure_network",
    "measure_speed",
    "paper_layers",
    "paper_layers_by_name",
    "pattern_layers",
    "prune_all_but_first",
    "prune_to_patterns",
    "random_filter",
    "rank",
    "write_results",
]
