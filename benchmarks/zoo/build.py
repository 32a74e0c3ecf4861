"""The networks of the zoo, built: random weights, norms with made-up statistics, convolutions pruned."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from benchmarks.zoo.catalogue import Entry
from escort import prune

SPARSITY = 0.9


def build(entry: Entry) -> nn.Module:
    """The network of an entry in eval mode, the same in every process.

    Raises:
        ImportError: where its library is not installed.
    """
    torch.manual_seed(0)
    library, _, name = entry.name.partition("/")
    model = _FACTORIES[library](name).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    for parameter in model.parameters():
        # Layer scales, and the last norms of residual branches, begin at nearly zero: what they scale would not show.
        if parameter.ndim < 4 and parameter.numel() and parameter.detach().abs().max() < 1e-2:
            parameter.data.uniform_(0.1, 0.5)
    prune.uniform(model, SPARSITY)
    prune.make_permanent(model)
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d):
            torch_prune.l1_unstructured(module, "weight", SPARSITY)
            torch_prune.remove(module, "weight")
    return model


def inputs(entry: Entry, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Random arguments of a shape, the same in every process: pictures as they are after a usual normalisation."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for _ in range(2 if entry.kind == "pair" else 1))


def _torchvision(name: str) -> nn.Module:
    models = _import_torchvision().models
    name, _, part = name.partition("/")
    options: dict[str, Any] = {"weights": None}
    if name.startswith("quantized_"):
        options["quantize"] = False
    elif name in models.list_models(module=models.segmentation) or name in models.list_models(module=models.detection):
        options["weights_backbone"] = None
    model = models.get_model(name, **options)
    return model.get_submodule(part)


def _import_torchvision() -> Any:
    """torchvision, though its compiled operators be of another build than torch: no network here calls them."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for loaded in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        _declare_operators()
        import torchvision
    return torchvision


_OPERATORS = (
    "nms qnms roi_align _roi_align_backward qroi_align roi_pool _roi_pool_backward ps_roi_align _ps_roi_align_backward "
    "ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"
)
_kept: list[torch.library.Library] = []  # their operators last as long as they do


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS.split():
        library.define(f"{name}(Tensor x) -> Tensor")
    _kept.append(library)


def _timm(name: str) -> nn.Module:
    _import_torchvision()
    import timm

    return timm.create_model(name, pretrained=False)


def _smp(name: str) -> nn.Module:
    _import_torchvision()
    import segmentation_models_pytorch

    architecture, _, encoder = name.partition("/")
    return segmentation_models_pytorch.create_model(architecture, encoder_name=encoder, encoder_weights=None)


def _ultralytics(name: str) -> nn.Module:
    _import_torchvision()
    from ultralytics import RTDETR, YOLO

    return (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml").model


def _own(name: str) -> nn.Module:
    """A generator of pictures out of noise (N, 64, 1, 1), as adversarial networks train it: no library here has one."""
    channels = (64, 64, 32, 16)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(channels)):
        stride, padding = (1, 0) if number == 0 else (2, 1)
        layers += [nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    last = nn.ConvTranspose2d(channels[-1], 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh()
    return nn.Sequential(*layers, *last)


_FACTORIES = {"torchvision": _torchvision, "timm": _timm, "smp": _smp, "ultralytics": _ultralytics, "own": _own}
