"""Jobs on several GPUs: a process for each, and to each worker GPUs of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry import Registry
from registry.errors import InvalidRequestError
from tests.tune.jobs import standins
from tests.tune.jobs.support import Place, chat_rows
from tests.tune.jobs.test_jobs_worker import settings_for
from tune.jobs.gpus import divide_devices
from tune.jobs.ranks import InRanks
from tune.jobs.records import JobRecord
from tune.jobs.settings import WorkerSettings
from tune.jobs.worker import run_worker
from tune.progress import SilentObserver
from tune.recipe_file import parse_recipe


def _run_worker_that_sees(devices: str, settings: WorkerSettings) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    run_worker(settings, standins.trains_in_ranks)


def worked_where_seen(place: Place, devices: str, *, gpus: int) -> JobRecord:
    """A job that was worked by a worker that sees ``devices`` and offers all of them."""
    job = place.queue_job(place.upload(chat_rows(20)).id, gpus=gpus)
    settings = settings_for(place, gpus=len(devices.split(",")), job_id=job.id)
    process = multiprocessing.get_context("forkserver").Process(target=_run_worker_that_sees, args=(devices, settings))
    process.start()
    process.join(60)
    process.kill()
    return place.store.job(job.id)


def told_by(place: Place) -> list[dict[str, Any]]:
    """What the processes of a job saw of their environment, by rank."""
    return [json.loads(path.read_text()) for path in sorted(place.directory.glob("rank-*.json"))]


def test_a_job_of_two_gpus_is_two_processes_that_find_each_other_and_see_two_gpus(place: Place) -> None:
    job = worked_where_seen(place, "4,5,6", gpus=2)
    assert job.status == "succeeded"
    first, second = told_by(place)
    assert (first.pop("RANK"), second.pop("RANK")) == ("0", "1")
    assert (first.pop("LOCAL_RANK"), second.pop("LOCAL_RANK")) == ("0", "1"), "which of the visible GPUs is whose"
    assert first.pop("pid") != (second_pid := second.pop("pid"))
    assert first == second, "they meet at one address"
    assert (first["WORLD_SIZE"], first["CUDA_VISIBLE_DEVICES"]) == ("2", "4,5")
    assert first["sum"] == 1 + 2, "as torch joins them"
    assert not psutil.pid_exists(second_pid), "it lives no longer than the job"
    assert standins.attempts(place.directory) == [job.id], "one run, not one for each process"


def test_a_job_of_one_gpu_is_one_process_that_sees_no_other_gpu(place: Place) -> None:
    assert worked_where_seen(place, "GPU-ab,GPU-cd", gpus=1).status == "succeeded"
    (told,) = told_by(place)
    assert (told["WORLD_SIZE"], told["CUDA_VISIBLE_DEVICES"]) == (None, "GPU-ab")


def _run_with_a_lost_rank(directory: Path) -> None:
    row = {"name": "lost", "base_model": "capo-tiny", "stages": [{"kind": "sft", "data": [{"path": "rows.jsonl"}]}]}
    InRanks(standins.loses_a_rank, 2, before_fork=lambda: None, grace_seconds=0.2)(
        parse_recipe(row),
        registry=Registry(directory / "registry"),
        work_dir=directory,
        observer=SilentObserver(),
        should_stop=lambda: None,
        job_id="ftjob-lost",
        fine_tuned_name=None,
        alias=None,
        recipe_dir=directory,
    )


def test_a_job_that_loses_one_of_its_processes_ends_instead_of_waiting_for_it(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=_run_with_a_lost_rank, args=(tmp_path,))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL, "which the worker takes for a lost training process"


class TestWorkersOfOneMachine:
    def test_each_has_gpus_of_its_own(self) -> None:
        assert divide_devices(["0", "1"], workers=2, gpus=None) == [("0",), ("1",)]
        assert divide_devices(["0", "1", "2"], workers=2, gpus=None) == [("0", "1"), ("2",)]
        assert divide_devices(["2", "3", "5", "7"], workers=2, gpus=1) == [("2",), ("3",)]

    def test_too_few_gpus_are_refused_by_name(self) -> None:
        with pytest.raises(InvalidRequestError, match=r"3 local workers need 3 GPUs, and 2 can be seen \(0, 1\)"):
            divide_devices(["0", "1"], workers=3, gpus=None)
        with pytest.raises(InvalidRequestError, match=r"2 local workers need 4 GPUs, and 3 can be seen"):
            divide_devices(["0", "1", "2"], workers=2, gpus=2)

    def test_those_that_offer_none_share_what_is_there(self) -> None:
        assert divide_devices(["0"], workers=2, gpus=0) == [None, None]
        assert divide_devices([], workers=2, gpus=None) == [None, None], "a machine without GPUs"
        assert divide_devices(["0"], workers=0, gpus=None) == []
