"""Bounds of one serving process; :class:`capo.settings.Settings` takes its defaults from here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry import errors
from serve import request_policy, request_shapes

ADAPTER_WAIT_SECONDS = 30.0
"""How long a request waits for an adapter slot. Below the 60 s after which proxies give up on an answer."""


@dataclass(frozen=True, slots=True)
class Limits:
    max_in_flight: int = 1024
    """Requests at once, waiting ones included; beyond it 503. Four times what vLLM runs at once."""
    max_in_flight_per_model: int = 256
    """The same for one revision or the base: those in the engine and those that wait for it or for an adapter slot, in
    one number. Beyond it 429, so that one cannot take everything."""
    engine_stall_seconds: float = 30.0
    """An engine that finishes neither a step nor a load for this long with work in it is ended and started again. Above
    the longest of either: a large model's prefill on a CPU may take seconds."""
    alias_warm_seconds: float = 20.0
    """How long setting an alias or a pin waits for its adapters to load. Below the 60 s after which proxies give up on
    an answer, above the load of a large adapter."""
    max_n: int = request_policy.MAX_N
    """Answers to one prompt. This and what follows: the request policy's own bounds, which a service may lower."""
    max_logprobs: int = request_policy.MAX_LOGPROBS
    """Of each token, and of each prompt token."""
    max_stop_strings: int = request_policy.MAX_STOP_STRINGS
    max_prompts: int = request_policy.MAX_PROMPTS
    max_messages: int = request_policy.MAX_MESSAGES
    """Or items of the input of /v1/responses."""
    max_constraint_bytes: int = request_shapes.MAX_SCHEMA_BYTES
    """Of the JSON of a schema, regex, grammar or list of choices."""

    def check(self, body: Mapping[str, Any]) -> None:
        """Whether a request that the policy allows is within this service's own bounds.

        Raises:
            InvalidRequestError: it is not; ``param`` is the field, ``code`` the policy's for the same bound.
        """
        stop, prompt = body.get("stop"), body.get("prompt")
        is_one_prompt = not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int)
        asked = [
            ("n", body.get("n"), self.max_n, "n_too_large"),
            ("stop", len(stop) if isinstance(stop, list) else 0, self.max_stop_strings, "stop_too_large"),
            ("prompt", 1 if is_one_prompt else len(prompt or ()), self.max_prompts, "prompts_too_large"),
        ]
        asked += [
            (name, len(body[name]), self.max_messages, "messages_too_large")
            for name in ("messages", "input")
            if isinstance(body.get(name), list)
        ]
        asked += [
            (name, body.get(name), self.max_logprobs, "logprobs_too_large")
            for name in ("logprobs", "top_logprobs", "prompt_logprobs")
        ]
        for name, value, limit, code in asked:
            if isinstance(value, int) and not isinstance(value, bool) and value > limit:
                raise errors.InvalidRequestError(
                    f"{name} asks for {value}; this service allows {limit}. Ask for less.", param=name, code=code
                )
        self._check_constraints(body)

    def _check_constraints(self, body: Mapping[str, Any]) -> None:
        for name in ("response_format", "structured_outputs", "text"):
            size = len(json.dumps(body[name])) if body.get(name) is not None else 0
            if size > self.max_constraint_bytes:
                raise errors.InvalidRequestError(
                    f"{name} is {size} bytes of JSON; this service allows {self.max_constraint_bytes}. Send less.",
                    param=name,
                    code="constraint_too_large",
                )
