"""A method offers what its search finds, and nothing that it could not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from escort.cuda.gpu import H200, Gpu
from escort.filter import SparseFilter
from escort.methods import METHODS, Method, by_name
from escort.problem import MemoryFormat, Precision, Problem

PROBLEMS = (
    Problem(2, 64, 28, 28, 128, (3, 3), padding=(1, 1, 1, 1), device="cuda:0"),
    Problem(32, 256, 14, 14, 256, (1, 1), device="cuda:0"),
    Problem(1, 64, 64, 64, 64, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3), device="cuda:0"),
)
CASES: tuple[tuple[str, Precision, MemoryFormat, dict[str, Any]], ...] = (
    ("direct", "fp32", "contiguous", {"words": 11, "stages": 99, "balanced": False, "packed": True}),
    ("direct", "fp16", "contiguous", {"words": 11, "channel_block": 2, "balanced": False}),
    ("generated", "fp32", "contiguous", {"out_channels": 7, "stages": 99, "sums": 9, "start_points": 3}),
    ("generated", "fp16", "contiguous", {"consumers": 99, "copy": 3}),
    ("sparse_tc", "fp16", "contiguous", {"pixels": 8, "cluster": 3, "memory_format": "channels_last"}),
    ("sparse_tc", "tf32", "channels_last", {"across": 3, "m_blocks": 0, "samples": 99, "tap_group": "none"}),
    ("stem", "fp16", "channels_last", {"rows": 3, "octets": 9}),
    ("cudnn", "fp32", "contiguous", {"memory_format": "none"}),
)
ON_CPUS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("direct", {"isa": ["mmx"], "vectors": [0, 99], "channel_block": [0, 65], "parts": [0, 65]}),
    ("depthwise", {"isa": ["mmx"], "rows": [0, 9], "stage": [0, 1 << 20], "planes": [0, 3]}),
)


@pytest.fixture
def method_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Gpu, "of", lambda device: H200)
    return lambda name: by_name(name, "cuda:0")


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(("name", "precision", "memory_format", "changes"), CASES)
def test_what_is_found_is_offered_and_nothing_that_cannot_be(
    method_of: Any,
    problem: Problem,
    name: str,
    precision: Precision,
    memory_format: MemoryFormat,
    changes: dict[str, Any],
) -> None:
    method: Method = method_of(name)
    problem = replace(problem, precision=precision, memory_format=memory_format)
    if name == "stem":
        problem = replace(problem, in_channels=3)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(problem.weight_shape, generator=generator)
    sparse_filter = SparseFilter.from_dense(weight * (torch.rand(weight.shape, generator=generator) < 0.1))
    configs = method.configs(problem, sparse_filter)
    assert configs and all(method.offers(problem, sparse_filter, config) for config in configs)
    for knob, value in changes.items():
        assert not method.offers(problem, sparse_filter, replace(configs[0], **{knob: value})), knob


@pytest.mark.parametrize("problem", [Problem(2, 64, 28, 28, 64, (3, 3)), Problem(1, 8, 7, 7, 8, (3, 3))], ids=str)
@pytest.mark.parametrize(("name", "changes"), ON_CPUS)
def test_methods_of_cpus_offer_what_any_number_of_threads_finds(
    problem: Problem, name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = by_name(name)
    if name == "depthwise":
        problem = replace(problem, groups=problem.in_channels)
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape), problem.groups)
    for threads in (16, 1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        configs = method.configs(problem, sparse_filter)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert configs and all(method.offers(problem, sparse_filter, config) for config in configs)
    for knob, values in changes.items():
        for value in values:
            assert not method.offers(problem, sparse_filter, replace(configs[0], **{knob: value})), knob


def test_the_cases_are_of_all_methods_that_have_a_check_of_their_own() -> None:
    own = {method.name for method in METHODS if type(method).offers is not Method.offers}
    assert own <= {case[0] for case in (*CASES, *ON_CPUS)}
