"""A jobs service without an engine, as a process that may be killed: API, local launcher, workers with a stand-in for
training. ``python -m tests.soak.job_service serve DIRECTORY PORT WORKERS`` and ``… work DIRECTORY PARENT_PID``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import uvicorn

from capo.app import build_app
from registry import BaseModelIdentity, LoraShape, ManifestDraft, Registry
from registry.principal import Principal
from serve.access import OneTenant
from tests.ports import free_port
from tests.tune.jobs.standins import Trained, step_metrics
from tests.tune.jobs.support import BASE, TENANT
from tune.jobs.api import TuningApi
from tune.jobs.database import Database, sqlite_url
from tune.jobs.files import FileStorage
from tune.jobs.launchers.local import LocalLauncher
from tune.jobs.settings import WorkerSettings, files_dir
from tune.jobs.worker import run_worker
from tune.progress import Observer, StopRequested
from tune.recipe import Recipe

STEPS = 40
STEP_SECONDS = 0.02
MAX_FILE_BYTES = 64 * 1024 * 1024


def final_state(steps: int = STEPS) -> str:
    """What a run of so many steps ends with, however often it was killed."""
    state = b""
    for step in range(1, steps + 1):
        state = _next(state, step)
    return state.hex()


def _next(state: bytes, step: int) -> bytes:
    return hashlib.sha256(state + str(step).encode()).digest()


def chains(
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
) -> Trained:
    """Each step's state follows from the last one's; checkpoints as real training makes them, replaced in one piece."""
    checkpoint = work_dir / "state"

    def save() -> None:
        fresh = checkpoint.with_suffix(".new")
        fresh.write_text(f"{step} {state.hex()}")
        fresh.replace(checkpoint)

    step, state = 0, b""
    if checkpoint.exists():
        number, _, digits = checkpoint.read_text().partition(" ")
        step, state = int(number), bytes.fromhex(digits)
    while step < STEPS:
        if (reason := should_stop()) is not None:
            save()
            raise StopRequested(reason)
        time.sleep(STEP_SECONDS)
        step += 1
        state = _next(state, step)
        observer.on_step(step_metrics(step, total=STEPS))
        if recipe.checkpoint_every_steps is not None and step % recipe.checkpoint_every_steps == 0:
            save()
    export = work_dir / "export"
    export.mkdir(exist_ok=True)
    (export / "state.txt").write_text(state.hex())
    draft = ManifestDraft(
        kind="lora",
        name=recipe.name,
        base_model=BaseModelIdentity(id=recipe.base_model),
        lora=LoraShape(rank=8, alpha=16.0, target_modules=["q_proj"]),
        dtype="float32",
        job_id=job_id,
    )
    return Trained(registry.publish(export, draft, alias=alias, fine_tuned_name=fine_tuned_name), 0)


@dataclass(frozen=True)
class JobService:
    process: subprocess.Popen[bytes]
    url: str
    directory: Path

    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []

    def resident_bytes(self) -> int:
        """Of the service and all its children, those that check files among them; pages they share count once."""
        service = psutil.Process(self.process.pid)
        total = 0
        for process in (service, *service.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(process.memory_full_info().pss)
        return total

    @property
    def registry(self) -> Registry:
        return Registry(self.directory / "registry")

    @property
    def database_url(self) -> str:
        return sqlite_url(self.directory / "jobs.db")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


def start(directory: Path, *, workers: int, port: int = 0) -> JobService:
    """Returns once it answers; :func:`stop` or a signal ends it."""
    if port == 0:
        port = free_port()
    command = [sys.executable, "-m", "tests.soak.job_service", "serve", str(directory), str(port), str(workers)]
    with (directory / "service.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return JobService(process, f"http://127.0.0.1:{port}", directory)
        assert process.poll() is None, (directory / "service.log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop(service: JobService) -> None:
    """SIGTERM, and SIGKILL for whatever is left after ten seconds."""
    family = [psutil.Process(service.process.pid), *service.workers()] if service.process.poll() is None else []
    service.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        service.process.wait(10)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    service.process.wait()


@contextlib.contextmanager
def running(directory: Path, *, workers: int) -> Iterator[JobService]:
    service = start(directory, workers=workers)
    try:
        yield service
    finally:
        stop(service)


async def _serve(directory: Path, port: int, workers: int) -> None:
    database = Database(sqlite_url(directory / "jobs.db"))
    storage = FileStorage(files_dir(directory / "data"), max_file_bytes=MAX_FILE_BYTES)
    api = TuningApi(database, storage, Registry(directory / "registry"), base_models={BASE: BASE})
    api.sweep()
    app = build_app(api.routers(), lambda: None, access=OneTenant(Principal.local(TENANT)))
    command = [sys.executable, "-m", "tests.soak.job_service", "work", str(directory), str(os.getpid())]
    launcher = LocalLauncher(command, [os.environ] * workers)
    launcher.start()
    watcher = asyncio.create_task(launcher.watch())
    tasks = asyncio.create_task(api.run())
    config = uvicorn.Config(app, port=port, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    await uvicorn.Server(config).serve()
    for task in (watcher, tasks):
        task.cancel()
    await launcher.stop()
    database.close()


def _work(directory: Path, parent_pid: int) -> None:
    settings = WorkerSettings(
        database_url=sqlite_url(directory / "jobs.db"),
        data_dir=directory / "data",
        registry_dir=directory / "registry",
        base_models={BASE: BASE},
        organization=TENANT,
        parent_pid=parent_pid,
        lease_seconds=5.0,
        heartbeat_seconds=0.5,
        poll_seconds=0.02,
        max_attempts=20,
        retry_delay_seconds=0.05,
    )
    run_worker(settings, chains)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1] == "serve":
        asyncio.run(_serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
    else:
        _work(Path(sys.argv[2]), int(sys.argv[3]))
