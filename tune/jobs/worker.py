"""The worker process: claims jobs one at a time and forks a child for each, or works one job and ends.

It imports the heavy libraries once, before the first job, and computes nothing with them itself; so a child
is ready to train milliseconds after its fork and leaves no memory behind. One thread does everything, and
no database connection is open across a fork. Every job that a worker claims ends in a final state or in
the queue again; what the child could not write, the worker writes, and what the worker could not write
either, the next worker does once the lease is silent (:mod:`tune.jobs.lease`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from types import FrameType

from registry import tracing
from registry.errors import ConflictError, NotFoundError, StorageError, UnavailableError
from tune.jobs.database import Database
from tune.jobs.file_store import FileStore
from tune.jobs.gpus import take_devices
from tune.jobs.lease import LeaseWatch, end_training, this_owner
from tune.jobs.process import describe_exit, die_with_parent, name_process
from tune.jobs.queue import LEASE_LOST, WorkQueue
from tune.jobs.ranks import InRanks
from tune.jobs.records import OPEN, JobRecord
from tune.jobs.settings import WorkerSettings
from tune.jobs.store import JobStore
from tune.jobs.training import JobRun, TrainFunction
from tune.threads import prepare_environment

logger = logging.getLogger(__name__)

_STORE_RETRY_SECONDS = 1.0
_ONE_JOB_PATIENCE_LEASES = 3.0
"""So many leases a worker of one job waits for it. After one a job whose worker was lost is free."""


def run_worker(settings: WorkerSettings, train: TrainFunction | None = None) -> None:
    """Work jobs until SIGTERM or SIGINT, or until the parent process ends. Blocks; main thread only.

    ``train`` replaces :func:`tune.session.run`. A job that runs when the signal comes stops at its next
    step and goes back to the queue without having used up an attempt.
    """
    if settings.parent_pid is not None:
        die_with_parent(settings.parent_pid, signal.SIGTERM)
    Worker(settings, _load_training(settings) if train is None else train).run()


def _load_training(settings: WorkerSettings) -> TrainFunction:
    """Import the training stack, with the environment that it reads only at import."""
    threads = settings.num_threads or max(1, len(os.sched_getaffinity(0)) - 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    prepare_environment(shares_cpus=True)
    # Ask the driver's management library whether there is a GPU: opening CUDA here would break it in every
    # fork (pytorch.org/docs/stable/notes/multiprocessing.html, "Poison fork").
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from tune import session

    assert not torch.cuda.is_initialized(), "an import opened CUDA, which no forked child could use"
    return session.run


class _StopFlag:
    """Set by SIGTERM and SIGINT. A forked child inherits handler and flag, each process its own copy."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        self.is_set = True


class _Child:
    """The training process of the job in hand, and what was said to it."""

    def __init__(self, process: BaseProcess, job: JobRecord) -> None:
        self.process = process
        self.job = job
        self.beat_at = time.monotonic()
        self.kill_at: float | None = None
        """Set when it was asked to stop."""

    def ask_to_stop(self, grace_seconds: float) -> None:
        """A later call may only leave it less time: a cancel that comes after a pause."""
        kill_at = time.monotonic() + grace_seconds
        if self.kill_at is None:
            self.kill_at = kill_at
            self.process.terminate()
        self.kill_at = min(self.kill_at, kill_at)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Worker:
    """See the module; :func:`run_worker` is the way in."""

    def __init__(self, settings: WorkerSettings, train: TrainFunction) -> None:
        self._settings = settings
        self._train = train
        self._database = Database(settings.database_url)
        self._queue = WorkQueue(
            self._database, gpus=settings.gpus, max_running_per_tenant=settings.max_running_per_tenant
        )
        self._store = JobStore(self._database)
        self._watch = LeaseWatch()
        self._owner = this_owner()
        self._stop = _StopFlag()
        self._child: _Child | None = None
        self._sweeps_at = time.monotonic()
        self._gives_up_at = time.monotonic() + _ONE_JOB_PATIENCE_LEASES * settings.lease_seconds

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop.set)
        logger.info("worker %s is waiting for jobs", self._owner)
        try:
            while not (self._stop.is_set and self._child is None):
                self._wait(self._step_safely())
        finally:
            if self._child is not None:
                self._child.kill()
            self._database.close()
        logger.info("worker %s has stopped", self._owner)

    def _step_safely(self) -> float:
        """One step; returns the seconds to pause after it."""
        try:
            return 0.0 if self._step() else self._settings.poll_seconds
        except (UnavailableError, StorageError) as error:
            logger.warning("the disk or the job store cannot be used just now: %s", error)
            self._give_up_a_silent_lease()
            return _STORE_RETRY_SECONDS
        except ConflictError as error:
            if error.code != LEASE_LOST:
                raise
            logger.warning("%s", error)
            return self._settings.poll_seconds

    def _step(self) -> bool:
        """Do what is due. Returns whether there may be more to do at once."""
        parent = self._settings.parent_pid
        if parent is not None and os.getppid() != parent:
            self._stop.set()
        if self._child is not None:
            return self._tend(self._child)
        self._sweep()
        job = None if self._stop.is_set else self._claim()
        if job is None:
            return False
        self._begin(job)
        if self._settings.job_id is not None:
            self._gives_up_at = 0.0  # one attempt: whoever launched this worker launches another
        return True

    def _wait(self, seconds: float) -> None:
        if self._child is not None:
            self._child.process.join(seconds)
        elif seconds:
            time.sleep(seconds)

    def _claim(self) -> JobRecord | None:
        for seen in self._claimable() if self._settings.job_id is None else self._the_one(self._settings.job_id):
            job = self._queue.claim(seen, owner=self._owner, lease_seconds=self._settings.lease_seconds)
            if job is None:
                continue
            if seen.owner is not None and (killed := end_training(seen.owner, job.id)):
                logger.warning("%s: killed what its silent worker still trained: %s", job.id, killed)
            return job
        return None

    def _claimable(self) -> list[JobRecord]:
        waiting = self._queue.next_waiting()
        return [*self._watch.abandoned(self._queue.running()), *([] if waiting is None else [waiting])]

    def _the_one(self, job_id: str) -> list[JobRecord]:
        """The one job this worker is for, if it may be claimed now. Ends the worker where waiting has no point."""
        try:
            job = self._store.job(job_id)
        except NotFoundError as error:
            logger.warning("%s", error)
            self._stop.set()
            return []
        if job.status not in OPEN or (job.paused and job.status != "running") or time.monotonic() > self._gives_up_at:
            logger.info("%s: there is nothing to do for this worker: the job is %s", job_id, job.status)
            self._stop.set()
            return []
        if job.status == "running":
            return self._watch.abandoned([job])
        return [job] if self._queue.is_due(job_id) else []

    def _begin(self, job: JobRecord) -> None:
        if job.cancel_requested or job.attempts > self._settings.max_attempts:
            self._job_run(job).settle_crash("the worker that had the job was lost")
            self._remove_work_dir(job.id)
            return
        if job.paused:
            self._job_run(job).settle_stop()
            return
        self._database.close()
        context = multiprocessing.get_context("fork")
        process = context.Process(
            target=_child_main,
            args=(self._settings, job, self._train, self._stop, os.getpid()),
            name=job.id,
        )
        process.start()
        logger.info("%s: attempt %d in process %s", job.id, job.attempts, process.pid)
        self._child = _Child(process, job)

    def _tend(self, child: _Child) -> bool:
        if not child.process.is_alive():
            self._bury(child)
            return True
        try:
            if time.monotonic() - child.beat_at >= self._settings.heartbeat_seconds:
                self._queue.heartbeat(child.job)
                child.beat_at = time.monotonic()
            asked = self._queue.asked(child.job)
            if asked == "cancel":
                child.ask_to_stop(self._settings.cancel_grace_seconds)
            elif asked == "pause" or self._stop.is_set:
                child.ask_to_stop(self._settings.stop_grace_seconds)
        except ConflictError as lost:
            if self._store.job(child.job.id).epoch == child.job.epoch:
                # The child itself has just ended the job; it may still tidy up, but not for ever.
                child.kill_at = child.kill_at or time.monotonic() + self._settings.cancel_grace_seconds
            else:
                logger.warning("%s", lost)
                child.kill()
        if child.kill_at is not None and time.monotonic() >= child.kill_at:
            logger.warning("%s: did not stop in time and is killed", child.job.id)
            child.kill()
        return False

    def _bury(self, child: _Child) -> None:
        """The child has exited: write what it could not."""
        job = self._store.job(child.job.id)
        if job.status == "running" and job.epoch == child.job.epoch:
            self._settle(child)
        self._child = None
        child.process.close()
        self._remove_work_dir(job.id)

    def _settle(self, child: _Child) -> None:
        cause = describe_exit(child.process.exitcode or 0)
        logger.warning("%s: the training process ended with %s", child.job.id, cause)
        run = self._job_run(child.job)
        if child.kill_at is None:
            run.settle_crash(cause)
        else:
            run.settle_stop()

    def _give_up_a_silent_lease(self) -> None:
        """Without the store no heartbeat gets through, and after a whole lease another may have the job."""
        child = self._child
        if child is not None and time.monotonic() - child.beat_at >= self._settings.lease_seconds:
            logger.warning("%s: no heartbeat for a whole lease; giving the job up", child.job.id)
            child.kill()
            self._child = None

    def _job_run(self, job: JobRecord) -> JobRun:
        return JobRun(
            self._settings,
            job=job,
            queue=self._queue,
            store=self._store,
            files=FileStore(self._database),
            stop_asked=lambda: self._stop.is_set,
        )

    def _sweep(self) -> None:
        """At the start and now and then: nobody tells a worker of a job that is cancelled while it waits."""
        if time.monotonic() < self._sweeps_at:
            return
        for work_dir in self._settings.jobs_dir.glob("ftjob-*"):
            self._remove_work_dir(work_dir.name)
        self._sweeps_at = time.monotonic() + self._settings.sweep_seconds

    def _remove_work_dir(self, job_id: str) -> None:
        """Throw the checkpoints away once nobody will resume from them."""
        path = self._settings.work_dir(job_id)
        if not path.exists() or self._store.is_open(job_id):
            return
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s: its work directory could not be removed: %s", job_id, error)


def _child_main(
    settings: WorkerSettings, job: JobRecord, train: TrainFunction, stop: _StopFlag, worker_pid: int
) -> None:
    die_with_parent(worker_pid, signal.SIGKILL)
    name_process(job.id)
    # Ctrl-C reaches the whole process group; the worker passes it on as SIGTERM, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    take_devices(job.gpus)
    database = Database(settings.database_url)
    if job.gpus > 1:
        train = InRanks(train, job.gpus, before_fork=database.close)
    run = JobRun(
        settings,
        job=job,
        queue=WorkQueue(database),
        store=JobStore(database),
        files=FileStore(database),
        stop_asked=lambda: stop.is_set,
    )
    # Only here: the exporter has a thread of its own, and the worker, which forks, has none.
    end_export = None if settings.otlp_endpoint is None else tracing.export_to(settings.otlp_endpoint, role="worker")
    try:
        run.run(train)
    finally:
        if end_export is not None:
            end_export()
