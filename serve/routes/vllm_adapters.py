"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, with vLLM's fields and answers (vLLM 0.32,
entrypoints/serve/lora/protocol.py and entrypoints/openai/models/serving.py)."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from serve.adapter_imports import AdapterImports
from serve.routes.bodies import Body, read_body


class LoadBody(Body):
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False
    """Of mixture-of-experts models, which Capo does not serve."""


class UnloadBody(Body):
    lora_name: str
    lora_int_id: None = None
    """vLLM ignores it; here the name alone says what is meant."""


def vllm_adapters_router(imports: AdapterImports) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> PlainTextResponse:
        body = read_body(LoadBody, await request.body())
        await imports.load(body.lora_name, body.lora_path, in_place=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> PlainTextResponse:
        body = read_body(UnloadBody, await request.body())
        await imports.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
