"""Stock clients talk to the service as they talk to OpenAI: openai's SDK, LangChain, litellm."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import venv
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from capo.client import CapoClient
from serve import request_policy as policy
from tests.e2e.four_ways import Question, over_grpc, over_grpc_stream, over_http, over_http_stream
from tests.e2e.service import Service

pytestmark = pytest.mark.engine

MODEL = "capo-tiny"
HELLO: dict[str, Any] = {"role": "user", "content": "Who are you?"}
CITIES = {"Paris", "Rome"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": sorted(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": PARAMETERS,
    "strict": True,
}
WEATHER_TOOL: Any = {"type": "function", "function": WEATHER}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
LITELLM = Path("build/litellm").absolute()


class Reply(BaseModel):
    """A form that no untrained answer has by chance."""

    mood: Literal["glad", "sad"]
    is_sure: bool


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return service.client


@pytest.fixture(scope="module", autouse=True)
def litellm_installation() -> Iterator[Future[Path]]:
    """Begun with the module and needed at its end: half a minute of downloads and copies beside the other tests."""
    with ThreadPoolExecutor(1, thread_name_prefix="litellm") as executor:
        yield executor.submit(install_litellm)


def install_litellm() -> Path:
    """litellm's own environment (docs/dependencies.md says why), made when it is missing or its lock changed."""
    lock = Path(__file__).parent / "litellm.lock"
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    python, stamp = LITELLM / "bin" / "python", LITELLM / "lock.sha256"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(LITELLM, with_pip=True, clear=True)
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "-r", lock]
        subprocess.run(install, check=True)
        stamp.write_text(wanted)
    return python


def ask(client: openai.OpenAI, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL, "messages": [HELLO], "temperature": 0, "max_tokens": 48, **options}
    return client.chat.completions.create(**fields)


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content or ""


# -- openai's SDK: chat ----------------------------------------------------------------------------------------------


def test_a_conversation_of_several_turns_streams_what_it_answers_in_one_piece(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}]
    for question in ("Hello.", "Who are you?", "Thank you."):
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        whole = ask(client, messages=messages)
        with ask(client, messages=messages, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text_of(whole) != ""
        assert chunks[-1].usage == whole.usage
        messages.append(whole.choices[0].message)  # as it came, with all its empty fields


async def test_the_async_client_streams_the_same(service: Service, client: openai.OpenAI) -> None:
    async with service.async_client() as async_client:
        stream = await async_client.chat.completions.create(
            model=MODEL,
            messages=[HELLO],
            temperature=0,
            max_tokens=48,
            stream=True,  # type: ignore[arg-type]
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == text_of(ask(client))


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_tool_call_goes_round_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(client, tools=[WEATHER_TOOL], tool_choice=choice).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in CITIES
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    after = ask(client, messages=[HELLO, answer.message, result], tools=[WEATHER_TOOL])
    assert after.usage.prompt_tokens > ask(client, tools=[WEATHER_TOOL]).usage.prompt_tokens

    with client.chat.completions.stream(
        model=MODEL, messages=[HELLO], temperature=0, max_tokens=48, tools=[WEATHER_TOOL], tool_choice=choice
    ) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls[0].function.name == "get_weather"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert streamed.finish_reason == answer.finish_reason


def test_tool_choice_none_and_auto_leave_the_answer_to_the_model(client: openai.OpenAI) -> None:
    for choice in ("none", "auto"):
        message = ask(client, tools=[WEATHER_TOOL], tool_choice=choice).choices[0].message
        assert message.content or message.tool_calls
        assert choice == "auto" or not message.tool_calls


def test_a_schema_answer_parses_into_its_class(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=[HELLO], response_format=Reply, temperature=0, max_tokens=64
    )
    assert isinstance(parsed.choices[0].message.parsed, Reply)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the SDK's, of the class that parse has put in
@pytest.mark.parametrize("options", [{"response_format": Reply}, {"tools": [WEATHER_TOOL], "tool_choice": "required"}])
def test_what_the_sdks_helpers_return_goes_on_as_a_conversation(client: openai.OpenAI, options: Any) -> None:
    asked = {"model": MODEL, "messages": [HELLO], "temperature": 0, "max_tokens": 64, **options}
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    parsed = client.chat.completions.parse(**asked).choices[0].message
    for message in (streamed, parsed):
        told = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in message.tool_calls or ()]
        plain = message.model_dump(include={"role", "content"})
        if message.tool_calls:
            function = message.tool_calls[0].function
            called = {"name": function.name, "arguments": function.arguments}
            plain["tool_calls"] = [{"id": message.tool_calls[0].id, "type": "function", "function": called}]
        answers = [ask(client, messages=[HELLO, each, *told, HELLO]) for each in (message, plain)]
        assert text_of(answers[0]) == text_of(answers[1])
        assert answers[0].usage == answers[1].usage


def test_an_answer_can_be_bound_to_json_a_regex_a_choice_and_a_grammar(client: openai.OpenAI) -> None:
    for question in ("hello", "Who are you?", "Thank you."):
        message = {"role": "user", "content": question}
        answer = ask(client, messages=[message], response_format={"type": "json_object"}, max_tokens=200)
        assert text_of(answer).startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text_of(answer)), dict)
    for bound, allowed in (
        ({"regex": "[a-c]{3}-[0-9]{2}"}, lambda text: text[:3].strip("abc") == "" and text[3] == "-"),
        ({"choice": ["yes", "no"]}, {"yes", "no"}.__contains__),
        ({"grammar": 'root ::= "x" ("1" | "2")'}, {"x1", "x2"}.__contains__),
        ({"json": {"enum": [7]}}, "7".__eq__),
    ):
        assert allowed(text_of(ask(client, extra_body={"structured_outputs": bound})))


def test_sampling_fields_do_what_openai_says(client: openai.OpenAI) -> None:
    plain = ask(client)
    first = plain.choices[0].message.content.split()[0]
    assert text_of(ask(client, stop=[first])) == ""
    assert ask(client, max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2
    logprobs = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in logprobs)
    assert {len(token.top_logprobs) for token in logprobs} == {3}
    banned = {str(token_id): -100 for token_id in _token_ids(client, first)}
    assert not text_of(ask(client, logit_bias=banned)).startswith(first)
    several = ask(client, n=3, temperature=1.5, seed=5, max_tokens=24)
    assert len({choice.message.content for choice in several.choices}) > 1
    for seed, is_same in ((5, True), (6, False)):
        again = ask(client, n=3, temperature=1.5, seed=seed, max_tokens=24)
        assert ([c.message.content for c in again.choices] == [c.message.content for c in several.choices]) is is_same


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_several_answers_at_temperature_0_are_the_one_answer_each(
    service: Service, client: openai.OpenAI, stream: bool
) -> None:
    """Evaluation scripts ask for them; vLLM by itself refuses to be asked."""
    for question in (
        Question(MODEL, {"max_tokens": 16, "temperature": 0}, turns=[HELLO]),
        Question(MODEL, {"max_tokens": 16, "temperature": 0}, prompt="In the village", logprobs=2),
    ):
        several = replace(question, shared={**question.shared, "n": 3, "seed": 5})
        with httpx.Client(base_url=service.url, timeout=120) as http, CapoClient(service.grpc_address) as grpc:
            one = over_http(http, question)
            for answer in (
                over_http_stream(http, several) if stream else over_http(http, several),
                over_grpc_stream(grpc, several) if stream else over_grpc(grpc, several),
            ):
                assert answer.texts == dict.fromkeys(range(3), one.texts[0])
                assert answer.token_ids == dict.fromkeys(range(3), one.token_ids[0])
                assert answer.ends == dict.fromkeys(range(3), one.ends[0])


@pytest.mark.parametrize(
    "options",
    [
        {"n": policy.MAX_N},
        {"logprobs": True, "top_logprobs": policy.MAX_LOGPROBS},
        {"stop": [f"{number:02}".ljust(policy.MAX_STOP_CHARACTERS, "z") for number in range(policy.MAX_STOP_STRINGS)]},
        {"logit_bias": {str(number): 1 for number in range(policy.MAX_LOGIT_BIAS)}},
        {"extra_body": {"bad_words": [chr(0x4E00 + number) * 10 for number in range(policy.MAX_BAD_WORDS)]}},
        {"extra_body": {"bad_words": [f"{number:x}" for number in range(policy.MAX_BAD_WORDS)]}},
        {"extra_body": {"allowed_token_ids": list(range(policy.MAX_ALLOWED_TOKEN_IDS))}},
        {"extra_body": {"stop_token_ids": list(range(policy.MAX_STOP_TOKEN_IDS)), "min_tokens": 2}},
    ],
    ids=lambda options: str(options)[:40],
)
def test_the_engine_takes_what_is_at_a_limit(client: openai.OpenAI, options: dict[str, Any]) -> None:
    assert ask(client, max_tokens=4, **options).choices
    assert list(ask(client, max_tokens=4, stream=True, **options))


def _token_ids(client: openai.OpenAI, text: str) -> list[int]:
    url = str(client.base_url).removesuffix("/v1/")
    return httpx.post(f"{url}/tokenize", json={"model": MODEL, "prompt": text}).json()["tokens"]


def test_tokens_of_a_conversation_are_those_that_it_is_billed_for(service: Service, client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, HELLO]
    tokens = httpx.post(f"{service.url}/tokenize", json={"model": MODEL, "messages": messages}).json()["tokens"]
    assert len(tokens) == ask(client, messages=messages).usage.prompt_tokens
    back = httpx.post(f"{service.url}/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"]
    assert "Be brief." in back
    assert HELLO["content"] in back


def test_trouble_is_the_sdks_own_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="nope")
    assert missing.value.code == "model_not_found"
    for options in (
        {"temperature": -1},
        {"extra_body": {"temprature": 1}},
        {"extra_body": {"structured_outputs": {"regex": "[a-"}}},
        {"extra_body": {"structured_outputs": {"grammar": "root ::= nothing"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": "x" * 60_000}]},
        {"reasoning_effort": "high"},
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError):
                ask(client, stream=stream, **options)
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.embeddings.create(model=MODEL, input="x")


@pytest.mark.parametrize("words", [3_000, 300_000], ids=["counted in tokens", "refused before it is cut into tokens"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prompt_beyond_the_context_has_openais_code_for_it(client: openai.OpenAI, words: int, stream: bool) -> None:
    long = [{"role": "user", "content": "Who are you? " * words}]
    for field, call in {
        "messages": lambda: ask(client, messages=long, stream=stream),
        "prompt": lambda: client.completions.create(model=MODEL, prompt=long[0]["content"], stream=stream),
        "input": lambda: client.responses.create(model=MODEL, input=long[0]["content"], stream=stream),
    }.items():
        with pytest.raises(openai.BadRequestError, match="context length") as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", field)


# -- openai's SDK: responses -----------------------------------------------------------------------------------------


def respond(client: openai.OpenAI, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL, "input": "Who are you?", "temperature": 0, "max_output_tokens": 48}
    return client.responses.create(**{**fields, **options})


def test_a_response_says_what_chat_says_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = respond(client)
    assert whole.status == "completed"
    assert whole.output_text == text_of(ask(client))
    events = list(respond(client, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_repeats_its_metadata_whole_and_streamed(client: openai.OpenAI) -> None:
    said = {"run": "7", "city": "Zürich"}
    assert respond(client, metadata=said).metadata == said
    assert [e.response.metadata for e in respond(client, metadata=said, stream=True) if hasattr(e, "response")] == (
        [said] * 3
    )


def test_a_response_that_is_cut_is_incomplete_and_not_completed(client: openai.OpenAI) -> None:
    cut = respond(client, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert list(respond(client, max_output_tokens=2, stream=True))[-1].type == "response.incomplete"


def test_a_tool_call_goes_round_through_responses(client: openai.OpenAI) -> None:
    flat: Any = {"type": "function", **WEATHER}
    called = respond(client, tools=[flat], tool_choice="required")
    (call,) = called.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments)["city"] in CITIES
    events = list(respond(client, tools=[flat], tool_choice="required", stream=True))
    assert events[-1].response.output[0].arguments == call.arguments
    done = [event.item for event in events if event.type == "response.output_item.done"]
    plain = httpx.post(
        f"{client.base_url}responses",
        json={"model": MODEL, "input": "Who are you?", "temperature": 0, "tools": [flat], "tool_choice": "required"},
        timeout=60,
    ).json()["output"]
    for output in (called.output, done, [item.model_dump() for item in called.output], plain):
        (call,) = output
        call_id = call["call_id"] if isinstance(call, dict) else call.call_id
        told = {"type": "function_call_output", "call_id": call_id, "output": "Sunny."}
        after = respond(client, input=[HELLO, *output, told], tools=[flat])
        assert after.usage.input_tokens > called.usage.input_tokens


def test_a_call_beside_a_format_of_the_same_schema_holds_to_it(client: openai.OpenAI) -> None:
    """As instructor asks; the tool itself is not strict."""
    flat: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    form: Any = {"format": {"type": "json_schema", "name": "get_weather", "strict": True, "schema": PARAMETERS}}
    (call,) = respond(client, tools=[flat], tool_choice={"type": "function", "name": "get_weather"}, text=form).output
    assert json.loads(call.arguments)["city"] in CITIES


def test_a_schema_response_parses_into_its_class(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input="Who are you?", text_format=Reply, temperature=0)
    assert isinstance(parsed.output_parsed, Reply)


@pytest.mark.parametrize(
    "options",
    [{"store": True}, {"background": True}, {"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]},
     {"include": ["reasoning.encrypted_content"]}, {"top_logprobs": 2}, {"max_tool_calls": 1}],
    ids=str,
)  # fmt: skip
def test_what_a_response_cannot_honour_is_refused(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, **options)
    assert caught.value.param.partition(".")[0] in options


# -- constraints that cost too much ----------------------------------------------------------------------------------

COSTLY: list[dict[str, Any]] = [
    # 300 strings with different bounds: minutes to compile.
    {"json": {"type": "object", "properties": {f"p{n}": {"type": "string", "maxLength": 200 + n} for n in range(300)}}},
    # 100 nested patterns: 6 s to check, on the event loop of a stock vLLM.
    {"json": {"type": "object", "properties": {
        f"p{n}": {"type": "string", "pattern": f"^((a{{1,100}}){{1,100}}){{1,100}}{n}$"} for n in range(100)}}},
    # Each token 0.1 s and more, in the step that all requests share.
    {"regex": "([^a]{1,30}[^b]{1,30}){1,30}"},
    {"regex": "([^a]{1,9}[^b]{1,9}){1,9}" * 20},
    {"grammar": "root ::= r0\n" + 'r150 ::= "y"\n'
     + "\n".join(f"r{n} ::= r{n + 1} r{n + 1} | [a-z]* | r{n + 1} [0-9]*" for n in range(150))},
]  # fmt: skip


def test_a_costly_constraint_is_refused_and_holds_up_nobody(service: Service, client: openai.OpenAI) -> None:
    engine_pid = service.engine_pid()
    slowest, stop = 0.0, threading.Event()

    def keep_asking() -> None:
        nonlocal slowest
        with httpx.Client(base_url=service.url, timeout=60) as http:
            body = {"model": MODEL, "prompt": "In the village", "max_tokens": 4}
            while not stop.is_set():
                response = http.post("/v1/completions", json=body)
                slowest = max(slowest, response.elapsed.total_seconds())

    others = threading.Thread(target=keep_asking)
    others.start()
    try:
        for constraint in COSTLY:
            with pytest.raises(openai.BadRequestError, match="costs too much") as caught:
                ask(client, extra_body={"structured_outputs": constraint})
            assert caught.value.code == "constraint_too_slow"
            assert caught.value.param == f"structured_outputs.{next(iter(constraint))}"
    finally:
        stop.set()
        others.join()
    assert slowest < 2.0, f"somebody else waited {slowest:.1f} s"
    assert service.engine_pid() == engine_pid
    assert text_of(ask(client, extra_body={"structured_outputs": {"choice": ["a", "b"]}})) in ("a", "b")


BAD_SCHEMA = {"type": "string", "pattern": "(a"}


def test_a_schema_that_cannot_be_used_is_told_of_by_its_place(client: openai.OpenAI) -> None:
    form = {"name": "a", "schema": BAD_SCHEMA}
    with pytest.raises(openai.BadRequestError, match="is not usable") as caught:
        ask(client, response_format={"type": "json_schema", "json_schema": form})
    assert caught.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.BadRequestError, match="is not usable") as caught:
        client.responses.create(model=MODEL, input="a", text={"format": {"type": "json_schema", **form}})
    assert caught.value.param == "text.format.schema"


@pytest.mark.parametrize("is_strict", [False, True])
def test_beside_a_format_tools_can_be_called(service: Service, client: openai.OpenAI, is_strict: bool) -> None:
    """What the model would choose is decided here by a bias for or against the token that begins a call."""
    function = {**WEATHER, "strict": is_strict}
    form = {"name": "reply", "schema": {**Reply.model_json_schema(), "additionalProperties": False}}
    asked = {"model": MODEL, "prompt": "<tool_call>", "add_special_tokens": False}
    (begin,) = httpx.post(f"{service.url}/tokenize", json=asked).json()["tokens"]
    for bias, is_called in ((100, True), (-100, False)):
        options = {"logit_bias": {begin: bias}, "parallel_tool_calls": False}
        tools: list[Any] = [{"type": "function", "function": function}]
        chat = ask(client, tools=tools, response_format={"type": "json_schema", "json_schema": form}, **options)
        tools = [{"type": "function", **function}]
        text: Any = {"format": {"type": "json_schema", **form}}
        response = client.responses.create(
            model=MODEL, input="Who are you?", temperature=0, max_output_tokens=48, tools=tools, text=text,
            extra_body=options,
        )  # fmt: skip
        # A call that max_tokens cuts off is text.
        if is_called:
            assert chat.choices[0].message.tool_calls or text_of(chat).startswith("<tool_call>")
            assert response.output[0].type == "function_call" or response.output_text.startswith("<tool_call>")
        else:
            Reply.model_validate_json(text_of(chat))
            Reply.model_validate_json(response.output_text)


def test_a_stream_has_the_end_of_a_text_that_might_have_become_a_call(service: Service, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "a<", "add_special_tokens": False}
    *_, begin = httpx.post(f"{service.url}/tokenize", json=asked).json()["tokens"]
    chat = {"tools": [{"type": "function", "function": WEATHER}], "max_tokens": 3, "logit_bias": {begin: 100}}
    chunks = ask(client, stream=True, **chat)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(ask(client, **chat)) == "<<<"
    response = {
        "tools": [{"type": "function", **WEATHER}],
        "max_output_tokens": 3,
        "extra_body": {"logit_bias": {begin: 100}},
    }
    *_, last = respond(client, stream=True, **response)
    assert last.response.output_text == respond(client, **response).output_text == "<<<"


def test_a_streamed_response_has_a_log_probability_of_each_token(client: openai.OpenAI) -> None:
    """Where text is held back that may be the beginning of a stop text, and of the token that ends the answer."""
    for options in ({"stop": ["no such text"]}, {"max_output_tokens": 12}, {}):
        asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "extra_body": options}
        whole = respond(client, **asked).output[0].content[0]
        events = list(respond(client, stream=True, **asked))
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        told = [entry.token for entry in whole.logprobs]
        assert len(told) == events[-1].response.usage.output_tokens
        assert [entry.token for delta in deltas for entry in delta.logprobs] == told
        assert [entry.token for entry in events[-1].response.output[0].content[0].logprobs] == told
        assert "".join(delta.delta for delta in deltas) == whole.text


# -- LangChain -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def langchain(service: Service) -> Iterator[ChatOpenAI]:
    with httpx.Client() as http:
        yield ChatOpenAI(
            model=MODEL,
            base_url=f"{service.url}/v1",
            api_key="none",  # type: ignore[arg-type]
            temperature=0,
            max_tokens=64,  # type: ignore[call-arg]
            max_retries=0,
            http_client=http,
        )


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"Sunny in {city}."


def test_langchain_invokes_and_streams(langchain: ChatOpenAI) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("Who are you?")]
    answer = langchain.invoke(messages)
    assert answer.text
    assert answer.usage_metadata is not None
    assert "".join(chunk.text for chunk in langchain.stream(messages)) == answer.text


def test_langchain_calls_tools(langchain: ChatOpenAI) -> None:
    bound = langchain.bind_tools([get_weather], tool_choice="any", strict=True)
    question = HumanMessage("Who are you?")
    answer = bound.invoke([question])
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    assert call["args"]["city"] in CITIES
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    after = langchain.bind_tools([get_weather]).invoke([question, answer, result])
    assert after.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]  # type: ignore[index]


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_tells_what_a_tool_answered_in_parts(langchain: ChatOpenAI, use_responses_api: bool) -> None:
    """Tools of MCP servers answer so."""
    asked = AIMessage("", tool_calls=[{"name": "get_weather", "args": {"city": "Rome"}, "id": "c1"}])
    conversation = [HumanMessage("Who are you?"), asked]
    model = langchain.model_copy(update={"use_responses_api": use_responses_api})
    whole = model.invoke([*conversation, ToolMessage("Sunny.\nWarm.", tool_call_id="c1")])
    parts: list[str | dict[str, Any]] = [{"type": "text", "text": text} for text in ("Sunny.", "Warm.")]
    in_parts = model.invoke([*conversation, ToolMessage(parts, tool_call_id="c1")])
    assert (in_parts.text, in_parts.usage_metadata) == (whole.text, whole.usage_metadata)


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_learns_that_a_prompt_is_too_long(langchain: ChatOpenAI, use_responses_api: bool) -> None:
    """What cuts a conversation and asks again waits for this exception."""
    model = langchain.model_copy(update={"use_responses_api": use_responses_api})
    long = [HumanMessage("Who are you? " * 3_000)]
    with pytest.raises(ContextOverflowError):
        model.invoke(long)
    with pytest.raises(ContextOverflowError):
        list(model.stream(long))


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_reads_structured_output(langchain: ChatOpenAI, method: Literal["json_schema"]) -> None:
    structured = langchain.with_structured_output(Reply, method=method, strict=True)
    assert isinstance(structured.invoke([HumanMessage("Who are you?")]), Reply)


# -- litellm ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm_python(litellm_installation: Future[Path]) -> Path:
    return litellm_installation.result(timeout=300)


def test_litellm_completes_streams_and_calls_tools(service: Service, litellm_python: Path) -> None:
    script = Path(__file__).parent / "litellm_conversation.py"
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [litellm_python, script, service.url], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["text"] == seen["streamed"] == text_of(ask(service.client, max_tokens=32))
    assert seen["tool"]["name"] == "get_weather"
    assert seen["tool"]["arguments"]["city"] in CITIES
    assert seen["streamed_tool"] == seen["tool"]
    assert seen["after_tool"] in ("stop", "length", "tool_calls")
    assert (seen["unknown_model"], seen["bad_request"]) == ("NotFoundError", "BadRequestError")
    assert seen["long_prompt"] == "ContextWindowExceededError", "what makes its users' fallbacks to longer models work"
