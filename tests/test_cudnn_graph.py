"""Method `cudnn_graph`: the graphs that it makes, by a library that runs them with torch, and on a GPU by cuDNN."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort import convert, prune, reference
from escort.artifact import ArtifactError, load, load_plan, save
from escort.filter import SparseFilter
from escort.methods import by_name, for_device
from escort.methods.base import MOST_BATCHES
from escort.methods.cpu.direct import Direct
from escort.methods.cuda import cudnn_graph
from escort.methods.cuda.cudnn_graph import CudnnGraph, CudnnGraphConfig
from escort.network.check import settle_methods
from escort.problem import Epilogue, Problem
from tests.cases import FULL

TYPES = {"HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32}
BOUNDS = {"fp16": 2e-3, "bf16": 1.5e-2, "tf32": 1e-3}


class NotSupportedError(Exception):
    """What the library raises for a graph that no engine runs."""


@dataclass
class Node:
    """A tensor of a graph: one that is given, or what is computed."""

    compute: Callable[[dict[int, Tensor]], Tensor]
    dim: list[int] = field(default_factory=list)
    stride: list[int] = field(default_factory=list)
    data_type: str = "FLOAT"
    number: int = -1

    def set_uid(self, number: int) -> Node:
        self.number = number
        return self

    def set_output(self, is_output: bool) -> Node:
        assert is_output
        return self

    def set_data_type(self, data_type: str) -> Node:
        self.data_type = data_type
        return self

    def set_dim(self, dim: list[int]) -> Node:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Node:
        self.stride = stride
        return self

    def at(self, address: int) -> Tensor:
        """The tensor that lies at an address."""
        dtype = TYPES[self.data_type]
        numbers = 1 + sum((size - 1) * stride for size, stride in zip(self.dim, self.stride, strict=True))
        memory = (ctypes.c_char * (numbers * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).as_strided(self.dim, self.stride)


class Graph:
    """The library's graph; its plans all compute the same, and the first two have one name."""

    plans = ("eng1", "eng1", "eng2", "eng3", "eng4")
    made: list[Graph]

    def __init__(self, **options: Any) -> None:
        self.options, self.given, self.last, self.built = options, list[Node](), Node(lambda _: torch.empty(0)), [-1]
        self.ran: list[tuple[int, Any]] = []
        Graph.made.append(self)

    def tensor(self, dim: list[int], stride: list[int], data_type: str) -> Node:
        node = Node(lambda values: values[node.number].double(), dim, stride, data_type)
        self.given.append(node)
        return node

    def _next(self, compute: Callable[[dict[int, Tensor]], Tensor]) -> Node:
        self.last = Node(compute)
        return self.last

    def conv_fprop(self, image: Node, weight: Node, **geometry: Any) -> Node:
        (top, left), (bottom, right) = geometry["pre_padding"], geometry["post_padding"]

        def compute(values: dict[int, Tensor]) -> Tensor:
            x, w = F.pad(image.compute(values), (left, right, top, bottom)), weight.compute(values)
            groups = x.shape[1] // w.shape[1]
            return F.conv2d(x, w, None, geometry["stride"], 0, geometry["dilation"], groups)

        return self._next(compute)

    def add(self, a: Node, b: Node) -> Node:
        return self._next(lambda values: a.compute(values) + b.compute(values))

    def bias(self, input: Node, bias: Node) -> Node:  # noqa: A002
        return self.add(input, bias)

    def relu(self, input: Node) -> Node:  # noqa: A002
        return self._next(lambda values: input.compute(values).relu())

    def validate(self) -> None:
        numbers = [node.number for node in (*self.given, self.last)]
        assert min(numbers) > 0 and len(set(numbers)) == len(numbers) and self.last.dim

    def build_operation_graph(self) -> None: ...

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["A", "B"]

    def get_execution_plan_count(self) -> int:
        return len(self.plans)

    def get_plan_name_at_index(self, index: int) -> str:
        return self.plans[index]

    def build_plan_at_index(self, index: int) -> None:
        if self.plans[index] == "eng2":
            raise NotSupportedError("eng2 does not take it")
        self.built.append(index)

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return (1 << 30) if self.plans[index] == "eng3" else 64

    def execute_plan_at_index(self, addresses: dict[int, int], workspace: int, index: int, handle: Any) -> None:
        assert index in self.built and workspace
        assert addresses.keys() == {node.number for node in (*self.given, self.last)}
        assert all(address % 16 == 0 for address in addresses.values())
        values = {node.number: node.at(addresses[node.number]) for node in self.given}
        self.last.at(addresses[self.last.number]).copy_(self.last.compute(values))
        self.ran.append((index, handle))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Stands in for cuDNN's frontend, on the CPU."""
    types = SimpleNamespace(**{name: name for name in TYPES})
    fake = SimpleNamespace(
        pygraph=Graph,
        data_type=types,
        heur_mode=SimpleNamespace(A="A", B="B"),
        cudnnGraphNotSupportedError=NotSupportedError,
    )
    monkeypatch.setattr(cudnn_graph, "library", lambda: fake)
    monkeypatch.setattr(cudnn_graph, "_handle", lambda device: "handle")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    Graph.made = []
    return Graph


def a_problem(**fields: Any) -> Problem:
    """On the CPU, in channels_last, which Problem itself refuses."""
    problem = Problem(
        **{
            "batch": 2,
            "in_channels": 6,
            "height": 9,
            "width": 7,
            "out_channels": 8,
            "kernel_size": (3, 3),
            "precision": "fp16",
            "device": "cuda:0",
            "memory_format": "channels_last",
            "epilogue": FULL,
            **fields,
        }
    )
    object.__setattr__(problem, "device", fields.get("device", "cpu"))
    return problem


def tensors(problem: Problem, batch: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *problem.input_shape[1:], generator=generator).to(problem.storage)
    weight = torch.randn(problem.weight_shape, generator=generator)
    weight = (weight * (torch.rand(weight.shape, generator=generator) < 0.5)).to(problem.storage).float()
    bias = torch.randn(problem.out_channels, generator=generator) if problem.epilogue.bias else None
    residual = torch.randn(batch, *problem.output_shape[1:], generator=generator).to(problem.storage)
    return x, weight, bias, residual if problem.epilogue.residual else None


EPILOGUES = [
    Epilogue(),
    Epilogue(bias=True),
    Epilogue(activation="relu"),
    FULL,
    *(Epilogue(True, True, name) for name in ("relu6", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "hardswish")),
    Epilogue(True, False, "leaky_relu", 0.1),
]


def check_all(problem: Problem, device: str, batches: tuple[int, ...]) -> int:
    """Runs every config that there is, on several batch sizes. Returns how many there were."""
    ran = 0
    for batch in batches:
        x, weight, bias, residual = tensors(problem, batch)
        sparse_filter = SparseFilter.from_dense(weight, problem.groups)
        expected = reference.conv2d(of_batch(problem, batch), x, weight, bias, residual)
        for config in CudnnGraph().configs(problem, sparse_filter):
            try:
                prepared = CudnnGraph().prepare(problem, sparse_filter, bias, config)
            except ValueError as error:
                assert "no plan number" in str(error) or "engine for it" in str(error), error
                continue
            y = prepared(x.to(device), None if residual is None else residual.to(device))
            assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype is problem.storage
            assert reference.compare(y.cpu(), expected) <= BOUNDS[problem.precision], config
            ran += 1
    return ran


def of_batch(problem: Problem, batch: int) -> Problem:
    """The problem in NCHW on the CPU, for the reference."""
    return replace(problem, batch=batch, device="cpu", memory_format="contiguous")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_graphs_compute_the_problem(library: type[Graph], epilogue: Epilogue, precision: Any) -> None:
    problem = a_problem(epilogue=epilogue, precision=precision)
    assert check_all(problem, "cpu", (2, 5)) == 4
    assert {graph.options["handle"] for graph in library.made} == {"handle"}


GEOMETRIES: list[dict[str, Any]] = [
    {"padding": (1, 1, 1, 1)},
    {"padding": (0, 1, 2, 1), "stride": (2, 1)},
    {"dilation": (2, 2)},
    {"groups": 2, "in_channels": 8},
    {"kernel_size": (1, 1)},
    {"height": 1, "width": 1, "kernel_size": (1, 1)},
]


@pytest.mark.parametrize("fields", GEOMETRIES, ids=str)
def test_geometries(library: type[Graph], fields: dict[str, Any]) -> None:
    assert check_all(a_problem(**fields), "cpu", (2, 1)) == 4


def test_plans_of_a_name_count_once_and_what_takes_too_much_memory_does_not(library: type[Graph]) -> None:
    problem = a_problem()
    x, weight, bias, residual = tensors(problem, 2)
    sparse_filter = SparseFilter.from_dense(weight)
    for choice, index in ((0, 0), (1, 4)):  # eng2 cannot be built, eng3 takes a gigabyte
        run = CudnnGraph().prepare(problem, sparse_filter, bias, CudnnGraphConfig(choice))
        run(x, residual)
        assert library.made[-1].ran == [(index, "handle")]
    with pytest.raises(ValueError, match="cuDNN's engines have no plan number 2 for it"):
        CudnnGraph().prepare(problem, sparse_filter, bias, CudnnGraphConfig(2))


def test_a_plan_is_made_for_each_batch_size_once(library: type[Graph]) -> None:
    problem = a_problem()
    _, weight, bias, _ = tensors(problem, 2)
    sparse_filter = SparseFilter.from_dense(weight)
    run = CudnnGraph().prepare(problem, sparse_filter, bias, CudnnGraphConfig())
    for batch in (2, 3, 2, 3, 0):
        x, _, _, residual = tensors(problem, batch)
        assert run(x, residual).shape == (batch, *problem.output_shape[1:])
    assert [graph.last.dim[0] for graph in library.made] == [2, 3]


def test_a_plan_that_was_captured_is_kept_for_its_batch_size(
    library: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = a_problem(height=3, width=3)
    _, weight, bias, _ = tensors(problem, 2)
    prepared = CudnnGraph().prepare(problem, SparseFilter.from_dense(weight), bias, CudnnGraphConfig())

    def run(batch: int) -> None:
        x, _, _, residual = tensors(problem, batch)
        prepared(x, residual)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        run(3)
    captured = library.made[-1]
    others = range(4, 5 + MOST_BATCHES)
    for batch in (*others, 3, 2):
        run(batch)
    assert [graph.last.dim[0] for graph in library.made] == [2, 3, *others, 2]
    assert len(captured.ran) == 2


def test_what_no_engine_runs_is_refused(library: type[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Graph, modes: list[str]) -> None:
        raise NotSupportedError("No valid engine configs\nfor this and that")

    monkeypatch.setattr(Graph, "create_execution_plans", refuse)
    problem = a_problem()
    _, weight, bias, _ = tensors(problem, 2)
    with pytest.raises(ValueError, match="cuDNN has no engine for it: No valid engine configs$"):
        sparse_filter = SparseFilter.from_dense(weight)
        CudnnGraph().prepare(problem, sparse_filter, bias, CudnnGraphConfig())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"precision": "fp32"}, "strict float32"),
        ({"memory_format": "contiguous"}, "plan it in that memory format"),
        ({"groups": 6, "out_channels": 12}, "slow for depthwise"),
        ({"in_channels": 16}, "torch has a call of cuDNN that does the same"),
        ({"in_channels": 16, "precision": "tf32"}, None),
        ({"in_channels": 16, "epilogue": Epilogue(activation="silu")}, None),
        ({}, None),
    ],
)
def test_what_it_cannot_do(fields: dict[str, Any], reason: str | None) -> None:
    said = CudnnGraph().unsupported(a_problem(**fields))
    assert said is None if reason is None else reason in (said or "")


def test_without_the_package_it_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_graph, "library", lambda: None)
    assert "cudnn_graph" not in [method.name for method in for_device("cuda:0")]
    method = by_name("cudnn_graph", "cuda:0")
    assert "pip install 'escort-sparse[cudnn]'" in str(method.unsupported(a_problem()))
    with pytest.raises(ImportError, match="nvidia-cudnn-frontend, or cuDNN itself, is missing"):
        method.prepare(a_problem(), SparseFilter.from_dense(torch.ones(8, 6, 3, 3)), None, None)
    with pytest.raises(ValueError, match=r"cudnn_graph was asked for, and .*pip install 'escort-sparse\[cudnn\]'"):
        settle_methods(["sparse_tc", "cudnn_graph"], torch.device("cuda:0"))


@pytest.mark.usefixtures("library")
def test_with_the_package_it_is_offered() -> None:
    assert "cudnn_graph" in [method.name for method in for_device("cuda:0")]


def test_handles_belong_to_threads_and_follow_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    made = iter(range(7, 99))
    fake = SimpleNamespace(create_handle=lambda: next(made), set_stream=lambda **named: calls.append(named))
    monkeypatch.setattr(cudnn_graph, "library", lambda: fake)
    monkeypatch.setattr(cudnn_graph, "_left", {})
    monkeypatch.setattr(cudnn_graph, "_of_thread", threading.local())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    streams = iter((100, 200, 300))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert [cudnn_graph._handle(device) for device in (first, second, first)] == [7, 8, 7]
    assert calls == [{"handle": h, "stream": s} for h, s in ((7, 100), (8, 200), (7, 300))]
    streams = iter((400, 500))
    for _ in range(2):  # the second thread takes what the first one left
        other = threading.Thread(target=cudnn_graph._handle, args=(first,))
        other.start()
        other.join()
    assert calls[3:] == [{"handle": 9, "stream": 400}, {"handle": 9, "stream": 500}]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A network, one layer of which runs by `direct`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    prune.uniform(model, 0.9)
    fast = convert(model, torch.randn(1, 3, 16, 16), methods=["direct"])
    fast.plan.layers["0"] = replace(fast.plan.layers["0"], method="direct")
    save(fast, tmp_path / "fast.escort")
    return tmp_path / "fast.escort"


def test_a_file_whose_method_is_not_installed_names_the_remedy(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if load_plan(saved).kept_dense:
        pytest.skip("the machine is too busy for the small network")
    monkeypatch.setattr(Direct, "missing", lambda self: "the package thing is missing: pip install thing")
    planned_for = "layer 0 was planned for direct: the package thing is missing: pip install thing; or pass remeasure"
    with pytest.raises(ArtifactError, match=planned_for):
        load(saved)
    assert load(saved, remeasure=True).plan.layers["0"].method != "direct"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "epilogue"),
    [*(("fp16", epilogue) for epilogue in EPILOGUES), *((name, FULL) for name in ("bf16", "tf32"))],
    ids=str,
)
def test_graphs_on_a_gpu(epilogue: Epilogue, precision: Any) -> None:
    pytest.importorskip("cudnn")
    sizes: dict[str, Any] = {"in_channels": 32, "out_channels": 64, "device": "cuda:0"}
    assert check_all(a_problem(epilogue=epilogue, precision=precision, **sizes), "cuda:0", (2, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("fields", GEOMETRIES, ids=str)
def test_geometries_on_a_gpu(fields: dict[str, Any]) -> None:
    pytest.importorskip("cudnn")
    sizes: dict[str, Any] = {"out_channels": 64, "device": "cuda:0"}
    assert check_all(a_problem(**sizes, **{**fields, "in_channels": 32}), "cuda:0", (2, 1))


@pytest.mark.gpu
def test_it_runs_on_the_callers_stream_and_in_captures() -> None:
    pytest.importorskip("cudnn")
    problem = a_problem(in_channels=32, out_channels=64, device="cuda:0")
    x, weight, bias, residual = tensors(problem, 2)
    assert residual is not None
    expected = reference.conv2d(of_batch(problem, 2), x, weight, bias, residual)
    x, residual, stream = x.cuda(), residual.cuda(), torch.cuda.Stream()
    run = CudnnGraph().prepare(problem, SparseFilter.from_dense(weight), bias, CudnnGraphConfig())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what ran on another stream would not wait for x
        late = x * 1.0
        y = run(late, residual)
    stream.synchronize()
    assert reference.compare(y.cpu(), expected) <= 2e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, residual)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert reference.compare(captured.cpu(), expected) <= 2e-3


@pytest.mark.gpu
def test_a_network_by_graphs_of_cudnn() -> None:
    pytest.importorskip("cudnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.SiLU())
    model, x = model.eval().cuda().half(), torch.randn(4, 8, 32, 32, device="cuda", dtype=torch.float16)
    fast = convert(model, x, methods=["cudnn_graph"])
    tried = {candidate.method for plan in fast.plan.layers.values() for candidate in plan.candidates}
    assert tried == {"cudnn", "cudnn_graph"} and fast.plan.rel_error < 1e-2
