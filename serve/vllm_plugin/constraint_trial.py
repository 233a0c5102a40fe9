"""The process in which a constraint on an answer is tried out before the engine sees it.

It does what the engine would do, with vLLM's own code: check, compile, and take the steps of a few made-up answers.
Started from the fork server, where vLLM is already imported. :mod:`serve.constraints` owns it and may kill it.
"""

from __future__ import annotations

import random
import resource
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from serve.vllm_plugin import die_with_parent, renew_grammar_compilers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import StructuredOutputsParams

_NUM_ANSWERS = 3
_NUM_TOKENS = 48
_MAX_EXTRA_BYTES = 2 * 1024**3


def serve_trials(
    connection: Connection, config: VllmConfig, slowest_reading_seconds: float, slowest_step_seconds: float
) -> None:
    """Answer ``(kind, specification)`` with ``(name of the error, its text)`` or ``None``, until the pipe closes."""
    # A trial at work would not look at the pipe; the fork server, which is its parent, ends with the service.
    die_with_parent()
    import torch
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    renew_grammar_compilers()
    torch.set_num_threads(1)
    tokenizer = cached_tokenizer_from_config(model_config=config.model_config)
    backend = XgrammarBackend(config, tokenizer=tokenizer, vocab_size=config.model_config.get_vocab_size())
    _bound_memory()
    connection.send("ready")
    while True:
        try:
            kind, specification = connection.recv()
        except EOFError:
            return
        try:
            parameters = read(kind, specification, slowest_reading_seconds)
            _try(backend, parameters, slowest_step_seconds)
        except Exception as error:
            connection.send((type(error).__name__, str(error)))
        else:
            connection.send(None)


def _bound_memory() -> None:
    """A constraint that wants gigabytes fails here with a MemoryError instead of taking them from the engine."""
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115, PTH123
    limit = pages * resource.getpagesize() + _MAX_EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def read(kind: str, specification: Any, slowest_seconds: float) -> StructuredOutputsParams:
    """What AsyncLLM does on its event loop for each request; it turns a choice into a grammar.

    Raises:
        TimeoutError: it would hold that loop up. Others are vLLM's own, of a constraint that it does not take.
    """
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    parameters = StructuredOutputsParams(**{kind: specification})
    began = time.process_time()  # a regex is read in a thread of its own
    validate_xgrammar_grammar(SamplingParams(structured_outputs=parameters))
    took = time.process_time() - began
    if took > slowest_seconds:
        raise TimeoutError(f"it takes {took:.2g} s to read, at each request")
    return parameters


def _try(backend: Any, parameters: StructuredOutputsParams, slowest_step_seconds: float) -> None:
    import torch
    from vllm.v1.structured_output.request import get_structured_output_key

    grammar = backend.compile_grammar(*get_structured_output_key(parameters))
    bitmask = backend.allocate_token_bitmask(1)
    for seed in range(_NUM_ANSWERS):
        choose = random.Random(seed).choice
        grammar.reset()
        for _ in range(_NUM_TOKENS):
            began = time.thread_time()
            grammar.fill_bitmask(bitmask, 0)
            allowed = torch.nonzero((bitmask[0].unsqueeze(1) >> torch.arange(32, dtype=torch.int32)).flatten() & 1)
            if not len(allowed) or not grammar.accept_tokens("trial", [choose(allowed.flatten().tolist())]):
                break
            took = time.thread_time() - began
            if took > slowest_step_seconds:
                raise TimeoutError(f"one token takes {took:.2g} s")
            if grammar.is_terminated():
                break
