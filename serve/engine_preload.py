"""Imported once by the fork server, so that each engine process starts with vLLM already loaded.

Only imports: no thread may start and no device may be touched before the fork.
"""

from serve.engine_process import quiet_libraries

quiet_libraries()

import vllm.v1.engine.core  # noqa: E402
import vllm.v1.executor.uniproc_executor  # noqa: E402

import serve.vllm_plugin  # noqa: E402

__all__ = ["serve", "vllm"]
