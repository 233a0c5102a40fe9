"""Two tenants and one prompt in a real engine: what one tenant's prompt left in the prefix cache is nobody else's."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import httpx

from capo.keys.records import NewKey
from capo.keys.store import KeyStore
from registry import EMBEDDED_MODEL_ID
from registry.principal import Scope
from tests.e2e.service import Service, running
from tune.jobs.database import Database, sqlite_url

PROMPT = "Tell me about the harbour, the lighthouse and the ferry. " * 8


def hits(service: Service, key: str) -> float:
    """Tokens that the engine found in its prefix cache so far."""
    page = httpx.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {key}"}, trust_env=False).text
    return sum(
        float(value) for value in re.findall(r"^vllm:prefix_cache_hits_total\{[^}]*\} (\S+)$", page, re.MULTILINE)
    )


def ask(service: Service, key: str) -> None:
    answer = httpx.post(
        f"{service.url}/v1/completions",
        json={"model": EMBEDDED_MODEL_ID, "prompt": PROMPT, "max_tokens": 1},
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text


def test_a_tenants_prompt_is_found_in_the_cache_by_itself_and_by_no_other(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "jobs.sqlite"))
    keys = KeyStore(database)
    acme, umbrella = (keys.create(NewKey(tenant, frozenset(Scope))).text for tenant in ("acme", "umbrella"))
    database.close()
    with running(tmp_path, "--workers", "0") as service:
        found = [hits(service, acme)]
        for key in (acme, umbrella, acme, umbrella):
            ask(service, key)
            found.append(hits(service, acme))
    first, foreign, own, again = (after - before for before, after in pairwise(found))
    assert first == 0
    assert foreign == 0, "the other tenant computes it anew, and learns nothing"
    assert own > 0
    assert again > 0
