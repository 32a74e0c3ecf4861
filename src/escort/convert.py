"""Whole models: every convolution swapped for the method that measured fastest, and the proof that it paid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from escort import batching, bench, fuse, planner, reference
from escort.bench import Machine
from escort.fuse import FusedConv2d
from escort.memory import keep_freed_memory
from escort.nn import MaxPool2d, SparseConv2d
from escort.planner import Plan
from escort.problem import Epilogue, Problem
from escort.sparse import StretchedCSR

#: Largest relative error of a converted network's outputs: fp32 rounding, summed over its layers.
NETWORK_ERROR_BOUND = 1e-4

_IMAGES = (1, 2, 4)  # how many images at a time are tried


@dataclass(frozen=True)
class NetworkPlan:
    """What became of each convolution of a model, and how long the whole takes.

    Attributes:
        layers: layer name to plan, in the order of execution.
        skipped: layer name to the reason why it was left alone.
        input_shapes: the example's shapes.
        dense_time_us, converted_time_us: median time of a forward on the example, of the model as given and converted.
        kept_dense: whether the original network was kept because converting it did not pay.
        rel_error: ``||out - ref|| / ||ref||`` of the converted network against the original.
        images: how many images of a larger batch run at a time, None for all (see :mod:`escort.batching`).
    """

    layers: dict[str, Plan]
    skipped: dict[str, str]
    input_shapes: tuple[tuple[int, ...], ...]
    dense_time_us: float
    converted_time_us: float
    rel_error: float
    kept_dense: bool
    machine: Machine
    images: int | None = None

    @property
    def speedup(self) -> float:
        """Dense time over the time of what was kept."""
        return 1.0 if self.kept_dense else self.dense_time_us / self.converted_time_us

    @property
    def reason(self) -> str | None:
        """Why the original network was kept, None where it was converted."""
        if not self.kept_dense:
            return None
        return (
            f"the converted network takes {self.converted_time_us:.0f} us, the original {self.dense_time_us:.0f} us: "
            "the original is kept; prune further or use a larger input"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": {name: plan.to_json() for name, plan in self.layers.items()},
            "skipped": self.skipped,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "dense_time_us": self.dense_time_us,
            "converted_time_us": self.converted_time_us,
            "rel_error": self.rel_error,
            "kept_dense": self.kept_dense,
            "machine": self.machine.to_json(),
            "images": self.images,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NetworkPlan:
        """The plan behind :meth:`to_json`. Raises ValueError on anything else."""
        try:
            return cls(
                {str(name): Plan.from_json(plan) for name, plan in data["layers"].items()},
                {str(name): str(reason) for name, reason in data["skipped"].items()},
                tuple(tuple(int(size) for size in shape) for shape in data["input_shapes"]),
                float(data["dense_time_us"]),
                float(data["converted_time_us"]),
                float(data["rel_error"]),
                bool(data["kept_dense"]),
                Machine.from_json(data["machine"]),
                None if data.get("images") is None else max(int(data["images"]), 1),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a network plan: {error}") from error


class ConvertedModel(nn.Module):
    """A drop-in for the model it was made from. Inference only.

    Attributes:
        network: what runs; an fx.GraphModule where the model could be traced, else the model with swapped layers.
        plan: what was chosen per layer and why.
    """

    def __init__(self, network: nn.Module, plan: NetworkPlan) -> None:
        super().__init__()
        keep_freed_memory()
        self.network = network
        self.plan = plan
        super().train(False)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        images = self.plan.images
        if images and len(inputs) == 1 and not torch.compiler.is_compiling() and len(inputs[0]) > images:
            return batching.run_in_parts(self.network, inputs[0], images)
        return self.network(*inputs, **named)

    @property
    def traced(self) -> bool:
        """Whether the network is a graph, so that it can be saved without the model's own code."""
        return isinstance(self.network, fx.GraphModule)

    def train(self, mode: bool = True) -> ConvertedModel:
        if mode:
            raise RuntimeError("a converted model is for inference: fine-tune the pruned model, then convert it again")
        return self


def convert(
    model: nn.Module, example_inputs: torch.Tensor | tuple[torch.Tensor, ...], *, progress: bool = False
) -> ConvertedModel:
    """A faster drop-in for a pruned model.

    Folds batch-norms, fuses activations and residual adds, measures every way to run each convolution on this machine
    and swaps in the fastest. The model itself is not changed. Where the whole is no faster, the original network is
    kept and ``.plan.reason`` says so.

    Args:
        model: in eval mode, float32, on the CPU. Models that torch.fx cannot trace are converted layer by layer.
        example_inputs: a typical input; timing is done for its shapes, other batch and input sizes stay correct.
        progress: show a progress bar on stderr.

    Raises:
        ValueError, TypeError: naming the layer, the problem and the remedy.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _check(model, inputs)
    keep_freed_memory()  # before anything is timed
    try:
        with torch.inference_mode():
            expected = model(*inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the example {[tuple(x.shape) for x in inputs]} does not run through the model: {error}"
        ) from error
    original: nn.Module
    network: nn.Module
    try:
        original = fuse.trace(model, inputs)
        network, skipped = fuse.fuse(original)
    except fuse.Untraceable:
        original, network, skipped = fuse.plain_copy(model), fuse.plain_copy(model), {}
    convolutions = [name for name, module in network.named_modules() if _is_planned(module) and name not in skipped]
    inner = {f"{name}.conv" for name in convolutions}
    calls = _record_calls(network, [name for name in convolutions if name not in inner], inputs)
    layers: dict[str, Plan] = {}
    for name, shape in _track(calls.items(), len(calls), "planning", progress):
        module = network.get_submodule(name)
        reason = fuse.unsupported(module) if isinstance(module, nn.Conv2d) else None
        if len(shape) != 4:
            reason = f"is called without a batch, on shape {tuple(shape)}"
        if reason:
            skipped[name] = reason
            continue
        sparse = _swap(module, shape, name)
        layers[name] = sparse.plan
        _set_submodule(network, name, sparse)
    _swap_pools(network)
    return _finish(original, network, inputs, expected, layers, skipped)


def replan(model: ConvertedModel, *, progress: bool = False) -> ConvertedModel:
    """The same network planned anew on this machine, for the input sizes that it was planned for."""
    network = copy.deepcopy(model.network)
    layers = dict(model.plan.layers)
    modules = [(name, m) for name, m in network.named_modules() if isinstance(m, SparseConv2d)]
    for name, module in _track(modules, len(modules), "planning", progress):
        problem = module.plan.problem
        layers[name] = planner.plan_layer(problem, module.filter, module.bias)
        _set_submodule(network, name, SparseConv2d(module.filter, module.bias, layers[name], module.name))
    example = tuple(torch.randn(shape) for shape in model.plan.input_shapes)
    with torch.inference_mode():
        runs, images = _ways_to_run(network, example)
        times = bench.race(runs, rounds=4, burst=3, budget_s=2.0)
    plan = replace(
        model.plan,
        layers=layers,
        converted_time_us=min(times),
        machine=Machine.here(),
        images=images[times.index(min(times))],
    )
    return ConvertedModel(network, plan)


def _check(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes an nn.Module, got {type(model).__name__}")
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    if training is not None and not isinstance(model, fx.GraphModule):
        raise ValueError(f"{training} is in training mode; call model.eval() first")
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise TypeError("example_inputs is a tensor or a tuple of tensors")
    device = inputs[0].device
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.dtype is not torch.float32:
            raise ValueError(
                f"layer {name}: weights of {module.weight.dtype}; convert the model to float32 with .float()"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the example on {device}; move one to the other")
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity; a pruned filter cannot skip what is not finite")
    if device.type != "cpu":
        raise ValueError(f"this version runs on the CPU, the model is on {device}; move both with .cpu()")


def _is_planned(module: nn.Module) -> bool:
    return isinstance(module, (FusedConv2d, nn.Conv2d))


def _record_calls(network: nn.Module, names: list[str], inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Size]:
    """The input shape of each convolution in the order of their first calls on the example."""
    shapes: dict[str, torch.Size] = {}
    with _hooks() as hooks, torch.inference_mode():
        for name in names:

            def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                shapes.setdefault(name, args[0].shape)

            hooks.append(network.get_submodule(name).register_forward_pre_hook(record))
        network(*inputs)
    if not shapes:
        raise ValueError("the model runs no 2-d convolution on this example; there is nothing to convert")
    return shapes


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()


def _swap(module: nn.Module, shape: torch.Size, name: str) -> SparseConv2d:
    if isinstance(module, FusedConv2d):
        conv, activation, residual = module.conv, module.activation, module.residual
    else:
        assert isinstance(module, nn.Conv2d)
        conv, activation, residual = module, "none", False
    epilogue = Epilogue(conv.bias is not None, residual, activation)
    try:
        problem = Problem.of(conv, shape, epilogue=epilogue)
        filter = StretchedCSR.from_dense(conv.weight, conv.groups)
        bias = None if conv.bias is None else conv.bias.detach()
        plan = planner.plan_layer(problem, filter, bias)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    return SparseConv2d(filter, bias, plan, name)


def _swap_pools(network: nn.Module) -> None:
    """Max pooling by our kernel, so that it does not outweigh the convolutions it stands between."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.MaxPool2d and not module.return_indices:
            sizes = module.kernel_size, module.stride, module.padding, module.dilation
            _set_submodule(network, name, MaxPool2d(*sizes, ceil_mode=module.ceil_mode))
    if not isinstance(network, fx.GraphModule):
        return
    names = "input kernel_size stride padding dilation ceil_mode return_indices".split()
    for node in network.graph.nodes:
        if node.op == "call_function" and node.target in (
            F.max_pool2d,
            torch.max_pool2d,
            torch.ops.aten.max_pool2d.default,
        ):
            arguments = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
            x = arguments.pop("input")
            if arguments.pop("return_indices", False) or any(
                isinstance(value, fx.Node) for value in arguments.values()
            ):
                continue
            name = f"{node.name}_pool"
            network.add_submodule(name, MaxPool2d(**{k: v for k, v in arguments.items() if v != []}))
            node.op, node.target, node.args, node.kwargs = "call_module", name, (x,), {}
    network.recompile()


def _set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _finish(
    original: nn.Module,
    network: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    expected: Any,
    layers: dict[str, Plan],
    skipped: dict[str, str],
) -> ConvertedModel:
    """Checks the converted network against the original, times both, and keeps the faster."""
    with torch.inference_mode():
        error = max(
            (
                reference.compare(out, ref)
                for out, ref in zip(_tensors(network(*inputs)), _tensors(expected), strict=True)
            ),
            default=0.0,
        )
        if not error <= NETWORK_ERROR_BOUND:
            raise RuntimeError(
                f"the converted network differs from the original by {error:.1e} (bound {NETWORK_ERROR_BOUND:.0e}); "
                "please report this with the model"
            )
        runs, images = _ways_to_run(network, inputs)
        dense, *times = bench.race([lambda: original(*inputs), *runs], rounds=4, burst=3, budget_s=2.0)
    converted = min(times)
    kept_dense = converted >= dense
    shapes = tuple(tuple(x.shape) for x in inputs)
    best = None if kept_dense else images[times.index(converted)]
    plan = NetworkPlan(layers, skipped, shapes, dense, converted, error, kept_dense, Machine.here(), best)
    return ConvertedModel(original if kept_dense else network, plan)


def _ways_to_run(
    network: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[Callable[[], Any]], list[int | None]]:
    """The whole batch at once and, where images do not mix, a few images at a time; with the number of images."""
    images: list[int | None] = [None]
    if batching.mixing(network) is None:
        images += [count for count in _IMAGES if count < len(inputs[0])]

    def run(count: int | None) -> Any:
        return batching.run_in_parts(network, inputs[0], count) if count else network(*inputs)

    return [partial(run, count) for count in images], images


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _track(items: Any, total: int, what: str, shown: bool) -> Iterator[Any]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        yield from bar.track(items, total=total, description=what)
