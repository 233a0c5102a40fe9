"""Fine-tuning jobs without HTTP: create, look at, cancel. Everything that can be refused is refused here,
at creation, so that a job that is accepted can only fail over its training.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from registry import Artifact, Registry, tracing
from registry.errors import InvalidNameError, InvalidRequestError, ModelNotFoundError
from registry.names import alias_file_stem, check_name, parse_alias
from registry.principal import current_principal
from tune.evaluation.libraries import check_installed
from tune.jobs.checkpoints import CheckpointRecord, checkpoints_of
from tune.jobs.checks import (
    as_one,
    check_metadata,
    check_method,
    collect,
    given_hyperparameters,
    given_method,
)
from tune.jobs.convert import held_out_share, job_recipe, resolve_hyperparameters
from tune.jobs.file_store import FileStore
from tune.jobs.idempotency import Idempotency
from tune.jobs.integrations import check_integrations
from tune.jobs.permissions.store import PermissionStore
from tune.jobs.records import EventRecord, JobRecord, NewEvent, NewJob, Page
from tune.jobs.requests import CapoBody, CreateJobBody
from tune.jobs.results import published_result
from tune.jobs.stages import main_stage_of
from tune.jobs.starting_model import StartingModel, starting_model
from tune.jobs.store import JobStore, News, fine_tuned_name
from tune.jobs.training_files import TrainingFiles, further_files, training_files
from tune.methods import LoraMethod, QloraMethod, extracted_rank
from tune.recipe import Recipe
from tune.starting import started_method

_LARGEST_STEP = 999_999_999
"""Of a checkpoint's name (registry/names.py); the job's own name must leave room for it."""


class JobService:
    """The fine-tuning API's behaviour. Methods block.

    ``base_models`` maps each served base's id to what a recipe's ``base_model`` takes; a callable is asked
    anew for each job. ``max_lora_rank`` is the serving engine's limit and ``max_gpus`` what the largest worker offers,
    ``None`` = not known.
    """

    def __init__(
        self,
        store: JobStore,
        files: FileStore,
        registry: Registry,
        permissions: PermissionStore,
        *,
        base_models: Mapping[str, str] | Callable[[], Mapping[str, str]],
        max_lora_rank: int | None = None,
        max_gpus: int | None = None,
    ) -> None:
        self._store = store
        self._file_store = files
        self._registry = registry
        self._permissions = permissions
        self._base_models = base_models
        self._max_lora_rank = max_lora_rank
        self._max_gpus = max_gpus

    def seen_by(self, tenant: str) -> JobService:
        """The same service as one tenant sees it: nobody else's jobs and files are there."""
        return JobService(
            self._store.seen_by(tenant),
            self._file_store.seen_by(tenant),
            self._registry,
            self._permissions,
            base_models=self._base_models,
            max_lora_rank=self._max_lora_rank,
            max_gpus=self._max_gpus,
        )

    def create(self, body: CreateJobBody, asked: Idempotency | None = None) -> JobRecord:
        """Check the request as a whole and queue the job; a repeated request gets the job it made.

        Raises:
            ConflictError: the key of ``asked`` made another job.
            InvalidRequestError: with every fault in the message and the first one's field in ``param``.
        """
        if asked is not None and (made := self._store.made_by(asked)) is not None:
            return made
        bases = self._base_models() if callable(self._base_models) else self._base_models
        faults: list[InvalidRequestError] = []
        start: StartingModel | None = collect(faults, lambda: self._start(body.model, bases))
        checks: tuple[Callable[[], object], ...] = (
            lambda: self._check_suffix(body, bases, start),
            lambda: check_metadata(body.metadata),
            lambda: check_method(body),
            lambda: check_integrations(body.integrations),
            lambda: self._check_extension(body, bases),
        )
        for check in checks:
            collect(faults, check)
        files: TrainingFiles | None = collect(faults, lambda: training_files(body, self._file_store))
        if faults or files is None or start is None:
            raise as_one(faults)
        new = _new_job(body, files)
        # The worker will build this same recipe; one that cannot be built must fail now.
        recipe = job_recipe(
            new,
            artifact_name=body.suffix or "job",
            base_model=bases[start.base],
            training_rows=files.training.rows or 0,
            validation_rows=0 if files.validation is None else files.validation.rows or 0,
        )
        if recipe.evaluation is not None:
            check_installed(recipe.evaluation, param="capo.evaluation")
        self._check_rank(recipe if start.adapter is None else _going_on(recipe, start.adapter))
        main_stage = main_stage_of(body.capo or CapoBody())
        new = replace(new, further_files=further_files(recipe, main_stage, self._file_store))
        return self._store.create_job(new, _first_events(body, files), asked=asked)

    def job(self, job_id: str) -> JobRecord:
        return self._store.job(job_id)

    def jobs(
        self,
        *,
        after: str | None,
        limit: int,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[JobRecord]:
        return self._store.jobs(after=after, limit=limit, metadata=metadata, without_metadata=without_metadata)

    def cancel(self, job_id: str) -> JobRecord:
        job = self._store.job(job_id)
        is_published = job.status == "running" and published_result(job, self._registry) is not None
        return self._store.cancel(job_id, waits_for_a_worker=is_published)

    def pause(self, job_id: str) -> JobRecord:
        return self._store.pause(job_id)

    def resume(self, job_id: str) -> JobRecord:
        return self._store.resume(job_id)

    def event_sequence(self, job_id: str, event_id: str | None) -> int:
        return self._store.event_sequence(job_id, event_id)

    def news(self, job_id: str, sequence: int) -> News:
        return self._store.news(job_id, sequence)

    def checkpoints(self, job_id: str, *, after: str | None, limit: int) -> Page[CheckpointRecord]:
        return checkpoints_of(self._store.job(job_id), self._registry, after=after, limit=limit)

    def events(self, job_id: str, *, after: str | None, limit: int) -> Page[EventRecord]:
        return self._store.events(job_id, after=after, limit=limit)

    def _start(self, model: str, bases: Collection[str]) -> StartingModel:
        return starting_model(
            model, bases, registry=self._registry, tenant=self._store.tenant, permissions=self._permissions
        )

    def _check_suffix(self, body: CreateJobBody, bases: Collection[str], start: StartingModel | None) -> None:
        _check_name("suffix", body.suffix, bases)
        if start is None:
            return
        name = fine_tuned_name(start.base, self._store.tenant, body.suffix)
        try:
            alias_file_stem(parse_alias(f"{name}:ckpt-step-{_LARGEST_STEP}"))
        except InvalidNameError as error:
            raise InvalidRequestError(f"suffix: {error.message}", code="invalid_suffix", param="suffix") from error

    def _check_alias_is_free(self, alias: str | None) -> None:
        """The registry holds this when the model is published; an hour of training earlier is better."""
        if alias is None:
            return
        try:
            owner = self._registry.alias(alias).tenant
        except ModelNotFoundError:
            return
        if not current_principal().owns(owner):
            raise InvalidRequestError(
                f"capo.alias: the name {alias!r} is taken; choose another one", code="alias_taken", param="capo.alias"
            )

    def _check_extension(self, body: CreateJobBody, bases: Collection[str]) -> None:
        extension = body.capo or CapoBody()
        _check_name("capo.alias", extension.alias, bases)
        self._check_alias_is_free(extension.alias)
        if extension.validation_share is not None and body.validation_file is not None:
            raise InvalidRequestError(
                f"validation_file={body.validation_file!r} and capo.validation_share="
                f"{extension.validation_share} exclude each other; give one",
                param="capo.validation_share",
            )
        if extension.lora is not None and extension.method is not None:
            raise InvalidRequestError(
                "capo.lora and capo.method both say what is trained; give one of them", param="capo.method"
            )
        if self._max_gpus is not None and extension.gpus > self._max_gpus:
            raise InvalidRequestError(
                f"capo.gpus={extension.gpus} is above {self._max_gpus}, the GPUs of the largest worker here; the job "
                "would wait for ever, so ask for fewer",
                param="capo.gpus",
            )
        rank = None if extension.lora is None else extension.lora.rank
        if rank is not None and self._max_lora_rank is not None and rank > self._max_lora_rank:
            raise InvalidRequestError(
                f"capo.lora.rank={rank} is above {self._max_lora_rank}, the largest that this server serves",
                param="capo.lora.rank",
            )

    def _check_rank(self, recipe: Recipe) -> None:
        method = recipe.method
        rank = method.rank if isinstance(method, LoraMethod | QloraMethod) else extracted_rank(method)
        if rank is not None and self._max_lora_rank is not None and rank > self._max_lora_rank:
            raise InvalidRequestError(
                f"capo.method publishes an adapter of rank {rank}, above {self._max_lora_rank}, the largest that this "
                "server serves",
                param="capo.method",
            )


def _going_on(recipe: Recipe, adapter: Artifact) -> Recipe:
    """The recipe with the adapter's shape; what the worker would refuse is refused now, in the request's words."""
    assert isinstance(recipe.method, LoraMethod | QloraMethod), recipe.method
    try:
        return recipe.model_copy(update={"method": started_method(recipe.method, adapter)})
    except InvalidRequestError as error:
        param = f"capo.{error.param}" if error.param and error.param.startswith("method.") else "model"
        raise InvalidRequestError(error.message, code=error.code, param=param) from error


def _new_job(body: CreateJobBody, files: TrainingFiles) -> NewJob:
    extension = body.capo or CapoBody()
    return NewJob(
        model=body.model,
        training_file=files.training.id,
        validation_file=None if files.validation is None else files.validation.id,
        suffix=body.suffix,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        hyperparameters=resolve_hyperparameters(
            given_hyperparameters(body),
            extension,
            rows=files.training.rows or 0,
            has_validation_file=files.validation is not None,
            method=given_method(body),
        ),
        method=given_method(body),
        priority=extension.priority,
        gpus=extension.gpus,
        metadata=body.metadata,
        extensions=extension.model_dump(mode="json", exclude_unset=True),
        integrations=[given.model_dump(mode="json", exclude_none=True) for given in body.integrations or ()],
        trace_headers=tracing.headers_of(tracing.current_span()) or None,
    )


def _first_events(body: CreateJobBody, files: TrainingFiles) -> list[NewEvent]:
    rows = files.training.rows or 0
    share = held_out_share(body.capo or CapoBody(), rows=rows, has_validation_file=files.validation is not None)
    events = [NewEvent(f"Files validated: {rows} training rows", data={"rows": rows})]
    if share > 0:
        text = f"{share:.0%} of the rows are held out for validation; capo.validation_share: 0 turns this off"
        events.append(NewEvent(text, data={"validation_share": share}))
    return [*events, NewEvent("Job is queued")]


def _check_name(param: str, name: str | None, bases: Collection[str]) -> None:
    if name is None:
        return
    try:
        check_name(name, reserved=bases)
    except InvalidNameError as error:
        raise InvalidRequestError(
            f"{param}: {error.message}", code=f"invalid_{param.rpartition('.')[2]}", param=param
        ) from error
