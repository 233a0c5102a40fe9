"""The keys' table, on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest

from capo.keys.records import KeyLimits, NewKey
from capo.keys.ring import KeyRing
from capo.keys.store import KeyStore
from registry.errors import AuthenticationError
from registry.principal import Scope
from tests.tune.jobs.support import Place


def test_keys_are_kept_rotated_and_revoked_in_either_database(any_place: Place) -> None:
    store = KeyStore(any_place.database)
    limits = KeyLimits(requests_per_minute=60, tokens_per_minute=6_000, concurrency=4)
    new = NewKey("acme", frozenset({Scope.INFER, Scope.TUNE}), frozenset({"support"}), limits, expires_at=2**33)
    first = store.create(new)
    second = store.rotate(first.key_id, grace_seconds=60)
    ring = KeyRing(store)
    ring.read()
    found = ring.find(first.text)
    assert found == ring.find(second.text)
    assert NewKey(found.tenant, found.scopes, found.models, found.limits, found.expires_at) == new
    unlimited = store.create(NewKey("umbrella", frozenset({Scope.METRICS})))
    store.revoke(first.key_id)
    ring.read()
    assert ring.find(unlimited.text).models is None
    for secret in (first, second):
        with pytest.raises(AuthenticationError):
            ring.find(secret.text)
    assert {key.id for key in store.all()} == {first.key_id, unlimited.key_id}
