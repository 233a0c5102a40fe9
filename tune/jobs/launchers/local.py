"""Workers as processes of this machine: warm, because each has the training stack imported before its first job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from collections.abc import Mapping, Sequence

from tune.jobs.settings import STOP_GRACE_SECONDS

logger = logging.getLogger(__name__)

_END_SECONDS = 5.0
"""For a worker to write how its job stands and to end, once the training process has."""
_RESTART_PAUSE_SECONDS = 2.0


class LocalLauncher:
    """Runs ``command`` in one process for each of ``environments`` and starts one again when it dies.

    Each is the whole environment of its worker: what vLLM adds to this process's must not reach training.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        *,
        stop_grace_seconds: float = STOP_GRACE_SECONDS,
    ) -> None:
        self._command = list(command)
        self._environments = [dict(environment) for environment in environments]
        self._stop_seconds = stop_grace_seconds + _END_SECONDS
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._processes = [self._spawn(index) for index in range(len(self._environments))]

    async def watch(self) -> None:
        """Replace workers that end by themselves. Their jobs go back to the queue by lease."""
        while True:
            await asyncio.sleep(_RESTART_PAUSE_SECONDS)
            for index, process in enumerate(self._processes):
                if (code := process.poll()) is not None:
                    logger.warning("training worker %d ended with code %d; starting another", process.pid, code)
                    try:
                        self._processes[index] = self._spawn(index)
                    except OSError as error:  # no memory or no process to be had just now
                        logger.warning("a training worker could not be started, the next try is soon: %s", error)

    async def stop(self) -> None:
        """SIGTERM (a running job goes back to the queue), then SIGKILL where that takes too long."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._stop_seconds):
                waits = (asyncio.to_thread(process.wait, self._stop_seconds) for process in self._processes)
                await asyncio.gather(*waits)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()

    def _spawn(self, index: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=self._environments[index], stdin=subprocess.DEVNULL)
