"""The header reader against the safetensors library and numpy: never more trusting than they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from registry import read_header
from registry.errors import InvalidArtifactError
from registry.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS, Diverged, first_diverged
from tests.registry.samples import adapter_tensors

VALID = save(adapter_tensors(), metadata={"format": "pt"})
(_SIZE,) = struct.unpack("<Q", VALID[:8])
HEADER: dict[str, Any] = json.loads(VALID[8 : 8 + _SIZE])
DATA = VALID[8 + _SIZE :]
NAMES = sorted(set(HEADER) - {"__metadata__"})


def _file(header: object, data: bytes = DATA, *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _library_accepts(content: bytes) -> dict[str, tuple[str, list[int]]] | None:
    try:
        return {name: (entry["dtype"], list(entry["shape"])) for name, entry in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        return None


def _refusal(path: Path, content: bytes) -> InvalidArtifactError | None:
    path.write_bytes(content)
    try:
        read_header(path)
    except InvalidArtifactError as error:
        return error
    return None


def test_a_file_of_the_library_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    header = read_header(path)
    assert {name: (t.dtype, list(t.shape)) for name, t in header.tensors.items()} == _library_accepts(VALID)
    assert header.metadata == {"format": "pt"}
    for name, array in adapter_tensors().items():
        tensor = header.tensors[name]
        content = VALID[header.data_start + tensor.begin : header.data_start + tensor.end]
        assert content == array.tobytes()


_ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 400),
    st.integers(min_value=2**31),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-2, 200), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A valid file with one to three things changed: a field, a name, a key, bytes, the size, the end."""
    header = json.loads(json.dumps(HEADER))
    data, size = DATA, None
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(NAMES))
        if not isinstance(header.get(name), dict):
            continue
        entry = header[name]
        match draw(st.integers(0, 9)):
            case 0:
                entry[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(_ODD_VALUES)
            case 1:
                entry["data_offsets"] = [draw(st.integers(-8, 5000)), draw(st.integers(-8, 5000))]
            case 2:
                entry["shape"] = draw(st.lists(st.integers(0, 70), max_size=3))
            case 3:
                entry["dtype"] = draw(st.sampled_from(["F64", "F16", "BF16", "I8", "BOOL", "f32", "F4", "F128", ""]))
            case 4 if entry:  # an odd value may have emptied it
                entry.pop(draw(st.sampled_from(sorted(entry))), None)
            case 5:
                entry[draw(st.text(max_size=5))] = draw(_ODD_VALUES)
            case 6:
                header.pop(name)
            case 7:
                header["__metadata__"] = draw(_ODD_VALUES)
            case 8:
                header[name] = draw(_ODD_VALUES)
            case _:
                data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=16))
    content = bytearray(_file(header, data, size=size))
    match draw(st.integers(0, 4)):
        case 0:
            content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
        case 1:
            content = content[: draw(st.integers(0, len(content)))]
        case 2:
            content[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, 3000)))
        case _:
            pass
    return bytes(content)


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=_mutated())
def test_a_mutated_file_is_refused_unless_the_library_reads_the_same_from_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    refusal = _refusal(path, content)
    event("accepted" if refusal is None else "refused")
    if refusal is None:
        tensors = read_header(path).tensors
        assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == _library_accepts(content)
    else:
        assert refusal.code == "invalid_safetensors"
        assert len(refusal.message) < 700


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda text: _file(b"{" + text)))
def test_random_bytes_are_refused_unless_the_library_takes_them_too(tmp_path: Path, content: bytes) -> None:
    refusal = _refusal(tmp_path / "x.safetensors", content)
    assert refusal is not None or _library_accepts(content) is not None


def _tensor(begin: int, end: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("an empty file", b""),
        ("less than a size", b"\x02\0\0"),
        ("a header beyond the file", _file(b"{}", b"", size=1000)),
        ("a header size of 2**63", _file(b"{}", b"", size=2**63)),
        ("a header above the limit", _file(b"{" + b" " * MAX_HEADER_BYTES + b"}", b"")),
        ("a header that is a list", _file(b"[]", b"")),
        ("a header that begins with a space", _file(b" {}", b"")),
        ("a header that is not UTF-8", _file(b'{"\xff": 1}', b"")),
        ("a header nested 100,000 deep", _file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"")),
        ("a number of 10,000 digits", _file(b'{"a": {"dtype": "U8", "shape": [' + b"9" * 10_000 + b"]}}", b"")),
        ("NaN", _file(b'{"__metadata__": {}, "a": NaN}', b"")),
        ("the same name twice", _file(b'{"a":%s,"a":%s}' % ((json.dumps(_tensor(0, 4)).encode(),) * 2), bytes(4))),
        ("a hole before the first", _file({"a": _tensor(1, 4)}, bytes(4))),
        ("a hole between two", _file({"a": _tensor(0, 1), "b": _tensor(2, 4)}, bytes(4))),
        ("an overlap", _file({"a": _tensor(0, 3), "b": _tensor(2, 4)}, bytes(4))),
        ("the same bytes twice", _file({"a": _tensor(0, 4), "b": _tensor(0, 4)}, bytes(4))),
        ("bytes after the last", _file({"a": _tensor(0, 4)}, bytes(5))),
        ("an end beyond the file", _file({"a": _tensor(0, 400)}, bytes(4))),
        ("a shape larger than the span", _file({"a": _tensor(0, 4, [2, 4])}, bytes(4))),
        ("a product that overflows 64 bits", _file({"a": _tensor(0, 0, [2**32, 2**32])}, b"")),
        ("a size that is true", _file(b'{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', bytes(1))),
        ("a size of 1.0", _file(b'{"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}', bytes(1))),
        ("a negative size", _file({"a": _tensor(0, 1, [-1])}, bytes(1))),
        ("metadata that is no text", _file({"__metadata__": {"a": 1}}, b"")),
        ("too many tensors", _file({f"t{i}": _tensor(0, 0) for i in range(MAX_TENSORS + 1)}, b"")),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, what: str, content: bytes) -> None:
    refusal = _refusal(tmp_path / "x.safetensors", content)
    assert refusal is not None, what
    assert refusal.code == "invalid_safetensors"


def _diverged(content: bytes, dtype: str) -> Diverged | None:
    """numpy's opinion; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        values = (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(content, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        if (np.abs(values) < 2**17).all():
            return None
    return Diverged("a", is_finite=bool(np.isfinite(values).all()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=st.sampled_from(["F16", "BF16", "F32"]), data=st.data())
def test_nan_infinity_and_large_values_are_found_as_numpy_finds_them(
    tmp_path: Path, dtype: str, data: st.DataObject
) -> None:
    width = 4 if dtype == "F32" else 2
    edge = [b"\x00\x7f", b"\x80\x7f", b"\x80\xff", b"\xff\x7f", b"\x7f\x7f", b"\x00\x7c", b"\xff\x7b", b"\x00\xfc"]
    edge += [b"\x00\x48", b"\xff\x47", b"\x00\xc8", b"\xff\xc7"]  # either side of 2**17
    number = st.binary(min_size=width, max_size=width) | st.sampled_from(edge).map(lambda b: bytes(width - 2) + b)
    content = b"".join(data.draw(st.lists(number, max_size=12)))
    count = len(content) // width
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file({"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, len(content)]}}, content))
    assert first_diverged(path, read_header(path)) == _diverged(content, dtype)


@pytest.mark.parametrize("position", [0, 1_048_575, 1_048_576, 2_999_999])
def test_a_single_nan_is_found_on_either_side_of_a_chunk_border(tmp_path: Path, position: int) -> None:
    values = np.ones(3_000_000, np.float32)
    values[position] = np.nan
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"fine": np.ones(8, np.float32), "late": values}))
    assert first_diverged(path, read_header(path)) == Diverged("late", is_finite=False)
