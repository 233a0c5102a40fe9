"""The header of a safetensors file, read and checked without any library, and its values checked for NaN and
infinity.

Format: 8 bytes little-endian header size N, N bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). Everything that a loader would trust is checked against
the file itself before anything maps it: sizes and offsets that lie have led loaders to read other memory
(Ollama CVE-2026-7482).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from registry.errors import InvalidArtifactError
from registry.files import open_regular
from registry.names import shown
from registry.strict_json import parse_strict_json

MAX_HEADER_BYTES = 10_000_000
MAX_BASE_HEADER_BYTES = 100_000_000
"""Of a base model's file: large mixture-of-experts models need it, and the safetensors library allows as much."""
MAX_TENSORS = 20_000
_MAX_DIMENSIONS = 8
_MAX_METADATA_BYTES = 1_000_000
_CHUNK_BYTES = 4 << 20

# https://github.com/huggingface/safetensors: safetensors/src/tensor.rs, enum Dtype. The sub-byte types are
# left out: no adapter has them, and a base that does is read by its configuration instead.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    name: str
    dtype: str
    """As the header writes it: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte, counted from the end of the header."""
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    """Offset in the file where the tensors' bytes begin."""


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> SafetensorsHeader:
    """Read and check the header of one file.

    Raises:
        InvalidArtifactError: code ``invalid_safetensors``; the file is not exactly what its header says.
        OSError: it cannot be read.
    """
    with open_regular(path) as source:
        file_bytes = source.seek(0, 2)
        source.seek(0)
        header_bytes = int.from_bytes(source.read(8), "little")
        if file_bytes < 10 or header_bytes > max_header_bytes or 8 + header_bytes > file_bytes:
            raise _refused(
                path.name,
                f"a header of {header_bytes} bytes in a file of {file_bytes}; at most {max_header_bytes} are allowed",
            )
        entries = _parse_json(path.name, source.read(header_bytes))
    metadata = _metadata(path.name, entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise _refused(path.name, f"{len(entries)} tensors; at most {MAX_TENSORS} are allowed")
    tensors = {name: _tensor(path.name, name, entry) for name, entry in entries.items()}
    data_start = 8 + header_bytes
    _check_contiguous(path.name, tensors.values(), file_bytes - data_start)
    return SafetensorsHeader(tensors, metadata, data_start)


LARGEST_VALUE = 2**17
"""Of a weight that counts as sane; none of half precision reaches it."""


@dataclass(frozen=True, slots=True)
class Diverged:
    """A tensor that no sane training leaves."""

    tensor: str
    is_finite: bool
    """Its values are numbers, of ``LARGEST_VALUE`` and more; else it holds NaN or infinity."""


def first_diverged(path: Path, header: SafetensorsHeader) -> Diverged | None:
    """The first F16, BF16 or F32 tensor with NaN, infinity or a value of ``LARGEST_VALUE`` or more (of either sign), or
    None. Reads the whole file.

    A float is NaN or infinite exactly when all bits of its exponent are ones (IEEE 754-2008, 3.4), and at least 2**17
    exactly when its exponent is that large. The bytes that hold the exponent are picked out with strided slices, so
    that no number is ever decoded: hundreds of MB per second without numpy, which this package does not import.
    """
    with open_regular(path) as source:
        for tensor in sorted(header.tensors.values(), key=lambda entry: entry.begin):
            source.seek(header.data_start + tensor.begin)
            if tensor.dtype in _EXPONENTS and (is_finite := _look_at_exponents(source, tensor)) is not None:
                return Diverged(tensor.name, is_finite)
    return None


@dataclass(frozen=True, slots=True)
class _Exponent:
    """Where the exponent's bits are in the little-endian bytes of one float."""

    width: int
    high_mask: int
    """In the last byte."""
    low_mask: int
    """In the byte before; 0 if the exponent ends in the last byte."""
    large: int
    """The least that ``high_mask`` leaves of the last byte where the value is ``LARGEST_VALUE`` or more."""


_EXPONENTS = {
    "F32": _Exponent(4, 0x7F, 0x80, (127 + 17) >> 1),
    "BF16": _Exponent(2, 0x7F, 0x80, (127 + 17) >> 1),
    "F16": _Exponent(2, 0x7C, 0x00, 0x7C),
}


def _look_at_exponents(source: BinaryIO, tensor: TensorEntry) -> bool | None:
    """Whether the first chunk with a large value holds finite ones only; ``None``: there is none."""
    exponent = _EXPONENTS[tensor.dtype]
    large_table = _large_table(exponent.high_mask, exponent.large)
    high_table = _full_mask_table(exponent.high_mask)
    low_table = _full_mask_table(exponent.low_mask)
    left = tensor.end - tensor.begin
    while left > 0:
        chunk = source.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise _refused(str(source.name), "fewer bytes than a moment ago; it is being changed")
        left -= len(chunk)
        last = chunk[exponent.width - 1 :: exponent.width]
        if 1 not in last.translate(large_table):
            continue
        high = last.translate(high_table)
        low = chunk[exponent.width - 2 :: exponent.width].translate(low_table)
        return not int.from_bytes(high, "little") & int.from_bytes(low, "little")
    return None


@functools.cache
def _large_table(mask: int, least: int) -> bytes:
    """A table for bytes.translate: 1 where what ``mask`` leaves is at least ``least``, else 0."""
    return bytes(int(byte & mask >= least) for byte in range(256))


@functools.cache
def _full_mask_table(mask: int) -> bytes:
    """A table for bytes.translate: 1 where all bits of ``mask`` are set, else 0."""
    return bytes(int(byte & mask == mask) for byte in range(256))


def _parse_json(file_name: str, data: bytes) -> dict[str, object]:
    if not data.startswith(b"{"):
        raise _refused(file_name, "a header that does not begin with '{'")
    try:
        parsed = parse_strict_json(data)
    except ValueError as error:
        raise _refused(file_name, f"a header that is not JSON as it should be ({str(error)[:200]})") from error
    assert isinstance(parsed, dict), "text that starts with '{' and parses is an object"
    return parsed


def _metadata(file_name: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _refused(file_name, "__metadata__ that is no object of strings")
    if sum(len(key) + len(text) for key, text in value.items()) > _MAX_METADATA_BYTES:
        raise _refused(file_name, f"more than {_MAX_METADATA_BYTES} characters of __metadata__")
    return value


def _tensor(file_name: str, name: str, entry: object) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refused(file_name, f"tensor {shown(name)} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _refused(file_name, f"tensor {shown(name)} of the unknown dtype {shown(str(dtype))}")
    if not _is_size_list(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _refused(file_name, f"tensor {shown(name)} with a shape that is no list of sizes")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refused(file_name, f"tensor {shown(name)} with data_offsets that are no span")
    span = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != span:
        raise _refused(
            file_name, f"tensor {shown(name)} with {offsets[1] - offsets[0]} bytes for {span} bytes of shape"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _is_size_list(value: object) -> bool:
    # type(), because True is an int too; the bound keeps products of hostile sizes small.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def _check_contiguous(file_name: str, tensors: Iterable[TensorEntry], data_bytes: int) -> None:
    position = 0
    for tensor in sorted(tensors, key=lambda entry: (entry.begin, entry.end)):
        if tensor.begin != position:
            raise _refused(file_name, f"tensor {shown(tensor.name)} at offset {tensor.begin}, expected at {position}")
        position = tensor.end
    if position != data_bytes:
        raise _refused(file_name, f"{data_bytes} bytes of tensors, its header says {position}")


def _refused(file_name: str, what: str) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"{shown(file_name)} is no valid safetensors file: it has {what}. Save it again, or copy it again if "
        "the copy was cut short.",
        code="invalid_safetensors",
    )
