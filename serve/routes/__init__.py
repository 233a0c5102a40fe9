"""Serving's HTTP face. Routers only: authentication, request ids and error bodies are the composed application's."""

from serve.routes.adapters import adapters_router, aliases_router
from serve.routes.inference import inference_router
from serve.routes.models import models_router
from serve.routes.vllm_adapters import vllm_adapters_router

__all__ = ["adapters_router", "aliases_router", "inference_router", "models_router", "vllm_adapters_router"]
