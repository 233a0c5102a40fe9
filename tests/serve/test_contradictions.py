"""Requests that leave the model no token to choose are the client's to mend."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from registry import errors
from serve.engine_api import Call, Endpoint
from serve.observed_llm import current_call
from tests.serve.test_prompt_logprobs import Observed


def answer(index: int, finish_reason: str | None) -> Any:
    return SimpleNamespace(index=index, token_ids=[], finish_reason=finish_reason)


@pytest.mark.parametrize("cut", [0, 1, 2])
async def test_whichever_of_several_answers_meets_the_contradiction(monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    async def generate(self: Observed, *_: Any, **__: Any) -> AsyncGenerator[Any, None]:
        outputs = [answer(index, "error" if index == cut else "stop") for index in range(3)]
        yield SimpleNamespace(prompt_token_ids=[5], outputs=outputs)

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    call = Call(Endpoint.COMPLETION, {"n": 3}, None, "m", "r")
    current_call.set(call)
    parameters = SamplingParams(n=3, structured_outputs=StructuredOutputsParams(regex="(a|bc)"))
    with pytest.raises(errors.InvalidRequestError) as caught:
        async for _ in Observed().generate(TokensPrompt(prompt_token_ids=[5]), parameters, "r"):
            pass
    assert caught.value.code == "contradictory_constraints"
    assert call.error is caught.value
