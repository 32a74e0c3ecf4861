"""An ONNX file as a message of protobuf in which every tensor is there, and as large as it says."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from escort.integrations.onnx.errors import OnnxError
from escort.integrations.onnx.limits import MAX_BYTES, MAX_CONSTANT, MAX_DEPTH, MAX_DIMENSIONS, MAX_NODES, MAX_OPERANDS

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

#: The oldest opset that is read. Older ones said less about what they compute.
OLDEST = 7


def read(path: Path) -> ModelProto:
    """The model of a file, tensors of other files taken in, sparse ones written out.

    Raises:
        OnnxError: naming what is damaged, beyond a bound or outside of the file's folder.
        FileNotFoundError: where there is no such file.
    """
    import onnx

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; name an ONNX model")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # whatever protobuf says of bytes that are no message
        raise OnnxError(f"{path} is no ONNX model, or damaged ({type(error).__name__}); export it anew") from error
    try:
        _check_opset(model)
        _check_counts(model)
        for tensor in _tensors(model):
            _check_tensor(tensor, path)
        _check_sparse(model)
        _take_in(model, path)
    except OnnxError as error:
        raise OnnxError(f"{path}: {error}") from error
    return model


def opset(model: ModelProto) -> int:
    """The version of the standard operators that a model is written in."""
    return next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)


def _check_opset(model: ModelProto) -> None:
    import onnx

    version, newest = opset(model), onnx.defs.onnx_opset_version()
    if not model.graph.node:
        raise OnnxError("its graph has no nodes; export the network anew")
    if not OLDEST <= version <= newest:
        raise OnnxError(
            f"it is written in opset {version}, and {OLDEST} to {newest} are read; export it in one of these"
            + ("" if version < OLDEST else ", or install a newer onnx")
        )


def _check_counts(model: ModelProto) -> None:
    """Raises OnnxError where there are more nodes than a network has, once its functions are written out."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Iterator[NodeProto], depth: int, calling: tuple[tuple[str, str], ...]) -> int:
        if depth > MAX_DEPTH:
            raise OnnxError(f"graphs and functions stand in one another more than {MAX_DEPTH} deep; export it anew")
        total = 0
        for node in nodes:
            if len(node.input) + len(node.output) > MAX_OPERANDS:
                raise OnnxError(
                    f"{node.op_type[:100]} {node.name[:100]!r} has more than {MAX_OPERANDS} inputs and outputs"
                )
            total += 1 + sum(size(iter(graph.node), depth + 1, calling) for graph in _graphs(node))
            key = (node.domain, node.op_type)
            if key in functions:
                if key in calling:
                    raise OnnxError(f"its function {node.op_type[:100]!r} calls itself; export it anew")
                if key not in sizes:
                    sizes[key] = size(iter(functions[key].node), depth + 1, (*calling, key))
                total += sizes[key]
            if total > MAX_NODES:
                raise OnnxError(f"it has more than {MAX_NODES} nodes, and no network needs so many")
        return total

    size(iter(model.graph.node), 0, ())
    for function in model.functions:
        size(iter(function.node), 0, ((function.domain, function.name),))


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """The nodes of a model, those in functions and in graphs within nodes among them."""
    pending: list[GraphProto | FunctionProto] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield from graph.node
        pending += [inner for node in graph.node for inner in _graphs(node)]


def _all_graphs(model: ModelProto) -> Iterator[GraphProto]:
    yield model.graph
    yield from (graph for node in _all_nodes(model) for graph in _graphs(node))


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model holds, those of sparse ones among them."""
    for graph in _all_graphs(model):
        yield from graph.initializer
    for sparse in _sparse_tensors(model):
        yield from (sparse.values, sparse.indices)
    for node in _all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensor(tensor: TensorProto, path: Path) -> None:
    """Raises OnnxError unless a tensor is in the file, or beside it, in the size that it says it has."""
    import onnx
    from onnx import TensorProto

    where = f"tensor {tensor.name[:100]!r}"
    if len(tensor.dims) > MAX_DIMENSIONS or any(size < 0 for size in tensor.dims):
        raise OnnxError(f"{where} is of shape {list(tensor.dims)[: MAX_DIMENSIONS + 1]}, which no tensor has")
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.UNDEFINED and count == 1 and not tensor.dims:  # an empty message stands for none
        return
    if tensor.data_type == TensorProto.STRING:
        if len(tensor.string_data) != count:
            raise OnnxError(f"{where} says that it holds {count} texts and holds {len(tensor.string_data)}")
        return
    try:
        bits = _bits(tensor.data_type)
    except (KeyError, TypeError, ValueError) as error:
        raise OnnxError(
            f"{where} is of a type {tensor.data_type} that onnx {onnx.__version__} does not know"
        ) from error
    wanted = (count * bits + 7) // 8
    if wanted > MAX_BYTES:
        raise OnnxError(f"{where} of shape {list(tensor.dims)} takes more than {MAX_BYTES >> 30} GiB")
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, where, wanted, path)
        return
    has = len(tensor.raw_data) if tensor.HasField("raw_data") else None
    if has is None:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        numbers = len(getattr(tensor, field))
        is_whole = (
            numbers == count or (bits < 8 and numbers == wanted) or (_is_complex(tensor) and numbers == 2 * count)
        )
    else:
        is_whole = has == wanted
    if not is_whole:
        raise OnnxError(
            f"{where} of shape {list(tensor.dims)} is not there in this size; the file is cut off or damaged"
        )


def _bits(data_type: int) -> int:
    import onnx

    name = onnx.TensorProto.DataType.Name(data_type)
    if name.endswith("INT4") or name.startswith("FLOAT4"):
        return 4
    if name.endswith("INT2"):
        return 2
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8


def _is_complex(tensor: TensorProto) -> bool:
    from onnx import TensorProto

    return tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128)


def _check_external(tensor: TensorProto, where: str, wanted: int, path: Path) -> None:
    """Raises OnnxError unless a tensor lies in a plain file within the folder of the model, as large as it says."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = Path(os.path.realpath(path.parent))
    target = Path(os.path.realpath(folder / location))
    if (
        not location
        or Path(location).is_absolute()
        or ".." in Path(location).parts
        or not target.is_relative_to(folder)
    ):
        raise OnnxError(
            f"{where} lies in {location[:200]!r}, which is not within the folder of the model; move it there"
        )
    try:
        status = target.stat()
    except OSError as error:
        raise OnnxError(f"{where} lies in {location[:200]!r}, which is not there; put it beside the model") from error
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", wanted))
    except ValueError as error:
        raise OnnxError(f"{where} lies at an offset that is no number; the file is damaged") from error
    if not stat.S_ISREG(status.st_mode) or offset < 0 or length != wanted or offset + length > status.st_size:
        raise OnnxError(f"{where} is not in {location[:200]!r} in this size; that file is cut off or another one")


def _check_sparse(model: ModelProto) -> None:
    numbers = 0
    for sparse in _sparse_tensors(model):
        shape = list(sparse.dims)[: MAX_DIMENSIONS + 1]
        numbers += math.prod(shape)
        if min(shape, default=0) < 0 or len(shape) > MAX_DIMENSIONS or numbers > MAX_CONSTANT:
            raise OnnxError(f"the sparse tensor {sparse.values.name[:100]!r} is of shape {shape}, beyond any network")


def _sparse_tensors(model: ModelProto) -> Iterator[SparseTensorProto]:
    for graph in _all_graphs(model):
        yield from graph.sparse_initializer
    for node in _all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor
            yield from attribute.sparse_tensors


def _take_in(model: ModelProto, path: Path) -> None:
    """Puts what lies in other files, and what is sparse, into the model as plain tensors."""
    from onnx import external_data_helper, numpy_helper

    size = 0
    for tensor in _tensors(model):
        if tensor.data_type in (tensor.STRING, tensor.UNDEFINED):
            continue
        size += math.prod(tensor.dims) * _bits(tensor.data_type) // 8
        if size > MAX_BYTES:
            raise OnnxError(f"its tensors take more than {MAX_BYTES >> 30} GiB")
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    for graph in _all_graphs(model):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(numpy_helper.from_array(_dense(sparse), sparse.values.name))
        del graph.sparse_initializer[:]
    for node in _all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                dense = numpy_helper.from_array(_dense(attribute.sparse_tensor), attribute.sparse_tensor.values.name)
                attribute.Clear()
                attribute.name, attribute.type = "value", attribute.TENSOR
                attribute.t.CopyFrom(dense)


def _dense(sparse: SparseTensorProto) -> NDArray[Any]:
    """The numbers of a sparse tensor with its zeros. Its indices are those of the flat tensor, or of each dimension."""
    from onnx import numpy_helper

    shape = tuple(sparse.dims)
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(math.prod(shape), values.dtype)
    try:
        flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
        if flat.shape != values.shape or (flat.size and not 0 <= flat.min() <= flat.max() < dense.size):
            raise ValueError("they are not as many as its values, or beyond its shape")
        dense[flat] = values
    except (ValueError, TypeError) as error:
        name = sparse.values.name[:100]
        raise OnnxError(f"the sparse tensor {name!r} has indices that do not fit: {error}; export it anew") from error
    return dense.reshape(shape)
