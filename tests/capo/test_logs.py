"""One line to an event, with the request and the trace it belongs to, and without what anybody sent."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydantic
import pytest

from capo.log_format import LogFormat
from capo.logs import JsonLines, TextLines, library_environment
from tests.capo.guarded import guarded
from tests.capo.test_leaks import CHAT, HELLO, break_engine

SECRET = "canaryprompt7f3a"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACED = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "x-request-id": "mine-1"}


@contextmanager
def logged(formatter: logging.Formatter, level: int = logging.INFO) -> Iterator[io.StringIO]:
    """What Capo's rooms say, in this form."""
    kept = io.StringIO()
    handler = logging.StreamHandler(kept)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield kept
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
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


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
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


def test_a_line_of_json_is_one_line_whatever_is_in_it() -> None:
    with logged(JsonLines()) as kept:
        logging.getLogger("capo.test").warning("one\ntwo \x1b[31m %s", "\u2028three")
    (line,) = kept.getvalue().splitlines()
    assert json.loads(line)["message"] == "one\ntwo \x1b[31m \u2028three"


def test_warnings_and_foreign_loggers_are_json_too() -> None:
    script = (
        "import warnings, logging; from capo.log_format import LogFormat; from capo.logs import configure_logging\n"
        "configure_logging('info', LogFormat.JSON); warnings.warn('careful')\n"
        "logging.getLogger('uvicorn').error('foreign'); logging.getLogger('uvicorn').info('chatter')\n"
        "logging.getLogger('capo.x').info('ours')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in lines] == ["py.warnings", "uvicorn", "capo.x"]


class TestLibraries:
    def test_are_quiet_about_a_start_that_goes_well_unless_everything_is_asked_for(self) -> None:
        quiet = library_environment("info", LogFormat.TEXT, {})
        assert quiet == {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}
        assert library_environment("debug", LogFormat.TEXT, {}) == {"VLLM_LOGGING_LEVEL": "INFO"}

    def test_what_the_operator_set_stays(self) -> None:
        given = {"PYTHONWARNINGS": "error", "VLLM_LOGGING_LEVEL": "DEBUG"}
        assert library_environment("info", LogFormat.TEXT, given) == {}
        assert library_environment("debug", LogFormat.TEXT, given) == {}

    def test_vllm_speaks_json_in_all_its_processes(self) -> None:
        path = library_environment("info", LogFormat.JSON, {})["VLLM_LOGGING_CONFIG_PATH"]
        script = (
            "import json, logging.config, sys; logging.config.dictConfig(json.load(open(sys.argv[1])))\n"
            "logging.getLogger('vllm.engine').error('it died'); logging.getLogger('vllm.engine').info('chatter')"
        )
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
        (line,) = done.stderr.splitlines()
        assert json.loads(line)["message"] == "it died"
