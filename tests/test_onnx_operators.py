"""Operators of ONNX as :func:`escort.from_onnx` maps them, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from escort.integrations.onnx import OnnxError
from escort.integrations.onnx.operators import OPERATORS
from tests.onnx_models import Array, numbers, outputs_of, read, runtime, whole


def model_of(
    operator: str,
    arrays: Sequence[Array | None],
    opset: int = 18,
    outputs: int = 1,
    free: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """One node: the first array is its input, the others are constants; `free` leaves the first size open."""
    names = ["" if array is None else f"in{number}" for number, array in enumerate(arrays)]
    results = [f"out{number}" for number in range(outputs)]
    first = arrays[0]
    assert first is not None
    shape: list[Any] = ["n", *first.shape[1:]] if free else list(first.shape)
    graph = helper.make_graph(
        [helper.make_node(operator, names, results, name="the node", **attributes)],
        "graph",
        [helper.make_tensor_value_info("in0", helper.np_dtype_to_tensor_dtype(first.dtype), shape)],
        [helper.make_empty_tensor_value_info(name) for name in results],
        [numpy_helper.from_array(a, n) for a, n in list(zip(arrays, names, strict=True))[1:] if a is not None],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


X, ROW = numbers(2, 4, 7, 6), numbers(2, 3, 9)
KERNEL, WEIGHTS = numbers(6, 4, 3, 3), numbers(4, 3, 3, 2)
POSITIVE = np.abs(X) + 0.1
NORM = [np.abs(numbers(4, seed=seed)) + 0.5 for seed in range(4)]

#: Operator, inputs of which all but the first are constant, attributes; "opset" and "outputs" are of the file.
CASES: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    *(
        (name, [X], {})
        for name in "Abs Ceil Cos Elu Erf Exp Floor HardSwish Identity LeakyRelu Neg Relu Round Sigmoid Sign Sin "
        "Softplus Softsign Tanh Mish Celu Selu GlobalAveragePool GlobalMaxPool Flatten Softmax LogSoftmax HardSigmoid "
        "ThresholdedRelu Shrink".split()
    ),
    *((name, [POSITIVE], {}) for name in ("Log", "Sqrt", "Reciprocal")),
    ("HardSigmoid", [X], {"alpha": 1 / 6}),
    ("Gelu", [X], {"opset": 20}),
    ("Gelu", [X], {"opset": 20, "approximate": "tanh"}),
    ("Shrink", [X], {"bias": 0.3, "lambd": 0.2}),
    ("PRelu", [X, np.abs(numbers(4, 1, 1))], {}),
    ("PRelu", [X, np.abs(numbers(6))], {}),
    ("Clip", [X, np.float32(0), np.float32(6)], {}),
    ("Clip", [X, None, np.float32(0.5)], {}),
    ("Clip", [X], {"opset": 9, "min": -0.2, "max": 0.4}),
    ("Conv", [X, KERNEL], {}),
    ("Conv", [X, KERNEL, numbers(6)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("Conv", [X, KERNEL, numbers(6)], {"pads": [0, 1, 2, 1], "strides": [2, 1], "opset": 9}),
    ("Conv", [X, KERNEL], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", [X, KERNEL], {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    ("Conv", [X, KERNEL], {"auto_pad": "VALID", "dilations": [2, 1]}),
    ("Conv", [X, numbers(8, 1, 3, 3)], {"group": 4, "pads": [1, 1, 1, 1]}),
    ("Conv", [ROW, numbers(5, 3, 3)], {"pads": [1, 0]}),
    ("Conv", [numbers(1, 2, 4, 5, 6), numbers(3, 2, 2, 2, 2)], {}),
    ("ConvTranspose", [X, WEIGHTS, numbers(3)], {"strides": [2, 3], "pads": [1, 0, 1, 0]}),
    ("ConvTranspose", [X, WEIGHTS], {"strides": [2, 2], "pads": [0, 1, 1, 0], "output_padding": [1, 0]}),
    ("ConvTranspose", [X, numbers(4, 2, 3, 3)], {"strides": [2, 2], "group": 2, "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", [X, WEIGHTS], {"strides": [2, 2], "output_shape": [13, 12]}),
    ("Gemm", [numbers(3, 4), numbers(4, 5), numbers(5)], {}),
    ("Gemm", [numbers(3, 4), numbers(5, 4), numbers(1)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [numbers(4, 3), numbers(4, 5), numbers(3, 5)], {"transA": 1}),
    ("MatMul", [ROW, numbers(9, 2)], {}),
    ("MatMul", [ROW, numbers(2, 9, 2)], {}),
    ("BatchNormalization", [X, *NORM], {"epsilon": 1e-3}),
    ("BatchNormalization", [X, *NORM], {"opset": 9}),
    ("InstanceNormalization", [X, NORM[0], NORM[1]], {}),
    ("LayerNormalization", [X, numbers(6), numbers(6)], {}),
    ("LayerNormalization", [X, numbers(4, 7, 6)], {"axis": 1, "outputs": 3}),
    ("GroupNormalization", [X, NORM[0], NORM[1]], {"num_groups": 2, "opset": 21}),
    ("RMSNormalization", [X, numbers(6)], {"opset": 23}),
    ("LRN", [X], {"size": 3, "alpha": 0.1}),
    ("LpNormalization", [X], {"axis": 1, "p": 1}),
    ("Softmax", [X], {"axis": 1}),
    ("Softmax", [X], {"axis": 1, "opset": 11}),
    ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", [X], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("MaxPool", [X], {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [0, 0, 1, 1], "ceil_mode": 1}),
    ("MaxPool", [X], {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("MaxPool", [X], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ("AveragePool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("LpPool", [X], {"kernel_shape": [2, 2], "p": 2}),
    ("ReduceMean", [X], {"axes": [2, 3], "opset": 13}),
    ("ReduceMean", [X, whole(-1)], {"keepdims": 0}),
    *(
        (name, [POSITIVE, whole(1, 2)], {})
        for name in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1")
    ),
    *((name, [POSITIVE, whole(3)], {}) for name in ("ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")),
    ("ReduceSum", [X], {"keepdims": 0}),
    ("ArgMax", [X], {"axis": 1, "keepdims": 0}),
    ("ArgMin", [np.round(X)], {"axis": -1, "select_last_index": 1}),
    ("TopK", [np.round(X), whole(3)], {"axis": 1, "outputs": 2}),
    ("CumSum", [X, np.int64(2)], {"reverse": 1}),
    ("Add", [X, numbers(1, 4, 1, 1)], {}),
    ("Mul", [X, np.float32(2)], {}),
    ("Sub", [X, numbers(6)], {}),
    ("Div", [X, np.float32(3)], {}),
    ("Div", [np.array([7, -7, 9]), whole(2, 2, -4)], {}),
    ("Mod", [np.array([7, -7, 9]), whole(3, 3, -4)], {}),
    ("Pow", [POSITIVE, np.float32(1.5)], {}),
    ("Max", [X, numbers(6), np.float32(0.1)], {}),
    ("Min", [X, np.float32(0.1)], {}),
    ("Mean", [X, X], {}),
    ("Sum", [X, X, numbers(6)], {}),
    ("Greater", [X, np.float32(0)], {}),
    ("Not", [X > 0], {}),
    ("GlobalLpPool", [X], {}),
    ("Where", [X > 0, X, np.float32(0)], {}),
    ("Cast", [X], {"to": TensorProto.INT32}),
    ("Concat", [X, X], {"axis": 1}),
    ("Split", [X, whole(1, 3)], {"axis": 1, "outputs": 2}),
    ("Split", [X], {"axis": 2, "outputs": 3, "num_outputs": 3}),
    ("Slice", [X, whole(1, -3), whole(4, 1 << 40), whole(1, 3), whole(2, 1)], {}),
    ("Slice", [X, whole(-1), whole(-(1 << 40)), whole(2), whole(-2)], {}),
    ("Slice", [X], {"starts": [1], "ends": [3], "axes": [1], "opset": 9}),
    ("Gather", [X, whole(2, -1)], {"axis": 1}),
    ("Gather", [X, np.int64(1)], {"axis": 2}),
    ("GatherElements", [ROW, np.array([[[0, 1, -1]]])], {"axis": 2}),
    ("Reshape", [X, whole(0, -1)], {}),
    ("Reshape", [X, whole(2, 2, 2, -1)], {}),
    ("Flatten", [X], {"axis": 2}),
    ("Transpose", [X], {"perm": [0, 2, 3, 1]}),
    ("Squeeze", [X[:, :1], whole(1)], {}),
    ("Squeeze", [X[:, :1]], {"opset": 9, "axes": [1]}),
    ("Unsqueeze", [X, whole(0, -1)], {}),
    ("Expand", [X[:, :1], whole(4, 1, 1)], {}),
    ("Tile", [ROW, whole(1, 2, 3)], {}),
    ("Pad", [X, whole(0, 0, 1, 2, 0, 0, 0, 1), np.float32(0.5)], {}),
    ("Pad", [X, whole(1, 2, 0, 1), None, whole(2, 3)], {"mode": "reflect"}),
    ("Pad", [X, whole(1, 1, 0, 1), None, whole(1, 3)], {"mode": "edge"}),
    ("Pad", [X], {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "opset": 10}),
    ("Trilu", [X], {"upper": 0}),
    ("Einsum", [ROW, numbers(2, 9, 4)], {"equation": "bij,bjk->bik"}),
    ("DepthToSpace", [X], {"blocksize": 2}),
    ("DepthToSpace", [X], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [X[:, :, :6]], {"blocksize": 2}),
    *(
        ("Resize", [X, None, np.array([1, 1, *factors], np.float32)], {"mode": mode, **rule})
        for mode, factors, rule in (
            ("nearest", (2, 3), {}),
            ("nearest", (2, 2), {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
            ("nearest", (1.5, 0.5), {"nearest_mode": "ceil"}),
            ("linear", (2, 1.5), {}),
            ("linear", (2, 2), {"coordinate_transformation_mode": "align_corners"}),
            ("linear", (2, 2), {"coordinate_transformation_mode": "asymmetric"}),
            ("linear", (0.6, 0.5), {"antialias": 1}),
            ("cubic", (2, 1.5), {}),
            ("cubic", (2, 1.5), {"cubic_coeff_a": -0.5, "exclude_outside": 1}),
        )
    ),
    ("Resize", [X, None, None, whole(2, 4, 14, 3)], {"mode": "linear"}),
    ("Resize", [X, None, None, whole(10, 12)], {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"}),
    ("Resize", [X, np.array([1, 1, 2, 2], np.float32)], {"opset": 10}),
    ("Upsample", [X, np.array([1, 1, 2, 2], np.float32)], {"opset": 9}),
    ("GridSample", [X, numbers(2, 3, 3, 2) / 2], {"opset": 20}),
    ("DequantizeLinear", [np.arange(8, dtype=np.uint8), np.float32(0.5), np.uint8(3)], {}),
    ("QuantizeLinear", [X, np.float32(0.1), np.int8(3)], {}),
    ("QuantizeLinear", [X, np.full(4, 0.1, np.float32), np.zeros(4, np.int8)], {"axis": 1}),
    ("Dropout", [X], {}),
]
#: Each case with a name that says which of its operator it is.
NAMED = {f"{case[0]}-{sum(each[0] == case[0] for each in CASES[:index])}": case for index, case in enumerate(CASES)}
#: What needs the first size, or the reference does not compute.
NEEDS_FIRST_SIZE = {"Reshape-1", "Where-0", "Gemm-2", "Div-1", "Mod-0", "DequantizeLinear-0", "Mul-1", "MatMul-1"}
NEEDS_FIRST_SIZE |= {
    "Einsum-0",
    "GridSample-0",
    "Expand-0",
    "GatherElements-0",
    "Resize-9",
    "Mean-0",
    "Sum-0",
    "Concat-0",
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.filterwarnings("ignore:.*model.onnx:UserWarning")
def test_operators(name: str, tmp_path: Path) -> None:
    """As the file says it, and with its first size left open unless its constants go with one."""
    operator, arrays, attributes = NAMED[name]
    first = arrays[0]
    assert first is not None
    expected = runtime(model_of(operator, arrays, **attributes), first)
    for free in (False, True)[: 1 if name in NEEDS_FIRST_SIZE else 2]:
        network = read(model_of(operator, arrays, free=free, **attributes), tmp_path)
        for ours, theirs in zip(outputs_of(network, first), expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


#: Mapped, and tested elsewhere: by what is computed of shapes, or by ONNX's own tests (`make test-integrations`).
ELSEWHERE = set(
    "Acos And Asin Atan CastLike Constant ConstantOfShape Cosh Equal GreaterOrEqual IsInf IsNaN Less "
    "LessOrEqual Or Range Shape Sinh Size Swish Tan Xor".split()
)


def test_every_operator_is_tested() -> None:
    assert {name for name, _, _ in CASES} | ELSEWHERE == set(OPERATORS)


def test_faults_are_named_all_at_once(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("NonMaxSuppression", ["x", "x"], ["boxes"], name="nms"),
            helper.make_node("FusedConv", ["x"], ["a"], name="fused", domain="com.microsoft"),
            helper.make_node("Relu", ["boxes"], ["b"], name="behind"),
            helper.make_node("MaxPool", ["x"], ["c", "where"], name="pool", kernel_shape=[2, 2]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])],
        [helper.make_empty_tensor_value_info(name) for name in ("b", "where")],
    )
    with pytest.raises(OnnxError) as caught:
        read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "NonMaxSuppression 'nms'",
        "FusedConv 'fused'",
        "MaxPool 'pool'",
    ]
    for word in ("extract_model", "com.microsoft", "where the maxima lie", "3 things"):
        assert word in str(caught.value)


#: Attributes that ask for what is not done: operator, opset, attributes, and what the fault says.
UNREAD: list[tuple[str, int, dict[str, Any], str]] = [
    ("BatchNormalization", 18, {"spatial": 0}, "spatial"),
    ("LayerNormalization", 18, {"stash_type": 11}, "stash_type"),
    ("QuantizeLinear", 23, {"precision": 10}, "precision"),
    ("Conv", 18, {"activation": "Relu"}, "'activation' is none that ONNX knows"),
    ("Relu", 18, {"alpha": 0.5}, "'alpha' is none that ONNX knows"),
    ("Split", 18, {"num_outputs": 4}, "num_outputs is 4"),
    ("MaxPool", 18, {"auto_pad": "SAME_UPPER", "pads": [1, 0, 0, 0]}, "not those of its auto_pad"),
    ("ConvTranspose", 18, {"auto_pad": "SAME_UPPER", "pads": [1] * 4, "strides": [2, 2]}, "not those of its auto_pad"),
    ("DequantizeLinear", 23, {"output_dtype": 10}, "output_dtype is torch.float16"),
]


@pytest.mark.parametrize(("operator", "opset", "attributes", "message"), UNREAD, ids=[case[0] for case in UNREAD])
def test_what_an_attribute_asks_for_is_done_or_refused(
    operator: str, opset: int, attributes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    name, arrays, own = next(case for case in CASES if case[0] == operator)
    asked = {"axis": 1, "outputs": 2} if name == "Split" else {k: v for k, v in own.items() if k != "opset"}
    arrays = arrays[:1] if name == "Split" else arrays
    with pytest.raises(OnnxError, match=message) as caught:
        read(model_of(name, arrays, opset=opset, **asked | attributes), tmp_path)
    assert len(caught.value.faults) == 1
    assert "the node" in str(caught.value)
    assert "export it" in str(caught.value)


def test_attributes_that_change_nothing_are_read_over(tmp_path: Path) -> None:
    """Hints for training, and values that ONNX takes anyway."""
    for operator, arrays, attributes in (
        ("BatchNormalization", [X, *NORM], {"momentum": 0.7}),
        ("Dropout", [X], {"seed": 3}),
        ("Conv", [X, KERNEL], {"auto_pad": "NOTSET", "pads": [0, 0, 0, 0], "kernel_shape": [3, 3]}),
        ("LayerNormalization", [X, numbers(6)], {"stash_type": 1}),
        ("QuantizeLinear", [X, np.float32(0.1), np.int8(3)], {"axis": 1, "saturate": 0, "opset": 19}),
        ("ReduceSum", [X, whole(1)], {"noop_with_empty_axes": 1}),
    ):
        network = read(model_of(operator, arrays, **attributes), tmp_path)  # type: ignore[arg-type]
        expected = runtime(model_of(operator, arrays, **attributes), X)  # type: ignore[arg-type]
        np.testing.assert_allclose(outputs_of(network, X)[0], expected[0], rtol=1e-4, atol=2e-5)


PADS, FACTORS = [0, 0, 1, 1, 0, 0, 1, 1], np.array([1, 1, 2, 2], np.float32)
#: What exporters write by habit, and what changes nothing: operator, inputs, attributes, whether it is
#: also read with all sizes but those of channels left open.
HABITS: list[tuple[str, list[Array | None], dict[str, Any], bool]] = [
    *(("Pad", [X], {"opset": 10, "mode": mode, "value": 0.5, "pads": PADS}, False) for mode in ("reflect", "edge")),
    ("Pad", [X], {"opset": 10, "value": 0.5, "pads": [0] * 8}, False),
    ("Conv", [X, KERNEL], {"auto_pad": "SAME_UPPER", "strides": [2, 2], "pads": [1, 0, 1, 1]}, True),
    ("Conv", [X, KERNEL], {"auto_pad": "VALID", "pads": [0] * 4, "dilations": [1, 1], "group": 1}, True),
    (
        "ConvTranspose",
        [X, WEIGHTS],
        {"auto_pad": "SAME_UPPER", "strides": [2, 2], "pads": [0, 0, 1, 0], "output_padding": [0, 0]},
        True,
    ),
    ("ConvTranspose", [X, WEIGHTS], {"auto_pad": "SAME_LOWER", "strides": [2, 2], "pads": [1, 0, 0, 0]}, True),
    ("ConvTranspose", [X, WEIGHTS], {"auto_pad": "VALID", "pads": [0] * 4, "group": 1}, True),
    ("MaxPool", [X], {"kernel_shape": [2, 2], "storage_order": 1, "ceil_mode": 0, "dilations": [1, 1]}, True),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "count_include_pad": 1, "auto_pad": "NOTSET", "opset": 19}, True),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "dilations": [1, 1], "opset": 19}, True),
    ("LpPool", [X], {"kernel_shape": [2, 2], "dilations": [1, 1], "auto_pad": "VALID"}, True),
    ("BatchNormalization", [X, *NORM], {"momentum": 0.7, "spatial": 1, "opset": 8}, True),
    ("BatchNormalization", [X, *NORM], {"momentum": 0.7, "training_mode": 0}, True),
    ("Gemm", [numbers(3, 4), numbers(4, 5)], {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}, True),
    ("Softmax", [X], {"axis": -1}, True),
    ("ArgMax", [X], {"axis": -1, "keepdims": 1, "select_last_index": 0}, True),
    ("TopK", [X, whole(3)], {"axis": -1, "largest": 1, "sorted": 1, "outputs": 2}, True),
    ("ReduceMean", [X], {"axes": [-1], "keepdims": 1, "opset": 13}, True),
    ("ReduceSum", [X, whole(-1)], {"noop_with_empty_axes": 1}, True),
    ("CumSum", [X, np.int64(2)], {"exclusive": 0, "reverse": 0}, True),
    ("Cast", [X], {"to": TensorProto.FLOAT, "saturate": 1, "opset": 19}, True),
    ("Mod", [X, np.float32(0.5)], {"fmod": 1}, True),
    ("Reshape", [X, whole(2, -1)], {"allowzero": 1}, False),
    ("LayerNormalization", [X, numbers(6)], {"axis": -1, "stash_type": 1}, False),
    ("Resize", [X, None, FACTORS], {"coordinate_transformation_mode": "half_pixel_symmetric", "opset": 19}, True),
    *(
        (
            "Resize",
            [X, np.zeros(0, np.float32), FACTORS],
            {"extrapolation_value": 0.0, "cubic_coeff_a": -0.5, **rule},
            True,
        )
        for rule in (
            {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"},
            {"coordinate_transformation_mode": "pytorch_half_pixel", "nearest_mode": "floor", "mode": "linear"},
            {"coordinate_transformation_mode": "align_corners", "nearest_mode": "ceil", "mode": "linear"},
            {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor", "opset": 11},
        )
    ),
    ("Resize", [X, None, FACTORS**0], {"coordinate_transformation_mode": "asymmetric", "mode": "cubic"}, True),
    ("DequantizeLinear", [np.arange(8, dtype=np.uint8), np.float32(0.5)], {"output_dtype": 1, "opset": 23}, False),
    ("QuantizeLinear", [X, np.float32(0.1), np.int8(3)], {"precision": 1, "opset": 23}, False),
]


@pytest.mark.parametrize("case", HABITS, ids=lambda case: case[0])
@pytest.mark.filterwarnings("ignore:.*model.onnx:UserWarning")
def test_what_exporters_write_by_habit(
    case: tuple[str, list[Array | None], dict[str, Any], bool], tmp_path: Path
) -> None:
    operator, arrays, attributes, free = case
    first = arrays[0]
    assert first is not None
    theirs_too = {k: v for k, v in attributes.items() if k != "pads" or "auto_pad" not in attributes}  # not both
    fixed = model_of(operator, arrays, **theirs_too)
    runs = attributes.get("opset", 18) < 23  # what this runtime may not know
    expected = runtime(fixed, first) if runs else ReferenceEvaluator(fixed).run(None, {"in0": first})
    for is_open in (False, True)[: 1 + free]:
        model = model_of(operator, arrays, **attributes)
        dims = model.graph.input[0].type.tensor_type.shape.dim
        for axis in range(first.ndim if is_open else 0):
            if axis != 1:  # which are channels
                dims[axis].Clear()
        for ours, theirs in zip(outputs_of(read(model, tmp_path), first), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("operator", ["BatchNormalization", "Dropout"])
def test_old_files_say_that_they_are_not_in_training(operator: str, tmp_path: Path) -> None:
    arrays = [X, *NORM] if operator == "BatchNormalization" else [X]
    expected = runtime(model_of(operator, arrays, opset=9), X)
    found = outputs_of(read(model_of(operator, arrays, opset=9, is_test=1), tmp_path), X)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=2e-5)


def test_idle_attributes_of_what_is_computed_of_sizes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Reshape", ["sizes", "all"], ["flat"], allowzero=1),
        helper.make_node("Reshape", ["flat", "zero"], ["same"]),
        helper.make_node("Mod", ["same", "large"], ["modulo"], fmod=1),
        helper.make_node("Shape", ["modulo"], ["count"], start=-1, end=1),
        helper.make_node("Reshape", ["modulo", "count"], ["again"]),
        helper.make_node("Expand", ["one", "again"], ["ones"]),
        helper.make_node("Add", ["x", "ones"], ["y"]),
    ]
    constants = {"all": whole(-1), "zero": whole(0), "large": whole(1 << 20), "one": numbers(1)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, "h", 6])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    np.testing.assert_allclose(outputs_of(read(model, tmp_path), X)[0], runtime(model, X)[0], rtol=1e-6)
