"""What vLLM raises is told from its cause, and of the field that the client sent: the client's fault is no fault of the
service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx2
import jinja2
import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai.chat_models.base import _handle_openai_bad_request
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import TokenizeParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

from registry import errors, locate_base_model
from serve.engine import VllmEngine
from serve.engine_api import Call, Endpoint, EngineAdapter, EngineLimits
from serve.engine_errors import refused

CHAT = {"messages": [{"role": "user", "content": "x"}]}


class LivingEngine(VllmEngine):
    """Never started, and taken for alive."""

    @property
    def is_dead(self) -> bool:
        return False


@dataclass
class Renderer:
    """As much of vLLM's as looks at token ids."""

    tokenizer: Any
    model_config: Any
    validate_token_ids = BaseRenderer.validate_token_ids


@pytest.fixture(scope="module")
def engine() -> VllmEngine:
    return LivingEngine(str(locate_base_model("capo-tiny").path), "capo-tiny", [])


def test_nesting_that_exhausts_the_stack_of_vllms_parsers_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(RecursionError) as caught:
        json.loads("[" * 100_000)
    assert isinstance(engine._translate(caught.value, CHAT), errors.InvalidRequestError)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"presence_penalty": 5.0}, "presence_penalty"),
        ({"stop": ["a", ""]}, "stop"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"bad_words": [""]}, "bad_words"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ],
)
def test_a_refusal_of_vllms_names_the_field_it_is_about(
    engine: VllmEngine, parameters: dict[str, Any], param: str
) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        SamplingParams(**parameters)
    refusal = engine._translate(caught.value, CHAT)
    assert isinstance(refusal, errors.InvalidRequestError)
    assert refusal.param == param
    assert "(parameter=" not in refusal.message


def test_a_refusal_that_begins_with_another_word_names_no_field() -> None:
    assert refused("Something is wrong with top_k.", None, "messages").param is None


def test_what_the_chat_template_refuses_is_about_the_messages(engine: VllmEngine) -> None:
    """vLLM raises an error of its own from that of the template (vllm/renderers/hf.py)."""
    error = VLLMValidationError("Unknown role: robot")
    error.__cause__ = jinja2.TemplateError("Unknown role: robot")
    refusal = engine._translate(error, CHAT)
    assert (refusal.param, errors.wire_kind(refusal).http_status) == ("messages", 400)
    assert "Unknown role: robot" in refusal.message
    assert engine._translate(error, {"input": "x"}).param == "input"


def too_many_tokens(lengths: TokenizeParams) -> None:
    lengths.apply_post_tokenization(None, TokensPrompt(prompt_token_ids=[1] * 2049))


def too_many_characters(lengths: TokenizeParams) -> None:
    tokenizer: Any = SimpleNamespace(max_chars_per_token=4)
    lengths.apply_pre_tokenization(tokenizer, {"prompt": "word " * 3_000})


@pytest.mark.parametrize("body", [CHAT, {"prompt": "x"}, {"input": "x"}], ids=str)
@pytest.mark.parametrize("refuse", [too_many_tokens, too_many_characters])
def test_a_prompt_beyond_the_context_is_told_of_in_words_that_clients_know(
    engine: VllmEngine, body: dict[str, Any], refuse: Callable[[TokenizeParams], None]
) -> None:
    """LangChain's own code reads openai's exception here. Whatever the release of the latter, the message is in it."""
    with pytest.raises(VLLMValidationError) as caught:
        refuse(TokenizeParams(max_total_tokens=2048))
    refusal = engine._translate(caught.value, body)
    assert (refusal.code, refusal.param) == ("context_length_exceeded", *body)
    assert refusal.message.startswith("This model's maximum context length is 2048 tokens.")
    assert "(parameter=" not in refusal.message
    response = httpx2.Response(400, request=httpx2.Request("POST", "http://service/v1"))
    with pytest.raises(ContextOverflowError):
        _handle_openai_bad_request(openai.BadRequestError(refusal.message, response=response, body=None))


@pytest.mark.parametrize(
    ("given", "is_refused"),
    [
        ([0, 2047], False),
        ([], False),
        ("text", False),
        (["text"], False),
        ([[1], [2047]], False),
        ([1, 99999], True),
        ([-1], True),
        ([[1], [99999]], True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["prompt", "tokens"])
def test_a_token_that_no_vocabulary_has_is_refused_wherever_it_is_sent(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, name: str, given: Any, is_refused: bool
) -> None:
    sizes = SimpleNamespace(max_token_id=2047, get_vocab_size=lambda: 2048)
    monkeypatch.setattr(engine, "_live", lambda: SimpleNamespace(renderer=Renderer(sizes, sizes)))
    if not is_refused:
        engine._check_token_ids(name, given)
        return
    with pytest.raises(errors.InvalidRequestError, match="out of vocabulary") as caught:
        engine._check_token_ids(name, given)
    assert caught.value.param == name


async def test_a_request_stays_with_the_engine_that_it_came_to_even_if_a_new_one_is_there_before_its_prompt_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = VllmEngine(str(locate_base_model("capo-tiny").path), "capo-tiny", [])
    is_replaced, asked = asyncio.Event(), []

    class Living:
        """As much of vLLM's client of an engine process as such a request needs."""

        errored = False
        model_config = SimpleNamespace(is_encoder_decoder=False)

        async def generate(self, *_: Any, **__: Any) -> AsyncGenerator[Any, None]:
            asked.append(self)
            if self.errored:
                raise VllmEngineDeadError
            yield SimpleNamespace(outputs=[])

    class Serving:
        default_sampling_params: ClassVar[dict[str, Any]] = {}
        override_max_tokens = None

        async def render_completion_request(self, _: Any) -> list[TokensPrompt]:
            await is_replaced.wait()
            return [TokensPrompt(prompt_token_ids=[1, 2])]

    before, after = Living(), Living()
    monkeypatch.setattr(engine, "_llm", before)
    monkeypatch.setattr(
        engine, "_limits", EngineLimits(max_loras=1, max_lora_rank=8, max_model_len=64, vocab_size=2048)
    )
    monkeypatch.setattr(engine, "_state", SimpleNamespace(openai_serving_completion=Serving()))
    adapter = EngineAdapter("a@1", 1, Path("a"))
    pieces = engine.pieces(Call(Endpoint.COMPLETION, {"prompt": "x", "max_tokens": 1}, adapter, "x", "request"))
    first = asyncio.create_task(anext(pieces))
    await asyncio.sleep(0)
    before.errored = True
    monkeypatch.setattr(engine, "_llm", after)
    is_replaced.set()
    with pytest.raises(errors.EngineDeadError):
        await first
    assert asked == [before]
