"""Imported once by the fork server, so that each engine process starts with vLLM already loaded.

Beyond the imports nothing happens here: no thread may start and no device may be touched before the fork.
"""

from serve.engine_process import quiet_libraries
from serve.vllm_plugin import die_with_parent

quiet_libraries()
# The fork server would notice the end of the service by itself, but then spend seconds on taking vLLM apart.
die_with_parent()

import vllm.v1.engine.core  # noqa: E402
import vllm.v1.executor.uniproc_executor  # noqa: E402

import serve.vllm_plugin  # noqa: E402

__all__ = ["serve", "vllm"]
