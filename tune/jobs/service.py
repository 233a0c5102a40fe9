"""Fine-tuning jobs without HTTP: create, look at, cancel. Everything that can be refused is refused here,
at creation, so that a job that is accepted can only fail over its training.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from registry import Registry
from registry.errors import InvalidNameError, InvalidRequestError, NotFoundError
from registry.names import alias_file_stem, check_name, parse_alias
from tune.jobs.checks import (
    as_one,
    check_integrations,
    check_metadata,
    check_method,
    collect,
    given_hyperparameters,
    given_method,
)
from tune.jobs.convert import held_out_share, job_recipe, resolve_hyperparameters
from tune.jobs.file_store import FileStore
from tune.jobs.idempotency import Idempotency
from tune.jobs.records import EventRecord, FileRecord, JobMethod, JobRecord, NewEvent, NewJob, Page, RowFormat
from tune.jobs.requests import CapoBody, CreateJobBody
from tune.jobs.store import JobStore, fine_tuned_name
from tune.methods import LoraMethod, QloraMethod, extracted_rank
from tune.recipe import Recipe

_ROW_FORMATS: dict[JobMethod, RowFormat] = {"supervised": "chat", "dpo": "preference"}
FEWEST_ROWS = 10
"""OpenAI's minimum for a training file (platform guide "Supervised fine-tuning")."""


@dataclass(frozen=True, slots=True)
class _Files:
    training: FileRecord
    validation: FileRecord | None


class JobService:
    """The fine-tuning API's behaviour. Methods block.

    ``base_models`` maps each served base's id to what a recipe's ``base_model`` takes; a callable is asked
    anew for each job. ``max_lora_rank`` is the serving engine's limit, ``None`` = not known.
    """

    def __init__(
        self,
        store: JobStore,
        files: FileStore,
        registry: Registry,
        *,
        base_models: Mapping[str, str] | Callable[[], Mapping[str, str]],
        max_lora_rank: int | None = None,
    ) -> None:
        self._store = store
        self._file_store = files
        self._registry = registry
        self._base_models = base_models
        self._max_lora_rank = max_lora_rank

    def seen_by(self, tenant: str) -> JobService:
        """The same service as one tenant sees it: nobody else's jobs and files are there."""
        return JobService(
            self._store.seen_by(tenant),
            self._file_store.seen_by(tenant),
            self._registry,
            base_models=self._base_models,
            max_lora_rank=self._max_lora_rank,
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
        checks: tuple[Callable[[], object], ...] = (
            lambda: self._check_model(body.model, bases),
            lambda: self._check_suffix(body, bases),
            lambda: check_metadata(body.metadata),
            lambda: check_method(body),
            lambda: check_integrations(body.integrations),
            lambda: self._check_extension(body, bases),
        )
        for check in checks:
            collect(faults, check)
        files = collect(faults, lambda: self._files(body))
        if faults or files is None:
            raise as_one(faults)
        new = _new_job(body, files)
        # The worker will build this same recipe; one that cannot be built must fail now.
        recipe = job_recipe(
            new,
            artifact_name=body.suffix or "job",
            base_model=bases[body.model],
            training_rows=files.training.rows or 0,
        )
        self._check_rank(recipe)
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
        return self._store.cancel(job_id)

    def pause(self, job_id: str) -> JobRecord:
        return self._store.pause(job_id)

    def resume(self, job_id: str) -> JobRecord:
        return self._store.resume(job_id)

    def events(self, job_id: str, *, after: str | None, limit: int) -> Page[EventRecord]:
        return self._store.events(job_id, after=after, limit=limit)

    def _check_model(self, model: str, bases: Collection[str]) -> None:
        if model in bases:
            return
        offered = ", ".join(sorted(bases)) or "none"
        try:
            self._registry.resolve(model)
        except (NotFoundError, InvalidRequestError):
            reason = "is not a base model of this server"
        else:
            reason = "is itself a fine-tuned model, and training on top of one is not offered"
        raise InvalidRequestError(
            f"model {model[:120]!r} {reason}; base models: {offered}",
            code="model_not_available",
            param="model",
        )

    def _check_suffix(self, body: CreateJobBody, bases: Collection[str]) -> None:
        _check_name("suffix", body.suffix, bases)
        if body.model not in bases:
            return
        try:
            alias_file_stem(parse_alias(fine_tuned_name(body.model, self._store.tenant, body.suffix)))
        except InvalidNameError as error:
            raise InvalidRequestError(f"suffix: {error.message}", code="invalid_suffix", param="suffix") from error

    def _check_extension(self, body: CreateJobBody, bases: Collection[str]) -> None:
        extension = body.capo or CapoBody()
        _check_name("capo.alias", extension.alias, bases)
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

    def _files(self, body: CreateJobBody) -> _Files:
        method = given_method(body)
        training = self._fine_tune_file("training_file", body.training_file, method)
        if training.rows is None or training.rows < FEWEST_ROWS:
            raise InvalidRequestError(
                f"training_file {training.id} has {training.rows or 0} rows; {FEWEST_ROWS} are the minimum",
                code="too_few_rows",
                param="training_file",
            )
        if body.validation_file is None:
            return _Files(training, None)
        validation = self._fine_tune_file("validation_file", body.validation_file, method)
        if validation.sha256 == training.sha256:
            raise InvalidRequestError(
                "validation_file has the same content as training_file, so it would measure only memory; "
                "upload rows that are not trained on",
                param="validation_file",
            )
        return _Files(training, validation)

    def _fine_tune_file(self, param: str, file_id: str, method: JobMethod) -> FileRecord:
        try:
            record = self._file_store.get(file_id)
        except NotFoundError as error:
            raise InvalidRequestError(
                f"{param}: there is no file {file_id[:80]!r}; upload it with purpose 'fine-tune'",
                code="file_not_found",
                param=param,
            ) from error
        if record.purpose != "fine-tune":
            raise InvalidRequestError(
                f"{param}: {file_id} has the purpose {record.purpose!r}, 'fine-tune' is needed",
                code="wrong_purpose",
                param=param,
            )
        needed = _ROW_FORMATS[method]
        if record.row_format != needed:
            raise InvalidRequestError(
                f"{param}: {file_id} holds {record.row_format} rows, and method {method!r} trains on {needed} rows; "
                "give another file, or the method that fits it",
                code="wrong_format",
                param=param,
            )
        return record


def _new_job(body: CreateJobBody, files: _Files) -> NewJob:
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
        metadata=body.metadata,
        extensions=extension.model_dump(mode="json", exclude_unset=True),
    )


def _first_events(body: CreateJobBody, files: _Files) -> list[NewEvent]:
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
