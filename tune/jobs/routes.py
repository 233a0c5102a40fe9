"""The HTTP face of files and fine-tuning jobs: OpenAI's paths, objects and limits.

Handlers raise :class:`~registry.errors.CapoError`; the application that mounts these routers turns it into
the wire form, and it says who asks (:mod:`registry.principal`). Everything that blocks runs in a thread of
:mod:`tune.jobs.threads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from registry.errors import InvalidRequestError
from registry.principal import current_principal
from registry.threads import Threads
from tune.jobs import wire
from tune.jobs.check_file import IN_PLACE_BYTES
from tune.jobs.checks import reinforcement_not_offered
from tune.jobs.file_response import OpenFileResponse
from tune.jobs.files import FileService
from tune.jobs.query import idempotency_of, limit_of, order_of, read_body, read_query
from tune.jobs.requests import CreateJobBody, parse_body
from tune.jobs.service import JobService
from tune.jobs.threads import JobThreads
from tune.jobs.upload import receive_form

_UPLOAD_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_SHORTEST_EXPIRY, _LONGEST_EXPIRY = 3600, 2_592_000
"""An hour to thirty days (openai/types/file_create_params.py)."""
CHECKPOINT_LIST_DEFAULT = 10
"""OpenAI's (API reference, "List fine-tuning checkpoints")."""
FILE_LIST_LIMIT = 10_000
"""Limit and default of GET /v1/files (openai/types/file_list_params.py)."""


def files_router(service: FileService, threads: JobThreads) -> APIRouter:
    """POST and GET /v1/files, GET and DELETE /v1/files/{id}, GET /v1/files/{id}/content."""
    router = APIRouter(prefix="/v1/files", tags=["files"])

    def own() -> FileService:
        return service.seen_by(current_principal().tenant)

    @router.post("")
    async def create_file(request: Request) -> JSONResponse:
        with service.storage.receive() as upload:
            form = await receive_form(
                request, upload, fields=_UPLOAD_FIELDS, max_file_bytes=service.storage.max_file_bytes
            )
            if "purpose" not in form.fields:
                raise InvalidRequestError(
                    "the form has no field 'purpose'; the one purpose of an upload is 'fine-tune'",
                    code="missing_field",
                    param="purpose",
                )
            finish = partial(
                own().finish_upload,
                upload,
                filename=form.filename or "",
                purpose=form.fields["purpose"],
                expires_after_seconds=_expires_after(form.fields),
                idempotency_key=request.headers.get("idempotency-key"),
            )
            is_large = upload.size_bytes > IN_PLACE_BYTES
            record = await (threads.checks if is_large else threads.store).run(finish)
        return JSONResponse(wire.file_object(record))

    @router.get("")
    async def list_files(request: Request) -> JSONResponse:
        query = read_query(request, ("after", "limit", "order", "purpose"))
        page = await threads.store.run(
            partial(
                own().files,
                after=query.get("after"),
                limit=limit_of(query, default=FILE_LIST_LIMIT, largest=FILE_LIST_LIMIT),
                order=order_of(query),
                purpose=query.get("purpose"),
            )
        )
        return JSONResponse(wire.list_object(page, wire.file_object))

    @router.get("/{file_id}")
    async def retrieve_file(file_id: str) -> JSONResponse:
        return JSONResponse(wire.file_object(await threads.store.run(own().file, file_id)))

    @router.get("/{file_id}/content")
    async def retrieve_content(file_id: str) -> OpenFileResponse:
        file = await threads.store.run(own().open_content, file_id)
        return OpenFileResponse(file, media_type="application/octet-stream")

    @router.delete("/{file_id}")
    async def delete_file(file_id: str) -> JSONResponse:
        await threads.store.run(own().delete, file_id)
        return JSONResponse(wire.deleted_file_object(file_id))

    return router


def fine_tuning_router(service: JobService, threads: Threads) -> APIRouter:
    """POST and GET /v1/fine_tuning/jobs, GET one, POST its cancel, pause and resume, GET its events and checkpoints."""
    router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

    def own() -> JobService:
        return service.seen_by(current_principal().tenant)

    @router.post("")
    async def create_job(request: Request) -> JSONResponse:
        raw = await read_body(request)
        asked = idempotency_of(request, raw, making="fine_tuning.job")
        body = parse_body(raw, CreateJobBody)
        return JSONResponse(wire.job_object(await threads.run(own().create, body, asked)))

    @router.get("")
    async def list_jobs(request: Request) -> JSONResponse:
        query, metadata = _split_metadata(request)
        page = await threads.run(
            partial(
                own().jobs,
                after=query.get("after"),
                limit=limit_of(query),
                metadata=metadata,
                without_metadata=query.get("metadata") == "null",
            )
        )
        return JSONResponse(wire.list_object(page, wire.job_object))

    @router.get("/{job_id}")
    async def retrieve_job(job_id: str) -> JSONResponse:
        return JSONResponse(wire.job_object(await threads.run(own().job, job_id)))

    @router.post("/{job_id}/cancel")
    async def cancel_job(job_id: str) -> JSONResponse:
        return JSONResponse(wire.job_object(await threads.run(own().cancel, job_id)))

    @router.post("/{job_id}/pause")
    async def pause_job(job_id: str) -> JSONResponse:
        return JSONResponse(wire.job_object(await threads.run(own().pause, job_id)))

    @router.post("/{job_id}/resume")
    async def resume_job(job_id: str) -> JSONResponse:
        return JSONResponse(wire.job_object(await threads.run(own().resume, job_id)))

    @router.get("/{job_id}/checkpoints")
    async def list_checkpoints(request: Request, job_id: str) -> JSONResponse:
        query = read_query(request, ("after", "limit"))
        limit = limit_of(query, default=CHECKPOINT_LIST_DEFAULT)
        page = await threads.run(partial(own().checkpoints, job_id, after=query.get("after"), limit=limit))
        return JSONResponse(wire.list_object(page, wire.checkpoint_object))

    @router.get("/{job_id}/events")
    async def list_events(request: Request, job_id: str) -> JSONResponse:
        query = read_query(request, ("after", "limit"))
        limit = limit_of(query)
        events = partial(own().events, job_id, after=query.get("after"), limit=limit)
        page = await threads.run(events)
        return JSONResponse(wire.list_object(page, wire.event_object))

    return router


def graders_router() -> APIRouter:
    """POST /v1/fine_tuning/alpha/graders/run and validate: refused, in the words in which a reinforcement job is."""
    router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["fine-tuning"])

    @router.post("/run")
    @router.post("/validate")
    async def refuse() -> JSONResponse:
        raise reinforcement_not_offered("grader")

    return router


def _expires_after(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequestError(
            f"expires_after[anchor] must be 'created_at', got {anchor!r:.60}", param="expires_after[anchor]"
        )
    text = seconds or ""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not _SHORTEST_EXPIRY <= number <= _LONGEST_EXPIRY:
        raise InvalidRequestError(
            f"expires_after[seconds] must be an integer from {_SHORTEST_EXPIRY} to {_LONGEST_EXPIRY}, "
            f"got {seconds!r:.60}",
            param="expires_after[seconds]",
        )
    return number


def _split_metadata(request: Request) -> tuple[dict[str, str], dict[str, str]]:
    """``metadata[key]=value`` pairs apart from the rest (openai/types/fine_tuning/job_list_params.py)."""
    names = [name for name, _ in request.query_params.multi_items()]
    bracketed = [name for name in names if name.startswith("metadata[") and name.endswith("]")]
    query = read_query(request, ("after", "limit", "metadata", *dict.fromkeys(bracketed)))
    metadata = {name.removeprefix("metadata[")[:-1]: query.pop(name) for name in bracketed}
    if "metadata" in query and (query["metadata"] != "null" or metadata):
        raise InvalidRequestError(
            "filter with metadata[key]=value, or with metadata=null for jobs without any; not with both",
            param="metadata",
        )
    return query, metadata
