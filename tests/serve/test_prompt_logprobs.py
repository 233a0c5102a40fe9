"""Log probabilities of prompts are bounded for a whole request, by what it says and by how long its prompts are."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from registry import errors
from serve.engine_api import Call, Endpoint
from serve.observed_llm import ObservedLLM, current_call
from serve.prompt_logprobs import MAX_PROMPT_LOGPROBS
from serve.request_policy import check_body

PROMPT = {"model": "m", "prompt": [5] * 2000}


@pytest.mark.parametrize(
    ("fields", "param", "number"),
    [
        ({"prompt_logprobs": 20, "n": 2}, "prompt_logprobs", 84_000),
        ({"prompt_logprobs": 0, "n": 16, "prompt": [[5] * 4097]}, "prompt_logprobs", 65_552),
        ({"echo": True, "logprobs": 2, "n": 16}, "logprobs", 96_000),
        ({"echo": True, "logprobs": 20, "prompt_logprobs": 20}, "prompt_logprobs", 84_000),
        ({"prompt_logprobs": 1, "prompt": [[5] * 1025] * 32}, "prompt_logprobs", 65_600),
    ],
    ids=str,
)
def test_what_is_too_much_by_the_body_alone_is_refused_with_the_field_its_value_and_the_bound(
    fields: dict[str, Any], param: str, number: int
) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        check_body({**PROMPT, **fields}, Endpoint.COMPLETION)
    assert (caught.value.param, caught.value.code) == (param, "logprobs_too_large")
    assert caught.value.message.startswith(f"{param} is {fields[param]}")
    assert f"these are {number} log probabilities" in caught.value.message
    assert f"at most {MAX_PROMPT_LOGPROBS} are allowed" in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": 20},
        {"echo": True, "logprobs": 20},
        {"logprobs": 20, "n": 16},
        {"echo": True, "n": 16},
        {"prompt_logprobs": 1, "prompt": [[5] * 1024] * 32},
        {"prompt_logprobs": 20, "n": 16, "truncate_prompt_tokens": 100},
        {"prompt_logprobs": 20, "n": 16, "prompt": ["a text of some length"] * 8},
    ],
    ids=str,
)
def test_what_is_within_the_bound_passes(fields: dict[str, Any]) -> None:
    check_body({**PROMPT, **fields}, Endpoint.COMPLETION)


class Observed(ObservedLLM):
    """Without an engine behind it."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(is_encoder_decoder=False)
        self.trials = SimpleNamespace(check_all=self._find_no_fault)
        self.asked: list[str] = []

    def __del__(self) -> None:
        """There is nothing to shut down."""

    async def _find_no_fault(self, *_: Any, **__: Any) -> None:
        pass


async def test_a_text_is_refused_once_its_tokens_are_known_to_be_too_many_with_those_of_the_prompts_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def generate(self: Observed, _: Any, __: Any, request_id: str, **___: Any) -> AsyncGenerator[Any, None]:
        self.asked.append(request_id)
        yield SimpleNamespace(prompt_token_ids=None, outputs=[])

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    llm = Observed()
    body = check_body({"model": "m", "prompt": ["long"] * 3, "prompt_logprobs": 15, "n": 2}, Endpoint.COMPLETION)
    call = Call(Endpoint.COMPLETION, body, None, "m", "r")
    current_call.set(call)

    async def read(number_of_tokens: int, name: str) -> None:
        async for _ in llm.generate(TokensPrompt(prompt_token_ids=[5] * number_of_tokens), SamplingParams(), name):
            pass

    await read(1024, "first")
    await read(1024, "second")
    with pytest.raises(errors.InvalidRequestError, match="65568 log probabilities of 2049 prompt tokens") as caught:
        await read(1, "third")
    assert call.error is caught.value
    assert llm.asked == ["first", "second"]
