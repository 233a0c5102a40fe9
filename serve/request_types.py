"""The types of a request's fields, held to strictly. vLLM's models take ``true`` and ``"8"`` for numbers, and OpenAI's
do not: a client that sends them means something else, or has a fault that it should hear of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from registry import errors
from serve.engine_api import Endpoint
from serve.shape_checks import shown

_Holds = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str | list)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and {int}.issuperset(map(type, value))  # a prompt may have a million


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and {str}.issuperset(map(type, value))


def _is_text_or_texts(value: Any) -> bool:
    return _is_text(value) or _are_texts(value)


def _is_prompt(value: Any) -> bool:
    is_tokens_of_several = isinstance(value, list) and all(map(_are_integers, value))
    return _is_text_or_texts(value) or _are_integers(value) or is_tokens_of_several


def _are_biases(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(bias) and -100 <= bias <= 100 for bias in value.values())


# The values of one type, the type in words, and its fields.
_TYPES: tuple[tuple[_Holds, str, tuple[str, ...]], ...] = (
    (_is_boolean, "true or false", (
        "stream", "echo", "parallel_tool_calls", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
        "spaces_between_special_tokens", "add_special_tokens", "return_token_ids", "add_generation_prompt",
        "continue_final_message", "return_token_strs",
    )),
    (_is_integer, "an integer", (
        "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "seed", "top_k", "top_logprobs",
        "prompt_logprobs", "truncate_prompt_tokens",
    )),
    (_is_number, "a number", (
        "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    )),
    (_is_text, "a text", ("instructions", "suffix", "reasoning_effort")),
    (_is_list, "a list", ("messages", "tools", "include")),
    (_is_text_or_list, "a text or a list of items", ("input",)),
    (_are_integers, "a list of integers", ("stop_token_ids", "allowed_token_ids", "tokens")),
    (_are_texts, "a list of texts", ("bad_words",)),
    (_is_text_or_texts, "a text or a list of texts", ("stop",)),
    (_is_prompt, "a text, a list of texts, a list of token ids, or a list of lists of token ids", ("prompt",)),
    (_are_biases, "an object of token ids with numbers between -100 and 100", ("logit_bias",)),
)  # fmt: skip
_FIELDS: Mapping[str, tuple[_Holds, str]] = {name: (holds, kind) for holds, kind, names in _TYPES for name in names}


def check(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    """Of the fields that are scalars or lists of them; :mod:`serve.request_shapes` looks into objects.

    Raises:
        InvalidRequestError: one of them has a value of another type, or there is nothing to complete.
    """
    logprobs = (_is_boolean, "true or false") if endpoint is Endpoint.CHAT else (_is_integer, "an integer")
    for name, value in body.items():
        holds, kind = logprobs if name == "logprobs" else _FIELDS.get(name, (None, ""))
        if holds is not None and not holds(value):
            raise errors.InvalidRequestError(f"{name} must be {kind}, got {shown(value)}.", param=name)
    if endpoint is Endpoint.COMPLETION and not body.get("prompt"):
        got = "it is empty" if "prompt" in body else "there is none"
        raise errors.InvalidRequestError(
            f"prompt must be {_FIELDS['prompt'][1]}, and {got}. An answer begins behind it.", param="prompt"
        )
    options = body.get("stream_options")
    for name, value in options.items() if isinstance(options, dict) else ():
        if not isinstance(value, bool | None):
            place = f"stream_options.{name}"
            raise errors.InvalidRequestError(f"{place} must be true or false, got {shown(value)}.", param=place)
