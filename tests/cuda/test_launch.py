"""Launches, through a driver that records its calls, and on a GPU."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda.bindings import driver as bindings

from escort.cuda.kernel import Kernel, Text, kernel
from escort.cuda.tensor_map import TensorMap, tiled
from tests.cuda.kernels import FUNCTION, LAUNCH, SHARED, THREADS, FakeDriver, LaunchConfig, Status, bind, tensor

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_launch_passes_what_it_is_given(compiled: Kernel, driver: FakeDriver) -> None:
    x, y, launch = tensor(), tensor(), bind(compiled)
    launch((3, 2, 1), x, y, 2.5, -7)
    launch((3, 2, 1), None, y, -1.0, 7)
    first, second = driver.launches
    assert first.values == [x.data_ptr(), y.data_ptr(), 2.5, -7] and second.values == [None, y.data_ptr(), -1.0, 7]
    assert (first.grid, first.block, first.shared, first.stream) == ((3, 2, 1), (THREADS, 1, 1), SHARED, 70)
    assert first.function == FUNCTION and driver.called("cuGetProcAddress") == [[b"cuLaunchKernelEx", 12000, 1]]
    assert len(driver.called("cuCtxPushCurrent")) == 1  # while it was loaded


def test_a_bound_launch_takes_what_is_left(compiled: Kernel, driver: FakeDriver) -> None:
    x, y = tensor(), tensor()
    compiled.bind(THREADS, SHARED, (torch.Tensor, y, 0.5, int))((1, 1, 1), x, 4)
    compiled.bind(THREADS, SHARED, (None, torch.Tensor, float, 9), overlap=True)((2, 1, 1), y, 3.0)
    assert driver.launches[0].values == [x.data_ptr(), y.data_ptr(), 0.5, 4] and driver.launches[0].attributes == []
    assert driver.launches[1].values == [None, y.data_ptr(), 3.0, 9]
    assert driver.launches[1].attributes == [(6, [1])]
    compiled.bind(THREADS, SHARED, (None, y, 0.5, 4), overlap=True, cluster=8)((8, 1, 1))
    compiled.bind(THREADS, SHARED, (None, y, 0.5, 4), cluster=2)((8, 1, 1))
    assert driver.launches[2].attributes == [(6, [1]), (4, [8, 1, 1])]
    assert driver.launches[3].attributes == [(4, [2, 1, 1])]


def test_the_driver_declares_what_a_launch_passes() -> None:
    declared = bindings.CUlaunchConfig()
    declared.gridDimX, declared.gridDimY, declared.gridDimZ = 1, 2, 3
    declared.blockDimX, declared.blockDimY, declared.blockDimZ = 4, 5, 6
    declared.sharedMemBytes, declared.hStream, declared.numAttrs = 7, 8, 2
    overlap, cluster = bindings.CUlaunchAttribute(), bindings.CUlaunchAttribute()
    overlap.id = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    cluster.id = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = 8, 1, 1
    declared.attrs = [overlap, cluster]
    passed = LaunchConfig.from_address(declared.getPtr())
    assert ([*passed.grid], [*passed.block]) == ([1, 2, 3], [4, 5, 6])
    assert (passed.shared_bytes, passed.stream) == (7, 8)
    assert passed.attribute_values() == [(6, [1]), (4, [8, 1, 1])]


@pytest.fixture
def mapped(driver: FakeDriver, scale: Path) -> Kernel:
    """A kernel with the parameters (pointer, map, int, map, float)."""
    mapping = ctypes.c_char * 128
    driver.parameters = [ctypes.c_void_p, mapping, ctypes.c_int, mapping, ctypes.c_float]
    return kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))


#: Of samples of 2 x 3 x 64.
MAP = tiled(torch.float16, (64, 3, 2, 1), (64, 8, 1, 1))


def sample_tensor(samples: int = 1) -> torch.Tensor:
    return tensor(samples, 2, 3, 64, dtype=torch.float16)


def test_tensors_are_passed_as_their_maps(mapped: Kernel, driver: FakeDriver) -> None:
    x, first, second = tensor(), sample_tensor(5), sample_tensor(2)
    values = (x, first, -3, second, 1.5)
    kinds = (torch.Tensor, MAP, int, MAP, float)
    for fixed in ((), (0,), (0, 2, 4)):
        launch = mapped.bind(THREADS, 0, [values[i] if i in fixed else kinds[i] for i in range(5)])
        for _ in range(2):
            driver.maps.clear()
            launch((1, 1, 1), *[values[i] for i in range(5) if i not in fixed])
            assert driver.launches[-1].values == [x.data_ptr(), b"\1" * 128, -3, b"\2" * 128, 1.5]
            assert [(address, sizes) for _, address, sizes, *_ in driver.maps] == [
                (first.data_ptr(), [64, 3, 2, 5]),
                (second.data_ptr(), [64, 3, 2, 2]),
            ]
            assert not any(driver.launches[-1].addresses[i] % 64 for i in (1, 3))


def test_a_map_that_is_not_read(mapped: Kernel, driver: FakeDriver) -> None:
    mapped.bind(THREADS, 0, (None, MAP, 1, MAP, 1.0))((1, 1, 1), None, sample_tensor())
    assert driver.launches[0].values[1:4:2] == [bytes(128), b"\1" * 128] and len(driver.maps) == 1


def test_wrong_tensor_maps_are_refused(mapped: Kernel, driver: FakeDriver) -> None:
    with pytest.raises(TypeError, match=r"parameters of \[8, 128, 4, 128, 4\] bytes, got .*Tensor.*TensorMap"):
        mapped.bind(THREADS, 0, (torch.Tensor, None, 1, MAP, 1.0))
    with pytest.raises(TypeError, match="tensor maps that `tiled` or `im2col` made .*, not TensorMap"):
        mapped.bind(THREADS, 0, (None, TensorMap, 1, MAP, 1.0))
    launch = mapped.bind(THREADS, 0, (None, MAP, 1, MAP, 1.0))
    with pytest.raises(ValueError, match="kernel scale .* samples of 384 elements, got one of 385"):
        launch((1, 1, 1), sample_tensor(), tensor(385, dtype=torch.float16))
    with pytest.raises(ValueError, match="tensor on cpu"):
        launch((1, 1, 1), sample_tensor(), torch.zeros(384, dtype=torch.float16))
    for wrong in (1, bytes(128)):
        with pytest.raises(AttributeError, match="get_device"):
            launch((1, 1, 1), sample_tensor(), wrong)
    assert not driver.launches


def test_a_refused_map_is_an_error_and_no_launch(mapped: Kernel, driver: FakeDriver) -> None:
    launch = mapped.bind(THREADS, 0, (torch.Tensor, MAP, 1, MAP, 1.0))
    driver.failing["cuTensorMapEncodeTiled"] = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(ValueError, match="kernel scale of .*: a tensor map of torch.float16 .*INVALID_VALUE"):
        launch((1, 1, 1), None, sample_tensor(), sample_tensor())
    driver.failing.clear()
    assert not driver.launches
    launch((1, 1, 1), None, sample_tensor(), sample_tensor())
    assert len(driver.launches) == 1


def test_a_bound_tensor_is_kept(compiled: Kernel, driver: FakeDriver) -> None:
    launch = compiled.bind(THREADS, SHARED, (tensor(), torch.Tensor, 1.0, 1))
    assert isinstance(launch._args[0], torch.Tensor)


def test_a_grid_without_blocks_is_no_launch(compiled: Kernel, driver: FakeDriver) -> None:
    bind(compiled)((0, 1, 1), None, tensor(), 1.0, 0)
    assert not driver.launches


def test_another_current_device_gives_way(
    compiled: Kernel, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    driver.contexts[:] = ["primary 1"]
    bind(compiled)((1, 1, 1), None, tensor(), 1.0, 4)
    assert driver.called("cuCtxPushCurrent")[-1] == ["primary 0"] and driver.contexts == ["primary 1"]
    assert len(driver.launches) == 1


def test_a_thread_without_a_context_gets_one(compiled: Kernel, driver: FakeDriver) -> None:
    driver.contexts.clear()
    bind(compiled)((1, 1, 1), None, tensor(), 1.0, 4)
    assert len(driver.launches) == 1 and not driver.contexts


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, None, 1.0), TypeError, r"parameters of \[8, 8, 4, 4\] bytes"),
        ((None, 1.0, None, 1), TypeError, "parameters of"),
        ((None, None, 1.0, 2**31), ValueError, "32-bit"),
        ((None, None, 1.0, "1"), TypeError, "not str"),
        ((None, None, 1.0, True), TypeError, "not bool"),
        ((torch.zeros(1), None, 1.0, 1), ValueError, "tensor on cpu"),
    ],
)
def test_wrong_arguments_are_refused(
    compiled: Kernel, driver: FakeDriver, args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compiled.bind(THREADS, SHARED, args)((1, 1, 1))
    assert not driver.launches


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, None, 1.0, 2**31), ValueError, "kernel scale .* takes 32-bit integers, got 2147483648"),
        ((None, None, 1.0, -(2**31) - 1), ValueError, "32-bit"),
        ((None, None, 1.0, 2**64), ValueError, "32-bit"),
        ((None, None, 1.0, 1.5), TypeError, "float"),
        ((None, None, "1", 1), TypeError, "str"),
        ((torch.zeros(1), None, 1.0, 1), ValueError, "kernel scale .* got a tensor on cpu; move it"),
    ],
)
def test_wrong_arguments_of_a_launch_are_refused(
    compiled: Kernel, driver: FakeDriver, args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    launch = bind(compiled)
    with pytest.raises(error, match=message):
        launch((1, 1, 1), *args)
    assert not driver.launches
    launch((1, 1, 1), None, None, 1.0, -(2**31))
    assert driver.launches[0].values[3] == -(2**31)


def test_a_driver_without_the_function_is_named(compiled: Kernel, driver: FakeDriver) -> None:
    del driver._by_address["cuLaunchKernelEx"]
    with pytest.raises(RuntimeError, match="the driver, for CUDA 13.0, has no cuLaunchKernelEx: update the driver"):
        bind(compiled)


def test_a_launch_takes_as_many_arguments_as_it_has_room_for(driver: FakeDriver, scale: Path) -> None:
    driver.parameters = [ctypes.c_int] * 64
    compiled = kernel(scale, {"FACTOR": 2}, torch.device("cuda:0"))
    compiled.bind(THREADS, 0, [*range(48), *[int] * 16])((1, 1, 1), *range(48, 64))
    assert driver.launches[0].values == [*range(64)]
    with pytest.raises(ValueError, match="too many arguments"):
        compiled.bind(THREADS, 0, [*range(47), *[int] * 17])
    driver.parameters = [ctypes.c_int] * 65
    wider = kernel(scale, {"FACTOR": 3}, torch.device("cuda:0"))
    with pytest.raises(ValueError, match="too many arguments"):
        wider.bind(THREADS, 0, [*range(65)])


def test_threads_launch_at_the_same_time(compiled: Kernel, driver: FakeDriver) -> None:
    threads = 4
    meeting = threading.Barrier(threads)
    record = driver._launch

    def meet(*args: Any) -> int:
        meeting.wait(10)  # all are in the driver at once
        return record(*args)

    driver._by_address["cuLaunchKernelEx"] = LAUNCH(meet)
    launch = bind(compiled)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda number: launch((1, 1, 1), None, None, 0.5, number), range(threads)))
    assert sorted(one.values[3] for one in driver.launches) == [*range(threads)]


def test_a_bound_launch_counts_its_arguments(compiled: Kernel) -> None:
    with pytest.raises(TypeError, match="takes 2 arguments per launch, got 1"):
        compiled.bind(THREADS, SHARED, (None, torch.Tensor, float, 1))((1, 1, 1), tensor())


def test_a_failed_launch_is_an_error_and_the_next_one_works(compiled: Kernel, driver: FakeDriver) -> None:
    launch = bind(compiled)
    driver.failing["cuLaunchKernelEx"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(torch.OutOfMemoryError, match=r"\(7, 1, 1\) blocks of 128 threads.*CUDA_ERROR_OUT_OF_MEMORY"):
        launch((7, 1, 1), None, tensor(), 1.0, 1)
    driver.failing["cuLaunchKernelEx"] = Status.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(RuntimeError, match="kernel scale of scale.cu on cuda:0.*CUDA_ERROR_LAUNCH_FAILED, some words"):
        launch((7, 1, 1), None, tensor(), 1.0, 1)
    driver.failing.clear()
    launch((7, 1, 1), None, tensor(), 1.0, 1)


def last_device() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


def launch_scale(compiled: Kernel, x: torch.Tensor, y: torch.Tensor, factor: float = 3.0, shared: int = SHARED) -> None:
    bind(compiled, shared=shared)((-(-x.numel() // THREADS), 1, 1), x, y, factor, x.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [SHARED, 100_000])
def test_a_launch_computes(scale: Path, shared: int) -> None:
    compiled = kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.randn(1000, device="cuda"), torch.full((1001,), 9.0, device="cuda")
    launch_scale(compiled, x, y, shared=shared)
    torch.testing.assert_close(y[:1000], 6 * x + 0.5)
    assert y[1000] == 9
    bind(compiled, shared=shared)((8, 1, 1), None, y, 1.0, 1000)
    assert (y[:1000] == 2.5).all()


@pytest.mark.gpu
def test_a_second_gpu_need_not_be_the_current_one(scale: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    compiled = kernel(scale, {"FACTOR": 2}, last_device())
    x = torch.randn(1000, device=last_device())
    y = torch.empty_like(x)
    with torch.cuda.device(0):
        launch_scale(compiled, x, y)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y, 6 * x + 0.5)
    with pytest.raises(ValueError, match="cuda:0"):
        launch_scale(compiled, x.to("cuda:0"), y)


@pytest.mark.gpu
def test_a_launch_runs_on_the_current_stream(scale: Path) -> None:
    compiled = kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.zeros(1 << 20, device="cuda"), torch.empty(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which a launch on another stream would read x too early
        x.fill_(1.0)
        launch_scale(compiled, x, y)
        y.mul_(2.0)
    stream.synchronize()
    assert (y == 13).all()


@pytest.mark.gpu
def test_a_launch_is_captured(scale: Path) -> None:
    compiled = kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.zeros(1000, device="cuda"), torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the kernel's first launch
        launch_scale(compiled, x, y)
    assert (y == 0).all()
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.testing.assert_close(y, 6 * x + 0.5)


@pytest.mark.gpu
def test_threads_share_a_bound_launch(scale: Path) -> None:
    compiled = kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    launch = compiled.bind(THREADS, SHARED, (torch.Tensor, torch.Tensor, float, 1000))
    x = torch.randn(1000, device="cuda")
    outputs = [torch.empty(1000, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()

    def work(factor: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(200):
                launch((8, 1, 1), x, outputs[factor], float(factor))
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(factor,)) for factor in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor, y in enumerate(outputs):
        torch.testing.assert_close(y, 2 * factor * x + 0.5)


@pytest.mark.gpu
def test_a_launch_with_an_overlap(scale: Path) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    compiled = kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x, y = torch.randn(1024, device="cuda"), torch.empty(1024, device="cuda")
    torch.cuda.synchronize()  # this kernel does not wait for the one before it
    compiled.bind(THREADS, SHARED, (torch.Tensor, y, 3.0, 1024), overlap=True)((8, 1, 1), x)
    torch.testing.assert_close(y, 6 * x + 0.5)


CLUSTERED = """
extern "C" __global__ void clustered(int* y) {
  unsigned rank, blocks;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  if (threadIdx.x == 0) y[blockIdx.x] = 10 * blocks + rank;
}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_a_launch_in_clusters(cluster: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    y = torch.empty(16, dtype=torch.int32, device="cuda")
    compiled = kernel(Text("clustered.cu", CLUSTERED), {}, y.device)
    compiled.bind(THREADS, 0, (torch.Tensor,), cluster=cluster)((16, 1, 1), y)
    assert y.tolist() == [10 * cluster + block % cluster for block in range(16)]


@pytest.mark.gpu
def test_what_the_gpu_has_not_is_refused_and_the_next_launch_works(scale: Path) -> None:
    compiled = kernel(scale, {"FACTOR": 2}, torch.device("cuda"))
    x = torch.randn(1000, device="cuda")
    y = torch.empty_like(x)
    with pytest.raises(ValueError, match="bytes of shared memory per block"):
        launch_scale(compiled, x, y, shared=1 << 20)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed"):
        bind(compiled)((1, 1 << 20, 1), x, y, 3.0, 1000)
    with pytest.raises(TypeError, match="parameters of"):
        compiled.bind(THREADS, SHARED, (x, y, 3.0))
    launch_scale(compiled, x, y)
    torch.testing.assert_close(y, 6 * x + 0.5)
