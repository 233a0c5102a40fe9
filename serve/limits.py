"""Bounds of one serving process; :class:`capo.settings.Settings` takes its defaults from here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry import errors
from serve import request_policy, request_shapes


@dataclass(frozen=True, slots=True)
class Limits:
    max_in_flight: int = 1024
    """Requests at once, waiting ones included; beyond it 503. Four times what vLLM runs at once."""
    max_in_flight_per_model: int = 256
    """The same for one revision or the base; beyond it 429, so that one cannot take everything."""
    engine_stall_seconds: float = 30.0
    """An engine that finishes no step for so long with work in it is ended and started again. Above the longest step:
    a large model's prefill on a CPU may take seconds."""
    alias_warm_seconds: float = 20.0
    """How long setting an alias or a pin waits for its adapters to load. Below the 60 s after which proxies give up on
    an answer, above the load of a large adapter."""
    max_n: int = request_policy.MAX_N
    """Answers to one prompt. This and what follows: the request policy's own bounds, which a service may lower."""
    max_logprobs: int = request_policy.MAX_LOGPROBS
    """Of each token, and of each prompt token."""
    max_stop_strings: int = request_policy.MAX_STOP_STRINGS
    max_constraint_bytes: int = request_shapes.MAX_SCHEMA_BYTES
    """Of the JSON of a schema, regex, grammar or list of choices."""

    def check(self, body: Mapping[str, Any]) -> None:
        """Whether a request that the policy allows is within this service's own bounds.

        Raises:
            InvalidRequestError: it is not; ``param`` is the field.
        """
        stop = body.get("stop")
        num_stops = len(stop) if isinstance(stop, list) else 0
        asked: dict[str, tuple[Any, int]] = {
            "n": (body.get("n"), self.max_n),
            "stop": (num_stops, self.max_stop_strings),
        }
        asked |= {name: (body.get(name), self.max_logprobs) for name in ("logprobs", "top_logprobs", "prompt_logprobs")}
        asked |= {
            name: (len(json.dumps(body[name])) if body.get(name) is not None else 0, self.max_constraint_bytes)
            for name in ("response_format", "structured_outputs", "text")
        }
        for name, (value, limit) in asked.items():
            if isinstance(value, int) and not isinstance(value, bool) and value > limit:
                unit = " bytes" if limit == self.max_constraint_bytes else ""
                raise errors.InvalidRequestError(
                    f"{name} asks for {value}{unit}; this service allows {limit}{unit}. Ask for less.", param=name
                )
