"""The OpenAPI document. Routes read raw bodies themselves, so what they take is said here, from what checks it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serve.body_schemas import body_schema
from serve.engine_api import Endpoint
from serve.routes.adapters import AliasBody
from serve.routes.vllm_adapters import LoadBody, UnloadBody
from tune.jobs.permissions.routes import GrantBody
from tune.jobs.requests import CreateJobBody
from tune.jobs.uploads.routes import CompleteUploadBody, CreateUploadBody
from tune.jobs.webhooks.routes import CreateEndpointBody

Schema = dict[str, Any]

_INFERENCE = {
    "/v1/chat/completions": Endpoint.CHAT,
    "/v1/completions": Endpoint.COMPLETION,
    "/v1/responses": Endpoint.RESPONSES,
    "/tokenize": Endpoint.TOKENIZE,
    "/detokenize": Endpoint.DETOKENIZE,
}
_MODELS: dict[tuple[str, str], type[BaseModel]] = {
    ("/v1/aliases/{alias}", "put"): AliasBody,
    ("/v1/load_lora_adapter", "post"): LoadBody,
    ("/v1/unload_lora_adapter", "post"): UnloadBody,
    ("/v1/fine_tuning/jobs", "post"): CreateJobBody,
    ("/v1/fine_tuning/checkpoints/{model}/permissions", "post"): GrantBody,
    ("/v1/uploads", "post"): CreateUploadBody,
    ("/v1/uploads/{upload_id}/complete", "post"): CompleteUploadBody,
    ("/v1/webhook_endpoints", "post"): CreateEndpointBody,
}
_UPLOAD: Schema = {
    "type": "object",
    "properties": {"purpose": {"const": "fine-tune"}, "file": {"type": "string", "format": "binary"}},
    "required": ["purpose", "file"],
    "additionalProperties": False,
}
_PART: Schema = {
    "type": "object",
    "properties": {"data": {"type": "string", "format": "binary"}},
    "required": ["data"],
    "additionalProperties": False,
}
_FORMS = {"/v1/files": _UPLOAD, "/v1/uploads/{upload_id}/parts": _PART}
_QUERIES: dict[str, tuple[str, ...]] = {
    "/v1/files": ("after", "limit", "order", "purpose"),
    "/v1/fine_tuning/jobs": ("after", "limit"),
    "/v1/fine_tuning/jobs/{job_id}/events": ("after", "limit"),
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": ("after", "limit"),
    "/v1/fine_tuning/checkpoints/{model}/permissions": ("after", "limit", "project_id"),
    "/v1/webhook_endpoints": ("after", "limit"),
}
_QUERY_SCHEMAS: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1},
    "order": {"enum": ["asc", "desc"]},
}
_NULLABLE_TEXT: Schema = {"type": ["string", "null"]}
_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
                "line": {"type": "integer", "description": "Of a training file."},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def add_document(app: FastAPI, engine_schema: Callable[[Endpoint], Schema] | None) -> None:
    """Serve ``/openapi.json``. It is made when it is first asked for, beside the event loop.

    ``engine_schema``: :meth:`serve.engine_api.Engine.body_schema`; ``None`` leaves the inference bodies open.
    """
    making = asyncio.Lock()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_document() -> JSONResponse:
        async with making:
            if app.openapi_schema is None:
                app.openapi_schema = await asyncio.to_thread(_document, app, engine_schema)
        return JSONResponse(app.openapi_schema)


def _document(app: FastAPI, engine_schema: Callable[[Endpoint], Schema] | None) -> Schema:
    document = get_openapi(title="Capo", version=version("capo-llm"), routes=app.routes)
    schemas: dict[str, Schema] = {"Error": _ERROR}
    paths = document["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("422", None)  # FastAPI's own form of a refusal, which is never sent
            for status in ("4XX", "5XX"):
                responses[status] = {
                    "description": "OpenAI's error object",
                    "content": _content({"$ref": "#/components/schemas/Error"}),
                }
            if method == "get":
                operation.setdefault("parameters", []).extend(map(_query, _QUERIES.get(path, ())))
    for path, endpoint in _INFERENCE.items():
        if engine_schema is not None and path in paths:
            _set_body(paths[path]["post"], body_schema(engine_schema, endpoint))
    for (path, method), model in _MODELS.items():
        if path in paths:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            _set_body(paths[path][method], schema)
    for path, form in _FORMS.items():
        if path in paths:
            _set_body(paths[path]["post"], form, media_type="multipart/form-data")
    document["components"] = {"schemas": schemas}
    return document


def _set_body(operation: Schema, schema: Schema, media_type: str = "application/json") -> None:
    operation["requestBody"] = {"required": True, "content": _content(schema, media_type)}


def _content(schema: Schema, media_type: str = "application/json") -> Schema:
    return {media_type: {"schema": schema}}


def _query(name: str) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": _QUERY_SCHEMAS.get(name, {"type": "string"})}
