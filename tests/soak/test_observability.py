"""A real Prometheus watches a real service through a day in a minute: traffic with good and bad keys, more adapters
than have series of their own, a tune job with a webhook that nobody takes, a swap, a refused adapter, an engine that is
killed. Then every panel, rule, alert and autoscaler of deploy/ has numbers to show.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import grpc
import httpx
import openai
import pytest

from capo.demo import EXAMPLES
from capo.keys.records import NewKey
from capo.keys.store import KeyStore
from capo_proto.v1 import inference_pb2, inference_pb2_grpc
from registry import BaseModel
from registry.principal import Scope
from tests.deploy.expressions import expressions
from tests.e2e.service import Service, running
from tests.serve.running import publish
from tests.soak.adapters import published
from tests.soak.figures import Figures
from tests.soak.prometheus import Prometheus, running_prometheus
from tune.jobs.database import Database, sqlite_url

pytestmark = [pytest.mark.engine, pytest.mark.training]

TENANT = "capo"
"""The service's own, which may use what belongs to no tenant."""
NOBODY_LISTENS = "http://127.0.0.1:9/hook"


def test_every_expression_has_data_after_a_workload(
    tmp_path: Path, base: BaseModel, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = made_key(tmp_path / "data")
    monkeypatch.setenv("CAPO_MAX_METRIC_ADAPTERS", "1")  # and two adapters: one of them counts as "other"
    with running(tmp_path / "data") as service:
        address = service.url.removeprefix("http://")
        with running_prometheus(tmp_path / "prometheus", {"serve": address}, credentials=key) as prometheus:
            began = time.time()
            live_a_day(service, base, key)
            time.sleep(5)
            asked = expressions()
            empty = [
                f"{expression.where}: {expression.text}"
                for expression in asked
                if not prometheus.series(without_stand_in(expression.text), since=began)
            ]
            waiting = prometheus.series("capo_webhook_deliveries_waiting", since=began)
            assert_alerts(prometheus, since=began)
    figures.record("expressions with data", expressions=len(asked), empty=len(empty))
    assert empty == []
    assert max(max(values) for values in waiting) == 1


def without_stand_in(text: str) -> str:
    """An autoscaler's query without the constant that stands in for no data, and always has some."""
    return re.sub(r"\s+or\s+vector\(0\)\s*$", "", text)


def made_key(data_dir: Path) -> str:
    """A key for everything, made before the service starts, which then asks everybody for one."""
    data_dir.mkdir()
    database = Database(sqlite_url(data_dir / "jobs.sqlite"))
    secret = KeyStore(database).create(NewKey(TENANT, frozenset(Scope)))
    database.close()
    return secret.text


def live_a_day(service: Service, base: BaseModel, key: str) -> None:
    shown = {"Authorization": f"Bearer {key}"}
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, timeout=120) as client,
        httpx.Client(base_url=service.url, headers=shown, timeout=60) as http,
        published(service.registry, base, ["swapped", "swapped", "rare"], rank=8) as (first, second, rare),
    ):
        hook = {"name": "nobody", "url": NOBODY_LISTENS, "event_types": ["fine_tuning.job.succeeded"]}
        assert http.post("/v1/webhook_endpoints", json=hook).status_code == 200
        uploaded = client.files.create(file=EXAMPLES / "support/train.jsonl", purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="capo-tiny", training_file=uploaded.id, hyperparameters={"n_epochs": 2}, suffix="watched"
        )
        refused = publish(service.registry, "refused", "these are no weights")
        service.registry.set_alias("swapped", first.revision)
        service.registry.set_alias("rare", rare.revision)
        have_traffic(service, http, key)
        answer = http.put("/v1/aliases/swapped", json={"revision": second.revision})
        assert answer.status_code == 200
        body = {"model": refused.revision, "prompt": "a"}
        assert http.post("/v1/completions", json=body).status_code == 400
        until_ended(client, job.id)
        os.kill(service.engine_pid(), signal.SIGKILL)
        while http.get("/readyz").status_code == 200:
            time.sleep(0.05)
        while http.get("/readyz").status_code != 200:
            time.sleep(0.2)
        for number in range(5):
            body = {"model": "swapped", "prompt": f"again {number}", "max_tokens": 8, "stream": True}
            assert http.post("/v1/completions", json=body).status_code == 200
            time.sleep(0.5)


def have_traffic(service: Service, http: httpx.Client, key: str) -> None:
    """Over both faces, most of it to one adapter, some to another, and some with a key that nobody has."""
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for number in range(10):
            for model in ("capo-tiny", "swapped", *(("rare",) if number % 3 == 2 else ())):
                body = {"model": model, "prompt": f"{number}", "max_tokens": 8, "stream": True}
                assert http.post("/v1/completions", json=body).status_code == 200
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}x"}).status_code == 401
            sampling = inference_pb2.Sampling(max_tokens=4)
            request = inference_pb2.CompletionRequest(model="swapped", prompt="Hello", sampling=sampling)
            stub.Complete(request, metadata=(("authorization", f"Bearer {key}"),))
            time.sleep(0.5)


def until_ended(client: openai.OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + 300
    while client.fine_tuning.jobs.retrieve(job_id).status not in ("succeeded", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def assert_alerts(prometheus: Prometheus, *, since: float) -> None:
    """Those that this day must have raised, and none that it must not."""
    fired = {
        alert
        for alert in ("CapoEngineRestarted", "CapoAdapterRefused", "CapoDown", "CapoJobStoreDown", "CapoDiskFullSoon")
        if prometheus.series(f'ALERTS{{alertname="{alert}", alertstate="firing"}}', since=since)
    }
    assert fired == {"CapoEngineRestarted", "CapoAdapterRefused"}
