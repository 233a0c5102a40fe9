"""A real Prometheus watches a real service through a day in a minute: traffic, a tune job, a swap, a refused adapter,
an engine that is killed. Then every panel, rule, alert and autoscaler of deploy/ has numbers to show.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import grpc
import httpx
import pytest

from capo.demo import EXAMPLES
from capo_proto.v1 import inference_pb2, inference_pb2_grpc
from registry import BaseModel
from tests.deploy.expressions import expressions
from tests.e2e.service import Service, running
from tests.serve.running import publish
from tests.soak.adapters import published
from tests.soak.figures import Figures
from tests.soak.prometheus import Prometheus, running_prometheus

pytestmark = [pytest.mark.engine, pytest.mark.training]

# Needs more adapters than have series of their own, or a key, which this service does not ask for.
WITHOUT_DATA = {"CapoAdaptersWithoutSeries", "CapoKeyRefusals"}


def test_every_expression_has_data_after_a_workload(tmp_path: Path, base: BaseModel, figures: Figures) -> None:
    with running(tmp_path / "data") as service:
        address = service.url.removeprefix("http://")
        with running_prometheus(tmp_path / "prometheus", {"serve": address}) as prometheus:
            began = time.time()
            live_a_day(service, base)
            time.sleep(5)
            empty = [
                f"{expression.where}: {expression.text}"
                for expression in expressions()
                if expression.where not in WITHOUT_DATA and not prometheus.series(expression.text, since=began)
            ]
            assert_alerts(prometheus, since=began)
    figures.record("expressions with data", expressions=len(expressions()), empty=len(empty))
    assert empty == []


def live_a_day(service: Service, base: BaseModel) -> None:
    client = service.client
    uploaded = client.files.create(file=EXAMPLES / "support/train.jsonl", purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="capo-tiny", training_file=uploaded.id, hyperparameters={"n_epochs": 2}, suffix="watched"
    )
    with published(service.registry, base, ["swapped", "swapped"], rank=8) as (first, second):
        refused = publish(service.registry, "refused", "these are no weights")
        service.registry.set_alias("swapped", first.revision)
        with grpc.insecure_channel(service.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for number in range(10):
                for model in ("capo-tiny", "swapped"):
                    body = {"model": model, "prompt": f"{number}", "max_tokens": 8, "stream": True}
                    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 200
                sampling = inference_pb2.Sampling(max_tokens=4)
                stub.Complete(inference_pb2.CompletionRequest(model="swapped", prompt="Hello", sampling=sampling))
                time.sleep(0.5)
        answer = httpx.put(f"{service.url}/v1/aliases/swapped", json={"revision": second.revision}, timeout=60)
        assert answer.status_code == 200
        body = {"model": refused.revision, "prompt": "a"}
        assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 400
        until_ended(service, job.id)
        os.kill(service.engine_pid(), signal.SIGKILL)
        while httpx.get(f"{service.url}/readyz").status_code == 200:
            time.sleep(0.05)
        while httpx.get(f"{service.url}/readyz").status_code != 200:
            time.sleep(0.2)
        for number in range(5):
            body = {"model": "swapped", "prompt": f"again {number}", "max_tokens": 8, "stream": True}
            assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 200
            time.sleep(0.5)


def until_ended(service: Service, job_id: str) -> None:
    deadline = time.monotonic() + 300
    while service.client.fine_tuning.jobs.retrieve(job_id).status not in ("succeeded", "failed"):
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
