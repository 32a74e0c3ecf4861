"""The whole way on real data: train a small CNN on handwritten digits, prune it, convert it, and compare.

The digits (1,797 scans of 8 x 8 pixels, UCI Machine Learning Repository) ship inside scikit-learn. No number here is
fixed in advance: accuracies and times are whatever this machine measures.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import escort
from escort import prune, reference, report
from escort.cli import rivals
from escort.cli.console import note_if_busy, progress
from escort.network.model import ConvertedModel
from escort.network.plan import plan_table
from escort.network.wording import machine_line
from escort.planner import timing
from escort.planner.machine import Machine
from escort.report import Console

#: The convolution that reads the picture stays dense, as is usual: it has few weights, and everything depends on them.
FIRST_CONVOLUTION = "stem.0"
BATCHES = (1, 8, 64)
#: The batch that the network is planned for and that the one ``speedup`` of the summary is about.
PLANNED_BATCH = 8


@dataclass(frozen=True)
class Recipe:
    """How much work the demo does.

    Attributes:
        size: digits are scaled to (size, size) pixels.
        width: channels before the stride, twice as many behind it.
        sparsity: share of zeros over all convolutions in the end.
        epochs, finetune_epochs: over the training part, before pruning and while pruning and recovering.
        timing_s: most seconds of timing per batch size.
    """

    size: int = 16
    width: int = 64
    epochs: int = 3
    finetune_epochs: int = 4
    batch: int = 32
    learning_rate: float = 2e-3
    sparsity: float = 0.9
    timing_s: float = 2.0


FULL = Recipe()
QUICK = Recipe(size=8, width=16, epochs=2, finetune_epochs=2, timing_s=0.2)


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 1, size, size) float32 in [-0.5, 0.5] and labels (n,) from 0 to 9, in two parts without overlap."""

    train_pictures: Tensor
    train_labels: Tensor
    held_out_pictures: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class Epoch:
    """Where a network stood after an epoch, as shares: held-out accuracy, and zeros in its convolutions."""

    accuracy: float
    sparsity: float


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class DigitNet(nn.Module):
    """Six convolutions (stem, residual block, stride, residual block), the mean over pixels, a classifier.

    Example:
        >>> DigitNet(width=64)(torch.randn(8, 1, 16, 16)).shape
        torch.Size([8, 10])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(1, width)
        self.block1 = Residual(width)
        self.down = _conv_bn_relu(width, 2 * width, stride=2)
        self.block2 = Residual(2 * width)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.down(self.block1(self.stem(x))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def load_digits(size: int, seed: int = 0) -> Digits:
    """Three quarters of the digits to train on and one quarter held out, each with its share of every digit."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn: pip install escort-sparse[demo]") from error
    data = datasets.load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0 - 0.5
    pictures = F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, held_out = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=data.target)
    return Digits(pictures[train], labels[train], pictures[held_out], labels[held_out])


def run_demo(out: Path, *, seed: int = 0, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Train, prune, convert, evaluate and time; write ``summary.json``, ``report.html`` and ``model.escort``.

    Args:
        out: the folder for the files; made where it does not exist.
        seed: of the split, the first weights and the order of the digits.
        quick: a far smaller network for a few seconds, to see that everything works; its speed means nothing.

    Returns:
        What ``summary.json`` holds. Shares are in [0, 1], times in microseconds.

    Raises:
        ImportError: without the packages of the ``demo`` extra.
        OSError: where `out` cannot be written.
        RuntimeError: if the converted network does not compute what the pruned one computes.
    """
    console = console or Console()
    recipe = QUICK if quick else FULL
    report.require_matplotlib()
    digits = load_digits(recipe.size, seed)
    out.mkdir(parents=True, exist_ok=True)
    note_if_busy("cpu")
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense, pruned, history = _train_and_prune(digits, recipe, console)
    example = digits.held_out_pictures[:PLANNED_BATCH]
    converted = escort.convert(pruned, example, progress=console.is_terminal)
    rel_error = _verify(converted, pruned, digits.held_out_pictures)
    times = [_time(dense, converted, digits.held_out_pictures[:batch], recipe.timing_s) for batch in BATCHES]
    escort.save(converted, out / "model.escort")

    shares = prune.sparsity(pruned)
    summary = {
        "accuracy_dense": _accuracy(dense, digits),
        "accuracy_pruned": _accuracy(pruned, digits),
        "accuracy_converted": _accuracy(converted, digits),
        "sparsity": shares["overall"],
        "speedup": next(row["speedup"] for row in times if row["batch"] == PLANNED_BATCH),
        "speedup_batch": PLANNED_BATCH,
        "times": times,
        "rel_error": rel_error,
        "layer_sparsity": {name: share for name, share in shares.items() if name != "overall"},
        "history": [asdict(epoch) for epoch in history],
        "digits": {"train": len(digits.train_labels), "held_out": len(digits.held_out_labels)},
        "bytes": {"dense": _state_bytes(dense), "converted": (out / "model.escort").stat().st_size},
        "plan": converted.plan.to_json(),
        "machine": Machine.here().to_json(),
        "seed": seed,
        "quick": quick,
        "seconds": time.perf_counter() - begin,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    title = "From a trained network to a pruned, faster one"
    report.write_html(out / "report.html", title, _sections(summary, converted, history))
    _print(summary, converted, out, console)
    return summary


def _train_and_prune(digits: Digits, recipe: Recipe, console: Console) -> tuple[nn.Module, nn.Module, list[Epoch]]:
    """The trained network, a copy of it pruned while it is fine-tuned (both in eval mode), and how it went."""
    with progress(console) as bars:
        # channels_last is the memory format in which torch's convolutions are faster on CPUs, in training too.
        dense = DigitNet(recipe.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        history = _fit(dense, digits, recipe, bars)
        pruned = copy.deepcopy(dense)
        half = recipe.finetune_epochs * _steps_per_epoch(digits, recipe) // 2
        schedule = prune.GradualSchedule(_sparsity_of_the_rest(pruned, recipe.sparsity), begin=0, end=half, every=5)
        history += _fit(pruned, digits, recipe, bars, schedule)
        prune.make_permanent(pruned)
    return dense.eval(), pruned.eval(), history


def _sparsity_of_the_rest(model: nn.Module, sparsity: float) -> float:
    """The sparsity of all convolutions but the first, which stays dense, for `sparsity` over all of them."""
    weights = {name: conv.weight.numel() for name, conv in prune.convolutions(model).items()}
    total = sum(weights.values())
    return sparsity * total / (total - weights[FIRST_CONVOLUTION])


def _fit(
    model: nn.Module, digits: Digits, recipe: Recipe, bars: Progress, schedule: prune.GradualSchedule | None = None
) -> list[Epoch]:
    """Trains `model` in place, and prunes it on the way where there is a schedule."""
    epochs = recipe.epochs if schedule is None else recipe.finetune_epochs
    rate = recipe.learning_rate if schedule is None else recipe.learning_rate / 2
    steps = epochs * _steps_per_epoch(digits, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    activity = "training" if schedule is None else "pruning"
    bar = bars.add_task(activity, total=steps)
    history: list[Epoch] = []
    step = 0
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(digits.train_labels)).split(recipe.batch):
            if schedule is not None:
                schedule.apply(model, step, skip=FIRST_CONVOLUTION)
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_pictures[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
            rates.step()
            step += 1
            bars.advance(bar)
        history.append(Epoch(_accuracy(model.eval(), digits), prune.sparsity(model)["overall"]))
        zeros = "" if schedule is None else f" at {history[-1].sparsity:.1%} zeros"
        bars.update(bar, description=f"{activity}, accuracy {history[-1].accuracy:.1%}{zeros}")
    return history


def _steps_per_epoch(digits: Digits, recipe: Recipe) -> int:
    return -(-len(digits.train_labels) // recipe.batch)


@torch.inference_mode()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of held-out digits that `model` reads right."""
    answers = model(digits.held_out_pictures).argmax(1)
    return float((answers == digits.held_out_labels).float().mean())


@torch.inference_mode()
def _verify(converted: nn.Module, pruned: nn.Module, pictures: Tensor) -> float:
    """The converted network's relative error against the pruned one in float64. Raises RuntimeError above the bound."""
    error = reference.compare(converted(pictures), copy.deepcopy(pruned).double()(pictures.double()))
    bound = reference.ERROR_BOUND["fp32"]
    if not error <= bound:
        raise RuntimeError(
            f"the converted network differs from the pruned one by {error:.1e}, more than {bound:.0e}; please report it"
        )
    return error


@torch.inference_mode()
def _time(dense: nn.Module, converted: nn.Module, x: Tensor, budget_s: float) -> dict[str, Any]:
    """Median times of a forward: of the trained network as torch runs it in its better memory format, and converted."""
    runs = [*(way.run for way in rivals.eager(dense, (x,))), lambda: converted(x)]
    *dense_us, converted_us = timing.race(runs, rounds=50, budget_s=budget_s)
    return {
        "batch": len(x),
        "dense_us": min(dense_us),
        "converted_us": converted_us,
        "speedup": min(dense_us) / converted_us,
    }


def _state_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _sections(summary: dict[str, Any], converted: ConvertedModel, history: list[Epoch]) -> list[report.Section]:
    """The page, from top to bottom."""
    counts, times = summary["digits"], summary["times"]
    layers = {name: plan for name, plan in converted.plan.layers.items() if plan.time_us and plan.dense_time_us}
    groups = [f"batch {row['batch']}" for row in times]
    return [
        report.Facts("In short", _facts(summary)),
        report.Text(
            "What happened",
            (
                f"A small CNN learned to read {counts['train']:,} scanned digits. A copy of it was pruned gradually "
                "while training went on, every convolution but the first, and converted. All accuracies are on "
                f"{counts['held_out']} digits that no training step saw.",
                "Dense times are those of the trained network as PyTorch runs it, in eval mode and inference mode, in "
                "its faster memory format; both networks take turns on the same digits. Medians on "
                f"{machine_line(converted.plan.machine)}.",
                "The converted outputs differ from the pruned network's, computed in float64, by "
                f"{summary['rel_error']:.1e} of their norm.",
            ),
        ),
        report.bar_chart(
            "Time per digit",
            groups,
            {
                "dense": [row["dense_us"] / row["batch"] for row in times],
                "converted": [row["converted_us"] / row["batch"] for row in times],
            },
            "Microseconds per digit",
        ),
        _times_section(summary),
        plan_table(converted.plan, whole=True),
        report.bar_chart(
            "Time per convolution",
            list(layers),
            {
                "dense": [plan.dense_time_us or 0.0 for plan in layers.values()],
                "chosen": [plan.time_us or 0.0 for plan in layers.values()],
            },
            f"Microseconds at batch {PLANNED_BATCH}",
        ),
        report.line_chart(
            "Training and pruning",
            range(1, len(history) + 1),
            {
                "zeros": [100 * epoch.sparsity for epoch in history],
                "held-out accuracy": [100 * epoch.accuracy for epoch in history],
            },
            "epoch",
            "Percent",
        ),
    ]


def _facts(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "Accuracy, dense": f"{summary['accuracy_dense']:.1%}",
        "Accuracy, pruned": f"{summary['accuracy_pruned']:.1%}",
        "Accuracy, converted": f"{summary['accuracy_converted']:.1%}",
        "Zero weights": f"{summary['sparsity']:.1%}",
        f"Faster at batch {summary['speedup_batch']}": f"{summary['speedup']:.2f}x",
        "Model size": f"{summary['bytes']['converted'] / summary['bytes']['dense']:.0%} of dense",
    }


def _times_section(summary: dict[str, Any]) -> report.Table:
    rows = tuple(
        (str(row["batch"]), f"{row['dense_us']:,.0f}", f"{row['converted_us']:,.0f}", f"{row['speedup']:.2f}x")
        for row in summary["times"]
    )
    return report.Table("Whole network", ("Batch", "Dense µs", "Converted µs", "Speedup"), rows)


def _print(summary: dict[str, Any], converted: ConvertedModel, out: Path, console: Console) -> None:
    console.print(report.terminal(plan_table(converted.plan)))
    console.print(report.terminal(_times_section(summary)))
    console.print(report.terminal(report.Table("In short", ("", "Measured"), tuple(_facts(summary).items()))))
    console.print(f"Wrote summary.json, report.html and model.escort to {out} in {summary['seconds']:.0f} s.")
