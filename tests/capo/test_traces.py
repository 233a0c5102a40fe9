"""What a collector gets of a service, both faces, and of a job and its worker."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.trace import NonRecordingSpan

from registry import tracing
from serve.engine_api import Endpoint
from serve.request_trace import traced
from tests.capo.otlp import ERROR, Collector, collector
from tests.capo.traced_life import ADAPTER, PARENT, PROMPT, TRACES

ROOT = Path(__file__).resolve().parents[2]
CHAT = "POST /v1/chat/completions"


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    directory = tmp_path_factory.mktemp("traced")
    with collector() as kept:
        job_id = run("tests.capo.traced_life", str(directory), kept.endpoint)
        run("tests.capo.traced_worker", str(directory), kept.endpoint, job_id)
        yield kept


@pytest.mark.parametrize("name", ["chat", "stream"])
def test_an_answer_is_a_span_below_its_request_below_the_clients(collected: Collector, name: str) -> None:
    spans = collected.of(TRACES[name])
    request, inference = spans[CHAT], spans["inference chat"]
    assert (request.parent_id, inference.parent_id) == (PARENT, request.span_id)
    assert len(spans) == 2
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == "/v1/chat/completions"
    told = inference.attributes
    assert told["gen_ai.request.model"] == told["capo.adapter"] == ADAPTER
    assert told["capo.revision"] == told["gen_ai.response.model"]
    assert told["capo.revision"].startswith(f"{ADAPTER}@")
    assert told["gen_ai.usage.output_tokens"] == 4
    assert told["capo.protocol"] == "http"
    assert told["capo.request_id"] == request.attributes["capo.request_id"] == f"request-{name}"
    assert (request.status, inference.status) == (0, 0)


def test_a_call_is_a_span_as_well(collected: Collector) -> None:
    spans = collected.of(TRACES["grpc"])
    call, inference = spans["capo.v1.Inference/Chat"], spans["inference chat"]
    assert (call.parent_id, inference.parent_id) == (PARENT, call.span_id)
    assert call.attributes["rpc.method"] == "Chat"
    assert inference.attributes["capo.protocol"] == "grpc"
    assert inference.attributes["gen_ai.usage.output_tokens"] == 4


def test_a_stream_that_is_cut_ends_its_spans_with_the_error(collected: Collector) -> None:
    spans = collected.of(TRACES["cut"])
    assert spans["inference chat"].status == spans[CHAT].status == ERROR
    assert spans["inference chat"].attributes["error.type"] == spans[CHAT].attributes["error.type"] == "engine_dead"
    assert spans["inference chat"].attributes["gen_ai.usage.output_tokens"] == 2
    assert spans[CHAT].attributes["http.response.status_code"] == 200, "the head was out before"


def test_what_a_client_did_wrong_is_told_and_is_no_fault(collected: Collector) -> None:
    unknown = collected.of(TRACES["unknown"])
    assert unknown["inference chat"].attributes["error.type"] == "model_not_found"
    assert {span.status for span in unknown.values()} == {0}
    (refused,) = collected.of(TRACES["refused"]).values()
    assert (refused.name, refused.attributes["http.response.status_code"]) == (CHAT, 401)


def test_a_job_goes_on_in_its_worker_below_the_request_that_made_it(collected: Collector) -> None:
    spans = collected.of(TRACES["job"])
    made, attempt = spans["POST /v1/fine_tuning/jobs"], spans["fine_tuning.attempt"]
    assert (made.role, attempt.role) == ("all", "worker")
    assert (made.parent_id, attempt.parent_id) == (PARENT, made.span_id)
    phases = {"fine_tuning.prepare", "fine_tuning.steps", "fine_tuning.publish"}
    assert spans.keys() == {"POST /v1/fine_tuning/jobs", "fine_tuning.attempt", *phases}
    assert {spans[phase].parent_id for phase in phases} == {attempt.span_id}
    assert attempt.attributes["capo.job_status"] == "succeeded"
    assert attempt.attributes["capo.attempt"] == 1
    assert "@" in attempt.attributes["capo.revision"]
    assert spans["fine_tuning.steps"].attributes["capo.step"] == 3


def test_probes_leave_no_spans_and_no_span_holds_a_prompt_or_a_key(collected: Collector) -> None:
    assert not [span for span in collected.spans if "livez" in str(span.attributes)]
    assert PROMPT.encode() not in collected.raw
    assert b"capo_wrong_key" not in collected.raw
    assert b"Bearer" not in collected.raw


def test_where_nothing_is_exported_the_clients_trace_reaches_the_engine_as_it_came() -> None:
    given = {"traceparent": f"00-{TRACES['chat']}-{PARENT}-01", "tracestate": "vendor=1"}
    span = tracing.begin("request", headers=given)
    assert isinstance(span, NonRecordingSpan)
    assert tracing.headers_of(span) == given
    with traced(Endpoint.CHAT, "any", protocol="http", request_id="-", headers=given) as trace:
        assert trace.headers == given


def test_where_nothing_is_exported_a_request_costs_microseconds_and_a_token_nothing() -> None:
    """No code of it runs for a token; for a request it is bounded here, generously."""
    count = 500
    began = time.perf_counter()
    for _ in range(count):
        with traced(Endpoint.CHAT, "any", protocol="http", request_id="-", headers={}):
            pass
    assert (time.perf_counter() - began) / count < 300e-6


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://host/otlp/v1/traces", "https://host/otlp/v1/traces"),
    ],
)
def test_the_path_is_otlps_own_unless_there_is_one(endpoint: str, url: str) -> None:
    assert tracing.traces_url(endpoint) == url
