"""One line to an event, with the request and the trace it belongs to, and without what anybody sent."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest

from capo.log_format import LogFormat, LogLevel
from capo.logs import JsonLines, TextLines, library_environment
from registry import errors
from serve import faces
from tests.capo.guarded import guarded
from tests.capo.log_capture import logged
from tests.capo.test_leaks import CHAT, HELLO, break_engine

SECRET = "canaryprompt7f3a"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACED = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "x-request-id": "mine-1"}


@pytest.fixture(params=[JsonLines(), TextLines()])
def formatter(request: pytest.FixtureRequest) -> logging.Formatter:
    given: logging.Formatter = request.param
    return given


async def test_every_line_of_a_request_says_which_and_of_which_trace(
    tmp_path: Path, formatter: logging.Formatter
) -> None:
    async with guarded(tmp_path) as service:
        break_engine(service, lambda: RuntimeError("a bug"), after=0)
        with logged(formatter, logging.WARNING) as kept:
            await service.ask("POST /v1/chat/completions", None, json=HELLO, headers=TRACED)
            await service.ask("POST /v1/chat/completions", None, json=HELLO | {"stream": True}, headers=TRACED)
            call = service.channel.unary_unary("/capo.v1.Inference/Chat")
            with pytest.raises(Exception, match="internal error"):
                await call(CHAT.SerializeToString(), metadata=tuple(TRACED.items()), timeout=5)
    if isinstance(formatter, JsonLines):
        lines = [json.loads(line) for line in kept.getvalue().splitlines()]
        assert len([line for line in lines if not line["logger"].startswith("uvicorn")]) == 3
        assert {(line["request_id"], line["trace_id"], line["level"]) for line in lines} == {
            ("mine-1", TRACE_ID, "error")
        }
        assert all("Traceback" in line["exception"] for line in lines)
    else:
        heads = [line for line in kept.getvalue().splitlines() if " ERROR " in line]
        assert len([line for line in heads if " uvicorn" not in line]) == 3
        assert all("mine-1" in line and f"trace_id={TRACE_ID}" in line for line in heads)


async def test_a_request_that_succeeds_says_nothing(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        with logged(JsonLines()) as kept:
            whole = await service.ask("POST /v1/chat/completions", None, json=HELLO)
            stream = await service.ask("POST /v1/chat/completions", None, json=HELLO | {"stream": True})
            called = await service.ask("/capo.v1.Inference/Chat", None, message=CHAT.SerializeToString())
    assert (whole.status, stream.status, called.status) == (200, 200, "OK")
    lines = [json.loads(line) for line in kept.getvalue().splitlines()]
    assert [line for line in lines if line["logger"].partition(".")[0] in ("capo", "serve", "tune", "registry")] == []


@pytest.fixture
def in_a_request() -> Iterator[None]:
    token = faces.current_request_id.set("mine-1")
    yield
    faces.current_request_id.reset(token)


def test_an_exception_that_quotes_what_it_was_given_is_told_without_its_words(formatter: logging.Formatter) -> None:
    with logged(formatter) as kept:
        try:
            try:
                pydantic.TypeAdapter(int).validate_python(SECRET)
            except pydantic.ValidationError as error:
                raise ValueError(f"wrapped: {error}") from error
        except ValueError:
            logging.getLogger("serve.test").exception("a body was not liked")
    assert SECRET not in kept.getvalue()
    assert "ValueError" in kept.getvalue()
    assert "a body was not liked" in kept.getvalue()


@pytest.mark.usefixtures("in_a_request")
def test_in_a_request_the_kinds_and_frames_of_all_exceptions_are_told_and_the_words_of_our_own(
    formatter: logging.Formatter,
) -> None:
    with logged(formatter) as kept:
        try:
            try:
                raise KeyError(SECRET)
            except KeyError as error:
                raise errors.UnavailableError("the store is away") from error
        except errors.UnavailableError:
            logging.getLogger("serve.test").exception("it failed")
    told = kept.getvalue()
    assert SECRET not in told
    assert "builtins.KeyError: its text is left out" in told
    assert "UnavailableError: the store is away" in told
    assert told.index("KeyError:") < told.index("the store is away")
    assert told.count("test_logs.py") == 2


@pytest.mark.usefixtures("in_a_request")
def test_what_our_own_errors_say_of_a_request_is_left_out_too(formatter: logging.Formatter) -> None:
    with logged(formatter) as kept:
        try:
            raise errors.InvalidRequestError(f"model is {SECRET}")
        except errors.InvalidRequestError:
            logging.getLogger("serve.test").exception("it failed")
    assert SECRET not in kept.getvalue()


def test_outside_of_requests_an_exception_keeps_its_words(formatter: logging.Formatter) -> None:
    with logged(formatter) as kept:
        try:
            raise OSError("the disk is full")
        except OSError:
            logging.getLogger("serve.test").exception("it failed")
    assert "OSError: the disk is full" in kept.getvalue()


async def test_a_task_that_fails_and_that_nobody_waits_for_is_told_without_its_words(
    formatter: logging.Formatter,
) -> None:
    async def fail() -> None:
        raise RuntimeError(SECRET)

    with logged(formatter) as kept:
        task = asyncio.create_task(fail())
        await asyncio.wait((task,))
        del task
        gc.collect()
    assert "Task exception was never retrieved" in kept.getvalue()
    assert "RuntimeError" in kept.getvalue()
    assert SECRET not in kept.getvalue()


def test_a_line_of_json_is_one_line_whatever_is_in_it() -> None:
    with logged(JsonLines()) as kept:
        logging.getLogger("capo.test").warning("one\ntwo \x1b[31m %s", "\u2028three")
    (line,) = kept.getvalue().splitlines()
    assert json.loads(line)["message"] == "one\ntwo \x1b[31m \u2028three"


def test_warnings_and_foreign_loggers_are_json_too() -> None:
    script = (
        "import warnings, logging; from capo.log_format import LogFormat, LogLevel\n"
        "from capo.logs import configure_logging\n"
        "configure_logging(LogLevel.INFO, LogFormat.JSON); warnings.warn('careful')\n"
        "logging.getLogger('uvicorn').error('foreign'); logging.getLogger('uvicorn').info('chatter')\n"
        "logging.getLogger('capo.x').info('ours')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in lines] == ["py.warnings", "uvicorn", "capo.x"]


class TestLibraries:
    def test_are_quiet_about_a_start_that_goes_well_unless_everything_is_asked_for(self) -> None:
        assert (
            library_environment(LogLevel.INFO, LogFormat.TEXT, {})["PYTHONWARNINGS"]
            == "ignore:resource_tracker:UserWarning"
        )
        assert "VLLM_LOGGING_LEVEL" not in library_environment(LogLevel.INFO, LogFormat.TEXT, {})
        assert library_environment(LogLevel.DEBUG, LogFormat.TEXT, {})["VLLM_LOGGING_LEVEL"] == "INFO"

    def test_what_the_operator_set_stays(self) -> None:
        given = {"PYTHONWARNINGS": "error", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_LOGGING_CONFIG_PATH": "mine.json"}
        assert library_environment(LogLevel.INFO, LogFormat.TEXT, given) == {}
        assert library_environment(LogLevel.DEBUG, LogFormat.TEXT, given) == {}

    @pytest.mark.parametrize("log_format", LogFormat)
    def test_vllm_speaks_like_capo_in_all_its_processes(self, log_format: LogFormat) -> None:
        path = library_environment(LogLevel.INFO, log_format, {})["VLLM_LOGGING_CONFIG_PATH"]
        script = (
            "import json, logging.config, sys; logging.config.dictConfig(json.load(open(sys.argv[1])))\n"
            "from serve import faces; faces.current_request_id.set('mine-1')\n"
            "vllm = logging.getLogger('vllm.engine'); vllm.info('chatter')\n"
            f"try: raise ValueError({SECRET!r})\nexcept ValueError: vllm.exception('it died')"
        )

        def said(**environment: str) -> str:
            command = [sys.executable, "-c", script, path]
            return subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
            ).stderr

        first, *_ = said().splitlines()
        told = json.loads(first)["message"] if log_format is LogFormat.JSON else first
        assert "it died" in told
        assert SECRET not in said()
        assert "chatter" not in said()
        assert "chatter" in said(VLLM_LOGGING_LEVEL="INFO")

    @pytest.mark.parametrize("log_format", LogFormat)
    def test_vllm_says_nothing_of_a_stream_that_capo_refused_unless_it_is_a_bug_of_ours(
        self, log_format: LogFormat
    ) -> None:
        path = library_environment(LogLevel.INFO, log_format, {})["VLLM_LOGGING_CONFIG_PATH"]
        script = (
            "import json, logging.config, sys; logging.config.dictConfig(json.load(open(sys.argv[1])))\n"
            "from registry import errors\n"
            "vllm = logging.getLogger('vllm.entrypoints.openai.completion.serving')\n"
            "for kind in (errors.InvalidRequestError, errors.UnavailableError, errors.InternalError, KeyError):\n"
            "    try: raise kind('a')\n"
            "    except Exception: vllm.exception('Error in a stream of %s.', kind.__name__)"
        )
        said = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True).stderr
        told = [each for each in ("Invalid", "Unavailable", "Internal", "Key") if f"stream of {each}" in said]
        assert told == ["Internal", "Key"]
        assert "InvalidRequestError" not in said
