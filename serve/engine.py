"""The vLLM engine behind :class:`serve.engine_api.Engine`.

With its parts (:mod:`serve.observed_llm`, :mod:`serve.engine_requests`, :mod:`serve.engine_abilities`,
:mod:`serve.engine_faults`) the only module that imports vLLM's engine and serving classes, so that a new vLLM is those
files' work. Written against vLLM 0.32; importing it costs seconds and is left to the process that serves.

vLLM's OpenAI serving classes do the wire format (chat template, tools, logprobs, streaming), so answers are vLLM's.
They find an adapter by ``models.lora_requests[request.model]``; this engine keeps that mapping to exactly the loaded
adapters, under their write-once names, and never lets vLLM resolve a name itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pydantic
import torch
from starlette.datastructures import State
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.envs import enable_envs_cache
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.gc_utils import freeze_gc_heap

from registry import errors
from serve import responses_answers
from serve.constraints import SLOWEST_TRIAL_SECONDS, constraints_of
from serve.engine_abilities import abilities_of, reads_every_answer
from serve.engine_api import Call, Endpoint, Engine, EngineAdapter, EngineLimits, Piece
from serve.engine_errors import conversation_field, engine_dead, engine_reason, error_in_stream, refused, wire_error
from serve.engine_faults import translated
from serve.engine_requests import REQUEST_TYPES, RawRequest, parse_request
from serve.model_abilities import ModelAbilities
from serve.observed_llm import ObservedLLM, count_what_was_made, current_call
from serve.unread_calls import leave_out_unread_calls
from serve.vllm_plugin import call_or_format

logger = logging.getLogger(__name__)


class VllmEngine(Engine):
    """vLLM 0.32 in its own process, with its OpenAI serving classes in ours.

    ``vllm_arguments`` is a command line of ``vllm serve`` without the model, e.g. ``["--max-loras", "8"]``.
    """

    def __init__(
        self,
        model_path: str,
        served_model_name: str,
        vllm_arguments: list[str],
        *,
        slowest_trial_seconds: float = SLOWEST_TRIAL_SECONDS,
    ) -> None:
        self._base_model = served_model_name
        self._slowest_trial_seconds = slowest_trial_seconds
        parser = make_arg_parser(FlexibleArgumentParser())
        argv = ["--model", model_path, "--served-model-name", served_model_name, *vllm_arguments]
        try:
            self._args = parser.parse_args(argv)
            validate_parsed_serve_args(self._args)
        except (SystemExit, ValueError, TypeError) as error:
            raise errors.InvalidRequestError(
                f"vLLM does not accept the arguments {vllm_arguments}: {error}. "
                "`vllm serve --help=all` lists what it takes.",
                code="invalid_engine_arguments",
            ) from error
        self._llm: ObservedLLM | None = None
        self._state = State()
        self._limits: EngineLimits | None = None
        self._abilities: ModelAbilities

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        # Building the engine blocks for seconds; a thread keeps the event loop (health checks, drains) alive.
        llm = await asyncio.to_thread(self._build)
        try:
            tasks = await llm.get_supported_tasks()
            state = State()
            await init_app_state(llm, state, self._args, tasks)
        except BaseException:
            await asyncio.to_thread(llm.shutdown, 0)
            raise
        call_or_format.use(state.online_renderer)
        leave_out_unread_calls(current_call)
        models = state.openai_serving_models
        models.lora_requests = {}
        models.model_name = _answer_model
        config = llm.vllm_config
        lora = config.lora_config
        self._limits = EngineLimits(
            max_loras=lora.max_loras if lora is not None else 0,
            max_lora_rank=lora.max_lora_rank if lora is not None else 0,
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
        )
        self._abilities = abilities_of(llm.renderer.get_tokenizer(), state, self._args.tool_call_parser)
        # Last and together: until here nobody can load into or ask a half-built engine.
        self._state, self._llm = state, llm
        # vLLM does both in its engine process only. Its variables are otherwise looked up anew for every token, a
        # tenth of this process's time at 32 streams; and what start-up allocated need not be walked by each collection.
        enable_envs_cache()
        freeze_gc_heap()

    def _build(self) -> ObservedLLM:
        config = AsyncEngineArgs.from_cli_args(self._args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        if current_platform.is_cpu() and config.lora_config is not None and self._args.lora_dtype == "auto":
            # A product of a few rows costs torch about 20 us in bfloat16 and 3 us in float32 (with AVX512_BF16):
            # bfloat16 goes through oneDNN, which pays off for large ones only. vLLM's own argument does not offer it.
            config.lora_config.lora_dtype = torch.float32
        return ObservedLLM.start(config, slowest_trial_seconds=self._slowest_trial_seconds)

    async def stop(self, timeout_seconds: float) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await llm.end(timeout_seconds)

    async def kill(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await llm.kill()

    @property
    def has_work(self) -> bool:
        return self._llm is not None and self._llm.has_work

    @property
    def last_progress_at(self) -> float:
        return self._llm.last_progress_at if self._llm is not None else 0.0

    @property
    def limits(self) -> EngineLimits:
        assert self._limits is not None, "the engine has not been started"
        return self._limits

    @property
    def is_dead(self) -> bool:
        return self._llm is None or self._llm.errored

    @property
    def parses_chat(self) -> bool:
        return self._llm is not None and reads_every_answer(self._state.openai_serving_chat.parser_cls)

    # -- adapters --------------------------------------------------------------------------------------------

    async def load_adapter(self, adapter: EngineAdapter) -> None:
        request = _lora_request(adapter)
        try:
            await self._live().add_lora(request)
        except Exception as error:
            self._raise_if_dead(error)
            # vLLM registers an adapter before it checks the shapes; without this a later request would get the
            # half-loaded weights (seen with 0.32.0).
            with contextlib.suppress(Exception):
                await self._live().remove_lora(adapter.engine_id)
            raise errors.InvalidArtifactError(
                f"The engine refused adapter {adapter.name}: {engine_reason(error)}", code="engine_refused"
            ) from error
        self._state.openai_serving_models.lora_requests[adapter.name] = request

    async def unload_adapter(self, adapter: EngineAdapter) -> None:
        requests = self._state.openai_serving_models.lora_requests
        # The same revision may already be resident again under another id; that one stays known.
        if (known := requests.get(adapter.name)) is not None and known.lora_int_id == adapter.engine_id:
            del requests[adapter.name]
        try:
            await self._live().remove_lora(adapter.engine_id)
        except Exception as error:
            self._raise_if_dead(error)
            raise errors.InternalError(f"unloading {adapter.name} failed: {error}") from error

    async def loaded_engine_ids(self) -> frozenset[int]:
        try:
            return frozenset(await self._live().list_loras())
        except Exception as error:
            self._raise_if_dead(error)
            raise errors.InternalError(f"list_loras failed: {error}") from error

    # -- inference -------------------------------------------------------------------------------------------

    async def check(self, call: Call) -> None:
        trials = self._live().trials
        self._abilities.check(call.body)
        self._check_token_ids("prompt", call.body.get("prompt"))
        await trials.check_all(constraints_of(call.body), tenant=call.tenant)

    async def complete(self, call: Call) -> bytes:
        token = current_call.set(call)
        try:
            answer = await self._create(call)
        except Exception as error:
            raise self._translate(error, call.body) from error
        finally:
            current_call.reset(token)
            count_what_was_made(call)
        if "abort" in call.finish_reasons:
            raise self._aborted()
        if call.endpoint is Endpoint.RESPONSES:
            return responses_answers.response(answer)
        return bytes(answer.model_dump_json(by_alias=True), "utf-8")

    async def stream(self, call: Call) -> AsyncGenerator[str, None]:
        # The context variable must be set in whatever task iterates: async generators run in their consumer's context.
        token = current_call.set(call)
        try:
            chunks = await self._create(call)
        except Exception as error:
            raise self._translate(error, call.body) from error
        finally:
            current_call.reset(token)
        held: list[str] = []
        try:
            while True:
                token = current_call.set(call)
                try:
                    chunk = await anext(chunks, None)
                except Exception as error:
                    raise self._translate(error, call.body) from error
                finally:
                    current_call.reset(token)
                if call.error is not None:
                    raise self._translate(call.error, call.body) from call.error
                if chunk is None:
                    return
                if isinstance(chunk, str):
                    if chunk.startswith('data: {"error"'):
                        raise error_in_stream(chunk, conversation_field(call.body))
                    # A quote inside generated text is escaped in JSON, so this text can only be the field itself.
                    if '"finish_reason":"abort"' in chunk:
                        raise self._aborted()
                    yield chunk
                    continue
                # vLLM's events of /v1/responses call an aborted answer completed.
                if "abort" in call.finish_reasons:
                    raise self._aborted()
                # The first two events say nothing; held back, they leave what fails before the first token its status.
                held.append(responses_answers.event(chunk, is_cut="length" in call.finish_reasons))
                if chunk.type not in ("response.created", "response.in_progress"):
                    for event in held:
                        yield event
                    held.clear()
        finally:
            await chunks.aclose()

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        # One engine to the end: in another, which may be there once the prompts are tokenized, the pool does not know
        # of this call's adapter. One that has ended says so.
        llm = self._live()
        try:
            prompts, parameters = await self._render(call, llm)
        except Exception as error:
            raise self._translate(error, call.body) from error
        lora = None if call.adapter is None else _lora_request(call.adapter)
        try:
            for number, prompt in enumerate(prompts):
                async with contextlib.aclosing(self._generate(llm, call, prompt, parameters, lora, number)) as pieces:
                    async for piece in pieces:
                        yield piece
        finally:
            count_what_was_made(call)

    async def _generate(
        self,
        llm: ObservedLLM,
        call: Call,
        prompt: Any,
        parameters: SamplingParams,
        lora: LoRARequest | None,
        number: int,
    ) -> AsyncGenerator[Piece, None]:
        """The answers to one prompt; their indices go on where the previous prompt's ended, as OpenAI counts."""
        first_index = number * parameters.n
        token = current_call.set(call)
        outputs = llm.generate(
            prompt,
            parameters,
            f"{call.request_id}-{number}",
            lora_request=lora,
            trace_headers=call.trace_headers or None,
        )
        current_call.reset(token)
        try:
            while True:
                token = current_call.set(call)
                try:
                    output = await anext(outputs, None)
                finally:
                    current_call.reset(token)
                if output is None:
                    return
                for completion in output.outputs:
                    if completion.finish_reason in ("abort", "error"):
                        raise self._aborted()
                    yield Piece(
                        first_index + completion.index,
                        completion.text,
                        completion.token_ids,
                        completion.finish_reason,
                        completion.stop_reason,
                    )
        except Exception as error:
            raise self._translate(error, call.body) from error
        finally:
            await outputs.aclose()

    async def _render(self, call: Call, llm: ObservedLLM) -> tuple[list[Any], SamplingParams]:
        """The prompts in the engine's form and how to sample, exactly as the serving classes make them."""
        request = self._request(call)
        if call.endpoint is Endpoint.CHAT:
            serving = self._state.openai_serving_chat
            rendered = await serving.render_chat_request(request)
            prompts = rendered if isinstance(rendered, ErrorResponse) else rendered[1]
            max_tokens = request.max_completion_tokens
            max_tokens = request.max_tokens if max_tokens is None else max_tokens
        else:
            serving = self._state.openai_serving_completion
            prompts = await serving.render_completion_request(request)
            max_tokens = request.max_tokens
        if isinstance(prompts, ErrorResponse):
            raise wire_error(prompts.error.model_dump(), conversation_field(call.body))
        longest = max(extract_prompt_len(llm.model_config, prompt) for prompt in prompts)
        max_tokens = get_max_tokens(
            self.limits.max_model_len,
            max_tokens,
            longest,
            serving.default_sampling_params,
            serving.override_max_tokens,
            truncate_prompt_tokens=request.truncate_prompt_tokens,
        )
        return prompts, request.to_sampling_params(max_tokens, serving.default_sampling_params)

    def _request(self, call: Call) -> Any:
        """The body as vLLM's request model, naming the adapter as the engine knows it; the engine is alive."""
        self._live()
        model = call.adapter.name if call.adapter is not None else self._base_model
        options = {"store": False} if call.endpoint is Endpoint.RESPONSES else {}
        return parse_request(REQUEST_TYPES[call.endpoint], {**call.body, **options, "model": model})

    def _check_token_ids(self, name: str, given: Any) -> None:
        """vLLM does not say of which field it speaks, and detokenizes what it knows of the ids."""
        prompts = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
        for token_ids in prompts:
            if isinstance(token_ids, list) and {int}.issuperset(map(type, token_ids)):
                try:
                    self._live().renderer.validate_token_ids(token_ids, parameter=name)
                except VLLMClientError as error:
                    raise refused(str(error), name, None) from error

    async def _create(self, call: Call) -> Any:
        """vLLM's response object, or its generator of server-sent events where the body asks to stream."""
        request = self._request(call)
        raw_request = RawRequest({"X-Request-Id": call.request_id, **call.trace_headers})
        state = self._state
        match call.endpoint:
            case Endpoint.CHAT:
                answer = await state.openai_serving_chat.create_chat_completion(request, raw_request)
            case Endpoint.COMPLETION:
                answer = await state.openai_serving_completion.create_completion(request, raw_request)
            case _:
                answer = await state.openai_serving_responses.create_responses(request, raw_request)
        if isinstance(answer, ErrorResponse):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                # vLLM 0.32.0 catches the cancellation when a client leaves and answers it with a 400, which would count
                # as a fault of the request.
                raise asyncio.CancelledError
            if call.error is not None:
                raise call.error
            raise wire_error(answer.error.model_dump(), conversation_field(call.body))
        return answer

    async def convert_tokens(self, endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
        self._live()
        self._abilities.check_names(body)
        serving, raw_request = self._state.serving_tokenization, RawRequest({})
        body = {**body, "model": self._base_model}
        try:
            if endpoint is Endpoint.DETOKENIZE:
                self._check_token_ids("tokens", body.get("tokens"))
                answer = await serving.create_detokenize(parse_request(DetokenizeRequest, body), raw_request)
            else:
                kind = TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest
                answer = await serving.create_tokenize(parse_request(kind, body), raw_request)
        except Exception as error:
            raise self._translate(error, body) from error
        if isinstance(answer, ErrorResponse):
            raise wire_error(answer.error.model_dump(), conversation_field(body))
        return bytes(answer.model_dump_json(exclude_none=True), "utf-8")

    def body_schema(self, endpoint: Endpoint) -> dict[str, Any]:
        return dict(pydantic.TypeAdapter(REQUEST_TYPES[endpoint]).json_schema(mode="validation"))

    async def generate_greedy(
        self, prompt_token_ids: list[int], *, max_tokens: int, adapter: EngineAdapter | None
    ) -> list[int]:
        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, output_kind=RequestOutputKind.FINAL_ONLY)
        lora = None if adapter is None else _lora_request(adapter)
        request_id = f"probe-{id(parameters):x}"
        token_ids: list[int] = []
        try:
            async for output in self._live().generate(
                TokensPrompt(prompt_token_ids=prompt_token_ids), parameters, request_id, lora_request=lora
            ):
                token_ids = list(output.outputs[0].token_ids)
        except Exception as error:
            raise self._translate(error, {}) from error
        return token_ids

    # -- errors ----------------------------------------------------------------------------------------------

    def _live(self) -> ObservedLLM:
        if self._llm is None or self._llm.errored:
            raise engine_dead()
        return self._llm

    def _raise_if_dead(self, cause: BaseException) -> None:
        if self.is_dead:
            raise engine_dead() from cause

    def _translate(self, error: BaseException, body: Mapping[str, Any]) -> errors.CapoError:
        return translated(error, engine_is_dead=self.is_dead, conversation=conversation_field(body))

    def _aborted(self) -> errors.CapoError:
        if self.is_dead:
            return engine_dead()
        return errors.UnavailableError(
            "The request was aborted before it ended.", code="aborted", retry_after_seconds=1
        )


def _answer_model(lora_request: LoRARequest | None = None) -> str:
    """vLLM asks this for the ``model`` of an answer; the caller has already chosen it."""
    call = current_call.get()
    assert call is not None, "vLLM formats an answer outside of a call"
    return call.answer_model


def _lora_request(adapter: EngineAdapter) -> LoRARequest:
    return LoRARequest(adapter.name, adapter.engine_id, str(adapter.path))


__all__ = ["VllmEngine"]
