"""Whole models: every convolution swapped for the method that measured fastest, and the proof that it paid."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from escort import reference
from escort.filter import SparseFilter
from escort.layers import MaxPool2d, SparseConv2d
from escort.methods import by_name
from escort.methods.precision import float32_convolutions
from escort.network import batching, channels_last, fuse
from escort.network.fuse import FusedConv2d
from escort.network.memory import keep_freed_memory
from escort.network.model import ConvertedModel, NetworkPlan
from escort.planner import planner
from escort.planner import timing as bench
from escort.planner.budget import check_compile_budget
from escort.planner.cores import on_all_cores
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from escort.planner.timing import Timer
from escort.problem import TORCH_DTYPE, Epilogue, MemoryFormat, Precision, Problem

__all__ = ["NETWORK_ERROR_BOUND", "ConvertedModel", "NetworkPlan", "convert", "replan"]

#: Seconds that compiling kernels for the filters of a network may take.
COMPILE_BUDGET_S = 300.0

#: Largest relative error of a converted network's outputs: the rounding of its precision, summed over its layers. The
#: original that it is compared with rounds as much, but never in TF32.
NETWORK_ERROR_BOUND: dict[str, float] = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 7.5e-2}

_PLANNING = "planning"
_IMAGES = (1, 2, 4)  # how many images at a time are tried
_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

#: A layer to plan: its problem, filter and bias.
_Asked = tuple[Problem, SparseFilter, torch.Tensor | None]


def convert(
    model: nn.Module,
    example_inputs: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    precision: Precision | None = None,
    compile_budget_s: float = COMPILE_BUDGET_S,
    progress: bool = False,
) -> ConvertedModel:
    """A faster drop-in for a pruned model.

    Folds batch-norms, fuses activations and residual adds, measures every way to run each convolution on the model's
    device and swaps in the fastest; where tensor cores may be used, once more with all tensors in channels_last. The
    model itself is not changed. Where the whole is no faster, the original network is kept and ``.plan.reason`` says
    so.

    Every convolution that is swapped computes in `precision`, whatever torch's global settings say. What is left alone,
    linear layers for example or the original network where it is kept, computes as those settings say.

    Args:
        model: in eval mode, on the CPU in float32 or on a GPU in float32, float16 or bfloat16. Models that torch.fx
            cannot trace are converted layer by layer.
        example_inputs: a typical input; timing is done for its shapes, other batch and input sizes stay correct.
        precision: "fp32", "fp16" and "bf16" are those of the model's weights, which is the default: float32 weights are
            multiplied as they are. "tf32" allows TF32 products of float32 weights besides, as torch's own convolutions
            use on GPUs unless ``torch.backends.cudnn.allow_tf32`` is switched off.
        compile_budget_s: seconds that compiling kernels for the filters may take on a GPU, five minutes by default, by
            estimate and with all cores at work. Every layer that could have such kernels gets an equal share of what is
            left. Beyond its share a layer falls back on the other methods, and its plan says so; 0 compiles none.
            Kernels stay on disk (`escort cache`).
        progress: show a progress bar on stderr.

    Raises:
        ValueError, TypeError: naming the layer, the problem and the remedy.
        torch.OutOfMemoryError: naming the layer that did not fit the GPU, which stays usable.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    device = _check(model, inputs)
    precision = _settle_precision(model, device, precision)
    if device.type == "cpu":
        keep_freed_memory()  # before anything is timed
    check_compile_budget(compile_budget_s)
    with _current(device):
        return _convert(model, inputs, precision, compile_budget_s, progress)


def _convert(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], precision: Precision, compile_budget_s: float, progress: bool
) -> ConvertedModel:
    with _running_out("the model itself"), _dense_in("fp32", inputs[0].device):
        try:
            with torch.inference_mode():
                expected = _tensors(model(*inputs))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"the example {[tuple(x.shape) for x in inputs]} does not run through the model: {error}"
            ) from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in expected):
            raise ValueError("the model's output on the example holds NaN or infinity; use an example that it is for")
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
        networks = _by_memory_format(network, inputs[0].device, precision)
    swapped = [
        _swap(network, calls, memory_format, precision, skipped, compile_budget_s, progress)
        for memory_format, network in networks.items()
    ]
    with _running_out("the whole network"):
        return _finish(original, swapped, inputs, expected, precision)


def _by_memory_format(network: nn.Module, device: torch.device, precision: Precision) -> dict[MemoryFormat, nn.Module]:
    """The network for each memory format in which it is tried."""
    networks: dict[MemoryFormat, nn.Module] = {"contiguous": network}
    if (
        device.type == "cuda"
        and isinstance(network, fx.GraphModule)
        and not channels_last.precluded(network, precision)
    ):
        networks["channels_last"] = channels_last.rewrite(network, precision)
    return networks


@dataclass(frozen=True)
class _Swapped:
    """A network whose convolutions run as planned, their plans, and which were left alone for what reason."""

    network: nn.Module
    layers: dict[str, Plan]
    skipped: dict[str, str]


def _swap(
    network: nn.Module,
    calls: dict[str, torch.Size],
    memory_format: MemoryFormat,
    precision: Precision,
    skipped: dict[str, str],
    compile_budget_s: float,
    progress: bool,
) -> _Swapped:
    """Plans the convolutions of a network that are called, and puts what they shall run as in their place."""
    asked: dict[str, _Asked] = {}
    skipped = dict(skipped)
    for name, shape in calls.items():
        module = network.get_submodule(name)
        reason = fuse.unsupported(module) if isinstance(module, nn.Conv2d) else None
        if len(shape) != 4:
            reason = f"is called without a batch, on shape {tuple(shape)}"
        if reason:
            skipped[name] = reason
            continue
        with _running_out(f"layer {name}"):
            asked[name] = _ask(module, shape, name, precision, memory_format)
    layers = _plan(network, asked, compile_budget_s, progress)
    _swap_pools(network)
    return _Swapped(network, layers, skipped)


def replan(
    model: ConvertedModel, *, compile_budget_s: float = COMPILE_BUDGET_S, progress: bool = False
) -> ConvertedModel:
    """The same network planned anew on this machine and the device it is on, for the input sizes it was planned for.

    Args:
        compile_budget_s, progress: as of :func:`convert`.
    """
    check_compile_budget(compile_budget_s)
    tensors = (*model.network.parameters(), *model.network.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    with _current(device):
        with _running_out("the network"):
            network = copy.deepcopy(model.network)
        layers = {name: replace(plan, problem=plan.problem.on(str(device))) for name, plan in model.plan.layers.items()}
        modules = [(name, module) for name, module in network.named_modules() if isinstance(module, SparseConv2d)]
        layers |= _plan(network, {name: _ask_again(module) for name, module in modules}, compile_budget_s, progress)
        with _running_out("the network"), torch.inference_mode(), _dense_in(model.plan.precision, device):
            runs, images = _ways_to_run(network, model.plan.example(device))
            times, timer = _race(runs, device)
    plan = replace(
        model.plan,
        layers=layers,
        converted_time_us=min(times),
        machine=Machine.here(str(device)),
        images=images[times.index(min(times))],
        device=str(device),
        timer=timer,
    )
    return ConvertedModel(network, plan)


def _check(model: nn.Module, inputs: tuple[Any, ...]) -> torch.device:
    """The device that model and example are on."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes an nn.Module, got {type(model).__name__}")
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    if training is not None and not isinstance(model, fx.GraphModule):
        raise ValueError(f"{training} is in training mode; call model.eval() first")
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise TypeError("example_inputs is a tensor or a tuple of tensors")
    device = inputs[0].device
    for name, dtype in _weight_types(model).items():
        if dtype not in _PRECISIONS:
            raise ValueError(f"layer {name}: weights of {dtype}; convert the model to float32 with .float()")
    for x in inputs:
        if x.device != device:
            raise ValueError(f"the example is on {device} and on {x.device}; move all of it to one device")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the example on {device}; move one to the other")
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity; a pruned filter cannot skip what is not finite")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"convolutions run on the CPU and on NVIDIA GPUs; move the model from {device} with .cpu()")
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "autocast is on, which converted layers do not follow; convert outside of it, the model in one type"
        )
    return device


def _weight_types(model: nn.Module) -> dict[str, torch.dtype]:
    """The types of its convolutions' weights, where they are modules; else of all weights that could be filters."""
    modules = {name: module.weight.dtype for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return modules or {name: weight.dtype for name, weight in model.named_parameters() if weight.ndim == 4}


def _settle_precision(model: nn.Module, device: torch.device, asked: Precision | None) -> Precision:
    """What the convolutions shall compute in."""
    if asked is not None and asked not in get_args(Precision):
        raise ValueError(f"precision is one of {get_args(Precision)}, or None for that of the weights, got {asked!r}")
    types = _weight_types(model)
    dtype = next(iter(types.values()), torch.float32)
    for name, other in types.items():
        if other is not dtype:
            raise ValueError(f"layer {name}: weights of {other} among others of {dtype}; convert the model to one type")
        if other is not torch.float32 and device.type == "cpu":
            raise ValueError(
                f"layer {name}: weights of {other}, and the CPU computes in float32; convert the model with .float(), "
                "or move it to a GPU with .cuda()"
            )
    if asked is None:
        if dtype is torch.float32 and device.type == "cuda" and _tf32_is_allowed():
            warnings.warn(
                "torch runs this model's convolutions in TF32, as it may by default; converted, they compute in strict "
                "float32: pass precision='tf32' to allow TF32, or precision='fp32' to silence this",
                stacklevel=3,
            )
        return _PRECISIONS[dtype]
    if TORCH_DTYPE[asked] is not dtype:
        wanted = TORCH_DTYPE[asked]
        raise ValueError(
            f"precision {asked!r} is for weights of {wanted}, the model's are {dtype}; first call model.to({wanted})"
        )
    if asked == "tf32" and device.type == "cpu":
        raise ValueError("precision 'tf32' is for NVIDIA GPUs, the model is on the CPU; leave it out")
    return asked


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, so that streams, graphs and memory are its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _running_out(what: str) -> Iterator[None]:
    """Says what ran out of device memory, and lets go of the tensors that a traceback would keep alive."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = f"{what}: {str(error).partition('. GPU')[0]}; pass an example of a smaller batch"
        raise torch.OutOfMemoryError(told) from error.with_traceback(None)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says which layer a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error


def _tf32_is_allowed() -> bool:
    """Whether torch's own convolutions may use TF32."""
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32


def _dense_in(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Lets torch's own convolutions on a GPU compute in that precision, whatever the process's setting."""
    return float32_convolutions(precision) if device.type == "cuda" else nullcontext()


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


def _ask(module: nn.Module, shape: torch.Size, name: str, precision: Precision, memory_format: MemoryFormat) -> _Asked:
    if isinstance(module, FusedConv2d):
        conv, activation, residual = module.conv, module.activation, module.residual
    else:
        assert isinstance(module, nn.Conv2d)
        conv, activation, residual = module, "none", False
    epilogue = Epilogue(conv.bias is not None, residual, activation)
    if conv.weight.dtype is not TORCH_DTYPE[precision]:
        raise ValueError(
            f"layer {name}: weights of {conv.weight.dtype} among others of {TORCH_DTYPE[precision]}; convert the model "
            "to one type"
        )
    with _naming(name):
        device = str(conv.weight.device)
        problem = Problem.of(
            conv, shape, epilogue=epilogue, precision=precision, device=device, memory_format=memory_format
        )
        sparse_filter = SparseFilter.from_dense(conv.weight, conv.groups)
    return problem, sparse_filter, None if conv.bias is None else conv.bias.detach().float()


def _ask_again(module: SparseConv2d) -> _Asked:
    asked = module.plan.problem
    return module.problem(asked.batch, asked.height, asked.width), module.filter, module.bias


def _plan(network: nn.Module, asked: dict[str, _Asked], compile_budget_s: float, progress: bool) -> dict[str, Plan]:
    """Plans layers of a network and swaps them for convolutions that run as planned."""
    plans: dict[str, Plan] = {}
    compiled: list[SparseConv2d] = []
    with _progress(len(asked), progress) as (advance, preparing):
        planned = planner.plan_layers(list(asked.values()), compile_budget_s, preparing)
        for name, (_, sparse_filter, bias) in asked.items():
            with _running_out(f"layer {name}"), _naming(name):
                plans[name] = next(planned)
                sparse = SparseConv2d(sparse_filter, bias, plans[name], name)
            _set_submodule(network, name, sparse)
            if by_name(plans[name].method, plans[name].problem.device).compiles_per_filter:
                compiled.append(sparse)
            advance()
        with _running_out("the whole network"):  # those that took over a plan have their kernels still to compile
            on_all_cores([sparse.prepare for sparse in compiled], preparing)
    return plans


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
    swapped: list[_Swapped],
    inputs: tuple[torch.Tensor, ...],
    expected: list[torch.Tensor],
    precision: Precision,
) -> ConvertedModel:
    """Checks converted networks against the original, times all, and keeps the fastest."""
    device, bound = inputs[0].device, NETWORK_ERROR_BOUND[precision]
    ways: list[tuple[_Swapped, float, int | None]] = []  # with the error, and how many images run at a time
    runs: list[Callable[[], Any]] = [lambda: original(*inputs)]
    with torch.inference_mode(), _dense_in(precision, device):
        for candidate in swapped:
            pairs = zip(_tensors(candidate.network(*inputs)), expected, strict=True)
            error = max((reference.compare(out, ref) for out, ref in pairs), default=0.0)
            if not error <= bound:
                raise RuntimeError(
                    f"the converted network differs from the original by {error:.1e} (bound {bound:.0e}); "
                    "please report this with the model"
                )
            its_runs, its_images = _ways_to_run(candidate.network, inputs)
            runs += its_runs
            ways += [(candidate, error, images) for images in its_images]
        (dense, *times), timer = _race(runs, device)
    converted = min(times)
    kept_dense = converted >= dense
    best, error, images = ways[times.index(converted)]
    plan = NetworkPlan(
        best.layers,
        best.skipped,
        tuple(tuple(x.shape) for x in inputs),
        dense,
        converted,
        error,
        kept_dense,
        Machine.here(str(device)),
        None if kept_dense else images,
        precision,
        str(device),
        tuple(str(x.dtype).removeprefix("torch.") for x in inputs),
        timer,
    )
    return ConvertedModel(original if kept_dense else best.network, plan)


def _ways_to_run(
    network: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[Callable[[], Any]], list[int | None]]:
    """The whole batch at once and, on the CPU where images do not mix, a few at a time; with the number of images."""
    images: list[int | None] = [None]
    if inputs[0].device.type == "cpu" and batching.mixing(network) is None:
        images += [count for count in _IMAGES if count < len(inputs[0])]

    def run(count: int | None) -> Any:
        return batching.run_in_parts(network, inputs[0], count) if count else network(*inputs)

    return [partial(run, count) for count in images], images


def _race(runs: list[Callable[[], Any]], device: torch.device) -> tuple[list[float], Timer]:
    """The median time of each in microseconds, and how all of them were taken."""
    if device.type == "cpu":
        return bench.race(runs, rounds=4, burst=3, budget_s=2.0), "calls"
    timings = bench.race_on_gpu(runs, device, budget_s=2.0)
    if any(timing.timer != "graph" or timing.time_us is None for timing in timings):
        timings = bench.race_on_gpu(runs, device, budget_s=2.0, capture=False)
    times = [timing.time_us for timing in timings if timing.time_us is not None]
    if len(times) < len(runs):
        reason = next(timing.reason for timing in timings if timing.time_us is None)
        raise RuntimeError(f"the whole network cannot be timed: {reason}; pass an example of a smaller batch")
    return times, timings[0].timer


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _progress(layers: int, shown: bool) -> Iterator[tuple[Callable[[], None], Callable[[int, int], None]]]:
    """A progress bar on stderr: what to call when a layer is planned, and when some of the kernels are compiled."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task(_PLANNING, total=layers)

        def preparing(done: int, kernels: int) -> None:
            told = f"{_PLANNING}, preparing {done} of {kernels} kernels" if done < kernels else _PLANNING
            bar.update(task, description=told)

        yield lambda: bar.advance(task), preparing
