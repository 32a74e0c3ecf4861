"""Magnitude pruning of convolutions: thin recipes on top of :mod:`torch.nn.utils.prune`.

A sparsity is a share of zeros in [0, 1) and always means the final one: ``uniform(model, 0.5)`` followed by
``uniform(model, 0.9)`` ends at 0.9. Masks only grow: what is pruned stays pruned, and a layer that is already sparser
than that is left as it is. Recipes change the model in place, keep every parameter object (an optimizer made before
stays valid), and change nothing where they raise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from escort.arguments import is_number, is_whole

#: Which convolutions to leave alone: their names, or a predicate of (name, convolution).
Skip = str | Collection[str] | Callable[[str, nn.Conv2d], bool]


def convolutions(model: nn.Module, *, skip: Skip = ()) -> dict[str, nn.Conv2d]:
    """The model's convolutions by name, in the order of ``model.named_modules()``, without those in `skip`.

    Raises:
        TypeError: if `model` is no module, or `skip` neither names nor a function.
        ValueError: if there are none, if `skip` names an unknown layer or leaves nothing over.
    """
    if not isinstance(model, nn.Module):
        remedy = "pass what it returns" if callable(model) else "pass the model that is to be pruned"
        raise TypeError(f"pruning takes an nn.Module, got {type(model).__name__}; {remedy}")
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if not convs:
        raise ValueError(
            f"{type(model).__name__} has no nn.Conv2d, which is all that this prunes: other layers by "
            "torch.nn.utils.prune, and a model before escort.convert replaces its convolutions"
        )
    if callable(skip) and not isinstance(skip, nn.Module):
        kept = {name: conv for name, conv in convs.items() if not skip(name, conv)}
    else:
        names = {skip} if isinstance(skip, str) else skip
        if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"skip is names of layers, or a function of (name, conv), got {skip!r}; leave it out for none"
            )
        for name in names:
            _check_known(name, model, convs)
        kept = {name: conv for name, conv in convs.items() if name not in names}
    if not kept:
        raise ValueError(f"skip leaves none of the {len(convs)} convolutions to prune")
    return kept


def uniform(model: nn.Module, sparsity: float, *, skip: Skip = ()) -> None:
    """Prune every convolution to `sparsity`, the weights of smallest magnitude first; each keeps at least one weight.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> uniform(model, 0.9, skip="0")
        >>> round(sum(model[2].weight.flatten() == 0).item() / model[2].weight.numel(), 3)
        0.9

    Raises:
        TypeError: see :func:`convolutions`; or if `sparsity` is no number.
        ValueError: see :func:`convolutions`; if `sparsity` is outside [0, 1), or a weight holds NaN or infinity.
    """
    layerwise(model, dict.fromkeys(convolutions(model, skip=skip), sparsity))


def layerwise(model: nn.Module, sparsities: Mapping[str, float]) -> None:
    """Prune each named convolution to its own sparsity, the weights of smallest magnitude first.

    Raises:
        TypeError: if `sparsities` are not by name, or one is no number.
        ValueError: if a name is no convolution of the model, a sparsity lies outside [0, 1), nothing is named, or a
            weight holds NaN or infinity.
    """
    if not isinstance(sparsities, Mapping):
        raise TypeError(f"layerwise takes {{name: sparsity}}, got {sparsities!r}; uniform takes one for all layers")
    convs = convolutions(model)
    if not sparsities:
        raise ValueError(f"no layer named; give {{name: sparsity}} for some of {listing(convs)}")
    for name, sparsity in sparsities.items():
        _check_known(name, model, convs)
        _check_sparsity(sparsity, f"layer {name!r}: ")
    scores = {name: _scores(name, convs[name]) for name in sparsities}
    for name, sparsity in sparsities.items():
        _prune([convs[name]], [scores[name]], sparsity)


def global_magnitude(model: nn.Module, sparsity: float, *, skip: Skip = ()) -> None:
    """Prune the convolutions to `sparsity` together: the smallest magnitudes go first, in whichever layer they are.

    Layers end at different sparsities, and one whose weights are all small may end empty.

    Raises:
        TypeError: see :func:`convolutions`; or if `sparsity` is no number.
        ValueError: see :func:`convolutions`; if `sparsity` is outside [0, 1), or a weight holds NaN or infinity.
    """
    convs = convolutions(model, skip=skip)
    _check_sparsity(sparsity)
    _prune(list(convs.values()), [_scores(name, conv) for name, conv in convs.items()], sparsity)


def semi_structured(model: nn.Module, *, kept: int = 2, of: int = 4, skip: Skip = ()) -> None:
    """Prune every convolution so that of each `of` neighbouring input channels of a tap `kept` weights stay: 2:4.

    The largest stay, as in NVIDIA's ASP and ModelOpt: such a filter runs on sparse tensor cores as it is. Neighbours
    are counted within a group of the convolution, and fewer of them, at the end, keep as many. What is pruned stays
    pruned.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> semi_structured(model, skip="0")
        >>> float((model[2].weight == 0).float().mean())
        0.5

    Raises:
        TypeError: see :func:`convolutions`; or unless `kept` and `of` are whole numbers.
        ValueError: see :func:`convolutions`; unless ``0 < kept < of``, or if a weight holds NaN or infinity.
    """
    convs = convolutions(model, skip=skip)
    _check_whole(kept=kept, of=of)
    if not 0 < kept < of:
        raise ValueError(f"of each {of} weights some stay and some go, got kept={kept}; write kept=2, of=4 for 2:4")
    masks = {name: _largest(_scores(name, conv), kept, of) for name, conv in convs.items()}
    for name, conv in convs.items():
        _set_mask(conv, masks[name])


@dataclass(frozen=True)
class GradualSchedule:
    """Sparsity that rises from `initial` to `final` while training goes on, fast at first and slowly at the end.

    The cubic law of Zhu and Gupta, "To prune, or not to prune" (2017, arXiv 1710.01878, equation 1),
    ``final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3``: zero before `begin`, `final` from `end`
    on. Between two prunings, `every` steps apart, the network gets time to recover.

    Example:
        >>> schedule = GradualSchedule(final=0.9, begin=0, end=100)
        >>> [round(schedule.sparsity(step), 3) for step in (0, 50, 100)]
        [0.0, 0.787, 0.9]

    Raises:
        TypeError: unless steps are whole numbers, and sparsities numbers.
        ValueError: unless 0 <= begin < end, every >= 1 and 0 <= initial <= final < 1.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_sparsity(self.final, "final: ")
        _check_sparsity(self.initial, "initial: ")
        _check_whole(begin=self.begin, end=self.end, every=self.every)
        if self.initial > self.final:
            raise ValueError(f"initial must not exceed final, got {self.initial} and {self.final}")
        if not 0 <= self.begin < self.end:
            raise ValueError(f"a schedule needs 0 <= begin < end, got begin {self.begin} and end {self.end}")
        if self.every < 1:
            raise ValueError(f"every counts training steps and is at least 1, got {self.every}")

    def sparsity(self, step: int) -> float:
        """The sparsity that training step `step` (counted from 0) works with; it never falls."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        last_pruning = step - (step - self.begin) % self.every
        left = 1.0 - (last_pruning - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3

    def apply(self, model: nn.Module, step: int, *, across_layers: bool = False, skip: Skip = ()) -> float:
        """Prune `model` to the sparsity of `step` and return that; call it before or after each optimizer step.

        Args:
            across_layers: use :func:`global_magnitude` instead of :func:`uniform`.
        """
        sparsity = self.sparsity(step)
        if sparsity > 0.0:
            (global_magnitude if across_layers else uniform)(model, sparsity, skip=skip)
        return sparsity


def make_permanent(model: nn.Module) -> None:
    """Write the zeros into what :mod:`torch.nn.utils.prune` masks, in any layer, and drop the masks.

    The model is an ordinary dense one again.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"masks are those of an nn.Module, got {type(model).__name__}; pass the model that was pruned")
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, torch_prune.BasePruningMethod):
                torch_prune.remove(module, hook._tensor_name)


def sparsity(model: nn.Module) -> dict[str, float]:
    """The share of zero weights per convolution, and under ``"overall"`` that of all of them together.

    Raises:
        TypeError, ValueError: see :func:`convolutions`; also if one is called ``overall``, or a weight holds NaN or
            infinity.
    """
    weights = {name: _scores(name, conv) for name, conv in convolutions(model).items()}
    if "overall" in weights:
        raise ValueError("layer 'overall': the share of all layers together has that name; rename the layer")
    nonzeros = {name: int((weight > 0).sum()) for name, weight in weights.items()}
    shares = {name: 1.0 - nonzeros[name] / weight.numel() for name, weight in weights.items()}
    shares["overall"] = 1.0 - sum(nonzeros.values()) / sum(weight.numel() for weight in weights.values())
    return shares


def _mask(conv: nn.Conv2d) -> Tensor | None:
    mask = getattr(conv, "weight_mask", None)
    return mask if isinstance(mask, Tensor) else None


def _scores(name: str, conv: nn.Conv2d) -> Tensor:
    """The magnitude of each weight, shaped like the weight; -1 where it is masked, so that it is first to go again."""
    mask = _mask(conv)
    # conv.weight itself is stale until the next forward where a mask is set and an optimizer has stepped.
    weight = conv._parameters.get("weight" if mask is None else "weight_orig")
    if weight is None:
        raise ValueError(
            f"layer {name!r}: its weight is computed by a parametrization; make that permanent before pruning, for "
            "example with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        raise ValueError(f"layer {name!r}: its weight has no numbers yet; run the model once, or load its weights")
    if not torch.isfinite(weight).all():
        raise ValueError(f"layer {name!r}: its weight holds NaN or infinity, which has no magnitude to go by; mend it")
    magnitude = weight.detach().abs()
    return magnitude if mask is None else magnitude.masked_fill(mask == 0, -1.0)


def _prune(convs: list[nn.Conv2d], scores: list[Tensor], sparsity: float) -> None:
    """Mask the lowest of all `scores` until a share of `sparsity` is masked; no-op where as many are."""
    ranked = torch.cat([score.flatten() for score in scores])
    zeros = min(round(sparsity * ranked.numel()), ranked.numel() - 1)
    if zeros <= int((ranked < 0).sum()):
        return
    keep = torch.ones_like(ranked)
    keep[torch.topk(ranked, zeros, largest=False, sorted=False).indices] = 0.0
    for conv, mask in zip(convs, keep.split([score.numel() for score in scores]), strict=True):
        _set_mask(conv, mask.view_as(conv.weight))


def _set_mask(conv: nn.Conv2d, mask: Tensor) -> None:
    if _mask(conv) is not None:
        torch_prune.remove(conv, "weight")  # else torch's container would keep all earlier masks in memory
    torch_prune.custom_from_mask(conv, "weight", mask)


def _largest(scores: Tensor, kept: int, of: int) -> Tensor:
    """1 for the largest `kept` of each `of` scores that neighbour each other along the second axis, 0 for others."""
    channels = scores.shape[1]
    padded = torch.cat([scores, scores.new_full((len(scores), -channels % of, *scores.shape[2:]), -1.0)], dim=1)
    groups = padded.unflatten(1, (-1, of))
    largest = torch.zeros_like(groups).scatter_(2, groups.topk(kept, dim=2).indices, 1.0)
    return largest.flatten(1, 2)[:, :channels] * (scores >= 0)


def _check_whole(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not is_whole(number):
            raise TypeError(f"{name} is a whole number, got {number!r}; write it without quotes or a fraction")


def _check_sparsity(sparsity: Any, prefix: str = "") -> None:
    if not is_number(sparsity):
        remedy = "write 0.9 for 90 %"
        raise TypeError(f"{prefix}sparsity is a number, the share of zeros, got {sparsity!r}; {remedy}")
    if not 0.0 <= float(sparsity) < 1.0:
        hint = f"; for {sparsity:g} % write {sparsity / 100:g}" if 1.0 < float(sparsity) < 100.0 else ""
        raise ValueError(f"{prefix}sparsity is the share of zeros and lies in [0, 1), got {sparsity}{hint}")


def _check_known(name: str, model: nn.Module, convs: Mapping[str, nn.Conv2d]) -> None:
    if name in convs:
        return
    module = dict(model.named_modules()).get(name)
    problem = "does not exist" if module is None else f"is a {type(module).__name__}, not a convolution"
    raise ValueError(f"layer {name!r} {problem}; the convolutions are {listing(convs)}")


def listing(names: Iterable[str], most: int = 8) -> str:
    """The names in a line, the first few where there are many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
