"""The environment of the engine process, and the fork server that it starts from.

Call :func:`prepare` first thing in a serving process: it sets what vLLM reads from the environment, and starts a
fork server that imports the engine while this process still imports its own half. An engine then starts in about
2 s instead of 14 s, and so does every restart.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import os
import warnings

from serve.request_policy import MAX_BAD_WORDS, MAX_BAD_WORDS_BYTES
from serve.vllm_plugin import ENABLE_VARIABLE

_PRELOAD = "serve.engine_preload"


def prepare(*, engine_threads: int | None, use_gpu: bool) -> None:
    """Set the engine's environment and start the fork server. Must run before vllm or torch is imported.

    ``engine_threads``: threads of the CPU engine; ``None`` leaves the choice to us: one core less than there are.
    With all cores taken the engine's OpenMP threads and the event loop starve each other (784 against 8,000 tokens/s
    measured on 2 cores).
    """
    environment = {
        ENABLE_VARIABLE: "1",
        # We count nothing towards vLLM's usage statistics: a server must not call home by itself.
        "VLLM_NO_USAGE_STATS": "1",
        # Only our plugin: another package's must not change the engine unless the operator names it.
        "VLLM_PLUGINS": ",".join(filter(None, ("capo", os.environ.get("VLLM_PLUGINS")))),
        # vLLM warns at length about a CPU being no GPU; errors stay.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        # Where our own log goes. On standard output a reader that stops after our first lines would stop the service.
        "VLLM_LOGGING_STREAM": os.environ.get("VLLM_LOGGING_STREAM", "ext://sys.stderr"),
        # Compiled constraints: with vLLM's own 512 MB clients that send many schemas grow an engine by that much.
        "VLLM_XGRAMMAR_CACHE_MB": os.environ.get("VLLM_XGRAMMAR_CACHE_MB", "128"),
        # vLLM bans each word in two forms, with a space before it too, and a token has at least one byte. An engine on
        # a GPU would end at the first request beyond the second of these.
        "VLLM_MAX_NUM_BAD_WORDS": str(2 * MAX_BAD_WORDS),
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": str(2 * (MAX_BAD_WORDS + MAX_BAD_WORDS_BYTES)),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    if not use_gpu:
        threads = engine_threads if engine_threads is not None else max(1, (os.cpu_count() or 2) - 1)
        environment |= {
            # The engine core runs the model itself instead of in a third process: one hop less per token.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
    os.environ.update(environment)
    quiet_libraries()
    multiprocessing.set_forkserver_preload([_PRELOAD])
    multiprocessing.forkserver.ensure_running()


def quiet_libraries() -> None:
    """Silence what libraries say at import about hardware that is not there; called in both processes."""
    for name in ("torchao", "torch.utils._pytree", "torch._library.triton"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
