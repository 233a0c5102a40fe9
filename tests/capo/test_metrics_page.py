"""The metrics page of a whole service with a thousand adapters: bounded in size and quick, and nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from capo.settings import Settings
from registry.principal import Scope
from serve.metrics import OUTCOMES, PROTOCOLS, Metrics
from tests.capo.guarded import Guarded, bearer, guarded
from tests.serve.running import BASE
from tests.tune.jobs.support import chat_rows
from tune.jobs.metrics import JobMetrics

ADAPTERS = 1000
KEYS = 100
MOST_BYTES = 2_000_000
MOST_SECONDS = 0.2
PROBE_SECONDS = 0.001


def keep_busy(metrics: Metrics) -> None:
    """A thousand adapters, over both protocols, with every way to end."""
    for round_ in range(2):
        for number in range(ADAPTERS):
            label = metrics.settled_label(metrics.adapter_label(f"adapter-with-a-name-of-usual-length-{number}"))
            for protocol in PROTOCOLS:
                metrics.time_to_first_token.labels(label, protocol).observe(round_)
                metrics.inter_token_latency.labels(label, protocol).observe(0.01)
                metrics.e2e_latency.labels(label, protocol).observe(1.0)
            for outcome in OUTCOMES:
                metrics.outcomes.labels(label, outcome).inc()
            metrics.queue_wait.labels(label).observe(0.01)
            metrics.adapter_wait.labels(label).observe(0.01)
            metrics.prompt_tokens.labels(label).inc(10)
            metrics.completion_tokens.labels(label).inc(10)


async def give_work(service: Guarded) -> None:
    """Requests by many keys, and a job in the store that the page tells of."""
    body = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
    keys = [bearer(service.key()) for _ in range(KEYS)]
    for key in keys:
        assert (await service.ask("POST /v1/chat/completions", key, json=body)).status == 200
    form = {"files": {"file": ("rows.jsonl", chat_rows(12))}, "data": {"purpose": "fine-tune"}}
    file = (await service.ask("POST /v1/files", keys[0], **form)).body["id"]
    job = await service.ask("POST /v1/fine_tuning/jobs", keys[0], json={"model": BASE, "training_file": file})
    assert job.status == 200
    jobs = JobMetrics(service.database)
    jobs.refresh()
    service.metrics.register(jobs)


async def longest_wait(during: asyncio.Task[object]) -> float:
    """How late the event loop woke somebody, at most, until ``during`` was done; in seconds."""
    worst = 0.0
    while not during.done():
        asked_at = time.perf_counter()
        await asyncio.sleep(PROBE_SECONDS)
        worst = max(worst, time.perf_counter() - asked_at - PROBE_SECONDS)
    return worst


async def test_a_page_of_a_service_with_a_thousand_busy_adapters_is_small_and_quick_and_holds_up_nobody(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as service:
        keep_busy(service.service.metrics)
        await give_work(service)
        shown = {"Authorization": bearer(service.key(scopes=frozenset({Scope.METRICS})))}
        seconds, waits = [], []
        for _ in range(5):
            began = time.perf_counter()
            asked = asyncio.create_task(service.http.get("/metrics", headers=shown))
            waits.append(await longest_wait(asked))
            page = asked.result().content
            seconds.append(time.perf_counter() - began)
    assert page.count(b"capo_prompt_tokens_total{") == Settings().max_metric_adapters + 1 + 1, "other, and the base"
    assert page.count(b"capo_key_requests_total{") == KEYS + 1, "who asks for the page is on it"
    assert b'capo_jobs{status="queued"} 1.0' in page
    assert len(page) <= MOST_BYTES
    assert min(seconds) <= MOST_SECONDS, "another process's load may slow one rendering down, not five"
    assert min(waits) <= min(seconds) / 2, "the loop went on while the page was made"
