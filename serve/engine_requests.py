"""What vLLM's serving classes take: bodies of the endpoints as vLLM's models, and as much of an HTTP request as they
read.

The models are without two of their refusals:

- More than four stop strings: vLLM's bound is one of its process; ours is the request policy's, on every face.
- Several answers at temperature 0. They are equal, and evaluation scripts ask for them; the engine can give them,
  because it works each answer as a request of its own (vllm/v1/engine/parallel_sampling.py).

And of the items of a response's input the first fault is enough.

A part of :mod:`serve.engine`; nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, FailFast, Field, ValidationError
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from vllm.sampling_params import SamplingParams

from serve.body_errors import formless, invalid_body
from serve.engine_api import Endpoint

_INPUT_ITEMS: Any = next(
    form for form in get_args(ResponsesRequest.model_fields["input"].annotation) if get_origin(form) is list
)


class _ChatRequest(ChatCompletionRequest):
    stop: str | list[str] | None = Field(default_factory=list)

    def to_sampling_params(self, *arguments: Any) -> SamplingParams:
        return _times(self.n, super(_ChatRequest, _asked_once(self)).to_sampling_params(*arguments))


class _CompletionRequest(CompletionRequest):
    stop: str | list[str] | None = Field(default_factory=list)

    def to_sampling_params(self, *arguments: Any) -> SamplingParams:
        return _times(self.n, super(_CompletionRequest, _asked_once(self)).to_sampling_params(*arguments))


class _AtFirstFault(FailFast):
    """Hashable, as a part of a union has to be; pydantic's own is not."""

    __hash__ = object.__hash__


class _ResponsesRequest(ResponsesRequest):
    stop: str | list[str] | None = Field(default_factory=list)
    # Each of the thousands of items there may be has some 200 faults if none of its forms fits: seconds of this loop.
    input: str | Annotated[_INPUT_ITEMS, _AtFirstFault()]


REQUEST_TYPES: Mapping[Endpoint, Any] = {
    Endpoint.CHAT: _ChatRequest,
    Endpoint.COMPLETION: _CompletionRequest,
    Endpoint.RESPONSES: _ResponsesRequest,
    Endpoint.TOKENIZE: TokenizeChatRequest | TokenizeCompletionRequest,
    Endpoint.DETOKENIZE: DetokenizeRequest,
}


@dataclass(frozen=True, slots=True)
class RawRequest:
    """The little that vLLM's serving classes read of an HTTP request.

    Built by us: headers like ``X-Vllm-Priority`` or ``X-data-parallel-rank`` reach into the engine and must not come
    from a client.
    """

    headers: Mapping[str, str]
    state: State = field(default_factory=State)


def parse_request(model: type[BaseModel], body: Mapping[str, Any]) -> Any:
    """Raises:
    InvalidRequestError: ``body`` is none of ``model``.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise invalid_body(error, body) from error
    except (KeyError, AttributeError, IndexError, TypeError, RecursionError) as error:
        # vLLM's validators look into the body before its form has been checked.
        raise formless(error) from error


def _asked_once(request: Any) -> Any:
    """``request`` with an n that vLLM takes at any temperature. What is no number of answers stays, and is refused."""
    return request.model_copy(update={"n": 1}) if (request.n or 1) > 1 else request


def _times(n: int | None, parameters: SamplingParams) -> SamplingParams:
    """For ``n`` answers. vLLM looks at n together with the temperature only where it makes the parameters."""
    parameters.n = n or 1
    return parameters


__all__ = ["REQUEST_TYPES", "RawRequest", "parse_request"]
