"""The commands that ask a running service: with which key, and what they say of answers that are no Capo's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from capo.cli import chat, jobs, webhooks
from capo.keys.secret import new_secret
from registry.errors import InvalidRequestError, UnavailableError
from tests.capo.answering import answering
from tests.capo.guarded import guarded


async def test_a_conversation_shows_a_service_the_key_of_the_environment(tmp_path: Path) -> None:
    async with guarded(tmp_path) as place:
        key = place.key()
        app = typer.Typer()
        chat.add_to(app)
        arguments = ["--address", f"127.0.0.1:{place.grpc_port}", "--message", "hello"]

        def ask(given: str) -> Any:
            return CliRunner().invoke(app, arguments, env={"CAPO_API_KEY": given})

        refused = await asyncio.to_thread(ask, "")
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "key" in refused.stderr
        for given in (key.text, f"{key.text}\n"):
            answered = await asyncio.to_thread(ask, given)
            assert (answered.exit_code, set(answered.stdout.split())) == (0, {"base"}), "the fake engine's words"


@pytest.mark.parametrize("key", ["sk-sécret", "sk-secret\nsk-secret", "sk-secret\x7f"])
def test_what_is_no_key_is_refused_without_being_quoted(key: str) -> None:
    done = CliRunner().invoke(jobs.app, ["list", "--url", "http://127.0.0.1:9"], env={"CAPO_API_KEY": key})
    assert isinstance(done.exception, InvalidRequestError)
    assert "CAPO_API_KEY" in done.exception.message
    assert "cret" not in f"{done.exception.message}{done.output}"


def test_a_key_read_from_a_file_may_end_in_a_newline() -> None:
    with answering(b'{"data": []}') as (url, shown):
        done = CliRunner().invoke(jobs.app, ["list", "--url", url], env={"CAPO_API_KEY": "capo_1_2\n"})
    assert (done.exit_code, shown) == (0, ["Bearer capo_1_2"])


@pytest.mark.parametrize(
    "body",
    [
        "<html>hello</html>",
        "",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"data": "jobs"}',
        '{"data": {"id": "ftjob-1"}}',
        '{"data": ["ftjob-1"], "has_more": false}',
        '{"data": [{"id": "ftjob-1", "status": "queued", "model": "g", "fine_tuned_model": null}], "has_more": false}',
        "\xff",
    ],
)
def test_an_answer_of_something_else_says_whose_it_is(body: str) -> None:
    with answering(body.encode("latin-1")) as (url, _):
        for app, arguments in ((jobs.app, ["list"]), (jobs.app, ["logs", "ftjob-1"]), (webhooks.app, ["list"])):
            done = CliRunner().invoke(app, [*arguments, "--url", url])
            assert isinstance(done.exception, UnavailableError), done.exception
            assert done.exception.message.startswith(f"{url}/v1/")
            assert "is no Capo" in done.exception.message


@pytest.mark.parametrize("app", [jobs.app, webhooks.app])
async def test_who_shows_no_key_or_a_wrong_one_learns_where_commands_take_it_from(
    tmp_path: Path, app: typer.Typer
) -> None:
    assert "CAPO_API_KEY" in CliRunner().invoke(app, ["--help"]).output
    async with guarded(tmp_path) as place:
        place.key()
        url = f"http://127.0.0.1:{place.port}"
        for given in ("", new_secret().text):
            ask = [app, ["list", "--url", url]]
            done: Any = await asyncio.to_thread(CliRunner().invoke, *ask, env={"CAPO_API_KEY": given})
            assert isinstance(done.exception, InvalidRequestError)
            assert done.exception.message.endswith("A service with keys is asked with that of CAPO_API_KEY.")


def test_a_service_that_failed_did_not_refuse() -> None:
    with answering(b'{"error": {"message": "the job store does not answer"}}', status=503) as (url, _):
        done = CliRunner().invoke(jobs.app, ["list", "--url", url])
    assert isinstance(done.exception, UnavailableError)
    assert done.exception.message == "the job store does not answer"


@pytest.mark.parametrize("body", ["<html>no</html>", "[]", '{"error": "no"}', '{"error": null}', "{}"])
def test_a_refusal_in_nobodys_words_tells_its_status(body: str) -> None:
    with answering(body.encode(), status=404) as (url, _):
        done = CliRunner().invoke(jobs.app, ["show", "ftjob-1", "--url", url])
    assert isinstance(done.exception, InvalidRequestError)
    assert done.exception.message == f"HTTP 404 from {url}/v1/fine_tuning/jobs/ftjob-1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["list", "--url", "http://[::1"], "'http://[::1' is no address"), (["show", "a\nb"], "can be no address")],
)
def test_what_is_no_address_is_refused_before_anything_is_sent(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(jobs.app, arguments)
    assert isinstance(done.exception, InvalidRequestError)
    assert says in done.exception.message
