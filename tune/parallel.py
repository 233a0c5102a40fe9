"""Several processes that train one model together, each on its share of every step (data parallel).

Started by ``torchrun`` or ``accelerate launch``, which set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Each process
holds the whole model, or its part of it where the recipe says ``parallel: sharded`` (``tune.sharding``). The gradients
of weights that are held whole are summed once a step, after the last micro batch: what is summed is the gradient of the
step's loss, so a step means the same for any number of processes. DistributedDataParallel would average over processes
and needs the same number of micro batches in each; here a process may even have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

_BUCKET_BYTES = 64 << 20
"""Gradients travel in pieces of at least this size: few messages for adapters, little extra memory for whole models."""

_LONGEST_WAIT = timedelta(days=1)
"""The others wait while the first one tokenises and publishes; if a process dies, the launcher ends the rest."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers. All calls are collective: every process must make them in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes checkpoints, tells observers and publishes."""
        return self.rank == 0

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by the sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)

    def any(self, is_set: bool) -> bool:
        if self.size == 1:
            return is_set
        count = torch.tensor([int(is_set)])
        self.add_up(count)
        return bool(count)

    def most(self, number: int) -> int:
        """The largest ``number`` of any process."""
        if self.size == 1:
            return number
        found = torch.tensor([number])
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def text_of_first(self, text: str) -> str:
        """The first process's ``text``, in all."""
        if self.size == 1:
            return text
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(encoded)])
        distributed.broadcast(length, src=0)
        buffer = encoded if self.is_first else torch.zeros(int(length), dtype=torch.uint8)
        distributed.broadcast(buffer, src=0)
        return bytes(buffer.tolist()).decode()

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:  # a process without a micro batch in this step
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.nbytes for gradient in bucket) >= _BUCKET_BYTES:
                self._add_up_bucket(bucket)
                bucket = []
        if bucket:
            self._add_up_bucket(bucket)

    def _add_up_bucket(self, gradients: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.add_up(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that the launcher started with this one; alone where none did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
