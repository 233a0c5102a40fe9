"""Store and queue, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading

import pytest

from registry.errors import ConflictError, NotFoundError
from tests.tune.jobs.support import TENANT, Place, add_file_row, new_job
from tune.jobs.lease import LeaseWatch, is_gone, this_owner
from tune.jobs.queue import MAX_RETRY_DELAY_SECONDS, Outcome, WorkQueue
from tune.jobs.records import FileRecord, JobError, JobRecord, NewEvent
from tune.jobs.rows import new_id
from tune.jobs.store import JobStore

OUTCOME = Outcome(revision="model@0123456789abcdef", trained_tokens=12, result_file=None)


@pytest.fixture
def place(any_place: Place) -> Place:
    return any_place


@pytest.fixture
def queue(place: Place) -> WorkQueue:
    return WorkQueue(place.database)


@pytest.fixture
def training_file(place: Place) -> str:
    return add_file_row(place.file_rows)


def claim(queue: WorkQueue, job: JobRecord, owner: str = "worker-1") -> JobRecord:
    claimed = queue.claim(job, owner=owner, lease_seconds=30)
    assert claimed is not None
    return claimed


def messages(place: Place, job_id: str) -> list[str]:
    return [event.message for event in place.store.events_since(job_id, 0)]


class TestFiles:
    def test_a_file_that_an_open_job_needs_cannot_be_deleted(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with pytest.raises(ConflictError, match=job.id):
            place.file_rows.delete(training_file)
        place.store.cancel(job.id)
        place.file_rows.delete(training_file)
        with pytest.raises(NotFoundError):
            place.file_rows.get(training_file)

    def test_a_job_cannot_be_made_from_a_deleted_file(self, place: Place, training_file: str) -> None:
        place.file_rows.delete(training_file)
        with pytest.raises(NotFoundError):
            place.queue_job(training_file)

    def test_a_cursor_may_stand_on_a_file_deleted_meanwhile(self, place: Place) -> None:
        ids = [add_file_row(place.file_rows) for _ in range(4)]
        page = place.file_rows.page(after=None, limit=2)
        assert [record.id for record in page.records] == ids[:1:-1]
        place.file_rows.delete(ids[2])
        rest = place.file_rows.page(after=ids[2], limit=2)
        assert [record.id for record in rest.records] == [ids[1], ids[0]]
        assert not rest.has_more

    def test_the_order_is_that_of_arrival_even_when_the_clock_goes_back(self, place: Place) -> None:
        ids = [add_file_row(place.file_rows, created_at=when) for when in (300, 200, 100)]
        listed = place.file_rows.page(after=None, limit=10, order="asc").records
        assert [record.id for record in listed] == ids


class TestEvents:
    def test_sequence_numbers_have_no_gaps_and_follow_the_order_of_writing(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        job = claim(queue, place.queue_job(training_file))
        for number in range(20):
            queue.add_events(job, [NewEvent(f"{number}a"), NewEvent(f"{number}b")])
        events = place.store.events_since(job.id, 0)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [event.message for event in events[-40:]] == [f"{n}{x}" for n in range(20) for x in "ab"]

    def test_two_writers_of_one_job_never_take_the_same_number(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        job = claim(queue, place.queue_job(training_file))

        def write() -> None:
            for _ in range(25):
                queue.add_events(job, [NewEvent("x")])

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sequences = [event.sequence for event in place.store.events_since(job.id, 0)]
        assert sequences == list(range(1, 102))


class TestClaims:
    def test_jobs_are_worked_in_the_order_of_creation(self, place: Place, queue: WorkQueue, training_file: str) -> None:
        made = [place.queue_job(training_file).id for _ in range(3)]
        worked = []
        while (job := queue.next_waiting()) is not None:
            worked.append(claim(queue, job).id)
        assert worked == made

    def test_of_two_claims_that_saw_the_same_job_one_wins(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        seen = place.queue_job(training_file)
        first = queue.claim(seen, owner="a", lease_seconds=30)
        second = queue.claim(seen, owner="b", lease_seconds=30)
        assert first is not None
        assert first.owner == "a"
        assert second is None

    def test_a_heartbeat_between_look_and_claim_keeps_the_job(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        job = claim(queue, place.queue_job(training_file))
        seen = queue.running()[0]
        queue.heartbeat(job)
        assert queue.claim(seen, owner="thief", lease_seconds=30) is None

    def test_every_write_under_an_old_epoch_is_refused(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        old = claim(queue, place.queue_job(training_file), "old")
        new = claim(queue, queue.running()[0], "new")
        result = FileRecord(new_id("file-"), TENANT, "m.csv", "fine-tune-results", 1, "0" * 64, None, 0)
        writes = (
            lambda: queue.heartbeat(old),
            lambda: queue.asked(old),
            lambda: queue.add_events(old, [NewEvent("late")]),
            lambda: queue.succeed(old, Outcome("m@0", 1, result)),
            lambda: queue.fail(old, JobError("late", "late")),
            lambda: queue.end_cancelled(old),
            lambda: queue.requeue(old, "late", reason="training_lost"),
        )
        before = place.store.job(old.id), messages(place, old.id)
        for write in writes:
            with pytest.raises(ConflictError) as refused:
                write()
            assert refused.value.code == "lease_lost"
        assert (place.store.job(old.id), messages(place, old.id)) == before
        with pytest.raises(NotFoundError):
            place.file_rows.get(result.id)
        queue.succeed(new, OUTCOME)

    def test_a_job_ends_once(self, place: Place, queue: WorkQueue, training_file: str) -> None:
        job = claim(queue, place.queue_job(training_file))
        queue.succeed(job, OUTCOME)
        with pytest.raises(ConflictError):
            queue.fail(job, JobError("late", "late"))
        assert place.store.job(job.id).status == "succeeded"

    def test_a_forgiven_attempt_is_not_counted_and_a_crash_is(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        job = claim(queue, place.queue_job(training_file))
        queue.requeue(job, "shutting down", reason="worker_stopping", counts=False)
        assert place.store.job(job.id).attempts == 0
        queue.requeue(claim(queue, place.store.job(job.id)), "crashed", reason="training_lost")
        assert place.store.job(job.id).attempts == 1

    def test_a_delayed_job_waits_and_others_go_first(self, place: Place, training_file: str) -> None:
        now = 1_000.0
        queue = WorkQueue(place.database, clock=lambda: now)
        poisoned, other = place.queue_job(training_file), place.queue_job(training_file)
        queue.requeue(claim(queue, poisoned), "crashed", reason="training_lost", delay_seconds=60)
        waiting = queue.next_waiting()
        assert waiting is not None
        assert waiting.id == other.id
        now += 61
        waiting = queue.next_waiting()
        assert waiting is not None
        assert waiting.id == poisoned.id

    def test_a_clock_set_back_by_a_day_does_not_hold_a_delayed_job(self, place: Place, training_file: str) -> None:
        now = 1_000_000.0
        queue = WorkQueue(place.database, clock=lambda: now)
        queue.requeue(claim(queue, place.queue_job(training_file)), "crashed", reason="training_lost", delay_seconds=60)
        assert queue.next_waiting() is None
        now -= 86_400
        assert MAX_RETRY_DELAY_SECONDS < 86_400
        assert queue.next_waiting() is not None


class TestCancel:
    def test_a_queued_job_is_cancelled_at_once(self, place: Place, training_file: str) -> None:
        job = place.store.cancel(place.queue_job(training_file).id)
        assert job.status == "cancelled"
        assert job.finished_at is not None

    def test_a_running_job_is_asked_to_stop(self, place: Place, queue: WorkQueue, training_file: str) -> None:
        held = claim(queue, place.queue_job(training_file))
        assert queue.asked(held) is None
        assert place.store.cancel(held.id).status == "running"
        assert queue.asked(held) == "cancel"

    def test_repeating_it_changes_nothing(self, place: Place, queue: WorkQueue, training_file: str) -> None:
        queued, running = place.queue_job(training_file), place.queue_job(training_file)
        claim(queue, running)
        for job in (queued, running):
            first = place.store.cancel(job.id), messages(place, job.id)
            assert (place.store.cancel(job.id), messages(place, job.id)) == first

    def test_an_ended_job_stays_as_it_ended(self, place: Place, queue: WorkQueue, training_file: str) -> None:
        done, failed = place.queue_job(training_file), place.queue_job(training_file)
        queue.succeed(claim(queue, done), OUTCOME)
        queue.fail(claim(queue, failed), JobError("broken", "broken"))
        for job in (done, failed):
            before = place.store.job(job.id)
            with pytest.raises(ConflictError, match=before.status):
                place.store.cancel(job.id)
            assert place.store.job(job.id) == before

    def test_a_running_job_without_a_living_worker_is_cancelled_at_once_and_fenced(
        self, place: Place, training_file: str
    ) -> None:
        now = 1_000.0
        store = JobStore(place.database, clock=lambda: now)
        queue = WorkQueue(place.database, clock=lambda: now)
        held = claim(queue, place.queue_job(training_file))
        now += 59
        assert store.cancel(held.id).status == "running"
        now += 2
        assert store.cancel(held.id).status == "cancelled"
        with pytest.raises(ConflictError):
            queue.succeed(held, OUTCOME)

    def test_a_job_that_is_not_there_is_not_found(self, place: Place) -> None:
        with pytest.raises(NotFoundError):
            place.store.cancel("ftjob-nothing")


class TestLeaseWatch:
    def test_only_a_whole_lease_of_silence_frees_a_job(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        now = 0.0
        watch = LeaseWatch(clock=lambda: now)
        job = claim(queue, place.queue_job(training_file), "elsewhere/1/2/3")
        assert watch.abandoned(queue.running()) == []
        now = 29.0
        assert watch.abandoned(queue.running()) == []
        queue.heartbeat(job)
        now = 58.0
        assert watch.abandoned(queue.running()) == []
        now = 88.0
        assert [silent.id for silent in watch.abandoned(queue.running())] == [job.id]

    def test_a_wall_clock_that_jumps_frees_nothing(self, place: Place, training_file: str) -> None:
        wall = 1_000_000.0
        queue = WorkQueue(place.database, clock=lambda: wall)
        watch = LeaseWatch(clock=lambda: 5.0)
        claim(queue, place.queue_job(training_file), "elsewhere/1/2/3")
        for jump in (-86_400, 86_400, 10 * 86_400):
            wall += jump
            assert watch.abandoned(queue.running()) == []

    def test_a_new_owner_starts_with_a_whole_lease(self, place: Place, queue: WorkQueue, training_file: str) -> None:
        now = 0.0
        watch = LeaseWatch(clock=lambda: now)
        claim(queue, place.queue_job(training_file), "elsewhere/1/2/3")
        watch.abandoned(queue.running())
        now = 29.0
        claim(queue, queue.running()[0], "elsewhere/1/4/5")
        now = 31.0
        assert watch.abandoned(queue.running()) == []

    def test_an_owner_of_this_machine_that_is_gone_needs_no_waiting_for(
        self, place: Place, queue: WorkQueue, training_file: str
    ) -> None:
        alive = this_owner()
        namespace, pid, start_time = alive.rsplit("/", 2)
        reborn = f"{namespace}/{pid}/{int(start_time) - 1}"
        assert not is_gone(alive)
        assert is_gone(reborn)
        assert not is_gone(f"another-boot/pid:[1]/{pid}/1")
        job = claim(queue, place.queue_job(training_file), reborn)
        assert [silent.id for silent in LeaseWatch().abandoned(queue.running())] == [job.id]


def test_a_job_shows_what_it_was_made_with(place: Place, training_file: str) -> None:
    made = place.store.create_job(
        new_job(training_file, suffix="support", metadata={"team": "a"}, extensions={"alias": "support"})
    )
    assert place.store.job(made.id) == made
    assert made.reserved_name.startswith("ft:capo-tiny:acme:support:")
    assert made.fine_tuned_model is None
    assert made.metadata == {"team": "a"}
