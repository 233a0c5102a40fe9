"""Requests that leave the model no token to choose are the client's to mend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
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


def answer(index: int, finish_reason: str | None, token_ids: Sequence[int] = ()) -> Any:
    return SimpleNamespace(index=index, token_ids=token_ids, finish_reason=finish_reason)


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


@pytest.mark.parametrize(("sampled", "is_refused"), [([67, 67, 68], False), ([67, 0, 67], True), ([0], True)])
async def test_a_token_that_is_none_of_those_allowed_shows_that_none_was_left(
    monkeypatch: pytest.MonkeyPatch, sampled: list[int], is_refused: bool
) -> None:
    """tests/e2e/test_protocol_parity.py asks a real engine."""

    async def generate(self: Observed, *_: Any, **__: Any) -> AsyncGenerator[Any, None]:
        for token_id in sampled:
            outputs = [answer(0, None, [67]), answer(1, None, [token_id])]
            yield SimpleNamespace(request_id="r", prompt_token_ids=[5], outputs=outputs, metrics=None)

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    call = Call(Endpoint.COMPLETION, {"n": 2}, None, "m", "r")
    current_call.set(call)
    answers = Observed().generate(
        TokensPrompt(prompt_token_ids=[5]), SamplingParams(n=2, allowed_token_ids=[67, 68]), "r"
    )
    if not is_refused:
        assert len([each async for each in answers]) == len(sampled)
        return
    with pytest.raises(errors.InvalidRequestError, match="allowed_token_ids") as caught:
        async for _ in answers:
            pass
    assert caught.value.code == "contradictory_constraints"
    assert call.error is caught.value
