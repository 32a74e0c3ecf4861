"""What every way to run a convolution offers the planner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F

from escort.cuda.binary import Binary
from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.kernels import _cpu
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat, Precision, Problem, torch_name

#: Of how many batch sizes a runner remembers how it cuts them up; a further one is worked out anew.
MOST_BATCHES = 64

Config = Any  # a frozen dataclass of scalars: the tuning knobs of a method, which a plan stores and compares


class Runner(Protocol):
    """Runs a prepared convolution, for any N.

    It takes x (N, C, H, W) and residual (N, K, out_height, out_width), in any memory format, and returns y of the
    residual's shape in the problem's memory format.
    """

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


#: Runs a convolution on images of bytes. It is given these, (N, H, W, C) or (N, C, H, W), and for each channel what
#: bytes are multiplied by and what is added then, (2, C) float32; it returns y.
ImagesRunner = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Prepared:
    """A convolution that is ready to run.

    Attributes:
        run: what runs it.
        binary: the kernel, where one was compiled for this filter.
        notes: numbers by name that the plan shows beside the time.
        binaries: of all the kernels that it launches.
        op: the same for a native program, where the method has that: its inputs are x and the residual.
        of_images: given whether channels come last, what normalises images of bytes on the way; None where the method
            has no such thing, or its kernel cannot be had.
    """

    run: Runner
    binary: Binary | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    binaries: tuple[Binary, ...] = ()
    op: _cpu.Op | None = None
    of_images: Callable[[bool], ImagesRunner | None] = lambda channels_last: None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.run(x, residual)


class Method(ABC):
    """One way to run a convolution.

    A method states what it cannot do, lists the configs that are worth a try and prepares one of them. Everything that
    depends on shapes and weights happens in `prepare`; the runner that it returns only runs.

    Attributes:
        name: what plans and results call the method. On each type of device a name means one method.
        device_type: "cpu" or "cuda".
        config_type: the class of its configs, a frozen dataclass of scalars.
        is_dense: whether it is a dense library's, which multiplies the zeros as well. The fastest of these stands for
            the dense model; kernels of ours for layers that are dense anyway do not.
        compiles_per_filter: whether `prepare` compiles a kernel for the filter, which takes long and has a budget.
        lowers: whether it writes the input out patch by patch, which takes memory.
        is_native: whether what it prepares has an `op`, so that native programs call it.
    """

    name: ClassVar[str]
    device_type: ClassVar[Literal["cpu", "cuda"]]
    config_type: ClassVar[type[Any]]
    is_dense: ClassVar[bool] = False
    compiles_per_filter: ClassVar[bool] = False
    lowers: ClassVar[bool] = False
    is_native: ClassVar[bool] = False

    def missing(self) -> str | None:
        """What has to be installed for the method, with the command that does; None where all is here."""
        return None

    def version(self) -> str:
        """The version of a library besides torch that the method runs by; empty where there is none."""
        return ""

    def unsupported(self, problem: Problem) -> str | None:
        """Why this method cannot run a problem on its type of device, or None where it can."""
        return None

    @abstractmethod
    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Config]:
        """The search space for this problem, best guess first."""

    @abstractmethod
    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: Config,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        """Makes what runs this filter on this input size, on the problem's device.

        Args:
            bias: (K,) float32 on any device, or None.
            config: one of :meth:`configs` or :meth:`benchmark_configs`.
            slope: (K,) float32 on any device where the activation is "prelu", else None.

        Raises:
            ValueError: if the config does not fit the problem, or a weight is too large for the storage type.
            RuntimeError: if the device refuses.
            ImportError: if there is no compiler for a kernel that is not compiled yet.
        """

    def kernels(self, problem: Problem, config: Config) -> Sequence[Variant]:
        """The kernels that a config runs a problem by, but for those that are compiled for the filter."""
        return ()

    def offers(self, problem: Problem, sparse_filter: SparseFilter, config: Config) -> bool:
        """Whether a config is of the search space for this problem. Kernels trust their configs: no other is prepared.

        It says no less than :meth:`configs`, without a prediction. The config's fields have their types.
        """
        return config in self.configs(problem, sparse_filter)

    def without_trying(self, config: Config) -> Config:
        """A config with what its first call takes long to try left out: nearly as fast, or the config itself."""
        return config

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: Config | None = None
    ) -> float | None:
        """The time that the method's model predicts for a config, in us; by default the least time of all configs.

        None where the method has no model.
        """
        return None

    def outdone(self, problem: Problem, sparse_filter: SparseFilter) -> str | None:
        """Why a dense library is sure to be as fast, which is known without a search; None where it may not be."""
        return None

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: Config) -> float:
        """About how many seconds of one core it takes to compile a config for the filter."""
        return 0.0

    def channel_order(self, weights: Sequence[torch.Tensor], precision: Precision) -> torch.Tensor | None:
        """An order of input channels, (C,) int64, that suits all filters which read one tensor; None where any will do.

        Args:
            weights: of the filters, each (K, C, R, S).
        """
        return None

    # For benchmarks alone.

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Config]:
        """Configs that no plan can choose and that benchmarks time too."""
        return ()

    def input_format(self, config: Config) -> MemoryFormat:
        """The memory format in which a config takes its input without conversion."""
        return "contiguous"

    def neighbours(self, config: Config, problem: Problem, sparse_filter: SparseFilter) -> dict[str, list[Config]]:
        """For each knob, the configs that differ from `config` in it alone."""
        space = self.configs(problem, sparse_filter)
        values = {f.name: dict.fromkeys(getattr(other, f.name) for other in space) for f in fields(config)}
        return {
            name: [replace(config, **{name: value}) for value in axis if value != getattr(config, name)]
            for name, axis in values.items()
        }


def input_check(
    problem: Problem, most_samples: int | None = None
) -> Callable[[torch.Tensor, torch.Tensor | None], None]:
    """A check of a runner's arguments: x (N, C, H, W) and residual (N, K, out_height, out_width) or None, for any N.

    The check raises ValueError where shape, type or device are not those that the runner was prepared for.

    Args:
        most_samples: the largest N that the kernel can address; the check raises beyond it, too.
    """
    in_shape, out_shape, dtype = problem.input_shape[1:], problem.output_shape[1:], problem.storage
    device, takes_residual = torch.device(problem.device), problem.epilogue.residual
    name = torch_name(dtype)

    def check(x: torch.Tensor, residual: torch.Tensor | None) -> None:
        shape = x.shape
        if shape[1:] != in_shape or x.dtype is not dtype or x.device != device:
            raise ValueError(
                f"prepared for {name} inputs of shape (N, *{in_shape}) on {device}, got {x.dtype} {tuple(shape)} "
                f"on {x.device}"
            )
        if (residual is not None) is not takes_residual:
            raise ValueError(f"prepared {'for' if takes_residual else 'without'} a residual, and called otherwise")
        if most_samples is not None and shape[0] > most_samples:
            raise ValueError(
                f"the kernel addresses {most_samples} samples of this size at most, got {shape[0]}; pass fewer"
            )
        if residual is None:
            return
        if residual.shape != (shape[0], *out_shape) or residual.dtype is not dtype or residual.device != device:
            raise ValueError(
                f"a residual is {name} of shape {(shape[0], *out_shape)} on {device}, got {residual.dtype} "
                f"{tuple(residual.shape)} on {residual.device}"
            )

    return check


def prepared_op(problem: Problem, op: _cpu.Convolution) -> Prepared:
    """A convolution of the CPU kernels, to be called with tensors or in a native program."""
    run_kernel, threads = op.run, torch.get_num_threads
    check, out_shape = input_check(problem), problem.output_shape[1:]

    def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        check(x, residual)
        samples, x = x.shape[0], x.contiguous()
        y = x.new_empty((samples, *out_shape))  # whatever the default type and device are
        if residual is not None:
            residual = residual.contiguous()
        residual_address = 0 if residual is None else residual.data_ptr()
        run_kernel(x.data_ptr(), residual_address, y.data_ptr(), samples, threads())
        return y

    return Prepared(run, op=op)


def output_strides(problem: Problem, memory_format: MemoryFormat) -> tuple[int, ...]:
    """The strides of y (N, K, out_height, out_width), with which torch allocates it in the least time."""
    torch_format = TORCH_MEMORY_FORMAT[memory_format]
    return torch.empty((1, *problem.output_shape[1:]), device="meta", memory_format=torch_format).stride()


def contiguous_only(problem: Problem) -> str | None:
    """Why a method that knows NCHW only cannot run a problem in another memory format, or None where it can."""
    return None if problem.memory_format == "contiguous" else "it reads and writes NCHW; plan it in that memory format"


def aligned(x: torch.Tensor, alignment: int) -> torch.Tensor:
    """x, or a copy of it where its address is no multiple of `alignment` bytes, which kernels copy at once."""
    return x.clone() if x.data_ptr() % alignment else x


def finisher(
    problem: Problem, slope: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """What adds a residual, or None, to y and applies the activation, by torch's operators and in y's place."""
    activate = _in_place(problem, slope)

    def finish(y: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if residual is not None:
            if residual.shape != y.shape or residual.dtype is not y.dtype:
                raise ValueError(
                    f"a residual is {y.dtype} of shape {tuple(y.shape)}, got {residual.dtype} {tuple(residual.shape)}"
                )
            y += residual
        return activate(y)

    return finish


def _in_place(problem: Problem, slope: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A problem's activation, written over its argument where torch can do that."""
    match problem.epilogue.activation:
        case "none":
            return lambda y: y
        case "relu":
            return torch.relu_
        case "relu6":
            return lambda y: y.clamp_(0.0, 6.0)
        case "leaky_relu":
            return partial(F.leaky_relu_, negative_slope=problem.epilogue.negative_slope)
        case "prelu":
            assert slope is not None
            slopes = slope.detach().to(problem.device, problem.storage)
            return lambda y: torch.prelu(y, slopes)
        case "sigmoid":
            return torch.sigmoid_
        case "tanh":
            return torch.tanh_
        case "gelu":
            return torch.ops.aten.gelu_.default
        case "gelu_tanh":
            return partial(torch.ops.aten.gelu_.default, approximate="tanh")
        case name:
            return partial(getattr(F, name), inplace=True)
