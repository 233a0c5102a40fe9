"""What commands print is what they were given, whatever Rich would make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import capo.cli
from capo.cli import jobs
from capo.cli import registry as registry_cli
from registry import Registry
from tests.capo.answering import answering
from tests.serve.running import publish

ROCKET = "ft:capo-tiny:capo:rocket:k3j2h1g0"


@pytest.mark.parametrize("name", ["[/x].jsonl", "run[bold]1.jsonl", ":rocket:.jsonl", f"{'long' * 30} name.jsonl"])
def test_an_error_quotes_what_was_given_and_is_one_line(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "capo", "data", "check", name], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert name in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    done = CliRunner().invoke(capo.cli.app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"capo {project['version']}\n")


def test_an_error_names_an_extra_as_it_is_installed() -> None:
    environment = os.environ | {"CAPO_DATABASE_URL": "mysql://user:password@host/database"}
    done = subprocess.run(
        [sys.executable, "-m", "capo", "keys", "list"], capture_output=True, text=True, env=environment
    )
    assert "pip install 'capo-llm[postgres]'" in done.stderr


def test_a_name_that_reads_like_an_emoji_is_printed_as_it_is(tmp_path: Path) -> None:
    job = {"id": "ftjob-1", "status": "succeeded", "model": "capo-tiny", "fine_tuned_model": ROCKET}
    with answering(json.dumps({"data": [job | {"capo": {"paused": False}}]}).encode()) as (url, _):
        listed = CliRunner().invoke(jobs.app, ["list", "--url", url])
    assert listed.stdout == f"ftjob-1  succeeded  capo-tiny  {ROCKET}\n"


def test_a_table_in_a_pipe_breaks_no_name(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "a-name-of-forty-letters-which-is-allowed-1")
    registry.set_alias(ROCKET, artifact.revision)
    listed = CliRunner().invoke(registry_cli.app, ["list", "--registry", str(tmp_path)], env={"COLUMNS": "80"})
    (row,) = [line for line in listed.stdout.splitlines() if artifact.revision in line]
    assert ROCKET in row
