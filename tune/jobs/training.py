"""One job, worked inside the forked child: train, publish, and write how it ended.

Exactly one publication: the result's ``ft:`` name is reserved with the job and write-once in the registry.
An attempt that finds it already bound to an artifact of its own job does not train again; it only writes ``succeeded``.
That closes the window between publishing and writing, in which a worker may be killed, paused or stopped. Exports are
made in that window; a warning names those that are missing then. The window left open: a worker may lose its lease
between the check that :class:`~tune.jobs.leased_registry.LeasedRegistry` makes and the publication, before its
successor publishes. Then the successor's publication is refused by the registry, and it adopts the artifact that is
there; clients see one name, one artifact, one final state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from registry import Artifact, Registry, tracing
from registry.errors import (
    CapoError,
    ConflictError,
    InternalError,
    InvalidDataError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from registry.principal import Principal
from tune.digest import file_sha256
from tune.jobs.attempt_trace import AttemptTrace, traced_attempt
from tune.jobs.convert import job_recipe, parse_extension
from tune.jobs.file_store import FileStore
from tune.jobs.files import FileStorage
from tune.jobs.leased_registry import LeasedRegistry
from tune.jobs.observer import JobObserver
from tune.jobs.queue import LEASE_LOST, Asked, Outcome, RequeueReason, WorkQueue
from tune.jobs.records import FileRecord, JobError, JobRecord, NewEvent
from tune.jobs.results import missing_exports, published_result, store_metrics_table
from tune.jobs.settings import WorkerSettings
from tune.jobs.stages import request_param
from tune.jobs.starting_model import base_of
from tune.jobs.store import JobStore
from tune.jobs.training_files import file_ids_of
from tune.progress import FanOut, Observer, StopRequested
from tune.recipe import Recipe

logger = logging.getLogger(__name__)

_WORTH_ANOTHER_ATTEMPT = (StorageError, UnavailableError)
"""Errors of the machine. The same job would meet any other error again."""
_WORK_DIR_BUSY = "work_dir_busy"
"""What :func:`tune.session.run` says of a directory in which another run works."""
_STOP_CHECK_SECONDS = 1.0
_STOP_REASONS: dict[Asked, str] = {"cancel": "the job was cancelled", "pause": "the job was paused"}


class TrainedModel(Protocol):
    """What a run gives back; :class:`tune.session.TrainingResult` is one."""

    @property
    def artifact(self) -> Artifact: ...


class TrainFunction(Protocol):
    """:func:`tune.session.run`, as far as a worker uses it."""

    def __call__(
        self,
        recipe: Recipe,
        *,
        registry: Registry,
        work_dir: Path,
        observer: Observer,
        should_stop: Callable[[], str | None],
        job_id: str | None,
        fine_tuned_name: str | None,
        alias: str | None,
        recipe_dir: Path,
    ) -> TrainedModel: ...


class JobRun:
    """One attempt at one job by one process."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        job: JobRecord,
        queue: WorkQueue,
        store: JobStore,
        files: FileStore,
        stop_asked: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._job = job
        self._queue = queue
        self._store = store
        self._files = files
        self._stop_asked = stop_asked
        self._storage = FileStorage(settings.files_dir)
        self._registry = Registry(settings.registry_dir)
        self._checked_at = time.monotonic()

    def run(self, train: TrainFunction) -> None:
        """Bring the job to an end, or back to the queue. Losing the lease ends the run without a trace."""
        with traced_attempt(self._job) as trace:
            try:
                self._attempt(train, trace)
            except ConflictError as error:
                if error.code != LEASE_LOST:
                    raise
                logger.warning("%s", error)
                tracing.fail(tracing.current_span(), error)
            else:
                if trace.is_recorded:
                    trace.settle(self._store.job(self._job.id))

    def _attempt(self, train: TrainFunction, trace: AttemptTrace) -> None:
        try:
            if not self.adopt():
                self._announce()
                self._train(train, trace)
        except StopRequested as stop:
            logger.info("%s: stopped: %s", self._job.id, stop.reason)
            self.settle_stop()
        except CapoError as error:
            if error.code == LEASE_LOST:
                raise
            if not self.adopt():
                self._settle_error(error)
        except Exception:
            # Nothing that a library raises by accident may leave the job without an end.
            logger.exception("%s: the training failed", self._job.id)
            self.settle_crash("an unexpected error; the worker's log has it under the job's id")

    def adopt(self) -> bool:
        """Write ``succeeded`` if the job's artifact is already published; say whether it was."""
        artifact = published_result(self._job, self._registry)
        if artifact is None:
            return False
        if missing := missing_exports(self._job, artifact, self._registry):
            text = f"The training ended before these exports were made: {', '.join(missing)}; capo export makes them"
            self._queue.add_events(self._job, [NewEvent(text, level="warn", data={"missing_exports": missing})])
        self._succeed(artifact)
        return True

    def settle_stop(self) -> None:
        """The process was asked to stop: by a cancel or a pause, or because the worker is going away."""
        if self.adopt():  # all three came too late, and clients may call the model already
            return
        asked = self._queue.asked(self._job)
        if asked == "cancel":
            self._queue.end_cancelled(self._job)
        elif asked == "pause":
            self._queue.requeue(self._job, "Fine-tuning job paused", reason="paused", counts=False)
        else:
            text = "The worker is shutting down; the job is queued again"
            self._queue.requeue(self._job, text, reason="worker_stopping", counts=False)

    def settle_crash(self, cause: str, *, reason: RequeueReason = "training_lost") -> None:
        """The training process was lost, or its machine failed it: another attempt, or the end."""
        if self.adopt():
            return
        if self._queue.asked(self._job) == "cancel":
            self._queue.end_cancelled(self._job)
            return
        allowed = self._settings.max_attempts
        attempts = min(self._job.attempts, allowed)  # a job taken over after its last attempt counts one more
        if attempts == allowed:
            message = f"The training process failed at attempt {attempts} of {allowed}, the last one: {cause}"
            self._queue.fail(self._job, JobError("training_process_failed", message))
            return
        self._queue.requeue(
            self._job,
            f"The training process failed at attempt {attempts} of {allowed}: {cause}; the job is queued again",
            reason=reason,
            delay_seconds=self._settings.retry_delay_seconds * 2 ** (attempts - 1),
        )

    def _settle_error(self, error: CapoError) -> None:
        logger.warning("%s: %s", self._job.id, error)
        if isinstance(error, InternalError):
            self.settle_crash("an internal error; the worker's log has it under the job's id")
        elif error.code == _WORK_DIR_BUSY:
            # What the worker before left behind, on a machine that stands still or on another one, is not gone yet.
            text = "Another process still works in the job's directory; the job waits for its end"
            delay_seconds = self._settings.busy_retry_seconds
            self._queue.requeue(self._job, text, reason="directory_busy", delay_seconds=delay_seconds, counts=False)
        elif isinstance(error, _WORTH_ANOTHER_ATTEMPT) and self._job.attempts < self._settings.max_attempts:
            self.settle_crash(error.message, reason="machine_fault")
        else:
            param = error.param
            if isinstance(error, InvalidDataError):
                param = request_param(param, parse_extension(self._job.extensions)) or "training_file"
            self._queue.fail(self._job, JobError(error.code, error.message, param))

    def _announce(self) -> None:
        attempts = self._job.attempts
        text = "Fine-tuning job started" + (f", attempt {attempts}" if attempts > 1 else "")
        self._queue.add_events(self._job, [NewEvent(text)])

    def _train(self, train: TrainFunction, trace: AttemptTrace) -> None:
        job = self._job
        trace.turn_to("fine_tuning.prepare")
        self._settings.work_dir(job.id).mkdir(mode=0o700, parents=True, exist_ok=True)
        recipe = self._recipe()
        observer = JobObserver(self._queue, job, checkpoint_every_steps=recipe.checkpoint_every_steps)

        def stop_reason() -> str | None:
            reason = self._should_stop()
            if reason is not None:
                observer.close()  # before the checkpoint that the stop makes
            return reason

        try:
            result = train(
                recipe,
                registry=LeasedRegistry(
                    self._settings.registry_dir,
                    principal=Principal.for_work(job.tenant, house=self._settings.organization),
                    check_lease=lambda: self._queue.check(job),
                ),
                work_dir=self._settings.work_dir(job.id),
                observer=FanOut([observer, trace]) if trace.is_recorded else observer,
                should_stop=stop_reason,
                job_id=job.id,
                fine_tuned_name=job.reserved_name,
                alias=parse_extension(job.extensions).alias,
                recipe_dir=self._settings.files_dir,
            )
        finally:
            observer.close()
        self._succeed(result.artifact)

    def _succeed(self, artifact: Artifact) -> None:
        metrics = artifact.manifest.metrics
        # OpenAI's trained_tokens are all that went through the model; artifacts of older Capos count those with loss.
        tokens = metrics.get("processed_tokens", metrics.get("trained_tokens"))
        trained_tokens = None if tokens is None else int(tokens)
        result_file = store_metrics_table(self._store, self._storage, self._job)
        try:
            self._queue.succeed(self._job, Outcome(artifact.revision, trained_tokens, result_file))
        except ConflictError:
            if result_file is not None:
                self._storage.remove(result_file.id)
            raise

    def _recipe(self) -> Recipe:
        job = self._job
        base_model = self._settings.base_models.get(base_of(job.model))
        if base_model is None:
            offered = ", ".join(sorted(self._settings.base_models)) or "none"
            raise InvalidRequestError(
                f"this worker has no base model {base_of(job.model)!r}; it has: {offered}",
                code="model_not_available",
                param="model",
            )
        training = self._unchanged("training_file", job.training_file)
        validation_rows = 0
        if job.validation_file is not None:
            validation_rows = self._unchanged("validation_file", job.validation_file).rows or 0
        recipe = job_recipe(
            job,
            artifact_name=job.suffix or job.id.removeprefix("ftjob-"),
            base_model=base_model,
            training_rows=training.rows or 0,
            validation_rows=validation_rows,
        )
        seen = {job.training_file, job.validation_file}
        for file_id in {file_id for stage in recipe.stages for file_id in file_ids_of(stage)} - seen:
            self._unchanged("capo.stages", file_id)
        return recipe

    def _unchanged(self, param: str, file_id: str) -> FileRecord:
        """The file's record, once its bytes are proven to be those that were checked at upload."""
        record = self._files.get(file_id)
        try:
            digest = file_sha256(self._storage.path(file_id))
        except FileNotFoundError as error:
            raise NotFoundError(f"the content of {file_id} is missing on this worker", param=param) from error
        if digest != record.sha256:
            raise InvalidDataError(
                f"the content of {file_id} has changed since its upload; upload it again",
                code="file_changed",
                param=param,
            )
        return record

    def _should_stop(self) -> str | None:
        if self._stop_asked():
            return "the worker asked for it"
        now = time.monotonic()
        if now - self._checked_at < _STOP_CHECK_SECONDS:
            return None
        self._checked_at = now
        asked = self._queue.asked(self._job)
        return None if asked is None else _STOP_REASONS[asked]
