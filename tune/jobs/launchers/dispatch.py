"""One worker in a cluster for each job: decides which jobs get one, and looks after those that were launched.

What was launched is asked of the cluster and which jobs wait of the store, each time anew, so that a dispatcher may be
killed at any moment, and two may run at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from registry.errors import CapoError, NotFoundError, StorageError, UnavailableError
from registry.threads import Threads
from tune.jobs.launchers.cluster import Cluster, Launch, LaunchRefusedError, launch_name
from tune.jobs.lease import LeaseWatch
from tune.jobs.queue import WorkQueue
from tune.jobs.records import OPEN, JobRecord, NewEvent
from tune.jobs.store import JobStore

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_FIRST_DELAY_SECONDS = 5.0
_LONGEST_DELAY_SECONDS = 300.0
_LEAVING_SECONDS = 60.0
"""A worker whose job has ended may take this long to end, too."""
_KEPT_SECONDS = 3600.0
"""What has ended stays in the cluster for this long, to be looked at; but no more than may be launched at once."""


@dataclass(frozen=True, slots=True)
class _Delay:
    """A job's launches have failed: when to try again."""

    until: float
    seconds: float


class ClusterLauncher:
    """See the module. ``max_launched`` bounds the workers in the cluster at once, and likewise the ended ones that are
    kept there: a quota counts both (deploy/kubernetes/components/job-launcher).

    Workers live on when the service stops: they hold their jobs by lease, and the next dispatcher finds them.
    """

    def __init__(
        self,
        cluster: Cluster,
        queue: WorkQueue,
        store: JobStore,
        *,
        max_launched: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._queue = queue
        self._store = store
        self._max_launched = max_launched
        self._clock = clock
        self._leases = LeaseWatch(clock)
        self._delays: dict[str, _Delay] = {}
        self._told: dict[str, str] = {}
        """By job: what its events say of its launch, so that each thing is said once."""
        self._since: dict[str, float] = {}
        """By launch: when it was first seen to be of no more use, the first one first."""

    def start(self) -> None:
        """Nothing: :meth:`watch` does it."""

    async def watch(self) -> None:
        thread = Threads("launches", 1)
        while True:
            try:
                await thread.run(self.step)
            except (UnavailableError, StorageError) as error:
                logger.warning("jobs cannot be launched just now: %s", error)
            except Exception:
                logger.exception("launching jobs failed")  # the next look may go better, and no other would be taken
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self) -> None:
        await asyncio.to_thread(self._cluster.close)

    def kill(self) -> None:
        """Nothing: what was launched lives on."""

    def step(self) -> None:
        """Look once, and do what is due. Blocks."""
        launches = self._cluster.launches()
        live = {launch.job_id for launch in launches if launch.state != "ended"}
        for launch in launches:
            self._look_after(launch)
        self._remove_old_ends(launches)
        for job in self._leases.abandoned(self._queue.running()):
            # Its worker is lost. The next one waits for the lease like any other, and takes it over.
            if job.id not in live and len(live) < self._max_launched and self._launch(job):
                live.add(job.id)
        self._forget_what_is_over(live)
        held_back = {job_id for job_id, delay in self._delays.items() if delay.until > self._clock()}
        while len(live) < self._max_launched:
            waiting = self._queue.next_waiting(launched=live, held_back=held_back)
            if waiting is None:
                return
            (live if self._launch(waiting) else held_back).add(waiting.id)

    def _remove_old_ends(self, launches: list[Launch]) -> None:
        by_name = {launch.name: launch for launch in launches}
        self._since = {name: since for name, since in self._since.items() if name in by_name}
        ended = [by_name[name] for name in self._since if by_name[name].state == "ended"]
        for place, launch in enumerate(reversed(ended)):
            if place >= self._max_launched or self._seconds_since(launch) > _KEPT_SECONDS:
                self._cluster.remove(launch)

    def _forget_what_is_over(self, live: set[str]) -> None:
        longest_ago = self._clock() - 2 * _LONGEST_DELAY_SECONDS
        self._delays = {job_id: delay for job_id, delay in self._delays.items() if delay.until > longest_ago}
        self._told = {job_id: text for job_id, text in self._told.items() if job_id in live or job_id in self._delays}

    def _launch(self, job: JobRecord) -> bool:
        name = launch_name(job.id, job.epoch)
        try:
            self._cluster.launch(name, job_id=job.id, tenant=job.tenant, gpus=job.gpus)
        except LaunchRefusedError as error:
            logger.warning("%s: no worker could be launched: %s", job.id, error)
            self._delay(job, "the cluster takes none just now", error.retry_after_seconds)
            return False
        logger.info("%s: launched %s", job.id, name)
        return True

    def _look_after(self, launch: Launch) -> None:
        try:
            job = self._store.job(launch.job_id)
        except NotFoundError:
            return  # another Capo's, in the same cluster
        # A claim would have moved the epoch on.
        is_unclaimed = job.status in OPEN and launch.name == launch_name(job.id, job.epoch)
        is_held_back = job.status == "queued" and job.paused
        if launch.state == "ended":
            if is_unclaimed:
                self._cluster.remove(launch)  # its name is needed again
                if not is_held_back:
                    self._delay(job, launch.reason or "its worker ended before it began")
            else:
                self._seconds_since(launch)
        elif job.status not in OPEN or is_held_back:
            # One that has not begun is ended at once; one that runs is about to end by itself.
            if launch.state == "waiting" or self._seconds_since(launch) > _LEAVING_SECONDS:
                self._cluster.remove(launch)
        elif launch.state == "running":
            self._delays.pop(job.id, None)
            self._told.pop(job.id, None)
        elif is_unclaimed and launch.reason is not None:
            self._tell(job, launch.reason)

    def _seconds_since(self, launch: Launch) -> float:
        return self._clock() - self._since.setdefault(launch.name, self._clock())

    def _delay(self, job: JobRecord, reason: str, retry_after_seconds: float | None = None) -> None:
        last = self._delays.get(job.id)
        seconds = _FIRST_DELAY_SECONDS if last is None else min(2 * last.seconds, _LONGEST_DELAY_SECONDS)
        seconds = max(seconds, retry_after_seconds or 0.0)
        self._delays[job.id] = _Delay(self._clock() + seconds, seconds)
        self._tell(job, reason)

    def _tell(self, job: JobRecord, reason: str) -> None:
        if self._told.get(job.id) == reason:
            return
        self._told[job.id] = reason
        event = NewEvent(f"The job waits for its worker: {reason}", level="warn", data={"reason": "not_launched"})
        try:
            self._queue.note(job, event)
        except CapoError as error:
            logger.warning("%s: %s", job.id, error)
