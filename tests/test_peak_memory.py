"""How much memory planning and converting take at most."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from escort.filter import SparseFilter
from escort.planner import cores, measure, planner
from escort.planner.measure import Allowance
from escort.problem import Problem
from tests.fakes import PROBLEM, Compiled, Fake, a_filter, plans_of


def test_the_allowance_is_of_what_torch_allocates_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = 1000
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(measure, "_MOST_AHEAD_BYTES", 500)
    allowance = Allowance("cuda:0")
    assert allowance.is_left
    allocated = 1499
    assert allowance.is_left
    allocated = 1500
    assert not allowance.is_left
    assert Allowance("cpu").is_left


@pytest.mark.parametrize(("is_left", "prepared"), [(True, 2), (False, 4)])
def test_beyond_the_allowance_candidates_are_compiled_ahead_and_packed_when_they_are_due(
    is_left: bool, prepared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Allowance, "is_left", is_left)
    planner._remembered.clear()
    compiled, other = Compiled(1.0, 1.0), Fake("other", lambda y: y)
    shown: list[tuple[int, int]] = []
    plans = plans_of(
        [(PROBLEM, a_filter(), None)], 1e3, lambda *counts: shown.append(counts), methods=[compiled, other]
    )
    (plan,) = plans
    assert compiled.prepared == prepared and other.prepared == 1 and shown[-1] == (2, 2)
    assert {candidate.method for candidate in plan.candidates if candidate.time_us} == {"compiled", "other"}


CONVERTING = """
import torch, escort
from torch import nn
from tests.network.models import pruned

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def layers(channels, count):
    return pruned(nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count))), 0.9)

escort.convert(layers(16, 2), torch.randn(1, 16, 8, 8))
network = layers(256, 8)
open("/proc/self/clear_refs", "w").write("5")  # the peak is that from here on
before = kilobytes("VmRSS")
escort.convert(network, torch.randn(1, 256, 8, 8))
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_converting_takes_a_few_copies_of_the_weights_and_the_candidates_of_one_layer() -> None:
    done = subprocess.run([sys.executable, "-c", CONVERTING], capture_output=True, text=True, check=True)
    layer = 256 * 256 * 9 * 4
    assert int(done.stdout) < 4 * 8 * layer + 20 * layer


@pytest.mark.gpu
def test_candidates_of_layers_to_come_take_bounded_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    planner._remembered.clear()
    most, threads = 32 << 20, 4
    monkeypatch.setattr(measure, "_MOST_AHEAD_BYTES", most)
    monkeypatch.setattr(cores, "count", lambda: threads)
    problem = Problem(1, 512, 14, 14, 512, (3, 3), padding=(1, 1, 1, 1), precision="fp16", device="cuda:0")
    layers = []
    for density in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):  # so that none takes over the plan of another
        weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < density)
        layers.append((problem, SparseFilter.from_dense(weight.half().float()), None))
    before, kept = torch.cuda.memory_allocated(), list[int]()

    def preparing(done: int, total: int) -> None:
        if done == total:
            kept.append(torch.cuda.memory_allocated() - before)

    plans = list(plans_of(layers, 0.0, preparing))
    assert len(plans) == len(layers) and kept[0] < most + threads * 2 * math.prod(problem.weight_shape) * 2
    assert all(sum(c.time_us is not None for c in plan.candidates) > 3 for plan in plans)
