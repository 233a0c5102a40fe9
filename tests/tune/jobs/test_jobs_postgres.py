"""Real worker processes on either database."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack

import httpx
import psycopg
import pytest
from sqlalchemy import text

from registry.errors import InvalidRequestError, UnavailableError
from tests.tune.jobs import standins
from tests.tune.jobs.postgres import new_database
from tests.tune.jobs.support import BASE, Place, chat_rows, serve, wait_until
from tests.tune.jobs.test_jobs_worker import worker
from tune.jobs import database, migrations
from tune.jobs.database import Database
from tune.jobs.rows import new_id


def test_three_workers_train_each_of_twelve_jobs_exactly_once(any_place: Place) -> None:
    place = any_place
    training_file = place.upload(chat_rows(20)).id
    ids = [place.queue_job(training_file).id for _ in range(12)]
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(worker(place, standins.trains_well, lease_seconds=30.0))
        wait_until(lambda: all(place.store.job(job_id).status == "succeeded" for job_id in ids), seconds=60)
    assert sorted(standins.attempts(place.directory)) == sorted(ids)
    assert len(place.registry.artifacts()) == 12
    assert {place.store.job(job_id).attempts for job_id in ids} == {1}


def test_a_nul_in_an_id_a_cursor_or_a_filter_is_a_wrong_request_on_either_database(any_place: Place) -> None:
    asked = {
        "/fine_tuning/jobs/ftjob-%00": 404,
        "/fine_tuning/jobs/ftjob-%00/events": 404,
        "/fine_tuning/jobs?after=%00": 400,
        "/fine_tuning/jobs?metadata[k]=%00": 200,
        "/files/file-%00": 404,
        "/files?after=%00": 400,
        "/files?purpose=%00": 200,
        "/webhook_endpoints/%00": 404,
    }
    with serve(any_place) as url, httpx.Client(trust_env=False, base_url=f"{url}/v1") as client:
        answers = {path: client.get(path) for path in asked}
        made = client.post("/fine_tuning/jobs", json={"model": BASE, "training_file": "file-\0"})
    assert made.status_code == 400
    is_postgres = any_place.database_url.startswith("postgresql")
    for path, status in asked.items():
        assert answers[path].status_code == (400 if is_postgres else status), answers[path].text
        if is_postgres:
            assert "NUL" in answers[path].json()["error"]["message"]


@pytest.mark.parametrize("url", ["postgresql+nodriver://host/capo", "oracle9://host/capo"])
def test_a_database_without_its_driver_is_refused_with_what_to_install(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="capo-llm\\[postgres\\]"):
        Database(url)


def test_a_server_that_takes_connections_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "CONNECT_TIMEOUT_SECONDS", 2)  # the least that libpq knows
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="does not answer"):
            Database(f"postgresql+psycopg://capo@127.0.0.1:{silent.getsockname()[1]}/capo")
        assert time.monotonic() - began < 20


def test_a_statement_that_hangs_is_cut_and_the_next_one_works(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "STATEMENT_TIMEOUT_SECONDS", 0.2)
    store = Database(new_database(postgres, new_id("test_", 8)))
    with pytest.raises(UnavailableError), store.read() as connection:
        connection.execute(text("SELECT pg_sleep(20)"))
    with store.read() as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "200ms"
    store.close()


def test_what_the_url_says_of_timeouts_counts(postgres: str) -> None:
    url = new_database(postgres, new_id("test_", 8))
    store = Database(f"{url}&options=-c%20statement_timeout%3D7000&connect_timeout=3")
    with store.read() as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "7s"
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        given = driver.info.get_parameters()
        assert (given["connect_timeout"], given["keepalives_idle"]) == ("3", "10")
    store.close()


def test_a_migration_may_take_as_long_as_it_takes(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "STATEMENT_TIMEOUT_SECONDS", 0.2)
    url = new_database(postgres, new_id("test_", 8))
    opened: list[Database] = []
    with psycopg.connect(url.replace("+psycopg", "")) as other:  # a process that migrates
        other.execute("SELECT pg_advisory_xact_lock(%s)", [migrations._LOCK_NUMBER])
        opening = threading.Thread(target=lambda: opened.append(Database(url)))
        opening.start()
        opening.join(1.5)
        assert opening.is_alive(), "it waits for the other one"
    opening.join(20)
    assert len(opened) == 1
    with opened[0].read() as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "200ms", "lifted for that alone"
    opened[0].close()
