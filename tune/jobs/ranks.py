"""A job on several GPUs: one process for each, which :mod:`tune.parallel` joins to one run.

The job's process is the first one: it alone hears of stops, tells the job store and publishes. The others are its
children, forked right before the training and ended right after it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from registry import Registry
from tune.jobs.process import describe_exit, die_with_parent, name_process
from tune.jobs.training import TrainedModel, TrainFunction
from tune.progress import Observer, SilentObserver, StopRequested
from tune.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InRanks:
    """Calls ``train`` in ``size`` processes of this machine. A :class:`~tune.jobs.training.TrainFunction` itself.

    Where one of the others is lost the first one is killed: it would wait for it in the middle of a step.
    """

    train: TrainFunction
    size: int
    before_fork: Callable[[], None]
    """Closes what no fork may inherit."""
    grace_seconds: float = 10.0
    """What ends one process mostly ends the first one too, which has this long to say why before it is killed."""

    def __call__(
        self,
        recipe: Recipe,
        *,
        registry: Registry,
        work_dir: Path,
        observer: Observer,
        should_stop: Callable[[], str | None],
        job_id: str | None,
        fine_tuned_name: str | None,
        alias: str | None,
        recipe_dir: Path,
    ) -> TrainedModel:
        train = partial(
            self.train,
            recipe,
            work_dir=work_dir,
            job_id=job_id,
            fine_tuned_name=fine_tuned_name,
            alias=alias,
            recipe_dir=recipe_dir,
        )
        # Bound here and never given back: a port that is only looked up may be another's when it is used.
        listener = socket.create_server(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
        _announce(self.size, port)
        self.before_fork()

        def train_beside(rank: int, first_pid: int) -> None:
            die_with_parent(first_pid, signal.SIGKILL)
            listener.close()
            name_process(f"{rank}-{job_id}")
            os.environ |= _place(rank)
            with contextlib.suppress(StopRequested):  # the first one was asked, and told all
                train(registry=Registry(registry.root), observer=SilentObserver(), should_stop=lambda: None)

        context = multiprocessing.get_context("fork")
        others = [context.Process(target=train_beside, args=(rank, os.getpid())) for rank in range(1, self.size)]
        for other in others:
            other.start()
        os.environ |= _place(0)
        meeting_place = _open_meeting_place(listener.detach(), port, self.size)
        is_over = threading.Event()
        threading.Thread(target=_watch, args=(others, is_over, self.grace_seconds), name="ranks", daemon=True).start()
        try:
            return train(registry=registry, observer=observer, should_stop=should_stop)
        finally:
            is_over.set()
            for other in others:
                other.kill()
                other.join()
            del meeting_place


def _announce(size: int, port: int) -> None:
    """What torchrun tells its processes, for all of them alike."""
    os.environ |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store at MASTER_PORT is there, none is to be opened
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():  # of the whole job
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(threads) // size))


def _open_meeting_place(listener: int, port: int, size: int) -> object:
    """The store over which torch's processes find each other. Lives as long as what is returned; opened after the
    forks, which its thread would not survive. Until then those who come first wait in the listener's queue."""
    from torch.distributed import TCPStore  # seconds, and of no use to workers whose jobs have one process

    return TCPStore("127.0.0.1", port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener)


def _place(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _watch(others: list[BaseProcess], is_over: threading.Event, grace_seconds: float) -> None:
    waiting = {other.sentinel: other for other in others}
    while waiting:
        for sentinel in connection.wait(list(waiting)):
            assert isinstance(sentinel, int), sentinel
            code = waiting.pop(sentinel).exitcode
            if code != 0 and not is_over.wait(grace_seconds):
                logger.error("a process of the job ended with %s; ending the others", describe_exit(code or 0))
                os.kill(os.getpid(), signal.SIGKILL)
