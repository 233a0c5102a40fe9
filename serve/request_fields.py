"""The fields of the inference endpoints: which are allowed, and why others are refused.

Allowed is what OpenAI defines (openai 3.52, types/chat/completion_create_params.py, types/completion_create_params.py,
types/responses/response_create_params.py) as far as vLLM 0.32 honours it for a text model, and vLLM's own sampling
fields. A field that vLLM takes and ignores is refused, unless it asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.engine_api import Endpoint

_SAMPLING = {
    "model", "stream", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "stop",
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids", "include_stop_str_in_output",
    "skip_special_tokens", "structured_outputs", "user",
}  # fmt: skip
_GENERATION = _SAMPLING | {
    "stream_options", "max_tokens", "n", "logprobs", "min_tokens", "bad_words", "spaces_between_special_tokens",
    "allowed_token_ids", "response_format", "add_special_tokens", "return_token_ids", "prompt_logprobs",
    "truncate_prompt_tokens",
}  # fmt: skip
_TOOLS = {"tools", "tool_choice", "parallel_tool_calls"}

ALLOWED: Mapping[Endpoint, frozenset[str]] = {
    Endpoint.CHAT: frozenset(_GENERATION | _TOOLS)
    | {
        "messages", "max_completion_tokens", "top_logprobs", "reasoning_effort", "add_generation_prompt",
        "continue_final_message",
    },
    Endpoint.COMPLETION: frozenset(_GENERATION) | {"prompt", "echo", "suffix"},
    Endpoint.RESPONSES: frozenset(_SAMPLING | _TOOLS)
    | {
        "input", "instructions", "max_output_tokens", "text", "include", "top_logprobs", "reasoning", "metadata",
    },
    Endpoint.TOKENIZE: frozenset(
        {
            "model", "prompt", "messages", "tools", "add_special_tokens", "add_generation_prompt",
            "continue_final_message", "return_token_strs",
        }
    ),
    Endpoint.DETOKENIZE: frozenset({"model", "tokens"}),
}  # fmt: skip

REQUIRED: Mapping[Endpoint, tuple[str, ...]] = {
    Endpoint.CHAT: ("model", "messages"),
    Endpoint.COMPLETION: ("model", "prompt"),
    Endpoint.RESPONSES: ("model", "input"),
    Endpoint.TOKENIZE: ("model",),
    Endpoint.DETOKENIZE: ("model", "tokens"),
}

_NOT_STORED = "nothing is stored here; send the whole conversation in input"
_GUIDED = "vLLM removed it; use response_format or structured_outputs"

REFUSED: Mapping[str, str] = {
    "priority": "scheduling is the server's decision",
    "cache_salt": "the server chooses cache isolation",
    "kv_transfer_params": "it reaches into the engine",
    "ec_transfer_params": "it reaches into the engine",
    "prompt_embeds": "tensors are not taken from clients",
    "chat_template": "the model's own template is used",
    "chat_template_kwargs": "the model's own template is used with its defaults",
    "documents": "put documents into the messages",
    "use_beam_search": "beam search is not offered",
    "length_penalty": "it belongs to beam search, which is not offered",
    "best_of": "each answer that is made is given; use n, which it may equal",
    "functions": "OpenAI replaced it; use tools",
    "function_call": "OpenAI replaced it; use tool_choice",
    "modalities": "only text is offered",
    "audio": "only text is offered",
    "prediction": "predicted outputs are not offered",
    "web_search_options": "web search is not offered",
    "verbosity": "no model here has such a switch; say it in the messages",
    "vllm_xargs": "it reaches into the engine",
    "request_id": "send the X-Request-Id header instead",
    "session_id": "it reaches into the engine",
    "mm_processor_kwargs": "only text is offered",
    "media_io_kwargs": "only text is offered",
    "logits_processors": "code is not taken from clients",
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "store": _NOT_STORED,
    "background": "an answer is given while its client waits, and not kept for later",
    "previous_response_id": _NOT_STORED,
    "conversation": _NOT_STORED,
    "previous_input_messages": _NOT_STORED,
    "truncation": "vLLM would cut off the beginning of the prompt and leave room for one token; send what fits",
    "metadata": "no answer is stored here, so nobody could look for it by that; POST /v1/responses repeats it",
    "moderation": "nothing is moderated here",
    "access_programs": "it is a matter of accounts at OpenAI",
    "context_management": "the conversation is taken as it is sent; shorten it before",
    "image": "only text is offered",
    "prompt_cache_options": "the server decides what stays in the cache",
    "prompt_cache_retention": "the server decides what stays in the cache",
    "max_tool_calls": "it bounds built-in tools, and there are none",
    "n": "it is not a field of this endpoint; ask several times",
    "echo": "it is not a field of this endpoint; POST /v1/completions has it",
    "prompt": "it is not a field of this endpoint; stored prompts are not offered",
}

HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "background": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
    "n": (1,),
    "echo": (False,),
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "priority": (0,),
}
"""Fields of OpenAI's and vLLM's that ask for nothing when they have these values; clients send them by default. Null
asks for nothing in every field that is known and not required."""

LABELS = frozenset({"safety_identifier", "prompt_cache_key"})
"""OpenAI's opaque texts about who asks. They ask nothing of an answer, at OpenAI too, so any text passes. ``user`` is
another: the canary of an alias goes by it."""
