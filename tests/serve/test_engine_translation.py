"""What vLLM raises is told from its cause: the client's fault is no fault of the service."""

from __future__ import annotations

import json

import pytest

from registry import errors, locate_base_model
from serve.engine import VllmEngine


class LivingEngine(VllmEngine):
    """Never started, and taken for alive."""

    @property
    def is_dead(self) -> bool:
        return False


def test_nesting_that_exhausts_the_stack_of_vllms_parsers_is_refused() -> None:
    engine = LivingEngine(str(locate_base_model("capo-tiny").path), "capo-tiny", [])
    with pytest.raises(RecursionError) as caught:
        json.loads("[" * 100_000)
    assert isinstance(engine._translate(caught.value), errors.InvalidRequestError)
