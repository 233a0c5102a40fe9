"""Random histories of workers, clients and silences against a plain model of who may write."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry.errors import ConflictError
from tests.tune.jobs.support import Place, add_file_row, open_place
from tune.jobs.lease import LeaseWatch
from tune.jobs.queue import Outcome, WorkQueue
from tune.jobs.records import JobError, JobRecord, NewEvent

WORKERS = st.sampled_from(["a", "b", "c"])
LEASE = 30.0
ENDS = ("succeeded", "failed", "cancelled")


class Leases(RuleBasedStateMachine):
    """``held`` is what each worker believes; only the one with the newest claim may change the job."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.place: Place = open_place(self.directory)
        self.queue = WorkQueue(self.place.database)
        self.now = 0.0
        self.watches = {name: LeaseWatch(clock=lambda: self.now) for name in "abc"}
        self.held: dict[str, JobRecord] = {}
        self.holder: str | None = None
        self.last_sign = 0.0
        self.ends = 0
        self.written = 0

    @initialize()
    def make_job(self) -> None:
        self.job_id = self.place.queue_job(add_file_row(self.place.file_rows)).id

    @rule(worker=WORKERS)
    def claim_waiting(self, worker: str) -> None:
        seen = self.queue.next_waiting()
        if seen is not None:
            assert self.holder is None
            self._take(worker, seen)

    @rule(worker=WORKERS)
    def claim_abandoned(self, worker: str) -> None:
        for seen in self.watches[worker].abandoned(self.queue.running()):
            assert self.now - self.last_sign >= LEASE, "a living owner lost its job"
            self._take(worker, seen)

    @rule(seconds=st.floats(min_value=0.1, max_value=40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(worker=WORKERS)
    def heartbeat(self, worker: str) -> None:
        if self._write(worker, self.queue.heartbeat):
            self.last_sign = self.now

    @rule(worker=WORKERS)
    def write_event(self, worker: str) -> None:
        if self._write(worker, lambda job: self.queue.add_events(job, [NewEvent("worked")])):
            self.written += 1

    @rule(worker=WORKERS, end=st.sampled_from(ENDS))
    def end(self, worker: str, end: str) -> None:
        ways = {
            "succeeded": lambda job: self.queue.succeed(job, Outcome("m@0", 1, None)),
            "failed": lambda job: self.queue.fail(job, JobError("x", "x")),
            "cancelled": self.queue.end_cancelled,
        }
        if self._write(worker, ways[end]):
            self.holder = None
            self.ends += 1

    @rule(worker=WORKERS, counts=st.booleans())
    def requeue(self, worker: str, counts: bool) -> None:
        if self._write(worker, lambda job: self.queue.requeue(job, "again", reason="training_lost", counts=counts)):
            self.holder = None

    @precondition(lambda self: self.ends == 0)
    @rule()
    def cancel(self) -> None:
        before = self.place.store.job(self.job_id)
        after = self.place.store.cancel(self.job_id)
        assert after.cancel_requested
        if before.status == "queued":
            assert after.status == "cancelled"
            self.ends += 1

    @invariant()
    def the_store_agrees_with_the_model(self) -> None:
        job = self.place.store.job(self.job_id)
        assert (job.status == "running") == (self.holder is not None)
        assert (job.status in ENDS) == (self.ends == 1)
        assert job.owner == self.holder
        assert (job.finished_at is not None) == (job.status in ENDS)
        assert (job.fine_tuned_model is not None) == (job.status == "succeeded")
        assert job.attempts >= 0
        events = self.place.store.events_since(self.job_id, 0)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert sum(event.message == "worked" for event in events) == self.written

    def teardown(self) -> None:
        self.place.database.close()
        shutil.rmtree(self.directory)

    def _take(self, worker: str, seen: JobRecord) -> None:
        job = self.queue.claim(seen, owner=worker, lease_seconds=LEASE)
        assert job is not None
        assert job.epoch > seen.epoch
        self.held[worker], self.holder, self.last_sign = job, worker, self.now

    def _write(self, worker: str, write: object) -> bool:
        """Let ``worker`` write under its newest claim; whether it may is the model's to say."""
        job = self.held.get(worker)
        if job is None:
            return False
        assert callable(write)
        if worker == self.holder:
            write(job)
            return True
        with pytest.raises(ConflictError):
            write(job)
        return False


Leases.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLeases = Leases.TestCase
