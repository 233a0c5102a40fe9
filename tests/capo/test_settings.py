"""Settings that are wrong are refused with what to do, and settings that are right are taken as they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from capo.cli import keys
from capo.cli.serve import read_settings
from capo.log_format import LogLevel
from registry.errors import InvalidRequestError
from tune.jobs.database import Database


@pytest.mark.parametrize("level", ["verbose", "", "20", "critical"])
def test_a_log_level_that_is_none_is_refused_with_those_that_there_are(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPO_LOG_LEVEL", level)
    with pytest.raises(InvalidRequestError, match=r"log_level.*'debug', 'info', 'warning' or 'error'") as caught:
        read_settings()
    assert repr(level) in caught.value.message


@pytest.mark.parametrize("level", ["warning", "WARNING", "Warning"])
def test_a_log_level_may_have_capitals(level: str) -> None:
    assert read_settings(log_level=level).log_level is LogLevel.WARNING


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_process_that_logs_says_in_one_line_that_it_has_no_such_level(command: str, tmp_path: Path) -> None:
    arguments = [command, "--log-level", "verbose", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-m", "capo", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: setting log_level: ")


@pytest.mark.parametrize("name", ["a-file", "nothing"])
def test_secrets_that_are_in_no_directory_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("CAPO_SECRETS_DIR", str(tmp_path / name))
    with pytest.raises(InvalidRequestError, match=f"CAPO_SECRETS_DIR=.*{name} is no directory"):
        read_settings()


def test_settings_are_read_from_the_files_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "capo_log_level").write_text("error")
    monkeypatch.setenv("CAPO_SECRETS_DIR", str(tmp_path))
    assert read_settings().log_level is LogLevel.ERROR


@pytest.mark.parametrize("url", ["postgresql+psycopg://capo:pass@host:port/capo", "postgresql", "://"])
def test_a_job_store_that_no_url_names_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="URL cannot be read") as caught:
        Database(url)
    assert "pass" not in caught.value.message.replace("user:password@host", "")


@pytest.mark.parametrize("limit", ["--requests-per-minute", "--tokens-per-minute", "--concurrency"])
def test_a_limit_that_no_database_holds_makes_no_key(limit: str, tmp_path: Path) -> None:
    place = ["--data-dir", str(tmp_path)]
    refused = CliRunner().invoke(keys.app, ["create", "--scope", "infer", limit, "9" * 23, *place])
    assert refused.exit_code == 2, refused.exception
    assert limit in refused.stderr
    assert CliRunner().invoke(keys.app, ["list", *place]).stdout == ""
