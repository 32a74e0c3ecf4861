"""The runner that methods for GPUs share: what it checks, what it allocates, and what it asks for only once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from escort.cuda.launch import Grid
from escort.methods.base import MOST_BATCHES
from escort.methods.runner import runner
from escort.problem import Epilogue, Problem

PROBLEM = Problem(2, 4, 6, 5, 8, (3, 3), (1, 1), (1, 1, 1, 1), epilogue=Epilogue(residual=True))


class Launches:
    """What was launched, and for which numbers of samples a grid was worked out."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []
        self.cuts: list[int] = []

    def __call__(self, *args: Any) -> None:
        self.all.append(args)

    def cut(self, samples: int) -> tuple[Grid, int]:
        self.cuts.append(samples)
        return (samples, 1, 1), samples

    def runner(self, problem: Problem = PROBLEM, **options: Any) -> Any:
        return runner(problem, self, self.cut, **{"most_samples": 200, "alignment": 16, **options})


def tensors(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, 4, 6, 5), torch.randn(samples, 8, 6, 5)


def test_a_launch_gets_x_y_residual_and_what_depends_on_the_batch() -> None:
    launches = Launches()
    run = launches.runner()
    for samples in (2, 3, 2, 2, 3):
        x, residual = tensors(samples)
        y = run(x, residual)
        assert y.shape == (samples, 8, 6, 5) and y.is_contiguous()
        grid, *given, further = launches.all[-1]
        assert (grid, further) == ((samples, 1, 1), samples)
        assert all(a is b for a, b in zip(given, (x, y, residual), strict=True))
    assert launches.cuts == [2, 3]


def test_no_sample_is_no_launch() -> None:
    launches = Launches()
    run = launches.runner()
    for _ in range(2):
        assert run(*tensors(0)).shape == (0, 8, 6, 5)
    assert not launches.all and not launches.cuts


def test_tensors_are_laid_out_and_aligned() -> None:
    launches = Launches()
    run = launches.runner()
    x, residual = (
        torch.randn(1 + 2 * 120)[1:].view(2, 4, 6, 5),
        tensors(2)[1].contiguous(memory_format=torch.channels_last),
    )
    assert x.data_ptr() % 16
    run(x, residual)
    _, got, _, added, _ = launches.all[0]
    assert torch.equal(got, x) and not got.data_ptr() % 16
    assert torch.equal(added, residual) and added.is_contiguous()
    Launches.runner(launches, arrange=lambda x: x + 1.0)(x, residual)
    assert torch.equal(launches.all[1][1], x + 1.0)


@pytest.mark.parametrize("is_known", [False, True], ids=["first", "known"])
def test_what_the_kernel_was_not_prepared_for_is_refused(is_known: bool) -> None:
    launches = Launches()
    run = launches.runner()
    x, residual = tensors(2)
    if is_known:
        run(x, residual)
    count = len(launches.all)
    for wrong in ((x.half(), residual), (x.to("meta"), residual), (x[:, :3], residual)):
        with pytest.raises(ValueError, match="prepared for float32 inputs"):
            run(*wrong)
    with pytest.raises(ValueError, match="prepared for a residual"):
        run(x)
    for added in (residual.half(), residual[:1], residual.to("meta"), residual[..., :4]):
        with pytest.raises(ValueError, match="a residual is float32"):
            run(x, added)
    with pytest.raises(ValueError, match="200 samples"):
        run(*tensors(201))
    assert len(launches.all) == count


def test_few_batches_are_remembered() -> None:
    launches = Launches()
    run = launches.runner()
    for samples in (*range(1, MOST_BATCHES + 2), 1, 1):
        run(*tensors(samples))
    assert launches.cuts == [*range(1, MOST_BATCHES + 2), 1]
