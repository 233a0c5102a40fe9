"""Local training workers: separate processes that outlive no service and share nothing with it but the data folder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys

from capo.settings import Settings

logger = logging.getLogger(__name__)

_STOP_SECONDS = 15.0
_RESTART_PAUSE_SECONDS = 2.0


class LocalWorkers:
    """Starts ``settings.num_workers`` processes of ``capo worker`` and starts them again when one dies.

    ``environment`` is the one this process was started with: what vLLM adds to it later must not reach training.
    """

    def __init__(self, settings: Settings, environment: dict[str, str]) -> None:
        self._settings = settings
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._processes = [self._spawn() for _ in range(self._settings.num_workers)]

    async def watch(self) -> None:
        """Replace workers that end by themselves; run as a task. Their jobs go back to the queue by lease."""
        while True:
            await asyncio.sleep(_RESTART_PAUSE_SECONDS)
            for index, process in enumerate(self._processes):
                if (code := process.poll()) is not None:
                    logger.warning("training worker %d ended with code %d; starting another", process.pid, code)
                    self._processes[index] = self._spawn()

    async def stop(self) -> None:
        """SIGTERM (a running job goes back to the queue), then SIGKILL after 15 s."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.gather(*(asyncio.to_thread(process.wait, _STOP_SECONDS) for process in self._processes))
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()

    def _spawn(self) -> subprocess.Popen[bytes]:
        settings = self._settings
        command = [
            sys.executable, "-m", "capo", "worker",
            "--data-dir", str(settings.data_dir.absolute()),
            "--registry", str(settings.registry_path.absolute()),
            "--model", settings.model,
            "--log-level", settings.log_level,
            "--parent-pid", str(os.getpid()),
        ]  # fmt: skip
        if settings.worker_threads is not None:
            command += ["--threads", str(settings.worker_threads)]
        environment = dict(self._environment)
        if settings.database_url is not None:  # it may hold a password, and arguments are for all to see
            environment["CAPO_DATABASE_URL"] = settings.database_url
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
