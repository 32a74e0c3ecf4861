"""What every way to run a convolution offers the planner."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F

from escort.cuda.compiler import Binary
from escort.cuda.gpu import Gpu
from escort.filter import SparseFilter
from escort.problem import MemoryFormat, Precision, Problem

Config = Any  # a frozen dataclass of scalars: the tuning knobs of a method, which a plan stores and compares


class Runner(Protocol):
    """Runs a prepared convolution: x (N, C, H, W) and residual (N, K, out_height, out_width) to y like residual, any N.

    x and residual may lie in any memory format, and y lies in the problem's.
    """

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Prepared:
    """A convolution that is ready to run.

    Attributes:
        run: what runs it.
        binary: the kernel, where one was compiled for this filter.
        notes: what a plan tells besides, by name: numbers only.
    """

    run: Runner
    binary: Binary | None = None
    notes: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.run(x, residual)


class Method(ABC):
    """One way to run a convolution.

    A method states what it cannot do, lists the configs that are worth a try and prepares one of them. Everything that
    depends on shapes and weights happens in `prepare`; what it returns only runs.

    Attributes:
        name: what plans and results call it. On each type of device a name means one method.
        device_type: "cpu" or "cuda".
        config_type: the class of its configs.
        is_dense: whether it multiplies the zeros as well: the fastest of these stands for the dense model.
        compiles_per_filter: whether `prepare` compiles a kernel for the filter; that takes long and has a budget.
    """

    name: ClassVar[str]
    device_type: ClassVar[Literal["cpu", "cuda"]]
    config_type: ClassVar[type[Any]]
    is_dense: ClassVar[bool] = False
    compiles_per_filter: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        """Why this method cannot run a problem on its type of device, or None where it can."""
        return None

    @abstractmethod
    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Config]:
        """The search space for this problem, best guess first."""

    @abstractmethod
    def prepare(
        self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: Config
    ) -> Prepared:
        """What runs this filter on this input size, on the problem's device. bias: (K,) on any device, or None.

        Raises:
            ValueError: where the config does not fit, or a weight does not fit the storage type.
            RuntimeError: where the device refuses.
        """

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: Config | None = None
    ) -> float | None:
        """The time that the method's model predicts for a config, by default the least of all; None without a model."""
        return None

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: Config) -> float:
        """About how many seconds of one core it takes to compile a config for the filter."""
        return 0.0

    def channel_order(self, weights: Sequence[torch.Tensor], precision: Precision) -> torch.Tensor | None:
        """The order of their input channels, (C,) int64, that suits weights (K, C, R, S) of one tensor best, if any."""
        return None

    # For benchmarks alone.

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Config]:
        """Configs that no plan can choose, which benchmarks time besides."""
        return ()

    def input_format(self, config: Config) -> MemoryFormat:
        """The memory format in which a config takes its input without conversion."""
        return "contiguous"

    def neighbours(self, config: Config, problem: Problem, sparse_filter: SparseFilter) -> dict[str, list[Config]]:
        """For each knob, the configs that differ from `config` in it alone."""
        space = self.configs(problem, sparse_filter)
        values = {f.name: dict.fromkeys(getattr(other, f.name) for other in space) for f in fields(config)}
        return {
            name: [replace(config, **{name: value}) for value in found if value != getattr(config, name)]
            for name, found in values.items()
        }


def input_check(
    problem: Problem, most_images: int | None = None
) -> Callable[[torch.Tensor, torch.Tensor | None], None]:
    """A check that raises ValueError where a runner is called with another shape, type or device than prepared for.

    It takes x (N, C, H, W) and, if the problem has a residual, residual (N, K, out_height, out_width), of any N.

    Args:
        most_images: that the kernel can address; raises beyond, too.
    """
    in_shape, out_shape, dtype = problem.input_shape[1:], problem.output_shape[1:], problem.storage
    device, takes_residual = torch.device(problem.device), problem.epilogue.residual
    name = str(dtype).removeprefix("torch.")

    def check(x: torch.Tensor, residual: torch.Tensor | None) -> None:
        if x.shape[1:] != in_shape or x.dtype is not dtype or x.device != device:
            raise ValueError(
                f"prepared for {name} inputs of shape (N, *{in_shape}) on {device}, got {x.dtype} {tuple(x.shape)} "
                f"on {x.device}"
            )
        if (residual is not None) is not takes_residual:
            raise ValueError(f"prepared {'for' if takes_residual else 'without'} a residual, and called otherwise")
        if most_images is not None and len(x) > most_images:
            raise ValueError(f"the kernel addresses {most_images} images of this size at most, got {len(x)}")
        if residual is None:
            return
        shape = len(x), *out_shape
        if residual.shape != shape or residual.dtype is not dtype or residual.device != device:
            raise ValueError(
                f"a residual is {name} of shape {shape} on {device}, got {residual.dtype} {tuple(residual.shape)} "
                f"on {residual.device}"
            )

    return check


def contiguous_only(problem: Problem) -> str | None:
    """Why a method that knows NCHW only cannot run a problem in another memory format, or None where it can."""
    return None if problem.memory_format == "contiguous" else "it reads and writes NCHW; plan it in that memory format"


def aligned(x: torch.Tensor, bytes: int) -> torch.Tensor:
    """x, or a copy of it where it lies at no multiple of so many bytes, for kernels that copy as many at once."""
    return x.clone() if x.data_ptr() % bytes else x


def apply_epilogue(y: torch.Tensor, residual: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The epilogue behind the bias, by torch operators in place."""
    if residual is not None:
        if residual.shape != y.shape or residual.dtype is not y.dtype:
            raise ValueError(
                f"a residual is {y.dtype} of shape {tuple(y.shape)}, got {residual.dtype} {tuple(residual.shape)}"
            )
        y += residual
    if activation == "relu":
        return y.relu_()
    return y.clamp_(0.0, 6.0) if activation == "relu6" else y


def symmetric_padding(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """x and the zeros (rows, columns) still to be added on both sides of it.

    Torch's operators pad both sides alike: where the problem does not, x comes back padded and nothing is left to add.
    """
    top, bottom, left, right = problem.padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def unfold(problem: Problem, x: torch.Tensor, *, by_image: bool = False) -> torch.Tensor:
    """im2col: every input patch as a column, (N, groups, C / groups * R * S, positions); N is positive.

    Torch unfolds a batch on a GPU by one kernel per image. Here one kernel does it, since the channels of all images
    make the columns that the channels of one large image would; a pointwise convolution needs none.

    Args:
        by_image: leave the batch to torch and unfold a pointwise convolution too.
    """
    images, channels, height, width = x.shape
    shape = images, problem.groups, channels // problem.groups * problem.kernel_size[0] * problem.kernel_size[1]
    pointwise = problem.kernel_size == problem.stride == (1, 1) and not any(problem.padding)
    if pointwise and not by_image:
        return x.reshape(*shape, height * width)
    x, padding = symmetric_padding(problem, x)
    if not by_image:
        x = x.reshape(1, images * channels, *x.shape[2:])
    columns = F.unfold(x, problem.kernel_size, problem.dilation, padding, problem.stride)
    return columns.view(*shape, problem.out_height * problem.out_width)


def csr_matrices(
    sparse_filter: SparseFilter, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """The filter as torch CSR tensors of shape (K / groups, C / groups * R * S), one per group."""
    rows, width = (
        sparse_filter.shape[0] // sparse_filter.groups,
        sparse_filter.shape[1] * sparse_filter.shape[2] * sparse_filter.shape[3],
    )
    matrices = []
    for group in range(sparse_filter.groups):
        indptr = torch.from_numpy(sparse_filter.indptr[group * rows : (group + 1) * rows + 1])
        first, end = int(indptr[0]), int(indptr[-1])
        columns, values = (torch.from_numpy(a[first:end]) for a in (sparse_filter.columns, sparse_filter.values))
        with warnings.catch_warnings():  # torch calls its CSR tensors beta
            warnings.simplefilter("ignore", UserWarning)
            parts = (indptr - first).to(device), columns.to(device), values.to(device, dtype)
            matrices.append(torch.sparse_csr_tensor(*parts, (rows, width)))
    return matrices


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Makes torch's float32 matrix products on GPUs exact, or TF32 where that is the precision asked for.

    The setting is the process's: other threads see it meanwhile, and what the user chose comes back at the end.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        with _fp32_precision(torch.backends.cuda.matmul, precision):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def float32_convolutions(precision: Precision) -> Iterator[None]:
    """The same for torch's own convolutions."""
    if hasattr(torch.backends.cudnn, "conv"):
        with _fp32_precision(torch.backends.cudnn.conv, precision):
            yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _fp32_precision(operators: Any, precision: Precision) -> Iterator[None]:
    """Since torch 2.9 there is a setting per kind of operator, and where it is used the older ones may not be read."""
    before = operators.fp32_precision
    operators.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        operators.fp32_precision = before
