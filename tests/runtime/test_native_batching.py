"""However samples go through native segments, they come out the same, and in memory for a few of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort.kernels import _cpu
from escort.runtime import Batching, Favor, Program
from escort.runtime.native import Native
from tests.at_once import at_once
from tests.network.models import Small, pruned
from tests.runtime.test_native import BY_TORCH, OPERATIONS, SMALL, Net, converted, images, net_for, program_of, same

#: Those whose samples are not known to be apart: they join along the samples, as the batch lies in memory.
TOGETHER = {"permuted operands", "concatenation along other axes"}
BATCHINGS = [Batching(samples, favor) for samples in (1, 2, 3) for favor in ("latency", "throughput")]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def chunks(program: Program) -> int:
    """In how many chunks a batch went through the program that was called last."""
    chunks: int = program.native.stats()["forms"][-1]["chunks"]
    return chunks


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_by_chunks(name: str) -> None:
    x = images(5)
    model = net_for(name, x)
    program, expected = program_of(model), model(x)
    for batching in BATCHINGS:
        program.native.batching = batching
        same(program(x), expected)
        assert batching.samples is not None
        assert name in BY_TORCH | TOGETHER or chunks(program) == -(-5 // batching.samples)


@pytest.mark.parametrize("favor", ["latency", "throughput"])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_a_network_by_chunks(threads: int, favor: Favor, samples: int) -> None:
    """Of one sample up to more than two for each thread, with every rest."""
    fast = converted(pruned(Small()), SMALL)
    for batch in (1, 2, 3, 4, 5, 7, 8, 13):
        x = images(batch, 3, 16, 16)
        fast.network.native = Native()
        expected = fast(x)
        fast.network.native = Native(batching=Batching(samples, favor))
        for _ in range(2):
            same(fast(x), expected)
        assert chunks(fast.network) == -(-batch // samples)


TOGETHER_CASES: dict[str, Callable[[Any, Tensor], Any]] = {
    "samples in another order": lambda m, x: F.relu(x).permute(1, 0, 2, 3).contiguous() * 2,
    "samples beside channels": lambda m, x: F.relu(x) * (F.relu(x) + 1).permute(1, 0, 2, 3),
    "one for all": lambda m, x: F.relu(x) + F.relu(x)[:1] * 2,
    "a rest of samples": lambda m, x: F.relu(x)[1:] * 2 - F.relu(x * 3)[:-1],
    "samples that broadcasting mixes": lambda m, x: x.mean((2, 3))[:, :, None] + x.mean((2, 3)),
    "rows that are a batch of their own": lambda m, x: (
        F.relu(F.relu(x).view(2, 27, 66)) + F.relu(x).view(27, 2, 66)[:1, :1]
    ),
}


@pytest.mark.parametrize("name", TOGETHER_CASES)
def test_samples_that_depend_on_each_other_stay_together(name: str) -> None:
    x = images(6)
    model = Net(TOGETHER_CASES[name])
    program = program_of(model)
    for batching in BATCHINGS:
        program.native.batching = batching
        same(program(x), model(x))
        assert chunks(program) == 1


def test_some_steps_may_be_of_several_shares_of_a_sample() -> None:
    """A linear layer on each of some rows of a sample has more samples than the batch."""
    model = Net(lambda m, x: m.head(F.relu(x)).flatten(1) + 1, head=nn.Linear(11, 4))
    program, x = program_of(model), images(5)
    for batching in BATCHINGS:
        program.native.batching = batching
        same(program(x), model(x))
        assert chunks(program) == -(-5 // (batching.samples or 5))


def test_pairs_of_samples_may_be_apart() -> None:
    model = Net(lambda m, x: F.relu(F.relu(x).view(3, 2, 6, 9, 11)[:, 0]) + 1)
    program, x = program_of(model), images(6)
    for batching in BATCHINGS:
        program.native.batching = batching
        same(program(x), model(x))
        assert chunks(program) == -(-3 // (batching.samples or 3))


def test_inputs_may_lie_apart(threads: int) -> None:
    x = images(8, 12)[::2, 3:9]
    model = net_for("max pooling", x)
    program = program_of(model)
    program.native.batching = Batching(1, "throughput")
    same(program(x), model(x))
    assert chunks(program) == 4


def test_memory_is_that_of_a_chunk() -> None:
    x = images(8, 6, 32, 32)
    program = program_of(Net(lambda m, x: [x := F.relu(x * 2 - 1) for _ in range(4)][-1]))
    of_samples = {}
    for samples in (None, 1, 2, 8, 50):
        program.native.batching = Batching(samples, "throughput")
        program(x)
        of_samples[samples] = program.native.stats()["forms"][-1]["bytes"]
    one = 2 * 4 * x[0].numel()
    assert of_samples == {None: 8 * one, 1: one, 2: 2 * one, 8: 8 * one, 50: 8 * one}


def test_threads_that_call_at_once_share_batchings(threads: int) -> None:
    fast = converted(pruned(Small()), SMALL)
    inputs = [images(2 + i, 3, 16, 16) for i in range(6)]
    expected = [fast(x) for x in inputs]
    fast.network.native.batching = Batching(1, "throughput")

    def call(x: Tensor, wanted: Tensor) -> None:
        torch.set_num_threads(threads)
        with torch.no_grad():
            for _ in range(20):
                same(fast(x), wanted)

    at_once(call, zip(inputs, expected, strict=True))


def test_a_batching_is_kept_by_copies() -> None:
    program = program_of(net_for("relu", SMALL))
    program.native.batching = Batching(2, "throughput")
    assert pickle.loads(pickle.dumps(program.native)).batching == Batching(2, "throughput")


def test_chunks_are_checked() -> None:
    relu, place = _cpu.Elementwise("first", 1, 0.0, [6], [1], []), (0, 0, 6)
    for samples, chunk in ((2, 0), (2, 3), (0, 1), (4, 1)):  # the last: six samples are no multiple
        with pytest.raises(ValueError):
            _cpu.NativeProgram([(relu, 6, [place], (1, 0, 6))], 2, 0, samples, chunk)
    with pytest.raises(ValueError, match="outside"):  # an arena for one sample, chunks of two
        _cpu.NativeProgram([(relu, 6, [place], (2, 0, 6))], 2, 6, 6, 2)
