"""A running jobs API on a real loopback port, training files, and small looks at the disk."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from openai import OpenAI
from starlette.types import ASGIApp, Receive, Scope, Send

from registry import Registry
from registry.errors import CapoError, openai_error_body, wire_kind
from registry.principal import Principal, acting_as
from tune.jobs.api import TuningApi
from tune.jobs.database import Database, sqlite_url
from tune.jobs.file_store import FileStore
from tune.jobs.files import FileService, FileStorage
from tune.jobs.records import FileRecord, Hyperparameters, JobRecord, NewJob
from tune.jobs.rows import new_id
from tune.jobs.service import JobService
from tune.jobs.settings import files_dir
from tune.jobs.store import JobStore

BASE = "capo-tiny"
TENANT = "acme"


def chat_rows(count: int, *, first: int = 0) -> bytes:
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus 1?"},
                {"role": "assistant", "content": str(number + 1)},
            ]
        }
        for number in range(first, first + count)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def text_rows(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"One more than {n} is {n + 1}."}).encode() + b"\n" for n in range(count))


def preference_rows(count: int) -> bytes:
    """OpenAI's DPO rows."""
    rows = (
        {
            "input": {"messages": [{"role": "user", "content": f"What is {number} plus 1?"}]},
            "preferred_output": [{"role": "assistant", "content": str(number + 1)}],
            "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
        }
        for number in range(count)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@dataclass(frozen=True)
class Place:
    """Everything one test's Capo has on disk, and services on top of it."""

    directory: Path
    database: Database
    store: JobStore
    file_rows: FileStore
    files: FileService
    jobs: JobService
    registry: Registry
    database_url: str
    api: TuningApi

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    @property
    def registry_dir(self) -> Path:
        return self.directory / "registry"

    def upload(self, content: bytes, filename: str = "rows.jsonl") -> FileRecord:
        with self.files.storage.receive() as upload:
            upload.write(content)
            return self.files.finish_upload(upload, filename=filename, purpose="fine-tune")

    def queue_job(self, training_file: str, **changes: Any) -> JobRecord:
        return self.store.create_job(new_job(training_file, **changes))

    def stored_files(self) -> list[str]:
        """Names of all files that lie below the files directory."""
        return sorted(path.name for path in files_dir(self.data_dir).rglob("*") if path.is_file())


@cache
def _migrated_store() -> bytes:
    """A SQLite file as the migrations leave it: they take a tenth of a second, and have tests of their own."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "jobs.db"
        Database(sqlite_url(path)).close()
        return path.read_bytes()


def open_place(
    directory: Path,
    *,
    max_file_bytes: int = 1024 * 1024,
    max_file_rows: int = 100_000,
    max_part_bytes: int = 1024 * 1024,
    max_upload_bytes: int = 4 * 1024 * 1024,
    database_url: str | None = None,
) -> Place:
    """``database_url``: of an empty database; a SQLite file of its own when not given."""
    url = database_url
    if url is None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "jobs.db").write_bytes(_migrated_store())
        url = sqlite_url(directory / "jobs.db")
    database = Database(url)
    store = JobStore(database, tenant=TENANT)
    file_rows = FileStore(database, tenant=TENANT)
    storage = FileStorage(
        files_dir(directory / "data"),
        max_file_bytes=max_file_bytes,
        max_file_rows=max_file_rows,
        max_part_bytes=max_part_bytes,
        max_upload_bytes=max_upload_bytes,
    )
    registry = Registry(directory / "registry")
    bases = {BASE: BASE, "Qwen/Qwen3-0.6B": "/bases/qwen"}
    api = TuningApi(database, storage, registry, base_models=bases, max_lora_rank=64)
    files, jobs = api.files.seen_by(TENANT), api.jobs.seen_by(TENANT)
    return Place(directory, database, store, file_rows, files, jobs, registry, url, api)


def new_job(training_file: str, **changes: Any) -> NewJob:
    values: dict[str, Any] = {
        "model": BASE,
        "training_file": training_file,
        "validation_file": None,
        "suffix": None,
        "seed": 7,
        "hyperparameters": Hyperparameters(n_epochs=1, batch_size=2, learning_rate_multiplier=1.0),
        "metadata": None,
        "extensions": {},
    }
    return NewJob(**(values | changes))


def add_file_row(file_rows: FileStore, **changes: Any) -> str:
    """A file that exists only in the store, for tests that never open it."""
    values: dict[str, Any] = {
        "id": new_id("file-"),
        "tenant": TENANT,
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "size_bytes": 1,
        "sha256": new_id("", 64),
        "rows": 20,
        "row_format": "chat",
        "created_at": 0,
    }
    record = FileRecord(**(values | changes))
    file_rows.add(record)
    return record.id


@contextmanager
def serve(place: Place, *more: APIRouter) -> Iterator[str]:
    """The API on a free loopback port, with ``more`` beside it; yields its base URL."""
    app = FastAPI()
    for router in (*place.api.routers(), *more):
        app.include_router(router)

    app.add_middleware(_AsOneTenant)

    @app.exception_handler(CapoError)
    async def answer(_request: Request, error: CapoError) -> JSONResponse:
        headers = {"x-should-retry": "false"}
        return JSONResponse(openai_error_body(error), wire_kind(error).http_status, headers)

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started, seconds=10)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class _AsOneTenant:
    """What the composed application does with keys: it says who asks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with acting_as(Principal.local(TENANT)):
            await self._app(scope, receive, send)


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=httpx.Client(trust_env=False))


def wait_until(condition: Callable[[], object], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.01)
