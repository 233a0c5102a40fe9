"""What a process takes of the machine's memory, and how running out of it is recognised."""

from __future__ import annotations

import gc
import resource

import torch

_CPU_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory")
"""torch's CPU allocator raises a bare RuntimeError, known by its words only (c10/core/impl/alloc_cpu.cpp)."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR_WORDS)


def release_memory() -> None:
    """Give back what a failed forward pass left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int:
    """The most this process has held so far: resident memory, or what torch reserved on the GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
