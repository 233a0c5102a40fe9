"""Capo's vLLM plugin (entry point ``vllm.general_plugins``): repairs that stock vLLM 0.32 needs.

vLLM calls :func:`register` in every process of an engine. It does nothing unless ``CAPO_ENGINE=1`` is in the
environment, which ``capo serve`` sets for its own engine: another vLLM in the same installation stays stock.

Repairs, each with a test that fails without it:

- CPU LoRA kernels that keep base requests free of adapters and cost less (:mod:`serve.vllm_plugin.cpu_lora`);
- freshly allocated KV blocks are zeroed, so that one adapter's NaN cannot reach later requests
  (vllm-project/vllm#50283: a CPU attention kernel reads the unused tail of a block, and 0 * NaN is NaN);
- adapters are read without safetensors' leak (:mod:`serve.vllm_plugin.adapter_file`);
- compilers of constraints do not grow for ever (:mod:`serve.vllm_plugin.grammar_compiler`);
- log probabilities on a CPU need no C++ compiler: where there is none the first request for them ends a stock engine,
  and where there is one it holds up every other stream for seconds, in the step that compiles;
- seeded requests whose prompt takes several steps do not end an engine on a CPU
  (:mod:`serve.vllm_plugin.seeded_prefills`);
- log probabilities of a prompt on a CPU are those of its own adapter, and do not end an engine that decodes for others
  (:mod:`serve.vllm_plugin.prompt_logits`);
- streams have the end of a text that might have become a call of a tool (:mod:`serve.vllm_plugin.stream_ends`);
- calls of tools in a stream are those of the whole answer, in Hermes' form (:mod:`serve.vllm_plugin.hermes_calls`);
- streams of /v1/responses have a log probability for each token (:mod:`serve.vllm_plugin.response_log_probabilities`);
- the engine process dies with its parent (:func:`die_with_parent`); stock engines outlive a killed server.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

ENABLE_VARIABLE = "CAPO_ENGINE"

_PR_SET_PDEATHSIG = 1  # prctl(2)


def register() -> None:
    """Apply the repairs to this process. Safe to call more than once, as vLLM does."""
    if os.environ.get(ENABLE_VARIABLE) != "1":
        return
    _use_capo_cpu_lora()
    _zero_new_kv_blocks()
    if multiprocessing.parent_process() is not None:
        _read_adapters_without_a_leak()
        renew_grammar_compilers()
        _rank_log_probabilities_uncompiled()
        _repair_cpu_model_runner()
        die_with_parent()
    else:
        _hand_out_ends_of_streams()
        _read_hermes_calls_by_their_keys()
        _keep_log_probabilities_of_responses()


def _use_capo_cpu_lora() -> None:
    from vllm.platforms.cpu import CpuPlatform

    # The platform names the class by its dotted path; the engine resolves it when it builds the LoRA layers.
    CpuPlatform.get_punica_wrapper = classmethod(  # type: ignore[method-assign,unused-ignore]
        lambda cls: "serve.vllm_plugin.cpu_lora.CapoPunicaWrapperCPU"
    )


def _zero_new_kv_blocks() -> None:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda self: True)


def _read_adapters_without_a_leak() -> None:
    from vllm.lora import lora_model

    from serve.vllm_plugin import adapter_file

    adapter_file.use(lora_model)


def _rank_log_probabilities_uncompiled() -> None:
    """vLLM compiles this comparison (v1/sample/ops/logprobs.py) to spare GPUs the memory of its intermediate result."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import sampler

    if current_platform.is_cpu():
        compiled = sampler.batched_count_greater_than
        sampler.batched_count_greater_than = getattr(compiled, "_torchdynamo_orig_callable", compiled)


def _repair_cpu_model_runner() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        from serve.vllm_plugin import prompt_logits, seeded_prefills

        if CPUModelRunner._sample.__module__ != seeded_prefills.__name__:
            seeded_prefills.use(CPUModelRunner)
            prompt_logits.use(CPUModelRunner)


def _hand_out_ends_of_streams() -> None:
    """Streams are read in the process that serves them."""
    from vllm.parser import ParserManager

    from serve.vllm_plugin import stream_ends

    if ParserManager.get_parser.__module__ != stream_ends.__name__:
        stream_ends.use(ParserManager)


def _read_hermes_calls_by_their_keys() -> None:
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    from serve.vllm_plugin import hermes_calls

    hermes_calls.use(Hermes2ProToolParser)


def _keep_log_probabilities_of_responses() -> None:
    from vllm.entrypoints.openai.responses import serving

    from serve.vllm_plugin import response_log_probabilities

    if serving.SimpleContext.__module__ != response_log_probabilities.__name__:
        response_log_probabilities.use(serving)


def renew_grammar_compilers() -> None:
    """Also for the process that tries constraints, which no engine is started in."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    from serve.vllm_plugin import grammar_compiler

    if XgrammarBackend.compile_grammar.__module__ != grammar_compiler.__name__:
        grammar_compiler.use(XgrammarBackend)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however the parent ends.

    The parent of an engine is Capo's fork server, and the fork server's is the service; each calls this. The kernel
    watches the thread that started the process (prctl(2)), which is the main thread in both.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = multiprocessing.parent_process()
    # The parent may have died before prctl took effect; then no signal will ever come.
    if parent is not None and os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
