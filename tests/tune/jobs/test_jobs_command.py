"""``capo jobs`` against a real service, and a real worker where a job has to move."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from capo.cli.jobs import app
from registry.errors import CapoError
from tests.tune.jobs import standins
from tests.tune.jobs.support import BASE, Place, chat_rows, preference_rows
from tests.tune.jobs.test_jobs_worker import worker


def capo_jobs(url: str, *arguments: str) -> Result:
    result = CliRunner().invoke(app, [*arguments, "--url", url])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(chat_rows(20))
    return str(path)


def test_a_job_is_created_followed_to_its_end_and_its_log_read(url: str, place: Place, rows: str) -> None:
    made = capo_jobs(
        url, "create", rows, "--model", BASE, "--suffix", "care", "--epochs", "2", "--capo", '{"priority": 3}'
    )
    job = place.store.job(made.output.strip())
    assert (job.suffix, job.hyperparameters.n_epochs, job.priority) == ("care", 2, 3)
    with worker(place, standins.trains_well):
        followed = capo_jobs(url, "follow", job.id)
    assert followed.exit_code == 0
    assert followed.output.strip().splitlines()[-1] == job.reserved_name
    assert "data read" in followed.output
    log = capo_jobs(url, "logs", job.id).output.splitlines()
    assert [line.split(maxsplit=2)[2] for line in log] == [
        event.message for event in place.store.events_since(job.id, 0)
    ]


def test_in_a_terminal_a_followed_job_has_a_bar_that_moves_with_loss_and_time_left(
    url: str, place: Place, rows: str
) -> None:
    job_id = capo_jobs(url, "create", rows, "--model", BASE).output.strip()
    with worker(place, standins.takes_long, stop_grace_seconds=8.0), followed_in_a_terminal(url, job_id) as terminal:
        first = terminal.wait_for(bar_at(r"\d+"))
        later = terminal.wait_for(bar_at(rf"(?!{first[2]}/)\d+"))
        assert int(later[2]) > int(first[2])
        assert float(later[1]) < float(first[1]), "the loss is that of the newest step"
        place.store.cancel(job_id)
        assert terminal.wait_for(r"(cancelled) ")
        assert terminal.exit_code() == 1


def bar_at(step: str) -> str:
    """One drawing of the bar: loss, step and time left are its groups."""
    return rf"running, loss (\d\.\d{{4}}) [^\r\n]*━+[^\r\n]* ({step})/1000000 (\d+:\d\d:\d\d)"


class Terminal:
    """The screen of a process on a pseudo terminal; what was waited for is not looked at again."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor
        self._text = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + 30
        while not (found := re.search(pattern, self._text)):
            assert time.monotonic() < deadline, self._text[-2000:]
            if select.select([self._descriptor], [], [], 0.1)[0]:
                colours = r"\x1b\[[0-9;?]*[A-Za-z]"
                self._text += re.sub(colours, "", os.read(self._descriptor, 65_536).decode(errors="replace"))
        self._text = self._text[found.end() :]
        return found

    def exit_code(self) -> int:
        return self._process.wait(10)


@contextmanager
def followed_in_a_terminal(url: str, job_id: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "capo", "jobs", "follow", job_id, "--url", url]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_job_is_listed_shown_paused_resumed_and_cancelled(url: str, rows: str) -> None:
    job_id = capo_jobs(url, "create", rows, "--model", BASE).output.strip()
    assert capo_jobs(url, "pause", job_id).output.strip() == "paused"
    assert capo_jobs(url, "list").output.split()[:3] == [job_id, "paused", BASE]
    assert capo_jobs(url, "resume", job_id).output.strip() == "queued"
    assert capo_jobs(url, "cancel", job_id).output.strip() == "cancelled"
    assert json.loads(capo_jobs(url, "show", job_id).output)["status"] == "cancelled"
    assert capo_jobs(url, "follow", job_id).exit_code == 1


def test_preference_rows_make_a_dpo_job(url: str, place: Place, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(preference_rows(20))
    job_id = capo_jobs(url, "create", str(path), "--model", BASE, "--method", "dpo").output.strip()
    assert place.store.job(job_id).method == "dpo"


def test_what_was_uploaded_for_a_job_that_is_refused_is_deleted_again(
    url: str, place: Place, rows: str, tmp_path: Path
) -> None:
    bad_rows = tmp_path / "bad.jsonl"
    bad_rows.write_text("{}\n")
    for wrong in (
        ("--model", "gpt-4o"),
        ("--model", BASE, "--epochs", "0"),
        ("--model", BASE, "--capo", '{"x": 1}', "--validation", rows),
        ("--model", BASE, "--validation", str(bad_rows)),
    ):
        with pytest.raises(CapoError):
            capo_jobs(url, "create", rows, *wrong)
    assert capo_jobs(url, "create", rows, "--model", BASE, "--method", "guess").exit_code == 2
    assert listed_files(url) == []
    capo_jobs(url, "create", rows, "--model", BASE)
    assert len(listed_files(url)) == 1


def listed_files(url: str) -> list[str]:
    return [file["id"] for file in httpx.get(f"{url}/v1/files").raise_for_status().json()["data"]]


def test_nothing_is_drawn_for_a_job_that_is_not_there(url: str) -> None:
    followed = CliRunner().invoke(app, ["follow", "ftjob-nothing", "--url", url])
    assert isinstance(followed.exception, CapoError)
    assert followed.output == ""


def test_refusals_come_in_the_services_own_words(url: str, rows: str) -> None:
    with pytest.raises(CapoError, match="base models: "):
        capo_jobs(url, "create", rows, "--model", "gpt-4o")
    with pytest.raises(CapoError, match="not valid JSON"):
        capo_jobs(url, "create", rows, "--model", BASE, "--capo", "{")
    with pytest.raises(CapoError, match="1e999 is too large"):
        capo_jobs(url, "create", rows, "--model", BASE, "--capo", '{"validation_share": 1e999}')
    with pytest.raises(CapoError, match="no fine-tuning job"):
        capo_jobs(url, "show", "ftjob-nothing")
    with pytest.raises(CapoError, match="capo serve"):
        capo_jobs("http://127.0.0.1:9", "list")
