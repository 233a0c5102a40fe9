"""vLLM's client of its engine process, with what Capo adds: it observes every call, tries constraints, ends honestly.

A part of :mod:`serve.engine`; nothing else imports it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncGenerator, Iterator
from contextvars import ContextVar
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState
from vllm.v1.metrics.loggers import PrometheusStatLogger

from registry import errors
from serve import prompt_logprobs
from serve.constraints import SLOWEST_READING_SECONDS, SLOWEST_STEP_SECONDS, ConstraintTrials
from serve.engine_api import Call
from serve.lora_info import LORA_REQUESTS_INFO
from serve.vllm_plugin.constraint_trial import serve_trials

current_call: ContextVar[Call | None] = ContextVar("capo_current_call", default=None)
"""What the serving classes work on; set around each of their calls."""


class ObservedLLM(AsyncLLM):
    """AsyncLLM that writes down what happens to each call.

    Every serving class goes through :meth:`generate`, so this is the one place that sees tokens, times, aborts and
    the real exception before a wire format turns it into text.
    """

    trials: ConstraintTrials
    _adapters_changed_at = 0.0

    @classmethod
    def start(cls, config: VllmConfig, *, slowest_trial_seconds: float) -> ObservedLLM:
        """With its engine process; blocks for seconds."""
        _use_fork_server()
        llm = cls.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=[_StatLogger])
        assert isinstance(llm, ObservedLLM)
        llm.trials = ConstraintTrials(partial(_start_trials, config), slowest_trial_seconds)
        return llm

    async def end(self, timeout_seconds: float) -> None:
        """Shut the engine process down; whoever waits for it is told that it is dead."""
        self.trials.close()
        await asyncio.to_thread(self.shutdown, timeout_seconds)
        # AsyncLLM.shutdown cancels the task that would tell waiters of the end, and nobody ever fails a pending
        # add_lora or remove_lora (0.32.0): without this, whoever waits then waits for ever.
        dead = EngineDeadError()
        for future in list(self.engine_core.utility_results.values()):
            if not future.done():
                future.set_exception(dead)
        self.output_processor.propagate_error(dead)

    async def kill(self) -> None:
        """The same for an engine process that may no longer listen."""
        processes = self.engine_core.resources.engine_manager.processes
        for process in processes:
            process.kill()
        await asyncio.to_thread(lambda: [process.join(5) for process in processes])
        await self.end(0)

    @property
    def has_work(self) -> bool:
        return self.output_processor.has_unfinished_requests() or bool(self.engine_core.utility_results)

    @property
    def last_progress_at(self) -> float:
        """On the monotonic clock; 0 before the first."""
        loggers = self.logger_manager.stat_loggers if self.logger_manager is not None else ()
        steps = (logger.last_step_at for logger in loggers if isinstance(logger, _StatLogger))
        return max((self._adapters_changed_at, *steps))

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        try:
            is_new: bool = await super().add_lora(lora_request)
        finally:
            self._adapters_changed_at = time.monotonic()  # a refusal is an answer, too
        return is_new

    async def remove_lora(self, lora_id: int) -> bool:
        try:
            was_there: bool = await super().remove_lora(lora_id)
        finally:
            self._adapters_changed_at = time.monotonic()
        return was_there

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        call = current_call.get()
        if call is None:
            async for output in super().generate(prompt, sampling_params, request_id, **options):
                yield output
            return
        try:
            call.given_prompt_tokens += extract_prompt_len(self.model_config, prompt)
            prompt_logprobs.check(call.body, call.given_prompt_tokens)
            await self.trials.check_all(_constraints(sampling_params.structured_outputs), tenant=call.tenant)
        except Exception as error:
            call.error = error
            raise
        outputs = super().generate(prompt, sampling_params, request_id, **options)
        prompt_counted = False
        try:
            async for output in outputs:
                if not prompt_counted and output.prompt_token_ids is not None:
                    call.prompt_tokens += len(output.prompt_token_ids)
                    prompt_counted = True
                _observe(call, output)
                if _had_no_choice(output, sampling_params):
                    raise errors.InvalidRequestError(
                        "No token satisfies all that is asked of the answer, such as its format, allowed_token_ids, "
                        "bad_words and min_tokens. Leave one of them out.",
                        code="contradictory_constraints",
                    )
                yield output
        except Exception as error:
            call.error = error
            raise
        finally:
            await outputs.aclose()

    async def add_request(self, *args: Any, **options: Any) -> RequestOutputCollector:
        # Not in _add_request: of several answers to a prompt each is a request, and 0.32.0 adds them without it.
        queue = await super().add_request(*args, **options)
        if (call := current_call.get()) is not None:
            call.was_in_engine = True
            call.engine_records += self._records(queue.request_id)
        return queue

    def _records(self, request_id: str) -> list[RequestState]:
        """What the output processor keeps of each answer, during and after its making."""
        parent = self.output_processor.parent_requests.get(request_id)
        records = self.output_processor.request_states
        return [records[each] for each in (parent.child_requests if parent else [request_id]) if each in records]

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **options: Any) -> None:
        try:
            await super()._add_request(request, *args, **options)
        except BaseException:
            # 0.32.0 keeps a request for ever that could not be sent to the engine; it would count as a standstill.
            await self.abort(request.request_id, internal=True)
            raise


def _constraints(given: StructuredOutputsParams | None) -> Iterator[tuple[str, str, Any]]:
    """The constraint that binds an answer, as :class:`serve.constraints.ConstraintTrials` takes it. What was given as
    one has passed before (:mod:`serve.engine`), so what is refused now has been made of tools."""
    for kind in ("json", "json_object", "regex", "choice", "grammar", "structural_tag"):
        if given is not None and getattr(given, kind) is not None:
            yield "tools", kind, getattr(given, kind)


def _had_no_choice(output: RequestOutput, asked: SamplingParams) -> bool:
    """Whether one of the answers came where no token was left to it. vLLM then takes a forbidden one, the first of the
    vocabulary. The scheduler ends a request whose grammar rejects it; without a grammar it goes on."""
    if asked.structured_outputs is not None and any(each.finish_reason == "error" for each in output.outputs):
        return True
    # Nothing else that a request may ask for forbids a whole vocabulary.
    allowed = asked.allowed_token_ids
    return allowed is not None and not all(set(allowed).issuperset(each.token_ids) for each in output.outputs)


def _observe(call: Call, output: RequestOutput) -> None:
    """Account one engine output. FINAL_ONLY requests come here once, streams once per step: several answers to a prompt
    come in one output or in one each, as fast as they are taken."""
    call.finish_reasons += [each.finish_reason for each in output.outputs if each.finish_reason is not None]
    grown = [completion for completion in output.outputs if completion.token_ids]
    if not grown:
        return
    _note_beginning(call, output.metrics)
    for completion in grown:
        call.note_tokens((output.request_id, completion.index), len(completion.token_ids))


def _note_beginning(call: Call, stats: Any) -> None:
    if call.first_token_at is not None:
        return
    now = time.monotonic()
    # A request that answers in one piece learns its first token's time from the engine's own clock, which is
    # CLOCK_MONOTONIC like ours (vllm/v1/metrics/stats.py, RequestStateStats).
    engine_first = getattr(stats, "first_token_ts", 0.0)
    call.first_token_at = engine_first if 0.0 < engine_first <= now else now
    queued, scheduled = getattr(stats, "queued_ts", 0.0), getattr(stats, "scheduled_ts", 0.0)
    if queued > 0.0 and scheduled > 0.0:
        call.queued_seconds = scheduled - queued


def count_what_was_made(call: Call) -> None:
    """Account what no output has shown, at the end of a call. vLLM hands out an answer in one piece at its end, and
    nothing of one that is cut off before; the work was done all the same."""
    begun = [record for record in call.engine_records if not record.is_prefilling]
    prompts = {id(record.parent_req or record): record.prompt_len for record in begun}  # n answers share one
    call.prompt_tokens = max(call.prompt_tokens, sum(prompts.values()))
    call.completion_tokens = max(
        call.completion_tokens, sum(record.detokenizer.num_output_tokens() for record in begun)
    )
    for record in begun[:1]:
        _note_beginning(call, record.stats)
    call.engine_records.clear()


def _gauge(name: str, *args: Any, **kwargs: Any) -> Gauge:
    """vLLM's gauges, with its ``lora_requests_info`` left out of the metrics page: serve/lora_info.py has that name."""
    if name == LORA_REQUESTS_INFO:
        kwargs["registry"] = None
    return Gauge(name, *args, **kwargs)


class _StatLogger(PrometheusStatLogger):
    """vLLM's own Prometheus metrics without its ``lora_requests_info``.

    That gauge joins the names of all running adapters into one label value: a new series for every combination,
    none ever removed.
    """

    _gauge_cls = staticmethod(_gauge)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gauge_lora_info = None
        self.last_step_at = 0.0

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Called on the event loop for every step's outputs; the heartbeat of the engine."""
        self.last_step_at = time.monotonic()
        super().record(*args, **kwargs)


def _start_trials(config: VllmConfig) -> tuple[BaseProcess, Connection]:
    """The process of :mod:`serve.constraints`, from the fork server, where vLLM is already imported."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve_trials,
        args=(theirs, config, SLOWEST_READING_SECONDS, SLOWEST_STEP_SECONDS),
        name="constraint-trials",
        daemon=True,
    )
    process.start()
    theirs.close()  # so that our end notices when the process is gone
    return process, ours


def _use_fork_server() -> None:
    """Have vLLM start its engine process from our preloaded fork server: 2 s instead of 14 s, at every restart.

    vLLM offers fork and spawn; on the CPU its platform code even resets the environment variable to spawn, so the
    function that picks the context is replaced where the engine's process manager looks it up.
    """
    import vllm.v1.engine.utils as engine_utils

    engine_utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")
