"""What a client may send to an inference endpoint, and how large it may be.

vLLM's request models accept and ignore unknown fields, and some known ones reach into the engine. Here every field is
either allowed, or refused with its reason; nothing is ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from registry import errors
from registry.strict_json import parse_strict_json
from serve import conversation_shapes, prompt_logprobs, request_shapes, request_types
from serve.engine_api import Endpoint
from serve.request_fields import ALLOWED, HARMLESS_VALUES, LABELS, REFUSED, REQUIRED
from serve.shape_checks import shown

# Bounds on what one request may ask for; OpenAI's own where it has one. What is beyond one of them is refused with a
# code of its own, which ends in too_large and is counted (capo_request_errors_total).
MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_PROMPTS = 32
MAX_TOOLS = 128
MAX_LOGIT_BIAS = 300
MAX_LABEL_CHARACTERS = 512
MAX_BAD_WORDS = 128
MAX_BAD_WORDS_BYTES = 4096
"""Of all together, as UTF-8."""
# An engine on a GPU has room for so many, and a request with more would end it
# (vllm/v1/worker/gpu/sample/logit_bias.py: 1,024 and 128, the model's own stop tokens among them).
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_MESSAGES = 4096
"""And as many parts and calls in all together: each is looked at on the loop that streams the others' tokens."""
MAX_VALUES = 200_000
"""Entries of all lists and objects together, but for tokens. To walk them takes 50 ms; messages, calls and schemas at
their bounds have 100,000."""


def parse_body(raw: bytes, endpoint: Endpoint) -> dict[str, Any]:
    """The request body as a dict whose fields are all allowed and within bounds.

    Raises:
        InvalidRequestError: the body is no JSON object, or :func:`check_body` refuses it.
    """
    try:
        body = parse_strict_json(raw)
        # A lone half of a surrogate pair is no character: no tokenizer takes it, and no answer could repeat it.
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _no_json(f"it holds a lone surrogate, \\u{ord(error.object[error.start]):x}") from error
    except (ValueError, RecursionError) as error:
        raise _no_json(str(error)) from error
    if not isinstance(body, dict):
        raise errors.InvalidRequestError(
            f"The body is a JSON {type(body).__name__}; send one JSON object.", code="invalid_json"
        )
    return check_body(body, endpoint)


def check_body(body: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """``body``, changed in place: without the fields that ask for nothing, and with its conversation in vLLM's form.
    Both faces come through here. What is counted is counted before it is looked at.

    Raises:
        InvalidRequestError: a field is missing, unknown, refused or out of bounds.
        TooLargeError: the body has more values than anybody needs.
    """
    for name, value in list(body.items()):
        if name in REQUIRED[endpoint] or (name in ALLOWED[endpoint] and value is not None):
            continue
        if name in LABELS:
            _check_label(name, value)
        elif not _asks_for_nothing(name, value, body, endpoint):
            raise _refusal(name, endpoint)
        del body[name]
    _check_model(body)
    request_types.check(body, endpoint)
    _leave_out_empty_stream_options(body)
    _check_label("user", body.get("user"))
    _check_bounds(body, endpoint)
    conversation_shapes.check(body)
    _check_values(body)
    _check_combinations(body)
    if endpoint is Endpoint.TOKENIZE:
        _check_what_is_tokenized(body)
    request_shapes.check(body)
    _check_end(body)
    if (tool := request_shapes.repeated_tool(body)) is not None:
        tool["strict"] = True  # as an answer in a format always is
        del body["text"]["format"]
    return body


def _asks_for_nothing(name: str, value: Any, body: Mapping[str, Any], endpoint: Endpoint) -> bool:
    if value is None:
        return name in ALLOWED[endpoint] or name in REFUSED or name in HARMLESS_VALUES
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    harmless = HARMLESS_VALUES.get(name, ())
    if name == "best_of":
        harmless = (*harmless, body.get("n"))  # as many are made as are given
    # As JSON: to Python 0 is false.
    return shown(value) in map(shown, harmless)


def _leave_out_empty_stream_options(body: dict[str, Any]) -> None:
    """What asks for nothing in stream_options; the types have been checked."""
    options = body.get("stream_options")
    if not isinstance(options, dict):
        return
    nothing = {("include_obfuscation", False)}
    asked = {name: value for name, value in options.items() if value is not None and (name, value) not in nothing}
    if asked:
        body["stream_options"] = asked
    else:
        del body["stream_options"]


def _no_json(reason: str) -> errors.InvalidRequestError:
    return errors.InvalidRequestError(
        f"The body is not valid JSON: {reason}. Send one JSON object.", code="invalid_json"
    )


def _refusal(name: str, endpoint: Endpoint) -> errors.InvalidRequestError:
    if name in HARMLESS_VALUES:
        allowed = ", ".join(json.dumps(value) for value in HARMLESS_VALUES[name])
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        return errors.InvalidRequestError(f"{name} is not offered{reason}. Leave it out or send {allowed}.", param=name)
    if name in REFUSED:
        return errors.InvalidRequestError(f"The field {name} is not accepted: {REFUSED[name]}.", param=name)
    nearest = difflib.get_close_matches(name[:100], ALLOWED[endpoint], n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return errors.InvalidRequestError(
        f"Unrecognized request argument supplied: {name[:100]}.{hint}", param=name[:100], code="unknown_field"
    )


def _check_label(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or len(value) > MAX_LABEL_CHARACTERS):
        raise errors.InvalidRequestError(
            f"{name} must be a text of at most {MAX_LABEL_CHARACTERS} characters, got {shown(value)}.", param=name
        )


def _check_values(body: Mapping[str, Any]) -> None:
    """Not too many, and no integer beyond 64 bits: the request could not be sent to the engine. Of long lists of tokens
    vLLM checks each entry."""
    todo = [(name, value) for name, value in body.items() if name not in ("prompt", "tokens")]
    number = len(todo)
    while todo:
        name, value = todo.pop()
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise errors.InvalidRequestError(f"{name} holds an integer of more than 64 bits.", param=name)
        if isinstance(value, dict | list):
            number += len(value)
            if number > MAX_VALUES:
                raise errors.TooLargeError(
                    f"The lists and objects of the body have more than {MAX_VALUES} entries. Send less in {name}.",
                    param=name,
                )
            todo.extend((name, inner) for inner in (value.values() if isinstance(value, dict) else value))


def _check_model(body: Mapping[str, Any]) -> None:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise errors.InvalidRequestError(
            f"model must be a non-empty string, got {shown(model)}. GET /v1/models lists the names.", param="model"
        )


def _check_bounds(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    for field in ("n", "max_tokens", "max_completion_tokens", "max_output_tokens"):
        least = 0 if field == "max_tokens" and body.get("echo") else 1  # an echo alone
        if body.get(field, least) < least:
            raise errors.InvalidRequestError(
                f"{field} is {shown(body[field])}; at least {least} is allowed.", param=field
            )
    kept = body.get("truncate_prompt_tokens")
    if kept is not None and kept < 1:
        raise errors.InvalidRequestError(
            f"truncate_prompt_tokens is {shown(kept)}; at least 1 is allowed: how many of the prompt's last tokens to "
            "keep. To keep all there is room for would leave none for the answer.",
            param="truncate_prompt_tokens",
        )
    _at_most(body, "n", MAX_N, code="n_too_large")
    for field in ("top_logprobs", "prompt_logprobs", *(() if endpoint is Endpoint.CHAT else ("logprobs",))):
        _at_most(body, field, MAX_LOGPROBS, code="logprobs_too_large")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, list):
        _length_at_most("stop", stops, MAX_STOP_STRINGS, code="stop_too_large")
        for text in stops:
            if isinstance(text, str):
                _length_at_most("stop", text, MAX_STOP_CHARACTERS, code="stop_too_large")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        _length_at_most("prompt", prompt, MAX_PROMPTS, code="prompts_too_large")
    for field, limit, code in (
        ("tools", MAX_TOOLS, "tools_too_large"),
        ("logit_bias", MAX_LOGIT_BIAS, "logit_bias_too_large"),
        ("bad_words", MAX_BAD_WORDS, "bad_words_too_large"),
        ("allowed_token_ids", MAX_ALLOWED_TOKEN_IDS, "allowed_token_ids_too_large"),
        ("stop_token_ids", MAX_STOP_TOKEN_IDS, "stop_token_ids_too_large"),
        ("messages", MAX_MESSAGES, "messages_too_large"),
        ("input", MAX_MESSAGES, "messages_too_large"),
    ):
        if isinstance(body.get(field), list | dict):
            _length_at_most(field, body[field], limit, code=code)
    for field in ("messages", "input"):
        _check_number_of_parts(field, body.get(field))
    num_bytes = len("".join(body.get("bad_words", ())).encode())
    if num_bytes > MAX_BAD_WORDS_BYTES:
        raise errors.InvalidRequestError(
            f"bad_words has {num_bytes} bytes; at most {MAX_BAD_WORDS_BYTES} are allowed.",
            param="bad_words",
            code="bad_words_too_large",
        )


def _check_number_of_parts(field: str, entries: Any) -> None:
    """Of the messages of a chat, or the items of an input."""
    known = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    lists = [each.get(name) for each in known for name in ("content", "tool_calls", "output", "summary")]
    number = sum(len(parts) for parts in lists if isinstance(parts, list))
    if number > MAX_MESSAGES:
        raise errors.InvalidRequestError(
            f"The entries of {field} have {number} parts and calls; at most {MAX_MESSAGES} are allowed. Join their "
            "texts.",
            param=field,
            code="messages_too_large",
        )


def _check_combinations(body: Mapping[str, Any]) -> None:
    """Pairs of which vLLM would honour one and ignore the other."""
    if body.get("stream_options") is not None and not body.get("stream"):
        raise errors.InvalidRequestError(
            "stream_options is only allowed together with stream=true.", param="stream_options"
        )
    most, most_completion = body.get("max_tokens"), body.get("max_completion_tokens")
    if most is not None and most_completion is not None and most != most_completion:
        raise errors.InvalidRequestError(
            f"max_tokens is {most} and max_completion_tokens is {most_completion}, and both say how long an answer may "
            "be. Send one of the two.",
            param="max_tokens",
        )
    prompt_logprobs.check(body, prompt_logprobs.least_prompt_tokens(body))
    if body.get("prompt_logprobs") is not None and body.get("stream"):
        raise errors.InvalidRequestError("prompt_logprobs is not available in a stream.", param="prompt_logprobs")
    if body.get("echo"):
        _check_echo(body)
    if body.get("tools") and body.get("tool_choice") not in (None, "none", "auto"):
        for name in ("response_format", "structured_outputs", "text"):
            if request_shapes.asks_for_a_format(body.get(name)) and request_shapes.repeated_tool(body) is None:
                raise errors.InvalidRequestError(
                    f"{name} cannot hold for an answer that tool_choice forces to be a tool call. Leave one of the "
                    "two out.",
                    param=name,
                )


def _check_echo(body: Mapping[str, Any]) -> None:
    for name, instead in (
        ("return_token_ids", "vLLM would leave the text of the prompt out of the echo"),
        ("truncate_prompt_tokens", "the echo would be of the whole prompt, and not of what was read of it"),
    ):
        if body.get(name):
            raise errors.InvalidRequestError(
                f"{name} is {shown(body[name])} beside echo: {instead}. Leave one of the two out.", param=name
            )
    # vLLM hands the prompt's log probabilities out once, and an answer that begins a step later finds none
    # (entrypoints/openai/completion/serving.py, completion_stream_generator).
    if body.get("stream") and body.get("logprobs") is not None and (body.get("n") or 1) > 1:
        raise errors.InvalidRequestError(
            f"echo with logprobs is not available in a stream of several answers, and n is {body['n']}. Leave one of "
            "the four out.",
            param="echo",
        )


def _check_end(body: Mapping[str, Any]) -> None:
    """A grammar ends an answer. What ignore_eos asks for comes behind it and is free, and to min_tokens the end is all
    that is left, which vLLM then takes (v1/sample/logits_processor/builtin.py, MinTokensLogitsProcessor)."""
    binding = request_shapes.what_binds(body)
    for name in ("ignore_eos", "min_tokens"):
        if binding is not None and body.get(name):
            raise errors.InvalidRequestError(
                f"{name} is {shown(body[name])}, but {binding} says where the answer ends. Leave one of the two out.",
                param=name,
            )


def _check_what_is_tokenized(body: Mapping[str, Any]) -> None:
    if ("prompt" in body) == ("messages" in body):
        raise errors.InvalidRequestError("Send either prompt or messages.", param="prompt")
    for name in ("tools", "add_generation_prompt", "continue_final_message"):
        if name in body and "prompt" in body:
            raise errors.InvalidRequestError(f"{name} goes with messages, and not with prompt.", param=name)


def _at_most(body: Mapping[str, Any], name: str, limit: int, *, code: str) -> None:
    value = body.get(name)
    if value is not None and value > limit:
        raise errors.InvalidRequestError(
            f"{name} is {shown(value)}; at most {limit} is allowed.", param=name, code=code
        )


def _length_at_most(name: str, value: list[Any] | dict[str, Any] | str, limit: int, *, code: str) -> None:
    if len(value) > limit:
        unit = "characters" if isinstance(value, str) else "entries"
        raise errors.InvalidRequestError(
            f"{name} has {len(value)} {unit}; at most {limit} are allowed.", param=name, code=code
        )
