"""The HTTP face of uploads: OpenAI's paths and objects."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from registry.principal import current_principal
from tune.jobs import wire
from tune.jobs.query import idempotency_of, read_body
from tune.jobs.records import FileRecord
from tune.jobs.requests import Body, parse_body
from tune.jobs.threads import JobThreads
from tune.jobs.upload import receive_form
from tune.jobs.uploads.records import PartRecord, UploadRecord
from tune.jobs.uploads.service import UploadService


class ExpiresAfterBody(Body):
    """An hour to thirty days (openai/types/upload_create_params.py)."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class CreateUploadBody(Body):
    bytes: Annotated[int, Field(ge=1)]
    filename: str
    mime_type: str
    purpose: str
    expires_after: ExpiresAfterBody | None = None


class CompleteUploadBody(Body):
    part_ids: Annotated[list[str], Field(min_length=1)]
    md5: str | None = None


def uploads_router(service: UploadService, threads: JobThreads) -> APIRouter:
    """POST /v1/uploads, and of one: POST its parts, complete and cancel."""
    router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

    def own() -> UploadService:
        return service.seen_by(current_principal().tenant)

    @router.post("")
    async def create_upload(request: Request) -> JSONResponse:
        raw = await read_body(request)
        asked = idempotency_of(request, raw, making="upload")
        body = parse_body(raw, CreateUploadBody)
        create = partial(
            own().create,
            filename=body.filename,
            purpose=body.purpose,
            mime_type=body.mime_type,
            size_bytes=body.bytes,
            file_expires_after_seconds=None if body.expires_after is None else body.expires_after.seconds,
            asked=asked,
        )
        return JSONResponse(_upload_object(await threads.store.run(create)))

    @router.post("/{upload_id}/parts")
    async def add_part(request: Request, upload_id: str) -> JSONResponse:
        uploads = own()
        with await threads.store.run(uploads.begin_part, upload_id) as part:
            limit = uploads.storage.max_part_bytes
            await receive_form(request, part, fields=(), max_file_bytes=limit, file_field="data")
            key = request.headers.get("idempotency-key")
            made = await threads.store.run(partial(uploads.finish_part, upload_id, part, idempotency_key=key))
        return JSONResponse(_part_object(made))

    @router.post("/{upload_id}/complete")
    async def complete_upload(request: Request, upload_id: str) -> JSONResponse:
        body = parse_body(await read_body(request), CompleteUploadBody)
        record, file = await threads.checks.run(own().complete, upload_id, body.part_ids, body.md5)
        return JSONResponse(_upload_object(record, file))

    @router.post("/{upload_id}/cancel")
    async def cancel_upload(upload_id: str) -> JSONResponse:
        return JSONResponse(_upload_object(await threads.store.run(own().cancel, upload_id)))

    return router


def _upload_object(upload: UploadRecord, file: FileRecord | None = None) -> dict[str, Any]:
    """openai/types/upload.py."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.size_bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": None if file is None else wire.file_object(file),
    }


def _part_object(part: PartRecord) -> dict[str, Any]:
    """openai/types/uploads/upload_part.py."""
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": part.created_at,
        "upload_id": part.upload_id,
    }
