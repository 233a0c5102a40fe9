"""Imported once by the fork server, so that each engine process starts with vLLM already loaded.

Only imports: no thread may start and no device may be touched before the fork.
"""

import vllm.v1.engine.core
import vllm.v1.executor.uniproc_executor

import serve.vllm_plugin

__all__ = ["serve", "vllm"]
