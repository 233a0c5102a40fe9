"""``capo plan``: will it fit?"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.errors import InvalidRequestError

if TYPE_CHECKING:
    from capo.capacity import Plan

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def add_to(app: typer.Typer) -> None:
    app.command(name="plan")(plan_command)


def plan_command(
    model: Annotated[str, typer.Argument(help="capo-tiny, a model's directory, or its config.json.")] = "capo-tiny",
    gpu_memory: Annotated[str | None, typer.Option(help="Of one GPU, as 80G; default: plan for this CPU.")] = None,
    memory: Annotated[str | None, typer.Option(help="That a CPU engine may take; default: this machine's.")] = None,
    max_loras: Annotated[int, typer.Option(min=1, help="Adapter slots.")] = 8,
    max_lora_rank: Annotated[int, typer.Option(min=1, help="The largest rank of an adapter.")] = 16,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a request; default: the model's most.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests of that length at once.")] = 32,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="That alone get slots, with commas; default: all that vLLM knows of.")
    ] = None,
    reserve: Annotated[str | None, typer.Option(help="For activations and libraries; default 3G, on a CPU 1G.")] = None,
    disk: Annotated[str | None, typer.Option(help="The registry's disk, as 500G.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Plan memory: weights, adapter slots, cache, what is left, and the arguments that fit.

    Exit code 1: it does not fit.
    """
    from capo.capacity import Wish, plan
    from registry import locate_base_model

    if gpu_memory is not None and memory is not None:
        raise InvalidRequestError("--gpu-memory and --memory exclude each other; give one")
    given = gpu_memory if gpu_memory is not None else memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = Path(model)
    made = plan(
        path if path.exists() else locate_base_model(model).path,
        Wish(
            memory_bytes=machine if given is None else _bytes("memory", given),
            is_gpu=gpu_memory is not None,
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,
            context_tokens=context,
            concurrency=concurrency,
            dtype=dtype,
            target_modules=None if target_modules is None else tuple(filter(None, target_modules.split(","))),
            reserve_bytes=None if reserve is None else _bytes("reserve", reserve),
            disk_bytes=None if disk is None else _bytes("disk", disk),
        ),
    )
    typer.echo(json.dumps(_as_json(made), indent=2) if as_json else _as_table(made))
    if made.left_bytes < 0:
        raise typer.Exit(1)


def _bytes(name: str, text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidRequestError(f"--{name} {text!r} is no size; write 80G, 512M or a number of bytes", param=name)
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _as_json(made: Plan) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(made) | {
        "slots_bytes": made.slots_bytes,
        "kv_bytes": made.kv_bytes,
        "left_bytes": made.left_bytes,
        "fits": made.left_bytes >= 0,
    }


def _as_table(made: Plan) -> str:
    rows = [
        ("weights", made.weights_bytes, f"from {made.weights_from}"),
        (
            "adapter slots",
            made.slots_bytes,
            f"{made.max_loras} x {_human(made.slot_bytes)} at rank {made.max_lora_rank}",
        ),
        (
            "KV cache",
            made.kv_bytes,
            f"{made.concurrency} x {made.context_tokens} tokens, {_human(made.kv_bytes_per_token)} each",
        ),
        ("reserve", made.reserve_bytes, "activations, graphs, libraries: a rule of thumb"),
        (
            "left" if made.left_bytes >= 0 else "MISSING",
            abs(made.left_bytes),
            f"of {_human(made.usable_bytes)} that an engine may take",
        ),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {_human(size):>10}  {note}" for name, size, note in rows]
    lines += ["", f"At most {made.most_slots} slots, or {made.most_requests} requests at once, with the rest as asked."]
    disk = "" if made.adapters_on_disk is None else f"; {made.adapters_on_disk:,} of them fit on the disk"
    lines.append(f"An adapter takes {_human(made.adapter_file_bytes)} in the registry{disk}.")
    lines += [f"Note: {reason}." for reason in made.reasons]
    return "\n".join([*lines, "", f"capo serve -- {' '.join(made.arguments)}"])


def _human(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
