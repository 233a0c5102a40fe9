"""A secret and a prompt pushed through a whole service at debug level, with crashes and failed jobs: found nowhere."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import grpc
import httpx
import openai
import psutil
import pytest

from capo.client import CapoClient, CapoClientError, Message
from capo.keys.records import NewKey
from capo.keys.store import KeyStore
from registry import EMBEDDED_MODEL_ID
from registry.principal import Scope
from tests.capo.otlp import Collector, collector
from tests.e2e.service import Service, running
from tests.soak.planted_pushes import ASKED, PROMPT, PUSHES, Pushing, operations_with_text, rows
from tune.jobs.database import Database, sqlite_url

ENDED = ("succeeded", "failed", "cancelled")


def ready(service: Service) -> bool:
    return httpx.get(f"{service.url}/readyz", trust_env=False).status_code == 200


def eventually_ready(service: Service) -> None:
    deadline = time.monotonic() + 120
    while not ready(service):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_for_spans(traces: Collector) -> None:
    """Until both sides' have come: they are sent in batches, every few seconds."""
    deadline = time.monotonic() + 30
    while not {"inference chat", "fine_tuning.attempt"} <= {span.name for span in traces.spans}:
        assert time.monotonic() < deadline, {span.name for span in traces.spans}
        time.sleep(0.2)


def refused(call: object) -> str:
    """What a request that must fail was told."""
    try:
        call()  # type: ignore[operator]
    except (openai.APIError, CapoClientError, grpc.RpcError) as error:
        return str(error)
    raise AssertionError("it was not refused")


def trained(client: openai.OpenAI, file: str, **extension: object) -> tuple[str, str]:
    """How a job ended, and all that it says of itself."""
    job = client.fine_tuning.jobs.create(
        model=EMBEDDED_MODEL_ID, training_file=file, hyperparameters={"n_epochs": 1}, extra_body={"capo": extension}
    )
    deadline = time.monotonic() + 300
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ENDED:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    events = [event.model_dump_json() for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    return job.status, job.model_dump_json() + "".join(events)


def pushed_everywhere(service: Service, key: str) -> list[str]:
    """Every operation that takes text got what is planted. What the refusals among them said."""
    assert set(PUSHES) == operations_with_text()
    shown = {"Authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=service.url, headers=shown, timeout=120, trust_env=False) as http,
        grpc.insecure_channel(service.grpc_address) as channel,
    ):
        pushing = Pushing(http, channel, key)
        for push in PUSHES.values():
            push(pushing)
    return pushing.said


def test_no_secret_and_no_prompt_is_found_anywhere_after_a_life_with_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    database = Database(sqlite_url(data_dir / "jobs.sqlite"))
    secret = KeyStore(database).create(NewKey("acme", frozenset(Scope)))
    database.close()
    said: list[str] = []
    with contextlib.ExitStack() as ends:
        traces = ends.enter_context(collector())
        monkeypatch.setenv("CAPO_OTLP_ENDPOINT", traces.endpoint)
        service = ends.enter_context(running(data_dir, "--log-level", "debug"))
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=secret.text, max_retries=0, timeout=120)
        chat = client.chat.completions
        with client, CapoClient(service.grpc_address, api_key=secret.text) as grpc_client:
            for _ in range(2):
                chat.create(model=EMBEDDED_MODEL_ID, messages=ASKED, max_tokens=8)  # type: ignore[arg-type]
                for _chunk in chat.create(model=EMBEDDED_MODEL_ID, messages=ASKED, max_tokens=8, stream=True):  # type: ignore[call-overload]
                    pass
                grpc_client.chat(EMBEDDED_MODEL_ID, [Message("user", PROMPT)])
            said += pushed_everywhere(service, secret.text)
            said.append(refused(lambda: chat.create(model="nobodys", messages=ASKED)))  # type: ignore[arg-type]
            said.append(refused(lambda: chat.create(model=EMBEDDED_MODEL_ID, messages=ASKED, n=1000)))  # type: ignore[arg-type]
            said.append(
                refused(
                    lambda: chat.create(
                        model=EMBEDDED_MODEL_ID, messages=[{"role": "user", "content": PROMPT * 99_999}]
                    )
                )
            )
            said.append(refused(lambda: client.completions.create(model=EMBEDDED_MODEL_ID, prompt=[PROMPT, 5])))  # type: ignore[list-item]
            said.append(refused(lambda: grpc_client.chat("nobodys", [Message("user", PROMPT)])))
            said.append(refused(lambda: client.files.create(file=("a.jsonl", PROMPT.encode()), purpose="fine-tune")))
            file = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune").id
            good, told = trained(client, file)
            bad, also_told = trained(client, file, lora={"target_modules": ["no_such_module"]})
            assert (good, bad) == ("succeeded", "failed")
            said += [told, also_told]
            stream = chat.create(model=EMBEDDED_MODEL_ID, messages=ASKED, max_tokens=400, stream=True)  # type: ignore[call-overload]
            next(iter(stream))
            os.kill(service.engine_pid(), signal.SIGKILL)
            with contextlib.suppress(openai.APIError, httpx.HTTPError):
                said.append(refused(lambda: list(stream)))
            eventually_ready(service)
            page = httpx.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {secret.text}"}).text
            wait_for_spans(traces)
        processes = [p for p in service.processes() if p.is_running()]
        surroundings = ""
        for process in processes:
            with contextlib.suppress(psutil.Error):
                surroundings += f"{process.cmdline()} {process.environ()}"
    kept = {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}
    of_training = {path for path in kept if {"files", "registry", "jobs"} & set(path.relative_to(data_dir).parts)}
    told_apart = {
        "errors and events": "\n".join(said),
        "log": service.log() + "\n".join(service.output),
        "metrics": page,
        "traces": traces.raw.decode("latin-1"),
        "surroundings": surroundings,
        "audit": (data_dir / "audit.jsonl").read_text() if (data_dir / "audit.jsonl").exists() else "",
        "other files": b"".join(content for path, content in kept.items() if path not in of_training).decode("latin-1"),
    }
    assert "DEBUG" in told_apart["log"] or "INFO" in told_apart["log"]
    assert secret.key_id in told_apart["metrics"]
    planted = {PROMPT, secret.text, secret.text.split("_", 2)[2]}
    assert [(place, one) for place, text in told_apart.items() for one in planted if one in text] == []
    assert [path for path, content in kept.items() if secret.text.encode() in content] == []
