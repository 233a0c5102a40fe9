"""Roles: what a control process and a replica do, and what they leave to the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capo.cli.serve import read_settings
from capo.roles import Role
from capo.settings import Settings
from registry import Registry, locate_base_model
from registry.errors import InvalidRequestError
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import eventually, publish, running_service
from tests.soak.adapters import publish_random


def test_a_control_process_does_all_but_inference_and_imports_no_engine(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    good = publish_random(registry, locate_base_model("capo-tiny"), "support", rank=4, seed=1)
    bad = publish(registry, "bad", "these are no weights")
    done = subprocess.run(
        [sys.executable, "-m", "tests.capo.control_process", str(tmp_path), good.revision, bad.revision],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("CAPO_")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "job": "queued",
        "chat": "unknown_url",
        "flip": [200, False],
        "refused": [400, found["refused"][1]],
        "models": ["capo-tiny", "support"],
        "probes": {"/startupz": 200, "/livez": 200, "/readyz": 200},
        "queued": "1.0",
        "refused_while_draining": [503, "draining"],
        "probes_while_draining": {"/livez": 200, "/readyz": 503, "/metrics": 200},
        "upload_through_the_end": 200,
        "imported": [],
    }


async def test_a_replica_follows_a_registry_that_it_cannot_write(tmp_path: Path) -> None:
    writer = Registry(tmp_path / "registry")
    first, second = publish(writer, "support", "one"), publish(writer, "support", "two")
    writer.set_alias("support", first.revision)
    async with running_service(FakeEngine(), tmp_path / "registry", read_only=True) as (client, service):
        for method, path, body in (
            ("PUT", "/v1/aliases/support", {"revision": second.revision}),
            ("POST", "/v1/aliases/support/rollback", None),
            ("DELETE", "/v1/aliases/support", None),
            ("DELETE", "/v1/models/support", None),
        ):
            answer = await client.request(method, path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (403, "registry_is_read_only"), path
            assert "capo serve --role control" in error["message"]
        writer.set_alias("support", second.revision)
        await eventually(lambda: service.catalog.snapshot.aliases["support"].revision == second.revision)
        answer = await client.post("/v1/completions", json={"model": "support", "prompt": "a"})
        assert answer.json()["model"] == second.revision


def test_local_workers_belong_to_a_process_that_has_jobs() -> None:
    assert Settings().num_workers == 1
    assert Settings(role=Role.CONTROL).num_workers == 0
    assert Settings(role=Role.CONTROL, workers=2).num_workers == 2
    with pytest.raises(InvalidRequestError, match=r"workers=1 .* role=infer"):
        read_settings(role="infer", workers=1)


def test_an_unknown_role_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"setting role: .*'all', 'infer' or 'control'.*got 'serve'"):
        read_settings(role="serve")


def test_settings_come_from_secret_files_after_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes mounts them: each file is called like its variable, beside names that begin with two dots."""
    (tmp_path / "..data").mkdir()
    (tmp_path / "capo_database_url").write_text("postgresql+psycopg://capo:secret@db/capo\n")
    (tmp_path / "capo_organization").write_text("from-file")
    monkeypatch.setenv("CAPO_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("CAPO_ORGANIZATION", "from-environment")
    settings = read_settings()
    assert settings.database_url == "postgresql+psycopg://capo:secret@db/capo"
    assert settings.organization == "from-environment"
