"""Which jobs get a worker in a cluster, and what becomes of launches that fail, against a cluster that is a list."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest

from tests.tune.jobs.support import Place, add_file_row, new_job
from tune.jobs.launchers.cluster import Launch, LaunchRefusedError, launch_name
from tune.jobs.launchers.dispatch import ClusterLauncher
from tune.jobs.queue import WorkQueue
from tune.jobs.records import JobRecord
from tune.jobs.store import JobStore


@dataclass
class ListedCluster:
    """Remembers what it is told; a launch of the same name is taken once."""

    listed: dict[str, Launch] = field(default_factory=dict)
    refusal: LaunchRefusedError | None = None
    asked: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def launches(self) -> list[Launch]:
        return list(self.listed.values())

    def launch(self, name: str, *, job_id: str, tenant: str, gpus: int) -> None:
        self.asked.append(job_id)
        if self.refusal is not None:
            raise self.refusal
        self.listed.setdefault(name, Launch(name, job_id, "waiting"))

    def remove(self, launch: Launch) -> None:
        self.removed.append(launch.name)
        self.listed.pop(launch.name, None)

    def close(self) -> None: ...

    def becomes(self, job_id: str, state: str, reason: str | None = None) -> None:
        for name, launch in self.listed.items():
            if launch.job_id == job_id:
                self.listed[name] = replace(launch, state=state, reason=reason)

    def jobs(self) -> list[str]:
        return [launch.job_id for launch in self.listed.values()]


class Scene:
    """A launcher with a clock that stands still until it is moved."""

    def __init__(self, place: Place, *, max_launched: int = 10, max_running_per_tenant: int | None = None) -> None:
        self.place = place
        self.now = 0.0
        self.cluster = ListedCluster()
        self.queue = WorkQueue(place.database, gpus=8, max_running_per_tenant=max_running_per_tenant)
        self.launcher = ClusterLauncher(
            self.cluster, self.queue, JobStore(place.database), max_launched=max_launched, clock=lambda: self.now
        )

    def queued(self, tenant: str = "acme", **changes: object) -> JobRecord:
        file_id = add_file_row(self.place.file_rows, tenant=tenant)
        return JobStore(self.place.database, tenant=tenant).create_job(new_job(file_id, **changes))

    def claimed(self, job: JobRecord) -> JobRecord:
        taken = self.queue.claim(job, owner="in the cluster", lease_seconds=30)
        assert taken is not None
        self.cluster.becomes(job.id, "running")
        return taken

    def notes(self, job: JobRecord) -> list[str]:
        events = self.place.store.events_since(job.id, 0)
        return [event.message for event in events if (event.data or {}).get("reason") == "not_launched"]


@pytest.fixture
def scene(place: Place) -> Scene:
    return Scene(place)


def test_each_waiting_job_gets_one_worker_however_often_it_looks(scene: Scene) -> None:
    jobs = [scene.queued() for _ in range(3)]
    for _ in range(3):
        scene.launcher.step()
    assert scene.cluster.jobs() == scene.cluster.asked == [job.id for job in jobs]
    assert list(scene.cluster.listed) == [launch_name(job.id, 0) for job in jobs]


def test_a_launcher_that_starts_again_finds_what_was_launched(place: Place, scene: Scene) -> None:
    job = scene.queued()
    scene.launcher.step()
    again = ClusterLauncher(scene.cluster, scene.queue, JobStore(place.database), max_launched=10)
    again.step()
    assert scene.cluster.asked == [job.id]


def test_jobs_are_launched_by_priority_and_share_and_no_more_than_allowed(place: Place) -> None:
    scene = Scene(place, max_launched=3)
    acme = [scene.queued("acme") for _ in range(3)]
    birch = scene.queued("birch")
    urgent = scene.queued("acme", priority=1)
    scene.launcher.step()
    assert scene.cluster.jobs() == [urgent.id, birch.id, acme[0].id]
    scene.launcher.step()
    assert len(scene.cluster.listed) == 3
    scene.cluster.becomes(urgent.id, "ended")
    scene.place.store.cancel(urgent.id)
    scene.launcher.step()
    assert acme[1].id in scene.cluster.jobs()


def test_the_bound_of_a_tenant_counts_what_is_on_its_way(place: Place) -> None:
    scene = Scene(place, max_running_per_tenant=1)
    first, second = scene.queued(), scene.queued()
    scene.launcher.step()
    assert scene.cluster.jobs() == [first.id]
    scene.queue.end_cancelled(scene.claimed(first))
    scene.launcher.step()
    assert second.id in scene.cluster.jobs()


def test_a_refusing_cluster_is_asked_again_later_and_the_job_says_once_why_it_waits(scene: Scene) -> None:
    job = scene.queued()
    scene.cluster.refusal = LaunchRefusedError("403: forbidden", retry_after_seconds=7)
    scene.launcher.step()
    scene.launcher.step()
    assert scene.cluster.asked == [job.id]
    scene.now = 6.9
    scene.launcher.step()
    assert scene.cluster.asked == [job.id]
    scene.now = 7.1
    scene.launcher.step()
    assert scene.cluster.asked == [job.id] * 2
    assert scene.notes(job) == ["The job waits for its worker: the cluster takes none just now"]
    scene.cluster.refusal = None
    scene.now = 100
    scene.launcher.step()
    assert scene.cluster.jobs() == [job.id]
    assert scene.place.store.job(job.id).attempts == 0


def test_one_job_that_cannot_be_launched_holds_up_no_other(scene: Scene) -> None:
    bad = scene.queued()
    scene.launcher.step()
    scene.cluster.becomes(bad.id, "ended", "its pod cannot start: ImagePullBackOff")
    good = scene.queued()
    scene.launcher.step()
    assert scene.cluster.jobs() == [good.id]
    assert scene.notes(bad) == ["The job waits for its worker: its pod cannot start: ImagePullBackOff"]
    scene.now = 5.1
    scene.launcher.step()
    assert scene.cluster.jobs() == [good.id, bad.id]


def test_launches_that_fail_are_repeated_ever_more_slowly(scene: Scene) -> None:
    job = scene.queued()
    times = []
    while scene.now < 1500:
        scene.launcher.step()
        if len(scene.cluster.asked) > len(times):
            times.append(scene.now)
        scene.cluster.becomes(job.id, "ended", "OOMKilled")
        scene.now += 1
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(first <= second for first, second in itertools.pairwise(pauses))
    assert pauses[0] <= 7
    assert 300 <= pauses[-1] <= 302


def test_a_worker_that_is_lost_is_replaced_once_its_lease_is_silent(scene: Scene) -> None:
    job = scene.queued()
    scene.launcher.step()
    scene.claimed(job)
    scene.launcher.step()
    scene.cluster.listed.clear()  # node gone, object gone
    scene.now = 29
    scene.launcher.step()
    assert scene.cluster.jobs() == []
    scene.now = 61
    scene.launcher.step()
    assert list(scene.cluster.listed) == [launch_name(job.id, 1)]
    scene.now = 120
    scene.cluster.becomes(job.id, "ended", "evicted before it began")
    scene.launcher.step()
    scene.now = 130
    scene.launcher.step()
    assert list(scene.cluster.listed) == [launch_name(job.id, 1)], "the replacement is replaced too"


def test_what_is_cancelled_or_paused_before_its_worker_began_is_taken_back(scene: Scene) -> None:
    cancelled, paused = scene.queued(), scene.queued()
    scene.launcher.step()
    scene.place.store.cancel(cancelled.id)
    scene.place.store.pause(paused.id)
    scene.launcher.step()
    assert scene.cluster.jobs() == []
    scene.place.store.resume(paused.id)
    scene.launcher.step()
    assert scene.cluster.jobs() == [paused.id]


def test_a_worker_that_is_finishing_is_left_to_end_by_itself(scene: Scene) -> None:
    job = scene.queued()
    scene.launcher.step()
    scene.queue.end_cancelled(scene.claimed(job))
    for scene.now in (0, 30, 59):
        scene.launcher.step()
    assert scene.cluster.removed == []
    scene.now = 61
    scene.launcher.step()
    assert scene.cluster.removed == [launch_name(job.id, 0)]


def test_a_job_put_back_by_its_worker_is_launched_anew_under_a_new_name(scene: Scene) -> None:
    job = scene.queued()
    scene.launcher.step()
    scene.queue.requeue(scene.claimed(job), "crashed", reason="training_lost")
    scene.cluster.becomes(job.id, "ended")
    scene.launcher.step()
    assert list(scene.cluster.listed) == [launch_name(job.id, 0), launch_name(job.id, 1)]
    assert scene.notes(job) == []


def test_what_has_ended_is_kept_for_an_hour_to_be_looked_at(scene: Scene) -> None:
    job = scene.queued()
    scene.launcher.step()
    scene.queue.end_cancelled(scene.claimed(job))
    scene.cluster.becomes(job.id, "ended")
    scene.launcher.step()
    scene.now = 3599
    scene.launcher.step()
    assert scene.cluster.listed
    scene.now = 3601
    scene.launcher.step()
    assert not scene.cluster.listed


def test_no_more_that_have_ended_are_kept_than_may_be_launched_and_the_last_ones(place: Place) -> None:
    """Kubernetes' quota counts them: twenty short jobs within the hour would let it refuse every further one."""
    scene = Scene(place, max_launched=2)
    names = []
    for _ in range(5):
        job = scene.queued()
        scene.launcher.step()
        names.append(launch_name(job.id, 0))
        scene.queue.end_cancelled(scene.claimed(job))
        scene.cluster.becomes(job.id, "ended")
        scene.now += 1
        scene.launcher.step()
        assert len(scene.cluster.listed) <= 2
    assert sorted(scene.cluster.listed) == sorted(names[-2:])
    assert scene.cluster.removed == names[:3], "each once, the first one first"


def test_launches_of_another_capo_in_the_same_cluster_are_left_alone(scene: Scene) -> None:
    scene.cluster.listed["capo-ftjob-other-0"] = Launch("capo-ftjob-other-0", "ftjob-other", "ended")
    scene.now = 10_000
    scene.launcher.step()
    assert scene.cluster.removed == []
