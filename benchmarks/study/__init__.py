"""The Escoin paper's study (arXiv 1802.10280) on one device, one function per question.

A question is a list of items, an item a few rows that are raced in one go after their outputs were checked. A question
at one precision is one result file, written anew after every item: a study that was cut off goes on where it stopped.
:mod:`benchmarks.findings` says what the rows mean.
"""

from __future__ import annotations

from benchmarks.study.ablation import ablate, count
from benchmarks.study.inference import CAP, race_inference, rivals
from benchmarks.study.layers import compare, compare_on_patterns, find_break_even, in_order_of_channels_last
from benchmarks.study.networks import break_down, parts_of_layer, parts_of_network, pruned, sweep_networks
from benchmarks.study.questions import COUNTERS, PAPER_QUESTIONS, QUESTIONS, Part, plan, run
from benchmarks.study.study import SPARSITIES, Study

__all__ = [
    "CAP",
    "COUNTERS",
    "PAPER_QUESTIONS",
    "QUESTIONS",
    "SPARSITIES",
    "Part",
    "Study",
    "ablate",
    "break_down",
    "compare",
    "compare_on_patterns",
    "count",
    "find_break_even",
    "in_order_of_channels_last",
    "parts_of_layer",
    "parts_of_network",
    "plan",
    "pruned",
    "race_inference",
    "rivals",
    "run",
    "sweep_networks",
]
