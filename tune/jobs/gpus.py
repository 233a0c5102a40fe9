"""Which GPUs a process may use, without asking a driver: that would open CUDA, and break it in every fork."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from registry.errors import InvalidRequestError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICES = "nvidia[0-9]*"


def visible_devices(devices: Path = Path("/dev")) -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them: those it names, or the numbers of all whose device file is here."""
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        # CUDA counts from 0 what a container was given, whatever the files are called.
        return tuple(
            map(str, range(sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob(_DEVICES))))
        )
    names = [name.strip() for name in chosen.split(",")]
    # CUDA takes the names up to the first one that is none.
    ends = [index for index, name in enumerate(names) if name in ("", "-1")]
    return tuple(names[: min(ends, default=len(names))])


def visible_gpus(devices: Path = Path("/dev")) -> int:
    return len(visible_devices(devices))


def divide_devices(devices: Sequence[str], *, workers: int, gpus: int | None) -> list[tuple[str, ...] | None]:
    """For each local worker the devices that are its own; ``None`` where it keeps what all see.

    ``gpus`` is what each offers; ``None`` = an equal share, where the first ones take what is left over. Workers that
    offer none share all devices, and so does everybody where no device can be seen.

    Raises:
        InvalidRequestError: there are too few for each to have its own.
    """
    if workers == 0 or not devices or gpus == 0:
        return [None] * workers
    needed = workers if gpus is None else workers * gpus
    if needed > len(devices):
        raise InvalidRequestError(
            f"{workers} local workers need {needed} GPUs, and {len(devices)} can be seen ({', '.join(devices)}): each "
            "worker has GPUs of its own; lower CAPO_WORKERS or CAPO_WORKER_GPUS, or set CAPO_WORKER_GPUS=0, with which "
            "workers share all GPUs and take no job that asks for any",
            param="worker_gpus",
        )
    counts = [
        len(devices) // workers + (index < len(devices) % workers) if gpus is None else gpus for index in range(workers)
    ]
    starts = [sum(counts[:index]) for index in range(workers)]
    return [tuple(devices[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def take_devices(gpus: int) -> None:
    """Leave this process the first ``gpus`` of its devices, before CUDA is opened; 0 = all.

    Where fewer can be seen than the job was promised (no device files, no GPU) all stay.
    """
    devices = visible_devices()
    if 0 < gpus <= len(devices):
        os.environ[VISIBLE] = ",".join(devices[:gpus])
