"""ONNX files as wholes: names, sizes that are left open, quantized and sparse weights, and files that lie."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

import escort
from escort.integrations.onnx import OnnxError, inputs_of
from tests.onnx_models import model_of, node, numbers, outputs_of, read, runtime, small, whole


def test_modules_have_the_names_of_the_file(tmp_path: Path) -> None:
    network = read(small(), tmp_path)
    modules = {name: type(module) for name, module in network.named_modules() if not list(module.children())}
    kinds = nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.Linear
    assert modules == dict(zip(("body.0.conv", "body.1", "pool", "head"), kinds, strict=True))
    assert [target.name for target in network.graph.nodes if target.op == "placeholder"] == ["x"]
    assert inputs_of(network) == [("x", (None, 3, 12, 10), torch.float32)]
    assert not network.training


def test_an_open_batch_stays_open(tmp_path: Path) -> None:
    model = small()
    network = read(model, tmp_path)
    for samples in (1, 2, 5):
        x = numbers(samples, 3, 12, 10)
        np.testing.assert_allclose(outputs_of(network, x)[0], runtime(model, x)[0], rtol=1e-4, atol=1e-5)


def test_conversion_sees_ordinary_layers(tmp_path: Path) -> None:
    network = read(small(), tmp_path)
    escort.prune.uniform(network, 0.9)
    escort.prune.make_permanent(network)
    x = torch.randn(2, 3, 12, 10)
    fast = escort.convert(network, x)
    assert list(fast.plan.layers) == ["body.0.conv"]
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    escort.save(fast, tmp_path / "model.escort")
    torch.testing.assert_close(escort.load(tmp_path / "model.escort")(x), network(x), rtol=1e-4, atol=1e-5)


def test_sizes_are_computed_as_the_file_does(tmp_path: Path) -> None:
    """Upsampling to twice a size that is open, and windows of a shape that is put together."""
    model = model_of(
        [
            node("Shape", "x", "sizes"),
            node("Slice", "sizes two four", "plane"),
            node("Slice", "sizes zero two", "around"),
            node("Cast", "plane", "floats", to=TensorProto.FLOAT),
            node("Constant", "", "factor", value_float=1.5),
            node("Mul", "floats factor", "larger"),
            node("Floor", "larger", "floored"),
            node("Cast", "floored", "wholes", to=TensorProto.INT64),
            node("Concat", "around wholes", "wanted", axis=0),
            node("Resize", "x   wanted".replace("   ", " nothing nothing "), "up", mode="linear"),
            node("Shape", "up", "sizes_up"),
            node("Gather", "sizes_up zero", "batch"),
            node("Mul", "batch two", "twice"),
            node("Concat", "twice rest", "shape", axis=0),
            node("Squeeze", "twice", "limit"),
            node("Mul", "limit step", "steps"),
            node("Add", "steps start", "end"),
            node("Range", "start end step", "counted"),
            node("Cast", "counted", "count", to=TensorProto.FLOAT),
            node("Reshape", "count column", "counts"),
            node("Equal", "shape none", "unknown"),
            node("Where", "unknown none shape", "chosen"),
            node("ConstantOfShape", "sizes_up", "ones", value=numpy_helper.from_array(np.ones(1, np.float32))),
            node("Add", "up ones", "higher"),
            node("Reshape", "higher chosen", "v"),
            node("Mul", "v counts", "y"),
        ],
        {
            **{"two": whole(2), "four": whole(4), "zero": whole(0), "rest": whole(3, -1), "none": whole(-1)},
            **{"start": np.int64(3), "step": np.int64(2), "column": whole(-1, 1, 1)},
            "nothing": np.zeros(0, np.float32),
        },
        ["n", 6, "h", "w"],
    )
    network = read(model, tmp_path)
    for shape in ((1, 6, 4, 6), (3, 6, 7, 5)):
        x = numbers(*shape)
        np.testing.assert_allclose(outputs_of(network, x)[0], runtime(model, x)[0], rtol=1e-4, atol=1e-5)


def quantized() -> ModelProto:
    """Weights of 8 bits for each channel, and results between layers that are rounded."""
    return model_of(
        [
            node("QuantizeLinear", "x step zero", "xq"),
            node("DequantizeLinear", "xq step zero", "xf"),
            node("DequantizeLinear", "conv.weight_quantized steps zeros", "w", axis=0),
            node("Conv", "xf w", "a"),
            node("QuantizeLinear", "a step low", "aq"),
            node("DequantizeLinear", "aq step low", "y"),
        ],
        {
            **{"step": np.float32(0.05), "zero": np.uint8(128), "low": np.uint8(0)},
            "conv.weight_quantized": np.arange(-36, 36, dtype=np.int8).reshape(4, 2, 3, 3),
            **{"steps": np.linspace(0.01, 0.02, 4, dtype=np.float32), "zeros": np.zeros(4, np.int8)},
        },
        ["n", 2, 6, 6],
    )


def test_quantized_networks_round_as_the_file_says(tmp_path: Path) -> None:
    model, x = quantized(), numbers(2, 2, 6, 6)
    with pytest.warns(UserWarning) as caught:
        network = read(model, tmp_path)
    said = " ".join(str(warning.message) for warning in caught)
    assert "1 quantized weights were turned into float32" in said and "2 results between layers are rounded" in said
    assert dict(network.named_modules())["conv"].weight.dtype is torch.float32  # type: ignore[union-attr]
    off = np.abs(outputs_of(network, x)[0] - runtime(model, x)[0])
    assert (off > 1e-5).mean() < 0.02 and off.max() < 0.051  # what lies in the middle of two steps may take either


def test_rounding_may_be_left_out_and_bounds_stay(tmp_path: Path) -> None:
    model, x = quantized(), 10 * numbers(2, 2, 6, 6)
    with pytest.warns(UserWarning, match="2 results between layers that the file rounds to integers are bounded"):
        network = read(model, tmp_path, rounding=False)
    (y,) = outputs_of(network, x)
    (rounded,) = runtime(model, x)
    assert np.abs(y - rounded).max() > 0.0
    assert y.min() == 0.0 and y.max() == pytest.approx(255 * 0.05)
    np.testing.assert_allclose(y, rounded, atol=0.4)


def test_sparse_weights_become_dense(tmp_path: Path) -> None:
    weight = numbers(4, 3, 3, 3) * (np.random.default_rng(1).random((4, 3, 3, 3)) < 0.2)
    where = np.flatnonzero(weight)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(weight.reshape(-1)[where], "conv.weight"),
        numpy_helper.from_array(where, "places"),
        weight.shape,
    )
    model = model_of([node("Conv", "x conv.weight", "y")], {}, [1, 3, 5, 5])
    model.graph.sparse_initializer.append(sparse)
    assert torch.equal(read(model, tmp_path).get_submodule("conv").weight, torch.from_numpy(weight))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.stack(np.unravel_index(where, weight.shape), 1), "places"))
    model.graph.sparse_initializer[0].CopyFrom(sparse)
    assert torch.equal(read(model, tmp_path).get_submodule("conv").weight, torch.from_numpy(weight))
    sparse.dims[:] = [1 << 20, 1 << 20]
    model.graph.sparse_initializer[0].CopyFrom(sparse)
    with pytest.raises(OnnxError, match="beyond any network"):
        read(model, tmp_path)
    sparse.dims[:] = [1, 1, 3, 3]
    model.graph.sparse_initializer[0].CopyFrom(sparse)
    with pytest.raises(OnnxError, match="indices that do not fit"):
        read(model, tmp_path)


def test_weights_in_other_files(tmp_path: Path) -> None:
    model, x = small(), numbers(2, 3, 12, 10)
    expected = runtime(model, x)[0]
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    np.testing.assert_allclose(
        outputs_of(escort.from_onnx(tmp_path / "model.onnx"), x)[0], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../weights.bin", "not within the folder"),
        ("/etc/passwd", "not within the folder"),
        ("link.bin", "not within the folder"),
        ("nowhere.bin", "not there"),
        ("short.bin", "cut off"),
        (".", "cut off"),
        ("", "not within the folder"),
    ],
)
def test_weights_elsewhere_are_refused(location: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path / "weights.bin", folder / "short.bin"):
        path.write_bytes(bytes(1000 if path.parent == tmp_path else 10))
    os.symlink(tmp_path / "weights.bin", folder / "link.bin")
    model = small()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OnnxError, match=message):
        escort.from_onnx(folder / "model.onnx")


def _cut_off(model: ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-1]


def _huge(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20, 3, 3]


def _negative(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -8


def _deep(model: ModelProto) -> None:
    inner = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(20):
        inner = helper.make_node("If", ["c"], ["y"], then_branch=helper.make_graph([inner], "g", [], []))
    model.graph.node.append(inner)


def _circle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "c"


def _unknown(model: ModelProto) -> None:
    model.graph.node[2].input[0] = "nothing"


def _unnamed(model: ModelProto) -> None:
    model.graph.node[0].name, model.graph.node[0].input[1] = "", "W"


def _without_outputs(model: ModelProto) -> None:
    del model.graph.output[:]


def _of_float64(model: ModelProto) -> None:
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float64), weight.name))


def _twice(model: ModelProto) -> None:
    model.graph.node[2].output[0] = "a"


def _old(model: ModelProto) -> None:
    model.opset_import[0].version = 3


def _new(model: ModelProto) -> None:
    model.opset_import[0].version = 999


def _calling_itself(model: ModelProto) -> None:
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [_own("F", "a b")], []))


def _bomb(model: ModelProto) -> None:
    """Functions that each call the next one eight times."""
    for level in range(12):
        nodes = [_own(f"F{level + 1}", f"{part} {part + 1}") for part in range(8)]
        model.functions.append(helper.make_function("own", f"F{level}", ["0"], ["8"], nodes, []))
    model.graph.node.append(_own("F0", "x z"))


def _own(name: str, operands: str) -> NodeProto:
    source, result = operands.split()
    return helper.make_node(name, [source], [result], domain="own")


def _shape(*sizes: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
            dim.Clear()
            dim.dim_value = size

    return change


def _constants(operator: str, **arrays: Any) -> Callable[[ModelProto], None]:
    """A constant that is computed from small ones, and added to the result of the pooling."""

    def change(model: ModelProto) -> None:
        for name, array in arrays.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        model.graph.node.insert(0, helper.make_node(operator, list(arrays), ["large"]))
        model.graph.node.insert(1, helper.make_node("ReduceSum", ["large"], ["small"], keepdims=0))
        model.graph.node[6].input[0] = "sum"
        model.graph.node.insert(6, helper.make_node("Add", ["d", "small"], ["sum"]))

    return change


def _attribute(operator: str, name: str, value: Any) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        found = next(each for each in model.graph.node if each.op_type == operator)
        kept = [each for each in found.attribute if each.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut_off, "not there in this size"),
        (_huge, "not there in this size|takes more than"),
        (_negative, "which no tensor has"),
        (_deep, "more than 16 deep"),
        (_circle, "of its own result"),
        (_unknown, "which nothing computes"),
        (_twice, "two nodes compute one name"),
        (_old, "opset 3, and 7 to"),
        (_new, "install a newer onnx"),
        (_calling_itself, "calls itself"),
        (_bomb, "more than 32768 nodes"),
        (_shape(1 << 40, 3, 1 << 20, 10), "larger than any network"),
        (_shape(1, 4, 12, 10), "takes 3 channels and is given 4"),
        (_constants("ConstantOfShape", a=whole(1 << 20, 1 << 20)), "larger than any network"),
        (_constants("Expand", a=np.float32(1), b=whole(1 << 20, 1 << 20)), "larger than any network"),
        (_constants("Tile", a=np.ones(1, np.float32), b=whole(1 << 40)), "larger than any network"),
        (_constants("Range", a=np.float32(0), b=np.float32(1e12), c=np.float32(1)), "is none of a network"),
        (_constants("Pad", a=np.ones(1, np.float32), b=whole(0, 1 << 40)), "larger than any network"),
        (_attribute("Conv", "strides", [0, 1]), r"its strides are \[0, 1\], and must be 2 numbers from 1 up; export"),
        (_attribute("Conv", "strides", [1]), "must be 2 numbers"),
        (_attribute("Conv", "pads", [-1, 0, 0, 0]), "numbers from 0 up"),
        (_attribute("Conv", "pads", [1 << 40] * 4), "larger than any network|torch refuses"),
        (_unnamed, r"Conv '.+': it reads 'W', which nothing computes; export it anew"),
        (_without_outputs, "it returns nothing, so that there is no network; export it with its output"),
        (_of_float64, "its input, filter and bias are of torch.float32, torch.float64.*, and must be of one type"),
        (_attribute("Conv", "strides", "abc"), "Conv '/body/body.0/conv/Conv'"),
        (_attribute("Conv", "group", 0), "do not divide"),
        (_attribute("Conv", "auto_pad", "EVIL\n"), "must be one of"),
        (_attribute("Concat", "axis", 7), "Concat"),
    ],
)
def test_files_that_lie_are_refused(change: Callable[[ModelProto], None], message: str, tmp_path: Path) -> None:
    model = small()
    change(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OnnxError, match=message) as caught:
        escort.from_onnx(tmp_path / "model.onnx")
    assert "model.onnx" in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for given in (small(), b"model.onnx", nn.Identity(), None):
        with pytest.raises(TypeError, match="path is a path, got .*; pass one"):
            escort.from_onnx(given)  # type: ignore[arg-type]
    for content in (b"", b"no model", small().SerializeToString()[:-50]):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(OnnxError, match="export"):
            escort.from_onnx(tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="no such file"):
        escort.from_onnx(tmp_path / "none.onnx")


def test_files_that_were_changed_at_random(tmp_path: Path) -> None:
    """They are read, or refused like any other."""
    random, path, refused = Random(0), tmp_path / "model.onnx", 0
    whole_files = [model.SerializeToString() for model in (small(), quantized())]
    for _ in range(150):
        content = bytearray(random.choice(whole_files))
        for _ in range(3):
            place = random.randrange(len(content))
            content[place : place + random.choice((0, 1, 1, 4))] = random.randbytes(random.choice((0, 1, 1, 4)))
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                escort.from_onnx(path)
        except OnnxError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_names_are_names_and_no_code(tmp_path: Path) -> None:
    evil = '");import os;os.mkdir("out")#\n'
    model = model_of(
        [node("Conv", "x w", "y"), node("Add", "y b", "z"), node("Conv", "z w2", "o")],
        {"w": numbers(3, 3, 1, 1), "b": numbers(3, 1, 1), "w2": numbers(3, 3, 1, 1)},
        [1, 3, 4, 4],
        ["o"],
    )
    names = {
        "x": evil,
        "w": f"{evil}.weight",
        "b": f"forward.{evil}",
        "w2": "training",
        "y": f"def {evil}",
        "z": "self",
    }
    for number, each in enumerate(model.graph.node):
        each.input[:] = [names.get(name, name) for name in each.input]
        each.output[:] = [names.get(name, name) for name in each.output]
        each.name = f"{evil}{number}"
    for tensor in (*model.graph.initializer, *model.graph.input):
        tensor.name = names[tensor.name]
    x = numbers(1, 3, 4, 4)
    network = read(model, tmp_path)
    np.testing.assert_allclose(outputs_of(network, x)[0], runtime(model, x)[0], rtol=1e-4, atol=1e-5)
    assert evil not in network.code and "import os" not in network.code
    assert not network.training


def test_functions_are_written_out(tmp_path: Path) -> None:
    """What torch's exporter makes of modules, and a branch that a constant decides."""
    model = small()
    model.functions.append(
        helper.make_function("own", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 18)])
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[3].input[0] = "twice"
    model.graph.node.insert(3, _own("Twice", "c twice"))
    x = numbers(2, 3, 12, 10)
    np.testing.assert_allclose(outputs_of(read(model, tmp_path), x)[0], runtime(model, x)[0], rtol=1e-4, atol=1e-5)


def test_one_module_for_layers_that_share_weights(tmp_path: Path) -> None:
    model = model_of(
        [node("Conv", "x head.weight", "a"), node("Relu", "a", "b"), node("Conv", "b head.weight", "y")],
        {"head.weight": numbers(3, 3, 1, 1)},
        [1, 3, 4, 4],
    )
    network = read(model, tmp_path)
    assert [each.target for each in network.graph.nodes if each.op == "call_module"] == ["head", "head"]


def test_windows_of_open_maps(tmp_path: Path) -> None:
    """ "Same" padding at the end follows the size of the map."""
    model = model_of(
        [node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2])],
        {"w": numbers(4, 3, 3, 3)},
        ["n", 3, "h", "w"],
    )
    network = read(model, tmp_path)
    for size in (6, 7):
        x = numbers(1, 3, size, size)
        np.testing.assert_allclose(outputs_of(network, x)[0], runtime(model, x)[0], rtol=1e-4, atol=1e-5)


def test_layers_called_by_words_of_python(tmp_path: Path) -> None:
    model = model_of([node("Conv", "x in.class.weight", "y")], {"in.class.weight": numbers(4, 3, 3, 3)}, [1, 3, 8, 8])
    network = read(model, tmp_path)
    assert isinstance(network.get_submodule("in_.class_"), nn.Conv2d)
    x = numbers(1, 3, 8, 8)
    assert np.allclose(outputs_of(network, x)[0], runtime(model, x)[0], atol=1e-5)


def test_networks_of_half_precision(tmp_path: Path) -> None:
    weight, bias = numbers(4, 3, 3, 3).astype(np.float16), numbers(4).astype(np.float16)
    model = model_of([node("Conv", "x weight bias", "y")], {"weight": weight, "bias": bias}, ["n", 3, 8, 8])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    x = numbers(2, 3, 8, 8).astype(np.float16)
    (found,), (expected,) = outputs_of(read(model, tmp_path), x), runtime(model, x)
    assert found.dtype == np.float16 and np.allclose(found, expected, atol=2e-2)


def test_a_kernel_shape_that_is_not_the_filters_is_refused(tmp_path: Path) -> None:
    nodes = [node("Conv", "x weight", "y", kernel_shape=[5, 5])]
    with pytest.raises(OnnxError, match=r"kernel_shape \[5, 5\] is not that of its filter, \[3, 3\]"):
        read(model_of(nodes, {"weight": numbers(4, 3, 3, 3)}, [1, 3, 8, 8]), tmp_path)


@pytest.mark.parametrize("factor", [0.7, 0.9, 1.3, 1.4])
@pytest.mark.parametrize("size", [10, "h"])
def test_factors_make_the_sizes_that_the_exporter_saw(factor: float, size: int | str, tmp_path: Path) -> None:
    scales = np.array([1, 1, factor, factor], dtype=np.float32)
    nodes = [node("Resize", "x  scales", "y", mode="linear", coordinate_transformation_mode="half_pixel")]
    nodes[0].input[:] = ["x", "", "scales"]
    model = model_of(nodes, {"scales": scales}, [1, 2, size, size])
    x = numbers(1, 2, 10, 10)
    (found,), (expected,) = outputs_of(read(model, tmp_path), x), runtime(model, x)
    assert found.shape == expected.shape and np.allclose(found, expected, atol=1e-5)
