"""Method `cudnn_graph`: a dense convolution with its epilogue as one graph of cuDNN's, by cuDNN's Python frontend.

cuDNN's heuristics say which engines may run a graph. Those that the library brings compiled take a graph of one form
alone: convolution, residual, bias in the storage type, ReLU. For any other graph cuDNN generates a kernel, which takes
about a second. Such graphs are of dynamic shape, so that one kernel serves all sizes (docs/notes/rivals.md).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch

from escort.filter import SparseFilter
from escort.methods.base import MOST_BATCHES, Method, Prepared, aligned, input_check, output_strides
from escort.methods.sharing import dense_weight
from escort.problem import Problem

#: Whose kernel runs a graph: one that cuDNN brings compiled, or one that it generates for graphs of this form.
Engine = Literal["compiled", "generated"]

_MISSING = "the package nvidia-cudnn-frontend, or cuDNN itself, is missing: pip install 'escort-sparse[cudnn]'"
_ALIGNMENT = 16  # bytes, of all tensors
_MOST_WORKSPACE = 64 << 20  # bytes of a plan's
_MOST_COMPILED = 3  # plans that are offered: cuDNN puts the one first that it expects to be fastest
_X, _WEIGHT, _BIAS, _RESIDUAL, _Y = range(1, 6)  # the tensors of a graph

#: What cuDNN calls the activations that it generates code for, and with which arguments.
_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "none": ("", {}),
    "relu": ("relu", {}),
    "relu6": ("relu", {"lower_clip": 0.0, "upper_clip": 6.0}),
    "leaky_relu": ("relu", {}),
    "sigmoid": ("sigmoid", {}),
    "tanh": ("tanh", {}),
    "silu": ("swish", {}),
    "gelu": ("gelu", {}),
    "gelu_tanh": ("gelu_approx_tanh", {}),
}


@dataclass(frozen=True)
class CudnnGraphConfig:
    """Which plan of cuDNN's runs the graph.

    Attributes:
        choice: the how many-th of those that cuDNN's heuristics offer, from 0.
    """

    engine: Engine
    choice: int = 0


class CudnnGraph(Method):
    """Tensor cores alone, in channels_last: fp16, bf16 and TF32, with sums in fp32."""

    name = "cudnn_graph"
    is_dense = True
    device_type = "cuda"
    config_type = CudnnGraphConfig

    def missing(self) -> str | None:
        return None if library() is not None else _MISSING

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision == "fp32":
            return "its graphs run on tensor cores, which strict float32 does not use"
        if problem.memory_format != "channels_last":
            return "it reads and writes channels_last; plan it in that memory format"
        if problem.epilogue.activation not in _ACTIVATIONS:
            return f"its graphs have no {problem.epilogue.activation}"
        return self.missing()

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[CudnnGraphConfig]:
        if problem.epilogue.activation in ("none", "relu"):
            compiled = [CudnnGraphConfig("compiled", choice) for choice in range(_MOST_COMPILED)]
            return [*compiled, CudnnGraphConfig("generated")]
        return [CudnnGraphConfig("generated", choice) for choice in range(2)]

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
        device, is_compiled = torch.device(problem.device), config.engine == "compiled"
        weight = dense_weight(problem, sparse_filter, torch.channels_last)
        if bias is None and is_compiled:
            bias = torch.zeros(problem.out_channels)
        addend = None if bias is None else bias.detach().to(device, problem.storage if is_compiled else torch.float32)
        plan_for = partial(_Plan.of, problem, config, has_bias=addend is not None)
        planned = max(problem.batch, 1)
        plans = {planned: plan_for(planned)}
        check, out_shape = input_check(problem), problem.output_shape[1:]
        strides = output_strides(problem, "channels_last")

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            check(x, residual)
            samples = x.shape[0]
            y = x.new_empty_strided((samples, *out_shape), strides)
            if samples == 0:
                return y
            if (plan := plans.get(samples)) is None:
                if len(plans) >= MOST_BATCHES:
                    plans.clear()
                plan = plans[samples] = plan_for(samples)
            x = aligned(x.contiguous(memory_format=torch.channels_last), _ALIGNMENT)
            if residual is not None:
                residual = aligned(residual.contiguous(memory_format=torch.channels_last), _ALIGNMENT)
            plan.run(device, {_X: x, _WEIGHT: weight, _BIAS: addend, _RESIDUAL: residual, _Y: y})
            return y

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
    def of(cls, problem: Problem, config: CudnnGraphConfig, batch: int, *, has_bias: bool) -> _Plan:
        """The plan of a config. For another batch than the problem's, it is the last where there are not so many.

        Raises:
            ValueError: where cuDNN has no such plan.
        """
        cudnn = library()
        with torch.cuda.device(problem.device):
            graph = _graph(problem, config, batch, has_bias=has_bias)
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
                raise ValueError(f"cuDNN has no {config.engine} engine for it: {reason}") from error
            if found is None or batch == max(problem.batch, 1):
                raise ValueError(f"cuDNN's {config.engine} engines have no plan number {config.choice} for it")
            return found

    def run(self, device: torch.device, tensors: Mapping[int, torch.Tensor | None]) -> None:
        """Launches it on the current stream; tensors by their numbers, None for one that there is not."""
        addresses = {number: tensor.data_ptr() for number, tensor in tensors.items() if tensor is not None}
        with torch.cuda.device(device):
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
            self.graph.execute_plan_at_index(addresses, workspace.data_ptr(), self.index, _handle(device))


def _graph(problem: Problem, config: CudnnGraphConfig, batch: int, *, has_bias: bool) -> Any:
    """A problem as a graph, for so many samples."""
    cudnn, epilogue = library(), problem.epilogue
    types = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
    storage, single = getattr(cudnn.data_type, types[problem.storage]), cudnn.data_type.FLOAT
    is_compiled = config.engine == "compiled"
    device = torch.device(problem.device)
    dynamic = {} if is_compiled else {"is_dynamic_shape_enabled": True, "kernel_cache": _kernels(device.index)}
    graph = cudnn.pygraph(
        io_data_type=storage,
        intermediate_data_type=single,
        compute_data_type=single,
        handle=_handle(device),
        **dynamic,
    )

    def tensor(number: int, shape: Sequence[int], data_type: Any) -> Any:
        return graph.tensor(dim=list(shape), stride=_strides(shape), data_type=data_type).set_uid(number)

    out_shape = (batch, *problem.output_shape[1:])
    top, bottom, left, right = problem.padding
    y = graph.conv_fprop(
        image=tensor(_X, (batch, *problem.input_shape[1:]), storage),
        weight=tensor(_WEIGHT, problem.weight_shape, storage),
        pre_padding=[top, left],
        post_padding=[bottom, right],
        stride=list(problem.stride),
        dilation=list(problem.dilation),
    )
    if epilogue.residual:
        y = graph.add(a=y, b=tensor(_RESIDUAL, out_shape, storage))
    if has_bias:
        column = (1, problem.out_channels, 1, 1)
        y = graph.bias(input=y, bias=tensor(_BIAS, column, storage if is_compiled else single))
    activation, arguments = _ACTIVATIONS[epilogue.activation]
    if epilogue.activation == "leaky_relu":
        arguments = {"negative_slope": epilogue.negative_slope}
    if activation:
        y = getattr(graph, activation)(input=y, **arguments)
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


@cache
def _kernels(device_index: int) -> Any:
    """The kernels that cuDNN generated for graphs of dynamic shape, of whatever size."""
    return library().create_kernel_cache()


_of_thread = threading.local()


def _handle(device: torch.device) -> Any:
    """This thread's handle of cuDNN, on the device's current stream."""
    handles = _of_thread.__dict__.setdefault("handles", {})
    if device not in handles:
        with torch.cuda.device(device):
            handles[device] = library().create_handle()
    library().set_stream(handle=handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return handles[device]
