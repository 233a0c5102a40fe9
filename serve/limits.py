"""Bounds of one serving process; :class:`capo.settings.Settings` takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


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
