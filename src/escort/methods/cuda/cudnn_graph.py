"""Method `cudnn_graph`: a dense convolution, residual, bias and ReLU as one graph of cuDNN's, by its Python frontend.

cuDNN's heuristics say which engines may run a graph. Those that the library brings compiled take a graph of this form
alone: convolution, residual, bias in the storage type, ReLU, in this order. They are planned in a few milliseconds. For
any other graph cuDNN generates a kernel, which takes a second and was slower where it was measured: other activations
run behind the graph (docs/notes/rivals.md).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from escort.filter import SparseFilter
from escort.methods.base import MOST_BATCHES, Method, Prepared, aligned, finisher, input_check, output_strides
from escort.methods.sharing import dense_weight
from escort.problem import Problem

_MISSING = "the package nvidia-cudnn-frontend, or cuDNN itself, is missing: pip install 'escort-sparse[cudnn]'"
_ALIGNMENT = 16  # bytes, of all tensors
_CHANNEL_MULTIPLE = 8  # channels that tensor cores read at once
_MOST_WORKSPACE = 64 << 20  # bytes of a plan's
_MOST_PLANS = 2  # that are offered: cuDNN puts the one first that it expects to be fastest
_X, _WEIGHT, _BIAS, _RESIDUAL, _Y = range(1, 6)  # the tensors of a graph


@dataclass(frozen=True)
class CudnnGraphConfig:
    """Which plan of cuDNN's runs the graph.

    Attributes:
        choice: the how many-th of those that cuDNN's heuristics offer, from 0.
    """

    choice: int = 0


class CudnnGraph(Method):
    """Tensor cores alone, in channels_last: fp16, bf16 and TF32, with sums in fp32."""

    name = "cudnn_graph"
    is_dense = True
    device_type = "cuda"
    config_type = CudnnGraphConfig

    def missing(self) -> str | None:
        return None if library() is not None else _MISSING

    def version(self) -> str:
        """The frontend's, and that of the cuDNN that it found."""
        cudnn = library()
        return "" if cudnn is None else f"{cudnn.__version__} {cudnn.backend_version()}"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision == "fp32":
            return "its graphs run on tensor cores, which strict float32 does not use"
        if problem.memory_format != "channels_last":
            return "it reads and writes channels_last; plan it in that memory format"
        if problem.groups == problem.in_channels > 1:
            return "its engines are slow for depthwise convolutions"
        channels = problem.in_channels, problem.out_channels
        is_whole = problem.groups == 1 and not any(count % _CHANNEL_MULTIPLE for count in channels)
        if is_whole and problem.precision != "tf32" and problem.epilogue.activation == "relu":
            return "torch has a call of cuDNN that does the same"
        return self.missing()

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CudnnGraphConfig]:
        return [CudnnGraphConfig(choice) for choice in range(_MOST_PLANS)]

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: CudnnGraphConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        if library() is None:
            raise ImportError(_MISSING)
        device = torch.device(problem.device)
        weight = dense_weight(problem, sparse_filter, torch.channels_last)
        bias = torch.zeros(problem.out_channels) if bias is None else bias.detach()
        bias = bias.to(device, problem.storage)
        finish = None if problem.epilogue.activation in ("none", "relu") else finisher(problem, slope)
        plan_for = partial(_Plan.of, problem, config)
        planned = max(problem.batch, 1)
        plans = {planned: plan_for(planned)}
        captured: dict[int, _Plan] = {}  # CUDA graphs run these, and go before this runner does
        check, out_shape = input_check(problem), problem.output_shape[1:]
        strides = output_strides(problem, "channels_last")

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            check(x, residual)
            samples = x.shape[0]
            y = x.new_empty_strided((samples, *out_shape), strides)
            if samples == 0:
                return y
            if (plan := captured.get(samples) or plans.get(samples)) is None:
                if len(plans) >= MOST_BATCHES:
                    plans.clear()
                plan = plans[samples] = plan_for(samples)
            if samples not in captured and torch.cuda.is_current_stream_capturing():
                captured[samples] = plan
            x = aligned(x.contiguous(memory_format=torch.channels_last), _ALIGNMENT)
            if residual is not None:
                residual = aligned(residual.contiguous(memory_format=torch.channels_last), _ALIGNMENT)
            plan.run(device, {_X: x, _WEIGHT: weight, _BIAS: bias, _RESIDUAL: residual, _Y: y})
            return y if finish is None else finish(y, None)

        return Prepared(run)


@cache
def library() -> Any:
    """cuDNN's Python frontend; None where it is not installed, or finds no cuDNN."""
    try:
        import cudnn

        cudnn.backend_version()
    except (ImportError, OSError, RuntimeError):
        return None
    return cudnn


@dataclass(frozen=True)
class _Plan:
    """A graph of one batch size, and which of its plans runs it.

    Attributes:
        index: of the plan, among those of the graph.
        workspace: bytes that it takes.
    """

    graph: Any
    index: int
    workspace: int

    @classmethod
    def of(cls, problem: Problem, config: CudnnGraphConfig, batch: int) -> _Plan:
        """The plan of a config. For another batch than the problem's, it is the last where there are not so many.

        Raises:
            ValueError: where cuDNN has no such plan.
        """
        cudnn = library()
        with torch.cuda.device(problem.device):
            graph = _graph(problem, batch)
            found, names = None, set[str]()
            try:
                graph.validate()
                graph.build_operation_graph()
                graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B])
                for index in range(graph.get_execution_plan_count()):
                    if (name := graph.get_plan_name_at_index(index)) in names or not _builds(graph, index):
                        continue
                    names.add(name)
                    found = cls(graph, index, graph.get_workspace_size_plan_at_index(index))
                    if len(names) > config.choice:
                        return found
            except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"cuDNN has no engine for it: {reason}") from error
            if found is None or batch == max(problem.batch, 1):
                raise ValueError(f"cuDNN's engines have no plan number {config.choice} for it")
            return found

    def run(self, device: torch.device, tensors: Mapping[int, torch.Tensor | None]) -> None:
        """Launches it on the current stream; tensors by their numbers, None for one that there is not."""
        addresses = {number: tensor.data_ptr() for number, tensor in tensors.items() if tensor is not None}
        with torch.cuda.device(device):
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
            self.graph.execute_plan_at_index(addresses, workspace.data_ptr(), self.index, _handle(device))


def _graph(problem: Problem, batch: int) -> Any:
    """A problem as a graph, for so many samples; activations other than ReLU are left out."""
    cudnn = library()
    types = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
    storage, single = getattr(cudnn.data_type, types[problem.storage]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=storage,
        intermediate_data_type=single,
        compute_data_type=single,
        handle=_handle(torch.device(problem.device)),
    )

    def tensor(number: int, shape: Sequence[int]) -> Any:
        return graph.tensor(dim=list(shape), stride=_strides(shape), data_type=storage).set_uid(number)

    out_shape = (batch, *problem.output_shape[1:])
    top, bottom, left, right = problem.padding
    y = graph.conv_fprop(
        image=tensor(_X, (batch, *problem.input_shape[1:])),
        weight=tensor(_WEIGHT, problem.weight_shape),
        pre_padding=[top, left],
        post_padding=[bottom, right],
        stride=list(problem.stride),
        dilation=list(problem.dilation),
    )
    if problem.epilogue.residual:
        y = graph.add(a=y, b=tensor(_RESIDUAL, out_shape))
    y = graph.bias(input=y, bias=tensor(_BIAS, (1, problem.out_channels, 1, 1)))
    if problem.epilogue.activation == "relu":
        y = graph.relu(input=y)
    y.set_output(True).set_data_type(storage).set_uid(_Y)
    y.set_dim(list(out_shape)).set_stride(_strides(out_shape))
    return graph


def _strides(shape: Sequence[int]) -> list[int]:
    """Those of channels_last, also where torch counts axes of size one differently."""
    _, channels, height, width = shape
    return [channels * height * width, 1, channels * width, channels]


def _builds(graph: Any, index: int) -> bool:
    """Builds a plan, if cuDNN can and its workspace is not too large."""
    try:
        graph.build_plan_at_index(index)
    except (RuntimeError, library().cudnnGraphNotSupportedError):
        return False
    return bool(graph.get_workspace_size_plan_at_index(index) <= _MOST_WORKSPACE)


class _Handles(dict[torch.device, Any]):
    """A thread's handles. Once it ends others take them: layers are prepared by many threads that live shortly."""

    def __init__(self, left: dict[torch.device, list[Any]]) -> None:
        super().__init__()
        self._left = left

    def take(self, device: torch.device) -> Any:
        if device not in self:
            try:
                self[device] = self._left[device].pop()
            except LookupError:
                with torch.cuda.device(device):
                    self[device] = library().create_handle()
        return self[device]

    def __del__(self) -> None:
        for device, handle in self.items():
            self._left.setdefault(device, []).append(handle)


_of_thread = threading.local()
_left: dict[torch.device, list[Any]] = {}  # by threads that ended


def _handle(device: torch.device) -> Any:
    """This thread's handle of cuDNN, on the device's current stream."""
    if (handles := _of_thread.__dict__.get("handles")) is None:
        handles = _of_thread.handles = _Handles(_left)
    handle = handles.take(device)
    library().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle
