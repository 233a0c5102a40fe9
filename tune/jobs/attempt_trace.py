"""The spans of one attempt at a job: the attempt, and in it preparation, each stage's steps, and publication.

A span per step would be thousands for a long job; the steps' figures are events of the job.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span, SpanKind

from registry import tracing
from tune.jobs.records import JobRecord
from tune.progress import StepMetrics, TrainingEvent


class AttemptTrace:
    """An :class:`~tune.progress.Observer` that turns to the next span when the run does."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._phase: Span | None = None
        self._stage: str | None = None

    @property
    def is_recorded(self) -> bool:
        return self._span.is_recording()

    def turn_to(self, phase: str) -> None:
        self._end_phase()
        self._phase = tracing.begin(phase)

    def on_event(self, event: TrainingEvent) -> None:
        del event

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.stage != self._stage:
            self.turn_to("fine_tuning.steps")
            self._stage = metrics.stage
        span = self._phase
        if span is not None:
            span.set_attribute("capo.stage", metrics.stage)
            span.set_attribute("capo.step", metrics.step)
            span.set_attribute("capo.total_steps", metrics.total_steps)
            span.set_attribute("capo.trained_tokens", metrics.processed_tokens)  # as the job's own figure
        if metrics.run_step == metrics.run_total_steps:
            self.turn_to("fine_tuning.publish")

    def settle(self, job: JobRecord) -> None:
        """Tell how the attempt ended, by the job's record after it."""
        span = self._span
        span.set_attribute("capo.job_status", job.status)
        if job.fine_tuned_model is not None and job.revision is not None:
            span.set_attribute("gen_ai.response.model", job.fine_tuned_model)
            span.set_attribute("capo.revision", job.revision)
        if job.trained_tokens is not None:
            span.set_attribute("capo.trained_tokens", job.trained_tokens)
        if job.error is not None:
            tracing.fail_as(span, job.error.code)
            if self._phase is not None:
                tracing.fail_as(self._phase, job.error.code)

    def end(self) -> None:
        self._end_phase()
        self._span.end()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.end()
            self._phase = None


@contextmanager
def traced_attempt(job: JobRecord) -> Iterator[AttemptTrace]:
    """The parent is the request that made the job, which has long ended."""
    span = tracing.begin(
        "fine_tuning.attempt",
        kind=SpanKind.CONSUMER,
        headers=job.trace_headers or {},
        attributes={
            "capo.job_id": job.id,
            "capo.attempt": job.attempts,
            "capo.method": job.method,
            "gen_ai.request.model": job.model,
        },
    )
    attempt = AttemptTrace(span)
    try:
        with tracing.current(span):
            yield attempt
    except Exception as error:
        tracing.fail(span, error)
        raise
    finally:
        attempt.end()
