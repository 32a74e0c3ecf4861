"""What is said of two models on a user's data."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import escort


class Scaled(nn.Module):
    """Returns its input, and its input times a factor, which may differ for one sample."""

    def __init__(self, factor: float = 1.0, sample: int | None = None) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.sample = sample
        self.seen = 0

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        factors = torch.ones(len(x), 1)
        if self.sample is None:
            factors[:] = self.factor
        elif self.seen <= self.sample < self.seen + len(x):
            factors[self.sample - self.seen] = self.factor
        self.seen += len(x)
        return x, {"scaled": x * factors}


def test_errors_are_of_samples_and_outputs() -> None:
    loader = [torch.randn(4, 5), torch.randn(3, 5)]
    found = escort.compare(Scaled().eval(), Scaled(-0.5, sample=5).eval(), loader)
    assert found.samples == 7
    same, scaled = found.outputs
    assert (same.largest_error, same.mean_error, same.top1_agreement) == (0.0, 0.0, 1.0)
    assert scaled.largest_error == pytest.approx(1.5) and scaled.mean_error == pytest.approx(1.5 / 7)
    assert scaled.worst_sample == 5, "counted through all batches"
    assert scaled.top1_agreement == pytest.approx(6 / 7)
    assert scaled.shape == (4, 5)


def test_a_table_says_it() -> None:
    lines = str(escort.compare(Scaled().eval(), Scaled(1.25).eval(), [torch.randn(4, 5)]))
    assert "100.00 %" in lines and "2.5e-01" in lines and "4 samples" in lines


def test_pixels_have_classes_too() -> None:
    x = torch.zeros(1, 2, 1, 4)
    x[0, 1] = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    other = nn.Threshold(0.0, 2.0).eval()  # zeros and negative numbers become 2
    assert escort.compare(nn.Identity().eval(), other, [x]).outputs[0].top1_agreement == 0.5


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ([torch.ones(2, 3), torch.tensor([0, 1])], None),  # as a DataLoader makes it of images and labels
        ({"image": torch.ones(2, 3)}, lambda batch: batch["image"]),
        (torch.ones(2, 3), None),
        ((torch.ones(2, 3), torch.tensor([0, 1])), None),  # as other loaders do
        (((torch.ones(2, 3),), torch.tensor([0, 1])), None),  # all arguments, and labels
    ],
)
def test_batches_as_loaders_have_them(batch: Any, inputs: Any) -> None:
    assert (
        escort.compare(nn.Identity().eval(), nn.Identity().eval(), [batch] * 3, inputs=inputs, batches=2).samples == 4
    )


def test_each_model_gets_its_own_type() -> None:
    model = nn.Linear(3, 2).eval()
    half = nn.Linear(3, 2).eval()
    half.load_state_dict(model.state_dict())
    found = escort.compare(model, half.to(torch.bfloat16), [torch.randn(8, 3)]).outputs[0]
    assert 1e-4 < found.largest_error < 0.1


def test_a_converted_model_is_close() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    escort.prune.uniform(model, 0.8)
    escort.prune.make_permanent(model)
    fast = escort.convert(copy.deepcopy(model).bfloat16(), torch.randn(2, 3, 12, 12).bfloat16())
    (output,) = escort.compare(model, fast, [torch.randn(3, 3, 12, 12)]).outputs
    assert 0.0 < output.largest_error < 0.1, "inputs were given to it in its type"


def test_numbers_that_are_none() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0.5, torch.nan, x)

    x = torch.tensor([[0.0, 1.0], [0.25, 0.5]])
    found = escort.compare(nn.Identity().eval(), Broken().eval(), [x]).outputs[0]
    assert math.isinf(found.largest_error) and found.worst_sample == 0
    both = escort.compare(Broken().eval(), Broken().eval(), [x]).outputs[0]
    assert both.largest_error == 0.0, "the same at the same places is right"
    assert both.top1_agreement == 1.0, "of the sample that has a largest class"
    with pytest.raises(
        ValueError, match="of 2 samples the model makes no finite number, so that nothing can be judged"
    ):
        escort.compare(Broken().eval(), Broken().eval(), [x + 1.0])


def test_what_is_refused() -> None:
    same = nn.Identity().eval()
    with pytest.raises(ValueError, match="fast is in training mode"):
        escort.compare(same, nn.Identity(), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="returns 2 tensors, fast 1"):
        escort.compare(Scaled().eval(), same, [torch.ones(1, 2)])
    with pytest.raises(ValueError, match=r"batch 0: output 0 of the model has shape \(1, 2\), that of fast \(1, 1\)"):
        escort.compare(same, nn.Linear(2, 1).eval(), [torch.ones(1, 2)])


@pytest.mark.parametrize(
    ("loader", "options", "error", "says"),
    [
        ([], {}, ValueError, "the loader has no batch"),
        ([torch.ones(1, 2)], {"batches": 0}, ValueError, "batches is how many to take, got 0"),
        ([torch.ones(1, 2)], {"batches": 1.5}, TypeError, "batches is how many to take, a whole number, got 1.5"),
        (torch.ones(1, 2), {}, TypeError, r"got a tensor; pass a list with it in it, \[x\]"),
        (TensorDataset(torch.ones(1, 2)), {}, TypeError, "the samples of a TensorDataset; pass a DataLoader of it"),
        (7, {}, TypeError, "loader has batches, got int"),
        ({"image": torch.ones(1, 2)}, {}, TypeError, "loader has batches, got dict"),
        (["image.png"], {}, TypeError, "batch 0: .* with the batch itself, and there is no tensor in 'image.png'"),
        ([("image.png", torch.ones(2))], {}, TypeError, "with the first item of a tuple, and there is no tensor"),
        ([torch.ones(1, 2)], {"inputs": lambda batch: None}, TypeError, "with what inputs.batch. returns"),
        (
            [(torch.ones(1, 2), torch.ones(1, 2))],
            {"inputs": tuple},
            ValueError,
            "batch 0: model does not take .*inputs=",
        ),
        ([{"image": torch.ones(1, 2)}], {}, ValueError, "batch 0: model does not take .*'image'"),
    ],
)
def test_loaders_that_are_refused(loader: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    same = nn.Linear(2, 2).eval()
    with pytest.raises(error, match=says):
        escort.compare(same, same, loader, **options)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="fast is a model, got str; a file's comes from escort.load"):
        escort.compare(nn.Identity().eval(), "model.escort", [torch.ones(1, 2)])  # type: ignore[arg-type]
