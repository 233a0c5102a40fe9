"""What :mod:`serve.engine_api` promises of every engine, as checks that raise AssertionError where it is not kept.

test_engine_contract.py runs them over the engine that injects faults and, by way of engine_runs.py, over vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from registry import errors
from serve.engine_api import Call, Endpoint, Engine, EngineAdapter

NUM_TOKENS = 4
"""Of every short answer. A longer one takes a real engine long enough to be met at work."""
NUM_TOKENS_OF_LONG = 400
ANSWER_MODEL = "the-name-that-was-asked-for"


@dataclass(frozen=True)
class Subject:
    """A started engine and what it can be given. ``hold`` keeps an engine from ending answers that take no time."""

    engine: Engine
    adapters: tuple[EngineAdapter, EngineAdapter]
    refused: EngineAdapter
    hold: Callable[[], AbstractContextManager[None]]


Check = Callable[[Subject], Awaitable[None]]
_checks: list[Check] = []


def check(function: Check) -> Check:
    _checks.append(function)
    return function


async def broken_promises(subject: Subject) -> dict[str, str | None]:
    """By check, in the order of this module: what it found, or ``None``. The last ones end the engine."""
    found: dict[str, str | None] = {}
    for function in _checks:
        try:
            async with asyncio.timeout(120):
                await function(subject)
        except Exception as error:
            found[function.__name__] = f"{type(error).__name__}: {error}"
        else:
            found[function.__name__] = None
    return found


def names() -> list[str]:
    return [function.__name__ for function in _checks]


# -- adapters ----------------------------------------------------------------------------------------------------


@check
async def limits_are_known_once_it_has_started(subject: Subject) -> None:
    limits = subject.engine.limits
    assert limits.max_loras >= 2
    assert min(limits.max_lora_rank, limits.max_model_len, limits.vocab_size) > 0
    assert not subject.engine.is_dead


@check
async def it_holds_what_was_loaded_and_not_what_was_unloaded(subject: Subject) -> None:
    engine, (one, other) = subject.engine, subject.adapters
    assert await engine.loaded_engine_ids() == frozenset()
    await engine.load_adapter(one)
    await engine.load_adapter(other)
    assert await engine.loaded_engine_ids() == {one.engine_id, other.engine_id}
    await engine.unload_adapter(one)
    assert await engine.loaded_engine_ids() == {other.engine_id}
    await engine.unload_adapter(other)
    assert await engine.loaded_engine_ids() == frozenset()


@check
async def of_an_adapter_that_it_refuses_nothing_stays(subject: Subject) -> None:
    await raises(errors.InvalidArtifactError, subject.engine.load_adapter(subject.refused))
    assert await subject.engine.loaded_engine_ids() == frozenset()
    assert not subject.engine.is_dead


# -- answers -----------------------------------------------------------------------------------------------------


@check
async def every_form_of_an_answer_has_the_same_text_and_model(subject: Subject) -> None:
    async with loaded(subject) as adapter:
        for used in (None, adapter):
            whole = json.loads(await subject.engine.complete(chat(used)))
            events = [event async for event in subject.engine.stream(chat(used, stream=True))]
            text = whole["choices"][0]["message"]["content"]
            assert text
            assert all(event.endswith("\n\n") for event in events)
            assert events[-1] == "data: [DONE]\n\n"
            chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
            assert "".join(delta(chunk) for chunk in chunks) == text
            assert {chunk["model"] for chunk in chunks} == {whole["model"]} == {ANSWER_MODEL}
            streamed = [piece async for piece in subject.engine.pieces(chat(used, stream=True))]
            assert "".join(piece.text for piece in streamed) == text
            assert [piece.finish_reason for piece in streamed if piece.finish_reason] != []
            at_once = [piece async for piece in subject.engine.pieces(chat(used))]
            assert [(piece.index, piece.text) for piece in at_once] == [(0, text)]
            assert sum(len(piece.token_ids) for piece in streamed) == len(at_once[0].token_ids) == NUM_TOKENS


@check
async def a_call_says_afterwards_what_became_of_it(subject: Subject) -> None:
    for form in ("whole", "stream", "pieces"):
        counted: list[int] = []
        call = chat(None, stream=form != "whole", on_tokens=lambda _, number, counted=counted: counted.append(number))
        began = time.monotonic()
        if form == "whole":
            usage = json.loads(await subject.engine.complete(call))["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (call.prompt_tokens, NUM_TOKENS)
        else:
            async with aclosing(getattr(subject.engine, form)(call)) as answer:
                assert [piece async for piece in answer]
        assert call.completion_tokens == sum(counted) == NUM_TOKENS, form
        assert call.prompt_tokens > 0
        assert call.finish_reasons in (["length"], ["stop"])
        assert call.first_token_at is not None
        assert call.last_token_at is not None
        assert began <= call.first_token_at <= call.last_token_at <= time.monotonic()
        assert call.queued_seconds is not None
        assert call.error is None
        assert call.was_in_engine


@check
async def tokens_of_a_text_are_the_text_again(subject: Subject) -> None:
    text = "In the village there is a mill."
    tokens = json.loads(await subject.engine.convert_tokens(Endpoint.TOKENIZE, {"prompt": text}))["tokens"]
    assert tokens
    back = await subject.engine.convert_tokens(Endpoint.DETOKENIZE, {"tokens": tokens})
    assert text in json.loads(back)["prompt"]  # a tokenizer may put its mark of a beginning before it


@check
async def a_probe_has_the_same_tokens_each_time(subject: Subject) -> None:
    async with loaded(subject) as adapter:
        for used in (None, adapter):
            first, second = [
                await subject.engine.generate_greedy([5, 6, 7], max_tokens=NUM_TOKENS, adapter=used) for _ in range(2)
            ]
            assert first == second
            assert 0 < len(first) <= NUM_TOKENS


@check
async def it_says_what_bodies_it_takes(subject: Subject) -> None:
    for endpoint in (Endpoint.CHAT, Endpoint.COMPLETION, Endpoint.RESPONSES):
        assert "model" in subject.engine.body_schema(endpoint)["properties"]


# -- work, and its end -------------------------------------------------------------------------------------------


@check
async def work_is_seen_while_it_is_owed_and_steps_when_it_is_done(subject: Subject) -> None:
    assert not subject.engine.has_work
    before = subject.engine.last_progress_at
    with subject.hold():
        answering = asyncio.create_task(subject.engine.complete(chat(None, num_tokens=NUM_TOKENS_OF_LONG)))
        await until(lambda: subject.engine.has_work)
    await answering
    await until(lambda: not subject.engine.has_work)
    assert subject.engine.last_progress_at > before


@check
async def adapters_that_come_and_go_are_progress(subject: Subject) -> None:
    engine, adapter = subject.engine, subject.adapters[0]
    before = engine.last_progress_at
    await engine.load_adapter(adapter)
    loaded_at = engine.last_progress_at
    await engine.unload_adapter(adapter)
    unloaded_at = engine.last_progress_at
    await raises(errors.InvalidArtifactError, engine.load_adapter(subject.refused))
    assert before < loaded_at < unloaded_at < engine.last_progress_at <= time.monotonic()


@check
async def a_stream_that_is_closed_is_no_work_any_more(subject: Subject) -> None:
    for form in ("stream", "pieces"):
        answer = getattr(subject.engine, form)(chat(None, num_tokens=NUM_TOKENS_OF_LONG, stream=True))
        await anext(answer)
        await answer.aclose()
        await until(lambda: not subject.engine.has_work, seconds=1)
    assert json.loads(await subject.engine.complete(chat(None)))["choices"]


@check
async def what_was_made_of_an_answer_that_is_cut_off_is_counted(subject: Subject) -> None:
    engine, prompt = subject.engine, "In the village"
    num_prompt_tokens = len(json.loads(await engine.convert_tokens(Endpoint.TOKENIZE, {"prompt": prompt}))["tokens"])

    async def read(call: Call) -> None:
        assert [piece async for piece in engine.pieces(call)]

    for ask, num_prompts in ((engine.complete, 1), (engine.complete, 2), (read, 1)):
        body = {"prompt": [prompt] * num_prompts, "n": 2, "max_tokens": NUM_TOKENS_OF_LONG, "ignore_eos": True}
        call = Call(Endpoint.COMPLETION, body, None, ANSWER_MODEL, "cut-off")
        answering = asyncio.create_task(ask(call))
        await some_steps(engine, answering)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        assert call.was_in_engine
        assert call.completion_tokens > 0, (ask, num_prompts)
        assert 0 < call.prompt_tokens <= num_prompts * num_prompt_tokens, (ask, num_prompts)
        assert call.first_token_at is not None
        assert call.queued_seconds is not None
        await until(lambda: not engine.has_work)


@check
async def a_killed_engine_cuts_its_streams_says_so_and_can_be_started_again(subject: Subject) -> None:
    engine = subject.engine
    before = json.loads(await engine.complete(chat(None)))["choices"]
    await engine.load_adapter(subject.adapters[0])
    with subject.hold():
        cut = [begun(engine, form) for form in ("stream", "pieces")]
        await until(lambda: engine.has_work)
        await engine.kill()
    for events in cut:
        await raises(errors.EngineDeadError, events)
    assert (engine.is_dead, engine.has_work) == (True, False)
    await raises(errors.EngineDeadError, engine.check(chat(None)))
    await raises(errors.EngineDeadError, engine.complete(chat(None)))
    await raises(errors.EngineDeadError, anext(engine.stream(chat(None, stream=True))))
    await raises(errors.EngineDeadError, anext(engine.pieces(chat(None))))
    await raises(errors.EngineDeadError, engine.load_adapter(subject.adapters[1]))
    await raises(errors.EngineDeadError, engine.loaded_engine_ids())
    await raises(errors.EngineDeadError, engine.generate_greedy([5], max_tokens=1, adapter=None))
    await engine.start()
    assert not engine.is_dead
    assert await engine.loaded_engine_ids() == frozenset()
    assert json.loads(await engine.complete(chat(None)))["choices"] == before


@check
async def a_stopped_engine_leaves_nobody_waiting(subject: Subject) -> None:
    with subject.hold():
        cut = begun(subject.engine, "stream")
        await until(lambda: subject.engine.has_work)
        await subject.engine.stop(0)
    await raises(errors.CapoError, cut)
    assert (subject.engine.is_dead, subject.engine.has_work) == (True, False)


# -- helpers -----------------------------------------------------------------------------------------------------


def chat(adapter: EngineAdapter | None, *, num_tokens: int = NUM_TOKENS, stream: bool = False, **more: Any) -> Call:
    body = {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    return Call(Endpoint.CHAT, body, adapter, ANSWER_MODEL, f"request-{time.monotonic_ns()}", **more)


def delta(chunk: dict[str, Any]) -> str:
    return str(chunk["choices"][0]["delta"].get("content") or "") if chunk["choices"] else ""


def begun(engine: Engine, form: str) -> asyncio.Task[list[Any]]:
    """Reads a long answer to its end, which must not look like one."""

    async def read() -> list[Any]:
        call = chat(None, num_tokens=NUM_TOKENS_OF_LONG, stream=True)
        return [event async for event in getattr(engine, form)(call)]

    return asyncio.create_task(read())


async def some_steps(engine: Engine, answering: asyncio.Task[Any]) -> None:
    """More than one: the first that is seen may be an earlier request's last."""
    for _ in range(5):
        before = engine.last_progress_at
        await until(lambda before=before: answering.done() or engine.last_progress_at > before)


@asynccontextmanager
async def loaded(subject: Subject) -> AsyncIterator[EngineAdapter]:
    """An adapter of the subject's, for the time of the block."""
    adapter = subject.adapters[0]
    await subject.engine.load_adapter(adapter)
    try:
        yield adapter
    finally:
        await subject.engine.unload_adapter(adapter)


async def raises(kind: type[Exception], doing: Awaitable[Any]) -> None:
    try:
        result = await doing
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}, but {result!r}")


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@contextmanager
def no_hold() -> Iterator[None]:
    """For an engine that takes its time by itself."""
    yield
