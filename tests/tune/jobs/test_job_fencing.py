"""A worker that was cut off for longer than its lease comes back and goes on as if nothing had happened: nothing that
it writes counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry import Artifact, Registry
from registry.errors import ConflictError
from tests.tune.jobs import standins
from tests.tune.jobs.support import Place, chat_rows
from tests.tune.jobs.test_jobs_worker import settings_for
from tune.jobs.file_store import FileStore
from tune.jobs.queue import WorkQueue
from tune.jobs.records import JobRecord
from tune.jobs.store import JobStore
from tune.jobs.training import JobRun
from tune.progress import Observer, TrainingEvent
from tune.recipe import Recipe


@pytest.fixture
def place(any_place: Place) -> Place:
    return any_place


class Scene:
    """One job, claimed under epoch 1; :meth:`taken_over` claims it again, as a worker does after a silent lease."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.queue = WorkQueue(place.database)
        self.job = self._claim(place.queue_job(place.upload(chat_rows(20)).id, suffix="sums"))

    def taken_over(self) -> JobRecord:
        return self._claim(self.place.store.job(self.job.id))

    def run(self, job: JobRecord, train: Callable[..., Any]) -> None:
        run = JobRun(
            settings_for(self.place),
            job=job,
            queue=self.queue,
            store=JobStore(self.place.database),
            files=FileStore(self.place.database),
            stop_asked=lambda: False,
        )
        run.run(train)

    def state(self) -> tuple[Any, ...]:
        """Everything that a late write could change."""
        store, registry = self.place.store, self.place.registry
        return (
            store.job(self.job.id),
            [event.message for event in store.events_since(self.job.id, 0)],
            [artifact.revision for artifact in registry.artifacts()],
            sorted(alias.alias for alias in registry.aliases()),
            sorted(self.place.file_rows.ids()),
            self.place.stored_files(),
        )

    def _claim(self, seen: JobRecord) -> JobRecord:
        job = self.queue.claim(seen, owner=f"worker {seen.epoch}", lease_seconds=30)
        assert job is not None
        return job


@pytest.fixture
def scene(place: Place) -> Scene:
    return Scene(place)


def test_its_events_steps_and_model_are_refused(scene: Scene) -> None:
    successor = scene.taken_over()
    before = scene.state()
    scene.run(scene.job, standins.trains_well)
    assert scene.state() == before
    scene.run(successor, standins.trains_well)
    done = scene.place.store.job(successor.id)
    assert (done.status, done.epoch) == ("succeeded", 2)
    assert len(scene.place.registry.artifacts()) == 1


def test_its_publication_is_refused_even_where_it_was_cut_off_at_the_last_moment(scene: Scene) -> None:
    """Everything was trained and told under the lease; only the publication comes too late."""

    def is_cut_off_before_it_publishes(recipe: Recipe, *, observer: Observer, **options: Any) -> Any:
        observer.on_event(TrainingEvent("info", "trained"))
        scene.taken_over()
        return standins.publish(
            recipe,
            options["registry"],
            options["work_dir"],
            job_id=options["job_id"],
            name=options["fine_tuned_name"],
            alias=options["alias"],
        )

    scene.run(scene.job, is_cut_off_before_it_publishes)
    assert scene.place.registry.artifacts() == []
    assert scene.place.store.job(scene.job.id).status == "running"


def test_its_checkpoints_are_not_published_either(scene: Scene) -> None:
    refused: list[ConflictError] = []

    def publishes_a_checkpoint(recipe: Recipe, *, registry: Registry, work_dir: Path, **options: Any) -> Any:
        scene.taken_over()
        try:
            name = f"{options['fine_tuned_name']}:ckpt-step-1"
            standins.publish(recipe, registry, work_dir, job_id=options["job_id"], name=name, alias=None)
        except ConflictError as error:
            refused.append(error)
            raise
        raise AssertionError("a checkpoint was published")

    scene.run(scene.job, publishes_a_checkpoint)
    assert [error.code for error in refused] == ["lease_lost"]
    assert scene.place.registry.artifacts() == []


def test_what_it_published_in_the_last_gap_is_its_successors_and_the_only_one(scene: Scene) -> None:
    """The lease moves on between the check and the publication: a gap that no file system closes."""

    def publishes_while_it_is_taken_over(recipe: Recipe, *, registry: Registry, work_dir: Path, **options: Any) -> Any:
        late = Registry(registry.root)  # without the check
        scene.taken_over()
        return standins.publish(
            recipe, late, work_dir, job_id=options["job_id"], name=options["fine_tuned_name"], alias=None
        )

    scene.run(scene.job, publishes_while_it_is_taken_over)
    (published,) = scene.place.registry.artifacts()
    successor = scene.place.store.job(scene.job.id)
    assert (successor.status, successor.epoch) == ("running", 2)
    scene.run(successor, standins.trains_well)
    done = scene.place.store.job(successor.id)
    assert (done.status, done.revision) == ("succeeded", published.revision)
    assert _revisions(scene.place.registry.artifacts()) == [published.revision]
    assert standins.attempts(scene.place.directory) == [], "the successor did not train again"


def _revisions(artifacts: list[Artifact]) -> list[str]:
    return [artifact.revision for artifact in artifacts]
