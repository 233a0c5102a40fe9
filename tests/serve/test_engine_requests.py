"""What Capo lets through of requests that vLLM's own models refuse is what the engine is then asked for."""

from __future__ import annotations

import time
from typing import Any

import jsonschema
import pydantic
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.parallel_sampling import ParentRequest

from serve.body_schemas import Schema, body_schema
from serve.engine_api import Endpoint
from serve.engine_requests import REQUEST_TYPES
from serve.request_fields import ALLOWED, HARMLESS_VALUES, REQUIRED
from serve.request_policy import MAX_STOP_STRINGS, check_body

MINIMAL: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: {"messages": [{"role": "user", "content": "hello"}]},
    Endpoint.COMPLETION: {"prompt": "hello"},
    Endpoint.RESPONSES: {"input": "hello"},
}
STOCK = {Endpoint.CHAT: ChatCompletionRequest, Endpoint.COMPLETION: CompletionRequest}


@pytest.mark.parametrize("endpoint", MINIMAL)
def test_as_many_stop_strings_as_the_policy_allows_reach_the_engine(endpoint: Endpoint) -> None:
    stops = [f"s{number}" for number in range(MAX_STOP_STRINGS)]
    request = REQUEST_TYPES[endpoint].model_validate({**MINIMAL[endpoint], "stop": stops})
    assert request.to_sampling_params(16, {}).stop == stops


@pytest.mark.parametrize("endpoint", STOCK)
def test_several_answers_at_temperature_0_are_each_greedy(endpoint: Endpoint) -> None:
    fields = {**MINIMAL[endpoint], "n": 3, "temperature": 0, "seed": 5}
    parameters = REQUEST_TYPES[endpoint].model_validate(fields).to_sampling_params(16, {})
    whole = EngineCoreRequest(
        request_id="a", external_req_id="a", prompt_token_ids=[1], mm_features=None, sampling_params=parameters,
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    parts = [ParentRequest(whole).get_child_info(number)[1] for number in range(parameters.n)]
    assert [(part.n, part.sampling_type) for part in parts] == [(1, SamplingType.GREEDY)] * 3


@pytest.mark.parametrize("endpoint", STOCK)
@pytest.mark.parametrize("fields", [{}, {"n": 1, "temperature": 0}, {"n": 4, "temperature": 0.5, "seed": 1}], ids=str)
def test_what_vllm_takes_it_is_asked_as_its_own_model_asks_it(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    given = {**MINIMAL[endpoint], **fields}
    ours, stock = [
        kind.model_validate(given).to_sampling_params(16, {}) for kind in (REQUEST_TYPES[endpoint], STOCK[endpoint])
    ]
    assert ours == stock


@pytest.mark.parametrize("endpoint", STOCK)
def test_no_answers_at_all_stay_refused(endpoint: Endpoint) -> None:
    for n in (0, -1):
        request = REQUEST_TYPES[endpoint].model_validate({**MINIMAL[endpoint], "n": n, "temperature": 0})
        with pytest.raises(VLLMValidationError, match="n must be at least 1"):
            request.to_sampling_params(16, {})


@pytest.mark.parametrize("endpoint", MINIMAL)
def test_the_document_says_of_what_asks_for_nothing_what_the_policy_says(endpoint: Endpoint) -> None:
    def of_engine(asked: Endpoint) -> Schema:
        return pydantic.TypeAdapter(REQUEST_TYPES[asked]).json_schema()

    schema, minimal = body_schema(of_engine, endpoint), {"model": "m", **MINIMAL[endpoint]}
    nothing = [(name, None) for name in ALLOWED[endpoint] - set(REQUIRED[endpoint])]
    nothing += [(name, value) for name, values in HARMLESS_VALUES.items() for value in (None, *values)]
    for name, value in nothing:
        jsonschema.validate({**minimal, name: value}, schema)
        assert check_body({**minimal, name: value}, endpoint).keys() - {name} == minimal.keys()


def test_of_thousands_of_wrong_items_the_first_is_enough() -> None:
    """All of them took vLLM's model 13 s on the event loop, and the telling half as long."""
    items = [{"type": "message", "role": "user", "content": "hi"}, *[{"type": "reasoning", "id": "r"}] * 4095]
    began = time.process_time()
    with pytest.raises(pydantic.ValidationError) as caught:
        REQUEST_TYPES[Endpoint.RESPONSES].model_validate({"model": "m", "input": items})
    assert {each["loc"][2] for each in caught.value.errors() if len(each["loc"]) > 2} == {1}
    assert time.process_time() - began < 2
