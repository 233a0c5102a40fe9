"""Memory of a running service: proportional set size, so that pages shared by its processes count once."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil

_INTERVAL_SECONDS = 0.5


class MemoryWatch:
    """Samples a service's process tree in a thread and keeps the peaks, in bytes.

    The service is the process and everything below it but the training workers; a worker is ``capo worker`` with its
    children.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self.service_peak = 0
        self.worker_peak = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> tuple[int, int]:
        """PSS of the service and of its training workers at this moment."""
        worker_pids: set[int] = set()
        service = worker = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            # Parents come before their children, so a worker's children are known when they are met.
            for process in [self._process, *self._process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if process.ppid() in worker_pids or "worker" in process.cmdline()[2:5]:
                        worker_pids.add(process.pid)
                        worker += process.memory_full_info().pss
                    else:
                        service += process.memory_full_info().pss
        return service, worker

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            service, worker = self.sample()
            self.service_peak = max(self.service_peak, service)
            self.worker_peak = max(self.worker_peak, worker)
