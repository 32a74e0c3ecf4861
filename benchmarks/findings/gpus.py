"""What is known of the GPUs that results come from."""

from __future__ import annotations

from benchmarks.result_files import Result
from escort.cuda.gpu import H200, Gpu

#: GPUs that the methods' models know, as results name them.
GPUS = {"NVIDIA H200": H200}
#: Their TFLOP/s of multiply-adds outside of the tensor cores, by precision: NVIDIA's data sheet gives 67 in fp32, which
#: is 2 flop * 128 lanes * 132 multiprocessors * 1.98 GHz, and packed fp16 does two multiply-adds per lane.
PEAK_TFLOPS = {"NVIDIA H200": {"fp32": 67.0, "fp16": 134.0}}

#: Their memory's TB/s, from the same data sheet.
MEMORY_TB_S = {"NVIDIA H200": 4.8}
#: TFLOP/s of their tensor cores on dense operands, by precision.
TENSOR_TFLOPS = {"NVIDIA H200": {"tf32": 495.0, "fp16": 990.0, "bf16": 990.0}}


def gpu_of(result: Result) -> Gpu | None:
    """The GPU that a result was measured on; None where the models do not know it."""
    return GPUS.get(result.header.get("gpu", ""))


def peak_tflops(result: Result, precision: str) -> float | None:
    """The peak of the GPU that a result was measured on, where it is known."""
    return PEAK_TFLOPS.get(result.header.get("gpu", ""), {}).get(precision)
