"""The networks that are measured, by the names that commands take, and what is pruned of them."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.networks import NETWORKS
from benchmarks.suite.patterns import pattern_layers
from escort import prune
from escort.cli import models
from escort.filter import SparseFilter

_TORCHVISION = "torchvision:"
#: The size of a picture for torchvision's networks.
_PICTURE = (3, 224, 224)
_SETTLING = 4  # random pictures of which norms take their statistics


@dataclass(frozen=True)
class Subject:
    """A network to be measured, with its zeros, in eval mode on the CPU.

    Attributes:
        name, weights: for rows.
        input_size: (C, H, W).
    """

    name: str
    weights: str
    model: nn.Module
    input_size: tuple[int, ...]

    @classmethod
    def load(
        cls,
        network: str,
        *,
        checkpoint: Path | None = None,
        sparsity: float | None = None,
        semi_structured: bool = False,
        patterns: Path | None = None,
        input_size: tuple[int, ...] | None = None,
        dense_depthwise: bool = False,
    ) -> Subject:
        """Builds a network. Random weights follow torch's global generator.

        Args:
            network: one of :data:`NETWORKS`, ``torchvision:NAME``, ``package.module:factory``, or an archive (.pt2).
            sparsity: of all convolutions but the first, by magnitude; None leaves the weights as they are.
            semi_structured: prune two of each four weights instead, as sparse tensor cores take them (2:4).
            patterns: an .npz of sparsity patterns, which takes the place of both.
            input_size: (C, H, W), where the network's name does not tell it.
            dense_depthwise: leave depthwise convolutions out of what `sparsity` prunes.

        Raises:
            ValueError, TypeError, FileNotFoundError: naming what is wrong and the remedy.
        """
        spec = network
        is_archive = Path(network).suffix == models.ARCHIVE_SUFFIX
        if ":" not in network and not is_archive:
            if network not in NETWORKS:
                raise ValueError(f"{network}: there are {', '.join(NETWORKS)}, and package.module:factory")
            input_size = input_size or NETWORKS[network].input_size
            spec = f"benchmarks.networks:{NETWORKS[network].factory.__name__}"
        elif network.startswith(_TORCHVISION):
            input_size = input_size or _PICTURE
            spec = network.replace(_TORCHVISION, "torchvision.models:", 1)
        model = models.load(spec, checkpoint)
        if input_size is None or len(input_size) != 3:
            raise ValueError(f"{network} takes samples of one size; give it, for example --input 3,224,224")
        weights = "random" if checkpoint is None else checkpoint.stem
        if patterns is not None:
            prune_to_patterns(model, patterns)
            weights = patterns.stem
        elif semi_structured:
            prune.semi_structured(model, skip=lambda name, _: name == _first(model))
            prune.make_permanent(model)
            weights += "-2:4"
        elif sparsity is not None:
            prune_all_but_first(model, sparsity, dense_depthwise=dense_depthwise)
            weights += f"-{sparsity:.2f}" + ("-dense-depthwise" if dense_depthwise else "")
        is_random = checkpoint is None and (network in NETWORKS or network.startswith(_TORCHVISION))
        if patterns is not None or is_random:
            _settle_norms(model, torch.randn(_SETTLING, *input_size))
        if is_archive:
            return cls(Path(network).stem, "as-given" if sparsity is None else f"{sparsity:.2f}", model, input_size)
        return cls(network.rpartition(":")[2], weights, model, input_size)


def prune_all_but_first(model: nn.Module, sparsity: float, *, dense_depthwise: bool = False) -> None:
    """Prunes every convolution but the first, which sees the picture and has few weights, by magnitude and for good.

    Args:
        dense_depthwise: leave depthwise convolutions as they are, too: they have few weights and little to gain.
    """
    first = _first(model)

    def stays(name: str, conv: nn.Conv2d) -> bool:
        return name == first or (dense_depthwise and conv.groups == conv.in_channels > 1)

    prune.uniform(model, sparsity, skip=stays)
    prune.make_permanent(model)


def _first(model: nn.Module) -> str:
    return next(iter(prune.convolutions(model)))


def prune_to_patterns(model: nn.Module, path: Path) -> None:
    """Prunes convolutions to the patterns of a file: each to the next one of its weight's shape, in the file's order.

    What is left of their weights is scaled, so that their outputs keep their size. The others stay dense.

    Raises:
        ValueError, FileNotFoundError: where the file has none for this model, or as :func:`pattern_layers` says.
    """
    by_shape: dict[tuple[int, ...], deque[SparseFilter]] = defaultdict(deque)
    for layer in pattern_layers(path, 1):
        by_shape[layer.sparse_filter.shape].append(layer.sparse_filter)
    matched = 0
    for conv in prune.convolutions(model).values():
        waiting = by_shape[tuple(conv.weight.shape)]
        if waiting:
            pattern = waiting.popleft()
            scale = (conv.weight.numel() / max(pattern.nnz, 1)) ** 0.5
            conv.weight.data.mul_(pattern.to_dense().ne(0.0) * scale)
            matched += 1
    if not matched:
        raise ValueError(f"{path} holds no pattern of the shape of a convolution of {type(model).__name__}")


def _settle_norms(model: nn.Module, x: torch.Tensor) -> None:
    """Gives batch norms the statistics of x: without those of its weights, a network overflows 16 bits."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all that it sees
        norm.train()
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
