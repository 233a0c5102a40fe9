"""A model whose weights are cut among the processes (FSDP2, ``torch.distributed.fsdp.fully_shard``; the idea is ZeRO-3,
https://arxiv.org/abs/1910.02054).

Each process keeps its part of every sharded weight. A layer is put together right before it runs and taken apart right
after, in the forward as in the backward pass, so that a device needs room for its parts and for one layer. What is cut:

    lora, dora     the frozen base. The adapter is small and stays whole in every process, and so do its gradients and
                   optimizer state, which are added up as without sharding (``tune.parallel``).
    full, freeze   all weights, with gradients and optimizer state. Gradients are summed as they are cut.

Putting a layer together takes all processes, so all of them must run equally many passes: one that has none left runs
empty passes (``run_empty_pass``). For the same reason a process that runs out of memory cannot try again by itself.

The tests run two CPU processes over gloo. The same calls run over NCCL on GPUs, which nobody has tried yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tune.freezing import layers_of
from tune.methods import FreezeMethod, FullMethod, Method
from tune.model import Trainable
from tune.parallel import Ranks

_ROOM_TO_WORK = 1.25
"""What the whole model and the activations of a validation take, over its weights."""


def load_sharded(
    load: Callable[[torch.device], Trainable], method: Method, device: torch.device, ranks: Ranks
) -> Trainable:
    """``load`` the whole model into host memory and keep this process's parts of it on ``device``. Collective.

    The processes of a machine load one after another, so that its memory holds one whole model at a time.
    """
    mesh = init_device_mesh(device.type, (ranks.size,))
    place = int(os.environ.get("LOCAL_RANK", ranks.rank))
    sharded: Trainable | None = None
    for turn in range(ranks.size):
        if turn == place:
            sharded = _shard(load(torch.device("cpu")), method, device, mesh)
        ranks.wait()
    assert sharded is not None, (place, ranks)
    return sharded


def _shard(trainable: Trainable, method: Method, device: torch.device, mesh: object) -> Trainable:
    model = trainable.model
    policy = MixedPrecisionPolicy()
    whole: set[torch.nn.Parameter] = set()
    if isinstance(method, FullMethod | FreezeMethod):
        if trainable.dtype == "bfloat16":
            # Autocast alone would keep a rounded copy of each whole layer until its backward pass.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    else:
        whole = {parameter for _, parameter in trainable.parameters()}
        for parameter in whole:
            parameter.data = parameter.data.to(device)
    pieces = list(layers_of(model)[1])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        pieces += [embedding, head]
    for module in (*pieces, model):
        # The outermost module too is taken apart after its forward pass: parameters are then always parts outside.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)
        module.set_gradient_divide_factor(1.0)  # the sum over processes, not FSDP's average
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other than a sum
    return replace(trainable, device=device, is_sharded=True)


@dataclass(frozen=True, slots=True)
class BytesHeld:
    here: int
    """Of the model's weights, in this process."""
    whole: int


def bytes_held(trainable: Trainable) -> BytesHeld:
    parameters = list(trainable.model.parameters())
    here = [parameter.to_local() if is_part(parameter) else parameter for parameter in parameters]
    return BytesHeld(
        sum(tensor.numel() * tensor.element_size() for tensor in here),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )


def run_empty_pass(trainable: Trainable) -> None:
    """Take part in the others' pass, forward and (where gradients are on) backward, without an effect."""
    token_ids = torch.zeros((1, 1), dtype=torch.int64, device=trainable.device)
    with trainable.autocast():
        logits = trainable.model(input_ids=token_ids, use_cache=False).logits
    if torch.is_grad_enabled():
        (logits.float().sum() * 0.0).backward()


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float, ranks: Ranks) -> float:
    """Scale the gradients down to ``max_norm``; the L2 norm that they had, of all parts together. Collective."""
    parts = [parameter.grad.to_local() for parameter in parameters if is_part(parameter.grad)]
    if not parts:
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    assert len(parts) == len(parameters), "weights of a model are trained whole, or all in parts"
    square = torch.nn.utils.get_total_norm(parts).square()
    ranks.add_up(square)
    norm = square.sqrt()
    share = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for part in parts:
        part.mul_(share)
    return float(norm)


def is_part(tensor: torch.Tensor | None) -> bool:
    """Whether this process holds but a part of ``tensor``."""
    return isinstance(tensor, DTensor)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of ``tensor``. Collective if it is in parts."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of ``whole``, cut as ``parameter`` is, on its device; all of it if that is not in parts."""
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    # Without a source each process cuts its own copy, and nothing is sent.
    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def gather(trainable: Trainable, load: Callable[[torch.device], Trainable], ranks: Ranks) -> Trainable:
    """The first process's whole model with the weights that were trained; in the others ``trainable``. Collective.

    It is made on the device if that has room for it, else in host memory.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in trainable.parameters():
        whole = whole_of(parameter.detach())
        if ranks.is_first:
            weights[name] = whole.cpu()
    if not ranks.is_first:
        return trainable
    needed = sum(parameter.numel() * parameter.element_size() for parameter in trainable.model.parameters())
    gathered = load(_device_with(round(_ROOM_TO_WORK * needed), trainable.device))
    with torch.no_grad():
        for name, parameter in gathered.parameters():
            parameter.copy_(weights[name])
    return gathered


def _device_with(num_bytes: int, device: torch.device) -> torch.device:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < num_bytes:
        return torch.device("cpu")
    return device
