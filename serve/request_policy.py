"""Which fields a client may send to an inference endpoint, and how large they may be.

vLLM's request models accept and ignore unknown fields, and some known ones reach into the engine. Here every field is
either allowed, or refused with its reason; nothing is ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from registry import errors
from serve.engine_api import Endpoint

# OpenAI's own fields (openai 3.52, types/chat/completion_create_params.py and types/completion_create_params.py)
# as far as vLLM 0.32 honours them, and vLLM's sampling fields, which people who come from vLLM send.
_SHARED = {
    "model", "stream", "stream_options", "max_tokens", "n", "seed", "stop", "temperature", "top_p",
    "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "user",
    "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words",
    "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids",
    "response_format", "structured_outputs", "add_special_tokens", "return_token_ids", "prompt_logprobs",
    "truncate_prompt_tokens",
}  # fmt: skip
ALLOWED: Mapping[Endpoint, frozenset[str]] = {
    Endpoint.CHAT: frozenset(_SHARED)
    | {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
        "reasoning_effort", "echo", "add_generation_prompt", "continue_final_message",
    },
    Endpoint.COMPLETION: frozenset(_SHARED) | {"prompt", "echo", "suffix"},
}  # fmt: skip

REFUSED: Mapping[str, str] = {
    "priority": "scheduling is the server's decision",
    "cache_salt": "the server chooses cache isolation",
    "kv_transfer_params": "it reaches into the engine",
    "prompt_embeds": "tensors are not taken from clients",
    "chat_template": "the model's own template is used",
    "chat_template_kwargs": "the model's own template is used with its defaults",
    "documents": "put documents into the messages",
    "use_beam_search": "beam search is not offered",
    "best_of": "it is not offered; use n",
    "functions": "OpenAI replaced it; use tools",
    "function_call": "OpenAI replaced it; use tool_choice",
    "modalities": "only text is offered",
    "audio": "only text is offered",
    "prediction": "predicted outputs are not offered",
    "web_search_options": "web search is not offered",
    "vllm_xargs": "it reaches into the engine",
    "request_id": "send the X-Request-Id header instead",
    "session_id": "it reaches into the engine",
    "mm_processor_kwargs": "only text is offered",
    "media_io_kwargs": "only text is offered",
    "logits_processors": "code is not taken from clients",
}

# OpenAI fields that ask for nothing when they have these values; many clients send them by default.
_HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "store": (False, None),
    "metadata": (None,),
    "service_tier": (None, "auto", "default"),
}

# Bounds on what one request may ask for; OpenAI's own where it has one.
MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_PROMPTS = 32
MAX_TOOLS = 128
MAX_LOGIT_BIAS = 300


def parse_body(raw: bytes, endpoint: Endpoint) -> dict[str, Any]:
    """The request body as a dict whose fields are all allowed and within bounds.

    Raises:
        InvalidRequestError: the body is no JSON object, or :func:`check_body` refuses it.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequestError(
            f"The body is not valid JSON: {error}. Send one JSON object.", code="invalid_json"
        ) from error
    if not isinstance(body, dict):
        raise errors.InvalidRequestError(
            f"The body is a JSON {type(body).__name__}; send one JSON object.", code="invalid_json"
        )
    return check_body(body, endpoint)


def check_body(body: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """``body`` without the fields that ask for nothing; both faces come through here.

    Raises:
        InvalidRequestError: a field is missing, unknown, refused or out of bounds.
    """
    for name, value in list(body.items()):
        if name in ALLOWED[endpoint]:
            continue
        if name in _HARMLESS_VALUES and value in _HARMLESS_VALUES[name]:
            del body[name]
            continue
        raise _refusal(name, endpoint)
    _check_model(body)
    if not isinstance(body.get("stream"), bool | None):
        raise errors.InvalidRequestError(
            f"stream must be true or false, got {json.dumps(body['stream'])[:100]}.", param="stream"
        )
    _check_bounds(body)
    if body.get("stream_options") is not None and not body.get("stream"):
        raise errors.InvalidRequestError(
            "stream_options is only allowed together with stream=true.", param="stream_options"
        )
    return body


def _refusal(name: str, endpoint: Endpoint) -> errors.InvalidRequestError:
    if name in _HARMLESS_VALUES:
        allowed = ", ".join(json.dumps(value) for value in _HARMLESS_VALUES[name])
        return errors.InvalidRequestError(f"{name} is not offered; leave it out or send {allowed}.", param=name)
    if name in REFUSED:
        return errors.InvalidRequestError(f"The field {name} is not accepted: {REFUSED[name]}.", param=name)
    nearest = difflib.get_close_matches(name, ALLOWED[endpoint], n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return errors.InvalidRequestError(
        f"Unrecognized request argument supplied: {name[:100]}.{hint}", param=name[:100], code="unknown_field"
    )


def _check_model(body: Mapping[str, Any]) -> None:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise errors.InvalidRequestError(
            f"model must be a non-empty string, got {json.dumps(model)[:100]}. GET /v1/models lists the names.",
            param="model",
        )


def _check_bounds(body: Mapping[str, Any]) -> None:
    _at_most(body, "n", MAX_N)
    _at_most(body, "top_logprobs", MAX_LOGPROBS)
    _at_most(body, "prompt_logprobs", MAX_LOGPROBS)
    if not isinstance(body.get("logprobs"), bool):
        _at_most(body, "logprobs", MAX_LOGPROBS)
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, list):
        _length_at_most("stop", stops, MAX_STOP_STRINGS)
        for text in stops:
            if isinstance(text, str):
                _length_at_most("stop", text, MAX_STOP_CHARACTERS)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        _length_at_most("prompt", prompt, MAX_PROMPTS)
    for field, limit in (("tools", MAX_TOOLS), ("logit_bias", MAX_LOGIT_BIAS)):
        if isinstance(body.get(field), list | dict):
            _length_at_most(field, body[field], limit)


def _at_most(body: Mapping[str, Any], name: str, limit: int) -> None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise errors.InvalidRequestError(f"{name} must be an integer, got {json.dumps(value)[:100]}.", param=name)
    if value is not None and value > limit:
        raise errors.InvalidRequestError(f"{name} is {value}; at most {limit} is allowed.", param=name)


def _length_at_most(name: str, value: list[Any] | dict[str, Any] | str, limit: int) -> None:
    if len(value) > limit:
        unit = "characters" if isinstance(value, str) else "entries"
        raise errors.InvalidRequestError(f"{name} has {len(value)} {unit}; at most {limit} are allowed.", param=name)
