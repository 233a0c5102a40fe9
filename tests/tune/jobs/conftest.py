from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.tune.jobs.postgres import new_database, running_postgres
from tests.tune.jobs.support import Place, client_of, open_place, serve
from tune.jobs.rows import new_id


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    opened = open_place(tmp_path)
    yield opened
    opened.database.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with running_postgres() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgresql"])
def any_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """As ``place``, on each kind of database."""
    url = None
    if request.param == "postgresql":
        url = new_database(request.getfixturevalue("postgres"), new_id("test_", 8))
    opened = open_place(tmp_path, database_url=url)
    yield opened
    opened.database.close()


@pytest.fixture
def url(place: Place) -> Iterator[str]:
    with serve(place) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with client_of(url) as opened:
        yield opened


@pytest.fixture(scope="module")
def quiet_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Shared by tests whose requests are all refused, so that nothing in it changes."""
    opened = open_place(tmp_path_factory.mktemp("quiet"))
    yield opened
    opened.database.close()


@pytest.fixture(scope="module")
def quiet_url(quiet_place: Place) -> Iterator[str]:
    with serve(quiet_place) as address:
        yield address


@pytest.fixture(scope="module")
def quiet_client(quiet_url: str) -> Iterator[OpenAI]:
    with client_of(quiet_url) as opened:
        yield opened
