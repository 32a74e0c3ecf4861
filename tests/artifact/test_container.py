"""The file's bytes, the compression of mostly-zero tensors, and every way in which bytes can be wrong."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from escort.artifact import container
from escort.artifact.container import Container, pack
from escort.filter import SparseFilter


def sealed(header: bytes, data: bytes) -> bytes:
    """A file put together by hand: its header holds 64 zeros where the checksum goes."""
    whole = struct.pack("<Q", len(header)) + header + data
    assert whole[35:99] == b"0" * 64
    return whole[:35] + hashlib.sha256(whole).hexdigest().encode() + whole[99:]


# The example of docs/format.md: [[0, 0, 2.5, 0], [0, 0, 0, 0], [-1, 0, 0, 0.5]].
EXAMPLE = sealed(
    b'{"__metadata__":{"sha256":"0000000000000000000000000000000000000000000000000000000000000000",'
    b'"note":"hello","tensors":"{\\"compressed\\":{\\"w\\":[3,4]},\\"shared\\":{}}"},'
    b'"w.values":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
    b'"w.column_gaps":{"dtype":"U8","shape":[3],"data_offsets":[12,15]},'
    b'"w.row_lengths":{"dtype":"U8","shape":[3],"data_offsets":[15,18]}} ',
    b"\x00\x00\x20\x40\x00\x00\x80\xbf\x00\x00\x00\x3f"  # 2.5, -1.0, 0.5
    b"\x02\x00\x02"  # two zeros before 2.5; none before -1.0; two between -1.0 and 0.5
    b"\x01\x00\x02",  # nonzeros per row
)
MATRIX = torch.tensor([[0, 0, 2.5, 0], [0, 0, 0, 0], [-1, 0, 0, 0.5]])


def test_the_bytes_are_the_documented_ones() -> None:
    assert pack({"note": "hello"}, {"w": MATRIX}) == EXAMPLE
    read = Container(EXAMPLE)
    assert read.metadata["note"] == "hello"
    assert torch.equal(read.tensor("w"), MATRIX)
    assert read.left == []


def test_it_is_a_safetensors_file() -> None:
    assert load(EXAMPLE)["w.values"].tolist() == [2.5, -1.0, 0.5]


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_every_flipped_bit_is_noticed(data: st.DataObject) -> None:
    damaged = bytearray(EXAMPLE)
    damaged[data.draw(st.integers(0, len(EXAMPLE) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError):
        Container(bytes(damaged))


@pytest.mark.parametrize("length", [*range(0, len(EXAMPLE), 7), len(EXAMPLE) - 1])
def test_every_truncation_is_noticed(length: int) -> None:
    with pytest.raises(ValueError):
        Container(EXAMPLE[:length])
    with pytest.raises(ValueError):
        Container(EXAMPLE + EXAMPLE[:length] + b"\0")


@given(
    rows=st.integers(1, 40),
    trailing=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_tensors_come_back(rows: int, trailing: list[int], density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, *trailing, generator=generator)
    tensor *= torch.rand(tensor.shape, generator=generator) < density
    back = Container(pack({}, {"t": tensor})).tensor("t")
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(("width", "dtype"), [(256, "U8"), (257, "U16"), (65536, "U16"), (65537, "U32")])
def test_gaps_take_the_smallest_type_that_holds_them(width: int, dtype: str) -> None:
    tensor = torch.zeros(2, width)
    tensor[:, -1] = 1.0
    data = pack({}, {"t": tensor})
    assert f'"t.column_gaps":{{"dtype":"{dtype}"'.encode() in data
    assert torch.equal(Container(data).tensor("t"), tensor)


def test_negative_zeros_are_zeros() -> None:
    assert len(pack({}, {"t": torch.full((100, 100), -0.0)})) < 1000


def test_a_filter_keeps_its_own_zeros() -> None:
    parts = np.array([0, 1, 3], np.int32), np.array([2, 0, 1], np.int32), np.array([0.0, -0.0, 3.0], np.float32)
    sparse_filter = SparseFilter((2, 3, 1, 1), 1, *parts)
    back = Container(pack({}, {"f": sparse_filter})).sparse_filter("f", (2, 3, 1, 1), 1)
    for name in ("indptr", "columns", "values"):
        assert getattr(back, name).tobytes() == getattr(sparse_filter, name).tobytes()


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_grouped_filters_come_back(density: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 2) * (torch.rand(6, 5, 3, 2) < density)
    back = Container(pack({}, {"f": SparseFilter.from_dense(weight, 3)})).sparse_filter("f", (6, 5, 3, 2), 3)
    assert back.groups == 3
    assert torch.equal(back.to_dense(), weight)


def test_one_tensor_under_two_names_is_stored_once() -> None:
    weight, mask = torch.randn(100, 10), torch.eye(50)
    once = pack({}, {"a": weight, "m": mask})
    twice = pack({}, {"a": weight, "b": weight, "c": weight[:50], "m": mask, "n": mask})
    assert len(twice) < len(once) + 50 * 10 * 4 + 200
    read = Container(twice)
    assert read.tensor("a").data_ptr() == read.tensor("b").data_ptr()
    assert torch.equal(read.tensor("c"), weight[:50])
    assert torch.equal(read.tensor("n"), mask)
    assert torch.equal(read.tensor("m"), mask)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.zeros(0, 4),
        torch.rand(3, 4).double(),
        torch.rand(3, 4).bfloat16(),
        torch.tensor([True, False]),
        torch.rand(4, 5, 2).transpose(0, 2),
        torch.arange(4, dtype=torch.uint8),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_any_plain_tensor_comes_back(tensor: torch.Tensor) -> None:
    back = Container(pack({}, {"t": tensor})).tensor("t")
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.zeros(2, 2, dtype=torch.complex64), "complex64"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.empty(2, device="meta"), "meta"),
    ],
)
def test_other_tensors_are_refused_by_name(tensor: torch.Tensor, complaint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"layer.t .*{complaint}"):
        pack({}, {"layer.t": tensor})


def test_clashing_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two tensors are called w\.values"):
        pack({}, {"w": MATRIX, "w.values": torch.ones(2)})


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (b"[3,4]", b"[3,2]", "columns must lie in 0..1, found 3"),
        (b"[3,4]", b"[2,4]", "row lengths must sum up"),
        (b"[3,4]", b"[1]  ", "no compressed tensor has shape"),
        (b"[3,4]", b"[0,4]", "no compressed tensor has shape"),
        (b"[3,4]", b"[3,9999999999]", "no compressed tensor has shape"),
        (b"[3,4]", b"[3,999999999]", "limit of"),
        (b"[3,4]", b"[3,4.5]", "no compressed tensor has shape"),
        (b"[3,4]", b"[3,NaN]", "NaN is no JSON number"),
        (b'"w\\"', b'"v\\"', r"tensor v\.values is missing"),
        (b"{}}", b'{\\"a\\":\\"b\\"}}', "tensor a cannot share b"),
        (b"{}}", b'{\\"w\\":\\"w\\"}}', "tensor w cannot share w"),
        (b'"F32","shape":[3]', b'"I32","shape":[3]', "values are float32"),
        (b'gaps":{"dtype":"U8"', b'gaps":{"dtype":"I8"', "values are float32"),
        (b'gaps":{"dtype":"U8"', b'gaps":{"dtype":"F8_E4M3"', "is of type"),
        (b'gaps":{"dtype":"U8"', b'gaps":{"dtype":"BOOL"', "truth values"),
        (b"[12,15]", b"[12,99]", "laid out"),
        (b"[15,18]", b"[12,15]", "laid out"),
        (b"\x00\x00\x20\x40", b"\x00\x00\x80\x7f", "NaN or infinity"),
        (b"\x02\x00\x02", b"\x02\x00\xff", "columns must lie in 0..3, found 256"),
        (b"\x01\x00\x02", b"\x01\x00\x03", "row lengths must sum up"),
        (b"\x01\x00\x02", b"\xff\xff\xff", "row lengths must sum up"),
    ],
)
def test_a_resealed_file_is_still_checked(old: bytes, new: bytes, complaint: str) -> None:
    size = int.from_bytes(EXAMPLE[:8], "little")
    header, data = EXAMPLE[8 : 8 + size].rstrip(), EXAMPLE[8 + size :]
    header = header[:27] + b"0" * 64 + header[91:]
    assert header.count(old) + data.count(old) == 1
    header, data = header.replace(old, new), data.replace(old, new)
    forged = sealed(header + b" " * (-len(header) % 8), data)
    with pytest.raises(ValueError, match=complaint):
        Container(forged).tensor("w")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not what escort.save wrote"),
        (b"import torch\n" * 20, "not what escort.save wrote"),
        (EXAMPLE[:8] + EXAMPLE[16:], "not what escort.save wrote, or its beginning is damaged"),
        (
            EXAMPLE[:60],
            f"cut short: it has 60 bytes, and its header alone takes {8 + int.from_bytes(EXAMPLE[:8], 'little')}",
        ),
        (EXAMPLE[:-1], "checksum does not match"),
    ],
)
def test_other_files_and_cut_ones_are_told_apart(data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Container(data)


def test_a_header_of_absurd_size_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 64)
    with pytest.raises(ValueError, match="exceeds the limit of 64"):
        Container(EXAMPLE)
    with pytest.raises(ValueError, match="exceeds the limit of 64"):
        pack({}, {"w": MATRIX})


def test_each_tensor_is_taken_out_once() -> None:
    read = Container(EXAMPLE)
    read.tensor("w")
    with pytest.raises(ValueError, match="tensor w is missing"):
        read.tensor("w")
    with pytest.raises(ValueError, match="should be float32 of shape"):
        Container(EXAMPLE).sparse_filter("w", (3, 4, 1, 1), 1)


def test_the_documentation_shows_these_bytes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    shown = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ){1,15}[0-9a-f]{2}) ", text, re.MULTILINE)
    assert bytes.fromhex("".join(shown)) == EXAMPLE
