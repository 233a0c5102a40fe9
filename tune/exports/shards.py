"""Writing a safetensors file piece by piece, so that no tensor, let alone a model, has to be in memory whole.

Format: 8 bytes little-endian header size N, N bytes of JSON padded with spaces to a multiple of 8, then the tensors'
bytes without gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from registry.safetensors_header import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]
    """Its bytes, in order; called once, when they are written."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_shard(path: Path, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> None:
    """
    Raises:
        OSError: the disk refused.
    """
    planned = list(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in planned:
        span = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in planned:
            written = sum(out.write(piece) for piece in tensor.pieces())
            assert written == tensor.num_bytes, f"{tensor.name}: {written} bytes, planned {tensor.num_bytes}"
