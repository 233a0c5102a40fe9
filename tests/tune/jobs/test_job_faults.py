"""In whose words a job says what was wrong with it."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from registry.errors import InvalidDataError
from tests.tune.jobs.support import Place, chat_rows
from tests.tune.jobs.test_jobs_worker import settings_for
from tune.jobs.file_store import FileStore
from tune.jobs.queue import WorkQueue
from tune.jobs.store import JobStore
from tune.jobs.training import JobRun


@pytest.mark.parametrize(
    ("stages", "fault", "param"),
    [
        (None, None, "training_file"),
        (None, "stages[0].data[0]", "training_file"),
        (None, "stages[0].validation", "validation_file"),
        (["other", "own"], "stages[0].data[0]", "capo.stages[0]"),
        (["other", "own"], "stages[1].data[0]", "training_file"),
        (["other", "own"], "stages[1].validation", "validation_file"),
        (["own", "other"], "stages[1].validation", "capo.stages[1]"),
    ],
)
def test_a_fault_of_data_names_the_field_of_the_request_that_names_the_file(
    place: Place, stages: list[str] | None, fault: str | None, param: str
) -> None:
    training, validation = place.upload(chat_rows(10)).id, place.upload(chat_rows(10, first=90)).id
    other = {"kind": "sft", "data": [{"path": training}]}
    extensions = {} if stages is None else {"stages": [other if stage == "other" else {} for stage in stages]}
    job = place.queue_job(training, validation_file=validation, extensions=extensions)
    queue = WorkQueue(place.database)
    claimed = queue.claim(job, owner="worker", lease_seconds=30)
    assert claimed is not None

    def finds_bad_data(*_given: Any, **_named: Any) -> NoReturn:
        raise InvalidDataError("line 3 is wrong", param=fault, line=3)

    JobRun(
        settings_for(place),
        job=claimed,
        queue=queue,
        store=JobStore(place.database),
        files=FileStore(place.database),
        stop_asked=lambda: False,
    ).run(finds_bad_data)
    failed = place.store.job(job.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.error.param) == ("failed", "invalid_data", param)
